"""``mixing="block"``: experts mixed at the output of a feed-forward network, in one decision per network.

    y = FFN(x) + Σ_e g_e · (FFN_e(x) - FFN(x))

where FFN_e is the frozen network with expert e in its linears. Where gates sum to 1 that is
Σ_e g_e · FFN_e(x); what they leave goes to the base (a null expert), and an expert that is always on adds its
own change.

The network runs as it is. Its first linears return one row per chosen expert, on a new axis in front, which
everything between them and the last linear carries along; there the rows meet again. So nothing of the
network is written anew, whatever stands between its linears.

Letters: N tokens, I in, O out, F hidden features, E experts, K branches.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from torch import Tensor, nn

from ...errors import PeftMoeError
from ...experts.base_modules import base_modules
from ...io.offload import read
from ...ops.ffn_branches import combine_branch_deltas, combine_branches, expand_branches, with_base_branch
from ...routers import Router
from ...routing.context import Routing, RoutingContext, current_context
from ...routing.context_var import Slot
from .find_feed_forward import FeedForward, feed_forwards_of, find_feed_forwards
from .frozen_experts import trained_part
from .layer_groups import LayerGroups
from .linear_like import linear_sizes, per_token
from .scope import Decider
from .shared_router import BLOCK_ROUTER, BlockRouter, SharedRouter

if TYPE_CHECKING:
    from ..config.mixture import MoLoraConfig
    from .expert_factors import ExpertPlan


@dataclass
class Branches:
    """One call of an FFN: who computes which row.

    Attributes:
        adapter: whose experts.
        home: the FFN.
        ids, weights: the experts of each token and their weights, [N, K] or [1, K], which sum to 1; E is the
            base.
        lead: sizes of the input without its features.
        entered: linears that have read the input in this call.
        parted: whether the rows were parted, which takes an expert in one of the first linears.
    """

    adapter: str
    home: str
    ids: Tensor
    weights: Tensor
    lead: tuple[int, ...]
    entered: set[str] = field(default_factory=set)
    parted: bool = False


# From the first linear to the last of the FFN that is running; a layer that is computed again begins anew.
_running = Slot[Branches]("peft_moe_branches")


@dataclass
class Member:
    """What an adapted linear of an FFN knows of it: which one it is in, and whether it is the last."""

    home: str
    joins: bool


def find_blocks(config: MoLoraConfig, model: nn.Module, plan: ExpertPlan) -> dict[str, FeedForward]:
    """The FFNs at whose output a mixture is mixed, by the names of their linears; none with mixing="linear".

    Where fresh experts were given no targets, they get the linears of all FFNs.

    Raises:
        PeftMoeError: the mixture adapts none, or one that cannot be taken apart.
    """
    if config.mixing == "linear":
        return {}
    if config.target_modules is None:
        config.target_modules = {name for ffn in find_feed_forwards(model) for name in ffn.members}  # type: ignore[assignment]
    names = [name for name, module in base_modules(model).items() if linear_sizes(module) is not None]
    everywhere = config.target_modules == "all-linear"
    matched = [n for n in names if everywhere or check_target_module_exists(config, n)]
    return feed_forwards_of(model, (n for n in matched if plan.rank_map(n).total))


def member_of(blocks: dict[str, FeedForward], name: str) -> Member | None:
    """The place of a linear in its FFN; None if it is mixed by itself."""
    return Member(blocks[name].home, name == blocks[name].join) if name in blocks else None


def add_feed_forward_routers(
    model: nn.Module, adapter: str, depth: LayerGroups, layers: dict[str, Any], blocks: dict[str, FeedForward]
) -> list[SharedRouter]:
    """Give the FFNs of these layers a seat, with a router unless one decides for the whole model."""
    seats: dict[str, SharedRouter] = {}
    for name, layer in layers.items():
        if adapter not in layer.members or blocks[name].home in seats:
            continue
        ffn, seat = blocks[name], add_feed_forward_router(model, blocks[name])
        decider: Decider = layer.deciders[adapter]
        scope = "model" if decider.scope == "model" else "module"
        seat.deciders[adapter] = replace(decider, scope=scope)
        seat.joined.discard(adapter)
        if ffn.join in layers:
            seat.joined.add(adapter)
        if scope == "module":
            sizes = linear_sizes(_bare(model.get_submodule(ffn.forks[0])))
            assert sizes is not None, ffn
            seat.add_router(adapter, Router(depth.settings(name), sizes[0]))
        seats[ffn.home] = seat
    return list(seats.values())


def add_feed_forward_router(model: nn.Module, ffn: FeedForward) -> BlockRouter:
    """The seat at an FFN, which watches its linears; made on first use."""
    home = model.get_submodule(ffn.home)
    seat: Any = getattr(home, BLOCK_ROUTER, None)
    if seat is None:
        seat = BlockRouter(ffn.home)
        seat.attach(home)
    if not seat.watched:
        for name in ffn.forks:
            hook = partial(_enter, seat, name)
            seat.handles.append(_bare(model.get_submodule(name)).register_forward_pre_hook(hook))
        last = _bare(model.get_submodule(ffn.join))
        seat.handles.append(last.register_forward_pre_hook(partial(_leave, seat)))
        seat.watched = ffn.members
    found: BlockRouter = seat
    return found


def _bare(module: nn.Module) -> nn.Module:
    bare: nn.Module = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    return bare


def rest_goes(config: MoLoraConfig) -> str:
    """Where the base gets what a mixture's own gates leave: "nowhere" (they sum to 1), "null", or "apart"."""
    whole = (
        config.scoring_func == "softmax"
        and bool(config.norm_topk_prob)
        and config.topk_method != "expert_choice"
        and config.routed_scaling_factor == 1
        and not config.shared_experts
    )
    if not whole:
        return "apart"
    return "null" if config.null_expert else "nowhere"


def _enter(seat: BlockRouter, name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
    """A linear is about to read the FFN's input: the first of a call decides for all."""
    context = current_context()
    if seat.disable_adapters or (context is not None and context.probing):
        return
    for adapter in seat.adapters_now():
        decider = seat.deciders.get(adapter)
        if decider is None:
            continue
        branches = _running_in(seat.name, adapter)
        if branches is None or name in branches.entered:
            branches = _decide(decider, adapter, seat, args[0], context)
            _running.set(branches)
        branches.entered.add(name)


def _running_in(home: str, adapter: str) -> Branches | None:
    branches = _running.get()
    return branches if branches is not None and (branches.home, branches.adapter) == (home, adapter) else None


def _decide(
    decider: Decider, adapter: str, seat: BlockRouter, x: Tensor, context: RoutingContext | None
) -> Branches:
    router: Any = dict(seat.molora_router).get(adapter)
    routing = decider.decide(adapter, seat.name, x, router, context)
    limited = context is not None and (context.gates is not None or adapter in context.limits)
    rest = "apart" if limited else rest_goes(decider.config)
    ids_NK, weights_NK = _chosen(routing, x)
    if routing.expert_ids is None and rest == "null":
        rest = "apart"
    if rest != "nowhere":
        ids_NK, weights_NK = with_base_branch(
            ids_NK, weights_NK, decider.config.num_experts, in_place=rest == "null"
        )
    return Branches(adapter, seat.name, ids_NK, weights_NK, tuple(x.shape[:-1]))


def _chosen(routing: Routing, x: Tensor) -> tuple[Tensor, Tensor]:
    tokens = x.numel() // x.shape[-1]
    if routing.expert_ids is None or routing.expert_weights is None:
        gates_NE = per_token(routing.gates, x, tokens)
        return torch.arange(gates_NE.shape[-1], device=gates_NE.device)[None], gates_NE
    return per_token(routing.expert_ids, x, tokens), per_token(routing.expert_weights, x, tokens)


def _leave(seat: BlockRouter, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """The last linear is about to write the FFN's output: the rows meet in its input."""
    branches = _running.get()
    if branches is None or branches.home != seat.name:
        return None
    if branches.adapter not in seat.joined:  # no expert is in the last linear
        _running.set(None)
    if not branches.parted:
        return None
    h_KNF = _rows(args[0], branches, seat.name)
    return combine_branches(h_KNF, branches.weights).view(*branches.lead, -1), *args[1:]


def _rows(h: Tensor, branches: Branches, home: str) -> Tensor:
    """The hidden state with one row per branch, [K, N, F]."""
    count = branches.ids.shape[1]
    if tuple(h.shape[:-1]) != (count, *branches.lead):
        raise PeftMoeError(
            f"mixing='block': the last linear of {home} was given {tuple(h.shape[:-1])} rows where "
            f"{(count, *branches.lead)} were sent in; something between its linears moves tokens. Use "
            "mixing='linear'"
        )
    return h.reshape(count, -1, h.shape[-1])


def mix_in_block(layer: Any, adapter: str, x: Tensor, result: Tensor) -> Tensor:
    """The part of one linear of an FFN.

    Args:
        layer: the :class:`~peft_moe.tuner.layers.linear.MoLoraLayer`.
        adapter: whose experts.
        x: its input, [..., I]; of the last linear with the branches in front, [K, ..., I].
        result: its base layer's output, [..., O].

    Returns:
        [K, ..., O]; of the last linear [..., O].

    Raises:
        PeftMoeError: the FFN is not being called, or moves tokens.
    """
    member: Member = layer.members[adapter]
    branches = _running_in(member.home, adapter)
    if branches is None:
        raise PeftMoeError(
            f"mixing='block': {layer.name} was called before the linears that read the input of "
            f"{member.home}; use mixing='linear'"
        )
    A, B = trained_part(read(layer.molora_A[adapter]), read(layer.molora_B[adapter]), layer.held.get(adapter))
    ranks, backend = layer.rank_maps[adapter], layer.backends[adapter]
    base_NO, ids_NK = result.reshape(-1, result.shape[-1]), branches.ids
    if not member.joins:
        branches.parted = True
        out_KNO = expand_branches(x.reshape(-1, x.shape[-1]), A, B, ids_NK, ranks, base_NO, backend)
        return out_KNO.view(ids_NK.shape[1], *result.shape)
    _running.set(None)
    if branches.parted:
        h_KNF = _rows(x, branches, member.home)
    else:
        h_KNF = x.reshape(1, -1, x.shape[-1]).expand(ids_NK.shape[1], -1, -1)
    return combine_branch_deltas(h_KNF, A, B, ids_NK, branches.weights, ranks, base_NO, backend).view(
        result.shape
    )
