"""Section C, training: killed at any moment, it goes on from its last whole checkpoint, to the bit."""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from support.training import make_trainer, samples
from support.zoo import Zoo

from faults.harness import flipped
from peft_moe import PeftMoeError
from peft_moe.training import last_good_checkpoint
from peft_moe.training.trainers.checkpoints import SEAL, checkpoint_fault

RUNS = int(os.environ.get("PEFT_MOE_KILLED_RUNS", "2"))
STEPS, SEEDS = 6, 20


class Trainings:
    """The process that trains in children, see support/train_and_die.py."""

    def __init__(self, run: subprocess.Popen[str]) -> None:
        self.run = run
        assert self._line() == "ready\n"

    def _line(self) -> str:
        assert self.run.stdout is not None
        return self.run.stdout.readline()

    def __call__(self, out: Path, seed: int, steps: int = -1, fraction: float = 0.0) -> tuple[str, int]:
        """What the child said, and how it ended."""
        assert self.run.stdin is not None
        self.run.stdin.write(f"{out} {seed} {steps} {fraction}\n")
        self.run.stdin.flush()
        said, code = self._line().split()
        return said, int(code)


@pytest.fixture(scope="module")
def train(zoo: Zoo) -> Iterator[Trainings]:
    tests = Path(__file__).parents[1]
    experts = zoo.experts("llama")
    command = [sys.executable, str(tests / "support" / "train_and_die.py"), zoo.saved_base("llama")]
    run = subprocess.Popen(
        [*command, experts["wide"], experts["narrow"]],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tests), str(tests.parent)])},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    with run, contextlib.ExitStack() as stack:
        stack.callback(run.kill)
        yield Trainings(run)
        assert run.stdin is not None
        run.stdin.close()


def test_killed_and_resumed_to_the_bit(train: Trainings, tmp_path: Path) -> None:
    """SIGKILL again and again; no resume is refused, and the end is that of a run nobody touched."""
    rng, ends = random.Random(11), dict[int, str]()
    for number in range(RUNS):
        seed = number % SEEDS
        if seed not in ends:
            said, code = train(tmp_path / f"whole{seed}", seed)
            assert (code, said[: STEPS + 1]) == (0, "a" + "." * STEPS)
            ends[seed] = said[STEPS + 1 :]
        out, began = tmp_path / str(number), set()
        for least in (1, 2, 2):  # a second step ends behind the checkpoint of the first
            killed, code = train(out, seed, rng.randint(least, 3), rng.uniform(0, 1.5))
            assert code in (-9, 0), "a resume was refused"
            began.add(killed[0])
        ended, code = train(out, seed)
        assert code == 0
        assert ended[1:].lstrip(".") == ends[seed]
        assert len(began | {ended[0]}) > 1, "a later start should begin from a checkpoint"
        shutil.rmtree(out)
    assert len(set(ends.values())) == len(ends)


# -- checkpoints that are not whole ------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(zoo: Zoo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of three steps, with a checkpoint of each."""
    folder = tmp_path_factory.mktemp("run")
    trainer(zoo, folder).train()
    assert {p.name for p in folder.glob("checkpoint-*")} == {f"checkpoint-{n}" for n in (1, 2, 3)}
    return folder


def trainer(zoo: Zoo, folder: Path, **settings: Any) -> Any:
    settings = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "seed": 2, **settings}
    model = zoo.mixture("llama", "top2")
    return make_trainer("sft", model, Dataset.from_list(samples(12)), folder, **settings)


def half(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: len(data) // 2])

    return damage


def lost(*names: str) -> Callable[[Path], None]:
    return lambda folder: [(folder / name).unlink() for name in names]  # type: ignore[return-value]


FILES = [
    "adapter_config.json",
    "adapter_model.safetensors",
    "optimizer.pt",
    "rng_state.pth",
    "scheduler.pt",
    "trainer_state.json",
]
# Of the newest checkpoint: how it is torn, and what is said of it.
TORN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "nothing in it": (
        lambda f: [p.unlink() for p in f.iterdir()],
        f"no {SEAL}, and trainer_state.json is missing",
    ),
    "not there": (shutil.rmtree, "no such folder"),
    **{f"{name} lost": (lost(name), f"{name} is missing") for name in FILES},
    **{f"{name} cut": (half(name), f"{name} differs from what was saved") for name in FILES},
    "the seal cut": (half(SEAL), f"{SEAL} is damaged"),
    "not sealed yet, the state cut": (
        lambda f: (lost(SEAL)(f), half("trainer_state.json")(f)),
        "trainer_state.json is missing or truncated",
    ),
    "not sealed yet, the state not begun": (
        lost(SEAL, "trainer_state.json"),
        "trainer_state.json is missing",
    ),
    **{
        f"not sealed, without {name}": (lost(SEAL, name), f"it has no {name.split('.')[0]}")
        for name in FILES[:5]
    },
    "not sealed, weights cut": (
        lambda f: (lost(SEAL)(f), half("adapter_model.safetensors")(f)),
        "adapter_model.safetensors is damaged",
    ),
}


@pytest.mark.parametrize("case", TORN)
def test_a_partial_checkpoint_is_skipped(case: str, run: Path, tmp_path: Path) -> None:
    tear, words = TORN[case]
    shutil.copytree(run, tmp_path / "run")
    newest = tmp_path / "run" / "checkpoint-3"
    tear(newest)
    fault = checkpoint_fault(newest)
    assert fault is not None
    assert words in fault
    assert last_good_checkpoint(tmp_path / "run") == str(tmp_path / "run" / "checkpoint-2")


def test_a_complete_checkpoint_needs_no_seal(run: Path, tmp_path: Path) -> None:
    """Those of a plain trainer have none."""
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "checkpoint-3" / SEAL).unlink()
    assert last_good_checkpoint(tmp_path / "run") == str(tmp_path / "run" / "checkpoint-3")


def test_no_checkpoint_at_all(tmp_path: Path) -> None:
    assert last_good_checkpoint(tmp_path) is None
    assert last_good_checkpoint(tmp_path / "nowhere") is None


@given(data=st.data())
def test_a_flipped_bit_in_a_checkpoint_is_noticed(data: st.DataObject, run: Path) -> None:
    """Any bit of any file; also in the seal itself, where it may be a space that nobody reads."""
    folder = run / "checkpoint-3"
    path = folder / data.draw(st.sampled_from(FILES))
    whole = path.read_bytes()
    try:
        path.write_bytes(flipped(whole, data.draw(st.integers(0, 8 * len(whole) - 1))))
        assert checkpoint_fault(folder) == f"{path.name} differs from what was saved"
        assert last_good_checkpoint(run) == str(run / "checkpoint-2")
    finally:
        path.write_bytes(whole)
    assert checkpoint_fault(folder) is None


def test_the_trainer_resumes_from_the_last_complete_checkpoint(zoo: Zoo, run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    half("optimizer.pt")(tmp_path / "run" / "checkpoint-3")
    whole = trainer(zoo, tmp_path / "whole", max_steps=5)
    whole.train()
    resumed = trainer(zoo, tmp_path / "run", max_steps=5)
    resumed.train(resume_from_checkpoint=True)
    assert [e["step"] for e in resumed.state.log_history if "loss" in e] == [1, 2, 3, 4, 5]
    mine, theirs = resumed.model.state_dict(), whole.model.state_dict()
    assert all(torch.equal(mine[key], theirs[key]) for key in theirs)
    # The torn one was written again.
    assert checkpoint_fault(tmp_path / "run" / "checkpoint-3") is None


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_named_checkpoint_that_would_be_another_run_is_refused(
    zoo: Zoo, run: Path, name: str, tmp_path: Path
) -> None:
    """As ``save_only_model=True`` leaves it: the trainer alone would go on, with other results."""
    shutil.copytree(run, tmp_path / "run")
    newest = tmp_path / "run" / "checkpoint-3"
    lost(SEAL, name)(newest)
    new = trainer(zoo, tmp_path / "run", max_steps=5)
    before = {key: value.clone() for key, value in new.model.state_dict().items()}
    good = re.escape(str(tmp_path / "run" / "checkpoint-2"))
    with pytest.raises(
        PeftMoeError, match=rf"it has no {name.split('.', maxsplit=1)[0]}.*the last complete one is {good}"
    ):
        new.train(resume_from_checkpoint=str(newest))
    assert all(torch.equal(value, before[key]) for key, value in new.model.state_dict().items())
    assert isinstance(PeftModel.from_pretrained(zoo.base("llama"), str(newest)), PeftModel)


def test_resuming_without_a_complete_checkpoint_is_refused(zoo: Zoo, tmp_path: Path) -> None:
    with pytest.raises(PeftMoeError, match="has no complete checkpoint; leave it out to start"):
        trainer(zoo, tmp_path).train(resume_from_checkpoint=True)
