"""One set of experts for every contestant of a case: the same numbers, so that the same sum comes out.

Letters: E experts, r rank of one, I in, O out.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

DTYPE = torch.bfloat16
NAME = "bench_name"  # of every linear layer that is adapted; copies of the base keep it


@dataclass(frozen=True)
class Case:
    """What is measured: E experts of rank r, k of them per token (None: all) on a base.

    Attributes:
        experts, rank, top_k: E, r, k.
        width, out: I and O of one layer; None measures the whole model.
        batch, tokens: of one call; a layer sees batch·tokens rows.
    """

    experts: int = 16
    rank: int = 8
    top_k: int | None = 2
    width: int | None = None
    out: int | None = None
    batch: int = 2
    tokens: int = 256
    sizes: dict[str, int] = field(default_factory=lambda: dict(LLAMA))

    @property
    def active(self) -> int:
        """Experts per token."""
        return self.experts if self.top_k is None else self.top_k

    def __str__(self) -> str:
        chosen = "dense" if self.top_k is None else f"top-{self.top_k}"
        where = "model" if self.width is None else f"{self.width}×{self.out}"
        return f"{where}, E={self.experts}, r={self.rank}, {chosen}, {self.batch}×{self.tokens} tokens"


# 32 million parameters.
LLAMA = {
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
TINY_LLAMA = {**LLAMA, "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}


def make_base(case: Case) -> nn.Module:
    """The frozen base in bf16: one linear layer in a ``Sequential``, or a Llama of the case's sizes."""
    torch.manual_seed(0)
    if case.width is None:
        base: nn.Module = LlamaForCausalLM(LlamaConfig(**case.sizes))
    else:
        base = nn.Sequential(nn.Linear(case.width, case.out, bias=False))
    for name, module in base.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            setattr(module, NAME, name)
    return base.to(DTYPE).requires_grad_(False).eval()


def adapted(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Layers that a contestant wraps around the base's, under the base's names, each once."""
    wrappers = {}
    for module in model.modules():
        name = getattr(getattr(module, "base_layer", None), NAME, None)
        if name is not None:
            wrappers.setdefault(name, module)  # the outermost comes first
    return list(wrappers.items())


class Experts:
    """A, B and a router for every linear layer of a base, random, in the base's dtype.

    The experts' sum is about as large as the layer's own output, so that no parity check can miss it.
    """

    def __init__(self, base: nn.Module, case: Case) -> None:
        self.count, self.rank = case.experts, case.rank
        self.A: dict[str, Tensor] = {}  # [E, r, I]
        self.B: dict[str, Tensor] = {}  # [E, r, O]
        self.router: dict[str, Tensor] = {}  # [E, I]
        generator = torch.Generator().manual_seed(1)
        for module in base.modules():
            name = getattr(module, NAME, None)
            if name is None:
                continue
            O, I = module.weight.shape  # noqa: E741  # the shape legend's letters
            draw = torch.randn(case.experts, case.rank, I + O, generator=generator)
            self.A[name] = (draw[..., :I] / I**0.5).to(DTYPE)
            loud = module.weight.float().std() * (I / case.rank) ** 0.5
            self.B[name] = (draw[..., I:] * loud).to(DTYPE)
            self.router[name] = (torch.randn(case.experts, I, generator=generator) / I**0.5).to(DTYPE)

    @property
    def names(self) -> list[str]:
        """Of the adapted layers."""
        return list(self.A)

    @property
    def targets(self) -> list[str]:
        """The same for PEFT, by the last part of the name."""
        return sorted({name.rpartition(".")[2] for name in self.A})

    def stacked(self, name: str, count: int) -> tuple[Tensor, Tensor]:
        """A [R, I] and B [R, O] of the first ``count`` experts on one rank axis."""
        return self.A[name][:count].flatten(0, 1), self.B[name][:count].flatten(0, 1)
