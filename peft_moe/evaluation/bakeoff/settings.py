"""What a bake-off is told: base, experts, texts, budgets; checked before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ...errors import PeftMoeError

MEASURES = ("loss", "exact")


@dataclass(frozen=True)
class Domain:
    """Files of one domain, JSON lines with ``prompt`` and ``completion``.

    Attributes:
        test: texts to score.
        train: texts to fit and train on; None keeps the domain unseen.
    """

    test: Path
    train: Path | None = None


@dataclass(frozen=True)
class TextPlan:
    """How many texts of each domain.

    Attributes:
        train_records: per expert's domain, for fitting and training.
        generic_records: the same per domain without an expert; default: as many.
        test_records: scored per domain.
        mixed_per_pair: texts of two domains, per ordered pair of experts' domains; 0 makes none.
        mixed_chars: where each completion of such a text is cut, in characters.
    """

    train_records: int = 150
    generic_records: int | None = None
    test_records: int = 60
    mixed_per_pair: int = 2
    mixed_chars: int = 300


@dataclass(frozen=True)
class TrainPlan:
    """The budget of every trained router.

    Attributes:
        steps: optimizer steps.
        batch_size: samples per step.
        learning_rate: its maximum, unless the method names its own; cosine decay to zero.
        max_length: tokens kept of a sample.
        bf16: autocast.
    """

    steps: int = 100
    batch_size: int = 8
    learning_rate: float = 5.0e-3
    max_length: int | None = 256
    bf16: bool = False


@dataclass(frozen=True)
class WidthPlan:
    """One LoRA as wide as all experts together, trained on the pooled training files.

    Attributes:
        steps: optimizer steps; 0 leaves it out. Honest is the sum of the experts' own steps.
        batch_size: samples per step, as the experts had.
        learning_rate: its maximum, as the experts had.
    """

    steps: int = 0
    batch_size: int = 8
    learning_rate: float = 2.0e-4


@dataclass(frozen=True)
class ScorePlan:
    """How texts are scored.

    Attributes:
        measures: "loss", "exact" (share of answers predicted exactly) or both; advice follows the first.
        batch_size: texts per pass.
        max_length: tokens kept of a text; None keeps all.
        draws: bootstrap resamples.
    """

    measures: tuple[str, ...] = ("loss",)
    batch_size: int = 16
    max_length: int | None = 512
    draws: int = 2000


@dataclass(frozen=True)
class Settings:
    """One bake-off; a YAML file has the same keys.

    Attributes:
        base: folder or Hub id of the base.
        experts: name → folder or Hub id of a LoRA adapter; the names are those of their domains.
        domains: name → files. In YAML also one folder that holds ``<domain>/{train,test}.jsonl``.
        seeds: of every method that varies by seed; the others run once.
        texts, train, width, score: the budgets.
        dtype: of the base.
    """

    base: str
    experts: dict[str, str]
    domains: dict[str, Domain]
    seeds: tuple[int, ...] = (0,)
    texts: TextPlan = field(default_factory=TextPlan)
    train: TrainPlan = field(default_factory=TrainPlan)
    width: WidthPlan = field(default_factory=WidthPlan)
    score: ScorePlan = field(default_factory=ScorePlan)
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if len(self.experts) < 2:
            raise PeftMoeError(f"experts={sorted(self.experts)}: a bake-off needs two or more to mix")
        homeless = [name for name in self.experts if name not in self.domains]
        if homeless:
            raise PeftMoeError(
                f"experts {homeless} have no domain of their name; `domains` has {sorted(self.domains)}. An "
                "expert's texts are found by its name"
            )
        untaught = [name for name in self.experts if self.domains[name].train is None]
        if untaught:
            raise PeftMoeError(f"domains {untaught} have experts but no `train` file; add one to each")
        strange = [name for name in self.score.measures if name not in MEASURES]
        if strange or not self.score.measures:
            raise PeftMoeError(f"score.measures={list(self.score.measures)}: choose from {list(MEASURES)}")
        if not self.seeds:
            raise PeftMoeError("seeds is empty; give one or more numbers")

    @property
    def generic(self) -> list[str]:
        """Domains without an expert that may be trained on: examples of "none of them"."""
        return [n for n, d in self.domains.items() if n not in self.experts and d.train is not None]

    @property
    def unseen(self) -> list[str]:
        """Domains without an expert that are only scored."""
        return [n for n, d in self.domains.items() if n not in self.experts and d.train is None]
