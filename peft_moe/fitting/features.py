"""What a model-scope router would see, streamed over labelled samples.

Letters: B batch, T sequence, I in, M samples.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm

from ..call import read_call
from ..errors import PeftMoeError
from ..model_router import ModelRouter
from ..probe import run_probe
from ..routers import Router

PromptRow = tuple[Any, int]


def stream_features(
    model: nn.Module,
    seat: ModelRouter,
    adapter: str,
    rows: Sequence[PromptRow],
    tokenizer: Any,
    *,
    batch_size: int,
    progress: bool,
) -> tuple[Tensor, Tensor]:
    """Router inputs and labels of all prompts; the base runs up to the tap, and no further.

    Args:
        model: the model that carries the mixture (not the PeftModel around it).
        seat: its ``ModelRouter``.
        adapter: whose router.
        rows: prompts (text, or a list of chat messages) with the router's column for each.
        tokenizer: of the base.
        batch_size: prompts per pass.
        progress: whether to show a bar.

    Returns:
        Features [M, I] float32 and labels [M] long, on the CPU: one row per prompt for a router that
        decides per prompt, one per real token for one that decides per token.
    """
    router: Router = seat.molora_router[adapter]  # type: ignore[assignment]
    tap = seat.taps[adapter]
    device = next(model.parameters()).device
    features, labels = [], []
    was_training = model.training
    model.eval()
    try:
        for batch, label_B in tqdm(
            _batches(rows, tokenizer, batch_size),
            total=-(-len(rows) // batch_size),
            desc="Reading prompts",
            disable=not progress,
        ):
            call = {key: value.to(device) for key, value in batch.items()}
            context = read_call(call, causal=False)
            with torch.no_grad():
                seen = router.features(run_probe(model, tap, call, context, None), context)
            if router.settings.granularity == "sequence":
                features.append(seen[:, 0].float().cpu())
                labels.append(label_B)
            else:
                real_BT = call["attention_mask"].bool()
                features.append(seen[real_BT].float().cpu())
                labels.append(label_B[:, None].expand(real_BT.shape)[real_BT.cpu()])
    finally:
        model.train(was_training)
    return torch.cat(features), torch.cat(labels)


def _batches(
    rows: Sequence[PromptRow], tokenizer: Any, batch_size: int
) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    for start in range(0, len(rows), batch_size):
        chunk = rows[start : start + batch_size]
        ids = [torch.tensor(_prompt_ids(prompt, tokenizer)) for prompt, _ in chunk]
        # Always on the right, whatever the tokenizer prefers: so that positions count from 0 in every base.
        # The mask hides the padding, hence any id will do, and a tokenizer without a pad token too.
        batch = {
            "input_ids": pad_sequence(ids, batch_first=True),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        }
        yield batch, torch.tensor([label for _, label in chunk])


def prompt_of(sample: Mapping[str, Any], whole_text: bool) -> Any:
    """What the router may read of a sample: its prompt, or its messages before the last answer.

    Args:
        sample: with ``prompt``, ``messages`` or ``text``.
        whole_text: whether a plain ``text`` will do, as it does for a router that decides per token.

    Raises:
        PeftMoeError: there is no prompt.
    """
    if "prompt" in sample:
        return sample["prompt"]
    if sample.get("messages"):
        *before, last = sample["messages"]
        return before if last["role"] == "assistant" else sample["messages"]
    if whole_text and "text" in sample:
        return sample["text"]
    raise PeftMoeError(
        f"a sample with {sorted(sample)} has no prompt to fit on; give it a `prompt` or `messages` (a router "
        "with router_granularity='token' also reads a `text`)"
    )


def _prompt_ids(prompt: Any, tokenizer: Any) -> list[int]:
    if isinstance(prompt, str):
        ids: list[int] = tokenizer(prompt)["input_ids"]
    else:
        chat = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
        ids = tokenizer.apply_chat_template(prompt, **chat)["input_ids"]
    if not ids:
        raise PeftMoeError(f"prompt={prompt!r:.80} has no token to fit on; drop the sample")
    return ids


def count_labels(rows: Iterable[PromptRow], columns: int) -> list[int]:
    """How many rows each of the router's columns has."""
    counts = [0] * columns
    for _, label in rows:
        if label >= 0:
            counts[label] += 1
    return counts
