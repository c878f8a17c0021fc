"""Print what the demo's assets can do, and whether their prompts can be told apart.

    python recipes/demo/measure.py             # about 6 minutes on one core; needs scikit-learn

Three tables on fresh test samples: exact match of the base and of every expert on every skill;
of the second answer in texts of two skills, given by its own expert; and the accuracy of a
logistic regression that reads a hidden state of the base and names the expert (or the base).
"""

from __future__ import annotations

import argparse
import itertools

import numpy as np
import torch
from answers import exact_matches, hidden_states, load_base, load_with_experts
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from peft_moe.cli.demo.skills import (
    BASE,
    BASE_SKILLS_HELD_OUT,
    BASE_SKILLS_SEEN,
    EXPERTS,
    Sample,
    flatten,
    generate,
    label,
    two_skill,
)

BASE_SKILLS = BASE_SKILLS_SEEN + BASE_SKILLS_HELD_OUT
TEST_SEED = 7


def accuracies(model, n: int) -> None:
    """Exact match of the base and every expert on every skill."""
    models = (BASE, *EXPERTS)
    print(f"\nexact match in %, {n} test samples per skill\n{'skill':<16}", *models, sep="\t")
    rows = []
    for name in EXPERTS + BASE_SKILLS_SEEN + BASE_SKILLS_HELD_OUT:
        samples = generate(name, n, TEST_SEED, split="test")
        rows.append([100 * exact_matches(model, who, samples).mean() for who in models])
        mark = "*" if name in BASE_SKILLS_HELD_OUT else " "
        print(f"{name + mark:<16}", *(f"{value:.1f}" for value in rows[-1]), sep="\t", flush=True)
    seen, held_out = len(EXPERTS) + len(BASE_SKILLS_SEEN), len(BASE_SKILLS_HELD_OUT)
    groups = {"seen": rows[len(EXPERTS) : seen], "held out *": rows[-held_out:]}
    for title, group in groups.items():
        print(f"mean, {title:<10}", *(f"{v:.1f}" for v in np.mean(group, axis=0)), sep="\t")


def two_turns(model, n: int) -> None:
    """Exact match of the second answer after a finished turn of another skill."""
    print(f"\nsecond answer by its own expert after another skill's turn, {n} texts per pair")
    for second in (*EXPERTS, BASE):
        for group, firsts in ((BASE, BASE_SKILLS), ("expert", EXPERTS)):
            texts = []
            for place, first in enumerate(firsts):
                last = BASE_SKILLS[7 * place % len(BASE_SKILLS)] if second == BASE else second
                if first != last:
                    texts += two_skill(first, last, n, TEST_SEED, split="test")
            samples = [flatten(turns) for turns in texts]
            value = 100 * exact_matches(model, second, samples).mean()
            print(f"{second:<8} after {group:<7}\t{value:.1f}\t({len(samples)} texts)", flush=True)


def _pairs(names: list[str], n: int, split: str) -> list[Sample]:
    """Flat two-question prompts: ``n`` texts for every last skill, after varied first ones."""
    others = itertools.cycle(EXPERTS + BASE_SKILLS_SEEN)
    return [
        flatten(turns)
        for last in names
        for seed in range(n)
        for turns in two_skill(next(others), last, 1, seed, split=split)
    ]


def _questions(names: list[str], n: int, split: str) -> list[Sample]:
    return [s for name in names for s in generate(name, n, TEST_SEED, split=split)]


def routability(model, n: int) -> None:
    """Accuracy of a logistic regression per layer's input and pooling."""
    known = [*EXPERTS, *BASE_SKILLS_SEEN]
    train = _questions(known, 100, "train") + _pairs(known, 40, "train")
    tests = {
        "experts": _questions(list(EXPERTS), n, "test"),
        "seen": _questions(list(BASE_SKILLS_SEEN), n, "test"),
        "held out": _questions(list(BASE_SKILLS_HELD_OUT), n, "test"),
        "2: experts": _pairs(list(EXPERTS), n, "test"),
        "2: seen": _pairs(list(BASE_SKILLS_SEEN), n, "test"),
        "2: held out": _pairs(list(BASE_SKILLS_HELD_OUT), n, "test"),
    }
    print("\nlogistic regression on hidden states of the base, accuracy in %; 2: two questions")
    print("tap\tpooling ", *tests, sep="\t")
    features = {title: hidden_states(model, samples) for title, samples in tests.items()}
    known_states, known_labels = hidden_states(model, train), [label(s.domain) for s in train]
    for tap, pooling in known_states:
        router = make_pipeline(StandardScaler(), LogisticRegression(C=0.3, max_iter=400))
        router.fit(known_states[tap, pooling], known_labels)
        values = []
        for title, samples in tests.items():
            truth = np.array([label(s.domain) for s in samples])
            values.append(100 * (router.predict(features[title][tap, pooling]) == truth).mean())
        print(tap, f"{pooling:<8}", *(f"{value:.1f}" for value in values), sep="\t", flush=True)


def main() -> None:
    """Print the tables that the command line asks for."""
    parser = argparse.ArgumentParser(description="Measure the demo's assets.")
    parser.add_argument("--samples", type=int, default=200, help="test samples per skill")
    parser.add_argument("--base-only", action="store_true", help="before the experts exist")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.base_only:
        base = load_base()
        for name in EXPERTS + BASE_SKILLS:
            samples = generate(name, arguments.samples, TEST_SEED, split="test")
            print(f"{name:<16}\t{100 * exact_matches(base, BASE, samples).mean():.1f}", flush=True)
        routability(base, arguments.samples)
        return
    model = load_with_experts()
    accuracies(model, arguments.samples)
    two_turns(model, 20)
    routability(model, arguments.samples)


if __name__ == "__main__":
    main()
