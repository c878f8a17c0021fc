"""Reading trained adapters: what comes out is what PEFT put in, and nothing more is read."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import warnings
import weakref
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from peft_moe.errors import PeftMoeError
from peft_moe.experts.adapter import ExpertFile, open_experts
from peft_moe.experts.base_modules import BaseView, base_modules, family
from peft_moe.experts.checks import check_expert_names, check_same_base
from peft_moe.experts.spec import ExpertSpec
from peft_moe.io import sources


def llama(**sizes) -> LlamaForCausalLM:
    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 32}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**{**small, **heads, **sizes}))


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=32, n_positions=32))


def train(base: nn.Module, folder: Path, dtype: torch.dtype | None = None, **config) -> PeftModel:
    """A "trained" adapter: PEFT makes and saves it; B is random instead of zero."""
    model = get_peft_model(base, LoraConfig(**config), autocast_adapter_dtype=False)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, dtype=dtype or parameter.dtype)
    model.save_pretrained(folder)
    return model


def edit_config(folder: Path, **fields) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


QV = ["q_proj", "v_proj"]
CONFIGS = {
    "list": {"target_modules": QV, "r": 4, "lora_alpha": 16},
    "full names": {"target_modules": ["model.layers.1.self_attn.q_proj"], "r": 3},
    "regex": {"target_modules": r".*layers\.0\.mlp\.(up|down)_proj", "r": 2, "lora_alpha": 5},
    "all-linear": {"target_modules": "all-linear", "r": 2, "lora_alpha": 1},
    "default targets": {"r": 2},
    "one layer": {"target_modules": QV, "layers_to_transform": 1},
    "layers": {"target_modules": QV, "layers_to_transform": [0], "layers_pattern": "layers"},
    "exclude": {"target_modules": QV, "exclude_modules": ["model.layers.0.self_attn.q_proj"]},
    "rank > size": {"target_modules": QV, "r": 40},
    "rsLoRA": {"target_modules": QV, "r": 9, "lora_alpha": 7, "use_rslora": True},
    "alpha float": {"target_modules": QV, "r": 4, "lora_alpha": 0.3},
    "rank_pattern": {"target_modules": QV, "r": 4, "rank_pattern": {"q_proj": 7}},
    "patterns": {
        "target_modules": "all-linear",
        "r": 4,
        "lora_alpha": 8,
        "use_rslora": True,
        "rank_pattern": {
            "^model.layers.0.self_attn.q_proj": 5,
            "mlp.down.*": 6,
            "layers.1.mlp.up_proj": 3,
        },
        "alpha_pattern": {r"layers\.1\.mlp.*": 3, "q_proj": 11},
    },
    "dropout and init": {"target_modules": QV, "lora_dropout": 0.3, "init_lora_weights": "gaussian"},
    "orthogonal": {"target_modules": QV, "r": 4, "init_lora_weights": "orthogonal"},
    "mica": {"target_modules": QV, "r": 4, "init_lora_weights": "mica"},
}


def assert_reads_like(file: ExpertFile, model: PeftModel) -> None:
    layers = {
        name.removeprefix("base_model.model."): layer
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer)
    }
    assert file.modules == tuple(sorted(layers))
    for name, layer in layers.items():
        assert file.spec.rank_in(name) == layer.r["default"]
        assert file.spec.scaling_in(name) == layer.scaling["default"]
        for ours, theirs in zip(file.read(name), (layer.lora_A, layer.lora_B), strict=True):
            weight = theirs["default"].weight
            assert ours.dtype == weight.dtype
            assert torch.equal(ours, weight)
    others = set(base_modules(model.base_model.model)) - set(layers)
    assert not any(file.spec.rank_in(name) for name in others)


@pytest.mark.parametrize("name", CONFIGS)
def test_ranks_scales_and_bits_are_those_of_peft(name, tmp_path):
    model = train(llama(), tmp_path, **CONFIGS[name])
    (file,) = open_experts({"math": tmp_path}, llama())
    assert_reads_like(file, model)
    assert ExpertSpec.from_record(json.loads(json.dumps(file.spec.to_record()))) == file.spec


@pytest.mark.parametrize("targets", [["c_attn"], ["c_attn", "c_proj", "c_fc"], "all-linear"])
def test_conv1d_of_gpt2_whatever_its_flag_says(targets, tmp_path):
    model = train(gpt2(), tmp_path, target_modules=targets, r=3, fan_in_fan_out=True)
    for flag in (True, False):
        edit_config(tmp_path, fan_in_fan_out=flag)
        (file,) = open_experts({"math": tmp_path}, gpt2())
        assert_reads_like(file, model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_stays_that_of_the_file(dtype, tmp_path):
    model = train(llama(), tmp_path, dtype=dtype, target_modules=QV)
    (file,) = open_experts({"math": tmp_path}, llama())
    assert_reads_like(file, model)
    assert file.read(file.modules[0])[0].dtype == dtype


def test_all_linear_written_as_a_word_is_resolved(tmp_path):
    model = train(llama(), tmp_path, target_modules="all-linear")
    edit_config(tmp_path, target_modules="all-linear")
    (file,) = open_experts({"math": tmp_path}, llama())
    assert_reads_like(file, model)


def test_overlapping_alpha_patterns_follow_the_saved_order_and_warn(tmp_path):
    # PEFT takes the first pattern that matches, and sorts the patterns when it saves: the order
    # that was trained with is lost, for PEFT's own reload as for us.
    patterns = {"q_proj": 3, "^model.layers.0.self_attn.q_proj": 5}
    train(llama(), tmp_path, target_modules=QV, alpha_pattern=patterns)
    with pytest.warns(UserWarning, match=r"'math'.*alpha_pattern.*layers\.0.*q_proj"):
        (file,) = open_experts({"math": tmp_path}, llama())
    assert_reads_like(file, PeftModel.from_pretrained(llama(), tmp_path))


class Spy:
    """Stands before a file's tensors: which were asked for, and how many were alive at once."""

    def __init__(self, file):
        self.read, self.asked, self.alive, self.most = file._tensor, [], weakref.WeakSet(), 0
        file._tensor = self.tensor

    def tensor(self, key):
        self.asked.append(key)
        tensor = self.read(key)
        self.alive.add(tensor)
        self.most = max(self.most, len(self.alive))
        return tensor


def test_reading_one_module_reads_two_tensors_only(tmp_path):
    train(llama(), tmp_path, target_modules=QV)
    (file,) = open_experts({"math": tmp_path}, llama())
    spy = Spy(file)
    file.read("model.layers.1.self_attn.v_proj")
    prefix = "base_model.model.model.layers.1.self_attn.v_proj"
    assert spy.asked == [f"{prefix}.lora_A.weight", f"{prefix}.lora_B.weight"]


def test_values_are_checked_one_tensor_at_a_time(tmp_path):
    train(llama(), tmp_path, target_modules="all-linear")
    (file,) = open_experts({"math": tmp_path}, llama())
    spy = Spy(file)
    file.check_values()
    assert len(spy.asked) == 28
    assert spy.most <= 2


def test_opening_reads_no_values_when_a_header_is_wrong(tmp_path, monkeypatch):
    train(llama(), tmp_path / "good", target_modules=QV)
    train(llama(), tmp_path / "bad", target_modules=QV)
    edit_config(tmp_path / "bad", r=5)
    monkeypatch.setattr(ExpertFile, "_tensor", lambda *_: pytest.fail("a value was read"))
    with pytest.raises(PeftMoeError, match="rank 8"):
        open_experts({"good": tmp_path / "good", "bad": tmp_path / "bad"}, llama())


def opened(path: Path) -> bool:
    """Whether this process holds a file below the folder open."""
    gc.collect()
    found = [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    return any(name.startswith(str(path)) for name in found)


def mapped(path: Path) -> bool:
    return str(path) in Path("/proc/self/maps").read_text()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux")
def test_files_are_never_mapped_and_closed_on_error_and_by_close(tmp_path):
    for name in ("good", "bad"):
        train(llama(), tmp_path / name, target_modules=QV)
    (file,) = open_experts({"good": tmp_path / "good"}, llama())
    assert opened(tmp_path / "good")
    a = file.read(file.modules[0])[0]
    want = a.clone()
    # Pages of a mapping would stay in memory beside what was copied out of them.
    assert not mapped(tmp_path / "good")
    file.close()
    assert torch.equal(a, want)
    assert not opened(tmp_path / "good")
    edit_config(tmp_path / "bad", r=5)
    with pytest.raises(PeftMoeError):
        open_experts({"good": tmp_path / "good", "bad": tmp_path / "bad"}, llama())
    assert not opened(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tensors_are_those_that_safetensors_reads(tmp_path, dtype):
    train(llama(), tmp_path, target_modules=QV)
    path = tmp_path / "adapter_model.safetensors"
    save_file({key: value.to(dtype) for key, value in load_file(path).items()}, path)
    (file,) = open_experts({"math": tmp_path}, llama())
    for key, wanted in load_file(path).items():
        found = file._tensor(key)
        assert (found.dtype, found.shape) == (dtype, wanted.shape)
        assert torch.equal(found, wanted)
    file.close()


def test_a_file_that_was_cut_after_it_was_opened_is_refused_in_words(tmp_path):
    train(llama(), tmp_path, target_modules=QV)
    (file,) = open_experts({"math": tmp_path}, llama())
    with (tmp_path / "adapter_model.safetensors").open("r+b") as cut:
        cut.truncate(4000)
    with pytest.raises(PeftMoeError, match=r"'math'.*cannot be read.*ends"):
        [file.read(module) for module in file.modules]


def test_reading_a_closed_file_is_refused_in_words(tmp_path):
    train(llama(), tmp_path, target_modules=QV)
    (file,) = open_experts({"math": tmp_path}, llama())
    file.close()
    with pytest.raises(PeftMoeError, match=r"'math'.*cannot be read.*closed"):
        file.read(file.modules[0])


def test_a_file_renamed_over_the_open_one_is_not_seen(tmp_path):
    model = train(llama(), tmp_path, target_modules=QV)
    (file,) = open_experts({"math": tmp_path}, llama())
    save_file({"other": torch.ones(3)}, tmp_path / "new")
    (tmp_path / "new").replace(tmp_path / "adapter_model.safetensors")
    assert_reads_like(file, model)


def test_read_of_another_module_names_a_near_one(tmp_path):
    train(llama(), tmp_path, target_modules=QV)
    (file,) = open_experts({"math": tmp_path}, llama())
    with pytest.raises(PeftMoeError, match=r"layers\.9.*does adapt 'model\.layers\.[01]\.self_attn\.q"):
        file.read("model.layers.9.self_attn.q_proj")
    with pytest.raises(PeftMoeError, match=r"'zzz'; it does adapt 'model\.layers\.0"):
        file.read("zzz")
    assert "math" in repr(file)
    assert "4 modules" in repr(file)


def test_sha256_source_and_order(tmp_path):
    base = llama()
    for name in "abc":
        train(llama(), tmp_path / name, target_modules=QV, r="abc".index(name) + 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # different files: nothing to warn of
        files = open_experts({n: str(tmp_path / n) for n in "cab"}, base)
    assert [f.spec.name for f in files] == ["c", "a", "b"]
    data = (tmp_path / "c" / "adapter_model.safetensors").read_bytes()
    assert files[0].spec.sha256 == hashlib.sha256(data).hexdigest()
    assert files[0].spec.source == str(tmp_path / "c")
    assert files[0].spec.revision is None


def test_a_base_that_carries_adapters_is_seen_through(tmp_path):
    model = train(llama(), tmp_path / "a", target_modules="all-linear")
    names = set(base_modules(llama()))
    wrapped = get_peft_model(llama(), LoraConfig(target_modules=QV, modules_to_save=["lm_head"]))
    wrapped.add_adapter("second", LoraConfig(target_modules=["embed_tokens", "up_proj"]))
    inner = wrapped.base_model.model
    assert set(base_modules(inner)) == names
    (file,) = open_experts({"math": tmp_path / "a"}, inner)
    assert_reads_like(file, model)


def test_what_wraps_nothing_or_comes_twice_is_no_second_module():
    class SharedRouter(nn.Module, BaseTunerLayer):
        def __init__(self):
            super().__init__()
            self.score = nn.Linear(3, 3)

    shared = nn.Linear(3, 3)
    base = nn.ModuleDict({"a": shared, "router": SharedRouter(), "b": shared})
    assert base_modules(base) == {"a": shared}


def test_a_head_is_found_behind_its_wrapper():
    plain, adapted = llama(), get_peft_model(llama(), LoraConfig(target_modules=["lm_head"]))
    assert BaseView.of(plain).head == BaseView.of(adapted.base_model.model).head == "lm_head"
    assert BaseView.of(plain.model).head is None


@pytest.mark.parametrize("wrap", [{"modules_to_save": ["score"]}, {"target_modules": ["score"]}])
def test_a_head_of_another_name_is_found_behind_its_wrapper(wrap):
    base = llama()
    base.score = base.lm_head
    del base.lm_head
    base.get_output_embeddings = lambda: base.score
    assert BaseView.of(base).head == "score"
    get_peft_model(base, LoraConfig(**{"target_modules": QV, **wrap}))
    assert not isinstance(base.score, nn.Linear)
    assert BaseView.of(base).head == "score"


@pytest.mark.parametrize(
    ("trained_on", "base_name"),
    [
        ("org/Tiny-1B", "org/Tiny-1B"),
        ("org/Tiny-1B", "/models/tiny-1b/"),
        ("C:\\models\\Tiny-1B", "org/Tiny-1B"),
        ("/cache/models--org--Tiny-1B/snapshots/0123abc", "org/Tiny-1B"),
        ("", "org/Tiny-1B"),
        (None, "org/Tiny-1B"),
        ("org/Tiny-1B", ""),
        (".", "org/Tiny-1B"),
    ],
)
def test_base_names_that_may_be_the_same_pass(trained_on, base_name, tmp_path):
    train(llama(), tmp_path, target_modules=QV)
    edit_config(tmp_path, base_model_name_or_path=trained_on)
    base = llama()
    base.config._name_or_path = base.name_or_path = base_name
    (file,) = open_experts({"math": tmp_path}, base)
    assert file.spec.base_model == (trained_on or None)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({}, {"revision": "v1"}),
        ({"revision": "v1"}, {"revision": "v1"}),
        ({"revision": "a" * 40}, {"revision": "a" * 7}),
        ({"revision": "a" * 40}, {"revision": "main"}),  # a branch may stand at that commit
        ({"base_model_name_or_path": "org/T"}, {"base_model_name_or_path": "/models/t"}),
    ],
)
def test_experts_that_may_share_a_base_pass(one, other, tmp_path):
    for name, fields in (("a", one), ("b", other)):
        train(llama(), tmp_path / name, target_modules=QV, r="ab".index(name) + 1)
        edit_config(tmp_path / name, **fields)
    assert len(open_experts({n: tmp_path / n for n in "ab"}, llama())) == 2


def test_allow_base_mismatch_lets_names_revisions_and_classes_pass(tmp_path):
    train(llama(), tmp_path, target_modules=QV)
    mapping = {"base_model_class": "MistralForCausalLM", "parent_library": "os"}
    edit_config(tmp_path, base_model_name_or_path="org/x", revision="aaaaaaa", auto_mapping=mapping)
    base = llama()
    base.name_or_path, base.config._commit_hash = "org/y", "b" * 40
    assert open_experts({"math": tmp_path}, base, allow_base_mismatch=True)


def test_architecture_families():
    names = ("LlamaForCausalLM", "LlamaModel", "GPT2LMHeadModel", "Gemma3ForConditionalGeneration")
    assert [family(name) for name in names] == ["llama", "llama", "gpt2", "gemma3"]
    assert family("TinyMLP") == "tinymlp"


def test_a_subclass_put_in_by_a_wrapper_is_the_same_architecture():
    base = llama()
    base.__class__ = type("FSDPLlamaForCausalLM", (LlamaForCausalLM,), {})
    config = {"auto_mapping": {"base_model_class": "LlamaForCausalLM"}}
    check_same_base("math", config, BaseView.of(base))


def test_lists_of_a_spec_do_not_depend_on_the_order_in_the_file(tmp_path):
    train(llama(), tmp_path, target_modules=QV)
    for targets in (QV, QV[::-1]):
        edit_config(tmp_path, target_modules=targets)
        (file,) = open_experts({"math": tmp_path}, llama())
        assert file.spec.target_modules == QV


def test_good_names_pass():
    check_expert_names(["math", "Code-2", "x" * 64, "default", "expert_0"], llama())


def test_same_file_twice_warns(tmp_path):
    train(llama(), tmp_path, target_modules=QV)
    with pytest.warns(UserWarning, match="'math' and 'code' have the same"):
        open_experts({"math": tmp_path, "code": tmp_path}, llama())


def test_hub_ids_fetch_three_files_at_the_revision(tmp_path, monkeypatch):
    model = train(llama(), tmp_path, target_modules=QV)
    asked = []

    def download(repo, filename, revision=None):
        asked.append((repo, filename, revision))
        return str(tmp_path / filename)

    monkeypatch.setattr(sources, "hf_hub_download", download)
    monkeypatch.chdir(tmp_path)
    (file,) = open_experts({"math": "org/math-lora@refs/pr/1"}, llama())
    assert_reads_like(file, model)
    names = ("adapter_config.json", "adapter_model.safetensors", "README.md")  # the card names the licence
    assert asked == [("org/math-lora", name, "refs/pr/1") for name in names]
    assert (file.spec.source, file.spec.revision) == ("org/math-lora", "refs/pr/1")


def test_saving_over_the_open_file_is_safe(tmp_path):
    model = train(llama(), tmp_path, target_modules=QV)
    (file,) = open_experts({"math": tmp_path}, llama())
    save_file(load_file(file.path), file.path)
    assert_reads_like(file, model)
