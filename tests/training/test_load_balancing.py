"""DeepSeek's balancing bias through the real trainer: loads, choices, gates, resuming, several processes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.routing import routers
from support.training import batches_of, make_trainer, samples, tokenised
from support.zoo import Zoo

from peft_moe import PeftMoeError, record_routing
from peft_moe.routers import Router, RouterSettings
from peft_moe.routers.losses import decision_weights
from peft_moe.routing.context import Routing, RoutingContext, RoutingRecord
from peft_moe.training.trainers.load_balancing import BiasBalancer
from peft_moe.tuner.layers.shared_router import named_routers

RATE = 0.02
# Adam's steps of 1e-5 leave the scores as they are: what changes the loads is the bias.
STILL = {"learning_rate": 1e-5, "max_steps": 40}


def collapsed(zoo: Zoo, rate: float = RATE, **fields: Any) -> Any:
    """One expert of three for every token, by a large score."""
    model = zoo.mixture(
        "llama", "dense", top_k=1, norm_topk_prob=False, router_bias_update_rate=rate, **fields
    )
    with torch.no_grad():
        for _, router in routers(model):
            router.scorer.weight.mul_(0.3)
            router.scorer.bias.copy_(torch.tensor([1.0, 0.0, 0.0]))
    return model


def loads(model: Any) -> torch.Tensor:
    """Shares of real tokens that chose each expert, the mean over routers, [E]."""
    batch = {k: v for k, v in batches_of(tokenised(samples(8)), 8)[0].items() if k != "domain"}
    with record_routing() as record, torch.no_grad():
        model.eval()(**batch)
    assert record.context is not None
    shares = []
    for routing in record.decisions.values():
        weights = decision_weights(routing, record.context)[..., None]
        assert routing.selected is not None
        shares.append((routing.selected * weights).sum((0, 1)) / weights.sum())
    return torch.stack(shares).mean(0)


@pytest.mark.parametrize("rate", [0.0, RATE])
def test_a_collapsed_router_becomes_balanced(zoo: Zoo, tmp_path: Path, rate: float) -> None:
    model = collapsed(zoo, rate)
    before = loads(model)
    assert before[0] > 0.85
    trainer = make_trainer("sft", model, tokenised(samples(8)), tmp_path, **STILL)
    trainer.train()
    after = loads(model)
    logged = [e.get("router_bias_max") for e in trainer.state.log_history if "loss" in e]
    if rate == 0:
        torch.testing.assert_close(after, before, atol=0.02, rtol=0)  # off: nothing but its own training
        assert set(logged) == {None}
        assert all(router.balance_bias is None for _, router in routers(model))
    else:
        assert after.max() < 0.55
        assert after.min() > 0.15
        assert logged[-1] == pytest.approx(max(r.balance_bias.abs().max().item() for _, r in routers(model)))
        assert logged[0] == pytest.approx(RATE)


def test_the_bias_joins_the_choice_but_not_the_gates() -> None:
    torch.manual_seed(0)
    settings = RouterSettings("linear", num_experts=4, top_k=2, bias_update_rate=1e-3, init_std=1.0)
    router, x = Router(settings, 8), torch.randn(2, 5, 8)
    plain = router(x)
    router.balance_bias[3] = 10.0
    moved = router(x)
    assert moved.selected[..., 3].all()
    assert not torch.equal(moved.selected, plain.selected)
    assert torch.equal(moved.logits, plain.logits)
    kept = torch.where(moved.selected, torch.softmax(plain.logits, -1), 0.0)
    torch.testing.assert_close(moved.gates, kept / kept.sum(-1, keepdim=True))
    same = (moved.selected == plain.selected).all(-1)
    assert same.any()
    assert torch.equal(moved.gates[same], plain.gates[same])


def test_one_step_by_hand() -> None:
    """b += u·sign(mean − load), counted over real tokens of two micro-batches; absent columns stay out."""
    settings = RouterSettings("linear", num_experts=4, present=3, top_k=1, bias_update_rate=0.5)
    router = Router(settings, 2)
    balancer = BiasBalancer({"layer": router, "dense": Router(RouterSettings("linear", num_experts=4), 2)})
    real = torch.tensor([[1, 1, 0], [1, 1, 1]]).bool()
    for chosen in ([[0, 0, 2], [0, 1, 1]], [[2, 1, 1], [0, 0, 1]]):
        selected = torch.nn.functional.one_hot(torch.tensor(chosen), 4).bool()
        routing = Routing(selected.float(), selected.float(), selected)
        balancer.count(RoutingRecord({"layer": routing}, RoutingContext(real=real)))
    balancer.step()  # loads 5, 4, 1 with mean 10/3; column 3 does not exist
    assert router.balance_bias.tolist() == [-0.5, -0.5, 0.5, 0.0]
    balancer.step()  # nothing was counted: loads are equal
    assert router.balance_bias.tolist() == [-0.5, -0.5, 0.5, 0.0]
    assert balancer.largest() == 0.5


def test_batch_times_accumulation_is_all_that_counts(zoo: Zoo, tmp_path: Path) -> None:
    def after(batch: int, accumulation: int) -> list[list[float]]:
        model = collapsed(zoo)
        sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        settings = {**STILL, "max_steps": 3, **sizes, "gradient_checkpointing": accumulation == 4}
        settings["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
        make_trainer("sft", model, tokenised(samples(8, equal=True)), tmp_path, **settings).train()
        return [router.balance_bias.tolist() for _, router in routers(model)]

    whole = after(4, 1)
    assert any(value for bias in whole for value in bias)
    assert after(2, 2) == whole
    assert after(1, 4) == whole  # recomputed layers are not counted again


def test_resuming_is_exact_to_the_bit_and_the_bias_is_saved(zoo: Zoo, tmp_path: Path) -> None:
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    straight = make_trainer("sft", collapsed(zoo), tokenised(samples(8)), tmp_path, **settings)
    straight.train()
    resumed = make_trainer("sft", collapsed(zoo), tokenised(samples(8)), tmp_path / "again", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    pairs = list(zip(routers(resumed.model), routers(straight.model), strict=True))
    assert any(ours.balance_bias.abs().max() > 4 * RATE for (_, ours), _ in pairs)
    for (_, ours), (_, theirs) in pairs:
        for (key, value), other in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
            assert torch.equal(value, other), key


def test_reentrant_checkpointing_is_refused(zoo: Zoo, tmp_path: Path) -> None:
    reentrant = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    trainer = make_trainer("sft", collapsed(zoo), tokenised(samples(4)), tmp_path, **reentrant)
    with pytest.raises(
        PeftMoeError, match=r"router_bias_update_rate would have no effect.*use_reentrant=False"
    ):
        trainer.train()


def test_every_router_is_found_under_the_name_of_its_decisions(zoo: Zoo) -> None:
    for scope in ("module", "block", "model"):
        model = zoo.mixture("llama", "dense", router_scope=scope)
        with record_routing() as record, torch.no_grad():
            model(input_ids=torch.arange(3, 9)[None])
        assert record.decisions.keys() == dict(named_routers(model, "default")).keys()


PROCESS = """
import sys, torch
from torch import distributed
from peft_moe.routers import Router, RouterSettings
from peft_moe.routing.context import Routing, RoutingContext, RoutingRecord
from peft_moe.training.trainers.load_balancing import BiasBalancer, SparsityController

rank = int(sys.argv[1])
distributed.init_process_group("gloo", rank=rank, world_size=2)
fields = dict(num_experts=3, top_k=1, bias_update_rate=1.0)
routers = {name: Router(RouterSettings("linear", **fields), 2) for name in "ab"}
balancer, values = BiasBalancer(routers), {"l1_weight": 1.0}
controller = SparsityController(routers, 0.5, values)
# Alone, process 0 would raise column 1 and lower the weight, process 1 the reverse; it never sees router b.
chosen = torch.tensor([[0, 0, 0, 2, 2, 2]] if rank == 0 else [[1, 1, 1, 1, 1, 1]])
selected = torch.nn.functional.one_hot(chosen, 3).bool()
routing = Routing(selected.float() if rank == 0 else torch.ones(1, 6, 3), selected.float(), selected)
decisions = {"a": routing, "b": routing} if rank == 0 else {"a": routing}
record = RoutingRecord(decisions, RoutingContext())
balancer.count(record); controller.count(record)
balancer.step(); controller.step()
print([r.balance_bias.tolist() for r in routers.values()], values)
# A process that leaves while the other still talks to it may be aborted.
distributed.barrier(); distributed.destroy_process_group()
"""


def test_loads_are_those_of_all_processes() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(rank)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    done = [process.communicate(timeout=180) for process in started]
    assert [process.returncode for process in started] == [0, 0], done
    # Router a: loads 3, 6, 3 with mean 4; b: 3, 0, 3 with mean 2. Zero gates: 24 of 54, less than a half.
    wanted = "[[1.0, -1.0, 1.0], [-1.0, 1.0, -1.0]] {'l1_weight': 1.2}"
    assert [out.strip() for out, _ in done] == [wanted, wanted]
