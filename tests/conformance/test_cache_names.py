"""A call's cache is found under every name; one that routers cannot read is refused, never taken for none."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from support.batches import texts
from support.zoo import Zoo
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    EncoderDecoderCache,
    LlamaForCausalLM,
    RwkvConfig,
    StaticCache,
    xLSTMConfig,
)

from peft_moe import MoLoraConfig, PeftMoeError
from peft_moe.routing.model_call import CACHES, cache_of, carries_past, past_length, returned_cache

FP32 = {"atol": 2e-5, "rtol": 1e-5}
LENGTH = 7
# What this version calls it, and what its bases take it as; others they let pass, and read no cache then.
NAME = next(name for name in CACHES if name in inspect.signature(LlamaForCausalLM.forward).parameters)
TAKEN = ["past_key_values", "cache"] if NAME == "cache" else [NAME]
# They go wrong in silence where the past is not seen: a decision per prompt, one that follows the text.
LASTING = ["prompt-base", "running-base", "running-block", "token-probe"]


def filled(length: int = LENGTH) -> DynamicCache:
    cache = DynamicCache()
    cache.update(torch.zeros(1, 1, length, 2), torch.zeros(1, 1, length, 2), 0)
    return cache


class Renamed(LlamaForCausalLM):
    """A base that calls its cache by a name that nobody has heard of."""

    def forward(self, input_ids: Tensor, memo: Any = None, **others: Any) -> Any:
        return super().forward(input_ids, **{**others, "use_cache": True, NAME: memo})


@pytest.mark.parametrize("name", [*CACHES, "memo"])
def test_the_length_is_read_under_every_name(name: str) -> None:
    assert past_length({name: filled()}) == LENGTH
    assert past_length({name: EncoderDecoderCache(filled(), DynamicCache())}) == LENGTH
    assert past_length({name: DynamicCache()}) == 0
    assert past_length({name: None}) == 0
    assert cache_of({"input_ids": torch.ones(1, 1), name: None}) is None


def test_flags_and_other_arguments_are_no_caches() -> None:
    call = {"cache": True, "use_cache": True, "state": torch.ones(2), "encoder_outputs": ([1],)}
    assert [name for name, value in call.items() if carries_past(name, value)] == []
    assert past_length(call) == 0


def test_states_of_single_architectures_count_as_a_past() -> None:
    assert past_length({"state": [torch.ones(1, 2, 3)]}) == 1
    assert past_length({"mems": [torch.ones(4, 1, 2)]}) == 1
    assert past_length({"mems": []}) == 0


@pytest.mark.parametrize("name", CACHES)
@pytest.mark.parametrize(
    "cache",
    [{"slen": 4}, SimpleNamespace(keys=[1]), torch.ones(2), SimpleNamespace(get_seq_length=lambda: None)],
)
def test_what_is_not_understood_is_refused(name: str, cache: Any) -> None:
    with pytest.raises(PeftMoeError, match=rf"^{name}= is a .*{type(cache).__name__}.*pass a Cache of"):
        past_length({name: cache})


def test_two_caches_are_refused_and_one_under_two_names_is_not() -> None:
    one = filled()
    assert past_length({"past_key_values": one, "cache": one}) == LENGTH
    for names in (("past_key_values", "cache"), ("memo", "memory")):
        with pytest.raises(PeftMoeError, match=f"two caches, {names[0]}= .*and {names[1]}="):
            past_length(dict(zip(names, (one, filled(3)), strict=True)))
    # A name that we know says more than one that we do not.
    assert past_length({"memo": filled(3), "cache": one}) == LENGTH


def test_the_returned_cache_is_found_in_a_tuple_too() -> None:
    given, returned = filled(), filled()
    assert returned_cache((torch.ones(1), returned), {"cache": given}) is returned
    assert returned_cache({"logits": torch.ones(1), "cache": returned}, {"cache": given}) is returned
    assert returned_cache((torch.ones(1),), {"cache": given}) is given
    assert returned_cache(torch.ones(1), {}) is None


@pytest.mark.parametrize("routing", LASTING)
@pytest.mark.parametrize("name", TAKEN)
def test_steps_under_each_name_decode_alike(zoo: Zoo, routing: str, name: str) -> None:
    model = zoo.mixture("llama", routing)
    ids, token = torch.stack(texts(lengths=(LENGTH, LENGTH))), torch.tensor([[5], [6]])
    with torch.no_grad():
        cache = DynamicCache()
        model(input_ids=ids, use_cache=True, **{NAME: cache})
        wanted = model(input_ids=token, use_cache=True, **{NAME: cache}).logits
        cache = DynamicCache()
        model(input_ids=ids, use_cache=True, **{name: cache})
        assert past_length({name: cache}) == LENGTH
        got = model(input_ids=token, use_cache=True, **{name: cache}).logits
    torch.testing.assert_close(got, wanted, **FP32)


@pytest.mark.parametrize("routing", ["prompt-base", "running-block"])
def test_a_base_with_another_name_decodes_as_before(zoo: Zoo, routing: str) -> None:
    wanted_of = zoo.mixture("llama", routing)
    base = zoo.base("llama")
    base.__class__ = Renamed
    model = zoo.mixture("llama", routing, base=base)
    ids, token = torch.stack(texts(lengths=(LENGTH, LENGTH))), torch.tensor([[5], [6]])
    caches = DynamicCache(), DynamicCache()
    with torch.no_grad():
        for step in (ids, token):
            wanted = wanted_of(input_ids=step, use_cache=True, **{NAME: caches[0]}).logits
            got = model(input_ids=step, memo=caches[1]).logits
    torch.testing.assert_close(got, wanted, **FP32)


@pytest.mark.parametrize("routing", ["uniform", "top2", "running-base"])
def test_a_legacy_tuple_is_refused_and_the_advice_works(zoo: Zoo, routing: str) -> None:
    model = zoo.mixture("llama", routing)
    ids, token = torch.stack(texts(lengths=(LENGTH, LENGTH))), torch.tensor([[5], [6]])
    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True, **{NAME: DynamicCache()})[NAME]
        keys = [layer for layer in cache.layers if getattr(layer, "keys", None) is not None]
        legacy = tuple((layer.keys.clone(), layer.values.clone()) for layer in keys)
        with pytest.raises(PeftMoeError, match=rf"Pass transformers\.DynamicCache\({NAME}\)"):
            model(input_ids=token, **{NAME: legacy})
        if routing == "running-base":  # a tuple holds no decision, and so neither does what is made of it
            with pytest.raises(PeftMoeError, match="fill the cache with this adapter active"):
                model(input_ids=token, **{NAME: DynamicCache(legacy)})
            return
        got = model(input_ids=token, **{NAME: DynamicCache(legacy)}).logits
        wanted = model(input_ids=token, **{NAME: cache}).logits
    torch.testing.assert_close(got, wanted, **FP32)


def test_a_static_cache_is_read(zoo: Zoo) -> None:
    model = zoo.mixture("llama", "running-base")
    ids = torch.stack(texts(lengths=(LENGTH, LENGTH)))
    cache = StaticCache(config=model.config, max_cache_len=16)
    with torch.no_grad():
        model(input_ids=ids, use_cache=True, **{NAME: cache})
    assert past_length({NAME: cache}) == LENGTH


def recurrent(kind: str, **routing: Any) -> PeftModel:
    """A mixture on an architecture with a cache of its own."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 48, "hidden_size": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    if kind == "rwkv":
        base = AutoModelForCausalLM.from_config(
            RwkvConfig(**sizes, num_hidden_layers=2, attention_hidden_size=128)
        )
        targets = ["key", "value"]
    else:
        base = AutoModelForCausalLM.from_config(xLSTMConfig(**sizes, num_hidden_layers=2, num_heads=2))
        targets = ["q", "v"]
    config = MoLoraConfig(
        experts=3, r=4, init_weights=False, target_modules=targets, task_type="CAUSAL_LM", **routing
    )
    return get_peft_model(base, config).eval()


@pytest.mark.parametrize("kind", ["rwkv", "xlstm"])
def test_an_architectures_own_cache_is_a_past(kind: str) -> None:
    """Routers by the token decode; one that follows the text has no place for its summary, and says so."""
    ids = torch.stack(texts(lengths=(LENGTH, LENGTH)))
    model = recurrent(kind, router="linear")
    output = model.generate(input_ids=ids, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert output.shape == (2, LENGTH + 3)
    with torch.no_grad():
        made = model(input_ids=ids, use_cache=True)
    name = next(n for n in ("state", *CACHES) if made.get(n) is not None)
    assert past_length({name: made[name]}) > 0
    running = recurrent(kind, router="running", router_below_tap="base")
    with pytest.raises(PeftMoeError, match="holds no decision of it"):
        running.generate(input_ids=ids, max_new_tokens=3, min_new_tokens=3, do_sample=False)


def test_a_decision_per_prompt_holds_beside_an_architectures_own_cache() -> None:
    """It has no room for the decision, which a generation then keeps as it does without a cache.

    Not with RWKV: there the bare base's logits with its state are not those without.
    """
    model = recurrent("xlstm", router="linear", router_granularity="sequence", router_scope="block")
    ids = torch.stack(texts(lengths=(LENGTH, LENGTH)))
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True}
    cached, uncached = (
        model.generate(input_ids=ids, use_cache=cache, output_logits=True, **options)
        for cache in (True, False)
    )
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(uncached.logits), **FP32)
