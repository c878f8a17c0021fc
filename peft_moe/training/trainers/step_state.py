"""Numbers that move from step to step beside the weights, and how they survive a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from ...routers import Router
from ...routing.context import RoutingRecord
from ...tuner.config.mixture import MoLoraConfig
from .adaptive_weights import AdaptiveWeights
from .distributed import process_count, summed
from .load_balancing import BiasBalancer, SparsitySteering


class RouterState(TrainerCallback, ExportableState):
    """Keeps ``values`` in the trainer's state, which JSON stores to the last bit.

    transformers restores callbacks only where ``restore_callback_states_from_checkpoint`` is set, and then
    replaces them by new ones; here the numbers always come back, since a resumed run without them would
    be another run.
    """

    def __init__(self) -> None:
        self.values: dict[str, float] = {}

    def state(self) -> dict[str, Any]:
        """What a checkpoint stores."""
        return {"args": {}, "attributes": {"values": dict(self.values)}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the values of the checkpoint that the run goes on from."""
        stored = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        stored = stored[-1] if isinstance(stored, list) else stored
        self.values.update(stored["attributes"]["values"])


class AroundSteps(TrainerCallback):
    """Calls back when training begins, with the weights in place, and after each optimizer step.

    Args:
        begin, step: what to call.
    """

    def __init__(self, begin: Callable[[], None], step: Callable[[], None]) -> None:
        self.begin, self.step = begin, step

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Training begins."""
        self.begin()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The weights have moved."""
        self.step()


class Movers:
    """Everything that moves between optimizer steps and is no trained weight.

    Args:
        config: the mixture's.
        routers: by the name under which their decisions are recorded.
        values: where the numbers are kept, see :class:`RouterState`; biases are kept in the routers.
    """

    def __init__(self, config: MoLoraConfig, routers: Mapping[str, Router], values: dict[str, float]) -> None:
        self.values = values
        self.balancer = BiasBalancer(routers)
        self.sparsity: SparsitySteering | None = None
        self.adaptive: AdaptiveWeights | None = None
        if config.router_l1_coef and config.router_l1_target is not None:
            values.setdefault("l1_weight", float(config.router_l1_coef))
            self.sparsity = SparsitySteering(routers, config.router_l1_target, values)
        if config.distillation_adaptive:
            self.adaptive = AdaptiveWeights(values)

    def count_decisions(self, record: RoutingRecord) -> None:
        """Take note of one forward pass of training."""
        self.balancer.count(record)
        if self.sparsity is not None:
            self.sparsity.count(record)

    def count_losses(self, language: Tensor, distillation: Tensor, share: int, steps: int) -> None:
        """Take note of the two losses of one micro-batch.

        Args:
            language, distillation: as they are returned to the trainer.
            share: by what they are divided already, of the step's accumulation.
            steps: micro-batches of the step.
        """
        if self.adaptive is not None:
            self.adaptive.count(language * share / steps, distillation * share / steps)

    def distillation_factors(self) -> tuple[float, float]:
        """Of the language model's loss and of the distillation, beside its coefficient."""
        return self.adaptive.factors if self.adaptive is not None else (1.0, 1.0)

    def step(self) -> None:
        """An optimizer step is done."""
        self.balancer.step()
        if self.sparsity is not None:
            self.sparsity.step()
        if self.adaptive is not None:
            self.adaptive.step(lambda losses: summed(losses) / process_count())

    def report(self) -> dict[str, float]:
        """For the log: the largest bias, the L1 weight, the factors of distillation."""
        logs = {}
        if self.balancer.routers:
            logs["router_bias_max"] = self.balancer.largest()
        if self.sparsity is not None:
            logs["router_l1_weight"] = self.values["l1_weight"]
        if self.adaptive is not None:
            logs["language_factor"], logs["distillation_factor"] = self.adaptive.factors
        return logs
