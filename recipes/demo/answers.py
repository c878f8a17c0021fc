"""Answers and hidden states of the demo's base, with one of its experts or none."""

from __future__ import annotations

import contextlib

import numpy as np
import torch
from peft import PeftModel
from transformers import LlamaForCausalLM

from peft_moe.cli.demo import BASE_NAME, asset_path
from peft_moe.cli.demo.skills import BASE, EXPERTS, Sample
from peft_moe.cli.demo.tokenizer import demo_tokenizer

BATCH = 100


def load_base() -> LlamaForCausalLM:
    """The saved base in float32."""
    base = LlamaForCausalLM.from_pretrained(asset_path(BASE_NAME), dtype=torch.float32)
    return base.eval()


def load_with_experts() -> PeftModel:
    """The saved base and all saved experts, as PEFT loads them."""
    first, *others = EXPERTS
    folder = asset_path("experts")
    model = PeftModel.from_pretrained(load_base(), folder / first, adapter_name=first)
    for name in others:
        model.load_adapter(folder / name, adapter_name=name)
    return model.eval()


@contextlib.contextmanager
def answered_by(model, name: str):
    """Let one expert answer, or the base with every adapter off."""
    if not isinstance(model, PeftModel):
        yield
    elif name == BASE:
        with model.disable_adapter():
            yield
    else:
        model.set_adapter(name)
        yield


def exact_matches(model, name: str, samples: list[Sample]) -> np.ndarray:
    """Whether greedy decoding gives each sample's completion; bool [samples].

    The completion is fed in: greedy decoding gives it exactly when every one of its tokens is
    the most probable one after the right tokens before it.
    """
    tokenizer, found = demo_tokenizer(), []
    for start in range(0, len(samples), BATCH):
        batch = samples[start : start + BATCH]
        ids, mask = _padded([tokenizer(s.text).input_ids for s in batch], tokenizer.pad_token_id)
        with torch.no_grad(), answered_by(model, name):
            best = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.argmax(-1)
        for row, sample in enumerate(batch):
            begin, end = len(sample.prompt), len(sample.text)
            right = best[row, begin - 1 : end - 1] == ids[row, begin:end]
            found.append(bool(right.all()))
    return np.array(found)


def hidden_states(model, samples: list[Sample]) -> dict[tuple[int, str], np.ndarray]:
    """The base's states at the input of layers 1 to 5 for each prompt, by tap and pooling.

    Poolings: mean of the prompt; mean of its last question (what follows the last stop
    character); last token.
    """
    tokenizer, parts = demo_tokenizer(), {}
    for start in range(0, len(samples), BATCH):
        prompts = [tokenizer(s.prompt).input_ids for s in samples[start : start + BATCH]]
        ids, mask = _padded(prompts, tokenizer.pad_token_id)
        with torch.no_grad(), answered_by(model, BASE):
            outputs = model(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False)
        rows, last = torch.arange(len(ids)), mask.sum(1) - 1
        question = mask * ((ids == tokenizer.eos_token_id).flip(1).cumsum(1).flip(1) == 0)
        for tap in range(1, 6):
            states = outputs.hidden_states[tap]
            pooled = {
                "mean": _mean(states, mask),
                "question": _mean(states, question),
                "last": states[rows, last],
            }
            for pooling, values in pooled.items():
                parts.setdefault((tap, pooling), []).append(values)
    return {key: torch.cat(values).numpy() for key, values in parts.items()}


def _mean(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


def _padded(rows: list[list[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    length = max(map(len, rows))
    ids = torch.tensor([row + [pad] * (length - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    return ids, mask
