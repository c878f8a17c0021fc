"""Experts come and go: what stays is the same to the bit, and what is saved afterwards loads as it is."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from support.adapters import Recipe
from support.batches import batch_for, logits_of, texts
from support.routing import routers, set_routers
from support.zoo import Zoo
from torch import Tensor

from peft_moe import MoLoraConfig, PeftMoeError, editing, record_routing, routing_inputs
from peft_moe.tuner.layers.linear import MoLoraLayer
from peft_moe.tuner.layers.shared_router import named_routers

BATCH = batch_for("llama", texts())
# The mean of a few float32 numbers.
NEAR = {"atol": 1e-6, "rtol": 1e-6}
# Every kind of router: scope, granularity, activation, and where its rows come from.
KINDS: dict[str, dict[str, Any]] = {
    "linear": {"router": "linear"},
    "top2": {"router": "linear", "top_k": 2},
    "switch": {"router": "switch"},
    "mlp": {"router": "mlp", "router_hidden_size": 6},
    "noisy": {"router": "noisy_top_k"},
    "sigmoid": {"router": "deepseek_v3"},
    "relu": {"router": "remoe"},
    "top_p": {"router": "top_p"},
    "block": {"router": "linear", "router_scope": "block"},
    "smear": {"router": "smear"},
    "mole": {"router": "mole"},
    "context": {"router": "context"},
    "running": {"router": "running"},
    "xlora": {"router": "xlora", "router_hidden_size": 6},
    "token-base": {"router": "linear", "router_scope": "model", "router_below_tap": "base"},
    "static": {"router": "static"},
    "cat": {"router": "cat"},
    "lorahub": {"router": "lorahub"},
    "random": {"router": "random"},
    "poly": {"router": "poly"},
    "shared": {"router": "linear", "shared_experts": ["narrow"], "null_expert": True},
    "arrow": {"router": "arrow", "top_k": 2},
    "spectr": {"router": "spectr", "top_k": 2},
    "centroid": {"router": "centroid"},
    "phatgoose": {"router": "phatgoose"},
    "uniform": {"router": "uniform"},
    "sum": {"router": "sum"},
    "oracle": {"router": "oracle"},
    "hash": {"router": "hash"},
}
NO_ZERO = {"spectr", "centroid", "phatgoose", "uniform", "sum", "oracle", "hash"}
NEW = Recipe("all", 9, {"r": 5, "lora_alpha": 10})


@pytest.fixture
def extra(zoo: Zoo) -> str:
    """A fourth adapter, for the same modules."""
    return zoo.adapter("llama", "extra", NEW)


def mixture(zoo: Zoo, kind: str, **fields: Any) -> PeftModel:
    config = MoLoraConfig(
        experts=zoo.experts("llama"), task_type="CAUSAL_LM", **{**KINDS.get(kind, {}), **fields}
    )
    model = get_peft_model(zoo.base("llama"), config).eval()
    if config.scorer.trainable and not config.scorer.reads_experts and list(routers(model)):
        set_routers(model) if kind not in {"centroid", "phatgoose", "poly", "odd"} else _draw(model)
    return model


def _draw(model: PeftModel) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, router in routers(model):
            for parameter in router.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))


def out(model: PeftModel, kind: str, labels: tuple[int, int] = (0, 1)) -> Tensor:
    if kind in {"poly", "oracle"}:
        with routing_inputs(domains=torch.tensor(labels)):
            return logits_of(model, BATCH)
    return logits_of(model, BATCH)


def slabs(model: PeftModel) -> dict[tuple[str, str, str], Tensor]:
    """Both factors of every expert in every layer, by module, name and side."""
    names = model.peft_config["default"].expert_names
    found = {}
    for layer in model.modules():
        if isinstance(layer, MoLoraLayer):
            for place, name in enumerate(names):
                pair = layer.expert_factors("default", place)
                if pair is not None:
                    found.update({(layer.name, name, side): t for side, t in zip("AB", pair, strict=True)})
    return found


def same(one: dict[Any, Tensor], other: dict[Any, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def unchanged(now: Tensor, before: Tensor) -> None:
    """Up to rounding: an expert of no weight still changes the shapes of two products and of a softmax per
    layer, and so their order of summation; 1e-6 of the largest number, after all layers."""
    assert (now - before).abs().max() <= 1e-6 * before.abs().max()


def state(model: PeftModel) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items() if "molora" in name}


def saved_and_loaded(zoo: Zoo, model: PeftModel, folder: Path) -> PeftModel:
    model.save_pretrained(str(folder))
    loaded = PeftModel.from_pretrained(zoo.base("llama"), str(folder)).eval()
    same(state(loaded), state(model))
    assert loaded.peft_config["default"].experts == model.peft_config["default"].experts
    return loaded


@pytest.mark.parametrize("kind", KINDS)
def test_an_expert_comes_and_goes(zoo: Zoo, kind: str, extra: str, tmp_path: Path) -> None:
    """With zero mass nothing else changes; taken out again, nothing is left of it."""
    model = mixture(zoo, kind)
    before, factors, logits = state(model), slabs(model), out(model, kind)
    config = copy.deepcopy(model.peft_config["default"].to_dict())
    init = None if kind in NO_ZERO else "zero"
    done = editing.add_expert(model, "extra", extra, init=init)
    assert done.experts == ["wide", "narrow", "upper", "extra"]
    assert not done.injected
    mixed = out(model, kind)
    if init == "zero":
        unchanged(mixed, logits)
        with record_routing() as record:
            out(model, kind)
        for routing in record.decisions.values():
            assert (routing.gates[..., 3] == 0).all()
    now = slabs(model)
    same({key: now[key] for key in factors}, factors)  # the others' slabs, as they were
    expert = PeftModel.from_pretrained(zoo.base("llama"), extra).state_dict()
    for (module, name, side), tensor in now.items():
        if name == "extra":
            assert torch.equal(tensor, expert[f"base_model.model.{module}.lora_{side}.default.weight"])
    loaded = saved_and_loaded(zoo, model, tmp_path)
    assert torch.equal(out(loaded, kind), mixed)
    editing.remove_expert(model, "extra")
    same(state(model), before)
    assert model.peft_config["default"].to_dict() == config
    assert torch.equal(out(model, kind), logits)


@pytest.mark.parametrize("kind", KINDS)
def test_the_others_rows_stay(zoo: Zoo, kind: str, extra: str) -> None:
    model = mixture(zoo, kind)
    before = {name: copy.deepcopy(r) for name, r in named_routers(model, "default")}
    editing.add_expert(model, "extra", extra)
    for name, router in named_routers(model, "default"):
        old, null = before[name], int(router.settings.null_expert)
        count = len(old.settings.routed)
        for key, value in router.state_dict().items():
            earlier = old.state_dict()[key]
            grown = [d for d in range(value.dim()) if value.shape[d] != earlier.shape[d]]
            if kind == "spectr":
                assert torch.equal(value[: len(earlier)], earlier)
                continue
            for dim in grown:
                kept = [*range(count), *([count + 1] if null else [])]
                value = value.index_select(dim, torch.tensor(kept[: earlier.shape[dim]]))
            assert torch.equal(value, earlier), key
        scorer = router.scorer
        if kind in {"linear", "top2", "context", "centroid"}:
            torch.testing.assert_close(scorer.weight[count], scorer.weight[:count].mean(0), **NEAR)


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in {"uniform", "sum", "hash", "switch"}])
def test_removing_is_masking_for_ever(zoo: Zoo, kind: str, tmp_path: Path) -> None:
    """Two ways to the same weights: the mask at run time, and the mixture without the expert."""
    model = mixture(zoo, kind, **({"top_k": 1} if kind in {"arrow", "spectr"} else {}))
    null = ["null"] if model.peft_config["default"].null_expert else []
    with model.use_experts("narrow", "upper", *null):
        masked = out(model, kind, (1, 2))
    kept = {key: value for key, value in slabs(model).items() if key[1] != "wide"}
    editing.remove_expert(model, "wide")
    same(slabs(model), kept)
    # float32, other orders of summation; a poly row of unknown tasks is not in play.
    removed = out(model, kind, (0, 1))
    torch.testing.assert_close(removed, masked, atol=1e-5, rtol=1e-5)
    assert torch.equal(out(saved_and_loaded(zoo, model, tmp_path), kind), removed)


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in {"hash", "random"}])
def test_reordering_changes_nothing_but_the_order(zoo: Zoo, kind: str, tmp_path: Path) -> None:
    model = mixture(zoo, kind)
    logits, before, factors = out(model, kind), state(model), slabs(model)
    editing.reorder_experts(model, ["upper", "wide", "narrow"])
    assert model.peft_config["default"].expert_names == ["upper", "wide", "narrow"]
    same(slabs(model), factors)
    moved = out(model, kind, (1, 2))
    torch.testing.assert_close(moved, logits, atol=1e-5, rtol=1e-5)
    assert torch.equal(out(saved_and_loaded(zoo, model, tmp_path), kind, (1, 2)), moved)
    editing.reorder_experts(model, ["wide", "narrow", "upper"])
    same(state(model), before)
    assert torch.equal(out(model, kind), logits)


@pytest.mark.parametrize("kind", ["linear", "block", "context", "shared", "arrow", "static"])
def test_replacing_keeps_the_row_and_the_place(zoo: Zoo, kind: str, extra: str, tmp_path: Path) -> None:
    model = mixture(zoo, kind)
    others = {key: value for key, value in slabs(model).items() if key[1] != "narrow"}
    before = {name: value for name, value in state(model).items() if "router" in name}
    editing.replace_expert(model, "narrow", extra)
    now = slabs(model)
    same({key: now[key] for key in others}, others)
    assert ("model.layers.0.mlp.down_proj", "narrow", "A") in now  # "narrow" was in the attention only
    if kind != "arrow":  # made from the experts' weights
        same({name: value for name, value in state(model).items() if name in before}, before)
    loaded = saved_and_loaded(zoo, model, tmp_path)
    assert torch.equal(logits_of(loaded, BATCH), logits_of(model, BATCH))
    if kind == "linear":
        with model.use_experts("narrow"):
            alone = logits_of(model, BATCH)
        lora = PeftModel.from_pretrained(zoo.base("llama"), extra).eval()
        torch.testing.assert_close(alone, logits_of(lora, BATCH), atol=2e-5, rtol=1e-5)


def test_renaming(zoo: Zoo, tmp_path: Path) -> None:
    model = mixture(zoo, "shared")
    logits, before = logits_of(model, BATCH), state(model)
    editing.rename_expert(model, "narrow", "slim")
    assert model.peft_config["default"].expert_names == ["wide", "slim", "upper"]
    assert model.peft_config["default"].shared_experts == ["slim"]
    same(state(model), before)
    assert torch.equal(logits_of(model, BATCH), logits)
    assert torch.equal(logits_of(saved_and_loaded(zoo, model, tmp_path), BATCH), logits)
    with model.use_experts("slim", "upper"):
        logits_of(model, BATCH)


SCOPES = {
    "module": {"router": "linear"},
    "module-top2": {"router": "linear", "top_k": 2},
    "block": {"router": "linear", "router_scope": "block"},
    "model": {"router": "context"},
    "base": {"router": "linear", "router_scope": "model", "router_below_tap": "base"},
    "arrow": {"router": "arrow", "top_k": 2},
    "static": {"router": "static"},
    "uniform": {"router": "uniform"},
}


@pytest.mark.parametrize("scope", SCOPES)
def test_modules_that_only_the_new_expert_adapts(zoo: Zoo, scope: str, extra: str, tmp_path: Path) -> None:
    """Layers are injected, and dropped again when their expert goes."""
    folder = zoo.experts("llama")["narrow"]  # attention only
    config = MoLoraConfig(experts={"narrow": folder, "second": _second(zoo)}, task_type="CAUSAL_LM",
                          **SCOPES[scope])  # fmt: skip
    model = get_peft_model(zoo.base("llama"), config).eval()
    if config.scorer.trainable and not config.scorer.reads_experts:
        set_routers(model)
    before, logits = state(model), logits_of(model, BATCH)
    names = [name for name, _ in model.named_modules()]
    zero = scope != "uniform"
    done = editing.add_expert(model, "extra", extra, init="zero" if zero else None)
    expected = 3 * (2 if scope == "base" else 3)  # the feed-forward modules
    assert len(done.injected) == expected
    mixed = logits_of(model, BATCH)
    if zero:
        unchanged(mixed, logits)
    loaded = saved_and_loaded(zoo, model, tmp_path)
    assert torch.equal(logits_of(loaded, BATCH), mixed)
    if scope not in {"base", "uniform"}:
        with model.use_experts("extra"):
            alone = logits_of(model, BATCH)
        lora = PeftModel.from_pretrained(zoo.base("llama"), extra).eval()
        torch.testing.assert_close(alone, logits_of(lora, BATCH), atol=2e-5, rtol=1e-5)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    reloaded = PeftModel.from_pretrained(zoo.base("llama"), str(tmp_path), is_trainable=True)
    assert trained == {n for n, p in reloaded.named_parameters() if p.requires_grad}
    gone = editing.remove_expert(model, "extra")
    assert gone.dropped == done.injected
    assert [name for name, _ in model.named_modules()] == names
    same(state(model), before)
    assert torch.equal(logits_of(model, BATCH), logits)


def _second(zoo: Zoo) -> str:
    return zoo.adapter("llama", "second", Recipe("attention", 12, {"r": 2, "lora_alpha": 4}))


def test_fresh_experts_stay_where_they_were(zoo: Zoo, extra: str, tmp_path: Path) -> None:
    """They have no targets of their own; beside an adapter with more modules they get some."""
    config = MoLoraConfig(experts=2, r=3, init_weights=False, target_modules=["q_proj", "v_proj"],
                          task_type="CAUSAL_LM", router="linear")  # fmt: skip
    model = get_peft_model(zoo.base("llama"), config).eval()
    set_routers(model)
    logits = logits_of(model, BATCH)
    done = editing.add_expert(model, "extra", extra, init="zero")
    assert len(done.injected) == 21 - 6
    unchanged(logits_of(model, BATCH), logits)
    assert torch.equal(logits_of(saved_and_loaded(zoo, model, tmp_path), BATCH), logits_of(model, BATCH))


def test_a_second_mixture_is_left_alone(zoo: Zoo, extra: str) -> None:
    model = mixture(zoo, "linear")
    model.add_adapter("other", MoLoraConfig(experts=zoo.experts("llama"), router="linear"))
    set_routers(model, seed=3, adapter="other")
    model.set_adapter("other")
    logits = logits_of(model, BATCH)
    editing.add_expert(model, "extra", extra, adapter_name="default", init="zero")
    editing.remove_expert(model, "upper", adapter_name="default")
    assert torch.equal(logits_of(model, BATCH), logits)
    editing.remove_expert(model, "upper")  # the active one
    assert model.peft_config["other"].expert_names == ["wide", "narrow"]
    model.set_adapter("default")
    assert model.peft_config["default"].expert_names == ["wide", "narrow", "extra"]
    logits_of(model, BATCH)


def test_bf16_experts_stay_bit_for_bit_beside_a_float32_one(zoo: Zoo, extra: str) -> None:
    from support.adapters import RECIPES

    folder = zoo.adapter("llama", "wide-bf16", RECIPES["wide"], torch.bfloat16)
    config = MoLoraConfig(experts={"half": folder}, router="linear", null_expert=True)
    model = get_peft_model(zoo.base("llama"), config).eval()
    before = slabs(model)
    editing.add_expert(model, "extra", extra)
    after = slabs(model)
    assert all(torch.equal(after[key].bfloat16(), value) for key, value in before.items())
    assert all(torch.equal(after[key], value.float()) for key, value in before.items())


BAD: dict[str, tuple[Any, str]] = {
    "unknown": (lambda m, x: editing.remove_expert(m, "wid"), r"'wid' is no expert.*Did you mean 'wide'"),
    "taken": (lambda m, x: editing.add_expert(m, "wide", x), "the name equals 'wide'"),
    "case": (lambda m, x: editing.rename_expert(m, "upper", "Wide"), "but for case"),
    "reserved": (lambda m, x: editing.add_expert(m, "null", x), "is reserved"),
    "part": (lambda m, x: editing.rename_expert(m, "upper", "q_proj"), "part of the base's module paths"),
    "order": (lambda m, x: editing.reorder_experts(m, ["wide", "narrow"]), "each expert of mixture"),
    "twice": (lambda m, x: editing.reorder_experts(m, ["wide"] * 3), "each expert"),
    "text": (lambda m, x: editing.reorder_experts(m, "wide"), "each expert"),
    "init": (lambda m, x: editing.add_expert(m, "new", x, init="mead"), r"init='mead' is not known.*'mean'"),
    "no data": (lambda m, x: editing.add_expert(m, "new", x, init="fit"), "reads texts; give data"),
    "idle data": (lambda m, x: editing.add_expert(m, "new", x, data=[{}]), "data has no effect with init"),
    "no refit": (lambda m, x: editing.add_expert(m, "new", x, init="refit"), "give data and tokenizer"),
    "folder": (lambda m, x: editing.add_expert(m, "new", x + "x"), "there is no folder"),
    "mixture": (lambda m, x: editing.remove_expert(m, "wide", adapter_name="x"), "carries no mixture named"),
    "base": (lambda m, x: editing.add_expert(m.get_base_model(), "new", x), "carries no mixture"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_refusals_leave_the_model_as_it_was(zoo: Zoo, case: str, extra: str) -> None:
    model = mixture(zoo, "linear")
    before, logits, config = state(model), logits_of(model, BATCH), model.peft_config["default"].to_dict()
    act, words = BAD[case]
    with pytest.raises(PeftMoeError, match=words):
        act(model, extra)
    same(state(model), before)
    assert model.peft_config["default"].to_dict() == config
    assert torch.equal(logits_of(model, BATCH), logits)


@pytest.mark.parametrize("kind", sorted(NO_ZERO))
def test_routers_that_cannot_silence_an_expert_say_why(zoo: Zoo, kind: str, extra: str) -> None:
    model = mixture(zoo, kind)
    with pytest.raises(PeftMoeError, match=r"init='zero':.*use_experts"):
        editing.add_expert(model, "extra", extra, init="zero")


def test_what_cannot_be_edited_says_why(zoo: Zoo, extra: str) -> None:
    model = mixture(zoo, "uniform")
    model.merge_adapter()
    with pytest.raises(PeftMoeError, match="unmerge_adapter"):
        editing.remove_expert(model, "wide")
    model = get_peft_model(
        zoo.base("llama"), MoLoraConfig(experts={"only": extra}, router="linear", null_expert=True)
    )
    with pytest.raises(PeftMoeError, match="last expert"):
        editing.remove_expert(model, "only")
    model = mixture(zoo, "shared", shared_experts=["narrow", "wide"], null_expert=None)
    with pytest.raises(PeftMoeError, match="leaves no expert to route"):
        editing.remove_expert(model, "upper")
    fresh = MoLoraConfig(experts=4, router="mola", experts_per_layer=[2, 3, 4], target_modules=["q_proj"])
    model = get_peft_model(zoo.base("llama"), fresh)
    with pytest.raises(PeftMoeError, match="experts_per_layer="):
        editing.add_expert(model, "new", extra)
    editing.rename_expert(model, "expert_3", "last")  # moves nothing
    assert model.peft_config["default"].expert_names[-1] == "last"
    # The block's router reads what its first adapted layer reads.
    late = zoo.adapter(
        "llama", "late", Recipe("mlp", 4, {"r": 2, "exclude_modules": ["gate_proj", "up_proj"]})
    )
    config = MoLoraConfig(
        experts={"late": late, "second": _second(zoo)}, router="linear", router_scope="block"
    )
    model = get_peft_model(zoo.base("llama"), config)
    with pytest.raises(PeftMoeError, match=r"reads the input of .*down_proj"):
        editing.add_expert(model, "extra", extra)


def test_an_outsiders_router_needs_no_description(zoo: Zoo, extra: str) -> None:
    """The axes of columns are found by making the router with one expert more."""
    from torch import nn
    from torch.nn import functional

    from peft_moe import Scorer, register_router

    @register_router("odd_one")
    class Odd(Scorer):
        def __init__(self, settings, in_features):
            super().__init__(settings, in_features)
            self.down = nn.Linear(in_features, 4)
            self.scale = nn.Parameter(torch.ones(2, 1, settings.num_columns))
            self.up = nn.Linear(4, settings.num_columns)

        def forward(self, x):
            return self.up(functional.silu(self.down(x))) * self.scale.sum((0, 1))

    model = mixture(zoo, "odd", router="odd_one", null_expert=True)
    before, logits = state(model), logits_of(model, BATCH)
    editing.add_expert(model, "extra", extra)
    assert next(r for _, r in routers(model)).scorer.scale.shape == (2, 1, 5)
    logits_of(model, BATCH)
    with pytest.raises(PeftMoeError, match="no number that keeps one expert's score below"):
        editing.add_expert(model, "more", extra, init="zero")
    editing.remove_expert(model, "extra")
    same(state(model), before)
    assert torch.equal(logits_of(model, BATCH), logits)
    Flat = type("Flat", (Odd,), {"__init__": _flat})
    register_router("flat_one")(Flat)
    model = mixture(zoo, "odd", router="flat_one")
    with pytest.raises(PeftMoeError, match="no axis of columns"):
        editing.remove_expert(model, "upper")


def _flat(self, settings, in_features):
    from torch import nn

    from peft_moe import Scorer

    Scorer.__init__(self, settings, in_features)
    self.down = nn.Linear(in_features, 4)
    self.scale = nn.Parameter(torch.ones(2, 1, settings.num_columns))
    self.up = nn.Linear(4, settings.num_columns)
    self.flat = nn.Parameter(torch.zeros(3 * settings.num_columns))
