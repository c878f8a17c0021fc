"""Triton's backends without a GPU: the kernels in the interpreter, and the reasons of refusals."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from support.mixtures import draw_mixture

from peft_moe.errors import PeftMoeError
from peft_moe.ops import BACKENDS, call_spec_of, choose, mix
from peft_moe.ops.backend import MixInputs
from peft_moe.ops.triton.kernel_backends import _unavailable

TRITON = ["triton_stacked", "triton_sorted", "triton_gather"]
CASES = Path(__file__).with_name("triton_cases.py")


def inputs(m, gates=None):
    sparse = (m.ids, m.weights) if gates is None else (None, None)
    return MixInputs(m.x, m.a, m.b, m.dense if gates is None else gates, m.ranks, m.base, *sparse)


@pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64", reason="Triton has wheels for linux x86_64"
)
def test_every_kernel_in_the_interpreter():
    assert find_spec("triton") is not None, "the dev extra installs Triton on this platform"
    # In another process, because the interpreter must be chosen before the kernels are imported.
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(CASES)]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    environment["TRITON_INTERPRET"] = "1"
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@pytest.mark.parametrize("name", TRITON)
class TestWithoutGpu:
    def test_the_reason_is_given_and_auto_takes_another(self, name):
        spec = call_spec_of(inputs(draw_mixture(4, 16, 16, (4, 4), 1)))
        choice = choose(spec)
        assert choice.backend.name not in TRITON
        assert "these tensors are on cpu" in choice.refused[name]

    def test_asking_for_it_raises(self, name):
        m = draw_mixture(4, 16, 16, (4, 4), 1)
        with pytest.raises(PeftMoeError, match=f"{name}.*on cpu.*backend='auto'"):
            mix(*inputs(m)[:6], expert_ids_NK=m.ids, weights_NK=m.weights, backend=name)


def on_cuda(m, *, gates=None, trains=(), **changes):
    """Return the spec of the same call on a GPU."""
    spec = call_spec_of(inputs(m, gates))
    return type(spec)(**{**vars(spec), "device": "cuda", "trains": frozenset(trains), **changes})


@pytest.mark.parametrize(
    ("name", "spec", "reason"),
    [
        ("triton_sorted", {"gates": True}, "top_k"),
        ("triton_gather", {"gates": True}, "top_k"),
        ("triton_gather", {"trains": {"gates"}}, "no gradients"),
        ("triton_gather", {"tokens": 65}, "up to 64 tokens, this call has 65"),
        ("triton_sorted", {"trains": {"experts"}}, "no gradient for experts"),
        ("triton_stacked", {"trains": {"gates"}, "ranks": (4, 2)}, "equal ranks"),
        ("triton_stacked", {"trains": {"gates"}, "ranks": (6, 6)}, "powers of two"),
        ("triton_sorted", {"ranks": (129, 4)}, "rank 129"),
        ("triton_sorted", {"dtype": torch.float64}, "float64"),
        ("triton_stacked", {"compiling": True}, "torch.compile"),
        ("triton_stacked", {"chosen": 17}, "up to 16"),
        ("triton_sorted", {"chosen": 17}, "up to 16"),
    ],
)
def test_calls_that_a_gpu_refuses(name, spec, reason):
    spec = dict(spec)
    m = draw_mixture(4, 16, 16, spec.pop("ranks", (4, 4)), 1)
    gates = m.dense if spec.pop("gates", False) else None
    refusal = BACKENDS[name].supports(on_cuda(m, gates=gates, **spec))
    assert refusal is not None
    assert reason in refusal


@pytest.fixture
def _forgets():
    _unavailable.cache_clear()
    yield
    _unavailable.cache_clear()


@pytest.mark.usefixtures("_forgets")
def test_without_triton_the_reason_is_given(monkeypatch):
    monkeypatch.setattr("peft_moe.ops.triton.kernel_backends.find_spec", lambda name: None)
    spec = on_cuda(draw_mixture(4, 16, 16, (4, 4), 1))
    for name in TRITON:
        assert "pip install triton" in BACKENDS[name].supports(spec)


def test_importing_the_package_imports_no_kernel_and_nothing_that_peft_does_not():
    script = (
        "import sys, peft; before = set(sys.modules); import peft_moe; "
        "print([m for m in sys.modules if m.startswith('peft_moe.ops.triton')], "
        "sorted({m.split('.')[0] for m in set(sys.modules) - before} - set(sys.stdlib_module_names)))"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert (
        done.stdout.strip() == "['peft_moe.ops.triton', 'peft_moe.ops.triton.kernel_backends'] ['peft_moe']"
    )
