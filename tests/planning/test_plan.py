"""``plan_memory`` against what is really there: weights to the byte, steps against this process's memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from support.bases import BASES
from support.measure_rss import load, mix
from support.zoo import Zoo
from torch import nn
from transformers import CLIPTextConfig, LlamaConfig
from typer.testing import CliRunner

from peft_moe import MoLoraConfig, PeftMoeError
from peft_moe.cli.main import app
from peft_moe.planning import MemoryPlan, Training, plan_memory
from peft_moe.planning.live_bytes import LiveBytes

TESTS = Path(__file__).parents[1]
TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 48,
}
# 30 million numbers: a step's tensors outweigh what libraries keep for themselves.
REAL = {
    **TINY,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 8000,
}
# Of the peak. Libraries keep some MB of their own, and memory comes in pages.
CLOSE = 0.10


def plan(sizes: dict[str, Any], fields: dict[str, Any], **training: Any) -> MemoryPlan:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # frozen experts that start as zero
        config = MoLoraConfig(task_type="CAUSAL_LM", **fields)
    return plan_memory(LlamaConfig(**sizes), config, Training(**{"device": "cpu", **training}))


def weights_of(model: nn.Module) -> int:
    """Bytes of all weights, those of quantised layers with all that belongs to them."""
    found: dict[int, int] = {}
    for module in model.modules():
        tensors = [*module._parameters.values(), *module._buffers.values()]
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        for part in (state, getattr(state, "state2", None)):
            tensors += [getattr(part, "absmax", None)]
        tensors.append(getattr(getattr(module, "weight", None), "SCB", None))
        for tensor in tensors:
            if tensor is not None:
                found[id(tensor)] = tensor.numel() * tensor.element_size()
    return sum(found.values())


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("precision", ["full", "nf4", "fp4", "double", "int8"])
def test_weights_are_known_to_the_byte(precision: str, tied: bool) -> None:
    settings = {"precision": precision, "dtype": "bfloat16"}
    if precision == "double":
        settings = {"precision": "nf4", "double_quant": True, "dtype": "bfloat16"}
    sizes = {**TINY, "tie_word_embeddings": tied}
    fields = {"experts": 3, "r": 4, "router": "linear"}
    base = load(LlamaConfig(**sizes), settings)
    expected = weights_of(base)
    planned = plan(sizes, fields, **settings)
    assert sum(size for name, size in planned.parts.items() if name.startswith("base")) == expected
    model = mix(base, fields, torch.bfloat16)
    ours = {"molora_A": 0, "molora_router": 0, "molora_B": 0}
    for name, tensor in model.named_parameters():
        for kind in ours:
            ours[kind] += tensor.numel() * tensor.element_size() * (kind in name)
    assert planned.parts["experts"] == ours["molora_A"] + ours["molora_B"]
    assert planned.parts["routers"] == ours["molora_router"]
    assert planned.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)


def full_loss(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Nobody but autograd holds the logits when the backward pass begins."""
    logits = model(input_ids=ids, use_cache=False).logits
    return nn.functional.cross_entropy(logits.float().flatten(0, 1), ids.flatten())


@pytest.mark.parametrize("router", ["auto", "linear", "uniform"])
@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("train_experts", [False, True])
def test_a_step_without_memory_holds_what_a_real_one_holds(
    router: str, checkpointing: bool, train_experts: bool
) -> None:
    """The same tracker over real tensors, and over tensors that are not there."""
    fields: dict[str, Any] = {"experts": 3, "r": 4, "router": router, "train_experts": train_experts}
    if router == "uniform" and not train_experts:
        pytest.skip("nothing would train")
    settings = {
        "dtype": "float32",
        "loss": "full",
        "checkpointing": checkpointing,
        "batch": 2,
        "sequence": 128,
    }
    planned = plan(TINY, fields, **settings)
    model = mix(load(LlamaConfig(**TINY), settings), fields, torch.float32).train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    ids = torch.randint(3, 48, (2, 128))
    model(input_ids=ids)  # small indices that are made once, and kept
    with LiveBytes(iter([*model.parameters(), *model.buffers()])) as live:
        full_loss(model, ids).backward()
    # Four indices for each of 14 layers, of some bytes each, which take 512 in the count.
    assert planned.parts["activations, gradients, logits"] == pytest.approx(live.peak, abs=64 * 512)
    assert live.peak > 1000 * 512


# What a case is: the mixture, the training.
RUNS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "float32": (
        {"router": "linear"},
        {"batch": 4, "sequence": 256, "dtype": "float32", "checkpointing": False},
    ),
    "checkpointing": (
        {"router": "auto"},
        {"batch": 8, "sequence": 256, "dtype": "float32", "checkpointing": True},
    ),
    # Loading leaves some 60 MB behind in the process.
    "nf4": (
        {"router": "linear"},
        {"batch": 8, "sequence": 256, "dtype": "float32", "precision": "nf4", "checkpointing": False},
    ),
    "bfloat16": (
        {"router": "auto"},
        {"batch": 8, "sequence": 256, "dtype": "bfloat16", "checkpointing": False},
    ),
}
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in RUNS if name != "float32"]


@pytest.mark.parametrize("name", ["float32", *SLOW])
def test_planned_and_measured_peaks_are_close(name: str) -> None:
    """Two steps of the real SFTTrainer in a process of their own; its resident set is what is measured."""
    mixture, training = RUNS[name]
    fields = {"experts": 4, "r": 8, **mixture}
    planned = plan(REAL, fields, **training).total
    # Freed memory goes back to the system at once, so that the peak of the process is that of its tensors.
    malloc = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    paths = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    environment = {**os.environ, **malloc, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    script = str(TESTS / "support" / "measure_rss.py")
    command = [sys.executable, script, *(json.dumps(part) for part in (REAL, fields, training))]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    measured = found["peak"] - found["before"]
    print(f"{name}: planned {planned / 2**20:.0f} MiB, measured {measured / 2**20:.0f} MiB")
    assert planned == pytest.approx(measured, rel=CLOSE)


def test_adapters_are_read_by_their_headers(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks, targets and types of the files, without one of their tensors."""
    from peft_moe.experts.adapter import ExpertFile

    monkeypatch.setattr(ExpertFile, "read", lambda *_: pytest.fail("a tensor was read"))
    folders = zoo.experts("llama")
    planned = plan_memory(
        zoo.saved_base("llama"),
        MoLoraConfig(experts=folders, router="linear", task_type="CAUSAL_LM"),
        Training(sequence=16, dtype="float32", device="cpu"),
    )
    monkeypatch.undo()
    model = zoo.mixture("llama", "dense")
    ours = [p for n, p in model.named_parameters() if "molora_A" in n or "molora_B" in n]
    assert planned.parts["experts"] == sum(p.numel() * 4 for p in ours)
    assert planned.experts == list(folders)


def test_settings_bite() -> None:
    base = {"experts": 4, "r": 8, "router": "linear"}
    start = plan(TINY, base, sequence=64).total
    larger: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({}, {"batch": 2}),
        ({}, {"sequence": 128}),
        ({}, {"checkpointing": False}),
        ({}, {"dtype": "float32"}),
        ({"experts": 8}, {}),
        ({"r": 16}, {}),
        ({"train_experts": True}, {}),
    ]
    for fields, training in larger:
        settings = {"sequence": 64, **training}
        assert plan(TINY, {**base, **fields}, **settings).total > start, (fields, training)
    for training in ({"precision": "nf4"}, {"optimizer": "sgd"}):
        assert plan(TINY, base, sequence=64, **training).total < start, training
    assert plan(TINY, base, sequence=64, autocast="bfloat16", dtype="float32").total != start
    # All logits at once, in float32 besides; and a GPU folds the fused head's tile in place.
    wide = {**TINY, "vocab_size": 100_000}
    totals = {
        (loss, device): plan(wide, base, sequence=512, loss=loss, device=device).total
        for loss in ("fused", "full")
        for device in ("cuda", "cpu")
    }
    assert totals["full", "cuda"] > totals["fused", "cpu"] > totals["fused", "cuda"]


@pytest.mark.parametrize("name", [n for n, a in BASES.items() if a.kind == "causal" and a.reads == "text"])
@pytest.mark.parametrize("router", ["auto", pytest.param("mixtral", marks=pytest.mark.slow)])
def test_every_causal_base_can_be_planned_for(name: str, router: str) -> None:
    fields = {"experts": 4, "r": 8, "router": router, "target_modules": BASES[name].linears}
    totals = [
        plan_memory(
            BASES[name].config(),
            MoLoraConfig(task_type="CAUSAL_LM", **fields),
            Training(sequence=length, device="cuda"),
        ).total
        for length in (16, 32)
    ]
    assert totals[1] > totals[0] > 0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"batch": 0}, "batch=0"),
        ({"sequence": True}, "sequence=True"),
        ({"dtype": "bf16"}, "dtype='bf16' is none of"),
        ({"optimizer": "adam"}, "Did you mean 'adamw'"),
        ({"loss": "chunked"}, "loss='chunked'"),
        ({"device": "tpu"}, "device='tpu'"),
        ({"autocast": "int8"}, "autocast='int8'"),
        ({"precision": "nf5"}, "Did you mean 'nf4'"),
    ],
)
def test_unknown_settings_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(PeftMoeError, match=words):
        plan(TINY, {"experts": 2}, **settings)


def test_bases_that_cannot_be_planned_for_are_refused(tmp_path: Path) -> None:
    config = MoLoraConfig(experts=2, task_type="CAUSAL_LM")
    with pytest.raises(PeftMoeError, match=r"config\.json cannot be read"):
        plan_memory(str(tmp_path), config)
    awq = LlamaConfig(**TINY, quantization_config={"quant_method": "awq", "bits": 4})
    with pytest.raises(PeftMoeError, match="'awq', whose memory is not modelled"):
        plan_memory(awq, config)
    with pytest.raises(PeftMoeError, match="no causal language model"):
        plan_memory(CLIPTextConfig(), config)


def test_a_prequantised_base_tells_its_precision() -> None:
    stored = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "quant_method": "bitsandbytes"}
    found = plan({**TINY, "quantization_config": stored}, {"experts": 2, "router": "linear"}, sequence=16)
    asked = plan(TINY, {"experts": 2, "router": "linear"}, sequence=16, precision="nf4")
    assert found.parts == asked.parts


def test_on_the_command_line(zoo: Zoo) -> None:
    base, folders = zoo.saved_base("llama"), list(zoo.experts("llama").values())
    options = [arg for folder in folders for arg in ("--expert", folder)]
    options += ["--sequence", "64", "--router", "linear", "--no-checkpointing"]
    table = CliRunner().invoke(app, ["plan", base, *options])
    assert table.exit_code == 0, table.output
    assert "3 experts" in table.output
    raw = CliRunner().invoke(app, ["plan", base, *options, "--json"])
    found = json.loads(raw.stdout[raw.stdout.index("{") :])
    assert found["total"] == sum(found["parts"].values())
    assert found["experts"] == ["wide", "narrow", "upper"]
    assert not found["training"]["checkpointing"]
