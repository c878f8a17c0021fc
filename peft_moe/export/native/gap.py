"""What an approximate native export learns from texts, and how far the written model is from the mixture.

Every other text is measured, the rest is fitted on. Letters: N tokens, H hidden size, E experts, X columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM

from ...errors import PeftMoeError
from ...io.checkpoint import quiet_transformers
from ...routing.context import Routing, record_routing
from ...tuner.layers.shared_router import MODEL_ROUTER
from ..base_model import find_tokenizer, load_on_base
from ..mixture_tensors import Mixture
from ..report import ExportReport
from .gates import Gate
from .plan import NativePlan

MAX_TOKENS = 512
MAX_TEXTS = 256
_RIDGE = 1e-3  # of the mean square of the input
_FLOOR = 1e-6  # of a weight, before its logarithm is fitted
# Where nobody gives texts: prose, instructions, code and sums, in a few languages.
BUILT_IN = (
    "The river had risen in the night, and by morning the lower fields lay under a sheet of brown water.",
    "Question: A train leaves at 9:40 and arrives at 13:05. How long is it?\nAnswer: 3 hours 25 minutes.",
    "def fibonacci(n):\n    a, b = 0, 1\n    for _ in range(n):\n        a, b = b, a + b\n    return a",
    "Write a polite letter to a landlord, asking for the heating to be repaired before the winter.",
    "Die Stadt liegt an einem Fluss, und im Sommer sitzen die Leute abends lange auf den Brücken.",
    "Photosynthesis turns light, water and carbon dioxide into sugar and oxygen, in the leaves of plants.",
    "SELECT name, COUNT(*) FROM orders JOIN customers USING (id) GROUP BY name ORDER BY 2 DESC LIMIT 10;",
    "If 3x + 7 = 22, then 3x = 15 and x = 5. The sum of the first ten odd numbers is 100.",
    "Le médecin regarda l'heure, remit son manteau et dit qu'il reviendrait le lendemain matin.",
    "The court held that the contract was void, since neither party had been able to perform it.",
)


class Evidence:
    """A mixture on its base, and texts to look at it with.

    Args:
        mixture: what is exported.
        model: the mixture in memory, in eval mode.
        rows: token ids [T] of each text.
        plan: what is to be written.
    """

    def __init__(self, mixture: Mixture, model: Any, rows: Sequence[Tensor], plan: NativePlan) -> None:
        self.mixture, self.model, self.plan = mixture, model, plan
        self.held_out, self.seen = list(rows[::2]), list(rows[1::2])
        self._inputs: dict[str, list[Tensor]] = {}
        self._decisions: dict[str, list[Routing]] = {}
        if plan.obstacles:
            self._look()

    def _look(self) -> None:
        """Run the texts that are fitted on, and keep what each network reads and what is decided."""
        base, handles = self.model.get_base_model(), []
        read: dict[str, Tensor] = {}  # of the running text; a probe's pass comes before the one that counts
        for layer in self.plan.gates:
            home = f"model.layers.{layer}.mlp"

            def keep(module: nn.Module, args: Any, home: str = home) -> None:
                read[home] = args[0].detach().reshape(-1, args[0].shape[-1]).float().cpu()

            handles.append(base.get_submodule(home).register_forward_pre_hook(keep))
        try:
            for row in self.seen:
                with torch.no_grad(), record_routing() as record:
                    logits_of(self.model, row)
                for home, x_NH in read.items():
                    self._inputs.setdefault(home, []).append(x_NH)
                for name, routing in record.decisions.items():
                    self._decisions.setdefault(name, []).append(routing)
        finally:
            for handle in handles:
                handle.remove()

    def _of(self, module: str) -> list[Routing] | None:
        names = (module, module.rpartition(".")[0], f"{MODEL_ROUTER}.{self.mixture.adapter}")
        return next((self._decisions[name] for name in names if name in self._decisions), None)

    def mean_gates(self, module: str) -> Tensor:
        """Mean gates [E] of one module over the texts; those of a router that reads nothing as they are."""
        found = self._of(module)
        if found is None:
            return self.mixture.gates(module).float()
        rows = [r.gates.detach().float().cpu().reshape(-1, r.gates.shape[-1]) for r in found]
        return torch.cat(rows).mean(0)

    def fitted_gate(self, home: str, gate: Gate) -> Tensor:
        """A matrix [X, H] whose scores are nearest to the router's, by least squares."""
        x_NH = torch.cat(self._inputs[home]).double()
        target_NX = torch.cat([self._scores(home, n, len(x)) for n, x in enumerate(self._inputs[home])])
        start_XH = torch.zeros(target_NX.shape[1], x_NH.shape[1], dtype=torch.double)
        if gate.weight is not None:  # only a bias is left to fit
            start_XH = gate.weight.double()
        rest_NX = target_NX - x_NH @ start_XH.T
        rest_NX = rest_NX - rest_NX.mean(1, keepdim=True)  # a softmax does not see it
        square_HH = x_NH.T @ x_NH
        square_HH.diagonal().add_(_RIDGE * float(square_HH.diagonal().mean()) + 1e-12)
        return (start_XH + torch.linalg.solve(square_HH, x_NH.T @ rest_NX).T).float()

    def _scores(self, home: str, text: int, tokens: int) -> Tensor:
        """Scores [N, X] of one text whose softmax are the router's weights."""
        found, settings = self._of(home), self.mixture.config.router_settings()
        if found is None:
            gates_NE = self.mixture.gates(f"{home}.down_proj").double()[None]
        elif settings.scoring_func == "softmax" and found[text].logits is not None:
            logits = found[text].logits
            assert logits is not None
            return _per_token(logits, tokens)
        else:
            gates_NE = _per_token(found[text].gates, tokens)
        columns_NX = gates_NE[:, list(settings.routed)].expand(tokens, -1)
        if settings.null_expert:
            rest_N1 = (1 - columns_NX.sum(1, keepdim=True)).clamp_min(0)
            columns_NX = torch.cat([columns_NX, rest_N1], dim=1)
        return columns_NX.clamp_min(_FLOOR).log()


def gather_evidence(
    mixture: Mixture, plan: NativePlan, data: Any, base: str | None, dtype: torch.dtype | None,
    report: ExportReport,
) -> Evidence:  # fmt: skip
    """Texts and the mixture that is run on them.

    Args:
        mixture: a model in memory is run as it is, a folder is loaded on its base.
        plan: what is to be written.
        data: a ``.jsonl`` file, texts, or rows of token ids; None takes a few built-in texts.
        base, dtype: as in ``export``.
        report: gets notes.

    Raises:
        PeftMoeError: fewer than two texts, or no tokenizer for them.
    """
    rows = token_rows(data, (mixture.folder, plan.base.folder))
    model = mixture.model
    if model is None:
        model, _ = load_on_base(
            mixture, base or mixture.base, dtype, ExportReport("", "", report.out, None, [])
        )
    if model.training:
        raise PeftMoeError("the mixture is in training mode; call model.eval() before it is exported")
    return Evidence(mixture, model, rows, plan)


def token_rows(data: Any, places: Sequence[Any]) -> list[Tensor]:
    """Token ids [T] of each text, at most :data:`MAX_TOKENS` of each."""
    if isinstance(data, Tensor):
        rows = list(data)
    else:
        texts = list(BUILT_IN) if data is None else _texts(data)
        tokenizer = find_tokenizer(places, "give token ids [N, T] as `data`")
        rows = [torch.tensor(ids) for ids in tokenizer(texts)["input_ids"]]
    rows = [row[:MAX_TOKENS] for row in rows if len(row) > 1][:MAX_TEXTS]
    if len(rows) < 2:
        raise PeftMoeError(f"data: {len(rows)} texts of two tokens or more; give at least 2")
    return rows


def _texts(data: Any) -> list[str]:
    from ...io.text_data import load_text_dataset

    if isinstance(data, list | tuple):
        return [str(text) for text in data]
    rows = data if hasattr(data, "column_names") else load_text_dataset(data)
    return [_one_text(row) for row in rows]


def _one_text(row: Any) -> str:
    if "messages" in row:
        return "\n".join(str(message["content"]) for message in row["messages"])
    return str(row["text"]) if "text" in row else f"{row['prompt']}{row['completion']}"


def logits_of(model: Any, row: Tensor) -> Tensor:
    """Logits [T, V] of one text, float32 or wider."""
    device = next(model.parameters()).device
    logits = model(input_ids=row[None].to(device), use_cache=False).logits[0].detach().cpu()
    found: Tensor = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return found


def measure_gap(evidence: Evidence, folder: Path) -> dict[str, Any]:
    """KL, loss, agreement and the largest difference of logits between the written model and the mixture."""
    with quiet_transformers():
        native = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", trust_remote_code=False).eval()  # type: ignore[no-untyped-call]  # untyped, torch's
    rows = {name: dict.fromkeys(("kl", "loss", "agreement"), 0.0) for name in ("native", "mixture")}
    tokens, most = 0, 0.0
    with torch.no_grad():
        for row in evidence.held_out:
            lesson_NV, found_NV = logits_of(evidence.model, row)[:-1], logits_of(native, row)[:-1]
            most = max(most, float((lesson_NV - found_NV).abs().max()))
            tokens += len(lesson_NV)
            for name, logits_NV in (("native", found_NV), ("mixture", lesson_NV)):
                _add(rows[name], lesson_NV.double(), logits_NV.double(), row[1:])
    held_out = {name: {k: v / tokens for k, v in one.items()} for name, one in rows.items()}
    texts = {
        "fitted": len(evidence.seen) if evidence.plan.obstacles else 0,
        "held_out": len(evidence.held_out),
    }
    held_out["native"]["max_logit_difference"] = most
    return {"texts": texts, "held_out_tokens": tokens, "held_out": held_out}


def _add(gap: dict[str, float], lesson_NV: Tensor, logits_NV: Tensor, target_N: Tensor) -> None:
    wanted_NV, found_NV = lesson_NV.log_softmax(-1), logits_NV.log_softmax(-1)
    gap["kl"] += float((wanted_NV.exp() * (wanted_NV - found_NV)).sum())
    gap["loss"] += float(functional.nll_loss(found_NV, target_N.long(), reduction="sum"))
    gap["agreement"] += float((lesson_NV.argmax(-1) == logits_NV.argmax(-1)).sum())


def _per_token(values: Tensor, tokens: int) -> Tensor:
    """[tokens, ·] of [B, T, ·] or of one decision for all of a text."""
    return values.detach().double().cpu().reshape(-1, values.shape[-1]).expand(tokens, -1)
