"""Two processes train as one does: DDP and FSDP2 through accelerate, on CPUs, with the real trainers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from support import train_in_processes
from support.batches import batch_for, logits_of, texts
from support.train_in_processes import train
from support.zoo import Zoo
from torch import nn

SPREADS = {"ddp": "DistributedDataParallel", "fsdp2": "FSDPPeftModelForCausalLM"}
CASES: dict[str, dict[str, Any]] = {
    # Rows of different lengths: tokens, not processes, must weigh alike.
    "per token": {"routing": "dense", "trainer": "sft"},
    # Auxiliary losses are means over a process's tokens, so that rows of equal length compare.
    "with router losses": {
        "routing": "top2",
        "trainer": "sft",
        "equal": True,
        "config": {"router_z_loss_coef": 0.1},
    },
    # A probe ends in the middle of the base, within its sharded layers.
    "per prompt, probed": {"routing": "prompt-probe", "trainer": "plain"},
    "per block": {"routing": "block", "trainer": "plain"},
    "fresh experts": {
        "routing": "dense",
        "trainer": "plain",
        "config": {"experts": 3, "r": 2, "init_weights": False},
    },
}


@pytest.fixture(scope="module")
def runs(zoo: Zoo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case under every spread, by one group of two processes."""
    folder = tmp_path_factory.mktemp("processes")
    cases = [
        {
            "experts": zoo.experts("llama"),
            **case,
            "spread": spread,
            "folder": str(folder / f"{name} {spread}"),
        }
        for name, case in CASES.items()
        for spread in SPREADS
    ]
    (folder / "cases.json").write_text(json.dumps(cases))
    for case in cases:
        Path(case["folder"]).mkdir()
    script = Path(train_in_processes.__file__)
    root = script.parents[2]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(root), str(root / "tests")]),
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
    }
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [sys.executable, *launch, str(script), str(folder / "cases.json")],
        env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return folder


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_as_one(zoo: Zoo, runs: Path, tmp_path: Path, name: str, spread: str) -> None:
    found = json.loads((runs / f"{name} {spread}" / "found.json").read_text())
    assert found["wrapped"] == SPREADS[spread]
    assert found["cut"] == (found["parameters"] if spread == "fsdp2" else 0)
    alone = train({"experts": zoo.experts("llama"), **CASES[name], "folder": str(tmp_path)}, processes=1)
    # Sums over processes round differently: 2^-24 of each term, over three steps of Adam.
    assert found["losses"] == pytest.approx(alone["losses"], rel=1e-5)
    assert found["grad_norms"] == pytest.approx(alone["grad_norms"], rel=1e-4)
    assert len(set(alone["losses"])) == train_in_processes.STEPS
    first, second = (
        load_file(p / "saved/adapter_model.safetensors") for p in (tmp_path, runs / f"{name} {spread}")
    )
    assert first.keys() == second.keys()
    for key, value in first.items():
        # Adam divides by the root of tiny second moments, which multiplies the rounding.
        assert (second[key] - value).abs().max() < 1e-3, key
    assert _logits(zoo, tmp_path).sub(_logits(zoo, runs / f"{name} {spread}")).abs().max() < 1e-2


def _logits(zoo: Zoo, folder: Path) -> Any:
    from peft import PeftModel

    model: nn.Module = PeftModel.from_pretrained(zoo.base("llama"), str(folder / "saved")).eval()
    return logits_of(model, batch_for("llama", texts()))
