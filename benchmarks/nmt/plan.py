"""What is compared, and all sizes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .text import NONE, RIGHT, SEEN, WRONG


@dataclass(frozen=True)
class Plan:
    """All sizes: but for `active`, every system has `experts` · `rank` ranks, and all have `steps` steps.

    Attributes:
        steps, batch, learning_rate: of every system; one of several parts shares its steps among them.
        experts, top_k, rank: of the mixtures whose experts train together.
        generic: share of generic pairs where a system has them.
        randomised: share of labels made wrong where a system has such.
        max_chars: of a pair, both sides together.
        tests: sentences of each domain at most.
        new_tokens: of a translation at most.
        base: what differs from recipes/configs/text_base.yaml.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 100
    batch: int = 8
    learning_rate: float = 2.0e-3
    experts: int = 4
    top_k: int = 2
    rank: int = 8
    generic: float = 0.5
    randomised: float = 0.5
    max_chars: int = 360
    tests: int = 70
    new_tokens: int = 48
    bf16: bool = True
    base: dict[str, Any] = field(default_factory=lambda: {"max_steps": 700})


QUICK = Plan(
    seeds=(0,), steps=5, batch=2, rank=2, max_chars=120, tests=3, new_tokens=4, bf16=False,
    base={"max_steps": 2, "vocab_size": 300, "hidden_size": 16, "intermediate_size": 32, "block_size": 32,
          "num_hidden_layers": 2, "per_device_train_batch_size": 2},
)  # fmt: skip


@dataclass(frozen=True)
class System:
    """What is trained.

    Attributes:
        kind: "base"; "lora": one for all domains; "joint": a mixture whose experts and router train together;
            "experts": one LoRA per domain, chosen by the label; "routed": the same behind a trained router.
        about: in words, for the page.
        active: of a lora: as many ranks as a token of the mixture uses, not as all experts have.
        generic: whether it is trained on generic pairs too.
        labels: whether it is told the domain: by a word in the prompt (lora), as a router's input (others).
        randomised: whether some of these labels are wrong in training.
    """

    kind: str
    about: str
    active: bool = False
    generic: bool = False
    labels: bool = False
    randomised: bool = False

    def conditions(self, domain: str) -> list[str]:
        """What it can be told of a sentence of ``domain``."""
        if not self.labels:
            return [NONE]
        return [RIGHT, WRONG, NONE] if domain in SEEN else [WRONG, NONE]

    def translates(self, domain: str, condition: str) -> bool:
        """Whether it also translates, which takes longer than scoring: not where no claim asks for it."""
        return not (self.labels and domain in SEEN and condition == NONE)


SYSTEMS = {
    "base": System("base", "the base, which has read the generic half"),
    "active": System("lora", "one LoRA of the k·r ranks that a token of `smoe` uses", active=True),
    "width": System("lora", "width scaling: one LoRA of all E·r ranks"),
    "smoe": System(
        "joint", "E fresh experts, top-k per token and layer, balanced, trained with their router"
    ),
    "width+generic": System("lora", "`width`, generic pairs mixed in", generic=True),
    "smoe+generic": System("joint", "`smoe`, generic pairs mixed in", generic=True),
    "tags": System("lora", "`width+generic`, the domain's name in the prompt", generic=True, labels=True),
    "tags+random": System(
        "lora", "`tags`, some names wrong in training", generic=True, labels=True, randomised=True
    ),
    "gates": System(
        "joint",
        "a fresh LoRA per domain, the label its gate (`oracle`), generic pairs",
        generic=True,
        labels=True,
    ),
    "gates+random": System(
        "joint", "`gates`, some labels wrong in training", generic=True, labels=True, randomised=True
    ),
    "experts": System(
        "experts", "the same gates over LoRAs that were trained one by one, no generic pairs", labels=True
    ),
    "routed": System(
        "routed",
        "the LoRAs of `experts` behind a trained router (`running`: one or none), generic pairs",
        generic=True,
    ),
}
