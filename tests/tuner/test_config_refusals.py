"""Every bad value and combination of ``MoLoraConfig`` fields: refused with field, value and fix."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from peft import PeftConfig
from peft.config import PeftConfigMixin

from peft_moe import MoLoraConfig, PeftMoeError
from peft_moe.routers import PRESETS, available_scorers
from peft_moe.tuner.config.fields import FORMAT_VERSION

NAN, INF, HUGE = float("nan"), float("inf"), 10**400
NOT_BOOL = [1, 0, "yes", "true", [], 0.0]
NOT_COUNT = [0, -1, 1.5, "2", True, False, NAN, [2], np.int64(0)]
NOT_POSITIVE = [0, -4, NAN, INF, "16", True, HUGE, [1.0]]
NOT_OPTIONAL_COEF = [-0.1, NAN, INF, -INF, "0.01", True, HUGE]
NOT_COEF = [*NOT_OPTIONAL_COEF, None]
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
        [{"name": "a", "trains": 1}, {"name": "b"}],
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
    "backend": ["stackd", "", "Auto", None, 3, ["stacked"], {}, True],
    "base_fingerprint": [3, "llama", [], {"values": 3}, {"values": {"a": ["x"]}}, {"values": {"a": [NAN]}}],
    "weights_digest": [3, "", True, ["routers"], {}],
    "base_precision": [3, True, "", ["full"], {}],
    "layers_to_transform": [-1, "0", 1.5, True, [0, -1], ["0"]],
    "layers_pattern": NOT_NAMES,
    "modules_to_save": ["lm_head", 3, [3], [""], True],
    "trainable_token_indices": [3, "3", [-1], ["3"], {"embed": 3}, {3: [1]}, True],
    "bias": ["lora_only", "All", None, True, 0],
    "r": [*NOT_COUNT, None],
    "lora_alpha": [*NOT_POSITIVE, None],
    "use_rslora": [*NOT_BOOL, None],
    "init_weights": [*NOT_BOOL, None, "gaussian"],
    "train_experts": NOT_BOOL,
    "mixing": ["ffn", "", None, 3, True, ["block"]],
    "router": ["lineer", "", None, 3, ["linear"], {}, "Linear", True],
    "router_scope": ["layer", "", 3, True, ["module"]],
    "router_tap": [-1, 1.5, True, False, "", [3]],
    "router_below_tap": ["skip", "", 3, True],
    "router_hidden_size": NOT_COUNT,
    "topk_method": ["best", "", 3, True],
    "top_p": [0, 1, 1.5, -0.1, NAN, "0.5", True],
    "routed_scaling_factor": [*NOT_POSITIVE, None],
    "shared_experts": ["expert_0", [3], [""], ["nobody"], ["expert_0", "expert_0"], None],
    "experts_per_layer": [[], [0], "2", [1.5], 2, [True], [5, 8]],
    "top_k_per_layer": [[], [0], "2", [1.5], 2, [5]],
    "router_bias_update_rate": [-0.1, NAN, INF, "0.1", True],
    "router_granularity": ["tokens", "", 3, True],
    "router_pool": ["max", "", 3, True],
    "router_window": NOT_POSITIVE,
    "router_input_norm": NOT_BOOL,
    "router_temperature": NOT_POSITIVE,
    "router_init_std": [-0.1, NAN, INF, "0.02", True, HUGE],
    "scoring_func": ["elu", "", 3, True],
    "top_k": [*NOT_COUNT, 5, 1000],
    "norm_topk_prob": NOT_BOOL,
    "straight_through": NOT_BOOL,
    "null_expert": NOT_BOOL,
    "router_aux_loss_coef": NOT_OPTIONAL_COEF,
    "router_z_loss_coef": NOT_COEF,
    "router_entropy_coef": [NAN, INF, "0.1", True, None],
    "router_label_loss_coef": NOT_COEF,
    "router_lbc_coef": NOT_COEF,
    "router_lbc_delta": [0, 1, -0.1, NAN, "0.5", True, None],
    "router_l1_coef": NOT_OPTIONAL_COEF,
    "loss_coefs": [{"nope": 0.1}, {"router_z_loss_coef": 0.1}, {"mine": NAN}, {1: 0.1}, "mine", 1, None],
    "router_l1_target": [0, 1, -0.1, NAN, "0.5", True],
    "expert_orthogonality_coef": NOT_COEF,
    "distillation_coef": NOT_COEF,
    "distillation_temperature": [*NOT_POSITIVE, None],
    "distillation_adaptive": [*NOT_BOOL, None],
    "allow_base_mismatch": [*NOT_BOOL, None],
    "verify_experts": [*NOT_BOOL, None],
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
            "agree",
            "is enough",
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
    "sequence without hidden states": (
        {"router": "hash", "router_granularity": "sequence"},
        ["router_granularity='sequence'", "no effect", "router='hash'"],
    ),
    "top_k of hash": ({"router": "hash", "top_k": 2}, ["top_k=2", "no effect", "router='hash'"]),
    "top_k of oracle": ({"router": "oracle", "top_k": 1}, ["top_k=1", "no effect", "router='oracle'"]),
    "temperature of hash": (
        {"router": "hash", "router_temperature": 0.5},
        ["router_temperature=0.5", "no effect", "one expert by itself"],
    ),
    "temperature of equal scores": (
        {"router": "uniform", "router_temperature": 0.5},
        ["router_temperature=0.5", "no effect", "router='uniform'"],
    ),
    "hidden layer of linear": (
        {"router_hidden_size": 8},
        ["router_hidden_size=8", "no effect", "router='mlp'"],
    ),
    "expert choice per prompt": (
        {
            "topk_method": "expert_choice",
            "top_k": 1,
            "norm_topk_prob": False,
            "router_granularity": "sequence",
        },
        ["topk_method='expert_choice'", "no effect", "router_granularity='token'"],
    ),
    "static with a norm": (
        {"router": "static", "router_input_norm": True},
        ["router_input_norm=True", "no effect", "do not depend on the input"],
    ),
    "prompt below the tap per prompt": (
        {"router_scope": "model", "router_granularity": "sequence", "router_below_tap": "prompt"},
        ["router_below_tap='prompt'", "no effect", "'probe'"],
    ),
    "raw scores normalised": (
        {"scoring_func": "none"},
        ["scoring_func='none'", "norm_topk_prob=False"],
    ),
    "relu normalised": (
        {"scoring_func": "relu"},
        ["scoring_func='relu'", "norm_topk_prob=False"],
    ),
    "top_p alone": ({"top_p": 0.5}, ["top_p=0.5", "topk_method='top_p'"]),
    "top_p without mass": ({"topk_method": "top_p"}, ["top_p=None", "belong together"]),
    "top_p of sigmoids": (
        {"topk_method": "top_p", "top_p": 0.5, "scoring_func": "sigmoid"},
        ["top_p", "scoring_func='sigmoid'", "'softmax'"],
    ),
    "top_p and top_k": (
        {"topk_method": "top_p", "top_p": 0.5, "top_k": 2},
        ["top_k=2", "no effect", "leave it out"],
    ),
    "expert choice of nothing": ({"topk_method": "expert_choice"}, ["expert_choice", "top_k"]),
    "expert choice of a causal model": (
        {"topk_method": "expert_choice", "top_k": 1, "norm_topk_prob": False, "task_type": "CAUSAL_LM"},
        ["expert_choice", "future", "greedy"],
    ),
    "balancing bias of dense gates": (
        {"router_bias_update_rate": 0.001},
        ["router_bias_update_rate=0.001", "no effect", "top_k"],
    ),
    "all experts shared": (
        {"experts": 2, "shared_experts": ["expert_0", "expert_1"]},
        ["shared_experts", "no expert to route"],
    ),
    "misspelt shared expert": ({"shared_experts": ["expert_7"]}, ["'expert_7' is no expert", "expert_"]),
    "depth of one decision": (
        {"top_k_per_layer": [1, 2], "router_scope": "model"},
        ["top_k_per_layer=[1, 2]", "router_scope='module'"],
    ),
    "counts of adapters": (
        {"experts": {"a": "x", "b": "y"}, "experts_per_layer": [1, 2]},
        ["experts_per_layer=[1, 2]", "fresh experts"],
    ),
    "counts that lack experts": ({"experts_per_layer": [1, 2]}, ["maximum of 2", "experts=4"]),
    "counts and shared": (
        {"experts_per_layer": [2, 4], "shared_experts": ["expert_0"]},
        ["experts_per_layer", "shared_experts"],
    ),
    "two kinds of top_k": ({"top_k": 2, "top_k_per_layer": [1, 2]}, ["top_k=2", "leave one out"]),
    "l1 of softmax": ({"router_l1_coef": 0.1}, ["router_l1_coef=0.1", "no effect", "'relu'"]),
    "target without l1": ({"router_l1_target": 0.5}, ["router_l1_target=0.5", "router_l1_coef"]),
    "delta without lbc": ({"router_lbc_delta": 0.5}, ["router_lbc_delta=0.5", "router_lbc_coef"]),
    "temperature without distillation": (
        {"distillation_temperature": 2.0},
        ["distillation_temperature=2.0", "distillation_coef"],
    ),
    "orthogonality of frozen experts": (
        {"experts": {"a": "x", "b": "y"}, "expert_orthogonality_coef": 0.1},
        ["expert_orthogonality_coef=0.1", "frozen"],
    ),
    "entropy of a fixed router": (
        {"router": "random", "router_entropy_coef": -0.1},
        ["router_entropy_coef=-0.1", "not train"],
    ),
    "tap per module": ({"router_tap": 0}, ["router_tap=0", "no effect", "router_scope='model'"]),
    "below_tap per module": ({"router_below_tap": "base"}, ["router_below_tap='base'", "no effect"]),
    "pool per token": ({"router_pool": "last"}, ["router_pool='last'", "no effect", "'sequence'"]),
    "window per token": ({"router_window": 4}, ["router_window=4", "no effect", "'running'"]),
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
    "constant top-1 of a layer": (
        {"top_k_per_layer": [1, 2]},
        ["top_k_per_layer=[1, 2]", "no gradient", "straight_through=True"],
    ),
    "balancing layers of k = E": (
        {"top_k_per_layer": [4, 4], "router_aux_loss_coef": 0.1},
        ["router_aux_loss_coef=0.1", "no effect"],
    ),
    "uniform with top_k per layer": (
        {"router": "uniform", "top_k_per_layer": [2, 2]},
        ["top_k_per_layer=[2, 2]", "no effect"],
    ),
    "top_p and top_k per layer": (
        {"topk_method": "top_p", "top_p": 0.5, "top_k_per_layer": [2, 2]},
        ["top_k_per_layer=[2, 2]", "no effect"],
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


@pytest.mark.parametrize("text", ["{", "", "[1, 2]", "3", "nonsense"])
def test_a_file_that_is_no_json_object_is_refused_by_name(text, tmp_path):
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(PeftMoeError, match=r"adapter_config\.json .*copy the folder again"):
        MoLoraConfig.from_pretrained(str(tmp_path))


@pytest.mark.parametrize("case", REFUSED)
def test_refused_combination(case):
    fields, words = REFUSED[case]
    with pytest.raises(PeftMoeError) as caught:
        MoLoraConfig(**fields)
    assert [word for word in words if word not in str(caught.value)] == []
