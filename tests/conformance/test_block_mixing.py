"""``mixing="block"``: experts mixed at the output of feed-forward networks, over architectures and routers.

Every tolerance is float32 along another order of summation, at logits of size 3; what must differ differs by
a thousand times that.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from support.adapters import RECIPES
from support.bases import BASES
from support.batches import batch_for, labels_for, logits_of, pad, real_logits, texts
from support.routing import ROUTINGS, choose, permute_columns, routers, set_routers
from support.training import DOMAINS, make_trainer, samples, tokenised, tokenizer
from support.zoo import Zoo
from torch import Tensor, nn

from peft_moe import MoLoraConfig, PeftMoeError, record_routing, routing_inputs
from peft_moe.fitting import fit_router
from peft_moe.tuner.layers.linear import MoLoraLayer

FP32 = {"atol": 1e-5, "rtol": 1e-5}
MOVED = 1e-2
EXPERTS = list(RECIPES)
# Gate, up and down; two linears with biases, on Conv1D; gate and up in one; linears in the layer itself, and
# in two parts of it.
NAMES = ["llama", "gpt2", "phi3", "opt", "bert"]
HOMES = {"llama": "mlp", "gpt2": "mlp", "phi3": "mlp", "gemma3": "mlp"}
SWITCH = {"router": "linear", "top_k": 1, "norm_topk_prob": False}
ROUTES: dict[str, dict[str, Any]] = {
    "dense": ROUTINGS["dense"],
    "top2": ROUTINGS["top2"],
    "block": {"router": "linear", "router_scope": "block", "top_k": 2},
    "model": ROUTINGS["token-probe"],
    "below": ROUTINGS["token-base"],
    "prompt": {"router": "mole"},
    "null": {"router": "linear", "null_expert": True},
    "null2": {"router": "linear", "null_expert": True, "top_k": 2},
    "switch": SWITCH,
    "sigmoid": ROUTINGS["sigmoid-top2"],
    "shared": {"router": "linear", "shared_experts": ["wide"], "top_k": 1, "norm_topk_prob": False},
    "scaled": {"router": "linear", "top_k": 2, "routed_scaling_factor": 1.5},
    "noise": ROUTINGS["random"],
    "uniform": ROUTINGS["uniform"],
    "top-p": ROUTINGS["top-p"],
}  # fmt: skip
FEW = [("llama", route) for route in ROUTES] + [(name, "top2") for name in NAMES[1:]]


def blocks(zoo: Zoo, name: str, route: str = "top2", **fields: Any) -> PeftModel:
    return zoo.mixture(name, **{"mixing": "block", **ROUTES[route], **fields})


def apart(one: Tensor, other: Tensor) -> float:
    return (one - other).abs().max().item()


class Watched:
    """Inputs and outputs of the FFNs of a model, by name."""

    def __init__(self, model: nn.Module, ending: str) -> None:
        self.seen: dict[str, tuple[Tensor, Tensor]] = {}
        for name, module in model.named_modules():
            if name.endswith(f".{ending}"):
                short = name[name.index(next(p for p in ("layers.", "h.") if p in name)) :]
                module.register_forward_hook(
                    lambda m, args, out, short=short: self.seen.__setitem__(short, (args[0], out))
                )


@pytest.mark.parametrize(
    ("name", "route"),
    [("llama", r) for r in ROUTES if r != "below"] + [(n, "null2") for n in HOMES if n != "llama"],
)
def test_every_network_is_the_gated_sum_of_the_experts_networks(zoo: Zoo, name: str, route: str) -> None:
    """An oracle without any of our arithmetic: each expert's own FFN, by PEFT, on the same input."""
    model = blocks(zoo, name, route)
    mixed = Watched(model, HOMES[name])
    with record_routing() as record:
        logits_of(model, batch_for(name, texts()))
    assert len(mixed.seen) == 3
    plain = {expert: zoo.lora(name, expert) for expert in EXPERTS}
    base = zoo.base(name)
    for short, (x, found) in mixed.seen.items():
        decision = next((d for n, d in record.decisions.items() if n.endswith(short)), None)
        gates = (decision or record.decisions["shared_router.default"]).gates
        with torch.no_grad():
            bare = submodule(base, short)(x)
            wanted = bare
            for index, expert in enumerate(EXPERTS):
                wanted = wanted + gates[..., index : index + 1] * (submodule(plain[expert], short)(x) - bare)
        torch.testing.assert_close(found, wanted, **FP32)
        assert apart(found, bare) > MOVED


def submodule(model: nn.Module, short: str) -> nn.Module:
    return next(m for n, m in model.named_modules() if n.endswith(short))


@pytest.mark.parametrize(("name", "route"), FEW)
def test_disabled_is_the_base_and_saved_is_the_same_bit_for_bit(
    zoo: Zoo, name: str, route: str, tmp_path: Path
) -> None:
    batch = batch_for(name, texts())
    model = blocks(zoo, name, route)
    mixed = logits_of(model, batch)
    with model.disable_adapter():
        assert torch.equal(logits_of(model, batch), logits_of(zoo.base(name), batch))
    if route != "noise":
        assert torch.equal(logits_of(model, batch), mixed)
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(zoo.base(name), str(tmp_path)).eval()
    assert torch.equal(logits_of(loaded, batch), mixed)
    assert apart(mixed, logits_of(zoo.mixture(name, **ROUTES[route]), batch)) > MOVED / 10


# Below the tap of "below" the base stays unadapted, which PEFT's adapter is not.
ONE_HOT = [p for p in FEW if p[1] not in ("uniform", "shared", "scaled", "below")]


@pytest.mark.parametrize(("name", "route"), ONE_HOT)
def test_one_hot_gates_are_peft_with_that_adapter(zoo: Zoo, name: str, route: str) -> None:
    batch = batch_for(name, texts())
    model = blocks(zoo, name, route)
    for index, expert in enumerate(EXPERTS):
        choose(model, index)
        torch.testing.assert_close(logits_of(model, batch), logits_of(zoo.lora(name, expert), batch), **FP32)


@pytest.mark.parametrize("name", NAMES)
def test_null_expert_alone_is_the_base(zoo: Zoo, name: str) -> None:
    batch = batch_for(name, texts())
    for route in ("null", "null2"):
        model = blocks(zoo, name, route)
        choose(model, len(EXPERTS))
        assert torch.equal(logits_of(model, batch), logits_of(zoo.base(name), batch))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("route", ["dense", "top2", "model"])
def test_identical_experts_are_one_expert(zoo: Zoo, name: str, route: str) -> None:
    folder = zoo.experts(name)["wide"]
    with pytest.warns(UserWarning, match="router cannot tell them apart"):
        model = blocks(zoo, name, route, experts={"a": folder, "b": folder, "c": folder})
    batch = batch_for(name, texts())
    torch.testing.assert_close(logits_of(model, batch), logits_of(zoo.lora(name, "wide"), batch), **FP32)


@pytest.mark.parametrize("name", NAMES)
def test_top_k_of_all_is_dense_and_order_does_not_matter(zoo: Zoo, name: str) -> None:
    batch = batch_for(name, texts())
    dense = logits_of(blocks(zoo, name, "dense"), batch)
    torch.testing.assert_close(logits_of(blocks(zoo, name, "dense", top_k=3), batch), dense, **FP32)
    assert apart(logits_of(blocks(zoo, name, "top2"), batch), dense) > MOVED / 10
    order, folders = [2, 0, 1], zoo.experts(name)
    other = blocks(zoo, name, "top2", experts={EXPERTS[i]: folders[EXPERTS[i]] for i in order})
    permute_columns(other, order)
    torch.testing.assert_close(logits_of(other, batch), logits_of(blocks(zoo, name, "top2"), batch), **FP32)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(("name", "route"), [p for p in FEW if p[1] != "noise"])
def test_padding_and_company_change_nothing(zoo: Zoo, name: str, route: str, side: str) -> None:
    rows = texts(lengths=(9, 6, 4))
    model = blocks(zoo, name, route)
    alone = [real_logits(name, model, batch_for(name, [row]))[0] for row in rows]
    together = real_logits(name, model, batch_for(name, rows, side, extra=3))
    for one, other in zip(alone, together, strict=True):
        torch.testing.assert_close(other, one, **FP32)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("route", ["dense", "top2", "null2", "switch", "shared"])
def test_experts_that_differ_in_the_last_linear_mix_as_per_linear(zoo: Zoo, name: str, route: str) -> None:
    """The last linear is linear in the gates. The first ones carry experts of zero, so that rows part."""
    batch = batch_for(name, texts())
    found = []
    for mixing in ("block", "linear"):
        # One decision for the whole model, so that both mix by the same gates.
        model = blocks(zoo, name, route, mixing=mixing, router_scope="model")
        for module_name, module in model.named_modules():
            if hasattr(module, "molora_B") and module_name.endswith(BASES[name].mlp[:-1]):
                nn.init.zeros_(module.molora_B["default"].weight)
        found.append(logits_of(model, batch))
    torch.testing.assert_close(*found, **FP32)
    assert apart(found[0], logits_of(zoo.base(name), batch)) > MOVED


@pytest.mark.parametrize("where", ["first", "last"])
def test_experts_in_some_linears_only(zoo: Zoo, where: str, tmp_path: Path) -> None:
    """What is not adapted carries the rows along, or lets them meet."""
    targets = ["up_proj"] if where == "first" else ["down_proj"]
    batch = batch_for("llama", texts())
    folders = {e: zoo.experts("llama")[e] for e in ("wide", "upper")}
    with pytest.warns(UserWarning, match="leaves out"):
        model = blocks(zoo, "llama", "dense", experts=folders, target_modules=targets)
    for index, expert in enumerate(folders):
        choose(model, index)
        plain = zoo.lora("llama", expert)
        for name, parameter in plain.named_parameters():
            if "lora_B" in name and targets[0] not in name:
                nn.init.zeros_(parameter)
        torch.testing.assert_close(logits_of(model, batch), logits_of(plain, batch), **FP32)
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(zoo.base("llama"), str(tmp_path)).eval()
    assert torch.equal(logits_of(loaded, batch), logits_of(model, batch))


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("route", ["top2", "prompt", "model"])
def test_cached_generation_is_a_full_pass(zoo: Zoo, name: str, route: str) -> None:
    model = blocks(zoo, name, route)
    prompt = pad(texts(lengths=(6, 6)))
    width = prompt["input_ids"].shape[1]
    out = model.generate(
        **prompt, max_new_tokens=4, min_new_tokens=4, return_dict_in_generate=True, output_logits=True
    )
    mask = torch.zeros(out.sequences.shape).bool()
    mask[:, :width] = True
    with torch.no_grad(), routing_inputs(prompt_mask=mask):
        full = model(input_ids=out.sequences, use_cache=False).logits[:, width - 1 : -1]
    torch.testing.assert_close(torch.stack(out.logits, dim=1), full, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("route", ["top2", "null2", "model", "switch"])
def test_checkpointing_changes_neither_loss_nor_gradients(zoo: Zoo, name: str, route: str) -> None:
    model = blocks(zoo, name, route).train()
    batch = batch_for(name, texts())

    def gradients() -> tuple[Tensor, dict[str, Tensor]]:
        model.zero_grad(set_to_none=True)
        loss = model(**batch, labels=labels_for(name, batch)).loss
        loss.backward()
        return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    loss, plain = gradients()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    again, recomputed = gradients()
    assert torch.equal(loss, again)
    assert plain.keys() == recomputed.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    assert all("molora_router" in n for n in plain)
    for key, gradient in plain.items():
        torch.testing.assert_close(recomputed[key], gradient, atol=1e-6, rtol=1e-5)
    # Every FFN's router learns: those of scope "model" are one.
    ffn = [g for n, g in plain.items() if "block_router" in n or "shared_router" in n]
    assert len(ffn) == (2 if route == "model" else 6)
    # In the lowest layer one expert alone has ranks, which no token may choose.
    assert sum(bool(g.abs().max() > 1e-5) for g in ffn) > len(ffn) // 2


def test_gradients_of_routers_and_experts_are_those_of_finite_differences(zoo: Zoo) -> None:
    model = blocks(zoo, "llama", "switch", train_experts=True).double().train()
    for _, router in routers(model):
        for parameter in router.parameters():
            parameter.data = parameter.data.double()
    batch = batch_for("llama", texts())

    def loss() -> Tensor:
        return model(**batch, labels=labels_for("llama", batch)).loss

    loss().backward()
    step, names = 1e-3, ("block_router.molora_router", "down_proj.molora_A", "up_proj.molora_B")
    for wanted in names:
        parameter = next(p for n, p in model.named_parameters() if wanted in n and p.grad is not None)
        place = int(parameter.grad.abs().argmax())
        with torch.no_grad():
            flat = parameter.view(-1)
            flat[place] += step
            up = loss()
            flat[place] -= 2 * step
            down = loss()
            flat[place] += step
        numeric = ((up - down) / (2 * step)).item()
        # The base's norms and the loss are in float32: a difference of 1e-4 in a loss of 4 holds two digits.
        assert abs(numeric - parameter.grad.view(-1)[place].item()) < 2e-2 * abs(numeric)


def test_only_routers_train_and_they_learn(zoo: Zoo, tmp_path: Path) -> None:
    model = blocks(zoo, "llama", "top2", router_label_loss_coef=0.1).train()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    trainer = make_trainer("sft", model, tokenised(samples(8)[:8:4] * 2), tmp_path, max_steps=3)
    trainer.train()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n in before if "molora_router" in n}


def test_dtypes(zoo: Zoo, four_bit: Any) -> None:
    batch = batch_for("llama", texts())
    wide = logits_of(blocks(zoo, "llama"), batch)
    narrow = blocks(zoo, "llama", base=zoo.base("llama").bfloat16())
    found = logits_of(narrow, batch)
    assert found.dtype == torch.bfloat16
    assert apart(found.float(), wide) < 0.2  # three layers in 8 bits, at logits of 3
    quantised = blocks(zoo, "llama", base=four_bit()).train()
    loss = quantised(**batch, labels=labels_for("llama", batch)).loss
    loss.backward()
    assert all(p.grad.abs().max() > 0 for n, p in quantised.named_parameters() if "block_router" in n)
    choose(quantised, 0)
    plain = zoo.lora("llama", "wide", base=four_bit())
    torch.testing.assert_close(logits_of(quantised.eval(), batch), logits_of(plain, batch), **FP32)


def test_controls_at_run_time(zoo: Zoo) -> None:
    batch = batch_for("llama", texts())
    model = blocks(zoo, "llama", "top2")
    plain = [logits_of(zoo.lora("llama", expert), batch) for expert in EXPERTS]
    with model.use_experts("upper"):
        torch.testing.assert_close(logits_of(model, batch), plain[2], **FP32)
    with routing_inputs(experts=["wide", "base"]):
        by_row = logits_of(model, batch)
    torch.testing.assert_close(by_row[0], plain[0][0], **FP32)
    torch.testing.assert_close(by_row[1], logits_of(zoo.base("llama"), batch)[1], **FP32)
    with routing_inputs(gates=torch.tensor([[0.0, 1.0, 0.0]])):
        torch.testing.assert_close(logits_of(model, batch), plain[1], **FP32)
    with routing_inputs(gates=torch.zeros(1, 3)):
        torch.testing.assert_close(logits_of(model, batch), logits_of(zoo.base("llama"), batch), **FP32)


def test_routers_are_fitted_from_prompts(zoo: Zoo) -> None:
    """One router per network reads the network's input; a fit without gradients finds the experts' texts."""
    data = [{"text": word * 6, "domain": DOMAINS[i % 3]} for i, word in enumerate("abcabcabc")]
    for targets in (None, ["down_proj"]):
        with pytest.warns(UserWarning, match="leaves out") if targets else nullcontext():
            model = blocks(zoo, "llama", "dense", target_modules=targets, experts=chosen(zoo, targets))
        rows = [row for row in data if row["domain"] in model.peft_config["default"].expert_names]
        fit_router(model, rows, tokenizer(), method="centroid", progress=False)
        batch = tokenizer()([row["text"] for row in rows], return_tensors="pt")
        with record_routing() as record:
            logits_of(model, {k: batch[k] for k in ("input_ids", "attention_mask")})
        names = model.peft_config["default"].expert_names
        wanted = torch.tensor([names.index(row["domain"]) for row in rows])
        gates = next(d for n, d in record.decisions.items() if n.endswith("layers.0.mlp")).gates
        assert (gates.mean(1).argmax(-1) == wanted).all()


def chosen(zoo: Zoo, targets: list[str] | None) -> dict[str, str]:
    return {n: f for n, f in zoo.experts("llama").items() if targets is None or n != "narrow"}


def test_fresh_experts_go_into_every_network(zoo: Zoo) -> None:
    model = get_peft_model(
        zoo.base("gpt2"), MoLoraConfig(experts=2, mixing="block", init_weights=False)
    ).eval()
    set_routers(model)
    adapted = {m.name.rpartition(".")[2] for m in model.modules() if isinstance(m, MoLoraLayer)}
    assert adapted == {"c_fc", "c_proj"}
    batch = batch_for("gpt2", texts())
    assert apart(logits_of(model, batch), logits_of(zoo.base("gpt2"), batch)) > MOVED


class TestRefusals:
    def test_no_network_is_adapted(self, zoo: Zoo) -> None:
        with pytest.raises(
            PeftMoeError, match=r"no linear of one is adapted; it has some at model\.layers\.0\.mlp"
        ):
            blocks(zoo, "llama", experts=2, target_modules=["q_proj"])
        with pytest.raises(PeftMoeError, match="MambaForCausalLM has none"):
            blocks(zoo, "mamba", experts=2, target_modules=["in_proj"])

    def test_a_network_that_cannot_be_taken_apart_is_named(self, zoo: Zoo) -> None:
        base = zoo.base("llama")
        base.model.layers[1].mlp.gate_proj = nn.Linear(64, 100)
        with pytest.raises(PeftMoeError, match=r"model\.layers\.1\.mlp\.gate_proj lies in"):
            blocks(zoo, "llama", base=base, experts=2, target_modules=["gate_proj"])

    def test_merging(self, zoo: Zoo) -> None:
        model = blocks(zoo, "llama", "uniform")
        with pytest.raises(PeftMoeError, match="mixing='block'"):
            model.merge_and_unload()

    def test_company(self, zoo: Zoo) -> None:
        model = blocks(zoo, "llama")
        with pytest.raises(PeftMoeError, match="adapter_names"):
            model(**batch_for("llama", texts()), adapter_names=["default", "__base__"])
        model.add_adapter("other", MoLoraConfig(experts=2, task_type="CAUSAL_LM"))
        model.base_model.set_adapter(["default", "other"])
        with pytest.raises(PeftMoeError, match="one at a time"):
            model(**batch_for("llama", texts()))

    def test_routers_of_one_layer(self, zoo: Zoo) -> None:
        with pytest.raises(PeftMoeError, match="reads the experts of one layer"):
            MoLoraConfig(router="arrow", mixing="block")


def test_a_deleted_mixture_leaves_the_base(zoo: Zoo) -> None:
    batch = batch_for("llama", texts())
    model = blocks(zoo, "llama")
    model.add_adapter(
        "other", MoLoraConfig(experts=2, mixing="block", init_weights=False, task_type="CAUSAL_LM")
    )
    before = logits_of(model, batch)
    model.set_adapter("other")
    assert apart(logits_of(model, batch), before) > MOVED
    model.delete_adapter("other")
    model.set_adapter("default")
    assert torch.equal(logits_of(model, batch), before)
    bare = model.unload()
    assert torch.equal(logits_of(bare, batch), logits_of(zoo.base("llama"), batch))
    assert not any("router" in name for name, _ in bare.named_modules())
