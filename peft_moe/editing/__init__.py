"""Experts that come and go: a trained mixture is edited, and whatever stays, stays to the bit.

    from peft_moe import editing

    editing.add_expert(model, "physics", "me/llama-physics-lora", init="zero")
    editing.remove_expert(model, "law")

Each function takes a PeftModel, edits its active mixture (or ``adapter_name``), and refuses before it touches
anything. Give ``optimizer`` in the middle of a training, so that it goes on with the edited model.
"""

from .freezing import freeze_expert, unfreeze_expert
from .mixture import Edited
from .operations import add_expert, remove_expert, rename_expert, reorder_experts, replace_expert
from .optimizer import follow_edit

__all__ = [
    "Edited",
    "add_expert",
    "follow_edit",
    "freeze_expert",
    "remove_expert",
    "rename_expert",
    "reorder_experts",
    "replace_expert",
    "unfreeze_expert",
]
