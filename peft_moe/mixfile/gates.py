"""mergekit-moe's gates in our words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import PeftMoeError, near_matches
from ..io.values import is_count
from ..routers import PRESETS

if TYPE_CHECKING:
    from .entries import ExpertEntry

# "random" there is a start for training: so is Mixtral's gate with small random weights.
GATE_MODES: dict[str, dict[str, Any]] = {
    "hidden": {"router": "hidden"},
    "cheap_embed": {"router": "cheap_embed"},
    "random": {"router": "mixtral", "router_init_std": 0.02},
    "uniform_random": {"router": "mixtral", "router_init_std": 0.02},
}


def gate_fields(
    raw: Mapping[str, Any], routed: Sequence[ExpertEntry], fields: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """Fields of ``MoLoraConfig`` for ``gate_mode`` and ``experts_per_token``, and remarks.

    Args:
        raw: the file.
        routed: experts that the gates choose from.
        fields: of the config, as the file has them.

    Raises:
        PeftMoeError: an unknown mode, one beside ``router``, prompts that are missing, equal, or of no use.
    """
    mode, count = raw.get("gate_mode"), raw.get("experts_per_token")
    if mode is not None and "router" in fields:
        raise PeftMoeError(
            f"gate_mode={mode!r} and router={fields['router']!r} both choose the router; keep one of them"
        )
    if mode is not None and mode not in GATE_MODES:
        raise PeftMoeError(f"gate_mode={mode!r} is not known.{near_matches(str(mode), GATE_MODES)}")
    described = [entry for entry in routed if entry.positive]
    found = dict(GATE_MODES[mode]) if mode is not None else {}
    if mode is None and described and "router" not in fields:
        found = dict(GATE_MODES["hidden"])  # mergekit's default
    router = str(found.get("router", fields.get("router", "linear")))
    _check_prompts(router, mode, routed, described)
    notes = []
    if mode in ("random", "uniform_random"):
        notes.append(f"gate_mode={mode!r}: Mixtral's gate with random weights; train it before use")
    if count is not None:
        found.update(_per_token(count, router, len(routed) + bool(fields.get("null_expert")), fields))
    return found, notes


def _check_prompts(
    router: str, mode: str | None, routed: Sequence[ExpertEntry], described: Sequence[ExpertEntry]
) -> None:
    by_prompts = mode in ("hidden", "cheap_embed") or bool(described)
    if mode in ("random", "uniform_random") and described:
        raise PeftMoeError(f"gate_mode={mode!r} reads no prompts; leave them out, or use gate_mode='hidden'")
    if not by_prompts:
        return
    missing = [entry.name for entry in routed if not entry.positive]
    if missing:
        raise PeftMoeError(
            f"positive_prompts are missing for {missing}: the router is made from them; add some"
        )
    preset = PRESETS.get(router)
    if preset is not None and preset.fields.get("scorer") not in ("centroid", "linear", "phatgoose"):
        raise PeftMoeError(
            f"router={router!r} cannot be made from prompts; use gate_mode='hidden', or leave them out"
        )
    if len(routed) > 1 and len({(entry.positive, entry.negative) for entry in routed}) == 1:
        raise PeftMoeError(
            "all experts have the same prompts, so that nothing can tell them apart; describe each"
        )


def _per_token(count: Any, router: str, columns: int, fields: Mapping[str, Any]) -> dict[str, Any]:
    if "top_k" in fields:
        raise PeftMoeError(
            f"experts_per_token={count!r} and top_k={fields['top_k']!r} are one thing; keep one"
        )
    if not is_count(count) or count > columns:
        raise PeftMoeError(
            f"experts_per_token={count!r} must be a whole number from 1 to the {columns} experts"
        )
    preset = PRESETS[router].fields if router in PRESETS else {}
    dense = count == columns and preset.get("straight_through") and "straight_through" not in fields
    return {"top_k": count, **({"straight_through": False} if dense else {})}
