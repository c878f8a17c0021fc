"""Section C, saving: killed, or failing, at any moment, what was there stays, and nothing lies beside it."""

from __future__ import annotations

import builtins
import contextlib
import errno
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft.peft_model
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from support.batches import batch_for, logits_of, texts
from support.zoo import Zoo

from faults.harness import WEIGHTS, Bench
from peft_moe import MoLoraConfig, PeftMoeError, load_mixture, save_mixture
from peft_moe.io import atomic as new_folder
from peft_moe.io.digests import file_digest
from peft_moe.tuner.config.weights_file import check_weights_file

BATCH = batch_for("llama", texts())
TRIALS = int(os.environ.get("PEFT_MOE_KILLS", "50"))


def number_of(folder: Path) -> float:
    """The round that wrote a folder; every part of it must say the same."""
    config = MoLoraConfig.from_pretrained(str(folder))
    check_weights_file(folder, config.specs())
    assert file_digest(folder, "routers") == config.weights_digest
    tensors = load_file(folder / WEIGHTS)
    found = {float(v) for name, t in tensors.items() if "molora_router" in name for v in t.flatten()}
    assert found == {float(config.revision)}
    return found.pop()


def test_killed_while_it_saves(zoo: Zoo, tmp_path: Path) -> None:
    """kill -9 at random moments: the folder always holds one save, all of it."""
    place, rng = tmp_path / "saved", random.Random(7)
    start = Bench(zoo, tmp_path).mixture
    script = Path(__file__).parents[1] / "support" / "save_and_die.py"
    command = [sys.executable, str(script), zoo.saved_base("llama"), str(start), str(place)]
    run = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    seen, torn = set(), 0
    with run, contextlib.ExitStack() as stack:
        stack.callback(run.kill)
        assert run.stdout is not None
        assert run.stdin is not None
        assert run.stdout.readline() == "ready\n"
        ask(run, 2, 0)  # the first ones, until there is something to replace
        for _ in range(TRIALS):
            ask(run, rng.randint(0, 1), rng.random())
            seen.add(number_of(place))
            left = [path for path in tmp_path.iterdir() if path.name.startswith(".saved.")]
            torn += bool(left)
            assert len(left) <= 1, "what a dead writer left is swept by the next one"
        run.stdin.close()
    assert torn > TRIALS / 5, "most kills should hit a save"
    assert len(seen) > TRIALS / 4, "saves should arrive between the kills"
    load_mixture(zoo.base("llama"), place)


def ask(run: subprocess.Popen[str], rounds: int, fraction: float) -> int:
    assert run.stdin is not None
    assert run.stdout is not None
    run.stdin.write(f"{rounds} {fraction}\n")
    run.stdin.flush()
    return int(run.stdout.readline())


# -- writes that fail --------------------------------------------------------------------------------


class Full:
    """Lets the n-th call of some functions of the system fail, once, as a full disk does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, nth: int) -> None:
        self.calls, self.nth = 0, nth
        for module, name in (
            (os, "mkdir"),
            (os, "rename"),
            (os, "replace"),
            (os, "fsync"),
            (peft.peft_model, "safe_save_file"),
            (builtins, "open"),
            (Path, "open"),
            (new_folder, "_exchange"),
        ):
            monkeypatch.setattr(module, name, self._wrapped(getattr(module, name)))

    def _wrapped(self, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if function is open and not set(str([*args[1:2], *kwargs.values()])) & set("wax+"):
                return function(*args, **kwargs)
            self.calls += 1
            if self.calls == self.nth:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(args[0]) if args else None)
            return function(*args, **kwargs)

        return call


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("swap", ["one step", "two steps"])
def test_the_n_th_write_fails(swap: str, zoo: Zoo, tmp_path: Path) -> None:
    """For every n until none fails: the old artefact stays, byte for byte, and nothing is left beside it."""
    model, place = Bench(zoo, tmp_path / "bench").live, tmp_path / "out" / "saved"
    save_mixture(model, place)
    (place / "tokenizer.json").write_text("{}")
    routers = [p for n, p in model.named_parameters() if "molora_router" in n]
    failures = 0
    for nth in range(1, 200):
        old = contents(place)
        for weight in routers:
            weight.data.fill_(nth)
        with pytest.MonkeyPatch.context() as patch:
            if swap == "two steps":
                patch.setattr(new_folder, "_exchange", lambda one, other: False)
            full = Full(patch, nth)
            failed = not saves(model, place)
        failures += failed
        new = contents(place)
        assert [p.name for p in place.parent.iterdir()] == ["saved"]
        assert new.keys() == old.keys()
        assert (new == old) is failed
        if full.calls < nth:
            break
    assert failures > 8
    assert not failed
    assert new["tokenizer.json"] == b"{}"


def saves(model: PeftModel, place: Path) -> bool:
    """Whether a save ends well; a failure is ours, and names the folder."""
    try:
        save_mixture(model, place)
    except PeftMoeError as error:
        return str(place) not in str(error)
    return True


@pytest.mark.parametrize("limit", [1, 4096, 1 << 16])
def test_the_disk_is_full(limit: int, zoo: Zoo, tmp_path: Path) -> None:
    """The system's own limit on the size of a file, below that of the weights."""
    model, place = Bench(zoo, tmp_path / "bench").live, tmp_path / "saved"
    save_mixture(model, place)
    assert (place / WEIGHTS).stat().st_size > limit
    old = contents(place)
    with (
        file_size_limit(limit),
        pytest.raises(PeftMoeError, match=r"saved could not be written: .*Make room"),
    ):
        save_mixture(model, place)
    assert contents(place) == old
    assert [p.name for p in tmp_path.iterdir()] == ["saved"]


@contextlib.contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


def test_too_little_room_is_said_before_anything_is_written(
    zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Bench(zoo, tmp_path / "bench").live
    monkeypatch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 5, 5))
    with pytest.raises(PeftMoeError, match=r"saved needs [0-9,]+ bytes, and the disk has 5; make room"):
        save_mixture(model, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written(zoo: Zoo, tmp_path: Path) -> None:
    model, place = Bench(zoo, tmp_path / "bench").live, tmp_path / "closed" / "saved"
    save_mixture(model, place)
    old = contents(place)
    place.parent.chmod(0o500)
    try:
        with pytest.raises(PeftMoeError, match="could not be written"):
            save_mixture(model, place)
    finally:
        place.parent.chmod(0o700)
    assert contents(place) == old


# -- where a mixture is not saved --------------------------------------------------------------------


def a_file(place: Path) -> None:
    place.write_text("x")


def a_link(place: Path) -> None:
    (place.parent / "elsewhere").mkdir()
    place.symlink_to(place.parent / "elsewhere")


def a_run(place: Path) -> None:
    (place / "checkpoint-4").mkdir(parents=True)
    (place / "checkpoint-4" / "optimizer.pt").write_text("x")


@pytest.mark.parametrize(
    ("make", "words"),
    [(a_file, "is a file"), (a_link, "symbolic link"), (a_run, "holds the folder 'checkpoint-4'")],
)
def test_places_that_are_not_replaced(make: Any, words: str, zoo: Zoo, tmp_path: Path) -> None:
    bench, place = Bench(zoo, tmp_path / "bench"), tmp_path / "out" / "saved"
    place.parent.mkdir()
    make(place)
    before = contents(tmp_path)
    with pytest.raises(PeftMoeError, match=words):
        save_mixture(bench.live, place)
    assert contents(tmp_path) == before


def test_what_is_written_is_read_back(zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that loses a bit, or a writer that leaves a tensor out."""
    model, place = Bench(zoo, tmp_path / "bench").live, tmp_path / "saved"
    save_mixture(model, place)
    old, write = contents(place), peft.peft_model.safe_save_file

    def lossy(tensors: Any, path: str, **kwargs: Any) -> None:
        write(dict(list(tensors.items())[1:]), path, **kwargs)

    monkeypatch.setattr(peft.peft_model, "safe_save_file", lossy)
    with pytest.raises(PeftMoeError, match=r"does not hold .*molora.* as it is in memory"):
        save_mixture(model, place)
    assert contents(place) == old


def test_saved_safely_is_saved_as_peft_does(zoo: Zoo, tmp_path: Path) -> None:
    bench = Bench(zoo, tmp_path / "bench")
    save_mixture(bench.live, tmp_path / "ours")
    bench.live.save_pretrained(str(tmp_path / "theirs"))
    assert contents(tmp_path / "ours") == contents(tmp_path / "theirs")
    loaded = load_mixture(zoo.base("llama"), tmp_path / "ours").eval()
    assert torch.equal(logits_of(loaded, BATCH), logits_of(bench.live, BATCH))
    assert isinstance(loaded, PeftModel)


def test_a_plain_adapter_is_no_mixture(zoo: Zoo, tmp_path: Path) -> None:
    with pytest.raises(PeftMoeError, match="carries no mixture"):
        save_mixture(zoo.lora("llama", "wide"), tmp_path / "saved")
