"""Section A: an adapter that cannot be an expert, or a base that is not its own, through ``get_peft_model``.

The rows of single files are in tests/experts/test_bad_inputs.py, against the reader alone. Here the whole
way is gone. Every field of PEFT's ``LoraConfig`` has a case: a new one fails until somebody decides about it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from support.bases import _DECODER, make_base
from support.batches import logits_of
from support.zoo import Zoo
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from faults.harness import (
    BATCH,
    CONFIG,
    Bench,
    Row,
    check_refused,
    edit,
    load,
    load_safely,
    load_second,
    mix,
    parametrized,
)
from peft_moe import MoLoraConfig, load_mixture
from peft_moe.experts.config_rules import FIELD_RULES

# What a field of an adapter's config holds that cannot be read; refused ones are switched on.
BAD: dict[str, Any] = {
    "peft_type": "LOHA",
    "auto_mapping": "Llama",
    "base_model_name_or_path": 3,
    "revision": 3,
    "r": "8",
    "target_modules": 3,
    "exclude_modules": "*",
    "lora_alpha": -4,
    "use_rslora": "yes",
    "init_lora_weights": "pissa",
    "layers_to_transform": [-1],
    "layers_pattern": 3,
    "rank_pattern": {"q_proj": 0},
    "alpha_pattern": {"(": 4},
    "bias": "all",
    "modules_to_save": ["lm_head"],
}
FIELDS = [field.name for field in dataclasses.fields(LoraConfig)]
ON = {"switched": "on"}


def set_field(name: str, value: Any) -> Callable[[Bench], object]:
    return lambda bench: edit(bench.adapter, **{name: value})


def rule(name: str) -> Any:
    return FIELD_RULES.get(name) or pytest.fail(
        f"PEFT's LoraConfig has a new field {name!r}: decide about it"
    )


FIELD_ROWS = [
    Row("A15", f"LoraConfig.{name}", set_field(name, BAD.get(name, ON)), ("first", f"{name}="), mix)
    for name in FIELDS
    if name not in FIELD_RULES or FIELD_RULES[name].use != "ignored"
]


@parametrized(FIELD_ROWS)
def test_a_field_of_the_adapter(row: Row, zoo: Zoo, tmp_path: Path) -> None:
    rule(row.case.partition(".")[2])
    assert "\nFix: " in check_refused(row, Bench(zoo, tmp_path))


@pytest.mark.parametrize("name", [n for n in FIELDS if n in FIELD_RULES and FIELD_RULES[n].use == "ignored"])
def test_a_field_that_cannot_matter_does_not(name: str, zoo: Zoo, tmp_path: Path) -> None:
    plain, other = Bench(zoo, tmp_path / "one"), Bench(zoo, tmp_path / "two")
    set_field(name, ON)(other)
    outputs = []
    for bench in (plain, other):
        torch.manual_seed(0)
        bench.fields = {"router_init_std": 0.5}
        outputs.append(logits_of(mix(bench).eval(), BATCH))
    assert torch.equal(*outputs)


# -- the base of a saved mixture ---------------------------------------------------------------------


def another(**sizes: Any) -> Callable[[Bench], None]:
    """A base of another size, whose first layers have the same names and shapes."""

    def spoil(bench: Bench) -> None:
        bench.base = LlamaForCausalLM(LlamaConfig(**{**_DECODER, **sizes})).eval()

    return spoil


def other_numbers(bench: Bench) -> None:
    bench.base = make_base("llama", seed=5)


def one_layer_tuned(bench: Bench) -> None:
    """A fine-tuned copy: one matrix has moved by a hundredth."""
    with torch.no_grad():
        bench.base.model.layers[2].self_attn.v_proj.weight.mul_(1.01)


def mistral(bench: Bench) -> None:
    """Another architecture with the same names, shapes and even numbers."""
    base = MistralForCausalLM(MistralConfig(**_DECODER, sliding_window=None)).eval()
    base.load_state_dict(bench.base.state_dict())
    bench.base = base


def more_tokens(rows: int) -> Callable[[Bench], None]:
    return lambda bench: bench.base.resize_token_embeddings(rows)


def made_on_more_tokens(bench: Bench) -> None:
    """A mixture that was made after tokens were added, and the base without them."""
    edit(bench.mixture, base_fingerprint=bench_fingerprint(bench) | {"vocabulary": 56})


def bench_fingerprint(bench: Bench) -> dict[str, Any]:
    return json.loads((bench.mixture / CONFIG).read_text())["base_fingerprint"]


OTHER_BASES: dict[str, tuple[str, Callable[[Bench], object], tuple[str, ...]]] = {
    "deeper": ("A1", another(num_hidden_layers=5), ("num_hidden_layers is 3", "has 5")),
    "shallower": ("A1", another(num_hidden_layers=2), ("num_hidden_layers is 3", "has 2")),
    "other numbers": ("A1", other_numbers, ("down_proj.weight", "-0.19")),
    "one matrix tuned": ("A1", one_layer_tuned, ("layers.2.self_attn.v_proj.weight",)),
    "wider": ("A2", another(hidden_size=128), ("hidden_size is 64", "has 128")),
    "mistral": ("A3", mistral, ("model_type is 'llama'", "'mistral'")),
    "gpt2": ("A4", lambda b: setattr(b, "base", make_base("gpt2")), ("'llama'", "'gpt2'")),
    "gemma3": ("A3", lambda b: setattr(b, "base", make_base("gemma3")), ("'llama'", "'gemma3_text'")),
    "tokens added": ("A19", more_tokens(56), ("vocabulary is 48", "has 56", "resize_token_embeddings(48)")),
    "tokens lost": ("A19", made_on_more_tokens, ("vocabulary is 56", "resize_token_embeddings(56)")),
}
BASE_ROWS = [
    Row(fault, f"{name} ({act.__name__})", spoil, (*words, "allow_base_mismatch=True"), act)
    for name, (fault, spoil, words) in OTHER_BASES.items()
    for act in (load, load_safely)
] + [
    Row(
        "A1",
        "other numbers, beside a live mixture",
        lambda b: tuned_live(b),
        ("made on another base",),
        load_second,
    )
]


def tuned_live(bench: Bench) -> None:
    """The base of a live mixture is not that of the saved one."""
    one_layer_tuned(bench)
    assert isinstance(bench.live, PeftModel)


@parametrized(BASE_ROWS)
def test_another_base(row: Row, zoo: Zoo, tmp_path: Path) -> None:
    check_refused(row, Bench(zoo, tmp_path))


def test_another_base_is_accepted_where_it_is_meant(zoo: Zoo, tmp_path: Path) -> None:
    bench = Bench(zoo, tmp_path)
    other_numbers(bench)
    load_mixture(bench.base, bench.mixture, allow_base_mismatch=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_dtype_of_the_base_is_free(dtype: torch.dtype, zoo: Zoo, tmp_path: Path) -> None:
    bench = Bench(zoo, tmp_path)
    bench.base.to(dtype)
    load(bench)
    # And the other way: made on a rounded base, loaded on the whole one.
    rounded = get_mixture(zoo, zoo.base("llama").to(dtype))
    rounded.save_pretrained(str(tmp_path / "rounded"))
    PeftModel.from_pretrained(zoo.base("llama"), str(tmp_path / "rounded"))


def get_mixture(zoo: Zoo, base: nn.Module) -> PeftModel:
    from peft import get_peft_model

    return get_peft_model(base, MoLoraConfig(experts=zoo.experts("llama")))


def test_what_a_load_draws_anew_is_no_part_of_a_base(zoo: Zoo, tmp_path: Path) -> None:
    """Heads and embeddings that a task brings are new numbers at every load of the base."""
    bench = Bench(zoo, tmp_path)
    with torch.no_grad():
        bench.base.lm_head.weight.normal_()
        bench.base.model.embed_tokens.weight[3:].normal_()
    load(bench)


def test_a_mixture_of_before_has_no_fingerprint_and_loads(zoo: Zoo, tmp_path: Path) -> None:
    bench = Bench(zoo, tmp_path)
    edit(bench.mixture, base_fingerprint=None)
    other_numbers(bench)
    assert load(bench).peft_config["default"].base_fingerprint is not None


def test_made_on_a_packed_base_and_loaded_on_the_whole_one(zoo: Zoo, four_bit: Any, tmp_path: Path) -> None:
    """What 4-bit rounding changes is no other base; PEFT's adapters may cross as well."""
    model = get_mixture(zoo, four_bit())
    model.save_pretrained(str(tmp_path))
    with pytest.warns(UserWarning, match="made on a base with weights in 'bitsandbytes nf4'"):
        PeftModel.from_pretrained(zoo.base("llama"), str(tmp_path))
