"""Masks, temperature, fixed gates and rows by name: at run time, in every scope, on every path of a call."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from peft import PeftModel
from support.batches import batch_for, labels_for, logits_of, pad, texts
from support.routing import bias_of, choose, routers
from support.zoo import Zoo
from torch import Tensor
from transformers import DynamicCache

from peft_moe import (
    PeftMoeError,
    record_routing,
    routing_inputs,
    use_experts,
    use_gates,
    use_temperature,
)
from peft_moe.training import MoLoraSFTTrainer
from peft_moe.tuner.layers.shared_router import named_routers

# float32, another order of summation, and rounding that passes through the cache.
FP32 = {"atol": 2e-5, "rtol": 1e-5}
# Gates from the same scores by other float32 code: a few roundings.
GATES = {"atol": 1e-6, "rtol": 1e-5}
BATCH = batch_for("llama", texts())
NAMES = ["wide", "narrow", "upper"]
# Every scope and granularity, every activation and selection.
KINDS = [
    "uniform", "dense", "top2", "block", "token-probe", "token-base", "prompt-soft", "prompt-base",
    "prompt-module", "prompt-block", "token-prompt", "running-probe", "running-base", "running-block", "mlp",
    "top-p", "sigmoid-top2", "static",
]  # fmt: skip
STEPS = 4


def mixture(zoo: Zoo, kind: str) -> PeftModel:
    """With the expert that gets masked in use, also where one alone is chosen."""
    model = zoo.mixture("llama", kind)
    if kind == "prompt-base":
        with torch.no_grad():
            for _, router in routers(model):
                bias_of(router)[0] += 3
    return model


def decisions(model: PeftModel, batch: dict[str, Any] = BATCH) -> dict[str, Any]:
    with record_routing() as record, torch.no_grad():
        model(**batch)
    return record.decisions


def allowed(model: PeftModel) -> tuple[str, ...]:
    """Two of the three experts, and the null expert where there is one."""
    return ("narrow", "upper", *(["null"] if model.peft_config["default"].null_expert else []))


def expected_gates(logits: Tensor, settings: Any, closed: list[int], bias: Tensor | None) -> Tensor:
    """The router's selection over open columns, token by token in float64."""
    rows = logits.double().reshape(-1, logits.shape[-1])
    open_columns = [c for c in range(rows.shape[1]) if c not in closed]
    gates = torch.zeros(len(rows), settings.num_experts, dtype=torch.float64)
    act = {"softmax": lambda v: v.softmax(-1), "sigmoid": torch.sigmoid, "relu": torch.relu}
    for number, row in enumerate(rows):
        scores = row[open_columns]
        dense = act[settings.scoring_func](scores) if settings.scoring_func != "none" else scores
        kept = list(range(len(open_columns)))
        if settings.topk_method == "top_p":
            kept, mass = [], 0.0
            for place in dense.argsort(descending=True).tolist():
                kept.append(place)
                mass += float(dense[place])
                if mass >= settings.top_p:
                    break
        elif settings.top_k is not None:
            ranking = scores if bias is None else dense + bias.double()[open_columns]
            kept = ranking.topk(min(settings.top_k, len(open_columns))).indices.tolist()
        total = dense[kept].sum() if settings.norm_topk_prob else 1.0
        for place in kept:
            if open_columns[place] < settings.num_experts:  # else the null expert
                gates[number, open_columns[place]] = dense[place] / total
    return gates.reshape(*logits.shape[:-1], -1)


@pytest.mark.parametrize("kind", KINDS)
def test_masked_columns_leave_the_competition_and_the_rest_is_normalised(zoo: Zoo, kind: str) -> None:
    model = mixture(zoo, kind)
    free, unmasked = decisions(model), logits_of(model, BATCH)
    with model.use_experts(*allowed(model)):
        masked = decisions(model)
        moved = logits_of(model, BATCH)
    assert masked.keys() == free.keys()
    settings = dict(named_routers(model, "default"))
    for name, routing in masked.items():
        router = settings[name]
        assert (routing.gates[..., 0] == 0).all()
        wanted = expected_gates(routing.logits, router.settings, [0], router.balance_bias)
        torch.testing.assert_close(routing.gates.double(), wanted, **GATES)
        assert routing.selected is None or not routing.selected[..., 0].any()
    assert not torch.allclose(moved, unmasked, atol=1e-3)
    # All of them allowed is nothing masked, bit for bit.
    names = [*NAMES, *(["null"] if model.peft_config["default"].null_expert else [])]
    with use_experts(*names):
        assert torch.equal(logits_of(model, BATCH), unmasked)


@pytest.mark.parametrize("kind", KINDS)
def test_one_expert_left_is_that_adapter(zoo: Zoo, kind: str) -> None:
    if kind == "token-base" or kind.endswith("-base"):
        pytest.skip("layers below the tap stay unadapted there")
    model = mixture(zoo, kind)
    if kind in {"sigmoid-top2", "static"}:
        assert model.peft_config["default"].norm_topk_prob
    with model.use_experts("wide"):
        masked = logits_of(model, BATCH)
    torch.testing.assert_close(masked, logits_of(zoo.lora("llama", "wide"), BATCH), **FP32)


@pytest.mark.parametrize("scoring", ["relu", "none"])
def test_unnormalised_weights_of_the_others_stay_as_they_are(zoo: Zoo, scoring: str) -> None:
    model = zoo.mixture("llama", "dense", scoring_func=scoring, norm_topk_prob=False)
    # The first layer's input does not depend on the gates.
    name = "model.layers.0.self_attn.q_proj"
    free = decisions(model)[name].gates
    with model.use_experts("narrow", "upper"):
        masked = decisions(model)[name].gates
    assert torch.equal(masked[..., 1:], free[..., 1:])
    assert (masked[..., 0] == 0).all()
    assert (free[..., 0] != 0).any()


def test_shared_and_null_experts_count_only_if_they_are_named(zoo: Zoo) -> None:
    model = zoo.mixture("llama", "dense", shared_experts=["wide"], null_expert=True)
    name = "model.layers.0.self_attn.q_proj"
    with model.use_experts("narrow", "upper"):  # the null expert is shut, hence they sum to 1
        gates = decisions(model)[name].gates
    torch.testing.assert_close(gates.sum(-1), torch.ones(gates.shape[:-1]), **GATES)
    assert (gates[..., 0] == 0).all()
    with model.use_experts("wide", "narrow", "null"):
        gates = decisions(model)[name].gates
    assert (gates[..., 0] == 1).all()
    assert (gates[..., 1] < 1).all()
    with model.use_experts("wide"):  # no routed expert is left
        gates = decisions(model)[name].gates
    assert torch.equal(gates, torch.tensor([1.0, 0.0, 0.0]).expand_as(gates))
    with model.use_experts("base"):
        assert torch.equal(logits_of(model, BATCH), logits_of(zoo.base("llama"), BATCH))


@pytest.mark.parametrize("kind", ["dense", "top2", "prompt-soft", "prompt-block", "static", "sigmoid-top2"])
def test_temperature_is_that_of_the_config(zoo: Zoo, kind: str) -> None:
    """At run time as if it had been configured: the same numbers up to one rounding of the scores."""
    model, configured = zoo.mixture("llama", kind), zoo.mixture("llama", kind, router_temperature=0.3)
    free = logits_of(model, BATCH)
    with model.use_temperature(0.3):
        torch.testing.assert_close(logits_of(model, BATCH), logits_of(configured, BATCH), **FP32)
        assert not torch.allclose(logits_of(model, BATCH), free, atol=1e-4)
    with use_temperature(1.0):
        assert torch.equal(logits_of(configured, BATCH), logits_of(configured, BATCH))
        torch.testing.assert_close(logits_of(configured, BATCH), free, **FP32)


@pytest.mark.parametrize("kind", ["uniform", "top2", "block", "token-probe", "prompt-base", "running-block"])
def test_fixed_gates_by_name(zoo: Zoo, kind: str) -> None:
    model = mixture(zoo, kind)
    with model.use_gates({"upper": 0.5, "wide": 2.0}):
        named = logits_of(model, BATCH)
    with routing_inputs(gates=torch.tensor([[2.0, 0.0, 0.5]])):
        assert torch.equal(named, logits_of(model, BATCH))
        with use_gates({"narrow": 1.0}):  # a tensor of gates goes before
            assert torch.equal(named, logits_of(model, BATCH))


@pytest.mark.parametrize("kind", [k for k in KINDS if not k.endswith("-base")])
def test_an_expert_by_name_for_each_row(zoo: Zoo, kind: str) -> None:
    model = mixture(zoo, kind)
    batch = batch_for("llama", texts(lengths=(9, 6, 8)), side="left")
    free, base = logits_of(model, batch), logits_of(zoo.base("llama"), batch)
    with routing_inputs(experts=["narrow", None, "base"]):
        mixed = logits_of(model, batch)
    one = logits_of(zoo.lora("llama", "narrow"), batch)
    for got, wanted in zip(mixed, (one[0], free[1], base[2]), strict=True):
        torch.testing.assert_close(got, wanted, **FP32)
    with routing_inputs(experts=["narrow", "wide", "null"]), record_routing() as record:
        named = logits_of(model, batch)
    assert not record.decisions  # nobody is asked
    torch.testing.assert_close(named[0], mixed[0], **FP32)
    torch.testing.assert_close(named[1], logits_of(zoo.lora("llama", "wide"), batch)[1], **FP32)


def generate(model: PeftModel, prompt: dict[str, Tensor], **options: Any) -> Any:
    return model.generate(
        **prompt,
        max_new_tokens=STEPS,
        min_new_tokens=STEPS,
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )


def steps_of(output: Any) -> Tensor:
    beams = getattr(output, "beam_indices", None)
    if beams is None:
        return torch.stack(output.logits, dim=1)
    return torch.stack([logits[beams[:, step]] for step, logits in enumerate(output.logits)], dim=1)


def full_pass(model: PeftModel, prompt: dict[str, Tensor], sequences: Tensor, **said: Any) -> Tensor:
    """Logits of the new tokens from one pass over the finished sequences."""
    rows, width = len(sequences), prompt["input_ids"].shape[1]
    head = prompt["attention_mask"].repeat_interleave(rows // len(prompt["input_ids"]), dim=0)
    mask = torch.cat([head, head.new_ones(rows, sequences.shape[1] - width)], dim=1)
    is_prompt = torch.zeros_like(mask).bool()
    is_prompt[:, :width] = head.bool()
    call = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp_min(0)}
    with torch.no_grad(), routing_inputs(prompt_mask=is_prompt, **said):
        return model(input_ids=sequences, **call, use_cache=False).logits[:, width - 1 : -1]


OPTIONS = {
    "greedy": {},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "no-cache": {"use_cache": False},
}


# Beams and a missing cache differ where decisions outlive their call.
LASTING = ["top2", "token-probe", "prompt-soft", "prompt-block", "token-prompt", "running-base"]


@pytest.mark.parametrize(
    ("kind", "how"),
    [(kind, how) for how in OPTIONS for kind in (KINDS if how == "greedy" else LASTING)],
)
def test_controls_hold_through_a_generation(zoo: Zoo, kind: str, how: str) -> None:
    model = mixture(zoo, kind)
    prompt = pad(texts(lengths=(9, 6)), side="left")
    free = generate(model, prompt, **OPTIONS[how])
    with model.use_experts(*allowed(model)), model.use_temperature(0.5):
        output = generate(model, prompt, **OPTIONS[how])
        wanted = full_pass(model, prompt, output.sequences)
    torch.testing.assert_close(steps_of(output), wanted, **FP32)
    assert not torch.allclose(steps_of(output)[0, 0], steps_of(free)[0, 0], atol=1e-3)
    with routing_inputs(experts=["upper", None]):
        output = generate(model, prompt, **OPTIONS[how])
    repeats = len(output.sequences) // 2
    said = {"experts": ["upper"] * repeats + [None] * repeats}
    wanted = full_pass(model, prompt, output.sequences, **said)
    torch.testing.assert_close(steps_of(output), wanted, **FP32)


@pytest.mark.parametrize("kind", ["dense", "prompt-soft", "prompt-base", "prompt-module", "prompt-block",
                                  "token-prompt", "running-block", "running-base"])  # fmt: skip
def test_a_mask_may_begin_and_end_within_a_generation(zoo: Zoo, kind: str) -> None:
    """The prompt's scores stay in the cache; what a step may use is asked in that step."""
    model = mixture(zoo, kind)
    prompt = pad(texts(lengths=(7, 7)))
    token = torch.tensor([[5], [9]])

    def run(*masked: bool) -> list[Tensor]:
        cache, out = DynamicCache(), []
        with torch.no_grad():
            for step, mask in enumerate(masked):
                call = prompt if step == 0 else {"input_ids": token}
                with model.use_experts(*allowed(model)) if mask else nullcontext():
                    out.append(model(**call, past_key_values=cache, use_cache=True).logits[:, -1])
        return out

    free, begins, ends, all_masked = run(False, False), run(False, True), run(True, False), run(True, True)
    assert torch.equal(free[0], begins[0])
    assert torch.equal(ends[0], all_masked[0])
    # Same keys of the prompt, another mask in the step: it bites, in both directions.
    assert not torch.allclose(free[1], begins[1], atol=1e-4)
    assert not torch.allclose(ends[1], all_masked[1], atol=1e-4)


@pytest.mark.parametrize("kind", ["dense", "top2", "block", "token-base", "prompt-soft", "running-block"])
def test_training_under_a_mask(zoo: Zoo, kind: str) -> None:
    """Masked columns get no gradient from the language model's loss, with checkpointing as without."""
    labels = labels_for("llama", BATCH)
    grads: list[list[Tensor]] = []
    for checkpointing in (False, True):
        model = mixture(zoo, kind)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        with model.use_experts(*allowed(model)):
            loss = model(**BATCH, labels=labels).loss
        loss.backward()  # recomputed layers find the mask that held in their pass
        grads.append([r.scorer.weight.grad.clone() for _, r in routers(model)])
    assert max(g[1:].abs().max() for g in grads[0]) > 1e-6
    for plain, recomputed in zip(*grads, strict=True):
        assert (plain[0] == 0).all()
        torch.testing.assert_close(plain, recomputed, atol=1e-6, rtol=1e-5)


def test_a_trainer_within_a_mask(zoo: Zoo, tmp_path: Any) -> None:
    from support.training import make_trainer, samples, tokenised

    weights = {}
    for masked in (False, True):
        model = zoo.mixture("llama", "dense")
        before = {n: p.detach().clone() for n, p in model.named_parameters() if "scorer.weight" in n}
        trainer = make_trainer("sft", model, tokenised(samples(4)), tmp_path / str(masked), max_steps=2)
        assert isinstance(trainer, MoLoraSFTTrainer)
        with use_experts("narrow", "upper") if masked else nullcontext():
            trainer.train()
        after = dict(model.named_parameters())
        weights[masked] = {n: (after[n].detach() - p) for n, p in before.items()}
    assert all((change[0] == 0).all() for change in weights[True].values())
    assert any((change[0] != 0).any() for change in weights[False].values())
    assert any((change[1:] != 0).any() for change in weights[True].values())


def test_an_oracle_whose_expert_is_masked_treats_it_as_unknown(zoo: Zoo) -> None:
    model = zoo.mixture("llama", "dense", router="oracle")
    with routing_inputs(domains=torch.tensor([0, 1])), model.use_experts("narrow", "upper"):
        gates = next(iter(decisions(model).values())).gates
    assert torch.equal(gates[0, 0], torch.tensor([0.0, 0.5, 0.5]))
    assert torch.equal(gates[1, 0], torch.tensor([0.0, 1.0, 0.0]))


def test_blocks_nest_and_leave_nothing_behind(zoo: Zoo) -> None:
    model = zoo.mixture("llama", "dense")
    free = logits_of(model, BATCH)
    with use_experts("wide", "narrow"):
        outer = logits_of(model, BATCH)
        with use_temperature(0.2), use_experts("upper"):
            inner = logits_of(model, BATCH)
        assert torch.equal(logits_of(model, BATCH), outer)
    assert torch.equal(logits_of(model, BATCH), free)
    with use_experts("upper"):
        torch.testing.assert_close(logits_of(model, BATCH), inner, **FP32)  # one expert: no temperature
    with pytest.raises(RuntimeError, match="boom"), use_experts("upper"):
        raise RuntimeError("boom")
    assert torch.equal(logits_of(model, BATCH), free)
    with use_experts("upper"), model.disable_adapter():
        assert torch.equal(logits_of(model, BATCH), logits_of(zoo.base("llama"), BATCH))


REFUSALS = {
    "unknown": (lambda m: m.use_experts("wid"), r"use_experts: 'wid' is no expert.*Did you mean 'wide'"),
    "no name": (lambda m: m.use_experts(), "masks every expert; name at least one"),
    "no text": (lambda m: m.use_experts(["wide"]), r"\['wide'\] is no name"),
    "no null": (lambda m: m.use_experts("wide", "null"), "null_expert=False"),
    "cold": (lambda m: m.use_temperature(0), "temperature=0 must be a finite number > 0"),
    "endless": (lambda m: m.use_temperature(float("inf")), "temperature=inf must be"),
    "negative": (lambda m: m.use_gates({"wide": -0.1}), r"gates\['wide'\]=-0.1 must be a finite number ≥ 0"),
    "nan": (lambda m: m.use_gates({"wide": float("nan")}), "must be a finite number"),
    "true": (lambda m: m.use_gates({"wide": True}), "must be a finite number"),
    "empty": (lambda m: m.use_gates({}), "must map names to weights"),
    "gates of a stranger": (lambda m: m.use_gates({"widr": 1.0}), "gates: 'widr' is no expert.*'wide'"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(zoo: Zoo, case: str) -> None:
    model = zoo.mixture("llama", "dense")
    ask, words = REFUSALS[case]
    with pytest.raises(PeftMoeError, match=words):
        ask(model)


LATE = {
    "unknown": (lambda: use_experts("wid"), "Did you mean 'wide'"),
    "gates": (lambda: use_gates({"narow": 1.0}), "Did you mean 'narrow'"),
    "row": (lambda: routing_inputs(experts=["wide", "uper"]), "experts: 'uper' is no expert.*'upper'"),
    "rows": (
        lambda: routing_inputs(experts=["wide"] * 3),
        "experts has 3 entries, this call has 2",
    ),
}


@pytest.mark.parametrize("case", LATE)
def test_refusals_at_the_forward_pass(zoo: Zoo, case: str) -> None:
    model = zoo.mixture("llama", "dense")
    block, words = LATE[case]
    expected = logits_of(model, BATCH)
    with block(), pytest.raises(PeftMoeError, match=words):
        logits_of(model, BATCH)
    assert torch.equal(logits_of(model, BATCH), expected)


def test_merged_experts_cannot_be_masked_nor_masked_ones_merged(zoo: Zoo) -> None:
    model = zoo.mixture("llama", "uniform")
    with use_experts("wide"), pytest.raises(PeftMoeError, match="cannot be merged"):
        model.merge_adapter()
    model.merge_adapter()
    with use_experts("wide"), pytest.raises(PeftMoeError, match="unmerge_adapter"):
        logits_of(model, BATCH)


def test_an_encoder_that_runs_by_itself_hears_nothing_and_says_so(zoo: Zoo) -> None:
    model = zoo.mixture("t5", "dense")
    batch = batch_for("t5", texts())
    with use_experts("wide"):
        torch.testing.assert_close(logits_of(model, batch), logits_of(zoo.lora("t5", "wide"), batch), **FP32)
        with pytest.raises(PeftMoeError, match="runs outside of the whole model"):
            model.generate(input_ids=batch["input_ids"], max_new_tokens=2)


def test_a_hard_choice_follows_the_mask(zoo: Zoo) -> None:
    model = zoo.mixture("llama", "prompt-probe")
    choose(model, 0)
    with model.use_experts("narrow", "upper"):
        gates = decisions(model)["shared_router.default"].gates
    assert (gates[..., 0] == 0).all()
    assert (gates.sum(-1) == 1).all()
