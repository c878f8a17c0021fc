"""The settings of a bake-off: base, experts, texts and budgets, checked before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ...errors import PeftMoeError

MEASURES = ("loss", "exact")


@dataclass(frozen=True)
class Domain:
    """The files of one domain, in JSON lines with ``prompt`` and ``completion``.

    Attributes:
        test: texts to score.
        train: texts to fit and train on; None for an unseen domain.
    """

    test: Path
    train: Path | None = None


@dataclass(frozen=True)
class TextPlan:
    """The number of texts of each domain.

    Attributes:
        train_records: for fitting and training, per domain with an expert.
        generic_records: for fitting and training, per domain without an expert; None means as many.
        test_records: for scoring, per domain.
        mixed_per_pair: texts of two domains, per ordered pair of experts' domains; 0 means none.
        mixed_chars: largest length of a completion in a text of two domains, in characters.
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
        learning_rate: maximum of a cosine decay to zero; a method may override it.
        max_length: largest number of tokens of a sample.
        bf16: whether to train with bfloat16 autocast.
    """

    steps: int = 100
    batch_size: int = 8
    learning_rate: float = 5.0e-3
    max_length: int | None = 256
    bf16: bool = False


@dataclass(frozen=True)
class WidthPlan:
    """The budget of one LoRA with the sum of the experts' ranks, trained on all training files.

    Attributes:
        steps: optimizer steps; 0 leaves the method out. A fair number is the sum of the experts' own steps.
        batch_size: samples per step; use that of the experts.
        learning_rate: maximum of the cosine decay; use that of the experts.
    """

    steps: int = 0
    batch_size: int = 8
    learning_rate: float = 2.0e-4


@dataclass(frozen=True)
class ScorePlan:
    """The scoring of texts.

    Attributes:
        measures: "loss", "exact" (share of answers predicted exactly) or both; the recommendation
            follows the first.
        batch_size: texts per pass.
        max_length: largest number of tokens of a text; None keeps all.
        draws: number of bootstrap resamples.
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
        experts: name → folder or Hub id of a LoRA adapter; an expert has the name of its domain.
        domains: name → files. In YAML also the path of a folder with ``<domain>/{train,test}.jsonl``.
        seeds: seeds of every method that depends on one; the others run once.
        texts, train, width, score: the budgets.
        dtype: dtype of the base.
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
        without_domain = [name for name in self.experts if name not in self.domains]
        if without_domain:
            raise PeftMoeError(
                f"experts {without_domain} have no domain of the same name; `domains` has "
                f"{sorted(self.domains)}. Give each expert the name of its domain"
            )
        without_train = [name for name in self.experts if self.domains[name].train is None]
        if without_train:
            raise PeftMoeError(f"domains {without_train} have experts but no `train` file; add one to each")
        unknown = [name for name in self.score.measures if name not in MEASURES]
        if unknown or not self.score.measures:
            raise PeftMoeError(f"score.measures={list(self.score.measures)}: choose from {list(MEASURES)}")
        if not self.seeds:
            raise PeftMoeError("seeds is empty; give one or more numbers")

    @property
    def generic(self) -> list[str]:
        """Domains without an expert but with training texts: samples that belong to no expert."""
        return [n for n, d in self.domains.items() if n not in self.experts and d.train is not None]

    @property
    def unseen(self) -> list[str]:
        """Domains with neither an expert nor training texts; they are only scored."""
        return [n for n, d in self.domains.items() if n not in self.experts and d.train is None]
