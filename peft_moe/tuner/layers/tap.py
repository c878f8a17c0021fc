"""The tap of a router of scope "model": the input of one layer of the base's main stack."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

from ...errors import PeftMoeError, near_matches
from ...experts.base_modules import linear_sizes

if TYPE_CHECKING:
    from ..config.mixture import MoLoraConfig


@dataclass
class Tap:
    """The point at which a router reads hidden states.

    Attributes:
        name: of the layer whose input is read, as in ``model.named_modules()``.
        layer: that layer.
        index: its index in the stack; None for a layer outside of it.
        below: "probe", "base" or "prompt"; see ``MoLoraConfig.router_below_tap``.
        text: prefix of the part that reads text, in a model of several towers.
        head: name of the output embedding.
    """

    name: str
    layer: nn.Module
    index: int | None
    below: str
    text: str = ""
    head: str = ""

    def refuse_towers(self, model: nn.Module, config: Any) -> None:
        """Refuse experts outside of the text part of a model with several towers.

        ``generate`` may run the other towers before the text, from which the router decides.

        Args:
            model: the base.
            config: of the mixture, with its targets.

        Raises:
            PeftMoeError: there are experts outside of the part that reads text, and they need a decision.
        """
        targets = config.target_modules
        if not self.text or self.below == "base" or targets is None:
            return
        for name, module in model.named_modules():
            if name.startswith(self.text) or name == self.head or linear_sizes(module) is None:
                continue
            if targets == "all-linear" or check_target_module_exists(config, name):
                raise PeftMoeError(
                    f"router_scope='model' decides from the text, and {name} lies outside of "
                    f"{self.text[:-1]}; use router_scope='module', or leave the other towers unadapted with "
                    "router_below_tap='base' or target_modules"
                )

    def lies_above(self, stack_name: str, module_name: str) -> bool:
        """Whether ``module_name`` runs at the tap or after it. Other towers run before it."""
        if not module_name.startswith(self.text):
            return module_name == self.head
        if self.index is None or not module_name.startswith(stack_name + "."):
            return True
        return int(module_name[len(stack_name) + 1 :].split(".", 1)[0]) >= self.index


def find_stack(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Find the base's main stack of layers: the longest ``ModuleList`` that lies in no other one.

    In a model that also reads images or sound, the stack of the part that reads text is meant.

    Returns:
        The name of the stack, and the stack.

    Raises:
        PeftMoeError: the base has no stack.
    """
    start = _text_part(model)
    stacks = [
        (name, m)
        for name, m in model.named_modules()
        if isinstance(m, nn.ModuleList) and len(m) and name.startswith(start)
    ]
    if not stacks:
        raise PeftMoeError(
            f"router_scope='model' needs a base with a stack of layers; {type(model).__name__} has none. "
            "Use router_scope='module'"
        )
    # A sparse base may have longer lists of experts. They lie inside its stack.
    outermost = [s for s in stacks if not any(s[0].startswith(other[0] + ".") for other in stacks)]
    return max(outermost, key=lambda stack: len(stack[1]))


def _text_part(model: nn.Module) -> str:
    """Return the prefix of the modules that read text in a model of several towers; else an empty text."""
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "get_text_config") or config.get_text_config() is config:
        return ""
    base: Any = model
    decoder = base.get_decoder() if hasattr(base, "get_decoder") else None
    return next((f"{name}." for name, m in model.named_modules() if name and m is decoder), "")


def find_tap(model: nn.Module, layer: int | str | None, below: str) -> tuple[Tap, str]:
    """Resolve ``router_tap``.

    Args:
        model: the base.
        layer: an index into the main stack, the name of one of its layers, or None for the middle one.
        below: "probe", "base" or "prompt".

    Returns:
        The tap and the stack's name.

    Raises:
        PeftMoeError: the base has no layer of that name or index.
    """
    stack_name, stack = find_stack(model)
    names = [f"{stack_name}.{index}" for index in range(len(stack))]
    index = len(stack) // 2 if layer is None else layer
    if isinstance(index, str):
        if index not in names:
            raise PeftMoeError(f"router_tap={index!r} is no layer of the base.{near_matches(index, names)}")
        index = names.index(index)
    if not 0 <= index < len(stack):
        raise PeftMoeError(
            f"router_tap={index} is outside of the base's {len(stack)} layers; use 0 to {len(stack) - 1}"
        )
    tap = Tap(names[index], stack[index], index, below)
    tap.text = _text_part(model)
    if tap.text:
        head = cast(Any, model).get_output_embeddings()
        tap.head = next((name for name, m in model.named_modules() if m is head), "")
    return tap, stack_name


def resolve_tap(config: MoLoraConfig, model: nn.Module) -> tuple[Tap | None, str]:
    """Return the tap of a config on a base and the stack's name; None and "" if no router reads a tap.

    Raises:
        PeftMoeError: the base cannot be routed as the config asks, or does not have the named layer.
    """
    shared = config.router_scope != "module" or config.router_granularity != "token"
    if shared and getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise PeftMoeError(
            f"router_scope={config.router_scope!r} with router_granularity={config.router_granularity!r}: in "
            "an encoder-decoder, layers of one call see different texts, so that one decision cannot serve "
            "them; use router_scope='module' with router_granularity='token'"
        )
    if config.topk_method == "expert_choice" and getattr(model, "can_generate", lambda: False)():
        raise PeftMoeError(
            f"topk_method='expert_choice' looks at the whole sequence, so that {type(model).__name__} would "
            "see its own future; use topk_method='greedy', or an encoder"
        )
    if config.router_scope != "model":
        return None, ""
    tap, stack = find_tap(model, config.router_tap, str(config.router_below_tap))
    if config.scorer.reads_input and config.scorer.reads_hidden:
        config.router_tap = tap.index
    return tap, stack
