"""A mixture whose experts come, go, or change places: which numbers stay, and where they go.

Every edit is a list of places: for each expert of the edited mixture the index that it had before, or None
for a new one. Factors move as slabs of the rank axis, router weights as rows of the columns' axes; nothing
is computed, so that what stays is the same to the bit. Live models and saved folders are edited alike.

Letters: I in, O out, R total rank, E experts, X columns (routed experts, plus the null expert).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from ..errors import PeftMoeError, near_matches
from ..experts.spec import ExpertSpec
from ..ops import RankMap
from ..tuner.config.mixture import MoLoraConfig


@dataclass(frozen=True)
class Edit:
    """One edit.

    Attributes:
        old: for each expert of the edited mixture its index before; None for one that is new.
        specs: their descriptions.
        rows: the same for router rows, where a new expert takes over an old one's; None for ``old``.
    """

    old: tuple[int | None, ...]
    specs: tuple[ExpertSpec, ...]
    rows: tuple[int | None, ...] | None = None

    @property
    def row_places(self) -> tuple[int | None, ...]:
        """For each expert whose router row it has; None for one of its own."""
        return self.old if self.rows is None else self.rows

    @property
    def names(self) -> list[str]:
        """Of the experts, in their new order."""
        return [spec.name for spec in self.specs]

    @property
    def new(self) -> list[int]:
        """Places of new experts."""
        return [place for place, before in enumerate(self.old) if before is None]

    def moves(self, before: int) -> bool:
        """Whether any tensor of a mixture of ``before`` experts changes; a new name alone moves nothing."""
        return self.old != tuple(range(before))


def index_of(name: str, config: MoLoraConfig, adapter: str) -> int:
    """Place of an expert.

    Raises:
        PeftMoeError: the mixture has none of that name; names near matches.
    """
    names = config.expert_names
    if name not in names:
        raise PeftMoeError(f"{name!r} is no expert of mixture {adapter!r}.{near_matches(str(name), names)}")
    return names.index(name)


def removal(config: MoLoraConfig, name: str, adapter: str) -> Edit:
    """Take an expert out.

    Raises:
        PeftMoeError: no such expert, or the last one.
    """
    gone = index_of(name, config, adapter)
    if config.num_experts == 1:
        raise PeftMoeError(
            f"{name!r} is the last expert of mixture {adapter!r}; delete_adapter({adapter!r}) removes it all"
        )
    kept = [place for place in range(config.num_experts) if place != gone]
    specs = config.specs()
    return Edit(tuple(kept), tuple(specs[place] for place in kept))


def renaming(config: MoLoraConfig, name: str, new_name: str, adapter: str) -> Edit:
    """Call an expert something else."""
    place, specs = index_of(name, config, adapter), config.specs()
    specs[place] = replace(specs[place], name=new_name)
    return Edit(tuple(range(len(specs))), tuple(specs))


def ordering(config: MoLoraConfig, names: Sequence[str], adapter: str) -> Edit:
    """Put the experts into another order.

    Raises:
        PeftMoeError: not each expert exactly once.
    """
    if isinstance(names, str) or sorted(map(str, names)) != sorted(config.expert_names):
        raise PeftMoeError(
            f"names={names!r} must name each expert of mixture {adapter!r} once: {config.expert_names}"
        )
    places, specs = [config.expert_names.index(name) for name in names], config.specs()
    return Edit(tuple(places), tuple(specs[place] for place in places))


def edited_config(config: MoLoraConfig, edit: Edit, *, targets: set[str] | None = None) -> MoLoraConfig:
    """The config of the edited mixture.

    Shared experts follow their names; a ``top_k`` larger than what is left becomes that, and a choice
    among nothing has no balancing bias.

    Args:
        config: as it was; it stays so.
        edit: what happens.
        targets: modules that a new expert adapts, which ``target_modules`` is to match as well.

    Raises:
        PeftMoeError: no mixture can be so, with what it would have been.
    """
    if config.experts_per_layer is not None and edit.moves(config.num_experts):
        raise PeftMoeError(
            f"experts_per_layer={config.experts_per_layer} counts experts from the first, so that none can "
            "come, go or change places; make a new mixture"
        )
    values = {f.name: getattr(config, f.name) for f in fields(config) if f.init}
    before = config.expert_names
    renamed = {before[old]: edit.names[place] for place, old in enumerate(edit.row_places) if old is not None}
    values["shared_experts"] = [renamed[name] for name in config.shared_experts if name in renamed]
    values["train_experts"] = config.experts_default
    values["experts"] = [spec.to_record() for spec in edit.specs]
    columns = len(edit.old) - len(values["shared_experts"]) + bool(config.null_expert)
    if config.top_k is not None:
        values["top_k"] = min(config.top_k, max(1, columns))
    if config.top_k_per_layer is not None:
        values["top_k_per_layer"] = [min(k, max(1, columns)) for k in config.top_k_per_layer]
    smallest = min(values["top_k_per_layer"] or [values["top_k"] or columns])
    if config.topk_method == "greedy" and smallest >= columns:
        values["router_bias_update_rate"] = 0.0  # nothing is left to choose, hence to balance
    if targets:
        values["target_modules"] = targets
    try:
        return MoLoraConfig(**values)
    except PeftMoeError as error:
        raise PeftMoeError(f"the mixture of {edit.names} could not be: {error}") from error


def ranks_after(edit: Edit, before: RankMap | None, module: str) -> RankMap:
    """Ranks and scales of one module, before it is known whether any are left.

    Args:
        edit: what happens.
        before: of the module; None where the mixture did not adapt it.
        module: its name in the base.
    """
    ranks, scaling = [], []
    for old, spec in zip(edit.old, edit.specs, strict=True):
        if old is None:
            ranks.append(spec.rank_in(module))
            scaling.append(spec.scaling_in(module))
        else:
            ranks.append(before.ranks[old] if before is not None else 0)
            scaling.append(before.scaling[old] if before is not None else spec.scaling_in(module))
    return RankMap(tuple(ranks), tuple(scaling))


def blocks(
    tensor: Tensor, dim: int, sizes: Sequence[int], old: Sequence[int | None], new: Sequence[Tensor | None]
) -> Tensor:
    """Slabs of one axis in their new places.

    Args:
        tensor: any shape; axis ``dim`` consists of slabs of these ``sizes``.
        dim: the axis.
        sizes: see there.
        old: for each slab of the result its index before, or None.
        new: the slab itself where it is new.
    """
    parts = torch.split(tensor, list(sizes), dim=dim)
    chosen = [parts[o] if o is not None else n for o, n in zip(old, new, strict=True)]
    assert all(part is not None for part in chosen)
    return torch.cat([part.to(tensor) for part in chosen if part is not None], dim=dim)


def moved_factor(factor_RX: Tensor, before: RankMap, edit: Edit, new: Tensor | None) -> Tensor:
    """A [R, I] or B [R, O] of the edited mixture; a new expert's slab in the dtype that holds both exactly.

    Args:
        factor_RX: as it was.
        before: its ranks.
        edit: what happens.
        new: the slab of a new expert, [r, I] or [r, O]; None where there is none.
    """
    if new is not None:
        wide = torch.promote_types(factor_RX.dtype, new.dtype)
        factor_RX, new = factor_RX.to(wide), new.to(factor_RX.device, wide)
    slab = factor_RX[:0] if new is None else new
    return blocks(factor_RX, 0, before.ranks, edit.old, [slab if o is None else None for o in edit.old])
