"""Numbers that change from step to step beside the weights, and their way through a checkpoint."""

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
from .load_balancing import BiasBalancer, SparsityController


# transformers stores the state of a callback in trainer_state.json under the name of its class, which nothing
# else can set. The name therefore stays: under another name, checkpoints of earlier runs would lose their
# numbers.
class RouterState(TrainerCallback, ExportableState):
    """Keeps ``values`` in the trainer's state, which JSON stores to the last bit.

    transformers restores callbacks only where ``restore_callback_states_from_checkpoint`` is set, and then
    replaces them by new ones. This callback always restores its numbers, because a resumed run without them
    would differ from the run that was stopped.
    """

    def __init__(self) -> None:
        self.values: dict[str, float] = {}

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint stores."""
        return {"args": {}, "attributes": {"values": dict(self.values)}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Restore the values from the checkpoint that the run resumes from."""
        stored = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        stored = stored[-1] if isinstance(stored, list) else stored
        self.values.update(stored["attributes"]["values"])


class StepCallback(TrainerCallback):
    """Calls a function when training begins, with all weights loaded, and another after each optimizer step.

    Args:
        begin, step: the two functions.
    """

    def __init__(self, begin: Callable[[], None], step: Callable[[], None]) -> None:
        self.begin, self.step = begin, step

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Call ``begin``."""
        self.begin()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Call ``step``."""
        self.step()


class StepUpdates:
    """Everything that changes between optimizer steps without gradients.

    Args:
        config: the mixture's.
        routers: by the name under which their decisions are recorded.
        values: stores the numbers, see :class:`RouterState`; balancing biases are buffers of the routers.
    """

    def __init__(self, config: MoLoraConfig, routers: Mapping[str, Router], values: dict[str, float]) -> None:
        self.values = values
        self.balancer = BiasBalancer(routers)
        self.sparsity: SparsityController | None = None
        self.adaptive: AdaptiveWeights | None = None
        if config.router_l1_coef and config.router_l1_target is not None:
            values.setdefault("l1_weight", float(config.router_l1_coef))
            self.sparsity = SparsityController(routers, config.router_l1_target, values)
        if config.distillation_adaptive:
            self.adaptive = AdaptiveWeights(values)

    def count_decisions(self, record: RoutingRecord) -> None:
        """Count the decisions of one forward pass in training."""
        self.balancer.count(record)
        if self.sparsity is not None:
            self.sparsity.count(record)

    def count_losses(self, language: Tensor, distillation: Tensor, divisor: int, steps: int) -> None:
        """Count the two losses of one micro-batch.

        Args:
            language, distillation: the losses as the trainer gets them.
            divisor: what both are divided by already, see ``RouterTrainerMixin._accumulation_divisor``.
            steps: micro-batches per optimizer step.
        """
        if self.adaptive is not None:
            self.adaptive.count(language * divisor / steps, distillation * divisor / steps)

    def distillation_factors(self) -> tuple[float, float]:
        """Return the adaptive factors of the language model's loss and of the distillation loss."""
        return self.adaptive.factors if self.adaptive is not None else (1.0, 1.0)

    def step(self) -> None:
        """Update everything by what was counted since the last optimizer step."""
        self.balancer.step()
        if self.sparsity is not None:
            self.sparsity.step()
        if self.adaptive is not None:
            self.adaptive.step()

    def report(self) -> dict[str, float]:
        """Return what the log shows: the largest bias, the L1 weight, the factors of distillation."""
        logs = {}
        if self.balancer.routers:
            logs["router_bias_max"] = self.balancer.largest()
        if self.sparsity is not None:
            logs["router_l1_weight"] = self.values["l1_weight"]
        if self.adaptive is not None:
            logs["language_factor"], logs["distillation_factor"] = self.adaptive.factors
        return logs
