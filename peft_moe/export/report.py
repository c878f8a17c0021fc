"""What an export did, as data and as lines to print."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

REPORT_FILE = "export.json"


@dataclass
class ExportReport:
    """One export.

    Attributes:
        kind: "lora", "merged", "adapters", "distilled-lora", or a native MoE's.
        source: folder, Hub id or description of the mixture.
        out: the folder that was written.
        base: folder or Hub id of the base.
        experts: the mixture's, in its order.
        gates: weight by expert where they are constant and the same in every module; else None.
        rank: largest rank of the LoRA that was written; None for other kinds.
        error: ‖ΔW' − ΔW‖ / ‖ΔW‖ of all modules together between what was written and the mixture; None where
            it is not known.
        module_errors: the same by module, where ranks were cut.
        notes: what a user should know.
        measured: of a distillation: texts, and KL, loss and agreement with the mixture on held-out ones, for
            base, start, distilled LoRA and mixture. Of a native MoE the same for it and the mixture, and the
            largest difference of logits.
    """

    kind: str
    source: str
    out: Path
    base: str | None
    experts: list[str]
    gates: dict[str, float] | None = None
    rank: int | None = None
    error: float | None = None
    module_errors: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    measured: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; the folder is left out, so that equal exports give equal files."""
        return {
            key: value for key, value in asdict(self).items() if key != "out" and value not in (None, {}, [])
        }

    def lines(self) -> list[str]:
        """For a terminal."""
        found = []
        if self.gates is not None:
            found.append("Gates: " + ", ".join(f"{name} {gate:.4g}" for name, gate in self.gates.items()))
        if self.error is not None:
            worst = max(self.module_errors, key=lambda n: self.module_errors[n], default=None)
            at = f"; at most {self.module_errors[worst]:.2%}, in {worst}" if worst is not None else ""
            found.append(f"Rank {self.rank}; error {self.error:.2g} of what the mixture changes{at}")
        if self.measured is not None:
            found.append(f"On {self.measured['held_out_tokens']} held-out tokens, per token in nats:")
            for name, row in self.measured["held_out"].items():
                kl, loss, same = row["kl"], row["loss"], row["agreement"]
                most = row.get("max_logit_difference")
                found.append(
                    f"  {name:10} KL to the mixture {kl:.4f}  loss {loss:.4f}  same choice {same:.1%}"
                    + (f"  logits differ by at most {most:.3g}" if most is not None else "")
                )
            if "kl_closed" in self.measured:
                found.append(
                    f"The gap between base and mixture is closed by {self.measured['kl_closed']:.1%}."
                )
        return found + self.notes
