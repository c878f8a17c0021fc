"""Every bad value and combination of ``MoLoraConfig`` fields: refused with field, value and fix."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from peft import PeftConfig
from peft.config import PeftConfigMixin

from peft_moe import MoLoraConfig, PeftMoeError
from peft_moe.config import FORMAT_VERSION
from peft_moe.routers import PRESETS, available_scorers

NAN, INF, HUGE = float("nan"), float("inf"), 10**400
NOT_BOOL = [1, 0, "yes", "true", [], 0.0]
NOT_COUNT = [0, -1, 1.5, "2", True, False, NAN, [2], np.int64(0)]
NOT_POSITIVE = [0, -4, NAN, INF, "16", True, HUGE, [1.0]]
NOT_COEF = [-0.1, NAN, INF, -INF, "0.01", True, HUGE, None]
NOT_NAMES = [3, "", [3], ["q_proj", ""], {"q_proj": 1}, True]

# Field -> values that it refuses. Every field of ours has a row; see test_every_field_has_a_row.
BAD = {
    "experts": [
        0,
        -1,
        True,
        None,
        2.5,
        "folder",
        ("a", "b"),
        {},
        [],
        [3],
        ["a", 3],
        ["x/a", "y/a"],
        {"a": ""},
        {"a": 1},
        {1: "a"},
        [{"r": 8}],
        [{"name": 3}],
        [{"name": "a"}, {"name": "a"}],
        [{"name": "a", "flavour": "sweet"}],
        [{"name": "a", "r": "8"}],
        [{"name": "a", "r": True}],
        [{"name": "a", "lora_alpha": NAN}],
    ],
    "target_modules": [*NOT_NAMES, []],
    "exclude_modules": NOT_NAMES,
    "layers_to_transform": [-1, "0", 1.5, True, [0, -1], ["0"]],
    "layers_pattern": NOT_NAMES,
    "modules_to_save": ["lm_head", 3, [3], [""], True],
    "trainable_token_indices": [3, "3", [-1], ["3"], {"embed": 3}, {3: [1]}, True],
    "bias": ["all", "lora_only", None, True, 0],
    "r": [*NOT_COUNT, None],
    "lora_alpha": [*NOT_POSITIVE, None],
    "use_rslora": [*NOT_BOOL, None],
    "init_weights": [*NOT_BOOL, None, "gaussian"],
    "train_experts": NOT_BOOL,
    "router": ["lineer", "", None, 3, ["linear"], {}, "Linear", True],
    "router_scope": ["layer", "", 3, True, ["module"]],
    "router_tap": [-1, 1.5, True, False, "", [3]],
    "router_below_tap": ["skip", "", 3, True],
    "router_granularity": ["tokens", "", 3, True],
    "router_pool": ["max", "", 3, True],
    "router_input_norm": NOT_BOOL,
    "router_temperature": NOT_POSITIVE,
    "router_init_std": [-0.1, NAN, INF, "0.02", True, HUGE],
    "scoring_func": ["relu", "", 3, True],
    "top_k": [*NOT_COUNT, 5, 1000],
    "norm_topk_prob": NOT_BOOL,
    "straight_through": NOT_BOOL,
    "null_expert": NOT_BOOL,
    "router_aux_loss_coef": NOT_COEF,
    "router_z_loss_coef": NOT_COEF,
    "router_label_loss_coef": NOT_COEF,
    "allow_base_mismatch": [*NOT_BOOL, None],
    "format_version": [*NOT_COUNT, None, FORMAT_VERSION + 1, 99],
}
INHERITED = {f.name for f in dataclasses.fields(PeftConfig)} | {
    f.name for f in dataclasses.fields(PeftConfigMixin)
}
OURS = {f.name for f in dataclasses.fields(MoLoraConfig) if f.init} - INHERITED


def test_every_field_has_a_row():
    assert set(BAD) == OURS


@pytest.mark.parametrize(
    ("name", "value"), [(n, v) for n, values in BAD.items() for v in values], ids=lambda v: repr(v)[:30]
)
def test_bad_value_is_refused_with_field_value_and_fix(name, value):
    with pytest.raises(PeftMoeError) as caught:
        MoLoraConfig(**{name: value})
    message = str(caught.value)
    assert name in message
    assert len(message) < 600
    if name != "experts" or not isinstance(value, list | dict):  # of those the bad entry is shown
        assert (repr(value) if len(repr(value)) < 100 else repr(value)[:10]) in message
    # A fix: an order, or the values that are possible.
    assert any(
        w in message
        for w in (
            "must be",
            "Available",
            "give ",
            "names and sources",
            "all as text",
            "lower",
            "add",
            "upgrade",
            "only 'none'",
        )
    )


@pytest.mark.parametrize(
    ("value", "suggestion"),
    [("lineer", "'linear'"), ("unifrm", "'uniform'"), ("contex", "'context'"), ("randm", "'random'")],
)
def test_misspelt_router_is_answered_with_a_near_match(value, suggestion):
    with pytest.raises(PeftMoeError, match=f"Did you mean {suggestion}") as caught:
        MoLoraConfig(router=value)
    assert all(name in str(caught.value) for name in [*available_scorers(), *PRESETS])


# Combinations: arguments, words of the message (field, reason, fix).
REFUSED = {
    "top_k above E": ({"experts": 4, "top_k": 5}, ["top_k=5", "4 experts", "lower"]),
    "top_k above E + null": (
        {"experts": 2, "null_expert": True, "top_k": 4},
        ["top_k=4", "3 experts", "null"],
    ),
    "uniform with top_k": ({"router": "uniform", "top_k": 2}, ["top_k=2", "no effect", "router='linear'"]),
    "uniform with scope": (
        {"router": "uniform", "router_scope": "block"},
        ["router_scope='block'", "no effect"],
    ),
    "uniform with norm": (
        {"router": "uniform", "router_input_norm": True},
        ["router_input_norm=True", "no effect"],
    ),
    "uniform with init": (
        {"router": "uniform", "router_init_std": 0.1},
        ["router_init_std=0.1", "no effect"],
    ),
    "uniform with a loss": (
        {"router": "uniform", "router_z_loss_coef": 1},
        ["router_z_loss_coef=1", "not train"],
    ),
    "random with a loss": (
        {"router": "random", "router_aux_loss_coef": 1},
        ["router_aux_loss_coef=1", "not train"],
    ),
    "sequence per module": (
        {"router_granularity": "sequence"},
        ["'sequence'", "router_scope='model'", "KV cache"],
    ),
    "sequence per block": (
        {"router_granularity": "sequence", "router_scope": "block"},
        ["router_scope='model'", "'block'"],
    ),
    "tap per module": ({"router_tap": 0}, ["router_tap=0", "no effect", "router_scope='model'"]),
    "below_tap per module": ({"router_below_tap": "base"}, ["router_below_tap='base'", "no effect"]),
    "pool per token": ({"router_pool": "last"}, ["router_pool='last'", "no effect", "'sequence'"]),
    "layers with a regex": (
        {"target_modules": ".*q_proj", "layers_to_transform": [0]},
        ["layers_to_transform=[0]", "regex"],
    ),
    "pattern without layers": (
        {"layers_pattern": "layers"},
        ["layers_pattern='layers'", "layers_to_transform"],
    ),
    "dense straight-through": ({"straight_through": True}, ["straight_through=True", "no effect", "top_k"]),
    "straight-through k = E": (
        {"straight_through": True, "top_k": 4},
        ["straight_through=True", "no effect"],
    ),
    "constant top-1": (
        {"top_k": 1},
        ["top_k=1", "no gradient", "straight_through=True", "norm_topk_prob=False"],
    ),
    "balancing dense gates": (
        {"router_aux_loss_coef": 0.1},
        ["router_aux_loss_coef=0.1", "no effect", "top_k"],
    ),
    "balancing k = E": ({"router_aux_loss_coef": 0.1, "top_k": 4}, ["router_aux_loss_coef=0.1", "no effect"]),
    "z-loss of sigmoid": (
        {"router_z_loss_coef": 0.1, "scoring_func": "sigmoid"},
        ["router_z_loss_coef=0.1", "scoring_func='sigmoid'"],
    ),
    "r of adapters": ({"experts": {"a": "x"}, "r": 16}, ["r=16", "no effect", "leave it out"]),
    "alpha of adapters": ({"experts": ["x/a"], "lora_alpha": 32}, ["lora_alpha=32", "no effect"]),
    "rslora of adapters": ({"experts": {"a": "x"}, "use_rslora": True}, ["use_rslora=True", "no effect"]),
    "init of adapters": ({"experts": {"a": "x"}, "init_weights": False}, ["init_weights=False", "no effect"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_combination(case):
    fields, words = REFUSED[case]
    with pytest.raises(PeftMoeError) as caught:
        MoLoraConfig(**fields)
    assert [word for word in words if word not in str(caught.value)] == []
