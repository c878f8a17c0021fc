"""A block mixture as a native MoE checkpoint, written tensor by tensor.

Files hold the names that the target's models have on the Hub: one tensor per linear layer of each expert.
transformers fuses them when it loads them; vLLM, SGLang and llama.cpp read them as they are.

Letters: H hidden size, F features of a network, E experts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from ...errors import PeftMoeError
from ...io.checkpoint import MODEL_CONFIG, Checkpoint, quiet_transformers
from ...io.dtypes import FILE_DTYPES
from ...io.json_files import write_json
from ...io.shards import Piece, write_shards
from ...tuner.saving.base_identity import check_base_values
from ..base_model import take_along
from ..mixture_tensors import Mixture
from ..report import ExportReport
from .gap import Evidence, measure_gap
from .plan import NativePlan, Terms, make_plan
from .target import FFN

_LINEARS = ("gate_proj", "up_proj", "down_proj")


def export_native(
    mixture: Mixture, folder: Path, report: ExportReport, evidence: Evidence | None, plan: NativePlan,
    *, dtype: torch.dtype | None, most_bytes: int,
) -> None:  # fmt: skip
    """Write a planned model.

    Args:
        mixture: what is exported.
        folder: an empty one.
        report: gets what was done.
        evidence: of an approximation, and for a measurement; None measures nothing.
        plan: from :func:`plan_native`.
        dtype: of the weights; None takes the base's.
        most_bytes: of one file.
    """
    weights = Weights(plan, dtype, evidence)
    write_shards(folder, list(weights.pieces()), most_bytes)
    _write_config(plan, folder, str(weights.dtype)[6:])
    for source in (plan.base.folder, mixture.folder):
        take_along(source, folder)
    report.notes += _notes(plan, weights)
    if evidence is not None:
        report.measured = measure_gap(evidence, folder)


def plan_native(mixture: Mixture, to: str, base: str | None, approximate: bool) -> NativePlan:
    """Find the base, and refuse what cannot be represented; no weight of the base is read but a few numbers.

    Raises:
        PeftMoeError: no base, another one, a quantised one, or what no native model can do.
    """
    source = base or mixture.base
    if not source:
        raise PeftMoeError(f"{mixture.label} does not name its base; give its folder or Hub id as `base`")
    checkpoint = Checkpoint.open(source)
    with quiet_transformers():
        config = AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=False)
    plan = make_plan(mixture, checkpoint, config, to, approximate)
    _check_sizes(plan)
    saved = mixture.config.base_fingerprint
    if saved is not None and not mixture.config.allow_base_mismatch:
        names = [name for name in saved.get("values", {}) if name in checkpoint.tensors]
        tensors = {name: _read(checkpoint, name) for name in names}
        check_base_values(saved, tensors, matrices=mixture.config.base_precision in (None, "full"))
    return plan


class Weights:
    """All tensors of the native model, made when they are written."""

    def __init__(self, plan: NativePlan, dtype: torch.dtype | None, evidence: Evidence | None) -> None:
        self.plan, self.evidence = plan, evidence
        self.dtype = dtype or FILE_DTYPES[plan.base.dtype]

    def pieces(self) -> Iterator[Piece]:
        """In the base's order; a network's experts stand where the network stood."""
        for name, at in self.plan.base.tensors.items():
            if at.dtype not in FILE_DTYPES or name.endswith("rotary_emb.inv_freq"):
                continue  # counted, not learnt
            match = FFN.fullmatch(name.removesuffix(".weight"))
            layer = int(match[1]) if match else None
            if layer is None or not self.plan.has_experts(layer):
                yield self._piece(name, at.shape, partial(self._kept, name))
            elif match and match[2] == "gate_proj":
                yield from self._network(layer)

    def _piece(self, name: str, shape: tuple[int, ...], make: Any) -> Piece:
        return Piece(name, tuple(shape), self.dtype, lambda: make().to(self.dtype))

    def _network(self, layer: int) -> Iterator[Piece]:
        plan, target = self.plan, self.plan.target
        hidden, prefix = int(plan.base_config.hidden_size), f"model.layers.{layer}.{target.experts_module}"
        yield self._piece(f"{prefix}.gate.weight", (len(plan.routed), hidden), partial(self._gate, layer))
        size = plan.layout.expert_size
        for number, terms in enumerate(plan.routed):
            # In a layer that the mixture does not adapt, each expert is the base's network.
            networks: Terms = terms if layer in plan.gates else ((None, 1.0),)
            yield from self._expert(f"{prefix}.experts.{number}", layer, networks, size)
        if target.shared_expert is not None:
            shared = f"{prefix}.{target.shared_expert}"
            doubled = tuple((e, 2.0 * factor) for e, factor in plan.shared)
            yield from self._expert(shared, layer, doubled, plan.layout.shared_size)
            yield self._piece(f"{shared}_gate.weight", (1, hidden), lambda: half_open(hidden, self.dtype))

    def _expert(self, prefix: str, layer: int, terms: Terms, size: int) -> Iterator[Piece]:
        hidden = int(self.plan.base_config.hidden_size)
        for linear, name in zip(_LINEARS, self.plan.target.linears, strict=True):
            shape = (hidden, size) if linear == "down_proj" else (size, hidden)
            make = partial(self._side_by_side, layer, linear, terms, shape)
            yield self._piece(f"{prefix}.{name}.weight", shape, make)

    def _side_by_side(self, layer: int, linear: str, terms: Terms, shape: tuple[int, ...]) -> Tensor:
        """Several networks as one: their hidden features side by side, their factors in the last matrix."""
        if not any(factor for _, factor in terms):
            return torch.zeros(shape)
        axis, parts = int(linear == "down_proj"), []
        for expert, factor in terms:
            weight = self._changed(f"model.layers.{layer}.mlp.{linear}", expert)
            parts.append(weight if factor == 1 or not axis else weight.float() * factor)
        joined = torch.cat(parts, dim=axis) if len(parts) > 1 else parts[0]
        missing = shape[axis] - joined.shape[axis]
        return torch.nn.functional.pad(joined, (0, missing) if axis else (0, 0, 0, missing))

    def _changed(self, module: str, expert: int | None) -> Tensor:
        """The base's weight [O, I] with an expert's change, summed in float32 or wider."""
        weight_OI = _read(self.plan.base, f"{module}.weight")
        ranks = self.plan.mixture.layers.get(module)
        if expert is None or ranks is None or not ranks.ranks[expert]:
            return weight_OI
        A_rI, B_rO = self.plan.mixture.expert(module, expert)
        return _added(weight_OI, A_rI, B_rO, torch.full((len(A_rI),), ranks.scaling[expert]))

    def _kept(self, name: str) -> Tensor:
        """A tensor of the base; where experts outside of networks are merged, with their mean change."""
        module = name.removesuffix(".weight")
        if module not in self.plan.outside:
            return _read(self.plan.base, name)
        assert self.evidence is not None
        A_RI, B_RO = self.plan.mixture.factors(module)
        scales_R = self.plan.mixture.layers[module].expand(self.evidence.mean_gates(module))
        return _added(_read(self.plan.base, name), A_RI, B_RO, scales_R)

    def _gate(self, layer: int) -> Tensor:
        gate = self.plan.gates.get(layer)
        if gate is None:
            return torch.zeros(len(self.plan.routed), int(self.plan.base_config.hidden_size))
        if gate.reason is not None:
            assert self.evidence is not None
            return self.evidence.fitted_gate(f"model.layers.{layer}.mlp", gate)
        assert gate.weight is not None
        return gate.weight


def half_open(hidden: int, dtype: torch.dtype) -> Tensor:
    """Return weights [1, H] of a shared expert's gate whose sigmoid is 1/2 in float32.

    They are not zero, because llama.cpp computes the sigmoid of s as silu(s)/s.

    Args:
        hidden: H.
        dtype: dtype of the written weights; float16 holds nothing below 2^-24.
    """
    return torch.full((1, hidden), 2.0 ** (-23 if dtype == torch.float16 else -30))


def _added(weight_OI: Tensor, A_rI: Tensor, B_rO: Tensor, scales_r: Tensor) -> Tensor:
    wide = torch.promote_types(torch.promote_types(weight_OI.dtype, A_rI.dtype), torch.float32)
    A_rI, B_rO = A_rI.detach().cpu().to(wide), B_rO.detach().cpu().to(wide)
    return torch.addmm(weight_OI.to(wide), (B_rO * scales_r.cpu().to(wide)[:, None]).T, A_rI)


def _read(checkpoint: Checkpoint, name: str) -> Tensor:
    with checkpoint.mapped(name) as tensor:
        return tensor.clone()


def _check_sizes(plan: NativePlan) -> None:
    for module in plan.mixture.layers:
        at = plan.base.tensors.get(f"{module}.weight")
        A_RI, B_RO = plan.mixture.factors(module)
        if at is None or at.shape != (B_RO.shape[1], A_RI.shape[1]):
            found = at.shape if at is not None else "not there"
            raise PeftMoeError(
                f"{module} of {plan.base.location} is {found}, and the experts have "
                f"{(B_RO.shape[1], A_RI.shape[1])}; give the base that the mixture was made on"
            )


def _write_config(plan: NativePlan, folder: Path, dtype: str) -> None:
    plan.config(dtype).save_pretrained(str(folder))
    path = folder / MODEL_CONFIG
    values = json.loads(path.read_text(encoding="utf-8"))
    # Servers of before transformers 5 look for these, and take a default where they are not.
    rope = values.get("rope_parameters") or {}
    if "rope_theta" in rope:
        values["rope_theta"] = rope["rope_theta"]
    if rope.get("rope_type", "default") != "default":
        values["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    write_json(path, values, indent=2, strict=True)


def _notes(plan: NativePlan, weights: Weights) -> list[str]:
    config, target, layout, notes = plan.mixture.config, plan.target, plan.layout, []
    sparse = [n for n in range(layout.layers) if plan.has_experts(n)]
    notes.append(
        f"{target.architecture}: {layout.experts} experts of {layout.expert_size} features, "
        f"{plan.top_k} per token, in {len(sparse)} of {layout.layers} layers."
    )
    copied = [n for n in sparse if n not in plan.gates]
    if copied:
        notes.append(
            f"Layers {copied} are not mixed, but {target.title} has experts in every layer: there all "
            f"{layout.experts} are the base's network, which costs memory and nothing else."
        )
    if any(len(terms) > 1 for terms in plan.routed) or plan.shared:
        notes.append(
            "What is always on, or left to the base, stands in the shared expert of "
            f"{layout.shared_size} features."
        )
    if weights.dtype.itemsize < 4:
        notes.append(
            f"Weights and gates are rounded to {str(weights.dtype)[6:]}, in which such a model computes its "
            "scores, too: some tokens choose other experts than by float32 gates; see --dtype float32."
        )
    made_on = config.base_precision
    if made_on not in (None, "full"):
        notes.append(
            f"The mixture was made on a base in {made_on}; here it stands on {plan.base.location} in full "
            "precision, whose hidden states differ a little: measure before you rely on it (--data)."
        )
    notes += [f"Servers: {note}." for note in target.server_notes(layout)]
    return notes + [f"Approximated: {part.reason}: {part.instead}." for part in plan.obstacles]
