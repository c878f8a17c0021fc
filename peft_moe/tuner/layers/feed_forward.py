"""``mixing="block"``: experts mixed at the output of a feed-forward network, in one decision per network.

    y = FFN(x) + Σ_e g_e · (FFN_e(x) - FFN(x))

where FFN_e is the frozen network with expert e in its linears. Where gates sum to 1 that is
Σ_e g_e · FFN_e(x); what they leave goes to the base (a null expert), and an expert that is always on adds its
own change.

The network runs as it is. Its first linears return one row per chosen expert, on a new axis in front. The
code between them and the last linear carries this axis along; the last linear sums the rows. So no part of
the network is written anew, whatever its linears have between them.

Letters: N tokens, I in, O out, F hidden features, E experts, K branches.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.tuners_utils import check_target_module_exists
from torch import Tensor, nn

from ...errors import PeftMoeError
from ...experts.base_modules import base_modules, linear_sizes, unwrap
from ...ops import RankMap
from ...ops.ffn_branches import combine_branch_deltas, combine_branches, expand_branches, with_base_branch
from ...routers import Router
from ...routing.context import Routing, RoutingContext, Slot, current_context
from ...routing.decision import per_token
from .find_feed_forward import FeedForward, feed_forwards_of, find_feed_forwards
from .layer_groups import LayerGroups
from .scope import RoutingScope
from .shared_router import BLOCK_ROUTER, BlockRouter, SharedRouter

if TYPE_CHECKING:
    from ..config.mixture import MoLoraConfig
    from .expert_factors import ExpertPlan


@dataclass
class Branches:
    """One call of an FFN: which expert computes which row.

    Attributes:
        adapter: the mixture's name.
        home: the FFN.
        ids, weights: the experts of each token and their weights, [N, K] or [1, K], which sum to 1; E is the
            base.
        lead: sizes of the input without its features.
        entered: linears that have read the input in this call.
        expanded: whether the hidden state has a row per branch: one of the first linears has experts.
    """

    adapter: str
    home: str
    ids: Tensor
    weights: Tensor
    lead: tuple[int, ...]
    entered: set[str] = field(default_factory=set)
    expanded: bool = False


# Set from the first linear to the last one of the FFN that runs. A layer that is computed again starts anew.
_running = Slot[Branches]("peft_moe_branches")


@dataclass
class FeedForwardPlace:
    """What an adapted linear of an FFN knows of its place.

    Attributes:
        name: of the linear.
        home: the FFN.
        adapter: the mixture's name.
        is_output: whether the linear writes the FFN's output.
    """

    name: str
    home: str
    adapter: str
    is_output: bool


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


def place_in(blocks: dict[str, FeedForward], name: str, adapter: str) -> FeedForwardPlace | None:
    """The place of a linear in its FFN; None if it is mixed by itself."""
    if name not in blocks:
        return None
    return FeedForwardPlace(name, blocks[name].home, adapter, name == blocks[name].output_proj)


def add_feed_forward_routers(
    model: nn.Module,
    adapter: str,
    groups: LayerGroups,
    layers: dict[str, Any],
    blocks: dict[str, FeedForward],
) -> list[SharedRouter]:
    """Give the FFNs of these layers a :class:`BlockRouter`.

    It holds a router of this adapter, unless one router decides for the whole model.
    """
    block_routers: dict[str, SharedRouter] = {}
    for name, layer in layers.items():
        if layer.mixtures[adapter].ffn is None or blocks[name].home in block_routers:
            continue
        ffn, block_router = blocks[name], add_feed_forward_router(model, blocks[name])
        scope: RoutingScope = layer.mixtures[adapter].scope
        of_ffn = "model" if scope.scope == "model" else "module"
        block_router.scopes[adapter] = replace(scope, scope=of_ffn, name=block_router.name)
        block_router.with_output_experts.discard(adapter)
        if ffn.output_proj in layers:
            block_router.with_output_experts.add(adapter)
        if of_ffn == "module":
            sizes = linear_sizes(model.get_submodule(ffn.input_projs[0]))
            assert sizes is not None, ffn
            block_router.add_router(adapter, Router(groups.settings(name), sizes[0]))
        block_routers[ffn.home] = block_router
    return list(block_routers.values())


def add_feed_forward_router(model: nn.Module, ffn: FeedForward) -> BlockRouter:
    """The block router of an FFN, which watches its linears; made on first use."""
    home = model.get_submodule(ffn.home)
    block_router: BlockRouter | None = getattr(home, BLOCK_ROUTER, None)
    if block_router is None:
        block_router = BlockRouter(ffn.home)
        block_router.attach(home)
    if not block_router.linears:
        for name in ffn.input_projs:
            hook = partial(_enter, block_router, name)
            block_router.handles.append(unwrap(model.get_submodule(name)).register_forward_pre_hook(hook))
        last = unwrap(model.get_submodule(ffn.output_proj))
        block_router.handles.append(last.register_forward_pre_hook(partial(_leave, block_router)))
        block_router.linears = ffn.members
    return block_router


def rest_goes(config: MoLoraConfig) -> str:
    """Where the base gets what a mixture's own gates leave: "nowhere" (they sum to 1), "null", or "apart"."""
    sums_to_one = (
        config.scoring_func == "softmax"
        and bool(config.norm_topk_prob)
        and config.topk_method != "expert_choice"
        and config.routed_scaling_factor == 1
        and not config.shared_experts
    )
    if not sums_to_one:
        return "apart"
    return "null" if config.null_expert else "nowhere"


def _enter(block_router: BlockRouter, name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
    """Hook: a linear is about to read the FFN's input. The first one of a call decides for all."""
    context = current_context()
    if block_router.disable_adapters or (context is not None and context.probing):
        return
    for adapter in block_router.adapters_now() if context is None else context.adapters:
        scope = block_router.scopes.get(adapter)
        if scope is None:
            continue
        branches = _running_in(block_router.name, adapter)
        if branches is None or name in branches.entered:
            branches = _decide(scope, block_router, args[0], context)
            _running.set(branches)
        branches.entered.add(name)


def _running_in(home: str, adapter: str) -> Branches | None:
    branches = _running.get()
    return branches if branches is not None and (branches.home, branches.adapter) == (home, adapter) else None


def _decide(
    scope: RoutingScope, block_router: BlockRouter, x: Tensor, context: RoutingContext | None
) -> Branches:
    router: Any = dict(block_router.molora_router).get(scope.adapter)
    routing = scope.decide(x, router, context)
    constrained = context is not None and (context.gates is not None or scope.adapter in context.constraints)
    rest = "apart" if constrained else rest_goes(scope.config)
    ids_NK, weights_NK = _chosen(routing, x)
    if routing.expert_ids is None and rest == "null":
        rest = "apart"
    if rest != "nowhere":
        ids_NK, weights_NK = with_base_branch(
            ids_NK, weights_NK, scope.config.num_experts, in_place=rest == "null"
        )
    return Branches(scope.adapter, scope.name, ids_NK, weights_NK, tuple(x.shape[:-1]))


def _chosen(routing: Routing, x: Tensor) -> tuple[Tensor, Tensor]:
    tokens = x.numel() // x.shape[-1]
    if routing.expert_ids is None or routing.expert_weights is None:
        gates_NE = per_token(routing.gates, x, tokens)
        return torch.arange(gates_NE.shape[-1], device=gates_NE.device)[None], gates_NE
    return per_token(routing.expert_ids, x, tokens), per_token(routing.expert_weights, x, tokens)


def _leave(block_router: BlockRouter, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Hook: the last linear is about to write the FFN's output. The branches are combined in its input."""
    branches = _running.get()
    if branches is None or branches.home != block_router.name:
        return None
    if branches.adapter not in block_router.with_output_experts:
        _running.set(None)
    if not branches.expanded:
        return None
    h_KNF = _rows(args[0], branches)
    return combine_branches(h_KNF, branches.weights).view(*branches.lead, -1), *args[1:]


def _rows(h: Tensor, branches: Branches) -> Tensor:
    """The hidden state with one row per branch, [K, N, F]."""
    count = branches.ids.shape[1]
    if tuple(h.shape[:-1]) != (count, *branches.lead):
        raise PeftMoeError(
            f"mixing='block': the last linear of {branches.home} was given {tuple(h.shape[:-1])} rows where "
            f"{(count, *branches.lead)} were sent in; something between its linears moves tokens. Use "
            "mixing='linear'"
        )
    return h.reshape(count, -1, h.shape[-1])


def mix_in_feed_forward(
    ffn: FeedForwardPlace, x: Tensor, y: Tensor, A_RI: Tensor, B_RO: Tensor, ranks: RankMap, backend: str
) -> Tensor:
    """The part of one linear of an FFN.

    Args:
        ffn: the place of the linear in its FFN.
        x: its input, [..., I]; of the last linear with the branches in front, [K, ..., I].
        y: its base layer's output, [..., O].
        A_RI, B_RO: the experts' factors on one rank axis.
        ranks: the segments of R.
        backend: how the mixture is computed.

    Returns:
        [K, ..., O]; of the last linear [..., O].

    Raises:
        PeftMoeError: the FFN is not being called, or moves tokens.
    """
    branches = _running_in(ffn.home, ffn.adapter)
    if branches is None:
        raise PeftMoeError(
            f"mixing='block': {ffn.name} was called before the linears that read the input of "
            f"{ffn.home}; use mixing='linear'"
        )
    base_NO, ids_NK = y.reshape(-1, y.shape[-1]), branches.ids
    if not ffn.is_output:
        branches.expanded = True
        out_KNO = expand_branches(x.reshape(-1, x.shape[-1]), A_RI, B_RO, ids_NK, ranks, base_NO, backend)
        return out_KNO.view(ids_NK.shape[1], *y.shape)
    _running.set(None)
    if branches.expanded:
        h_KNF = _rows(x, branches)
    else:
        h_KNF = x.reshape(1, -1, x.shape[-1]).expand(ids_NK.shape[1], -1, -1)
    return combine_branch_deltas(h_KNF, A_RI, B_RO, ids_NK, branches.weights, ranks, base_NO, backend).view(
        y.shape
    )
