"""PHATGOOSE: one gate per expert, trained with that expert alone on its own samples (arXiv 2402.05859).

Letters: B batch, T sequence, I in, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..routers import Router
from ..routers.pooling import spread_turns
from ..routing.context import Routing, RoutingContext, routing_inputs
from ..routing.model_call import IGNORE
from ..tuner.config.mixture import MoLoraConfig
from .samples import batches
from .streaming import StreamSettings
from .token_rows import TokenRows

_WARM_UP = 0.06  # share of the steps, as in the paper's code


def train_vectors(
    model: nn.Module,
    config: MoLoraConfig,
    routers: Mapping[str, Router],
    rows: TokenRows,
    settings: StreamSettings,
    *,
    steps: int,
    learning_rate: float,
) -> dict[str, tuple[float, float]]:
    """Train the vector v of every expert's gate σ(v·x) with the language model's loss; all else is frozen.

    Args:
        model: the model that carries the mixture.
        config: the mixture's.
        routers: all routers of the mixture, by name; the vectors are the weights of their scorers.
        rows: the texts; the loss is on completions, or on the whole text where there is no completion.
        settings: batch size, seed, progress bar.
        steps: optimizer steps per expert.
        learning_rate: of AdamW without weight decay; constant after a short warm-up.

    Returns:
        Each expert's mean loss in the first and in the last tenth of its steps, by name.
    """
    losses = {}
    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    was_training = model.training
    model.eval().requires_grad_(False)
    try:
        with tqdm(
            total=steps * len(config.routed_names), desc="Training gates", disable=not settings.progress
        ) as bar:
            for column, expert in enumerate(config.routed_names):
                indices = [index for index, label in enumerate(rows.labels) if label == column]
                gates = _Gates(routers, column, config.expert_names.index(expert))
                history = []
                for loss in _steps(model, gates, rows, indices, settings, steps, learning_rate):
                    history.append(loss)
                    bar.update()
                    bar.set_postfix(expert=expert, loss=f"{loss:.3f}")
                gates.store()
                tenth = max(1, steps // 10)
                losses[expert] = (float(np.mean(history[:tenth])), float(np.mean(history[-tenth:])))
    finally:
        model.train(was_training)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trainable[name])
    return losses


class _Gates:
    """The gate vectors of one expert, one per router; they start at zero, which is a gate of one half."""

    def __init__(self, routers: Mapping[str, Router], column: int, expert: int) -> None:
        self.routers, self.column, self.expert = list(routers.values()), column, expert
        self.vectors = []
        for router in self.routers:
            weight = router.scorer.get_parameter("weight")
            self.vectors.append(torch.zeros_like(weight[column]).requires_grad_())

    def store(self) -> None:
        """Write the vectors into the scorers."""
        with torch.no_grad():
            for router, vector_I in zip(self.routers, self.vectors, strict=True):
                router.scorer.get_parameter("weight")[self.column] = vector_I

    @contextmanager
    def deciding(self) -> Iterator[None]:
        """Make routers return the gate σ(v·x) for the expert, 1 for shared experts, 0 for the others."""
        handles = [
            router.register_forward_hook(partial(self._decide, vector_I), with_kwargs=True)
            for router, vector_I in zip(self.routers, self.vectors, strict=True)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _decide(
        self, vector_I: Tensor, router: Router, args: tuple[Any, ...], kwargs: dict[str, Any], output: Routing
    ) -> Routing:
        context: RoutingContext | None = args[1] if len(args) > 1 else kwargs.get("context")
        pool = bool(kwargs.get("pool")) or router.pools
        with torch.autocast(device_type=args[0].device.type, enabled=False):
            features_BTI = router.features(args[0], context, pool=pool)
            gate_BT = torch.sigmoid(features_BTI @ vector_I.to(features_BTI.dtype))
        expert_E = gate_BT.new_zeros(router.settings.num_experts)
        expert_E[self.expert] = 1.0
        shared_E = gate_BT.new_zeros(router.settings.num_experts)
        shared_E[list(router.settings.shared)] = 1.0
        routing = Routing(gates=gate_BT[..., None] * expert_E + shared_E)
        return spread_turns(routing, context) if pool and context is not None else routing


def _steps(
    model: nn.Module,
    gates: _Gates,
    rows: TokenRows,
    indices: Sequence[int],
    settings: StreamSettings,
    steps: int,
    learning_rate: float,
) -> Iterator[float]:
    """Train one expert's vectors on its rows, and yield the loss of each step."""
    optimizer = torch.optim.AdamW(gates.vectors, lr=learning_rate, weight_decay=0.0)
    warm_up = max(1, int(_WARM_UP * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / warm_up))
    draw = np.random.default_rng(settings.seed)
    device = next(model.parameters()).device
    order: list[int] = []
    for _ in range(steps):
        while len(order) < settings.batch_size:
            order += draw.permutation(indices).tolist()
        chosen, order = order[: settings.batch_size], order[settings.batch_size :]
        batch = next(batches([rows[index] for index in chosen], settings.batch_size)).to(device)
        padding_BT = batch.call["attention_mask"] == 0
        no_completion_B = (batch.prompt | padding_BT).all(-1)
        ignored_BT = padding_BT | (batch.prompt & ~no_completion_B[:, None])
        labels_BT = batch.call["input_ids"].masked_fill(ignored_BT, IGNORE)
        with gates.deciding(), routing_inputs(prompt_mask=batch.prompt), torch.enable_grad():
            loss: Tensor = model(**batch.call, labels=labels_BT).loss
        loss.backward()  # type: ignore[no-untyped-call]  # torch annotates it incompletely
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        yield float(loss.detach())
