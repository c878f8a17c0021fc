"""One set of experts for all methods of a case, so that all of them compute the same sum.

Letters: E experts, r rank of one, I in, O out.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

DTYPE = torch.bfloat16
NAME = "bench_name"  # attribute of each adapted linear layer; copies of the base keep it


@dataclass(frozen=True)
class Case:
    """A measured case: E experts of rank r on a base, k of them per token (None: all).

    Attributes:
        experts, rank, top_k: E, r, k.
        width, out: I and O of one layer; None stands for the whole model.
        batch, tokens: size of one call; a layer sees batch·tokens rows.
        sizes: the model's dimensions.
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
        """Return the number of experts per token."""
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
    """Make the frozen base in bf16: one linear layer in a ``Sequential``, or a Llama of the case's sizes."""
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
    """Return the layers that a method wraps around the base's, each once, by the base's names."""
    wrappers = {}
    for module in model.modules():
        name = getattr(getattr(module, "base_layer", None), NAME, None)
        if name is not None:
            wrappers.setdefault(name, module)  # the outermost wrapper comes first
    return list(wrappers.items())


class Experts:
    """Random A, B and router for every linear layer of a base, in the base's dtype.

    The experts' sum is about as large as the layer's output, so that a parity check sees any error.
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
            std = module.weight.float().std() * (I / case.rank) ** 0.5
            self.B[name] = (draw[..., I:] * std).to(DTYPE)
            self.router[name] = (torch.randn(case.experts, I, generator=generator) / I**0.5).to(DTYPE)

    @property
    def names(self) -> list[str]:
        """Return the names of the adapted layers."""
        return list(self.A)

    @property
    def targets(self) -> list[str]:
        """Return PEFT's target modules: the last part of each name."""
        return sorted({name.rpartition(".")[2] for name in self.A})

    def stacked(self, name: str, count: int) -> tuple[Tensor, Tensor]:
        """Return A [R, I] and B [R, O] of the first ``count`` experts on one rank axis."""
        return self.A[name][:count].flatten(0, 1), self.B[name][:count].flatten(0, 1)
