"""Every bad adapter is refused by name, before the base is touched: one table, one exception.

A row damages a good adapter and lists words that the message must hold: the field or file, its
value, and a word of the fix. Each row also proves that base and folder stay as they were.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import shutil
import struct
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import errors
from hypothesis import assume, given
from hypothesis import strategies as st
from peft import LoHaConfig, LoraConfig, PeftType, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, LlamaModel

from peft_moe.errors import PeftMoeError
from peft_moe.experts.adapter import open_experts
from peft_moe.experts.config_rules import FIELD_RULES
from peft_moe.io import sources

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
Q0 = "model.layers.0.self_attn.q_proj"
A0 = f"base_model.model.{Q0}.lora_A.weight"
B0 = f"base_model.model.{Q0}.lora_B.weight"
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 32,
}


def llama(**sizes) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, **sizes}))


class Case:
    """What a row may damage: the folder of adapter "math", the mapping given, the base."""

    def __init__(self, folder: Path):
        self.folder, self.experts, self.base = folder, {"math": str(folder)}, BASE

    @property
    def config(self) -> dict:
        return json.loads((self.folder / CONFIG).read_text())

    def edit(self, **fields) -> None:
        (self.folder / CONFIG).write_text(json.dumps(self.config | fields))

    def tensors(self, change: Callable[[dict], object]) -> None:
        tensors = load_file(self.folder / WEIGHTS)
        change(tensors)
        save_file(tensors, self.folder / WEIGHTS)

    def bytes(self, change: Callable[[bytes], bytes]) -> None:
        path = self.folder / WEIGHTS
        path.write_bytes(change(path.read_bytes()))

    def train(self, config, base=None, **save) -> None:
        shutil.rmtree(self.folder)
        model = get_peft_model(base or llama(), config)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.save_pretrained(self.folder, **save)

    def second(self, name="code", **fields) -> None:
        other = self.folder.parent / f"second_{len(self.experts)}"
        shutil.copytree(self.folder, other)
        (other / CONFIG).write_text(json.dumps(self.config | fields))
        self.experts[name] = str(other)

    def named(self, *names) -> None:
        self.experts = dict.fromkeys(names, str(self.folder))

    def rebase(self, base=None, name="", commit=None, **sizes) -> None:
        self.base = base or llama(**sizes)
        self.base.name_or_path, self.base.config._commit_hash = name, commit


BASE = llama()
GOOD = tempfile.TemporaryDirectory()
_model = get_peft_model(llama(), LoraConfig(target_modules=["q_proj", "v_proj"], r=4))
for _name, _parameter in _model.named_parameters():
    if "lora_B" in _name:
        nn.init.normal_(_parameter)
_model.save_pretrained(GOOD.name)
del _model


def edit(**fields):
    return lambda case: case.edit(**fields)


def drop(field):
    def damage(case):
        config = case.config
        del config[field]
        (case.folder / CONFIG).write_text(json.dumps(config))

    return damage


def raw(text):
    return lambda case: (case.folder / CONFIG).write_bytes(text)


def tensors(change):
    return lambda case: case.tensors(change)


def put(key, *shape, dtype=torch.float32):
    return lambda case: case.tensors(lambda t: t.update({key: torch.ones(*shape).to(dtype)}))


def poison(key, index, value):
    def change(tensors):
        tensors[key][index] = value

    return lambda case: case.tensors(change)


def header(change):
    """Rewrite the JSON header of the safetensors file."""

    def damage(data):
        size = struct.unpack("<Q", data[:8])[0]
        head = json.dumps(change(json.loads(data[8 : 8 + size]))).encode()
        return struct.pack("<Q", len(head)) + head + data[8 + size :]

    return lambda case: case.bytes(damage)


def train(save=None, **config):
    return lambda case: case.train(LoraConfig(r=4, **config), **(save or {}))


def source(text):
    return lambda case: case.experts.update(math=text)


def names(*given):
    return lambda case: case.named(*given)


def remove(filename):
    return lambda case: (case.folder / filename).unlink()


def pickle_only(case):
    (case.folder / WEIGHTS).rename(case.folder / "adapter_model.bin")


def conv_base(case):
    base = nn.Sequential(nn.Conv2d(2, 3, 1), nn.Linear(4, 4))
    case.train(LoraConfig(r=4, target_modules=["0", "1"]), copy.deepcopy(base))
    case.base = base


def lower_ranks(tensors):
    tensors[A0], tensors[B0] = tensors[A0][:3].clone(), tensors[B0][:, :3].clone()


def drop_layer(tensors):
    for key in [key for key in tensors if "layers.1" in key]:
        del tensors[key]


HUGE = 10**9
BIG = {"vocab_size": 40}
SAVE = {"save_embedding_layers": True}
GPT2 = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32, n_positions=8))
NAME, MAPPING = "base_model_name_or_path", {"base_model_class": "MistralForCausalLM"}

# id: (how to damage the good adapter, words of the message besides the expert's name)
ROWS: dict[str, tuple[Callable, list[str]]] = {
    # the folder and its files
    "no folder": (source("./nowhere"), ["no folder", "./nowhere", "correct the path"]),
    "empty path": (source(""), ["no folder", "''", "correct"]),
    "path of one word": (source("mth"), ["no folder", "'mth'", "correct"]),
    "typo beside a folder": (source("adapters/mth"), ["'adapters/mth'", "near it", "'math'"]),
    "path is a file": (source("adapters/math/" + CONFIG), ["is a file", CONFIG, "folder"]),
    "path is a number": (source(3), ["3", "int", "string"]),
    "path is null": (source(None), ["None", "string"]),
    "NUL in path": (source("a\0b"), ["no folder", "correct"]),
    "path too long": (source("x" * 5000), ["no folder", "correct"]),
    "config missing": (remove(CONFIG), ["no " + CONFIG, "save_pretrained"]),
    "weights missing": (remove(WEIGHTS), ["no " + WEIGHTS, "save_pretrained"]),
    "pickle only": (pickle_only, ["no " + WEIGHTS, "adapter_model.bin", "run code", "convert"]),
    # the config as a file
    "config empty": (raw(b""), [CONFIG, "JSON", "save the adapter"]),
    "config cut": (raw(b'{"r": 4, '), [CONFIG, "JSON", "repair"]),
    "config not UTF-8": (raw(b'{"r": "\xff"}'), [CONFIG, "utf-8", "repair"]),
    "config is a list": (raw(b"[1]"), [CONFIG, "list", "object"]),
    "config nested deeply": (raw(b"[" * 100000), [CONFIG, "JSON", "repair"]),
    "config key twice": (raw(b'{"r": 4, "r": 8}'), [CONFIG, "'r'", "twice"]),
    "int of 5000 digits": (raw(b'{"r": ' + b"9" * 5000 + b"}"), [CONFIG, "JSON", "repair"]),
    # the config's fields
    "peft_type missing": (drop("peft_type"), ["no peft_type", "save"]),
    "peft_type null": (edit(peft_type=None), ["peft_type=None", "LORA"]),
    "r missing": (drop("r"), ["no r", "save"]),
    "lora_alpha missing": (drop("lora_alpha"), ["no lora_alpha", "save"]),
    "target_modules missing": (drop("target_modules"), ["no target_modules", "save"]),
    **{
        f"r {value!r}": (edit(r=value), [f"r={value!r}", "whole number", "correct"])
        for value in (0, -1, "8", 2.5, None, True, float("nan"), [4])
    },
    "r huge": (edit(r=HUGE), [f"r={HUGE}", "rank 4", "correct"]),
    "r too small": (edit(r=3), ["r=3", "rank 4", WEIGHTS, "correct"]),
    **{
        f"lora_alpha {value!r}": (edit(lora_alpha=value), ["lora_alpha=", "finite", "correct"])
        for value in (0, -4, "16", None, True, float("nan"), float("inf"), 10**400)
    },
    **{
        f"{field} {value!r}": (edit(**{field: value}), [field + "=", words, "correct"])
        for field, value, words in (
            ("use_rslora", "yes", "true or false"),
            ("use_rslora", 1, "true or false"),
            ("rank_pattern", [4], "object"),
            ("rank_pattern", {"q_proj": 0}, "{'q_proj': 0}"),
            ("rank_pattern", {"q_proj": "4"}, "whole numbers"),
            ("rank_pattern", {"(": 4}, "regexes"),
            ("alpha_pattern", {"q_proj": float("nan")}, "finite"),
            ("alpha_pattern", {"q_proj": -1}, "-1"),
            ("alpha_pattern", {"[": 4}, "regexes"),
            ("target_modules", None, "list of names"),
            ("target_modules", 3, "list of names"),
            ("target_modules", [3], "[3]"),
            ("target_modules", "(", "regex"),
            ("exclude_modules", 3, "null"),
            ("exclude_modules", "*", "regex"),
            ("layers_to_transform", "1", "layer index"),
            ("layers_to_transform", [-1], "[-1]"),
            ("layers_to_transform", 1.5, "layer index"),
            ("layers_pattern", 3, "name"),
            ("revision", 3, "string"),
            (NAME, ["a"], "string"),
            ("auto_mapping", "Llama", "object"),
        )
    },
    "rank_pattern differs": (edit(rank_pattern={"q_proj": 8}), ["rank 4", "r=8", "rank_pattern"]),
    "regex with layers": (
        edit(target_modules=".*q_proj", layers_to_transform=[0]),
        ["layers_to_transform=[0]", "regex"],
    ),
    "unknown field": (edit(use_magic=True), ["use_magic", "True", "upgrade"]),
    **{
        f"init {init}": (
            edit(init_lora_weights=init),
            ["init_lora_weights", repr(init), "save again"],
        )
        for init in ("pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "new", 3)
    },
    # the base
    "base of another name": (
        lambda c: (c.edit(**{NAME: "org/Tiny-7B"}), c.rebase(name="org/Tiny-1B")),
        [NAME, "org/Tiny-7B", "org/Tiny-1B", "allow_base_mismatch"],
    ),
    "base at another commit": (
        lambda c: (c.edit(revision="a" * 40), c.rebase(commit="b" * 40)),
        ["revision", "aaaa", "bbbb", "allow_base_mismatch"],
    ),
    "base of another class": (
        edit(auto_mapping=MAPPING),
        ["auto_mapping.base_model_class", "MistralForCausalLM", "allow_base_mismatch"],
    ),
    "experts of two bases": (
        lambda c: (c.edit(**{NAME: "org/a"}), c.second("math2", **{NAME: "org/b"})),
        [NAME, "org/a", "org/b", "allow_base_mismatch"],
    ),
    "experts of two revisions": (
        lambda c: (c.edit(revision="v1"), c.second("math2", revision="v2")),
        ["revision", "v1", "v2", "allow_base_mismatch"],
    ),
    "wider base": (
        lambda c: c.rebase(hidden_size=32),
        [Q0, "[4, 16]", "(32, 32)", "load the base"],
    ),
    "other k/v heads": (
        lambda c: c.rebase(num_key_value_heads=4),
        ["v_proj", "[8, 4]", "(16, 16)", "load the base"],
    ),
    "fewer layers": (
        lambda c: c.rebase(num_hidden_layers=1),
        ["layers.1", "does not have", "load the base"],
    ),
    "other module names": (
        lambda c: (c.edit(auto_mapping=None), c.rebase(GPT2)),
        [Q0, "transformer.h.0", "architecture"],
    ),
    "model without its head": (
        lambda c: c.rebase(LlamaModel(LlamaConfig(**SIZES))),
        [Q0, "layers.0.self_attn.q_proj", "architecture"],
    ),
    # the weights as a file
    "weights empty": (lambda c: c.bytes(lambda d: b""), [WEIGHTS, "safetensors", "again"]),
    "cut by one byte": (lambda c: c.bytes(lambda d: d[:-1]), [WEIGHTS, "truncated", "again"]),
    "cut in half": (lambda c: c.bytes(lambda d: d[: len(d) // 2]), [WEIGHTS, "truncated"]),
    "byte too many": (lambda c: c.bytes(lambda d: d + b"x"), [WEIGHTS, "again"]),
    "header of 2**60": (
        lambda c: c.bytes(lambda d: struct.pack("<Q", 2**60) + d[8:]),
        [WEIGHTS, "header", "again"],
    ),
    "header no JSON": (lambda c: c.bytes(lambda d: d[:8] + b"x" * len(d[8:])), [WEIGHTS, "JSON"]),
    "header with holes": (
        header(lambda h: {k: v for k, v in h.items() if k != A0}),
        [WEIGHTS, "again"],
    ),
    "header's shape wrong": (
        header(lambda h: h | {A0: h[A0] | {"shape": [5, 16]}}),
        [WEIGHTS, "again"],
    ),
    "a pickle named safetensors": (
        lambda c: c.bytes(lambda d: b"\x80\x04K\x01." * 9),
        [WEIGHTS, "again"],
    ),
    # its keys
    "no tensors": (tensors(dict.clear), [WEIGHTS, "no tensors", "save"]),
    "one A missing": (tensors(lambda t: t.pop(A0)), ["lacks", A0, "save"]),
    "one B missing": (tensors(lambda t: t.pop(B0)), ["lacks", B0, "save"]),
    "a layer missing": (tensors(drop_layer), ["layers.1", "no tensors", "target_modules"]),
    "targets too narrow": (
        edit(target_modules=["q_proj"]),
        ["target_modules=['q_proj']", "v_proj", "widen"],
    ),
    "targets too wide": (
        edit(target_modules=["q_proj", "v_proj", "o_proj"]),
        ["target_modules", "o_proj", "narrow"],
    ),
    "targets none": (edit(target_modules=[]), ["target_modules=[]", "widen"]),
    "targets all-linear": (
        edit(target_modules="all-linear"),
        ["all-linear", "and 9 more", "narrow"],
    ),
    "excludes what it has": (
        edit(exclude_modules=["q_proj"]),
        ["q_proj", "does not match", "widen"],
    ),
    "layers_to_transform narrower": (edit(layers_to_transform=[0]), ["layers.1", "widen"]),
    "unknown key": (put("extra", 2), ["'extra'", "neither", "save"]),
    "key without prefix": (put(f"{Q0}.lora_A.weight", 4, 16), [Q0, "neither", "save"]),
    "adapter's name in key": (
        put(f"base_model.model.{Q0}.lora_A.default.weight", 4, 16),
        ["lora_A.default", "neither", "save"],
    ),
    "module the base lacks": (
        lambda c: [put(k.replace("layers.0", "layers.9"), 4, 16)(c) for k in (A0, B0)],
        ["layers.9", "does not have", "load the base"],
    ),
    "DoRA, config denies it": (
        lambda c: (train(target_modules=["q_proj"], use_dora=True)(c), c.edit(use_dora=False)),
        ["lora_magnitude_vector", "DoRA", "plain LoRA"],
    ),
    "lora_bias, config denies it": (
        lambda c: (train(target_modules=["q_proj"], lora_bias=True)(c), c.edit(lora_bias=False)),
        ["lora_B.bias", "biases", "plain LoRA"],
    ),
    "saved while compiled": (put(f"base_model.model._orig_mod.{Q0}.x", 2), ["compiled", "save"]),
    "embedding": (
        train(target_modules=["q_proj", "embed_tokens"]),
        ["embedding", "'model.embed_tokens'", "exclude"],
    ),
    "LoRA on embedding alone": (
        put("base_model.model.model.embed_tokens.lora_embedding_A", 4, 32),
        ["lora_embedding_A", "embedding", "exclude"],
    ),
    "linear keys for embedding": (
        lambda c: [put(f"base_model.model.model.embed_tokens.lora_{s}.weight", 4, 4)(c) for s in "AB"],
        ["'model.embed_tokens'", "not linear-like", "exclude_modules"],
    ),
    "norm": (
        put("base_model.model.model.norm.lora_A.weight", 4, 16),
        ["'model.norm'", "LlamaRMSNorm", "not linear-like", "exclude_modules"],
    ),
    "convolution": (conv_base, ["module '0' (Conv2d)", "not linear-like", "exclude_modules"]),
    "head": (train(target_modules=["q_proj", "lm_head"]), ["'lm_head'", "exclude"]),
    "head as a plain pair": (
        lambda c: [put(f"base_model.model.lm_head.lora_{s}.weight", 4, 4)(c) for s in "AB"],
        ["output head 'lm_head'", "exclude_modules=['lm_head']"],
    ),
    "whole embedding": (
        lambda c: train(SAVE, target_modules=["q_proj"])(c),
        ["'lm_head'", "exclude", "save_embedding_layers=False"],
    ),
    "vocabulary extended": (
        lambda c: c.train(LoraConfig(r=4, target_modules=["q_proj"]), llama(**BIG), **SAVE),
        ["adapter vocab 40, base 32", "resize the base to 40"],
    ),
    # its tensors
    **{
        f"dtype {dtype}": (put(A0, 4, 16, dtype=dtype), [A0, word, "float32", "cast"])
        for dtype, word in (
            (torch.float64, "F64"),
            (torch.int64, "I64"),
            (torch.int8, "I8"),
            (torch.bool, "BOOL"),
            (torch.float8_e4m3fn, "F8_E4M3"),
        )
    },
    "ranks of A and B differ": (put(A0, 5, 16), [Q0, "rank 5 in lora_A", "4 in lora_B", "save"]),
    "ranks lower than r": (tensors(lower_ranks), [Q0, "rank 3", "r=4", "correct"]),
    "rank 0": (lambda c: [put(A0, 0, 16)(c), put(B0, 16, 0)(c)], [Q0, "rank 0", "r=4"]),
    "A too wide": (put(A0, 4, 17), [Q0, "[4, 17]", "(16, 16)", "load the base"]),
    "B too long": (put(B0, 17, 4), [Q0, "[17, 4]", "(16, 16)", "load the base"]),
    "A and B swapped": (lambda c: [put(A0, 16, 4)(c), put(B0, 4, 16)(c)], [Q0, "[16, 4]", "base"]),
    "one dimension": (put(A0, 64), [A0, "[64]", "two dimensions", "gather"]),
    "empty shard": (put(A0, 0), [A0, "[0]", "two dimensions", "gather"]),
    "three dimensions": (put(B0, 16, 4, 1), [B0, "[16, 4, 1]", "two dimensions"]),
    "NaN": (poison(A0, (2, 3), float("nan")), [A0, "nan", "[2, 3]", "earlier checkpoint"]),
    "infinity": (poison(B0, (5, 1), float("inf")), [B0, "inf", "[5, 1]", "retrain"]),
    "minus infinity": (poison(B0, (15, 3), float("-inf")), [B0, "-inf", "[15, 3]", "retrain"]),
    "second expert bad": (
        lambda c: c.second("math2", r=5),
        ["math2", "r=5", "rank 4"],
    ),
}

# Fields whose "on" value is of a particular form; all others are given a non-empty object.
ON = {"bias": "all", "modules_to_save": ["lm_head"], "target_parameters": ["x.weight"]}
REFUSED = [name for name, rule in FIELD_RULES.items() if rule.use == "refused"]
ROWS |= {
    f"LoraConfig.{name}": (
        edit(**{name: ON.get(name, {"on": 1})}),
        [f"{name}=", FIELD_RULES[name].fix],
    )
    for name in REFUSED
}
ROWS |= {
    f"peft_type {kind.value}": (edit(peft_type=kind.value), [f"peft_type='{kind.value}'", "LORA"])
    for kind in PeftType
    if kind != PeftType.LORA
}
ROWS["a real LoHa"] = (
    lambda c: c.train(LoHaConfig(r=4, target_modules=["q_proj"])),
    ["peft_type='LOHA'", "LORA", "convert"],
)

# Rows about names; the word that the message must begin with is the name itself.
SAFE = "expert_"
NAMES: dict[str, tuple[tuple, list[str]]] = {
    **{
        f"name {name!r}"[:40]: ((name,), ["[A-Za-z0-9_-]", "rename"])
        for name in (
            "",
            "a.b",
            "a/b",
            "../x",
            "/abs",
            "a b",
            "a\nb",
            "é",
            "x" * 65,
            "a\0",
            "math\n",
        )
    },
    **{
        f"reserved {name}": ((name,), [repr(name), "reserved", "rename"])
        for name in (
            "null",
            "base",
            "__base__",
            "lora_A",
            "lora_B",
            "weight",
            "bias",
            "keys",
            "Null",
        )
    },
    **{
        f"path part {name}": ((name,), [repr(name), "module paths", SAFE + name])
        for name in ("0", "1", "model", "layers", "q_proj", "lm_head")
    },
    "equal but for case": (("math", "Math"), ["'math'", "case", "rename"]),
    "a number": ((3,), ["3", "int", "string"]),
    "none at all": ((), ["experts={}", "{'math'"]),
}
ROWS |= {row: (names(*given), words) for row, (given, words) in NAMES.items()}


def tree(module: nn.Module) -> list[tuple]:
    return [(name, type(child), id(child)) for name, child in module.named_modules()]


def state(module: nn.Module) -> dict:
    return {name: (t.clone(), t.requires_grad) for name, t in module.state_dict(keep_vars=True).items()}


def files(folder: Path) -> dict:
    return {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")}


def make_case(tmp_path: Path) -> Case:
    folder = tmp_path / "adapters" / "math"
    shutil.copytree(GOOD.name, folder)
    return Case(folder)


@pytest.mark.parametrize("row", ROWS)
def test_refused_by_name_and_nothing_touched(row, tmp_path, monkeypatch):
    damage, words = ROWS[row]
    monkeypatch.chdir(tmp_path)
    case = make_case(tmp_path)
    damage(case)
    before = tree(case.base), state(case.base), files(tmp_path)
    with pytest.raises(PeftMoeError) as caught:
        open_experts(case.experts, case.base)
    message = str(caught.value)
    if row not in NAMES:
        words = ["math", *words]
    for word in ["Fix: ", *words]:
        assert word in message, f"{word!r} is not in: {message}"
    assert len(message.splitlines()) == 2, message
    assert len(message) < 800, message
    assert tree(case.base) == before[0]
    assert files(tmp_path) == before[2]
    for name, (tensor, grad) in state(case.base).items():
        assert torch.equal(tensor, before[1][name][0])
        assert grad == before[1][name][1]


def test_the_undamaged_adapter_opens(tmp_path):
    (file,) = open_experts(make_case(tmp_path).experts, BASE)
    assert len(file.modules) == 4


@pytest.mark.parametrize("experts", [["adapters/math"], "adapters/math", None, []])
def test_experts_that_are_no_mapping_are_refused(experts):
    with pytest.raises(PeftMoeError, match=r"experts=.*\nFix: .*'math'"):
        open_experts(experts, BASE)


def test_every_field_of_lora_config_is_decided():
    """A field that a new PEFT adds must be decided before this passes again."""
    assert set(FIELD_RULES) == {field.name for field in dataclasses.fields(LoraConfig)}
    assert all(rule.why and bool(rule.fix) == (rule.use == "refused") for rule in FIELD_RULES.values())


@pytest.mark.parametrize("name", [name for name, rule in FIELD_RULES.items() if rule.use == "ignored"])
def test_ignored_fields_are_ignored(name, tmp_path):
    case = make_case(tmp_path)
    case.edit(**{name: {"on": 1}})
    assert open_experts(case.experts, BASE)


@pytest.mark.parametrize(
    "name", ["auto_mapping", "revision", "rank_pattern", "alpha_pattern", "use_rslora", "new"]
)
def test_null_is_the_default(name, tmp_path):
    case = make_case(tmp_path)
    case.edit(**{name: None})
    assert open_experts(case.experts, BASE)


def test_configs_come_before_headers_and_headers_before_values(tmp_path):
    case = make_case(tmp_path)
    case.second("three", r=0)
    case.second("two")
    poison(A0, (0, 0), float("nan"))(case)
    with pytest.raises(PeftMoeError, match=r"'three'.*r=0"):
        open_experts(case.experts, BASE)
    case.experts.pop("three")
    put(A0, 5, 16)(two := Case(Path(case.experts["two"])))
    with pytest.raises(PeftMoeError, match=r"'two'.*rank 5"):
        open_experts(case.experts, BASE)
    two.tensors(lambda t: t.update({A0: torch.ones(4, 16)}))
    with pytest.raises(PeftMoeError, match=r"'math'.*nan"):
        open_experts(case.experts, BASE)


def hub_error(kind):
    error = kind.__new__(kind)
    Exception.__init__(error, "first line\nsecond line")
    return error


HUB = {
    "gated": (errors.GatedRepoError, ["gated", "log in"]),
    "no revision": (errors.RevisionNotFoundError, ["'v9'", "no such revision", "branch"]),
    "no repository": (errors.RepositoryNotFoundError, ["no such repository", "correct the path"]),
    "no file": (errors.RemoteEntryNotFoundError, [CONFIG, "no such file", "PEFT adapter"]),
    "no network": (ConnectionError, ["first line", "try again"]),
}


@pytest.mark.parametrize("row", HUB)
def test_what_the_hub_refuses_is_refused_in_words(row, tmp_path, monkeypatch):
    kind, words = HUB[row]

    def download(*_, **__):
        raise hub_error(kind)

    monkeypatch.chdir(tmp_path)
    # CI runs offline, where the advice is another (test_hub_id_offline_says_so).
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(sources, "hf_hub_download", download)
    with pytest.raises(PeftMoeError) as caught:
        open_experts({"math": "org/math@v9"}, BASE)
    for word in ["math", "org/math", "Fix: ", *words]:
        assert word in str(caught.value)
    assert len(str(caught.value).splitlines()) == 2


def test_pickle_only_on_the_hub(tmp_path, monkeypatch):
    def download(repo, filename, revision=None):
        if filename == WEIGHTS:
            raise hub_error(errors.RemoteEntryNotFoundError)
        return str(Path(GOOD.name) / filename)

    monkeypatch.setattr(sources, "hf_hub_download", download)
    with pytest.raises(PeftMoeError, match=r"'math'.*adapter_model.safetensors.*adapter_model.bin"):
        open_experts({"math": "org/math"}, BASE)


def test_hub_id_offline_says_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(PeftMoeError, match=r"'math'.*'no-such-org/math'.*HF_HUB_OFFLINE=1"):
        open_experts({"math": "no-such-org/math"}, BASE)
    assert not list(tmp_path.iterdir())


def test_a_typo_beside_a_folder_is_never_fetched(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sources, "hf_hub_download", lambda *_, **__: pytest.fail("went to the Hub"))
    make_case(tmp_path)
    with pytest.raises(PeftMoeError, match="no folder 'adapters/mth'"):
        open_experts({"math": "adapters/mth"}, BASE)


# Properties. Each example damages a fresh copy.
KEYS = sorted(load_file(Path(GOOD.name) / WEIGHTS))
SIZE = (Path(GOOD.name) / WEIGHTS).stat().st_size
SHAPES = {key: tuple(tensor.shape) for key, tensor in load_file(Path(GOOD.name) / WEIGHTS).items()}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)


def refuse(damage) -> str:
    with tempfile.TemporaryDirectory() as folder:
        case = make_case(Path(folder))
        damage(case)
        with pytest.raises(PeftMoeError, match="math") as caught:
            open_experts(case.experts, case.base)
        return str(caught.value)


def survive(damage) -> None:
    """A damage that may be harmless: it opens, or it is refused; nothing else happens."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        case = make_case(Path(folder))
        damage(case)
        with contextlib.suppress(PeftMoeError):
            open_experts(case.experts, case.base)


@given(st.sets(st.sampled_from(KEYS), min_size=1))
def test_any_missing_tensors_are_noticed(lost):
    refuse(lambda c: c.tensors(lambda t: [t.pop(key) for key in lost]))


@given(
    st.sampled_from([*KEYS, "", "base_model.model.", f"base_model.model.{Q0}."]),
    st.text(max_size=9),
)
def test_any_unknown_key_is_noticed(start, rest):
    key = start + rest.encode("utf-8", "ignore").decode()
    assume(key not in KEYS and key != "__metadata__" and key)
    refuse(put(key, 4, 16))


@given(st.data(), st.sampled_from(KEYS), st.sampled_from(["nan", "inf", "-inf"]))
def test_a_bad_value_anywhere_is_named(data, key, value):
    index = tuple(data.draw(st.integers(0, size - 1)) for size in SHAPES[key])
    message = refuse(poison(key, index, float(value)))
    assert key in message
    assert str(list(index)) in message
    assert value in message


@given(st.integers(0, SIZE - 1))
def test_a_file_cut_anywhere_is_refused_by_name(size):
    assert WEIGHTS in refuse(lambda c: c.bytes(lambda d: d[:size]))


@given(st.integers(0, SIZE - 1), st.integers(0, 7))
def test_a_flipped_bit_never_escapes_the_refusal(at, bit):
    def flip(data):
        return data[:at] + bytes([data[at] ^ (1 << bit)]) + data[at + 1 :]

    survive(lambda c: c.bytes(flip))


@given(st.integers(0, 2000), st.integers(0, 7))
def test_a_flipped_bit_in_the_config_never_escapes_either(at, bit):
    def flip(case):
        data = bytearray((case.folder / CONFIG).read_bytes())
        data[at % len(data)] ^= 1 << bit
        (case.folder / CONFIG).write_bytes(bytes(data))

    survive(flip)


@given(st.sampled_from(sorted(FIELD_RULES)), JSON)
def test_no_value_of_any_field_escapes(field, value):
    survive(edit(**{field: value}))


@given(st.integers(1, 64), st.integers(1, 64))
def test_a_rank_in_the_config_must_be_that_of_the_file(rank, claimed):
    def resize(case):
        case.tensors(
            lambda t: t.update(
                {k: torch.ones(*((rank, s[1]) if "lora_A" in k else (s[0], rank))) for k, s in SHAPES.items()}
            )
        )
        case.edit(r=claimed)

    if rank == claimed:
        survive(resize)
    else:
        assert f"rank {rank}" in refuse(resize)
        assert f"r={claimed}" in refuse(resize)
