"""``MoLoraConfig``: what is accepted or warned of, how presets fill it, what a file of it holds."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import warnings

import pytest
from peft import PeftConfig

from peft_moe import MoLoraConfig, PeftMoeError
from peft_moe.routers import PRESETS, RECOMMENDED
from peft_moe.tuner.config.fields import FORMAT_VERSION

OURS = {f.name for f in dataclasses.fields(MoLoraConfig)}


WARNED = {
    "ties": ({"top_k": 2, "router_init_std": 0.0}, "router_init_std=0 with top_k=2"),
    "ties of a fixed router": (
        {"router": "random", "router_init_std": 0.0},
        "router_init_std=0 with top_k=2",
    ),
    "ties of a layer": (
        {"top_k_per_layer": [4, 2], "router_init_std": 0.0},
        r"router_init_std=0 with top_k_per_layer=\[4, 2\]",
    ),
    "one expert": ({"experts": 1}, "one expert and no null expert"),
    "frozen zeros": ({"train_experts": False}, "the mixture stays the base"),
}


@pytest.mark.parametrize("case", WARNED)
def test_warned_combination(case):
    fields, words = WARNED[case]
    with pytest.warns(UserWarning, match=words):
        MoLoraConfig(**fields)


ACCEPTED = {
    "default": {},
    "uniform": {"router": "uniform"},
    "uniform and null": {"router": "uniform", "null_expert": True},
    "random": {"router": "random"},
    "random of one": {"router": "random", "experts": 1},
    "context": {"router": "context"},
    "context of one": {"router": "context", "experts": 1},
    "context, overridden": {
        "router": "context",
        "null_expert": False,
        "router_pool": "last",
        "router_tap": 1,
    },
    "switch": {"top_k": 1, "norm_topk_prob": False, "router_aux_loss_coef": 0.01},
    "mixtral": {"top_k": 2, "router_aux_loss_coef": 0.01, "router_z_loss_coef": 0.001},
    "top-1 by label": {"top_k": 1, "router_label_loss_coef": 1.0},
    "straight-through": {"top_k": 1, "straight_through": True},
    "k = E": {"top_k": 4},
    "balanced layers": {"top_k_per_layer": [2, 4], "router_aux_loss_coef": 0.01},
    "biased layers": {"top_k_per_layer": [2, 4], "router_bias_update_rate": 0.001},
    "hard layers": {"top_k_per_layer": [1, 2], "straight_through": True},
    "sigmoid": {"scoring_func": "sigmoid", "norm_topk_prob": False},
    "tapped": {"router_scope": "model", "router_tap": "model.layers.2", "router_below_tap": "base"},
    "names": {"experts": {"math": "a/b", "code": "c/d@main"}},
    "list": {"experts": ["a/math", "org/code@main", "c/law/"]},
    "all-linear layers": {"target_modules": "all-linear", "layers_to_transform": [0]},
    "records": {"experts": [{"name": "a", "source": "x", "r": 4}, {"name": "b", "r": 2}]},
    "frozen but drawn": {"train_experts": False, "init_weights": False},
    "tokens": {"trainable_token_indices": {"embed_tokens": [1, 2]}},
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_accepted_without_a_warning_and_back_from_json(case, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = MoLoraConfig(**ACCEPTED[case])
        again = MoLoraConfig(**json.loads(json.dumps(config.to_dict())))
    assert again == config
    config.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, MoLoraConfig)
    assert loaded.to_dict() == config.to_dict()


def test_names_of_experts():
    assert MoLoraConfig(**ACCEPTED["list"]).expert_names == ["math", "code", "law"]
    assert MoLoraConfig(**ACCEPTED["names"]).expert_names == ["math", "code"]
    assert MoLoraConfig(**ACCEPTED["records"]).expert_names == ["a", "b"]
    assert MoLoraConfig(experts=["org/math@refs/pr/1", "/data/law@2/"]).expert_names == ["math", "law"]
    assert MoLoraConfig(experts=2).expert_names == ["expert_0", "expert_1"]


def test_specs_need_read_experts():
    with pytest.raises(PeftMoeError, match="inject"):
        MoLoraConfig(**ACCEPTED["names"]).specs()
    assert [spec.r for spec in MoLoraConfig(**ACCEPTED["records"]).specs()] == [4, 2]


def test_who_trains():
    assert MoLoraConfig().experts_train
    assert not MoLoraConfig(**ACCEPTED["names"]).experts_train
    assert not MoLoraConfig(**ACCEPTED["records"]).experts_train
    assert MoLoraConfig(experts=[{"name": "fresh"}, {"name": "too"}]).experts_train
    assert MoLoraConfig(experts={"a": "x", "b": "y"}, train_experts=True).experts_train


@pytest.mark.parametrize("name", PRESETS)
def test_preset_fills_what_is_open_and_nothing_else(name):
    config = MoLoraConfig(router=name)
    for field, value in PRESETS[name].fields.items():
        if field not in ("scorer", "experts_per_layer"):
            assert getattr(config, field) == value
    assert config.router_settings().scorer == PRESETS[name].fields["scorer"]
    if name not in ("uniform", "hash", "oracle"):  # which refuse it: it would have no effect
        assert MoLoraConfig(router=name, router_temperature=0.5).router_temperature == 0.5


@pytest.mark.parametrize("experts", [1, 2, 3])
@pytest.mark.parametrize("name", PRESETS)
def test_presets_serve_any_number_of_experts(name, experts):
    """What a preset brings along for sparse gates is no error where so few experts are all chosen."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = MoLoraConfig(router=name, experts=experts)
    settings = config.router_settings()
    for field in ("straight_through", "router_bias_update_rate", "router_aux_loss_coef"):
        assert not getattr(config, field) or settings.is_sparse
    with pytest.raises(PeftMoeError, match=r"router_bias_update_rate=0\.1 has no effect"):
        MoLoraConfig(router="deepseek_v3", experts=2, router_bias_update_rate=0.1)


def test_auto_is_the_recommended_preset_by_its_own_name():
    auto, named = MoLoraConfig(router="auto"), MoLoraConfig(router=RECOMMENDED)
    assert auto.to_dict() == named.to_dict()
    assert auto.router == RECOMMENDED in PRESETS


def test_no_routing_field_stays_open():
    for fields in ACCEPTED.values():
        config = MoLoraConfig(**fields)
        opened = {f for f in OURS if f.startswith(("router_", "scoring", "norm", "straight", "null", "topk"))}
        assert [f for f in opened - {"router_tap", "router_l1_target"} if getattr(config, f) is None] == []


def test_scores_are_drawn_only_where_ties_would_starve():
    assert MoLoraConfig().router_init_std == 0
    assert MoLoraConfig(top_k=2).router_init_std == 0.02
    assert MoLoraConfig(top_k=4).router_init_std == 0
    assert MoLoraConfig(top_k_per_layer=[4, 2]).router_init_std == 0.02
    assert MoLoraConfig(top_k_per_layer=[4, 4]).router_init_std == 0
    assert MoLoraConfig(top_k=1, straight_through=True).router_init_std == 0
    assert MoLoraConfig(router="uniform").router_init_std == 0


def test_a_refused_format_says_what_to_do():
    with pytest.raises(PeftMoeError, match=rf"format_version={FORMAT_VERSION + 1}.*upgrade"):
        MoLoraConfig(format_version=FORMAT_VERSION + 1)


def test_a_field_of_the_future_is_left_out_with_a_warning(tmp_path):
    """PEFT's contract; a field that matters comes with a newer format, which is refused."""
    MoLoraConfig().save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    written = json.loads(file.read_text()) | {"router_magic": 3}
    file.write_text(json.dumps(written))
    with pytest.warns(UserWarning, match="router_magic"):
        assert MoLoraConfig.from_pretrained(tmp_path) == MoLoraConfig()
    file.write_text(json.dumps(written | {"format_version": FORMAT_VERSION + 1}))
    with pytest.warns(match="router_magic"), pytest.raises(PeftMoeError, match=r"format_version.*upgrade"):
        MoLoraConfig.from_pretrained(tmp_path)


def test_bytes_do_not_depend_on_hashing(tmp_path):
    script = (
        "import sys, peft_moe\n"
        "names = ['q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj']\n"
        "c = peft_moe.MoLoraConfig(target_modules=names, exclude_modules=names[::-1], experts=3)\n"
        "c.save_pretrained(sys.argv[1])\n"
        "print(list(c.target_modules))\n"
    )
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path / seed)],
            env={**os.environ, "PYTHONHASHSEED": seed},
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in ("1", "2")
    ]
    orders = {run.communicate(timeout=120)[0] for run in runs}
    assert [run.returncode for run in runs] == [0, 0]
    assert len(orders) == 2  # hashing did differ
    files = {(tmp_path / seed / "adapter_config.json").read_bytes() for seed in ("1", "2")}
    assert len(files) == 1
