"""The names that users may rely on. Adding one is a decision: write it here, too."""

from __future__ import annotations

import inspect

import pytest

import peft_moe

PUBLIC = [
    "MoLoraConfig",
    "PeftMoeError",
    "Routing",
    "Scorer",
    "load_mixture",
    "record_routing",
    "register_loss",
    "register_router",
    "routing_inputs",
    "save_mixture",
    "use_experts",
    "use_gates",
    "use_temperature",
]


def test_the_list_is_frozen():
    assert sorted(peft_moe.__all__) == sorted(PUBLIC)


@pytest.mark.parametrize("name", PUBLIC)
def test_exists_and_is_documented(name):
    thing = getattr(peft_moe, name)
    assert (inspect.getdoc(thing) or "").strip()
    assert thing.__module__.startswith("peft_moe.")


def test_nothing_else_is_left_in_the_namespace():
    # Submodules appear once they are imported; everything else is either public or private.
    extra = {
        name
        for name, thing in vars(peft_moe).items()
        if not name.startswith("_") and not inspect.ismodule(thing) and name not in PUBLIC
    }
    assert extra == set()


def test_version_is_a_version():
    assert [part.isdigit() for part in peft_moe.__version__.split(".")[:3]] == [True] * 3


def test_star_import_gives_exactly_the_public_names():
    space: dict[str, object] = {}
    exec("from peft_moe import *", space)  # the only way to see what a star brings
    assert {name for name in space if not name.startswith("__")} == set(PUBLIC)
