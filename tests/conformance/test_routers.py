"""The conformance suite over every registered scorer, a custom one, and custom ones that are broken."""

from __future__ import annotations

import ast
import inspect

import pytest
import torch
from torch import nn

from peft_moe import PeftMoeError, Scorer, register_router, testing
from peft_moe.routers import available_scorers
from peft_moe.testing import CHECKS, RouterCheckError, check_router


@pytest.fixture
def custom(registry):
    """Registers a class as "custom" for one test."""
    return register_router("custom")


@pytest.mark.parametrize("name", available_scorers())
@pytest.mark.parametrize("seed", [0, 1])
def test_registered(name, seed):
    assert check_router(name, seed=seed) == list(CHECKS)


class Prototypes(Scorer):
    """What CONTRIBUTING shows to newcomers: similarity with one learnt vector per expert."""

    paper = "none"

    def __init__(self, settings, in_features):
        super().__init__(settings, in_features)
        self.prototypes = nn.Parameter(torch.randn(settings.num_columns, in_features))

    def forward(self, x):
        unit = nn.functional.normalize(self.prototypes.to(x.dtype), dim=-1)
        return nn.functional.normalize(x, dim=-1) @ unit.T


class Table(Scorer):
    """Learnt weights that do not read the input."""

    reads_input = False

    def __init__(self, settings, in_features):
        super().__init__(settings, in_features)
        self.table = nn.Parameter(torch.zeros(settings.num_columns))

    def forward(self, x):
        return self.table.to(x.dtype).view(1, 1, -1)


@pytest.mark.parametrize("cls", [Prototypes, Table])
def test_custom(cls, custom):
    custom(cls)
    check_router("custom")


class WrongWidth(Prototypes):
    def forward(self, x):
        return super().forward(x)[..., :2]


class ForgetsNull(Prototypes):
    def __init__(self, settings, in_features):
        super().__init__(settings, in_features)
        self.prototypes = nn.Parameter(torch.randn(settings.num_experts, in_features))


class NotANumber(Prototypes):
    def forward(self, x):
        return super().forward(x) / (x[..., :1] * 0)


class Narrow(Prototypes):
    def forward(self, x):
        return super().forward(x.float())


class Noisy(Prototypes):
    def forward(self, x):
        scores = super().forward(x)
        return scores + 0.01 * torch.randn_like(scores)


class InPlace(Prototypes):
    def forward(self, x):
        return super().forward(x.div_(x.norm(dim=-1, keepdim=True)))


class ReadsBatch(Prototypes):
    def forward(self, x):
        return super().forward(x - x.mean(0, keepdim=True))


class ReadsFuture(Prototypes):
    def forward(self, x):
        return super().forward(x + x.flip(1).cumsum(1).flip(1))


class ReadsPast(Prototypes):
    def forward(self, x):
        return super().forward(x.cumsum(1))


class SaysItDoesNotRead(Prototypes):
    reads_input = False

    def forward(self, x):
        return super().forward(x)[:1, :1]


class DeadParameter(Prototypes):
    def __init__(self, settings, in_features):
        super().__init__(settings, in_features)
        self.unused = nn.Parameter(torch.zeros(2))


class NothingToTrain(Scorer):
    def forward(self, x):
        return x[..., : self.settings.num_columns]


class HiddenState(Scorer):
    trainable = False

    def __init__(self, settings, in_features):
        super().__init__(settings, in_features)
        self.hidden = torch.randn(settings.num_columns, in_features)

    def forward(self, x):
        return x @ self.hidden.T.to(x.dtype)


class NotSaved(Scorer):
    """Decides by a buffer that PEFT's file does not hold, since it is outside of the state_dict."""

    trainable = False
    draws = 0

    def __init__(self, settings, in_features):
        super().__init__(settings, in_features)
        self.register_buffer("w", torch.randn(settings.num_columns, in_features), persistent=False)

    def forward(self, x):
        return x @ self.w.T.to(x.dtype)


class ExtraState(Prototypes):
    """Its state_dict holds more than tensors, which no safetensors file can."""

    def get_extra_state(self):
        return {"steps": 3}

    def set_extra_state(self, state):
        pass


class OtherwiseWhenFrozen(Prototypes):
    """A loaded mixture does not train."""

    def forward(self, x):
        return super().forward(x) * (1 + self.prototypes.requires_grad)


class Raises(Prototypes):
    def forward(self, x):
        return self.prototypes @ x


BROKEN = [
    (WrongWidth, "shapes", "use settings.num_columns"),
    (ForgetsNull, "shapes", "null_expert=True"),
    (NotANumber, "shapes", "NaN or infinity"),
    (Narrow, "dtypes", "compute in the dtype of x"),
    (Noisy, "determinism", "training mode only"),
    (InPlace, "determinism", "in place"),
    (ReadsBatch, "token independence", "other sequences"),
    (ReadsFuture, "token independence", "later tokens"),
    (ReadsPast, "token independence", "earlier tokens"),
    (SaysItDoesNotRead, "token independence", "reads_input is False"),
    (DeadParameter, "gradients", "'unused'"),
    (NothingToTrain, "gradients", "trainable = False"),
    (HiddenState, "state_dict", "parameters or buffers"),
    (ExtraState, "state_dict", "_extra_state"),
    (OtherwiseWhenFrozen, "saving", "loaded mixture"),
    (Raises, "shapes", "RuntimeError"),
    (NotSaved, "state_dict", "parameters or buffers"),
]


@pytest.mark.parametrize(("cls", "title", "words"), BROKEN, ids=lambda v: getattr(v, "__name__", None))
def test_broken_is_caught(cls, title, words, custom):
    custom(cls)
    with pytest.raises(RouterCheckError) as caught:
        check_router("custom")
    assert f"router 'custom', {title}: " in str(caught.value)
    assert words in str(caught.value)


def test_unknown_name():
    with pytest.raises(PeftMoeError, match="'nobody'"):
        check_router("nobody")


def test_the_suite_needs_no_test_runner():
    imported = {
        alias.name.split(".")[0]
        for node in ast.walk(ast.parse(inspect.getsource(testing)))
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    assert "pytest" not in imported
    assert "pytest" not in inspect.getsource(testing)
