"""No layer or router reads a number back from the device: that would wait for it, and end a CUDA graph.

On a CPU nothing waits, hence the operations that would are looked for by name. A router that probes runs the
base once more, up to its tap: what the base's own code waits for there (transformers looks whether a mask has
padding), the bare base waits for as well.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from support.batches import batch_for, texts
from support.zoo import Zoo
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from peft_moe import use_experts
from peft_moe.ops import BACKENDS, CallSpec, RankMap
from peft_moe.routers import Router

WAITS = {
    "_local_scalar_dense",  # item, tolist, bool(), int()
    "nonzero",  # also a mask as an index
    "equal",
    "masked_select",
    "unique_consecutive",
    "_unique2",
    "unique_dim",
}
# Of a CPU tensor these read memory, without an operation.
READS = {torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.__array__}
# On a CPU it counts each expert's tokens on the host; elsewhere it serves only where it need not.
COUNTS = "grouped"
ROUTINGS = ["uniform", "dense", "top2", "block", "sigmoid-top2", "top-p", "token-probe", "prompt-base"]


class Watch(TorchDispatchMode):
    """Notes operations that wait, by the line outside of torch that called them."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += 1
        if func.overloadpacket.__name__ in WAITS:
            self.found.append(f"{func}: {caller()}")
        return func(*args, **(kwargs or {}))


class WatchReads(TorchFunctionMode):
    """Notes what reads a tensor's memory, in the list of a :class:`Watch`."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in READS:
            self.found.append(f"{func.__name__}: {caller()}")
        return func(*args, **(kwargs or {}))


def caller() -> str:
    """The innermost line outside of torch and of this file."""
    frames = [f for f in traceback.extract_stack() if "/torch/" not in f.filename and f.filename != __file__]
    return f"{frames[-1].filename}:{frames[-1].lineno} {frames[-1].line}"


@contextmanager
def watched() -> Iterator[Watch]:
    with Watch() as watch, WatchReads(watch.found):
        yield watch
    assert watch.operations > 100, "the watch saw no forward pass"


def prefill_and_decode(model: Any) -> set[str]:
    """What waits in a prefill and two steps of decoding."""
    batch = batch_for("llama", texts())
    with torch.no_grad(), watched() as watch:
        mask, rows = batch["attention_mask"], len(batch["input_ids"])
        cache = model(**batch, use_cache=True).past_key_values
        found = {f"prefill {line}" for line in watch.found}
        watch.found.clear()
        for token in (3, 5):
            mask = torch.cat([mask, mask.new_ones(rows, 1)], dim=1)
            step = torch.full((rows, 1), token)
            cache = model(input_ids=step, attention_mask=mask, past_key_values=cache).past_key_values
    return found | {f"decode {line}" for line in watch.found}


@pytest.fixture(scope="module")
def of_the_base(zoo: Zoo) -> set[str]:
    """What the bare base waits for."""
    found = prefill_and_decode(zoo.base("llama"))
    assert not any("/peft_moe/" in line for line in found)
    return found


@pytest.mark.parametrize("routing", ROUTINGS)
def test_a_forward_pass_waits_for_nothing(zoo: Zoo, of_the_base: set[str], routing: str) -> None:
    model = zoo.mixture("llama", routing)
    prefill_and_decode(model)  # what is checked or built once, at the first pass, may wait
    assert prefill_and_decode(model) <= of_the_base


@pytest.mark.parametrize("backend", ["stacked", "gather"])
def test_no_fast_backend_waits(zoo: Zoo, of_the_base: set[str], backend: str) -> None:
    model = zoo.mixture("llama", "top2", backend=backend)
    prefill_and_decode(model)
    assert prefill_and_decode(model) <= of_the_base


def test_the_backend_that_counts_is_refused_where_it_would_wait(zoo: Zoo) -> None:
    model = zoo.mixture("llama", "top2", backend=COUNTS)
    assert any("tolist" in line for line in prefill_and_decode(model))
    spec = {"tokens": 64, "in_features": 64, "out_features": 64, "chosen": 2, "one_row": False}
    spec |= {"dtype": torch.float32, "trains": frozenset(), "compiling": False}
    ranks = RankMap((8,) * 4, (1.0,) * 4)
    assert BACKENDS[COUNTS].supports(CallSpec(ranks=ranks, device="cpu", **spec)) is None
    reason = BACKENDS[COUNTS].supports(CallSpec(ranks=ranks, device="cuda", **spec))
    assert "wait for the host" in str(reason)


@pytest.mark.parametrize("routing", ["dense", "top2"])
def test_masked_experts_wait_for_nothing(zoo: Zoo, of_the_base: set[str], routing: str) -> None:
    model = zoo.mixture("llama", routing)
    name = next(iter(model.peft_config["default"].expert_names))
    with use_experts(name):
        prefill_and_decode(model)
        assert prefill_and_decode(model) <= of_the_base


def test_a_wait_is_noticed(zoo: Zoo) -> None:
    from peft_moe.testing import check_router

    with Watch() as watch:
        check_router("linear")
    assert any("/peft_moe/" in line for line in watch.found)


@pytest.mark.parametrize(("routing", "once"), [("block", True), ("top2", False)])
def test_a_router_of_a_block_is_asked_once_for_all_its_layers(zoo: Zoo, routing: str, once: bool) -> None:
    model = zoo.mixture("llama", routing)
    asked: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, Router) and ".layers.0.self_attn." in name:
            module.register_forward_hook(lambda *_, name=name: asked.append(name))
    with torch.no_grad():
        model(**batch_for("llama", texts()))
    assert (len(asked) == 1) is once, asked
    assert asked
