"""The only file that touches PEFT's tables: it makes "MOLORA" one of PEFT's methods.

PEFT keeps its methods in an enum and a few dicts, without entry points. A method whose key is a plain
string works in PEFT itself, but breaks transformers' own adapter loading, which asks keys for
``.value``; so the enum gets one more member.
"""

from __future__ import annotations

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import PeftType, register_peft_method

from ..errors import PeftMoeError
from .config.mixture import MoLoraConfig
from .model import MoLoraModel
from .push_to_hub import watch_pushes

METHOD = "molora"


def register() -> None:
    """Add the method once; further calls do nothing.

    Raises:
        PeftMoeError: PEFT's tables are not what this version was made for.
    """
    watch_pushes()
    key = METHOD.upper()
    if key not in PeftType.__members__:
        _add_enum_member(key)
    member = PeftType(key)
    if member in PEFT_TYPE_TO_CONFIG_MAPPING:
        return
    register_peft_method(name=METHOD, config_cls=MoLoraConfig, model_cls=MoLoraModel)


def _add_enum_member(key: str) -> None:
    # Python has no public way to extend an enum; these are the two tables that look-ups use.
    member = str.__new__(PeftType, key)
    member._name_ = key
    member._value_ = key
    try:
        PeftType._member_map_[key] = member
        PeftType._value2member_map_[key] = member
        PeftType._member_names_.append(key)
        type.__setattr__(PeftType, key, member)
    except (AttributeError, TypeError) as error:
        raise PeftMoeError(
            f"cannot add {key} to peft.PeftType ({error}); this peft-moe needs another version of peft"
        ) from error
    if PeftType(key) is not member or getattr(PeftType, key) is not member:
        raise PeftMoeError(
            "peft.PeftType did not take a new member; this peft-moe needs another version of peft"
        )
