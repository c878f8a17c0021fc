"""A pytest plugin that turns PEFT's own tests to ``MoLoraConfig``; loaded by ``-p`` in a process of its own.

PEFT's tests are parametrised over its methods. Here each such list is replaced by ours, and tests of single
other methods are left out, as is what ``inapplicable.toml`` names. ``PEFT_CONTRACT_EXPERTS`` says whether the
experts are "trainable" or "frozen"; the outcomes go to the file that ``PEFT_CONTRACT_OUTCOMES`` names, one
line per test.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import sys
import tomllib
import types
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest

from peft_moe import MoLoraConfig

EXPERTS = os.environ["PEFT_CONTRACT_EXPERTS"]
INAPPLICABLE = Path(__file__).with_name("inapplicable.toml")

# What is merged must have gates that do not depend on the input; everything else runs with a router.
STATIC = {"router": "uniform"}
# Tests that merge at their end without saying so, or that ask of every weight to follow the base's dtype,
# which routers never do (tests/conformance/test_dtypes.py); a gate-less mixture has no router.
STATIC_TESTS = ("merg", "test_forward_", "no_autocast_adapter_dtype", "test_adapter_dtype_autocast")
TASKS = {
    "test_decoder_models": "CAUSAL_LM",
    "test_encoder_decoder_models": "SEQ_2_SEQ_LM",
    "test_feature_extraction_models": "FEATURE_EXTRACTION",
    "test_seq_classifier": "SEQ_CLS",
}
# Modules with a class of tests for each task.
TASKS_OF_CLASSES = {
    "TestTokenClassificationModels": "TOKEN_CLS",
    "TestQuestionAnsweringModels": "QUESTION_ANS",
}
# PEFT's cases of LoRA, as far as they are about linear layers.
CUSTOM: dict[str, tuple[str, dict[str, Any]]] = {
    "MLP-1": ("MLP", {"target_modules": "lin0"}),
    "MLP-2": ("MLP", {"target_modules": ["lin0"]}),
    "MLP-3": ("MLP", {"target_modules": ["lin1"]}),
    "MLP-4": ("MLP", {"target_modules": ["lin0", "lin1"]}),
    "MLP-5": ("MLP", {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
    "MLP-6": ("MLP", {"target_modules": ["lin0"], "r": 4, "lora_alpha": 32, "use_rslora": True}),
    "MLP-7": ("MLP", {"target_modules": ["lin0", "lin1"], "exclude_modules": ["lin1"]}),
    "Conv1D-1": ("EmbConv1D", {"target_modules": ["conv1d"]}),
    "Conv1D-2": ("EmbConv1D", {"target_modules": ["conv1d", "lin0"]}),
    "Conv1D-tokens": (
        "EmbConv1D",
        {"target_modules": ["conv1d"], "trainable_token_indices": {"emb": [0, 10]}},
    ),
    "Conv2d": ("Conv2d", {"target_modules": ["lin0"]}),
    "LayerNorm": ("MLP_LayerNorm", {"target_modules": ["lin0", "lin1"]}),
}
LIN0, LIN1, BOTH = ({"target_modules": names} for names in (["lin0"], ["lin1"], ["lin0", "lin1"]))
CONV1D = {"target_modules": ["conv1d"]}
# Two adapters in one batch, by the test that asks for them.
MIXED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "test_mixed_adapter_batches_different_target_layers": (LIN0, LIN1),
    "test_mixed_adapter_batches_partly_overlapping_target_layers": (LIN0, BOTH),
    "test_mixed_adapter_batches_multiple_modules_to_save": 2 * ({**LIN0, "modules_to_save": ["lin1"]},),
    "test_mixed_adapter_batches_unsupported_layer_raises": 2 * ({**LIN0, "modules_to_save": ["gru"]},),
    "test_mixed_adapter_batches_lora_conv1d_emb": (CONV1D, {**CONV1D, "r": 16}),
    "test_mixed_adapter_batches_lora_conv1d_emb_multiple_modules_to_save": 2
    * ({**CONV1D, "modules_to_save": ["lin0"]},),
}
# Lines in the bodies of PEFT's tests that ask for one of its classes and mean us as well: what only LoRA can,
# and the learning rate of a method whose gates depend on the input.
READ_AS_OURS = {
    "test_mixed_adapter_batches": "LoraConfig",
    "test_generate_with_mixed_adapter_batches": "LoraConfig",
    "_test_mixed_adapter_batches": "LoraConfig",
    "_test_generate_with_mixed_adapter_batches_and_beam_search": "LoraConfig",
    "_test_adding_multiple_adapters_with_bias_raises": "LoraConfig",
    "test_only_params_are_updated": "LilyConfig",
    "_skip_if_conv1d_not_supported": "LoraConfig",
}
# The first skips every method on bases without biases, the second every one whose name holds "lora".
SKIPPED_BY_MISTAKE = {"check_beft_config", "skip_deberta_lora_tests"}


class FrozenExperts(MoLoraConfig):
    """Experts as loaded ones are: their numbers are given, and do not train."""

    def __init__(self, *args: Any, **fields: Any) -> None:
        fields.setdefault("train_experts", False)
        super().__init__(*args, **{**fields, "init_weights": False})


CONFIG: type[MoLoraConfig] = FrozenExperts if EXPERTS == "frozen" else MoLoraConfig


def values_for(names: tuple[str, ...], module: str, test: str, holder: str) -> list[Any] | None:
    """Our list for one ``parametrize``, None where it is not about methods."""
    extra: dict[str, Any] = STATIC if any(word in test for word in STATIC_TESTS) else {}

    def pair(first: dict[str, Any], second: dict[str, Any]) -> list[Any]:
        random = {"init_weights": False, **extra}
        return [pytest.param("mixture", CONFIG(**first, **random), CONFIG(**second, **random), id="mixture")]

    match names:
        case ("config_cls", "config_kwargs"):
            task = TASKS_OF_CLASSES.get(holder) or TASKS[module]
            return [pytest.param(CONFIG, {"task_type": task, "target_modules": None, **extra}, id="m")]
        case ("test_name", "model_id", "config_cls", "config_kwargs"):
            return [
                pytest.param(name, model, CONFIG, {**fields, **extra}, id=name)
                for name, (model, fields) in CUSTOM.items()
            ]
        case ("test_name", "tuner_method", "config_cls", "config_kwargs_1", "config_kwargs_2"):
            random = {"init_weights": False, **extra}
            both = {"same": (LIN0, LIN0), "different": (LIN0, LIN1), "partly": (LIN0, BOTH)}
            return [
                pytest.param(name, "molora", CONFIG, {**one, **random}, {**two, **random}, id=name)
                for name, (one, two) in both.items()
            ]
        case ("test_name", "config0", "config1"):
            return pair(*MIXED.get(test, (LIN0, {**LIN0, "r": 16})))
        case ("test_name", "config"):
            return [pytest.param("mixture", CONFIG(**LIN0, init_weights=False), id="mixture")]
        case ("config0",):
            return [pytest.param(CONFIG(**LIN0, init_weights=False), id="mixture")]
        case ("config_cls",) | ("config_class",):
            return [pytest.param(CONFIG, id="mixture")]
        case ("config_class", "mandatory_kwargs"):
            return [pytest.param(CONFIG, {}, id="mixture")]
    return None


def pytest_configure(config: pytest.Config) -> None:
    """Stand in for what PEFT's tests import and ours never reach."""
    if importlib.util.find_spec("diffusers") is None:
        # Only asked whether a model is one of its pipelines.
        stand_in = types.ModuleType("diffusers")
        stand_in.StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})  # type: ignore[attr-defined]
        sys.modules["diffusers"] = stand_in


def pytest_pycollect_makemodule(module_path: Path, parent: Any) -> None:
    """Before a module's tests are collected: keep it offline, and open what is closed to other methods."""
    if not any(module_path.stem in argument for argument in parent.config.args):
        return  # a neighbour of what was asked for
    utils = importlib.import_module("tests.testing_utils")
    utils._HUB_MODEL_ACCESSES = _Everything()
    for name in ("tests.testing_common", f"tests.{module_path.stem}"):
        module = importlib.import_module(name)
        for holder in (module, *filter(inspect.isclass, vars(module).values())):
            _open_to_us(holder)
        for name in SKIPPED_BY_MISTAKE & vars(module).keys():
            setattr(module, name, _nothing)


class _Everything(dict[str, int]):
    """PEFT's record of the models that need no more network: all of them."""

    def __contains__(self, key: object) -> bool:
        return True

    def __missing__(self, key: str) -> int:
        return 0


def _nothing(*args: Any) -> None:
    pass


def _open_to_us(holder: Any) -> None:
    for name, other in READ_AS_OURS.items():
        test = vars(holder).get(name)
        if isinstance(test, types.FunctionType) and test.__globals__.get(other) is not CONFIG:
            ours = types.FunctionType(
                test.__code__, {**test.__globals__, other: CONFIG}, name, test.__defaults__
            )
            ours.__dict__.update(test.__dict__)
            setattr(holder, name, ours)


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Replace PEFT's lists of methods by ours."""
    marks = metafunc.definition.own_markers
    for index, mark in enumerate(marks):
        if mark.name != "parametrize":
            continue
        names = mark.args[0].split(",") if isinstance(mark.args[0], str) else mark.args[0]
        stripped = tuple(name.strip() for name in names)
        module, holder = metafunc.module.__name__.rpartition(".")[2], getattr(metafunc.cls, "__name__", "")
        values = values_for(stripped, module, metafunc.function.__name__, holder)
        if values is not None:
            marks[index] = pytest.mark.parametrize(stripped, values).mark


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the tests of ours that apply."""
    reasons = tomllib.loads(INAPPLICABLE.read_text())
    patterns = [*reasons["both"], *reasons.get(EXPERTS, {})]
    unused, kept, left = set(patterns), [], []
    for item in items:
        given = getattr(item, "callspec", None)
        ours = given is not None and any(
            value is CONFIG or isinstance(value, CONFIG) for value in given.params.values()
        )
        matching = {pattern for pattern in patterns if ours and fnmatch(label(item.nodeid), pattern)}
        unused -= matching
        (kept if ours and not matching else left).append(item)
    if unused:
        raise pytest.UsageError(f"{INAPPLICABLE.name} names tests that PEFT does not have: {sorted(unused)}")
    config.hook.pytest_deselected(items=left)
    items[:] = kept


def label(nodeid: str) -> str:
    """A test's name for the lists: module::class::test[parameters]."""
    path, _, rest = nodeid.partition("::")
    return f"{Path(path).stem}::{rest}"


_outcomes: dict[str, str] = {}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Remember how each test ended."""
    if report.when == "call" or not report.passed:
        _outcomes[label(report.nodeid)] = report.outcome


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write it down."""
    lines = [f"{outcome} {name}\n" for name, outcome in sorted(_outcomes.items())]
    Path(os.environ["PEFT_CONTRACT_OUTCOMES"]).write_text("".join(lines))
