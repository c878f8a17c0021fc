"""From labelled samples to rows of tokens, and from rows to padded batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..errors import PeftMoeError, near_matches
from ..tuner.config.domains import UNKNOWN, domain_columns
from ..tuner.config.mixture import MoLoraConfig
from .token_rows import Row, TokenRows

Prompts = Mapping[str, Mapping[str, Sequence[Any]]]
SIDES = ("positive", "negative")


@dataclass
class Batch:
    """Rows padded on the right to one length.

    Attributes:
        call: ``input_ids`` and ``attention_mask``, [B, T].
        prompt: True at prompt tokens, bool [B, T].
        labels: labels of the rows, long [B].
    """

    call: dict[str, Tensor]
    prompt: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> Batch:
        """Return the batch on another device."""
        call = {name: value.to(device) for name, value in self.call.items()}
        return Batch(call, self.prompt.to(device), self.labels.to(device))


def batches(rows: Sequence[Row], batch_size: int) -> Iterator[Batch]:
    """Yield batches of rows of similar length, padded on the right, whatever the tokenizer's padding side.

    With padding on the right, positions count from 0 in every base. The attention mask hides the padding, so
    that its token id does not matter and the tokenizer needs no pad token.
    """
    lengths = rows.lengths if isinstance(rows, TokenRows) else [len(row.ids) for row in rows]
    order = sorted(range(len(rows)), key=lengths.__getitem__)
    for start in range(0, len(order), batch_size):
        chosen = [rows[index] for index in order[start : start + batch_size]]
        ids = [torch.tensor(row.ids) for row in chosen]
        prompts = [torch.arange(len(row.ids)) < row.prompt for row in chosen]
        call = {
            "input_ids": pad_sequence(ids, batch_first=True),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        }
        prompt = pad_sequence(prompts, batch_first=True)
        yield Batch(call, prompt, torch.tensor([row.label for row in chosen]))


def labelled_rows(
    data: Iterable[Mapping[str, Any]], config: MoLoraConfig, tokenizer: Any, *, completions: bool
) -> TokenRows:
    """Tokenise samples; the label of a row is the router column of the sample's domain.

    Args:
        data: samples with ``prompt``, ``messages`` or ``text``, and ``domain``.
        config: the mixture's.
        tokenizer: of the base.
        completions: whether rows contain the completions; otherwise they end after the prompt.

    Raises:
        PeftMoeError: a sample lacks its prompt or domain, or its domain is no expert's.
    """
    column_of = domain_columns(config)
    rows = TokenRows()
    for number, sample in enumerate(data):
        domain = sample.get("domain")
        column = column_of(domain)
        if domain is None:
            raise PeftMoeError(f"sample {number} has no `domain` to name its expert, only {sorted(sample)}")
        if column == UNKNOWN:
            raise PeftMoeError(
                f"domain={domain!r} is no expert.{near_matches(str(domain), config.expert_names)} "
                "Set null_expert=True to let other domains mean the null expert"
            )
        rows.append(sample_row(sample, column, tokenizer, completions=completions))
    return rows


def described_rows(prompts: Prompts, config: MoLoraConfig, tokenizer: Any, columns: int) -> TokenRows:
    """Tokenise examples per expert: ``{"math": {"positive": [...], "negative": [...]}}``.

    "negative" is optional. With a null expert, any other name describes it. Labels of negative examples are
    ``columns`` above those of positive ones.

    Raises:
        PeftMoeError: a name is unknown, or examples are one text instead of a list.
    """
    column_of = domain_columns(config)
    rows = TokenRows()
    for name, sides in prompts.items():
        column = column_of(name)
        if column == UNKNOWN:
            raise PeftMoeError(
                f"prompts: {name!r} is no expert.{near_matches(name, config.routed_names)} Set "
                "null_expert=True to let other names mean the null expert"
            )
        for side, examples in sides.items():
            if side not in SIDES:
                raise PeftMoeError(f"prompts[{name!r}]: {side!r} is not known.{near_matches(side, SIDES)}")
            if isinstance(examples, str):
                raise PeftMoeError(f"prompts[{name!r}][{side!r}] is one text; give a list of prompts")
            label = column + columns * SIDES.index(side)
            for prompt in examples:
                rows.append(sample_row({"prompt": prompt}, label, tokenizer, completions=False))
    return rows


def sample_row(sample: Mapping[str, Any], label: int, tokenizer: Any, *, completions: bool) -> Row:
    """Tokenise one sample.

    Raises:
        PeftMoeError: the sample has no prompt, or its prompt has no token.
    """
    prompt, answer = _parts(sample, completions)
    ids = _ids(prompt, tokenizer, opens_answer=True)
    if not completions or answer is None:
        return Row(ids, label, len(ids))
    both = _ids(prompt + answer, tokenizer, opens_answer=False)
    # A tokenizer may merge the end of the prompt with the start of the completion into one token. At
    # inference the prompt stands alone and has no such token, so that only the tokens that both share count
    # as prompt.
    shared = next((n for n, (a, b) in enumerate(zip(ids, both, strict=False)) if a != b), len(ids))
    return Row(both, label, min(shared, len(both)))


def _parts(sample: Mapping[str, Any], completions: bool) -> tuple[Any, Any]:
    """Return prompt and answer, each a text or a list of messages; the answer may be None."""
    if "prompt" in sample:
        return sample["prompt"], sample.get("completion")
    if sample.get("messages"):
        *before, last = sample["messages"]
        return (before, [last]) if last["role"] == "assistant" else (sample["messages"], None)
    if completions and "text" in sample:
        return sample["text"], None
    raise PeftMoeError(
        f"a sample with {sorted(sample)} has no prompt to fit on; give it a `prompt` or `messages` (a router "
        "with router_granularity='token' or 'running' also reads a `text`)"
    )


def _ids(text: Any, tokenizer: Any, *, opens_answer: bool) -> list[int]:
    if isinstance(text, str):
        ids: list[int] = tokenizer(text)["input_ids"]
    else:
        chat = {"add_generation_prompt": opens_answer, "tokenize": True, "return_dict": True}
        ids = tokenizer.apply_chat_template(text, **chat)["input_ids"]
    if not ids:
        raise PeftMoeError(f"prompt={text!r:.80} has no token to fit on; drop the sample")
    return ids
