"""Decoding with a KV cache gives the logits of a full pass without one, on every path of ``generate``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel
from support.bases import CAUSAL, VOCAB
from support.batches import pad, texts
from support.routing import PAIRS
from support.zoo import Zoo
from torch import Tensor
from transformers import DynamicCache

from peft_moe import PeftMoeError, routing_inputs

# float32, another order of summation, and rounding that passes through the cache.
FP32 = {"atol": 2e-5, "rtol": 1e-5}
STEPS = 5

DECODERS = [(name, routing) for name, routing in PAIRS if name in CAUSAL]
SOME = [(name, routing) for name, routing in DECODERS if name in {"llama", "gpt2"}]
LLAMA = [routing for name, routing in DECODERS if name == "llama"]
PER_PROMPT = ["prompt-probe", "prompt-base", "prompt-soft", "prompt-module", "prompt-block", "token-prompt"]
PROBED_TOKENS = ["token-probe", "running-probe"]
RUNNING = ["running-probe", "running-base", "running-block"]


def generate(model: PeftModel, prompt: dict[str, Tensor], **options: Any) -> Any:
    """Exactly STEPS new tokens, with raw logits."""
    return model.generate(
        **prompt,
        max_new_tokens=STEPS,
        min_new_tokens=STEPS,
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )


def uncached(model: PeftModel, prompt: dict[str, Tensor], sequences: Tensor) -> Tensor:
    """Logits [rows, STEPS, V] of one full pass over the finished sequences, the prompt marked as such."""
    rows, width = len(sequences), prompt["input_ids"].shape[1]
    prompt_mask = prompt["attention_mask"].repeat_interleave(rows // len(prompt["input_ids"]), dim=0)
    mask = torch.cat([prompt_mask, prompt_mask.new_ones(rows, sequences.shape[1] - width)], dim=1)
    is_prompt = torch.zeros_like(mask).bool()
    is_prompt[:, :width] = prompt_mask.bool()
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad(), routing_inputs(prompt_mask=is_prompt):
        output = model(input_ids=sequences, attention_mask=mask, position_ids=positions, use_cache=False)
    return output.logits[:, width - 1 : -1]


def steps_of(output: Any) -> Tensor:
    """Logits of the returned sequences [rows, STEPS, V]; beams are followed back to where they came from."""
    beams = getattr(output, "beam_indices", None)
    if beams is None:
        return torch.stack(output.logits, dim=1)
    return torch.stack([logits[beams[:, step]] for step, logits in enumerate(output.logits)], dim=1)


OPTIONS = {
    "greedy": {},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "samples": {"do_sample": True, "num_return_sequences": 3},
    "no-cache": {"use_cache": False},
    "beams-no-cache": {"use_cache": False, "num_beams": 3},
    "static": {"cache_implementation": "static"},
}
PATHS = [(*pair, how) for how in OPTIONS for pair in (DECODERS if how in {"greedy", "static"} else SOME)]


@pytest.mark.parametrize(("name", "routing", "how"), PATHS)
def test_generation_has_the_logits_of_one_full_pass(zoo: Zoo, name: str, routing: str, how: str) -> None:
    model = zoo.mixture(name, routing)
    prompt = pad(texts(lengths=(9, 6)), side="left")
    torch.manual_seed(0)
    if how == "static" and routing in PROBED_TOKENS:
        with pytest.raises(PeftMoeError, match="cannot run on a static KV cache"):
            generate(model, prompt, **OPTIONS[how])
        return
    output = generate(model, prompt, **OPTIONS[how])
    torch.testing.assert_close(steps_of(output), uncached(model, prompt, output.sequences), **FP32)


@pytest.mark.parametrize("how", ["greedy", "beams", "no-cache"])
@pytest.mark.parametrize("routing", ["uniform", "dense", "top2", "random"])
def test_generation_of_an_encoder_decoder(zoo: Zoo, routing: str, how: str) -> None:
    model = zoo.mixture("t5", routing)
    prompt = pad(texts(lengths=(9, 6)))
    output = generate(model, prompt, **OPTIONS[how])
    repeats = len(output.sequences) // 2
    source = {key: value.repeat_interleave(repeats, dim=0) for key, value in prompt.items()}
    with torch.no_grad():
        full = model(**source, decoder_input_ids=output.sequences, use_cache=False).logits[:, :-1]
    torch.testing.assert_close(steps_of(output), full, **FP32)


@pytest.mark.parametrize("routing", LLAMA)
def test_two_interleaved_caches(zoo: Zoo, routing: str) -> None:
    model = zoo.mixture("llama", routing)
    caches = [DynamicCache(), DynamicCache()]
    prompts = [pad(texts(seed, lengths=(7, 7))) for seed in (1, 2)]
    tokens = [torch.randint(3, VOCAB, (2, STEPS), generator=torch.Generator().manual_seed(s)) for s in (3, 4)]
    got: list[list[Tensor]] = [[], []]
    with torch.no_grad():
        for index, prompt in enumerate(prompts):
            logits = model(**prompt, past_key_values=caches[index], use_cache=True).logits
            got[index].append(logits[:, -1])
        for step in range(STEPS - 1):
            for index in (0, 1):
                ids = tokens[index][:, step : step + 1]
                logits = model(input_ids=ids, past_key_values=caches[index], use_cache=True).logits
                got[index].append(logits[:, -1])
    for index, prompt in enumerate(prompts):
        sequences = torch.cat([prompt["input_ids"], tokens[index]], dim=1)
        torch.testing.assert_close(torch.stack(got[index], 1), uncached(model, prompt, sequences), **FP32)


@pytest.mark.parametrize("routing", LLAMA)
def test_speculative_decoding_rolls_the_cache_back(zoo: Zoo, routing: str) -> None:
    """Prompt look-up proposes tokens and crops those that the model refuses.

    Its first pass holds the prompt and the first candidates together; only the prompt is pooled over.
    """
    model = zoo.mixture("llama", routing)
    row = torch.tensor([5, 9, 5, 9, 5, 9, 5])
    prompt = pad([row])
    output = model.generate(
        **prompt, max_new_tokens=STEPS, min_new_tokens=STEPS, prompt_lookup_num_tokens=3, do_sample=False
    )
    plain = generate(model, prompt)
    assert torch.equal(output, plain.sequences)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"use_cache": False}], ids=str)
def test_a_mask_around_generate_marks_the_prompt_given_to_it(zoo: Zoo, options: dict[str, Any]) -> None:
    """Every step decides from the marked tokens alone, and a mask of all tokens changes nothing."""
    model = zoo.mixture("llama", "prompt-soft")
    prompt = pad(texts(lengths=(9, 6)), side="left")
    some = prompt["attention_mask"].bool()
    some[:, :-3] = False
    runs = {}
    for name, mask in {"none": None, "all": prompt["attention_mask"], "some": some}.items():
        with routing_inputs(prompt_mask=mask):
            runs[name] = generate(model, prompt, do_sample=False, **options)
    torch.testing.assert_close(steps_of(runs["none"]), steps_of(runs["all"]), **FP32)
    sequences = runs["some"].sequences
    rows = sequences.shape[0] // 2
    is_prompt = torch.zeros_like(sequences).bool()
    is_prompt[:, : some.shape[1]] = some.repeat_interleave(rows, dim=0)
    real = torch.ones_like(sequences)
    real[:, : some.shape[1]] = prompt["attention_mask"].repeat_interleave(rows, dim=0)
    positions = (real.cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad(), routing_inputs(prompt_mask=is_prompt):
        whole = model(input_ids=sequences, attention_mask=real, position_ids=positions, use_cache=False)
    expected = whole.logits[:, some.shape[1] - 1 : -1]
    torch.testing.assert_close(steps_of(runs["some"]), expected, **FP32)
    assert not torch.allclose(steps_of(runs["some"])[:, 0][:1], steps_of(runs["all"])[:, 0][:1], atol=1e-4)


@pytest.mark.parametrize("routing", [r for r in LLAMA if r not in [*PER_PROMPT, *RUNNING]])
def test_a_prompt_in_two_pieces(zoo: Zoo, routing: str) -> None:
    model = zoo.mixture("llama", routing)
    ids = torch.stack(texts(lengths=(9, 9)))
    cache = DynamicCache()
    with torch.no_grad():
        pieces = [
            model(input_ids=piece, past_key_values=cache, use_cache=True).logits
            for piece in ids.split([5, 4], dim=1)
        ]
        whole = model(input_ids=ids).logits
    torch.testing.assert_close(torch.cat(pieces, 1), whole, **FP32)


@pytest.mark.parametrize("routing", ["prompt-base", "prompt-module", "prompt-block", *RUNNING])
def test_a_second_turn_decides_anew(zoo: Zoo, routing: str) -> None:
    """Its prompt is marked; the first turn stays in the cache. Same as both turns in one pass."""
    model = zoo.mixture("llama", routing)
    ids = torch.stack(texts(lengths=(12, 12)))
    is_prompt = torch.zeros_like(ids).bool()
    is_prompt[:, :4] = is_prompt[:, 7:10] = True
    cache = DynamicCache()
    with torch.no_grad():
        with routing_inputs(prompt_mask=is_prompt):
            whole = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        pieces = []
        for start, stop in ((0, 7), (7, 10), (10, 12)):
            mask = is_prompt[:, start:stop]
            marked = routing_inputs(prompt_mask=mask if mask.any() else None)
            with marked:
                output = model(
                    input_ids=ids[:, start:stop],
                    attention_mask=torch.ones_like(ids[:, :stop]),
                    past_key_values=cache,
                    use_cache=True,
                )
            pieces.append(output.logits)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, **FP32)


@pytest.mark.parametrize("routing", ["prompt-probe", "prompt-soft", "token-prompt"])
def test_a_second_turn_cannot_be_probed(zoo: Zoo, routing: str) -> None:
    """The bare base keeps no keys of the first turn, so the probe would misread the second."""
    model = zoo.mixture("llama", routing)
    ids = torch.stack(texts(lengths=(7, 7)))
    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True).past_key_values
        mark = torch.ones(2, 3, dtype=torch.bool)
        with routing_inputs(prompt_mask=mark), pytest.raises(PeftMoeError, match="router_below_tap='base'"):
            model(input_ids=ids[:, :3], past_key_values=cache)


@pytest.mark.parametrize("routing", LLAMA)
def test_generation_in_training_mode(zoo: Zoo, routing: str) -> None:
    """Online trainers generate without calling ``eval()``; the tiny bases have no dropout."""
    model = zoo.mixture("llama", routing).train()
    prompt = pad(texts(lengths=(9, 6)), side="left")
    output = generate(model, prompt, do_sample=False)
    torch.testing.assert_close(steps_of(output), uncached(model, prompt, output.sequences), **FP32)


@pytest.mark.parametrize("routing", LLAMA)
def test_the_cache_that_a_plain_call_returns_can_be_continued(zoo: Zoo, routing: str) -> None:
    model = zoo.mixture("llama", routing)
    prompt = pad(texts(lengths=(7, 7)))
    token = torch.tensor([[5], [6]])
    with torch.no_grad():
        cache = model(**prompt).past_key_values
        logits = model(input_ids=token, past_key_values=cache).logits
    # Two further tokens: the last of them is not looked at.
    sequences = torch.cat([prompt["input_ids"], token, token], dim=1)
    torch.testing.assert_close(logits[:, 0], uncached(model, prompt, sequences)[:, 1], **FP32)


@pytest.mark.parametrize("routing", LLAMA)
def test_a_generation_leaves_nothing_behind(zoo: Zoo, routing: str) -> None:
    model = zoo.mixture("llama", routing)
    first, second = (pad(texts(seed, lengths=(7, 5)), side="left") for seed in (1, 2))
    expected = generate(model, second)
    for options in ({}, {"use_cache": False}):
        generate(model, first, **options)
        again = generate(model, second, **options)
        torch.testing.assert_close(steps_of(again), steps_of(expected), **FP32)


@pytest.mark.parametrize("routing", [*PER_PROMPT, *PROBED_TOKENS, "running-base", "running-block"])
def test_a_cache_that_was_filled_without_the_mixture_is_refused(zoo: Zoo, routing: str) -> None:
    model = zoo.mixture("llama", routing)
    ids = torch.stack(texts(lengths=(7, 7)))
    with torch.no_grad(), model.disable_adapter():
        cache = model(input_ids=ids, use_cache=True).past_key_values
    with pytest.raises(PeftMoeError, match="fill the cache with this adapter active"):
        model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)


@pytest.mark.parametrize("routing", [*PER_PROMPT, *RUNNING])
def test_a_kept_decision_reads_no_later_token(zoo: Zoo, routing: str) -> None:
    """With the prompt marked, other completions leave the logits of the prompt as they are."""
    model = zoo.mixture("llama", routing)
    ids = torch.stack(texts(lengths=(12, 12)))
    other = ids.clone()
    other[:, 6:] = (other[:, 6:] + 7) % (VOCAB - 3) + 3
    is_prompt = torch.zeros_like(ids).bool()
    is_prompt[:, :6] = True
    with torch.no_grad(), routing_inputs(prompt_mask=is_prompt):
        one, two = (model(input_ids=rows).logits for rows in (ids, other))
    torch.testing.assert_close(one[:, :6], two[:, :6], **FP32)
    assert (one[:, 7:] - two[:, 7:]).abs().max() > 0.01
