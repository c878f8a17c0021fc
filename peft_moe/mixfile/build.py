"""``build_mixture``: from a mix file to a saved mixture, the same bytes every time."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel, get_peft_model
from transformers import AutoTokenizer, set_seed

from ..errors import PeftMoeError
from ..experts.extraction.extract import extract_adapter
from ..experts.extraction.files import task_of
from ..experts.extraction.report import REPORT_FILE, ExtractionReport
from ..fitting import FitReport, fit_router
from ..io.atomic import check_new_folder, new_folder
from ..io.checkpoint import Checkpoint, quiet_transformers
from .entries import ExpertEntry
from .inspect import Preflight, inspect_file, refuse, torch_dtype
from .inspection_report import Inspection
from .schema import MixFile

FILE_COPY = "mix.yaml"


@dataclass
class MixReport:
    """What :func:`build_mixture` did.

    Attributes:
        out: the mixture's folder.
        inspection: what was said beforehand.
        extracted: reports of full models that were extracted now, by expert.
        kept: adapters of full models, by expert; those not in ``extracted`` were there from before.
        fit: what the fit of the routers saw; None without one.
        seconds: how long it took.
    """

    out: Path
    inspection: Inspection
    extracted: dict[str, ExtractionReport] = field(default_factory=dict)
    kept: dict[str, Path] = field(default_factory=dict)
    fit: FitReport | None = None
    seconds: float = 0.0


def build_mixture(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    device: str = "cpu",
    overwrite: bool = False,
    progress: bool = True,
    before: Callable[[Inspection], None] | None = None,
) -> MixReport:
    """Build the mixture that a file describes, and save it.

    Full models become adapters first; these are kept in ``<file's name>.extracted`` beside the file, and used
    again while neither the models nor the settings change.

    Args:
        path: the mix file.
        out: folder of the mixture, which ``PeftModel.from_pretrained(base, out)`` loads.
        device: where the base runs while routers are fitted, and decompositions run.
        overwrite: replace ``out``.
        progress: whether to show bars.
        before: called with the inspection, before any weight loads.

    Raises:
        PeftMoeError: everything that the inspection finds, or a fit that cannot be; ``out`` is not written.
    """
    started = time.perf_counter()
    flight = inspect_file(path, download=True)
    if before is not None:
        before(flight.report)
    refuse(flight)
    file, base = flight.file, flight.base
    assert file is not None
    assert base is not None
    inputs = [base.folder, *(entry.source for entry in file.experts if os.path.isdir(entry.source))]
    place = check_new_folder(out, inputs, overwrite=overwrite)
    data = _fit_data(file)
    report = MixReport(place, flight.report)
    sources = {entry.name: entry.source for entry in file.experts}
    for entry in file.experts:
        if entry.name in flight.plans:
            sources[entry.name] = str(_extracted(entry, file, flight, report, device, progress))
    model = _mixture(file, base, sources, device)
    if file.fit is not None:
        report.fit = _fit(model, file, base, data, progress)
    _write(model, file, place)
    report.seconds = time.perf_counter() - started
    return report


def _extracted(
    entry: ExpertEntry, file: MixFile, flight: Preflight, report: MixReport, device: str, progress: bool
) -> Path:
    plan = flight.plans[entry.name]
    state = {"base": _state(plan.base), "model": _state(plan.model), "settings": entry.extract}
    key = hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()[:12]
    folder = file.path.resolve().parent / f"{file.path.stem}.extracted" / f"{entry.name}-{key}"
    report.kept[entry.name] = folder
    if not (folder / REPORT_FILE).is_file():
        how: dict[str, Any] = dict(entry.extract)
        report.extracted[entry.name] = extract_adapter(
            plan.base.location, plan.model.location, folder, device=device, progress=progress, **how
        )
    return folder


def _state(model: Checkpoint) -> list[Any]:
    """Which files these are; reading them to know would take as long as extracting them again."""
    files = sorted({at.path for at in model.tensors.values()})
    stats = [os.stat(path) for path in files]
    return [
        model.location,
        [[os.path.basename(p), s.st_size, s.st_mtime_ns] for p, s in zip(files, stats, strict=True)],
    ]


def _mixture(file: MixFile, base: Checkpoint, sources: dict[str, str], device: str) -> PeftModel:
    kind: Any = getattr(transformers, str(base.config["architectures"][0]))
    with quiet_transformers():
        model = kind.from_pretrained(base.folder, dtype=torch_dtype(file, base), trust_remote_code=False).to(
            device
        )
    model.name_or_path = base.name
    set_seed(file.seed)
    mixture = get_peft_model(model, file.config(sources, task_type=task_of(kind.__name__)))
    # A full model's record names the model, not the folder that its adapter happened to be kept in.
    given = {entry.name: entry.source for entry in file.experts}
    config: Any = mixture.peft_config["default"]
    for record in config.experts:
        record["source"] = given[record["name"]].split("@")[0]
    return mixture


def _fit_data(file: MixFile) -> list[dict[str, Any]]:
    """Labelled samples, read before any weight loads."""
    data = (file.fit or {}).get("data")
    if data is None:
        return []
    from ..io.text_data import load_text_dataset

    try:
        return list(load_text_dataset(data))
    except ValueError as error:
        raise PeftMoeError(f"fit.data: {error}") from error


def _fit(
    model: PeftModel, file: MixFile, base: Checkpoint, data: list[dict[str, Any]], progress: bool
) -> FitReport:
    assert file.fit is not None
    how = {key: value for key, value in file.fit.items() if key != "data"}
    if file.prompts:
        how = {"method": "centroid", **how}
    tokenizer = None
    if data or file.prompts:
        try:
            with quiet_transformers():
                tokenizer = AutoTokenizer.from_pretrained(base.folder, trust_remote_code=False)
        except (OSError, ValueError, KeyError) as error:
            raise PeftMoeError(
                f"the router is fitted from text, and {base.location} has no tokenizer that can be read "
                f"({str(error).splitlines()[0]}); save it beside the base"
            ) from error
    prompts = file.prompts or None
    return fit_router(model, data, tokenizer, prompts=prompts, seed=file.seed, progress=progress, **how)


def _write(model: PeftModel, file: MixFile, place: Path) -> None:
    with new_folder(place) as folder:
        model.save_pretrained(str(folder))
        shutil.copyfile(file.path, folder / FILE_COPY)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
