"""One layer saves the chosen experts' ranks for the router's backward pass, for any number of experts.

Everything counts: h of the chosen experts, their ids and weights, and the tensors that the router itself
saves, which share the ids and weights.
"""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.autograd import graph

from peft_moe import MoLoraConfig
from peft_moe.ops import RankMap, mix

TOKENS, SIZE, RANK, TOP_K = 2048, 1024, 16, 2
MIB = 2**20


def saved_mib(experts: int, *, backend: str = "auto", top_k: int | None = TOP_K) -> float:
    """Return the MiB that a forward pass saves besides its input and the weights, each storage once."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(SIZE, SIZE, bias=False)).to(torch.bfloat16)
    config = MoLoraConfig(
        experts=experts, r=RANK, lora_alpha=RANK, target_modules=["0"], train_experts=False,
        init_weights=False, router="linear", top_k=top_k, backend=backend,
    )  # fmt: skip
    model = get_peft_model(model, config, autocast_adapter_dtype=False).train()
    for name, parameter in model.named_parameters():
        if "molora_A" in name or "molora_B" in name:  # like adapters in the base's dtype
            parameter.data = parameter.data.to(torch.bfloat16)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained, "the router must train"
    x = torch.randn(1, TOKENS, SIZE).to(torch.bfloat16).requires_grad_()
    not_counted = {t.untyped_storage().data_ptr() for t in (x, *model.parameters(), *model.buffers())}
    saved: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in not_counted:
            saved[storage.data_ptr()] = storage  # a live storage keeps its address from being reused
        return tensor

    with graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = model(x)
    mib = sum(storage.nbytes() for storage in saved.values()) / MIB
    out.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in trained)
    return mib


@pytest.mark.parametrize("backend", ["auto", "stacked", "grouped"])
def test_saved_bytes_do_not_grow_with_experts(backend: str) -> None:
    few, many = saved_mib(8, backend=backend), saved_mib(64, backend=backend)
    # h of two experts of rank 16 in bf16 is 0.125 MiB; the rest is ids and weights.
    assert 0.125 <= few <= 0.18
    # "auto" may switch to the grouped backend, which also saves the order of the pairs, two bytes each.
    assert many == pytest.approx(few, abs=2 * TOKENS * TOP_K / MIB + 1e-3)


def test_the_order_of_many_pairs_needs_more_than_16_bits() -> None:
    # 80,000 pairs do not fit into 16 bits; gradients must equal those of the reference.
    torch.manual_seed(0)
    ranks = RankMap((4, 4), (1.0, 1.0))
    x, base = torch.randn(40_000, 8), torch.zeros(40_000, 8)
    A, B = torch.randn(8, 8), torch.randn(8, 8)
    ids = torch.rand(40_000, 2).argsort(-1)
    gradients = []
    for backend in ("reference", "grouped"):
        weights = torch.full((40_000, 2), 0.5, requires_grad=True)
        out = mix(x, A, B, None, ranks, base, expert_ids_NK=ids, weights_NK=weights, backend=backend)
        out.square().sum().backward()
        gradients.append(weights.grad)
    # Float32 sums of eight products in another order.
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-3)


def test_dense_gates_do_grow() -> None:
    # If they did not, the count above would miss something.
    assert saved_mib(64, top_k=None) > 2 * saved_mib(8, top_k=None)


if __name__ == "__main__":
    for backend in ("auto", "stacked", "grouped"):
        print(backend, {experts: round(saved_mib(experts, backend=backend), 4) for experts in (8, 32, 128)})
    print("dense", {experts: round(saved_mib(experts, top_k=None), 4) for experts in (8, 32, 128)})
