"""``extract_adapter``: a full fine-tuned model becomes a LoRA adapter, one tensor at a time.

ΔW = W_model − W_base = U S Vᵀ of every linear layer; B = U√S and A = √S Vᵀ, scale 1. What is no linear layer
(biases, norms, embeddings, the head) cannot be gated as ranks and is reported with the share of the change
that it carries. Two of the
layers' tensors are in memory at a time, and the result; all others are only mapped.
"""

from __future__ import annotations

import hashlib
import math
import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ...errors import PeftMoeError, near_matches
from ...io.adapter_files import tensor_key
from ...io.atomic import check_new_folder, new_folder
from ...io.checkpoint import Checkpoint, model_refusal
from ...io.dtypes import NAMED_DTYPES, name_of_word
from ...io.json_files import write_json
from .files import write_adapter
from .pairs import ExtractionPlan, TensorPair, plan_extraction
from .report import REPORT_FILE, ExtractionReport, IgnoredTensor, LayerReport
from .svd import LowRank, RankRule, frobenius, low_rank, relative_error, row_blocks

_IGNORED_WARNING = 0.05
_SAMPLE = 1024

Inputs = Mapping[str, Tensor]
"""Calibration inputs [N, I] by module name."""


def extract_adapter(
    base: str | os.PathLike[str],
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    rank: int | None = None,
    energy: float | None = None,
    max_rank: int = 64,
    dense: bool = False,
    target_modules: list[str] | str | None = None,
    dtype: str = "auto",
    texts: Sequence[str] = (),
    device: str = "cpu",
    overwrite: bool = False,
    progress: bool = True,
) -> ExtractionReport:
    """Make a PEFT LoRA adapter of what a full model learnt.

    Args:
        base, model: folders or Hub ids of two models of one architecture; safetensors, one file or shards.
        out: folder of the adapter, with ``extraction.json`` beside its two files.
        rank: the same rank everywhere.
        energy: instead, the fewest ranks that keep this share of each layer's ‖ΔW‖², at most ``max_rank``.
        max_rank: by default a layer keeps the singular values above its noise (Gavish and Donoho), at most
            so many.
        dense: instead, all of ΔW: one factor holds it, the other is an identity; "auto" is then float32.
        target_modules: linear layers to take, as PEFT matches names; None: all but the head.
        dtype: of the factors: "float32", "bfloat16", "float16", or "auto", the model's own.
        texts: calibration text: the report then has each layer's output error and the KL divergence of the
            logits. For this the models are loaded whole, one after the other.
        device: where the decompositions run.
        overwrite: replace ``out``.
        progress: whether to show a bar.

    Raises:
        PeftMoeError: models that do not fit each other, damaged or pickled files, values that are not
            finite, nothing to extract; nothing is written.
    """
    started = time.perf_counter()
    rule = RankRule(rank, energy, max_rank, dense)
    _check_dtype(dtype)
    plan = plan_extraction(Checkpoint.open(base), Checkpoint.open(model), target_modules)
    place = check_new_folder(out, (plan.base.folder, plan.model.folder), overwrite=overwrite)
    name = _dtype_of(dtype, plan, dense)
    calibration = None
    if texts:
        from peft_moe.experts.extraction.calibration import Calibration

        calibration = Calibration.read(plan, texts, device)
    report = ExtractionReport(plan.base.location, plan.model.location, "", rule.described, name)
    inputs = calibration.inputs if calibration else {}
    factors = _read_all(plan, rule, NAMED_DTYPES[name], report, inputs, device, progress)
    _check_worth(report, plan)
    with new_folder(place) as folder:
        write_adapter(folder, plan, factors)
        if calibration:
            report.logit_kl, report.base_kl = calibration.divergence(str(folder))
        write_json(folder / REPORT_FILE, report.to_dict(), indent=2, strict=True)
    report.seconds = time.perf_counter() - started
    return report


def _check_dtype(dtype: str) -> None:
    if dtype not in ("auto", *NAMED_DTYPES):
        raise PeftMoeError(f"dtype={dtype!r} is not known.{near_matches(dtype, ('auto', *NAMED_DTYPES))}")


def _dtype_of(dtype: str, plan: ExtractionPlan, dense: bool) -> str:
    if dtype != "auto":
        return dtype
    # In float32 the difference of two models of 16 bits is exact.
    return "float32" if dense else name_of_word(plan.model.dtype)


def _read_all(
    plan: ExtractionPlan,
    rule: RankRule,
    dtype: torch.dtype,
    report: ExtractionReport,
    inputs: Inputs,
    device: str,
    progress: bool,
) -> dict[str, Tensor]:
    factors: dict[str, Tensor] = {}
    digest = hashlib.sha256()
    for pair in tqdm(plan.pairs, desc="extract", unit="tensor", disable=not progress):
        # A call of its own, so that nothing of this tensor is left when the next one is read.
        A, B = _read_one(plan, pair, rule, dtype, report, inputs.get(pair.name), device, digest.update)
        if len(A):
            factors[tensor_key(pair.name, "A")] = A
            factors[tensor_key(pair.name, "B")] = B
    report.fingerprint = digest.hexdigest()
    return factors


def _read_one(
    plan: ExtractionPlan,
    pair: TensorPair,
    rule: RankRule,
    dtype: torch.dtype,
    report: ExtractionReport,
    x_NI: Tensor | None,
    device: str,
    note: Callable[[bytes], object],
) -> tuple[Tensor, Tensor]:
    """Both factors of one tensor, without ranks where it is not taken; what was found goes to ``report``."""
    if not pair.taken:
        norm, base_norm = _change(plan, pair, note)
        change = norm / base_norm if base_norm else float(norm > 0)
        report.ignored.append(IgnoredTensor(pair.name, pair.kind, norm, change))
        return torch.empty(0), torch.empty(0)
    delta, norm, base_norm = _difference(plan, pair, device, note)
    change = norm / base_norm if base_norm else float(norm > 0)
    delta_OI = delta.T if pair.transposed else delta
    found = low_rank(delta_OI, rule, seed=_seed(pair.name))
    A, B = (_rounded(one, dtype) for one in (found.A, found.B))
    error = None if x_NI is None else _output_error(delta_OI, A, B, x_NI.to(device))
    report.layers.append(_layer(pair, found, change, relative_error(delta_OI, A, B, norm), error))
    return A.cpu(), B.cpu()


def _difference(
    plan: ExtractionPlan, pair: TensorPair, device: str, note: Callable[[bytes], object]
) -> tuple[Tensor, float, float]:
    """ΔW in float32 as in the files, its norm and that of W; a sample of W goes to ``note``."""
    with plan.base.mapped(pair.base_key) as mapped:
        delta = mapped.to(device=device, dtype=torch.float32, copy=True)
    note(_sample(plan, pair, delta))
    base_norm = frobenius(delta)
    _check_finite(base_norm, pair.name, plan.base)
    delta.neg_()
    with plan.model.mapped(pair.model_key) as mapped:
        # Block by block: the whole in float32 would be a third tensor.
        for mine, theirs in zip(row_blocks(delta), row_blocks(mapped), strict=True):
            mine.add_(theirs.to(device=device, dtype=torch.float32))
    norm = frobenius(delta)
    _check_finite(norm, pair.name, plan.model)
    return delta, norm, base_norm


def _change(plan: ExtractionPlan, pair: TensorPair, note: Callable[[bytes], object]) -> tuple[float, float]:
    """‖Δ‖ and ‖W‖ of a tensor that is only reported, without a copy of it: embeddings are the largest."""
    squares = [0.0, 0.0]
    with plan.base.mapped(pair.base_key) as base, plan.model.mapped(pair.model_key) as other:
        note(_sample(plan, pair, base))
        for ours, theirs in zip(row_blocks(base), row_blocks(other), strict=True):
            before = ours.float()
            squares[0] += frobenius(theirs.float() - before) ** 2
            squares[1] += frobenius(before) ** 2
    norm, base_norm = math.sqrt(squares[0]), math.sqrt(squares[1])
    _check_finite(base_norm, pair.name, plan.base)
    _check_finite(norm, pair.name, plan.model)
    return norm, base_norm


def _sample(plan: ExtractionPlan, pair: TensorPair, base: Tensor) -> bytes:
    """What the fingerprint takes of one of the base's tensors."""
    at = plan.base.tensors[pair.base_key]
    values = base.flatten()[:: max(1, base.numel() // _SAMPLE)].float().cpu()
    return f"{pair.name} {at.dtype} {list(at.shape)}".encode() + values.numpy().tobytes()


def _check_finite(norm: float, name: str, whose: Checkpoint) -> None:
    if not math.isfinite(norm):
        what = f"{name!r} holds values that are not finite, or too large to be weights"
        raise model_refusal(whose.location, what, "use an earlier checkpoint")


def _layer(
    pair: TensorPair, found: LowRank, change: float, error: float, output_error: float | None
) -> LayerReport:
    return LayerReport(
        module=pair.name,
        shape=pair.features,
        rank=found.rank,
        wanted=found.wanted,
        norm=found.norm,
        change=change,
        energy=found.energy,
        relative_error=error,
        method=found.method if found.norm else "unchanged",
        check=found.check,
        output_error=output_error,
    )


def _output_error(delta_OI: Tensor, A_KI: Tensor, B_OK: Tensor, x_NI: Tensor) -> float:
    moved_NO = x_NI @ delta_OI.T
    rest_NO = moved_NO - (x_NI @ A_KI.float().T) @ B_OK.float().T
    norm = frobenius(moved_NO)
    return frobenius(rest_NO) / norm if norm else 0.0


def _rounded(factor: Tensor, dtype: torch.dtype) -> Tensor:
    rounded = factor.to(dtype)
    if not torch.isfinite(rounded).all():
        raise PeftMoeError(
            f"dtype={str(dtype).removeprefix('torch.')!r} overflows; use 'bfloat16' or 'float32'"
        )
    return rounded


def _check_worth(report: ExtractionReport, plan: ExtractionPlan) -> None:
    if not any(layer.rank for layer in report.layers):
        if not any(layer.norm for layer in report.layers):
            what = f"its linear layers are those of the base {plan.base.location!r}, bit for bit"
            raise model_refusal(
                plan.model.location, what, "there is nothing to extract; is it the right model?"
            )
        what = "no singular value of any layer stands out of its noise (Gavish and Donoho)"
        fix = "choose the rank yourself with rank or energy; the difference may be no low-rank one"
        raise model_refusal(plan.model.location, what, fix)
    for kind, share in report.ignored_energy.items():
        if share > _IGNORED_WARNING:
            warnings.warn(
                f"{100 * share:.0f} % of the change from {report.base} to {report.model} lies in tensors of "
                f"kind {kind!r}, which the adapter leaves out; compare its output with the model's",
                stacklevel=3,
            )


def _seed(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
