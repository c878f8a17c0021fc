"""``inspect_file``: what a mix file is going to do, said before any weight loads."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import get_peft_model

from ..errors import PeftMoeError
from ..experts.base_modules import BaseView
from ..experts.checks import check_expert_names, check_one_base
from ..experts.extraction.files import task_of
from ..experts.extraction.pairs import ExtractionPlan
from ..experts.extraction.svd import RankRule
from ..experts.spec import ExpertSpec
from ..io.checkpoint import Checkpoint, quiet_transformers
from ..io.dtypes import FILE_BYTES, NAMED_DTYPES, name_of_word
from .entries import ExpertEntry
from .inspect_parts import inspect_adapter, inspect_mixture, inspect_model, kind_of, model_facts
from .inspection_report import Inspection
from .schema import MixFile, read_mix_file


@dataclass
class Preflight:
    """A mix file, its base, and what was found.

    Attributes:
        file: the file; None if it cannot be read.
        base: the base's configs and headers.
        report: what was found.
        specs: the experts that can be mixed, by name; of full models at the highest possible rank.
        plans: extractions to be done, by expert.
    """

    report: Inspection
    file: MixFile | None = None
    base: Checkpoint | None = None
    specs: dict[str, ExpertSpec] = field(default_factory=dict)
    plans: dict[str, ExtractionPlan] = field(default_factory=dict)


def inspect_paths(paths: list[str], base: str | None = None) -> list[Inspection]:
    """Adapters, full models, saved mixtures and mix files, each by its headers.

    Args:
        paths: folders, Hub ids, or .yaml files.
        base: folder or Hub id that adapters and models are held against.
    """
    held, view = None, None
    if base is not None:
        held = Checkpoint.open(base, download=False)
        view = BaseView.of(_named(held))
    found = []
    for path in paths:
        try:
            kind = kind_of(path)
        except PeftMoeError as error:
            found.append(Inspection("unknown", path, path, problems=[str(error)]))
            continue
        name = os.path.basename(path.rstrip("/")) or path
        if kind == "mix file":
            found.append(inspect_file(path).report)
        elif kind == "mixture":
            found.append(inspect_mixture(name, path))
        elif kind == "adapter":
            found.append(inspect_adapter(name, path, view)[0])
        else:
            found.append(inspect_model(name, path, held)[0])
    return found


def inspect_file(path: str | os.PathLike[str], *, download: bool = False) -> Preflight:
    """Everything that a mix file names, held against its base and each other.

    Args:
        path: of the file.
        download: whether full models on the Hub may be downloaded; adapters are small, and always are.
    """
    report = Inspection("mix file", os.fspath(path), os.fspath(path))
    flight = Preflight(report)
    try:
        file = flight.file = read_mix_file(path)
        report.notes += file.notes
        base = flight.base = Checkpoint.open(file.base, download=download)
        empty = _named(base)
        check_expert_names([entry.name for entry in file.experts], empty)
    except PeftMoeError as error:
        report.problems.append(str(error))
        return flight
    facts = model_facts(base)
    report.parts.append(Inspection("base", base.location, base.location, facts))
    view = BaseView.of(empty)
    for entry in file.experts:
        _inspect_expert(entry, flight, view, download)
    if not report.all_problems:
        try:
            _check_one_base(flight)
            report.facts.update(_mixture_facts(flight))
        except (PeftMoeError, ValueError) as error:
            report.problems.append(str(error))
    return flight


def _named(base: Checkpoint) -> Any:
    """The empty base under the name that the mixture will record."""
    empty = base.empty_model()
    empty.name_or_path = base.name
    return empty


def _inspect_expert(entry: ExpertEntry, flight: Preflight, view: BaseView, download: bool) -> None:
    assert flight.file is not None
    assert flight.base is not None
    try:
        kind = kind_of(entry.source)
    except PeftMoeError as error:
        flight.report.parts.append(Inspection("unknown", entry.name, entry.source, problems=[str(error)]))
        return
    if kind == "model":
        part, plan = inspect_model(entry.name, entry.source, flight.base, entry.extract, download=download)
        if plan is not None:
            flight.plans[entry.name] = plan
            flight.specs[entry.name] = _bound(entry, plan)
    elif kind == "adapter":
        mismatch = bool(flight.file.fields.get("allow_base_mismatch"))
        part, spec = inspect_adapter(entry.name, entry.source, view, allow_base_mismatch=mismatch)
        if spec is not None:
            flight.specs[entry.name] = spec
    else:
        part = Inspection(kind, entry.name, entry.source)
        part.problems.append(f"expert {entry.name!r} is a {kind}: give the adapters that it was made of")
    if entry.positive:
        part.facts["prompts"] = f"{len(entry.positive)} positive, {len(entry.negative)} negative"
    flight.report.parts.append(part)


def _bound(entry: ExpertEntry, plan: ExtractionPlan) -> ExpertSpec:
    """The expert at the highest rank that an extraction may give it."""
    limit = RankRule(
        entry.extract.get("rank"),
        entry.extract.get("energy"),
        entry.extract.get("max_rank", 64),
        bool(entry.extract.get("dense")),
    ).limit
    ranks = {pair.name: min(limit, *pair.features) for pair in plan.taken}
    limit = max(ranks.values(), default=1)
    return ExpertSpec(
        entry.name,
        source=entry.source,
        base_model=plan.base.name,
        r=limit,
        lora_alpha=limit,
        rank_pattern=ranks,
        alpha_pattern={name: float(rank) for name, rank in ranks.items()},
        target_modules=sorted(ranks),
    )


def _check_one_base(flight: Preflight) -> None:
    assert flight.file is not None
    if not flight.file.fields.get("allow_base_mismatch"):
        named = {
            n: {"base_model_name_or_path": s.base_model} for n, s in flight.specs.items() if s.base_model
        }
        check_one_base(named)


def _mixture_facts(flight: Preflight) -> dict[str, Any]:
    """The mixture itself, made without memory: routers, numbers that train, and what building it takes."""
    file, base = flight.file, flight.base
    assert file is not None
    assert base is not None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        config = file.config({entry.name: entry.source for entry in file.experts})
        flight.report.notes += sorted({str(one.message) for one in caught if one.category is UserWarning})
        empty = _named(base)
        records = [flight.specs[entry.name].to_record() for entry in file.experts]
        embedded = file.config(records, task_type=task_of(type(empty).__name__))
        if embedded.target_modules is None:
            embedded.target_modules = _union(flight, empty)  # type: ignore[assignment]  # PEFT keeps a set
        warnings.simplefilter("ignore")
        with quiet_transformers():
            model = get_peft_model(empty, embedded, low_cpu_mem_usage=True)
    routers = sum(p.numel() for n, p in model.named_parameters() if "molora_router" in n)
    experts = sum(p.numel() for n, p in model.named_parameters() if ".molora_A" in n or ".molora_B" in n)
    trains = sum(p.numel() for p in model.parameters() if p.requires_grad)
    dtype = NAMED_DTYPES[file.dtype].itemsize if file.dtype != "auto" else FILE_BYTES.get(base.dtype, 4)
    weights = sum(p.numel() for n, p in model.named_parameters() if "molora_" not in n) * dtype
    return {
        "router": f"{config.router} ({config.router_scope}, {config.router_granularity})",
        "fit": _fit_words(file),
        "router's numbers": routers,
        "experts' numbers, at most" if flight.plans else "experts' numbers": experts,
        "trains": trains,
        "memory": memory_to_mix(flight, weights, experts),
    }


def _union(flight: Preflight, empty: Any) -> set[str]:
    """Modules that any of the experts adapts."""
    names = BaseView.of(empty).modules
    return {name for name in names if any(spec.rank_in(name) for spec in flight.specs.values())}


def _fit_words(file: MixFile) -> str:
    if file.fit is None:
        return "none"
    if file.prompts:
        return "centroid, from prompts"
    return f"{file.fit.get('method', 'the router’s own method')}, from labelled text"


def memory_to_mix(flight: Preflight, weights: int, experts: int) -> dict[str, int]:
    """Bytes beside Python and its libraries, at the peak of each step; activations of a fit are not in it.

    Args:
        flight: the file, whose adapters' dtypes count.
        weights: bytes of the base.
        experts: numbers of all experts.
    """
    adapters = [part for part in flight.report.parts if part.kind in ("adapter", "model")]
    wide = any("F32" in part.facts.get("dtypes", [part.facts.get("dtype")]) for part in adapters)
    extracting = [part.facts["memory to extract"] for part in adapters if "memory to extract" in part.facts]
    # The mixture holds its experts, and writing copies them once.
    steps = {"extracting": max(extracting, default=0), "mixing": weights + 2 * experts * (4 if wide else 2)}
    return {**{step: size for step, size in steps.items() if size}, "peak": max(steps.values())}


def refuse(flight: Preflight) -> None:
    """Stop where the inspection found problems.

    Raises:
        PeftMoeError: all of them.
    """
    problems = flight.report.all_problems
    if problems:
        count = f"{len(problems)} problems:\n" if len(problems) > 1 else ""
        raise PeftMoeError(count + "\n".join(problems))


def torch_dtype(file: MixFile, base: Checkpoint) -> torch.dtype:
    """What the base is loaded in."""
    name = name_of_word(base.dtype) if file.dtype == "auto" else file.dtype
    dtype: torch.dtype = getattr(torch, name)
    return dtype
