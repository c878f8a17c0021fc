"""The inputs of routers, read by hooks while the base runs over rows of text.

Where a router reads depends on its scope and on ``router_below_tap``:

- Scope "module": a hook on the layer itself.
- Scope "block": hooks on all layers of the block that may run first; the first one that is called counts.
- Scope "model": a probe runs the bare base up to the tap.
- Scope "model" with ``router_below_tap="prompt"``: the router has two inputs. For the layers below the tap,
the
  probe reads the prompts at the tap of the bare base. For the layers above it, a hook on the tap's layer
  reads the tokens in a second pass, in which each text's own expert is active below the tap.

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
from .samples import Batch, batches
from .token_rows import Row

Consume = Callable[[str, Tensor, Tensor], None]
"""A function of a router's name, features [N, I] (float32 or float64) and labels [N]."""
INPUTS = ("base", "own")


class InputReader:
    """Runs the model over rows of text and passes on each router's inputs.

    Args:
        model: the model that carries the mixture (not the PeftModel around it).
        adapter: the mixture's name.
        config: the mixture's.
        inputs: the experts that are active meanwhile: "base" (none), or "own" (each row's own expert). Shared
            experts are always active.
    """

    def __init__(self, model: nn.Module, adapter: str, config: MoLoraConfig, inputs: str) -> None:
        self.model, self.adapter, self.config, self.inputs = model, adapter, config, inputs
        self.model_router: ModelRouter = getattr(model, MODEL_ROUTER)
        self.batch: Batch | None = None
        self.seen: set[str] = set()  # names of block routers that have read their input in this pass

    def stream(
        self,
        routers: Mapping[str, Router],
        rows: Sequence[Row],
        consume: Consume,
        *,
        batch_size: int,
        progress: bool,
        title: str,
    ) -> None:
        """Read all rows once, without storing their features.

        Args:
            routers: the routers whose inputs are read, by name.
            rows: the texts.
            consume: gets one row per real token, or one per prompt for a router that pools.
            batch_size: texts per call.
            progress: whether to show a bar.
            title: title of the bar.
        """
        device = next(self.model.parameters()).device
        was_training = self.model.training
        self.model.eval()
        bar = tqdm(total=len(rows), desc=title, unit="text", disable=not progress)
        try:
            with bar, torch.no_grad(), self._hooks(routers, consume):
                for batch in batches(rows, batch_size):
                    self.batch = batch.to(device)
                    if self.config.router_scope == "model":
                        self._read_tap(next(iter(routers.items())), consume)
                    else:
                        self._run()
                    bar.update(len(batch.labels))
        finally:
            self.batch = None
            self.model.train(was_training)

    def _read_tap(self, named: tuple[str, Router], consume: Consume) -> None:
        """Read the input of the router of scope "model" at its tap, by one or two passes."""
        name, router = named
        tap, batch = self.model_router.taps[self.adapter], self._current
        context = RoutingContext(
            shape=tuple(batch.prompt.shape),  # type: ignore[arg-type]
            real=batch.call["attention_mask"].bool(),
            prompt=batch.prompt,
        )
        hidden_BTI = run_probe(self.model, tap, batch.call, context, None)
        if tap.below != "prompt":
            consume(name, *self._rows(router, hidden_BTI, context, pool=router.pools))
            return
        # First the input for the layers below the tap, then that for the layers above it.
        consume(name, *self._rows(router, hidden_BTI, context, pool=True))
        with suppress(TapReached):
            self._run()

    def _run(self) -> None:
        batch = self._current
        accepted = inspect.signature(self.model.forward).parameters
        # The logits are not needed; with a large vocabulary they would consume most of the memory.
        cheap = {"use_cache": False, "logits_to_keep": 1}
        call = {**batch.call, **{name: value for name, value in cheap.items() if name in accepted}}
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
        below = self.config.router_scope == "model"  # layers below a tap use the text's own expert
        for column, name in enumerate(routed if self.inputs == "own" or below else []):
            gates_BE[labels_B == column, names.index(name)] = 1.0
        return gates_BE

    @contextmanager
    def _hooks(self, routers: Mapping[str, Router], consume: Consume) -> Iterator[None]:
        scope, handles = self.config.router_scope, []
        if scope == "model":
            if self.model_router.taps[self.adapter].below == "prompt":
                name, router = next(iter(routers.items()))
                hook = partial(self._at_tap, name, router, consume)
                handles.append(
                    self.model_router.taps[self.adapter].layer.register_forward_pre_hook(
                        hook, with_kwargs=True
                    )
                )
        else:
            for name, layers in self._readers().items():
                for layer in layers if name in routers else ():
                    hook = partial(self._at_layer, name, routers[name], consume, layer)
                    handles.append(self.model.get_submodule(layer).register_forward_pre_hook(hook))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _readers(self) -> dict[str, list[str]]:
        """Return the names of the layers at which each router may read, by the router's name."""
        layers: dict[str, list[str]] = {}
        for module in self.model.modules():
            if isinstance(module, BlockRouter) and self.adapter in module.scopes:
                # The last linear of a feed-forward network is its output projection, whose input is not the
                # block's.
                layers[module.name] = list(module.linears[:-1])
                continue
            if not isinstance(module, MoLoraLayer):
                continue
            mixture = module.mixtures.get(self.adapter)
            if mixture is not None and mixture.ffn is None:
                shared = self.config.router_scope == "block"
                name = module.name.rpartition(".")[0] if shared else module.name
                layers.setdefault(name, []).append(module.name)
        return layers

    def _at_tap(
        self,
        name: str,
        router: Router,
        consume: Consume,
        layer: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        context = current_context()
        if context is None or context.probing:
            return
        hidden_BTI = args[0] if args else kwargs["hidden_states"]
        consume(name, *self._rows(router, hidden_BTI, context, pool=False))
        raise TapReached(hidden_BTI)

    def _at_layer(
        self,
        name: str,
        router: Router,
        consume: Consume,
        layer: str,
        module: nn.Module,
        args: tuple[Any, ...],
    ) -> None:
        context = current_context()
        if context is None or context.shape is None:
            return
        # Of the layers of a block, only the first one that is called counts.
        if name != layer and name in self.seen:
            return
        self.seen.add(name)
        x = args[0]
        if x.shape[:-1].numel() != context.shape[0] * context.shape[1]:
            raise PeftMoeError(
                f"{layer} got {tuple(x.shape[:-1])} tokens in a call of {context.shape}: it sees other "
                "tokens than the text, whose labels are unknown; leave it out of target_modules"
            )
        consume(name, *self._rows(router, x.reshape(*context.shape, -1), context, pool=router.pools))

    def _rows(
        self, router: Router, hidden_BTI: Tensor, context: RoutingContext, *, pool: bool
    ) -> tuple[Tensor, Tensor]:
        features, labels_B = router.features(hidden_BTI, context, pool=pool), self._current.labels
        if pool:
            return features[:, 0], labels_B
        rows_BT = self._current.call["attention_mask"].bool()
        if router.runs:
            rows_BT = rows_BT & _distinct_summaries(self._current.prompt, router.settings.window)
        return features[rows_BT], labels_B[:, None].expand(rows_BT.shape)[rows_BT]


def _distinct_summaries(prompt_BT: Tensor, window: float) -> Tensor:
    """Select the tokens [B, T] of a running router whose summaries differ enough to fit on.

    All tokens of the prompt share one summary, hence one token of it. Of the later tokens, all within one
    half-life are taken, then two per half-life, because neighbours there have almost the same running mean.
    """
    number_BT = (~prompt_BT).cumsum(-1)  # of tokens after the prompt
    first_BT = prompt_BT & (prompt_BT.cumsum(-1) == 1)
    early_BT = number_BT <= round(window)
    return first_BT | (~prompt_BT & (early_BT | (number_BT % max(1, round(window / 2)) == 0)))
