"""Router weights when experts come, go or change places: which rows stay, and how new ones start.

Letters: X columns (routed experts, plus the null expert).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import PeftMoeError, near_matches
from ..routers import Router, RouterSettings
from ..routers.scorers.batch_info import PolyScorer
from ..routers.scorers.constant import StaticScorer
from ..routers.scorers.learned import LinearScorer, MLPScorer
from ..routers.scorers.prototypes import ArrowScorer
from .plan import Edit, blocks

INITS = ("mean", "zero", "centroid", "fit", "refit")
"""How a new expert's router row starts, where the router has rows."""
# exp(-1e4) is 0 in every float; a column with such a score has no mass, whatever the others' scores are.
_NEVER = -1.0e4
# Which parameter of a scorer is added to one column's score, whatever the input is.
_OFFSETS: dict[type, str] = {
    LinearScorer: "bias",
    MLPScorer: "out.bias",
    StaticScorer: "weight",
    PolyScorer: "weight",
}
_PROBE = 3  # ranks per expert while axes are looked for


def column_axes(settings: RouterSettings, router_name: str) -> dict[str, dict[int, str]]:
    """Which axes of a router's tensors run over experts: by tensor's name, axis to kind.

    Kinds: "column" (routed experts, plus the null expert), "expert" (routed experts only) and "rank" (their
    ranks). Found by making the router without memory, also with one expert or one rank more: what grows by
    one is an axis of columns. So any registered scorer can be edited, and none needs to describe itself.

    Raises:
        PeftMoeError: a tensor grows in another way.
    """
    small, large = _shapes(settings), _shapes(replace(settings, num_experts=settings.num_experts + 1))
    wide = _shapes(settings, _PROBE + 1)
    axes: dict[str, dict[int, str]] = {}
    for name, shape in small.items():
        axes[name] = {}
        for dim, (before, after) in enumerate(zip(shape, large[name], strict=True)):
            by_rank = wide[name][dim] != before
            kind = {
                (0, before, False): "",
                (1, settings.num_columns, False): "column",
                (1, len(settings.routed), False): "expert",
                (_PROBE, _PROBE * len(settings.routed), True): "rank",
            }.get((after - before, before, by_rank))
            if kind is None:
                raise PeftMoeError(
                    f"router={router_name!r}: {name} grows from {tuple(shape)} to {tuple(large[name])} with "
                    "one more expert, which is no axis of columns; its mixtures cannot be edited"
                )
            if kind:
                axes[name][dim] = kind
    return axes


def _shapes(settings: RouterSettings, ranks: int = _PROBE) -> dict[str, torch.Size]:
    with torch.device("meta"):
        router = Router(settings, 5)
        router.scorer.expect_experts((ranks,) * settings.num_experts)
    return {name: value.shape for name, value in router.state_dict().items()}


@dataclass(frozen=True)
class Columns:
    """How a router's columns move.

    Attributes:
        edit: what happens to the experts.
        before, after: settings of the router.
        axes: from :func:`column_axes`.
        ranks_before, ranks_after: of all experts in the router's layer; None for a router of several layers.
    """

    edit: Edit
    before: RouterSettings
    after: RouterSettings
    axes: Mapping[str, Mapping[int, str]]
    ranks_before: tuple[int, ...] | None = None
    ranks_after: tuple[int, ...] | None = None

    def carry(self, name: str, value: Tensor, fresh: Tensor | None = None) -> Tensor:
        """One tensor of the router with its columns in their new places.

        Args:
            name: of the tensor.
            value: as it was, or anything of that shape, such as an optimizer's moments.
            fresh: of the new shape: what new columns start from; None starts them at zero.
        """
        for dim, kind in self.axes.get(name, {}).items():
            sizes, old, sizes_after = self._layout(kind)
            starts = [sum(sizes_after[:place]) for place in range(len(sizes_after))]
            new = []
            for place, before in enumerate(old):
                shape = list(value.shape)
                shape[dim] = sizes_after[place]
                empty = value.new_zeros(shape)
                if before is None and fresh is not None:
                    part = fresh.narrow(dim, starts[place], sizes_after[place])
                    # Other axes of several may still have their old length; they get their own turn.
                    empty = part.to(value) if part.shape == empty.shape else empty
                new.append(empty if before is None else None)
            value = blocks(value, dim, sizes, old, new)
        return value

    def _layout(self, kind: str) -> tuple[list[int], list[int | None], list[int]]:
        """Sizes before, places, and sizes after of one kind of axis."""
        routed, order = self.before.routed, []
        for place in self.after.routed:
            old = self.edit.row_places[place]
            order.append(None if old is None else routed.index(old))
        if kind == "rank":
            assert self.ranks_before is not None
            assert self.ranks_after is not None
            return (
                [self.ranks_before[expert] for expert in routed],
                order,
                [self.ranks_after[expert] for expert in self.after.routed],
            )
        null = kind == "column" and self.before.null_expert
        sizes = [1] * (len(routed) + null)
        order += [len(routed)] * null
        return sizes, order, [1] * len(order)

    @property
    def new_columns(self) -> list[int]:
        """Columns of new experts."""
        return [
            column for column, place in enumerate(self.after.routed) if self.edit.row_places[place] is None
        ]


def check_init(init: str | None, settings: RouterSettings, router: Router, router_name: str) -> str:
    """How a new row starts with this router: what was asked for, or what is natural.

    Raises:
        PeftMoeError: an unknown word, or one that cannot be with this router, with the reason.
    """
    scorer = router.scorer
    rows = any(column_axes(settings, router_name).values())
    if init is None:
        return "mean" if rows and not scorer.reads_experts else "own"
    if init not in INITS:
        raise PeftMoeError(f"init={init!r} is not known.{near_matches(init, INITS)}")
    if init == "zero":
        _check_zero(settings, router, router_name)
    elif scorer.reads_experts or not rows:
        why = "is made from the experts' weights" if scorer.reads_experts else "has no rows to start"
        raise PeftMoeError(
            f"init={init!r} has no effect with router={router_name!r}, which {why}; leave it out"
        )
    return init


def _check_zero(settings: RouterSettings, router: Router, router_name: str) -> None:
    scorer, why = router.scorer, ""
    if settings.topk_method == "expert_choice":
        why = "with topk_method='expert_choice' an expert takes more tokens the fewer there are"
    elif settings.scoring_func == "none" and settings.is_sparse:
        why = "with scoring_func='none' and top_k an expert of weight 0 takes the place of one below 0"
    elif not isinstance(scorer, (*_OFFSETS, ArrowScorer)):
        why = f"router={router_name!r} has no number that keeps one expert's score below all others"
    if why:
        raise PeftMoeError(
            f"init='zero': {why}; leave init out, and keep the expert out for a while with use_experts()"
        )


def start_columns(router: Router, columns: Sequence[int], init: str) -> None:
    """Set the rows of new experts.

    Args:
        router: of the edited mixture; its other rows are set.
        columns: of the new experts.
        init: "mean" of the other experts' rows; "zero": no mass for any input; "own": as they are.
    """
    if init == "own" or not columns:
        return
    settings, name = router.settings, ""
    others = [c for c in range(len(settings.routed)) if c not in columns]
    axes = column_axes(settings, name)
    with torch.no_grad():
        for key, value in router.state_dict(keep_vars=True).items():
            for dim in axes[key]:
                index = torch.tensor(others, device=value.device)
                mean = value.index_select(dim, index).mean(dim, keepdim=True)
                for column in columns:
                    value.narrow(dim, column, 1).copy_(mean)
        if init == "zero":
            _shut(router, columns)


def _shut(router: Router, columns: Sequence[int]) -> None:
    settings, scorer = router.settings, router.scorer
    if router.balance_bias is not None:
        # Behind all others in the choice of the top k, which the bias joins.
        lowest = router.balance_bias.min() - 1.0
        router.balance_bias[list(columns)] = lowest
    if isinstance(scorer, ArrowScorer):
        scorer.weight[list(columns)] = 0.0  # an expert without a direction counts as absent
        return
    never = 0.0 if settings.scoring_func == "none" else _NEVER * max(1.0, settings.temperature)
    offset = next(name for kind, name in _OFFSETS.items() if isinstance(scorer, kind))
    if not isinstance(scorer, StaticScorer | PolyScorer):
        scorer.get_parameter(offset.replace("bias", "weight"))[list(columns)] = 0.0
    scorer.get_parameter(offset)[..., list(columns)] = never
