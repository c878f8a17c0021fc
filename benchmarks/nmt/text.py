"""Parallel text: what is read and mixed, which labels are made wrong, loss and translation."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch.nn import functional

from peft_moe import PeftMoeError, routing_inputs
from peft_moe.training.data import augmentation as robustness

SEEN, UNSEEN, GENERIC = ("it", "law"), "shell", "generic"
RIGHT, WRONG, NONE = "right", "wrong", "none"  # what the system is told of a sentence's domain
IGNORED = -100
Pair = dict[str, str]


def read_pairs(source: Path, domain: str, split: str) -> list[Pair]:
    """`src` and `tgt` of one set.

    Raises:
        PeftMoeError: there is no such file.
    """
    path = source / "nmt" / "en-fr" / domain / f"{split}.jsonl"
    if not path.is_file():
        raise PeftMoeError(
            f"{path} is missing; set PEFT_MOE_DATA to the folder that holds nmt/en-fr/{{it,law,shell}}"
        )
    rows = map(json.loads, path.read_text(encoding="utf-8").split("\n")[:-1])
    return [{"src": row["src"], "tgt": row["tgt"], "domain": domain} for row in rows]


def shuffled(pairs: list[Pair], domain: str) -> list[Pair]:
    """An order that depends on the domain's name alone."""
    order = list(pairs)
    random.Random(f"order {domain}").shuffle(order)
    return order


def write_data(source: Path, out: Path, max_chars: int, tests: int) -> dict[str, int]:
    """Write `base`, `it`, `law`, `generic` and `test` as JSON lines; the numbers of pairs of each.

    Half of every set is generic: the base is trained on it, and it is what a generic share is drawn from. The
    other half of `it` and `law` is those domains' own; that of `shell` is left out, so that nobody ever sees
    the unseen domain by its name. All but the base read pairs of at most ``max_chars`` characters.
    """
    files: dict[str, list[Pair]] = {"base": [], GENERIC: [], "test": []}
    for domain in (*SEEN, UNSEEN):
        pairs = shuffled(read_pairs(source, domain, "train"), domain)
        half = len(pairs) // 2
        files["base"] += pairs[:half]
        files[GENERIC] += [{**pair, "domain": GENERIC} for pair in _short(pairs[:half], max_chars)]
        if domain in SEEN:
            files[domain] = _short(pairs[half:], max_chars)
        test = shuffled(read_pairs(source, domain, "test"), domain)
        files["test"] += _short(test, max_chars)[:tests]
    for name, pairs in files.items():
        write_lines(out / f"{name}.jsonl", (record(pair) for pair in pairs))
    return {name: len(pairs) for name, pairs in files.items()}


def _short(pairs: list[Pair], max_chars: int) -> list[Pair]:
    return [pair for pair in pairs if len(pair["src"]) + len(pair["tgt"]) <= max_chars]


def record(pair: Pair, *, tagged: bool = False) -> dict[str, str]:
    """A pair as a recipe reads it; with ``tagged`` the prompt begins with the domain's name."""
    made = prompt(pair["src"], tagged=tagged, label=pair["domain"])
    return {**pair, "prompt": made, "completion": f" {pair['tgt']}"}


def prompt(src: str, *, tagged: bool = False, label: str | None = None) -> str:
    """What stands before a translation. A label that is no domain's with data of its own is "any"."""
    head = f"<{label if label in SEEN else 'any'}> " if tagged else ""
    return f"{head}en: {src}\nfr:"


def wrong_label(domain: str, number: int) -> str:
    """The label of another domain, for the sentence of this number; of each other in turn."""
    others = [name for name in SEEN if name != domain]
    return others[number % len(others)]


def labels_of(domain: str, condition: str, count: int) -> list[str | None]:
    """What a system is told of ``count`` sentences of one domain."""
    if condition == WRONG:
        return [wrong_label(domain, number) for number in range(count)]
    return [domain if condition == RIGHT else None] * count


def write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def write_mix(data: Path, path: Path, generic: float, randomised: float, tagged: bool, seed: int) -> None:
    """Training pairs of one LoRA for all domains, by the same options that `train_router` has for mixtures.

    With ``tagged``, labels are first made wrong and then written into the prompts.
    """
    names = (*SEEN, GENERIC) if generic else SEEN
    rows = [row for name in names for row in read_lines(data / f"{name}.jsonl")]
    mixed = robustness.with_generic_share(Dataset.from_list(rows), generic or None, SEEN, seed)
    mixed = robustness.with_random_domains(mixed, randomised, seed)
    write_lines(path, (record(row, tagged=tagged) for row in mixed))


@torch.no_grad()
def losses(
    model: Any, tokenizer: Any, prompts: Sequence[str], targets: Sequence[str], columns: torch.Tensor | None
) -> tuple[list[float], list[int]]:
    """Of each translation the summed loss in nats, its end included, and its number of tokens.

    ``columns`` are the labels as columns of the router, [B]; None for models that are told nothing.
    """
    rows = []
    for given, target in zip(prompts, targets, strict=True):
        left, right = tokenizer(given)["input_ids"], tokenizer(target)["input_ids"]
        rows.append((left, [*right, tokenizer.eos_token_id]))
    width = max(len(left) + len(right) for left, right in rows)
    ids_BT = torch.full((len(rows), width), tokenizer.pad_token_id)
    labels_BT = torch.full((len(rows), width), IGNORED)
    real_BT = torch.zeros(len(rows), width, dtype=torch.long)
    for row, (left, right) in enumerate(rows):
        stop = len(left) + len(right)
        ids_BT[row, :stop] = torch.tensor(left + right)
        labels_BT[row, len(left) : stop] = torch.tensor(right)
        real_BT[row, :stop] = 1
    with routing_inputs(prompt_mask=(labels_BT == IGNORED) & real_BT.bool(), domains=columns):
        logits_BTV = model(input_ids=ids_BT, attention_mask=real_BT, use_cache=False).logits[:, :-1].float()
    nll_BT = functional.cross_entropy(logits_BTV.transpose(1, 2), labels_BT[:, 1:], reduction="none")
    return nll_BT.sum(1).tolist(), (labels_BT[:, 1:] != IGNORED).sum(1).tolist()


@torch.no_grad()
def translate(
    model: Any, tokenizer: Any, prompts: Sequence[str], columns: torch.Tensor | None, new_tokens: int
) -> list[str]:
    """Greedy translations, one line each."""
    given = tokenizer(list(prompts), padding=True, padding_side="left", return_tensors="pt")
    width = given["input_ids"].shape[1]
    with routing_inputs(domains=columns):
        ids_BT = model.generate(
            input_ids=given["input_ids"],
            attention_mask=given["attention_mask"],
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
    texts = tokenizer.batch_decode(ids_BT[:, width:], skip_special_tokens=True)
    return [text.strip().split("\n")[0] for text in texts]


def score(
    model: Any, tokenizer: Any, rows: list[dict[str, Any]], columns: torch.Tensor | None, new_tokens: int
) -> dict[str, Any]:
    """Losses of every sentence, and unless `new_tokens` is 0 BLEU and chrF of all; CPU seconds of both.

    The rows hold `prompt`, `completion` and `tgt`.
    """
    import sacrebleu

    start, prompts = time.process_time(), [row["prompt"] for row in rows]
    nll, tokens = losses(model, tokenizer, prompts, [row["completion"] for row in rows], columns)
    middle = time.process_time()
    found = {"nll": [round(value, 4) for value in nll], "tokens": tokens}
    found["scoring_s"] = round(middle - start, 3)
    if new_tokens == 0:
        return found
    written = translate(model, tokenizer, prompts, columns, new_tokens)
    end = time.process_time()
    references = [[row["tgt"] for row in rows]]
    return found | {
        "bleu": sacrebleu.corpus_bleu(written, references).score,
        "chrf": sacrebleu.corpus_chrf(written, references).score,
        "translating_s": round(end - middle, 3),
        "first": written[:3],
    }
