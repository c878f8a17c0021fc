"""The package in float64 against committed numbers of an independent loop, tensor by tensor."""

from __future__ import annotations

import importlib.util
import json
from functools import partial
from pathlib import Path

import pytest
import torch

from peft_moe import MoLoraConfig
from peft_moe.ops import RankMap, mix, mix_reference
from peft_moe.routers import Router, RouterSettings, select
from peft_moe.routers.losses import LOSSES, decision_weights, loss_options
from peft_moe.routing.context import RoutingContext

FOLDER = Path(__file__).parents[1] / "golden"
FILES = ("mixture", "gates", "losses")
GOLDEN = {name: json.loads((FOLDER / f"{name}.json").read_text()) for name in FILES}

# Values are stored to 11 digits; gradients are finite differences of order h⁴ with h = 1e-3.
VALUES = {"atol": 2e-11, "rtol": 0}
GRADIENTS = {"atol": 3e-9, "rtol": 0}


def tensors(group, **options):
    return {name: torch.tensor(value, dtype=torch.float64, **options) for name, value in group.items()}


def close(found, wanted, bounds):
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64), **bounds)


@pytest.mark.parametrize("op", [mix_reference, partial(mix, backend="stacked"), mix])
@pytest.mark.parametrize("case", GOLDEN["mixture"])
def test_mixture(case, op):
    case = GOLDEN["mixture"][case]
    given = tensors(case["inputs"], requires_grad=True)
    # An expert that does not adapt the layer has no ranks to divide by.
    scaling = tuple(a / r if r else 1.0 for a, r in zip(case["alphas"], case["ranks"], strict=True))
    ranks = RankMap(tuple(case["ranks"]), scaling)
    found = op(given["x"], given["A"], given["B"], given["gates"], ranks, given["base"])
    close(found, case["output"], VALUES)
    found.backward(torch.tensor(case["direction"], dtype=torch.float64))
    for name, tensor in given.items():
        close(tensor.grad, case["gradients"][name], GRADIENTS)


@pytest.mark.parametrize("case", GOLDEN["gates"])
def test_gates(case):
    case = GOLDEN["gates"][case]
    given = tensors(case["inputs"], requires_grad=True)
    experts = 3 - int(case["settings"]["null_expert"])
    router = Router(RouterSettings("linear", num_experts=experts, **case["settings"]), 4)
    # A router keeps its weights in float32; here they are replaced by the wide ones.
    for name in ("weight", "bias"):
        del router.scorer._parameters[name]
        setattr(router.scorer, name, given[name])
    gates = router(given["x"]).gates
    close(gates, case["gates"], VALUES)
    gates.backward(torch.tensor(case["direction"], dtype=torch.float64))
    for name, tensor in given.items():
        close(tensor.grad, case["gradients"][name], GRADIENTS)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("case", GOLDEN["losses"])
def test_losses(case, name):
    case = GOLDEN["losses"][case]
    logits = torch.tensor(case["logits"], dtype=torch.float64, requires_grad=True)
    routing = select(logits, RouterSettings("linear", num_experts=4, top_k=case["top_k"]))
    context = RoutingContext(real=torch.tensor(case["real"]).bool(), domains=torch.tensor(case["domains"]))
    options = loss_options(MoLoraConfig()).get(name, {})
    found = LOSSES[name].function(routing, decision_weights(routing, context), context, **options)
    close(found, case["values"][name], VALUES)
    found.backward()
    close(logits.grad, case["gradients"][name], GRADIENTS)


def test_every_loss_has_golden_numbers():
    assert all(set(case["values"]) == set(LOSSES) for case in GOLDEN["losses"].values())


def test_the_generator_reproduces_the_files(tmp_path):
    spec = importlib.util.spec_from_file_location("make_golden", FOLDER / "make_golden.py")
    generator = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generator)
    generator.main(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(f"{name}.json" for name in FILES)
    assert sorted(p.name for p in FOLDER.glob("*.json")) == sorted(f"{name}.json" for name in FILES)
    for name in FILES:
        again = json.loads((tmp_path / f"{name}.json").read_text())
        # Bit for bit where they were made; elsewhere the last bits of exp and sin may differ, which the
        # differences of the gradients divide by 2e-3.
        found, wanted = flat(again), flat(GOLDEN[name])
        assert list(found) == list(wanted)
        floats = [path for path, value in wanted.items() if isinstance(value, float)]
        assert len(floats) > 50
        assert [found[p] for p in floats] == pytest.approx([wanted[p] for p in floats], abs=1e-9, rel=0)
        assert [found[p] for p in wanted if p not in floats] == [wanted[p] for p in wanted if p not in floats]


def flat(value, path=""):
    """Every leaf of a JSON value by its path."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for key, entry in items for k, v in flat(entry, f"{path}/{key}").items()}
    return {path: value}


def test_the_generator_shares_nothing_with_the_package():
    source = (FOLDER / "make_golden.py").read_text()
    assert "peft_moe" not in source
    assert "torch" not in source
