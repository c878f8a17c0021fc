"""Scoring: against one text at a time, against greedy generation, and where turns begin."""

from __future__ import annotations

import math

import pytest
import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from peft_moe import MoLoraConfig, record_routing
from peft_moe.cli.demo.skills import EXPERTS, STOP, generate
from peft_moe.cli.demo.tokenizer import demo_tokenizer
from peft_moe.evaluation import TurnScore, recovered, score_texts, summarise

TEXTS = [[(s.prompt, s.completion) for s in generate(name, 2, seed=3)] for name in EXPERTS]


@pytest.fixture(scope="module")
def tokenizer():
    return demo_tokenizer()


@pytest.fixture
def base(tokenizer) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config).eval()


def nll_by_hand(model, tokenizer, text, turn: int) -> float:
    """Loss of one turn's completion, from its own forward pass, token by token."""
    before = "".join(p + c for p, c in text[:turn]) + text[turn][0]
    start = len(tokenizer(before).input_ids)
    ids = tokenizer(before + text[turn][1]).input_ids
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0]
    return -sum(float(logits[i - 1].log_softmax(-1)[ids[i]]) for i in range(start, len(ids)))


def test_batched_scores_equal_scores_by_hand(base, tokenizer) -> None:
    scores = score_texts(base, tokenizer, TEXTS, batch_size=3)
    for text, turns in zip(TEXTS, scores, strict=True):
        for number, turn in enumerate(turns):
            assert turn.tokens == len(tokenizer(text[number][1]).input_ids)
            # float32 sums over a few dozen tokens
            assert turn.nll == pytest.approx(nll_by_hand(base, tokenizer, text, number), rel=1e-4)


def test_exact_is_what_greedy_decoding_writes(base, tokenizer) -> None:
    prompt = TEXTS[0][0][0]
    encoded = tokenizer(prompt, return_tensors="pt")
    out = base.generate(
        input_ids=encoded.input_ids,
        attention_mask=encoded.attention_mask,
        max_new_tokens=6,
        do_sample=False,
        eos_token_id=None,
    )
    written = tokenizer.decode(out[0, encoded.input_ids.shape[1] :])
    other = "a" if written[-1] != "a" else "b"
    good, bad = score_texts(base, tokenizer, [[(prompt, written)], [(prompt, written[:-1] + other)]])
    assert good[0].exact
    assert not bad[0].exact


def test_max_length_cuts_turns_off(base, tokenizer) -> None:
    first = len(tokenizer(TEXTS[0][0][0] + TEXTS[0][0][1]).input_ids)
    turns = score_texts(base, tokenizer, TEXTS[:1], max_length=first)[0]
    assert turns[0].tokens > 0
    assert turns[1].tokens == 0
    assert summarise(turns).answers == 1


def test_marked_turns_are_decided_apart_and_running_text_is_not(base, tokenizer) -> None:
    config = MoLoraConfig(experts=3, init_weights=False, target_modules="all-linear", router="context")
    model = get_peft_model(base, config)
    text = [TEXTS[0][0], TEXTS[1][0]]

    def segments(marked: bool) -> int:
        with record_routing() as record:
            score_texts(model, tokenizer, [text], turns_marked=marked)
        assert record.context is not None
        return record.context.num_segments

    assert segments(True) == 2
    assert segments(False) == 1


def test_scoring_leaves_the_mode_alone(base, tokenizer) -> None:
    base.train()
    score_texts(base, tokenizer, TEXTS[:1])
    assert base.training


def test_summary_weighs_tokens_for_the_loss_and_answers_for_accuracy() -> None:
    score = summarise([TurnScore(2.0, 1, True), TurnScore(0.0, 3, False), TurnScore(0.0, 0, True)])
    assert (score.loss, score.accuracy, score.answers) == (0.5, 0.5, 2)


def test_recovered_share() -> None:
    assert recovered(method=0.75, base=0.5, oracle=1.0) == 0.5
    assert recovered(method=2.0, base=2.0, oracle=1.0) == 0.0
    assert math.isnan(recovered(1.0, 1.0, 1.0))


def test_completions_end_in_the_stop(tokenizer) -> None:
    assert all(completion.endswith(STOP) for text in TEXTS for _, completion in text)
