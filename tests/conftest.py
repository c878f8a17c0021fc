"""Fixtures of all tests."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator

import hypothesis
import numpy as np
import pytest
import torch
from support.zoo import Zoo
from torch import nn
from transformers.utils import logging as transformers_logging

from peft_moe.routers.scorer import _SCORERS
from peft_moe.tuner.base_checks import keep_unpacked

# Properties: the same examples at every push; "long" draws new ones. No test depends on speed.
hypothesis.settings.register_profile(
    "push", max_examples=25, derandomize=True, database=None, deadline=None, print_blob=True
)
hypothesis.settings.register_profile(
    "long", max_examples=int(os.environ.get("PEFT_MOE_EXAMPLES", "10000")), deadline=None, print_blob=True
)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "push"))


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup() -> None:
    """Every fixture draws the same numbers, whichever tests ran before it in this process."""
    _seed()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call() -> None:
    """Every test draws the same numbers, alone and in any company."""
    _seed()


def _seed() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def registry() -> Iterator[dict[str, type]]:
    """Routers that a test registers are gone after it: other tests list what is registered."""
    before = dict(_SCORERS)
    yield _SCORERS
    _SCORERS.clear()
    _SCORERS.update(before)


@pytest.fixture(autouse=True)
def _bars_as_before() -> Iterator[None]:
    """Commands that silence transformers' bars and words do so for their own test alone."""
    bars, level = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    yield
    (transformers_logging.enable_progress_bar if bars else transformers_logging.disable_progress_bar)()
    transformers_logging.set_verbosity(level)


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    """Tiny bases, real adapters and mixtures of them, cached for the session."""
    return Zoo(tmp_path_factory.mktemp("zoo"))


@pytest.fixture(scope="session")
def four_bit(zoo: Zoo) -> Callable[[], nn.Module]:
    """Makes the tiny Llama in nf4, through transformers as users do."""
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    def load() -> nn.Module:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        )
        model = AutoModelForCausalLM.from_pretrained(
            zoo.saved_base("llama"), quantization_config=quantization, dtype=torch.float32, device_map="cpu"
        )
        # A bare base would change its own weights in its first eval pass; see peft_moe/tuner/base_checks.py.
        keep_unpacked(model, trains=True)
        return model.eval()

    return load
