"""``linear_sizes`` over every kind of layer that the project meets: linear-like, look-alikes, wrapped ones.

The check of an adapter and the layer that carries it ask this one function: what passes the check can be
adapted.
"""

from __future__ import annotations

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from support.quantised import QUANTISERS, base_of
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_moe.errors import PeftMoeError
from peft_moe.experts.base_modules import base_modules, linear_sizes, unwrap
from peft_moe.tuner.layers.linear import MoLoraLayer


class NoWeight(nn.Module):
    """A quantised linear layer with packed codes alone; AutoGPTQ's names of the sizes where ``joined``."""

    def __init__(self, *, joined: bool) -> None:
        super().__init__()
        inputs, outputs = ("infeatures", "outfeatures") if joined else ("in_features", "out_features")
        setattr(self, inputs, 3)
        setattr(self, outputs, 5)
        self.register_buffer("qweight", torch.zeros(4, dtype=torch.int32))


class OddSizes(nn.Module):
    """A module with attributes that look like sizes."""

    def __init__(self, **attributes: object) -> None:
        super().__init__()
        for name, value in attributes.items():
            setattr(self, name, value)


def emptied(linear: nn.Module) -> nn.Module:
    """A layer whose weight lies elsewhere, as DeepSpeed's ZeRO-3 leaves it."""
    linear.weight = nn.Parameter(torch.empty(0))
    return linear


LINEAR = {
    "nn.Linear": lambda: nn.Linear(3, 5),
    "nn.Linear on meta": lambda: nn.Linear(3, 5, device="meta"),
    "nn.Linear, sharded": lambda: emptied(nn.Linear(3, 5)),
    "out_proj of nn.MultiheadAttention": lambda: nn.modules.linear.NonDynamicallyQuantizableLinear(3, 5),
    "Conv1D": lambda: Conv1D(5, 3),
    "Conv1D, sharded": lambda: emptied(Conv1D(5, 3)),
    "packed codes": lambda: NoWeight(joined=False),
    "packed codes of AutoGPTQ": lambda: NoWeight(joined=True),
}
OTHER = {
    "nn.Embedding": lambda: nn.Embedding(3, 5),
    "nn.Conv1d": lambda: nn.Conv1d(3, 5, 1),
    "nn.Conv2d": lambda: nn.Conv2d(3, 5, 1),
    "nn.Conv3d": lambda: nn.Conv3d(3, 5, 1),
    "nn.Bilinear": lambda: nn.Bilinear(3, 4, 5),
    "nn.LayerNorm": lambda: nn.LayerNorm(3),
    "nn.MultiheadAttention": lambda: nn.MultiheadAttention(4, 2),
    "sizes that are no numbers": lambda: OddSizes(in_features="3", out_features="5"),
    "one size only": lambda: OddSizes(in_features=3),
    "nx and nf, no Conv1D": lambda: OddSizes(nx=3, nf=5),
}


@pytest.mark.parametrize("kind", LINEAR)
def test_a_linear_layer_has_sizes_and_carries_experts(kind):
    layer = LINEAR[kind]()
    assert linear_sizes(layer) == (3, 5)
    adapted = MoLoraLayer(layer, "layer")
    assert (adapted.in_features, adapted.out_features) == (3, 5)
    assert linear_sizes(adapted) == (3, 5)


@pytest.mark.parametrize("kind", OTHER)
def test_any_other_layer_has_none_and_carries_no_experts(kind):
    layer = OTHER[kind]()
    assert linear_sizes(layer) is None
    with pytest.raises(PeftMoeError, match="not linear-like"):
        MoLoraLayer(layer, "layer")


@pytest.mark.parametrize("name", ["Linear4bit", "Linear8bitLt"])
def test_layers_of_bitsandbytes(name):
    bnb = pytest.importorskip("bitsandbytes")
    assert linear_sizes(getattr(bnb.nn, name)(3, 5)) == (3, 5)


def sizes_in(model: nn.Module) -> dict[str, tuple[int, int]]:
    sizes = {name: linear_sizes(module) for name, module in base_modules(model).items()}
    return {name: pair for name, pair in sizes.items() if pair is not None}


@pytest.mark.parametrize("name", QUANTISERS)
def test_quantised_layers_have_the_sizes_of_those_that_they_replace(zoo, name):
    assert sizes_in(base_of(zoo, name)) == sizes_in(zoo.base("llama"))


class Layers(nn.Module):
    """A layer of every kind that PEFT wraps."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.conv1d = nn.Linear(3, 5), Conv1D(5, 3)
        self.embedding, self.conv, self.saved = nn.Embedding(3, 5), nn.Conv2d(3, 5, 1), nn.Linear(3, 5)


SIZES = {"linear": (3, 5), "conv1d": (3, 5), "embedding": None, "conv": None, "saved": (3, 5)}


def test_a_wrapped_layer_counts_as_what_is_inside():
    targets = ["linear", "conv1d", "embedding", "conv"]
    config = LoraConfig(target_modules=targets, modules_to_save=["saved"], fan_in_fan_out=True)
    model = get_peft_model(Layers(), config).base_model.model
    # The wrappers of embeddings and convolutions have in_features and out_features as well.
    assert model.embedding.in_features == model.conv.in_features == 3
    assert {name: linear_sizes(getattr(model, name)) for name in SIZES} == SIZES
    assert type(unwrap(model.linear)) is nn.Linear
    assert type(unwrap(model.saved)) is nn.Linear


def test_the_method_that_wraps_does_not_matter():
    model = get_peft_model(Layers(), IA3Config(target_modules=["linear"], feedforward_modules=[]))
    assert linear_sizes(model.base_model.model.linear) == (3, 5)
