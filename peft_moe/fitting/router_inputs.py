"""What routers see: their true inputs, streamed over rows of text, in any scope.

Letters: B batch, T sequence, N rows of features, I in, E experts.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..errors import PeftMoeError
from ..routers import Router
from ..routing.context import RoutingContext, current_context, routing_inputs
from ..tuner.config.mixture import MoLoraConfig
from ..tuner.layers.linear import MoLoraLayer
from ..tuner.layers.model_router import ModelRouter
from ..tuner.layers.probe import TapReached, run_probe
from ..tuner.layers.shared_router import MODEL_ROUTER, BlockRouter
from .samples import Batch, Row, batches

Take = Callable[[str, Tensor, Tensor], None]
"""Called with a router's name, features [N, I] (float32 or wider) and labels [N]."""
INPUTS = ("base", "own")


class InputReader:
    """Runs the base over rows of text and hands out what each router would be given.

    Args:
        model: the model that carries the mixture (not the PeftModel around it).
        adapter: the mixture's name.
        config: the mixture's.
        inputs: what the experts do meanwhile: "base" (they add nothing), or "own" (each row's own expert
            is on, alone).
    """

    def __init__(self, model: nn.Module, adapter: str, config: MoLoraConfig, inputs: str) -> None:
        self.model, self.adapter, self.config, self.inputs = model, adapter, config, inputs
        self.seat: ModelRouter = getattr(model, MODEL_ROUTER)
        self.batch: Batch | None = None
        self.seen: set[str] = set()  # blocks whose first layer was called in this pass

    def stream(
        self,
        routers: Mapping[str, Router],
        rows: Sequence[Row],
        take: Take,
        *,
        batch_size: int,
        progress: bool,
        title: str,
    ) -> None:
        """Read all rows once; nothing of them is kept here.

        Args:
            routers: whose inputs are wanted, by name.
            rows: the texts.
            take: gets one row per real token, or one per prompt from a router that pools.
            batch_size: texts per pass.
            progress: whether to show a bar.
            title: of the bar.
        """
        device = next(self.model.parameters()).device
        was_training = self.model.training
        self.model.eval()
        bar = tqdm(total=len(rows), desc=title, unit="text", disable=not progress)
        try:
            with bar, torch.no_grad(), self._hooks(routers, take):
                for batch in batches(rows, batch_size):
                    self.batch = batch.to(device)
                    if self.config.router_scope == "model":
                        self._read_tap(next(iter(routers.items())), take)
                    else:
                        self._run()
                    bar.update(len(batch.labels))
        finally:
            self.batch = None
            self.model.train(was_training)

    def _read_tap(self, named: tuple[str, Router], take: Take) -> None:
        """Scope "model": the bare base up to its tap, and where layers below follow the prompt, those too."""
        name, router = named
        tap, batch = self.seat.taps[self.adapter], self._current
        context = RoutingContext(
            shape=tuple(batch.prompt.shape),  # type: ignore[arg-type]
            real=batch.call["attention_mask"].bool(),
            prompt=batch.prompt,
        )
        hidden_BTI = run_probe(self.model, tap, batch.call, context, None)
        if tap.below != "prompt":
            take(name, *self._rows(router, hidden_BTI, context, pool=router.pools))
            return
        # Two inputs, one router: prompts of the bare base for the layers below, tokens for those above.
        take(name, *self._rows(router, hidden_BTI, context, pool=True))
        with suppress(TapReached):
            self._run()

    def _run(self) -> None:
        batch = self._current
        accepted = inspect.signature(self.model.forward).parameters
        # Nobody reads the logits; of a large vocabulary they would be most of the memory.
        idle = {"use_cache": False, "logits_to_keep": 1}
        call = {**batch.call, **{name: value for name, value in idle.items() if name in accepted}}
        self.seen.clear()
        with routing_inputs(gates=self._gates(batch.labels), prompt_mask=batch.prompt):
            self.model(**call)

    @property
    def _current(self) -> Batch:
        assert self.batch is not None  # only while streaming
        return self.batch

    def _gates(self, labels_B: Tensor) -> Tensor:
        names, routed = self.config.expert_names, self.config.routed_names
        gates_BE = torch.zeros(len(labels_B), len(names), device=labels_B.device)
        for shared in self.config.shared_experts:
            gates_BE[:, names.index(shared)] = 1.0
        below = self.config.router_scope == "model"  # what lies below a tap follows the right expert
        for column, name in enumerate(routed if self.inputs == "own" or below else []):
            gates_BE[labels_B == column, names.index(name)] = 1.0
        return gates_BE

    @contextmanager
    def _hooks(self, routers: Mapping[str, Router], take: Take) -> Iterator[None]:
        scope, handles = self.config.router_scope, []
        if scope == "model":
            if self.seat.taps[self.adapter].below == "prompt":
                name, router = next(iter(routers.items()))
                hook = partial(self._at_tap, name, router, take)
                handles.append(
                    self.seat.taps[self.adapter].layer.register_forward_pre_hook(hook, with_kwargs=True)
                )
        else:
            for name, layers in self._readers().items():
                for layer in layers if name in routers else ():
                    hook = partial(self._at_layer, name, routers[name], take, layer)
                    handles.append(self.model.get_submodule(layer).register_forward_pre_hook(hook))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _readers(self) -> dict[str, list[str]]:
        """Layers whose input a router may read, by the router's name: the first that is called is meant."""
        found: dict[str, list[str]] = {}
        for module in self.model.modules():
            if isinstance(module, BlockRouter) and self.adapter in module.scopes:
                found[module.name] = list(module.linears[:-1])
                continue
            if not isinstance(module, MoLoraLayer):
                continue
            mixture = module.mixtures.get(self.adapter)
            if mixture is not None and mixture.ffn is None:
                shared = self.config.router_scope == "block"
                name = module.name.rpartition(".")[0] if shared else module.name
                found.setdefault(name, []).append(module.name)
        return found

    def _at_tap(
        self, name: str, router: Router, take: Take, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        context = current_context()
        if context is None or context.probing:
            return
        hidden_BTI = args[0] if args else kwargs["hidden_states"]
        take(name, *self._rows(router, hidden_BTI, context, pool=False))
        raise TapReached(hidden_BTI)

    def _at_layer(
        self, name: str, router: Router, take: Take, layer: str, module: nn.Module, args: tuple[Any, ...]
    ) -> None:
        context = current_context()
        if context is None or context.shape is None:
            return
        # The layers of a block follow the first that it calls.
        if name != layer and name in self.seen:
            return
        self.seen.add(name)
        x = args[0]
        if x.shape[:-1].numel() != context.shape[0] * context.shape[1]:
            raise PeftMoeError(
                f"{layer} was given {tuple(x.shape[:-1])} tokens in a call of {context.shape}: it sees "
                "other tokens than the text, so that labels cannot be told; leave it out of target_modules"
            )
        take(name, *self._rows(router, x.reshape(*context.shape, -1), context, pool=router.pools))

    def _rows(
        self, router: Router, hidden_BTI: Tensor, context: RoutingContext, *, pool: bool
    ) -> tuple[Tensor, Tensor]:
        features, labels_B = router.features(hidden_BTI, context, pool=pool), self._current.labels
        if pool:
            return features[:, 0], labels_B
        rows_BT = self._current.call["attention_mask"].bool()
        if router.runs:
            rows_BT = rows_BT & _apart(self._current.prompt, router.settings.window)
        return features[rows_BT], labels_B[:, None].expand(rows_BT.shape)[rows_BT]


def _apart(prompt_BT: Tensor, window: float) -> Tensor:
    """One token of the prompt, which share a summary; one half-life behind it; then two of each."""
    behind_BT = (~prompt_BT).cumsum(-1)
    first_BT = prompt_BT & (prompt_BT.cumsum(-1) == 1)
    early_BT = behind_BT <= round(window)
    return first_BT | (~prompt_BT & (early_BT | (behind_BT % max(1, round(window / 2)) == 0)))
