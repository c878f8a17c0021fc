"""Generic share, random labels and switching texts: exact counts for a seed, and what reaches the router."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from support.batches import IGNORE
from support.routing import routers
from support.training import DOMAINS, make_trainer, router_values, samples, tokenised
from support.zoo import Zoo

from peft_moe import MoLoraConfig, PeftMoeError, record_routing, routing_inputs
from peft_moe.training.data.augmentation import (
    check_random_domains,
    with_generic_share,
    with_random_domains,
    with_switches,
)

EXPERTS = ("wide", "narrow", "upper")
LABELS = {"router_label_loss_coef": 1.0}


def data(count: int = 40) -> Dataset:
    return Dataset.from_list(samples(count))


# -- generic share -----------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.1, 0.25, 0.5, 0.9, 1.0])
def test_the_generic_share_is_exact(share: float) -> None:
    mixed = with_generic_share(data(), share, EXPERTS, seed=1)
    assert len(mixed) == 40
    assert with_generic_share(data(), None, EXPERTS, seed=1).to_list() == data().to_list()
    counts = Counter(mixed["domain"])
    assert counts["weather"] == round(40 * share)
    repeats = Counter(mixed["prompt"])
    own = [repeats[row["prompt"]] for row in samples(40) if row["domain"] == "weather"]
    assert max(own) - min(own) <= 1  # all of them, before any comes again
    assert with_generic_share(data(), share, EXPERTS, seed=1)["prompt"] == mixed["prompt"]
    if 0 < share < 1:
        assert with_generic_share(data(), share, EXPERTS, seed=2)["prompt"] != mixed["prompt"]


def test_a_kind_that_is_missing_is_said() -> None:
    with pytest.raises(PeftMoeError, match=r"generic_share=0.5 needs samples without an expert.*'weather'"):
        with_generic_share(data(), 0.5, DOMAINS, 0)
    with pytest.raises(PeftMoeError, match="needs samples of the experts' domains"):
        with_generic_share(data(), 0.5, ["math"], 0)
    with pytest.raises(PeftMoeError, match=r"generic_share=1.5 must be a share from 0 to 1"):
        with_generic_share(data(), 1.5, EXPERTS, 0)


# -- random labels -----------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_exactly_this_share_of_labels_is_replaced(share: float) -> None:
    before = data(400)
    after = with_random_domains(before, share, seed=3)
    assert after["prompt"] == before["prompt"]
    pairs = [(a, b) for a, b in zip(before["domain"], after["domain"], strict=True) if a != b]
    assert len(pairs) == round(400 * share)
    assert with_random_domains(before, share, seed=3)["domain"] == after["domain"]
    if share == 1:
        # Each domain's 100 labels go to three other names and to none, evenly: 25 ± 4 standard deviations.
        for (_, new), count in Counter(pairs).items():
            assert new in {*DOMAINS, None}
            assert 8 <= count <= 42
        assert len(Counter(pairs)) == 16


def test_random_labels_without_an_effect_are_refused() -> None:
    check_random_domains(MoLoraConfig(experts=2, router_label_loss_coef=1.0), 0.1)
    check_random_domains(MoLoraConfig(experts=2), 0.0)
    with pytest.raises(PeftMoeError, match=r"domain_randomisation=0.1 has no effect.*router_label_loss_coef"):
        check_random_domains(MoLoraConfig(experts=2), 0.1)
    config = MoLoraConfig(experts=2, router_label_loss_coef=1.0, distillation_coef=1.0)
    with pytest.raises(PeftMoeError, match="would let the wrong experts teach"):
        check_random_domains(config, 0.1)


def test_random_labels_reach_the_router(zoo: Zoo, tmp_path: Path) -> None:
    def trained(share: float) -> torch.Tensor:
        model = zoo.mixture("llama", "prompt-soft", **LABELS)
        rows = with_random_domains(data(16), share, seed=0)
        make_trainer("sft", model, rows, tmp_path, max_steps=4).train()
        return router_values(model)

    assert (trained(0.5) - trained(0.0)).abs().max() > 1e-3


# -- switching texts ---------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.01, 0.25, 0.5, 1.0])
def test_the_share_of_pairs_is_exact_and_every_sample_is_used_once(share: float) -> None:
    rows = tokenised(samples(40))
    joined = with_switches(rows, share, seed=4)
    pairs = [row for row in joined if len(row["domain"]) == 2]
    assert len(pairs) == round(40 * share / (1 + share))
    assert len(joined) == 40 - len(pairs)
    assert abs(len(pairs) / len(joined) - share) <= 1 / len(joined)
    parts = []
    for row in joined:
        assert len(row["domain"]) == len(row["turn_lengths"])
        assert sum(row["turn_lengths"]) == len(row["input_ids"]) == len(row["labels"])
        start = 0
        for domain, length in zip(row["domain"], row["turn_lengths"], strict=True):
            stop = start + length
            parts.append((tuple(row["input_ids"][start:stop]), tuple(row["labels"][start:stop]), domain))
            start = stop
    assert Counter(parts) == Counter((tuple(r["input_ids"]), tuple(r["labels"]), r["domain"]) for r in rows)
    assert all(row["domain"][0] != row["domain"][1] for row in pairs)
    assert with_switches(rows, 0.0, seed=4) is rows
    assert with_switches(rows, share, seed=4).to_list() == joined.to_list()
    if share == 1:
        combinations = {tuple(row["domain"]) for row in pairs}
        assert len(combinations) > 6  # of 12: not always the same neighbours


def test_pairs_fit_or_are_refused() -> None:
    rows = tokenised(samples(40))
    lengths = [len(ids) for ids in rows["input_ids"]]
    limit = sorted(lengths)[20] * 2
    joined = with_switches(rows, 0.25, seed=0, max_length=limit)
    assert max(sum(row["turn_lengths"]) for row in joined if len(row["domain"]) == 2) <= limit
    with pytest.raises(PeftMoeError, match=r"needs 8 pairs .* within max_length=4, but there are 0"):
        with_switches(rows, 0.25, seed=0, max_length=4)
    alone = rows.filter(lambda row: row["domain"] == "wide")
    with pytest.raises(PeftMoeError, match=r"needs 2 pairs .* but there are 0 in \{'wide': 10\}"):
        with_switches(alone, 0.25, seed=0)


class Seen:
    """What reached the model in each batch."""

    def __init__(self, trainer: Any) -> None:
        self.batches: list[dict[str, Any]] = []
        compute_loss = trainer.compute_loss

        def spy(model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            self.batches.append({k: v.clone() for k, v in inputs.items() if isinstance(v, torch.Tensor)})
            return compute_loss(model, inputs, *args, **kwargs)

        trainer.compute_loss = spy


def switching_trainer(zoo: Zoo, folder: Path, routing: str, share: float, **fields: Any) -> Any:
    model = zoo.mixture("llama", routing, **LABELS, **fields)
    trainer = make_trainer("sft", model, data(12), folder, max_steps=2)
    trainer.train_dataset = with_switches(trainer.train_dataset, share, seed=0)
    return trainer


@pytest.mark.parametrize("routing", ["top2", "prompt-soft"])
def test_every_token_brings_its_domain_to_the_label_loss(zoo: Zoo, tmp_path: Path, routing: str) -> None:
    trainer = switching_trainer(zoo, tmp_path, routing, 0.5)
    seen = Seen(trainer)
    by_text = {tuple(ids): name for ids, name in zip(*make_parts(trainer), strict=True)}
    trainer.train()
    column = {name: index for index, name in enumerate(EXPERTS)}
    elsewhere = 3 if routing == "prompt-soft" else -1
    checked = 0
    for batch in seen.batches:
        for ids, mask, index in zip(
            batch["input_ids"], batch["attention_mask"], batch["domain_index"], strict=True
        ):
            assert (index[mask == 0] == -1).all()
            names = by_text[tuple(ids[mask == 1].tolist())]
            wanted = [column.get(name, elsewhere) for name, length in names for _ in range(length)]
            assert index[mask == 1].tolist() == wanted
            checked += len(names) == 2
    assert checked > 1
    # And the loss is that of each turn's or token's own target.
    model, batch = trainer.model.eval(), seen.batches[0]
    said = routing_inputs(prompt_mask=batch["labels"] == IGNORE, domains=batch["domain_index"])
    with said, record_routing() as record, torch.no_grad():
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    routing_of = next(iter(record.decisions.values()))
    assert routing_of.logits is not None
    assert routing_of.logits.shape[1] == batch["input_ids"].shape[1]
    losses = trainer._terms.losses(record, trainer._routers, model)
    known = batch["domain_index"] >= 0
    target = batch["domain_index"].clamp_min(0)[..., None]
    each = [
        -torch.log_softmax(r.logits, -1).gather(-1, target)[..., 0][known].mean()
        for r in record.decisions.values()
    ]
    assert losses["router_label_loss_coef"].item() == pytest.approx(torch.stack(each).mean().item(), rel=1e-5)


def make_parts(trainer: Any) -> tuple[list[list[int]], list[list[tuple[str, int]]]]:
    rows = trainer.train_dataset
    turns = [list(zip(row["domain"], row["turn_lengths"], strict=True)) for row in rows]
    return list(rows["input_ids"]), turns


def test_a_decision_per_prompt_is_taken_for_each_turn(zoo: Zoo, tmp_path: Path) -> None:
    """Every text is a pair here: the router scores two pooled prompts of each."""
    trainer = switching_trainer(zoo, tmp_path, "prompt-soft", 1.0)
    decided: list[int] = []
    next(routers(trainer.model))[1].scorer.register_forward_hook(
        lambda module, args, output: decided.append(output.shape[1])
    )
    trainer.train()
    assert set(decided) == {2}


def test_switching_texts_change_training(zoo: Zoo, tmp_path: Path) -> None:
    values = []
    for share in (0.0, 0.5):
        trainer = switching_trainer(zoo, tmp_path, "top2", share)
        trainer.train()
        values.append(router_values(trainer.model))
    assert (values[0] - values[1]).abs().max() > 1e-3


def test_each_turns_own_expert_teaches(zoo: Zoo, tmp_path: Path) -> None:
    """A router that gives every token its own domain's expert has nothing to learn from the teacher."""
    trainer = switching_trainer(zoo, tmp_path, "top2", 0.5, distillation_coef=1.0)
    distiller, taught = trainer._distiller, []
    loss = distiller.loss

    def spy(lesson: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        taught.append((lesson, labels))
        return loss(lesson, labels)

    distiller.loss = spy
    seen = Seen(trainer)
    trainer.train()
    batch, (lesson, labels) = seen.batches[0], taught[0]
    gates = torch.nn.functional.one_hot(batch["domain_index"].clamp_min(0), 3) * (
        batch["domain_index"] >= 0
    ).unsqueeze(-1)
    fresh = zoo.mixture("llama", "top2")
    with routing_inputs(gates=gates), torch.no_grad():
        logits = fresh(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    torch.testing.assert_close(lesson, logits[:, :-1][labels[:, 1:] != IGNORE], atol=1e-5, rtol=1e-5)


def test_faults_of_hand_made_turns_are_named(zoo: Zoo, tmp_path: Path) -> None:
    rows = [
        {"input_ids": [3, 4, 5], "labels": [3, 4, 5], "domain": ["wide", "upper"], "turn_lengths": lengths}
        for lengths in ([1, 1], [3])
    ]
    for row in rows:
        model = zoo.mixture("llama", "top2", **LABELS)
        trainer = make_trainer("sft", model, Dataset.from_list([row] * 4), tmp_path)
        with pytest.raises(PeftMoeError, match=r"a sample of 3 tokens has domain=\['wide', 'upper'\]"):
            trainer.train()


def test_a_router_that_reads_labels_follows_each_turns_own(zoo: Zoo) -> None:
    model = zoo.mixture("llama", "top2", router="oracle", top_k=None)
    ids = torch.tensor([[3, 4, 5, 6]])
    with routing_inputs(domains=torch.tensor([[0, 0, 2, -1]])), torch.no_grad():
        labelled = model(input_ids=ids).logits
    gates = torch.tensor([[1.0, 0, 0], [1, 0, 0], [0, 0, 1], [1 / 3, 1 / 3, 1 / 3]])[None]
    with routing_inputs(gates=gates), torch.no_grad():
        torch.testing.assert_close(labelled, model(input_ids=ids).logits)
    with (
        routing_inputs(domains=torch.tensor([[0, 0, 2]])),
        pytest.raises(PeftMoeError, match=r"domains is \(1, 3\), this call has \(1, 4\) tokens"),
    ):
        model(input_ids=ids)


def test_gates_per_token_of_another_length_are_refused(zoo: Zoo) -> None:
    model = zoo.mixture("llama", "top2")
    with (
        routing_inputs(gates=torch.ones(1, 4, 3)),
        pytest.raises(PeftMoeError, match=r"give weights \[B, E\], \[1, E\] or \[B, T, E\]"),
    ):
        model(input_ids=torch.tensor([[3, 4, 5]]))
