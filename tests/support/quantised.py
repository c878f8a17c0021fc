"""The tiny Llama in every quantisation that runs on a CPU; packages that are not there are skipped by name.

What transformers can quantise is loaded through it, as users do. Other layers are put into the base by hand,
with the numbers that their package would read from a file drawn at random: what they compute is their own
affair, a mixture only adds to it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, QuantoConfig, TorchAoConfig

from peft_moe.tuner.base_checks import keep_unpacked

from .zoo import Zoo


@dataclass(frozen=True)
class Quantiser:
    """One way to quantise.

    Attributes:
        package: that does it.
        make: the base, from the zoo.
        merge: "reported" where PEFT packs merged weights again, else "refused".
        trains: whether transformers' Trainer takes it; plain loops train all.
        exact: outputs are as near as float32 sums; not where a layer rounds its inputs.
    """

    package: str
    make: Callable[[Zoo], nn.Module]
    merge: str
    trains: bool = True
    exact: bool = True


def by_transformers(config: Callable[[], Any]) -> Callable[[Zoo], nn.Module]:
    def make(zoo: Zoo) -> nn.Module:
        model = AutoModelForCausalLM.from_pretrained(
            zoo.saved_base("llama"), quantization_config=config(), dtype=torch.float32, device_map="cpu"
        )
        # A bare base would change its own 4-bit weights in its first eval pass; see
        # peft_moe/tuner/base_checks.py.
        keep_unpacked(model, trains=True)
        return model.eval()

    return make


def by_layer(replace: Callable[[nn.Linear], nn.Module]) -> Callable[[Zoo], nn.Module]:
    def make(zoo: Zoo) -> nn.Module:
        model = zoo.base("llama")
        with torch.random.fork_rng():
            torch.manual_seed(0)
            for name, module in list(model.named_modules()):
                if type(module) is nn.Linear and name != "lm_head":
                    model.set_submodule(name, replace(module).requires_grad_(False))
        return model.eval()

    return make


def bnb(**settings: Any) -> Callable[[Zoo], nn.Module]:
    return by_transformers(lambda: BitsAndBytesConfig(**settings))


def bnb4(kind: str, double: bool = False) -> Callable[[Zoo], nn.Module]:
    return bnb(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.float32,
    )


def torchao(kind: str, **settings: Any) -> Callable[[Zoo], nn.Module]:
    def config() -> TorchAoConfig:
        from torchao import quantization

        return TorchAoConfig(getattr(quantization, kind)(**settings))

    return by_transformers(config)


def hqq(linear: nn.Linear) -> nn.Module:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    settings = BaseQuantizeConfig(nbits=4, group_size=64)
    return HQQLinear(linear, settings, compute_dtype=torch.float32, device="cpu", del_orig=False)


def aqlm(linear: nn.Linear) -> nn.Module:
    from aqlm import QuantizedLinear

    layer = QuantizedLinear(linear.in_features, linear.out_features, 8, 1, 1, 16, False, dtype=torch.float32)
    with torch.no_grad():
        layer.codebooks.normal_(std=0.15)
        layer.codes.random_(-(2**15), 2**15)
        layer.scales.fill_(1.0)
    return layer


def packed(module: str, name: str) -> Callable[[nn.Linear], nn.Module]:
    """A 4-bit layer of gptqmodel with random codes, in groups of 32."""

    def replace(linear: nn.Linear) -> nn.Module:
        from importlib import import_module

        kind = getattr(import_module(f"gptqmodel.nn_modules.qlinear.{module}"), name)
        layer = kind(
            bits=4, group_size=32, sym=False, desc_act=False, in_features=linear.in_features,
            out_features=linear.out_features, bias=False, register_buffers=True,
        )  # fmt: skip
        for codes in (layer.qweight, layer.qzeros):
            codes.random_(-(2**31), 2**31 - 1)
        # Zeros in the middle of the codes: weights around 0.
        layer.qzeros.fill_(0x77777777)
        layer.scales.fill_(0.03)
        layer.post_init()
        return layer

    return replace


QUANTISERS: dict[str, Quantiser] = {
    "nf4": Quantiser("bitsandbytes", bnb4("nf4"), "reported"),
    "fp4": Quantiser("bitsandbytes", bnb4("fp4"), "reported"),
    "nf4, double": Quantiser("bitsandbytes", bnb4("nf4", double=True), "reported"),
    "fp4, double": Quantiser("bitsandbytes", bnb4("fp4", double=True), "reported"),
    "int8": Quantiser("bitsandbytes", bnb(load_in_8bit=True), "reported", exact=False),
    "torchao int8": Quantiser("torchao", torchao("Int8WeightOnlyConfig"), "reported"),
    "torchao int8, dynamic": Quantiser(
        "torchao", torchao("Int8DynamicActivationInt8WeightConfig"), "reported", exact=False
    ),
    "torchao float8": Quantiser("torchao", torchao("Float8WeightOnlyConfig"), "reported"),
    "torchao int4": Quantiser(
        "torchao", torchao("IntxWeightOnlyConfig", weight_dtype=torch.int4), "reported", trains=False
    ),
    "hqq 4 bits": Quantiser("hqq", by_layer(hqq), "reported"),
    "quanto int8": Quantiser("optimum.quanto", by_transformers(lambda: QuantoConfig("int8")), "refused"),
    "quanto int4": Quantiser("optimum.quanto", by_transformers(lambda: QuantoConfig("int4")), "refused"),
    "aqlm": Quantiser("aqlm", by_layer(aqlm), "refused"),
    "gptq": Quantiser("gptqmodel", by_layer(packed("torch", "TorchLinear")), "refused", exact=False),
    "awq": Quantiser("gptqmodel", by_layer(packed("torch_awq", "AwqTorchLinear")), "refused", exact=False),
}


def base_of(zoo: Zoo, name: str) -> nn.Module:
    """The base in this quantisation; skips, saying so, where its package is missing."""
    quantiser = QUANTISERS[name]
    pytest.importorskip(quantiser.package, reason=f"{name} needs {quantiser.package}, which is not installed")
    return quantiser.make(zoo)
