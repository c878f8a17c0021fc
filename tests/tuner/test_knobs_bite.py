"""Every field of ``MoLoraConfig`` does something: change it, and something that can be measured changes.

One row per field. The table is compared with the dataclass, so that a field without a row fails.
"""

from __future__ import annotations

import copy
import dataclasses
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftConfig, get_peft_model
from support.training import make_trainer
from torch import Tensor, nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from peft_moe import MoLoraConfig, PeftMoeError, record_routing, routing_inputs
from peft_moe.routers.losses import LOSSES, auxiliary_losses, loss_options
from peft_moe.tuner.layers.linear import MoLoraLayer

SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}
torch.manual_seed(0)
BASE = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
BERT = BertModel(
    BertConfig(**{k: v for k, v in SIZES.items() if k != "num_key_value_heads"}), add_pooling_layer=False
).eval()
IDS = torch.arange(1, 13).view(2, 6)
PROMPT = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0]]).bool()
FIXED = {"experts": 3, "target_modules": ["q_proj", "up_proj"], "init_weights": False, "router_init_std": 1.0}
SHARED = {"router_scope": "model", "router_granularity": "sequence", "router_tap": 2}
TOP_1 = {"top_k": 1, "norm_topk_prob": False}
RELU = {"scoring_func": "relu", "norm_topk_prob": False}


def mixture(**fields: Any) -> nn.Module:
    """A mixture of drawn experts; routers that are drawn, too, so that they decide by the token."""
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(copy.deepcopy(BASE), MoLoraConfig(**{**FIXED, **fields})).eval()


def logits(**fields: Any) -> Tensor:
    model = mixture(**fields)
    with routing_inputs(prompt_mask=PROMPT), torch.no_grad():
        return model(input_ids=IDS).logits


def encoded(**fields: Any) -> Tensor:
    """Outputs of an encoder, where a token may look at later ones."""
    torch.manual_seed(1)
    config = MoLoraConfig(**{**FIXED, "target_modules": ["query"], **fields})
    with torch.no_grad():
        return get_peft_model(copy.deepcopy(BERT), config).eval()(input_ids=IDS).last_hidden_state


def adapted(**fields: Any) -> list[str]:
    """Names of the adapted layers: for fields that say where."""
    return sorted(n for n, m in mixture(**fields).named_modules() if isinstance(m, MoLoraLayer))


def trained(**fields: Any) -> list[str]:
    """Names of what trains."""
    return sorted(n for n, p in mixture(**fields).named_parameters() if p.requires_grad)


def trained_of_bert(**fields: Any) -> list[str]:
    """The same of a base with biases."""
    model = get_peft_model(copy.deepcopy(BERT), MoLoraConfig(**{**FIXED, **fields}))
    return sorted(n for n, p in model.named_parameters() if p.requires_grad)


def forms(**fields: Any) -> set[str]:
    """What computed the layers: for the field that changes speed and memory only."""
    model = mixture(**fields)
    with torch.no_grad():
        model(input_ids=IDS)
    maps = [m.mixtures["default"].rank_map for m in model.modules() if isinstance(m, MoLoraLayer)]
    return {choice.backend.name for ranks in maps for choice in ranks.choices.values()}


def backward(**fields: Any) -> Tensor:
    """Gradient of the router's first weight: for fields that leave the output as it is."""
    model = mixture(**fields)
    model(input_ids=IDS, labels=IDS).loss.backward()
    return next(p.grad for n, p in model.named_parameters() if "scorer.weight" in n)


def total_loss(**fields: Any) -> Tensor:
    """The weighted sum that a trainer adds, from the config's coefficients."""
    model = mixture(**fields)
    config = model.peft_config["default"]
    with record_routing() as record, routing_inputs(domains=torch.tensor([0, 1])):
        model(input_ids=IDS)
    values = auxiliary_losses(record, list(LOSSES), options=loss_options(config))
    return torch.stack([getattr(config, name) * value for name, value in values.items()]).sum()


def after_steps(**fields: Any) -> Tensor:
    """What trains, and the balancing biases, after three steps of a real trainer."""
    ids = torch.arange(1, 25).view(4, 6).tolist()
    rows = [{"input_ids": row, "labels": row, "domain": f"expert_{i % 3}"} for i, row in enumerate(ids)]
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = mixture(**fields)
        make_trainer("plain", model, Dataset.from_list(rows), Path(folder), max_steps=3).train()
    biases = [buffer for name, buffer in model.named_buffers() if "balance_bias" in name]
    return torch.cat([v.detach().flatten() for v in [*_trainable(model), *biases]])


def _trainable(model: nn.Module) -> list[Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


# Field -> (measure, fields that both sides share, one value, another value).
Row = tuple[Callable[..., Any], dict[str, Any], Any, Any]
BITES: dict[str, Row] = {
    "experts": (logits, {}, 3, 4),
    "target_modules": (adapted, {}, ["q_proj"], ["v_proj"]),
    "exclude_modules": (adapted, {}, None, ["up_proj"]),
    "layers_to_transform": (adapted, {}, None, [1]),
    "layers_pattern": (adapted, {"layers_to_transform": [1]}, "layers", "blocks"),
    "modules_to_save": (trained, {}, None, ["lm_head"]),
    "trainable_token_indices": (trained, {}, None, [1, 2]),
    "bias": (trained_of_bert, {"target_modules": ["query"]}, "none", "molora_only"),
    "r": (logits, {}, 2, 4),
    "lora_alpha": (logits, {}, 8, 16),
    "use_rslora": (logits, {}, False, True),
    "init_weights": (logits, {}, False, True),
    "train_experts": (trained, {}, True, False),
    "mixing": (logits, {}, "linear", "block"),
    "router": (logits, {}, "linear", "random"),
    "router_scope": (logits, {}, "module", "block"),
    "router_tap": (logits, SHARED, 1, 2),
    "router_below_tap": (logits, SHARED, "probe", "base"),
    "router_granularity": (logits, SHARED, "token", "sequence"),
    "router_pool": (logits, SHARED, "mean", "last"),
    "router_window": (logits, {**SHARED, "router_granularity": "running"}, 12.0, 1.0),
    "router_input_norm": (logits, {}, False, True),
    "router_temperature": (logits, {}, 1.0, 0.3),
    "router_init_std": (logits, {}, 0.0, 1.0),
    "scoring_func": (logits, {}, "softmax", "sigmoid"),
    "top_k": (logits, {}, None, 2),
    "norm_topk_prob": (logits, {"top_k": 2}, True, False),
    "straight_through": (backward, TOP_1, False, True),
    "null_expert": (logits, {}, False, True),
    "router_hidden_size": (logits, {"router": "mlp"}, 4, 5),
    "topk_method": (encoded, {"top_k": 2}, "greedy", "expert_choice"),
    "top_p": (logits, {"topk_method": "top_p"}, 0.3, 0.9),
    "routed_scaling_factor": (logits, {}, 1.0, 2.0),
    "shared_experts": (logits, {}, [], ["expert_1"]),
    "experts_per_layer": (logits, {}, None, [1, 3]),
    "top_k_per_layer": (logits, {"norm_topk_prob": False}, [2, 2], [1, 2]),
    "backend": (forms, {"top_k": 2}, "stacked", "grouped"),
    "router_aux_loss_coef": (total_loss, TOP_1, 0.01, 0.1),
    "router_z_loss_coef": (total_loss, {}, 0.01, 0.1),
    "router_label_loss_coef": (total_loss, {}, 0.01, 0.1),
    # Losses, balancing and distillation.
    "router_entropy_coef": (total_loss, {}, -0.1, 0.1),
    "router_lbc_coef": (total_loss, {}, 0.01, 0.1),
    "router_lbc_delta": (total_loss, {"router_lbc_coef": 1.0}, 0.1, 0.5),
    "router_l1_coef": (total_loss, RELU, 0.01, 0.1),
    "router_l1_target": (after_steps, {**RELU, "router_l1_coef": 0.1}, None, 0.9),
    "router_bias_update_rate": (after_steps, TOP_1, 0.01, 0.1),
    "expert_orthogonality_coef": (after_steps, {}, 0.0, 1.0),
    "distillation_coef": (after_steps, {}, 0.0, 1.0),
    "distillation_temperature": (after_steps, {"distillation_coef": 1.0}, 1.0, 3.0),
    "distillation_adaptive": (after_steps, {"distillation_coef": 1.0}, False, True),
}
# Fields with a test of their own below: they refuse or warn, instead of changing a number.
REFUSALS = {
    "format_version",
    "loss_coefs",  # in tests/training/test_register_loss.py, which registers a loss
    "allow_base_mismatch",
    "base_precision",
    "base_fingerprint",
    "verify_experts",
    "weights_digest",  # in tests/tuner/test_load_checks.py, as the one before
}
OURS = {f.name for f in dataclasses.fields(MoLoraConfig) if f.init} - {
    f.name for f in dataclasses.fields(PeftConfig)
}


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return one.shape == other.shape and torch.allclose(one, other, atol=1e-6, rtol=1e-4)
    return one == other


def measured(row: Row, name: str, value: Any) -> Any:
    measure, shared, _, _ = row
    try:
        return measure(**{**shared, name: value})
    except ValueError as error:
        if name == "layers_pattern":  # one that matches nothing: PEFT refuses
            return type(error)
        raise  # elsewhere a refusal would look like a bite


def test_every_field_has_a_row():
    assert set(BITES) | REFUSALS == OURS


@pytest.mark.parametrize("name", BITES)
def test_bites(name):
    row = BITES[name]
    one, other = (measured(row, name, value) for value in row[2:])
    assert not same(one, other)


@pytest.mark.parametrize(
    "measure", sorted({row[0] for row in BITES.values()}, key=lambda m: m.__name__), ids=lambda m: m.__name__
)
def test_measures_are_steady(measure):
    name, row = next((name, row) for name, row in BITES.items() if row[0] is measure)
    assert same(measured(row, name, row[2]), measured(row, name, row[2]))


@pytest.mark.parametrize(("name", "value"), [("format_version", 99)])
def test_refuses(name, value):
    with pytest.raises(PeftMoeError, match=name):
        MoLoraConfig(**{name: value})


def test_allow_base_mismatch_bites(tmp_path):
    base = copy.deepcopy(BASE)
    get_peft_model(copy.deepcopy(BASE), LoraConfig(target_modules=["q_proj"], r=2)).save_pretrained(tmp_path)
    config = tmp_path / "adapter_config.json"
    config.write_text(
        config.read_text().replace('"base_model_name_or_path": ""', '"base_model_name_or_path": "x/y"')
    )
    config.write_text(
        config.read_text().replace('"base_model_name_or_path": null', '"base_model_name_or_path": "x/y"')
    )
    base.name_or_path = base.config._name_or_path = "other/base"
    experts = {"math": str(tmp_path)}
    with pytest.raises(PeftMoeError, match="allow_base_mismatch"):
        get_peft_model(copy.deepcopy(base), MoLoraConfig(experts=experts, null_expert=True))
    get_peft_model(base, MoLoraConfig(experts=experts, null_expert=True, allow_base_mismatch=True))


def test_base_precision_bites():
    with pytest.warns(UserWarning, match=r"'bitsandbytes nf4', and this base has 'full'"):
        get_peft_model(copy.deepcopy(BASE), MoLoraConfig(experts=2, base_precision="bitsandbytes nf4"))


def test_base_fingerprint_bites():
    with pytest.raises(PeftMoeError, match=r"base_fingerprint\.num_hidden_layers is 99, and this base has 4"):
        get_peft_model(
            copy.deepcopy(BASE), MoLoraConfig(experts=2, base_fingerprint={"num_hidden_layers": 99})
        )
