"""The models that a bake-off builds: merges, PEFT's own mixtures, one wide LoRA."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from support.adapters import RECIPES, Recipe, make_adapter
from support.bases import VOCAB, make_base

from peft_moe import MoLoraConfig, PeftMoeError
from peft_moe.evaluation.bakeoff.build import BUILDERS
from peft_moe.evaluation.bakeoff.peft_baselines import arrow, merge, wide_lora, xlora

# float32 sums of a few dozen terms in another order; the adapters move the logits by more than 0.1.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder: Path = tmp_path_factory.mktemp("adapters")
    twins = {"left": Recipe("all", 4, {"r": 4}), "right": Recipe("all", 5, {"r": 4})}
    return {n: make_adapter("llama", folder / n, r) for n, r in (RECIPES | twins).items()}


def chosen(adapters: dict[str, str], *names: str) -> dict[str, str]:
    return {name: adapters[name] for name in names}


def logits(model: torch.nn.Module) -> torch.Tensor:
    ids = torch.arange(3, 27).reshape(2, 12) % VOCAB
    with torch.no_grad():
        return model.eval()(input_ids=ids, use_cache=False).logits


def uniform(experts: dict[str, str]) -> torch.Tensor:
    config = MoLoraConfig(experts=dict(experts), router="uniform", task_type="CAUSAL_LM")
    return logits(get_peft_model(make_base("llama"), config))


# PEFT takes rank-stabilised scaling and the layers from whatever adapter comes first.
@pytest.mark.parametrize("first", ["wide", "narrow", "upper"])
def test_cat_is_the_uniform_mixture_whatever_comes_first(adapters, first) -> None:
    names = [first, *(name for name in RECIPES if name != first)]
    experts = chosen(adapters, *names)
    merged = merge(make_base("llama"), experts, {"combination_type": "cat", "weight": "mean"})
    torch.testing.assert_close(logits(merged), uniform(experts), **CLOSE)
    assert not torch.allclose(logits(merged), logits(make_base("llama")), atol=1e-2)


def test_the_weight_of_a_merge_bites(adapters) -> None:
    experts = chosen(adapters, "wide", "narrow")
    mean, half, whole = (
        logits(merge(make_base("llama"), experts, {"combination_type": "cat", "weight": w}))
        for w in ("mean", 0.5, 1.0)
    )
    torch.testing.assert_close(mean, half)
    assert not torch.allclose(mean, whole, atol=1e-2)


def test_svd_of_the_full_rank_loses_nothing_and_of_less_it_does(adapters) -> None:
    experts = chosen(adapters, "wide", "narrow")
    exact, full, cut = (
        logits(merge(make_base("llama"), experts, {"combination_type": kind, "weight": "mean", **rank}))
        for kind, rank in (("cat", {}), ("svd", {"svd_rank": "sum"}), ("svd", {"svd_rank": "max"}))
    )
    torch.testing.assert_close(full, exact, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(cut, exact, atol=1e-3)


def test_plain_kinds_refuse_unequal_ranks(adapters) -> None:
    with pytest.raises(ValueError, match="same r value"):
        merge(make_base("llama"), chosen(adapters, "wide", "narrow"), {"combination_type": "linear"})


def test_layers_that_peft_would_drop_are_refused(adapters, tmp_path) -> None:
    lower = make_adapter("llama", tmp_path / "lower", Recipe("all", 6, {"r": 6, "layers_to_transform": [0]}))
    with pytest.raises(PeftMoeError, match="layers_to_transform"):
        merge(make_base("llama"), {"upper": adapters["upper"], "lower": lower}, {"combination_type": "cat"})


def test_arrow_runs_on_equal_ranks_and_refuses_others(adapters) -> None:
    model = arrow(make_base("llama"), chosen(adapters, "left", "right"), {"top_k": 3})
    base, own = logits(make_base("llama")), logits(model)
    assert not torch.allclose(own, base, atol=1e-2)
    with pytest.raises(ValueError, match="mismatch"):
        arrow(make_base("llama"), chosen(adapters, "wide", "narrow"), {})


def test_xlora_starts_with_frozen_experts_of_unequal_ranks(adapters) -> None:
    model = xlora(make_base("llama"), chosen(adapters, "wide", "narrow"), {"xlora_depth": 1})
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert names
    assert all("internal_xlora_classifier" in name for name in names)
    assert not torch.allclose(logits(model), logits(make_base("llama")), atol=1e-3)


def test_one_wide_lora_has_all_ranks_and_all_targets(adapters) -> None:
    model = wide_lora(make_base("llama"), chosen(adapters, "wide", "narrow"), {})
    config = model.peft_config["default"]
    assert config.r == 7
    assert config.target_modules >= {"q_proj", "down_proj"}
    # alpha/r = 8/4 and 4/√3, their mean
    assert config.lora_alpha / config.r == pytest.approx((2 + 4 / 3**0.5) / 2)
    torch.testing.assert_close(logits(model), logits(make_base("llama")))  # B starts at zero


def test_an_expert_alone_is_plain_peft(adapters) -> None:
    model = BUILDERS["expert"](make_base("llama"), adapters, {"adapter": "narrow"})
    plain = PeftModel.from_pretrained(make_base("llama"), adapters["narrow"])
    assert torch.equal(logits(model), logits(plain))
