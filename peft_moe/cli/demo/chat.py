"""``peft-moe chat``: ask a saved mixture questions, and see which expert answers."""

from __future__ import annotations

from typing import Any

import torch
from peft import AutoPeftModelForCausalLM
from rich.console import Console
from transformers import AutoTokenizer

from ...routing.context import record_routing
from ...training.trainers.checks import mixture_config


def load_mixture(folder: str) -> tuple[Any, Any]:
    """Load a saved mixture with its base, in evaluation mode, and its tokenizer."""
    model = AutoPeftModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
    return model, AutoTokenizer.from_pretrained(folder)


def answer(
    model: Any, tokenizer: Any, prompt: str, *, max_new_tokens: int = 64
) -> tuple[str, dict[str, float]]:
    """Generate the greedy continuation of a prompt, up to the end-of-sequence token.

    Returns:
        The text, and the weight of each expert, and of "null", at the last token of the prompt.
    """
    _, config = mixture_config(model)
    encoded = tokenizer(prompt, return_tensors="pt")
    with torch.no_grad(), record_routing() as record:
        model(input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"])
        gates_E = torch.stack([r.gates[-1, -1] for r in record.decisions.values()]).mean(0)
        out = model.generate(
            input_ids=encoded["input_ids"],
            attention_mask=encoded["attention_mask"],
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
    text = tokenizer.decode(out[0, encoded["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    weights = dict(zip(config.expert_names, gates_E.tolist(), strict=True))
    return text, {**weights, "null": max(0.0, 1.0 - sum(weights.values()))}


def chat(folder: str, marker: str, console: Console | None = None) -> None:
    """Read questions from the terminal until an empty line.

    Args:
        folder: the mixture's folder.
        marker: text that the base expects between a question and its answer.
        console: terminal to read from and print to.
    """
    console = console or Console()
    model, tokenizer = load_mixture(folder)
    console.print("Ask a question; an empty line ends.")
    while question := console.input("[bold]> [/]").strip():
        text, weights = answer(model, tokenizer, question + marker)
        top_expert = max(weights, key=lambda name: weights[name])
        console.print(f"{text}   [dim]({top_expert} {100 * weights[top_expert]:.0f} %)[/]", highlight=False)
