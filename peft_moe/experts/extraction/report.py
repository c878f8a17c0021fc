"""What an extraction found: per layer, what it ignored, in total; as JSON and as tables."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.table import Table

REPORT_FILE = "extraction.json"
FORMAT = 1


@dataclass
class LayerReport:
    """One linear layer that was taken.

    Attributes:
        module: its name.
        shape: (out, in).
        rank: singular values kept; 0: the layer is not in the adapter.
        wanted: rank that the rule asked for, before the limit.
        norm: ‖ΔW‖.
        change: ‖ΔW‖ / ‖W‖.
        energy: share of ‖ΔW‖² that is kept.
        relative_error: ‖ΔW − B·A‖ / ‖ΔW‖ of the factors as written.
        output_error: ‖(ΔW − B·A)x‖ / ‖ΔW·x‖ over calibration text; None without.
        method: "exact", "randomised", "dense", or "unchanged".
        check: how far the randomised factors are from singular ones; 0 where exact.
    """

    module: str
    shape: tuple[int, int]
    rank: int
    wanted: int
    norm: float
    change: float
    energy: float
    relative_error: float
    method: str
    check: float = 0.0
    output_error: float | None = None

    @property
    def is_cut(self) -> bool:
        """Whether the limit kept it from the rank that the rule asked for."""
        return self.rank < min(self.wanted, *self.shape)


@dataclass
class IgnoredTensor:
    """One tensor whose change is not in the adapter.

    Attributes:
        name: of the tensor or module.
        kind: "head", "embedding", "norm", "bias", "other", or "linear" where the targets leave it out.
        norm: ‖Δ‖.
        change: ‖Δ‖ / ‖W‖.
    """

    name: str
    kind: str
    norm: float
    change: float


@dataclass
class ExtractionReport:
    """What :func:`extract_adapter` did.

    Attributes:
        base, model: as the user named them.
        fingerprint: of the base: SHA-256 over names, shapes, dtypes and a sample of the values.
        rule: how ranks were chosen, with its numbers.
        dtype: of the factors.
        layers: the linear layers that were taken.
        ignored: everything else that both models have.
        logit_kl: mean KL(model ‖ base + adapter) per token of calibration text, in nats; None without.
        base_kl: the same of the bare base, for comparison.
        seconds: how long it took.
    """

    base: str
    model: str
    fingerprint: str
    rule: dict[str, Any]
    dtype: str
    layers: list[LayerReport] = field(default_factory=list)
    ignored: list[IgnoredTensor] = field(default_factory=list)
    logit_kl: float | None = None
    base_kl: float | None = None
    seconds: float = 0.0

    @property
    def energy(self) -> float:
        """Share of the taken layers' ‖ΔW‖² that is kept."""
        total = sum(layer.norm**2 for layer in self.layers)
        return sum(layer.energy * layer.norm**2 for layer in self.layers) / total if total else 1.0

    @property
    def ignored_energy(self) -> dict[str, float]:
        """Share of the whole change ‖Δ‖², by kind, that no layer of the adapter carries."""
        norms = [layer.norm for layer in self.layers] + [one.norm for one in self.ignored]
        total = sum(norm**2 for norm in norms) or 1.0
        found: dict[str, float] = {}
        for one in self.ignored:
            found[one.kind] = found.get(one.kind, 0.0) + one.norm**2 / total
        return found

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready. The time is left out, so that equal extractions give equal bytes."""
        values = asdict(self)
        values.pop("seconds")
        total = {"energy": self.energy, "ignored_energy": self.ignored_energy}
        return {"format": FORMAT, **values, "total": total}

    def table(self) -> Table:
        """One row per layer."""
        title = f"{self.model} − {self.base} → LoRA, rank by {self.rule['name']}"
        table = Table(title=title, header_style="bold")
        table.add_column("layer")
        calibrated = any(layer.output_error is not None for layer in self.layers)
        output = ["output error"] if calibrated else []
        headings = ["shape", "rank", "‖ΔW‖/‖W‖", "energy", "rel. error", *output, "by"]
        for heading in headings:
            table.add_column(heading, justify="right")
        for layer in self.layers:
            cut = f" of {layer.wanted}" if layer.is_cut else ""
            output = [_percent(layer.output_error)] if calibrated else []
            table.add_row(
                layer.module,
                "×".join(map(str, layer.shape)),
                f"{layer.rank}{cut}",
                _percent(layer.change),
                _percent(layer.energy),
                _percent(layer.relative_error),
                *output,
                layer.method,
            )
        return table

    def summary(self) -> list[str]:
        """The lines below the table."""
        ranks = [layer.rank for layer in self.layers if layer.rank]
        lines = [
            f"{len(ranks)} of {len(self.layers)} layers, ranks {min(ranks, default=0)} to "
            f"{max(ranks, default=0)}, {_percent(self.energy)} of their energy"
        ]
        counts: dict[str, list[IgnoredTensor]] = {}
        for one in self.ignored:
            counts.setdefault(one.kind, []).append(one)
        for kind, share in self.ignored_energy.items():
            moved = math.sqrt(sum(one.norm**2 for one in counts[kind]))
            if moved:
                lines.append(
                    f"not in the adapter: {len(counts[kind])} × {kind}, {_percent(share)} of the whole "
                    f"change (largest: {_percent(max(one.change for one in counts[kind]))} of its weight)"
                )
        if self.logit_kl is not None:
            lines.append(
                f"KL(model ‖ base + adapter) = {self.logit_kl:.4g} nats per token; "
                f"of the bare base {self.base_kl:.4g}"
            )
        return lines


def _percent(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{100 * value:.3g} %"
