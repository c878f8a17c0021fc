"""One batch, a mixture of its own for each row: PEFT's ``adapter_names``, at inference.

Every mixture that the rows name decides for the whole batch, as if it were alone. So its routers, its taps
and its decisions in a KV cache are independent of the other mixtures. Each layer applies a mixture to its
own rows only.

Letters: B rows as given, N rows as a layer sees them, I in, O out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ..errors import PeftMoeError
from .context import Request, Routing, current_request, requesting

BASE = "__base__"


def named_adapters(row_adapters: Sequence[str]) -> list[str]:
    """The mixtures that rows name, in order."""
    return [name for name in dict.fromkeys(row_adapters) if name != BASE]


@contextmanager
def mixed_batch(model: nn.Module, names: Sequence[str], arguments: Sequence[Any]) -> Iterator[None]:
    """Run the model's calls inside with one adapter per row.

    Args:
        model: the base with its mixtures.
        names: one adapter per row, ``"__base__"`` for none.
        arguments: those of the call.

    Raises:
        PeftMoeError: training mode, merged adapters, unknown names, or another number of rows.
    """
    layers: list[Any] = [module for module in model.modules() if hasattr(module, "molora_A")]
    if any(layer.merged for layer in layers):
        raise PeftMoeError(
            "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
        )
    adapters = {adapter for layer in layers for adapter in layer.molora_A}
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise PeftMoeError(f"adapter_names={names!r} must be a list with one adapter's name for each row")
    if model.training:
        raise PeftMoeError(
            "Cannot pass `adapter_names` when the model is in training mode. Call model.eval(), or train one "
            "adapter at a time with set_adapter()"
        )
    unknown = sorted(set(names) - adapters - {BASE})
    if unknown:
        raise PeftMoeError(
            f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}; this model has "
            f"{', '.join(sorted(adapters))}, and {BASE} stands for the bare base"
        )
    first = next((value for value in arguments if isinstance(value, Tensor) and value.dim() > 0), None)
    if first is not None and len(first) != len(names):
        raise _wrong_length(names, len(first))
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, AuxiliaryTrainingWrapper):
                handle = module.register_forward_pre_hook(_tell(tuple(names)), with_kwargs=True)
                stack.callback(handle.remove)
        now = current_request()
        # Written out: the compiler's tracer does not follow dataclasses.replace.
        stack.enter_context(
            requesting(Request(now.controls, now.inputs, now.recorder, tuple(names), now.generation))
        )
        yield


def _wrong_length(names: Sequence[str], rows: int) -> PeftMoeError:
    return PeftMoeError(
        "Length of `adapter_names` should be the same as the number of inputs, but got "
        f"{len(names)} and {rows} respectively."
    )


def _tell(names: tuple[str, ...]) -> Callable[..., Any]:
    # PEFT's own modules beside a mixture (modules_to_save, trained tokens) take the names as an argument.
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        repeats = len(args[0]) // len(names) if args and len(names) else 1
        return args, {**kwargs, "adapter_names": [name for name in names for _ in range(repeats)]}

    return hook


def rows_of(names: Sequence[str], adapter: str, x: Tensor, layer_name: str) -> Tensor:
    """Return the numbers of the rows of a layer's input [N, …, I] that belong to an adapter.

    N is B, or a multiple of B in a generation with several beams and in a layer that reads flat tokens. Both
    keep the rows of one sequence together.

    Raises:
        PeftMoeError: the layer sees other rows than those of the batch, and they cannot be told apart.
    """
    rows = x.shape[0]
    loose = ".experts." in layer_name  # experts of a sparse base read tokens in another order
    if not names or rows % len(names) or loose:
        seen = "loose tokens" if loose else f"{rows} rows where the batch has {len(names)}"
        raise PeftMoeError(
            f"{layer_name} sees {seen}, so that adapter_names cannot say whose they are; run one batch per "
            "adapter with set_adapter(), or leave this layer out of target_modules"
        )
    repeats = rows // len(names)
    own_rows = [row for row, name in enumerate(names) if name == adapter]
    first_row = torch.tensor(own_rows, device=x.device, dtype=torch.long)[:, None] * repeats
    return (first_row + torch.arange(repeats, device=x.device)).flatten()


def narrow(routing: Routing, rows: Tensor, x: Tensor) -> Routing:
    """Return the part of a decision for all rows of ``x`` [N, …, I] that concerns some of them."""
    total = x.shape[0]

    def take(values: Tensor) -> Tensor:
        if values.shape[0] == values.shape[1] == 1:
            return values
        if values.shape[0] != total:
            # Flat tokens: a decision per token, or one that all tokens of a sequence share.
            columns = total // values.shape[0]
            values = values.expand(-1, columns, -1).reshape(total, 1, -1)
        return values[rows]

    return routing.bare().map(take)
