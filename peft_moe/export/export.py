"""``export``: what is asked for is checked, then written beside its place and renamed into it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftModel

from ..errors import PeftMoeError, near_matches
from ..io.atomic import check_new_folder, new_folder
from ..io.dtypes import NAMED_DTYPES
from ..io.json_files import write_json
from ..io.shards import read_size
from ..io.values import is_count, optional
from .adapters import export_adapters
from .distilled import Distillation, check_distillation, export_distilled
from .lora import export_lora
from .merged import export_merged
from .mixture_tensors import Mixture, open_mixture
from .native.gap import gather_evidence
from .native.native import export_native, plan_native
from .native.target import native_targets
from .report import REPORT_FILE, ExportReport

# Which options each kind has; one that would have no effect is refused.
_OPTIONS: dict[str, tuple[str, ...]] = {
    "lora": ("gates", "rank", "dtype"),
    "merged": ("gates", "base", "dtype"),
    "adapters": (),
    "distilled-lora": ("rank", "base", "dtype", "distillation"),
}
_NATIVE_OPTIONS = ("base", "dtype", "approximate", "data", "max_shard_size")


def native_kinds() -> list[str]:
    """Return the kinds that write a native MoE: "native", and the name of each target."""
    return ["native", *native_targets()]


def export_kinds() -> list[str]:
    """Return everything that ``export(to=…)`` takes."""
    return [*_OPTIONS, *native_kinds()]


def export(
    mixture: str | os.PathLike[str] | PeftModel,
    out: str | os.PathLike[str],
    to: str = "lora",
    *,
    gates: Mapping[str, float] | None = None,
    rank: int | None = None,
    base: str | None = None,
    dtype: str | None = None,
    distillation: Distillation | None = None,
    approximate: bool = False,
    data: Any = None,
    max_shard_size: str | None = None,
    adapter: str | None = None,
    overwrite: bool = False,
) -> ExportReport:
    """Write a mixture as something that works without this package.

    Args:
        mixture: folder or Hub id of a saved mixture, or a PeftModel that carries one.
        out: folder to write; it appears whole or not at all.
        to: "lora": one plain LoRA, equal to a mixture with constant gates. "merged": the same in the base's
            own weights, a plain transformers model. "adapters": each expert in a folder of its own, as it
            went in. "distilled-lora": one LoRA trained to imitate any mixture. "mixtral", "qwen2-moe",
            "qwen3-moe", or "native" for the one that the base's layers fit: a block mixture as such a model.
        gates: "lora" and "merged": fixed weight by expert instead of the router's; experts left out weigh 0.
        rank: "lora": at most so many ranks in each module, by SVD; "distilled-lora": its rank.
        base: all but "lora" and "adapters": folder or Hub id of the base, if not the one the mixture names.
        dtype: "float32", "bfloat16" or "float16"; None keeps what there is, where it is exact.
        distillation: "distilled-lora": texts and training, a :class:`Distillation`.
        approximate: native kinds: write a model that is near what none of them can represent, fitted on
            ``data``, and measure the gap.
        data: native kinds: texts for that, or for a measurement alone: a ``.jsonl`` file, a list of texts,
            or token ids [N, T]. Every other one is measured on. None takes a few built-in ones.
        max_shard_size: native kinds: of one file of weights, as in "5GB", the default.
        adapter: which mixture of a model; None takes the active one.
        overwrite: replace ``out``.

    Raises:
        PeftMoeError: what cannot be exported so, with the ways that work; nothing is written.
    """
    options: dict[str, Any] = {"gates": gates, "rank": rank, "base": base, "dtype": dtype, "data": data}
    options |= {"distillation": distillation, "approximate": approximate or None}
    options |= {"max_shard_size": max_shard_size}
    _check(to, options)
    opened = open_mixture(mixture, adapter)
    inputs = [path for path in (opened.folder, base, opened.base) if path and os.path.isdir(path)]
    target_folder = check_new_folder(out, inputs, overwrite=overwrite)
    if to == "distilled-lora":
        check_distillation(opened, rank, distillation)
    new_dtype = NAMED_DTYPES[dtype] if dtype is not None else None
    report = ExportReport(to, opened.label, target_folder, base or opened.base, opened.config.expert_names)
    if to in native_kinds():
        return _native(opened, report, to, options, new_dtype)
    _write(opened, report, options, new_dtype)
    return report


def _write(
    opened: Mixture, report: ExportReport, options: Mapping[str, Any], dtype: torch.dtype | None
) -> None:
    gates, rank, base, to = options["gates"], options["rank"], options["base"], report.kind
    with new_folder(report.out) as folder:
        if to == "lora":
            export_lora(opened, folder, report, gates=gates, rank=rank, dtype=dtype)
        elif to == "merged":
            export_merged(opened, folder, report, gates=gates, base=base, dtype=dtype)
        elif to == "adapters":
            export_adapters(opened, folder, report)
        else:
            how = options["distillation"]
            export_distilled(opened, folder, report, rank=rank, base=base, dtype=dtype, how=how)
        write_json(folder / REPORT_FILE, report.to_dict(), indent=2, strict=True)


def _native(
    opened: Mixture, report: ExportReport, to: str, options: Mapping[str, Any], dtype: torch.dtype | None
) -> ExportReport:
    """A native MoE; all that can be refused is refused before its folder is begun."""
    most_bytes = read_size(options["max_shard_size"] or "5GB")
    approximate, data, base = bool(options["approximate"]), options["data"], options["base"]
    plan = plan_native(opened, to, base, approximate)
    evidence = None
    if plan.obstacles or approximate or data is not None:
        evidence = gather_evidence(opened, plan, data, base, dtype, report)
    report.kind = plan.target.name
    with new_folder(report.out) as folder:
        export_native(opened, folder, report, evidence, plan, dtype=dtype, most_bytes=most_bytes)
        write_json(folder / REPORT_FILE, report.to_dict(), indent=2, strict=True)
    return report


def _check(to: str, options: Mapping[str, Any]) -> None:
    accepted = {**_OPTIONS, **dict.fromkeys(native_kinds(), _NATIVE_OPTIONS)}
    if to not in accepted:
        raise PeftMoeError(f"to={to!r} is not known.{near_matches(str(to), accepted)}")
    for name, value in options.items():
        if value is not None and name not in accepted[to]:
            kinds = [kind for kind, names in accepted.items() if name in names]
            raise PeftMoeError(
                f"{name}={value!r} has no effect with to={to!r}, only with {' or '.join(kinds)}"
            )
    rank, dtype = options["rank"], options["dtype"]
    if not optional(is_count)(rank):
        raise PeftMoeError(f"rank={rank!r} must be a whole number of at least 1")
    if dtype is not None and dtype not in NAMED_DTYPES:
        raise PeftMoeError(f"dtype={dtype!r} is not known.{near_matches(str(dtype), NAMED_DTYPES)}")
