"""What an extracted adapter does to text: the inputs of each layer, and the divergence of the logits.

The only part of an extraction that loads models whole: the full model once, the base once.
Letters: N tokens, I in, V vocabulary.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoTokenizer

from ...errors import PeftMoeError
from ...io.checkpoint import quiet_transformers
from .pairs import ExtractionPlan

# Tokens that are read per text, tokens whose logits are kept, and input rows that are kept per layer.
MAX_LENGTH, MAX_TOKENS, ROWS = 512, 2048, 256


@dataclass
class Calibration:
    """What the full model does on the calibration text.

    Attributes:
        plan: of the extraction.
        ids: token rows.
        inputs: [N, I] per layer that is taken, float32.
        log_probs: log-probabilities [N, V] of the full model per text, float32.
        device: where models run.
    """

    plan: ExtractionPlan
    ids: list[Tensor]
    inputs: dict[str, Tensor]
    log_probs: list[Tensor]
    device: str

    @classmethod
    def read(cls, plan: ExtractionPlan, texts: Sequence[str], device: str) -> Calibration:
        """Run the full model over the texts.

        Raises:
            PeftMoeError: the model has no tokenizer or no logits, or the texts have no tokens.
        """
        ids = _token_rows(plan, texts)
        model = _load(plan.model.folder, plan, device)
        inputs: dict[str, list[Tensor]] = {}
        handles = []
        for pair in plan.taken:
            hook = partial(_keep, pair.name, inputs)
            handles.append(model.get_submodule(pair.name).register_forward_pre_hook(hook))
        log_probs = list(_log_probs(model, ids, device))
        for handle in handles:
            handle.remove()
        found = cls(plan, ids, {name: _spread(rows) for name, rows in inputs.items()}, log_probs, device)
        _free(model)
        return found

    def divergence(self, adapter: str) -> tuple[float, float]:
        """Mean KL per token, in nats: of the model from base + adapter, and from the bare base."""
        base = _load(self.plan.base.folder, self.plan, self.device)
        bare = self._kl(base)
        model = PeftModel.from_pretrained(base, adapter).eval()
        mixed = self._kl(model)
        _free(base)
        return mixed, bare

    def _kl(self, model: nn.Module) -> float:
        total, tokens = 0.0, 0
        for wanted_NV, found_NV in zip(self.log_probs, _log_probs(model, self.ids, self.device), strict=True):
            kl_N = functional.kl_div(found_NV, wanted_NV, log_target=True, reduction="none").sum(-1)
            total, tokens = total + float(kl_N.double().sum()), tokens + len(kl_N)
        return total / tokens


def _token_rows(plan: ExtractionPlan, texts: Sequence[str]) -> list[Tensor]:
    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(plan.base.folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise PeftMoeError(
            f"calibration text needs a tokenizer, and {plan.base.location} has none that can be read "
            f"({str(error).splitlines()[0]}); save it beside the base, or leave the text out"
        ) from error
    rows, left = [], MAX_TOKENS
    for text in texts:
        row = torch.tensor(tokenizer(text)["input_ids"][: min(MAX_LENGTH, left)], dtype=torch.long)
        if len(row):
            rows.append(row)
            left -= len(row)
    if not rows:
        raise PeftMoeError(f"the {len(texts)} calibration texts have no tokens; give longer ones")
    return rows


def _load(folder: str, plan: ExtractionPlan, device: str) -> nn.Module:
    import transformers

    kind: Any = getattr(transformers, plan.class_name)
    if not plan.class_name.endswith(("ForCausalLM", "LMHeadModel")):
        raise PeftMoeError(
            f"calibration text is for decoders with a language model's head, not for {plan.class_name}; "
            "leave it out"
        )
    # Both in one precision, else their rounding would count as the adapter's error.
    with quiet_transformers():
        return kind.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False).to(device).eval()


def _keep(name: str, inputs: dict[str, list[Tensor]], layer: nn.Module, args: tuple[Any, ...]) -> None:
    inputs.setdefault(name, []).append(args[0].detach().flatten(0, -2).float().cpu())


def _spread(rows: list[Tensor]) -> Tensor:
    """At most ``ROWS`` rows, evenly from all texts."""
    x_NI = torch.cat(rows)
    return x_NI[:: max(1, -(-len(x_NI) // ROWS))].clone()


def _log_probs(model: nn.Module, ids: Sequence[Tensor], device: str) -> Iterator[Tensor]:
    for row in ids:
        with torch.no_grad():
            logits_NV = model(input_ids=row[None].to(device), use_cache=False).logits[0]
        yield logits_NV.float().log_softmax(-1).cpu()


def _free(model: nn.Module) -> None:
    del model
    gc.collect()
