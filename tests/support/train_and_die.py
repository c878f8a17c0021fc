"""Train a router in child processes that are killed: ``python train_and_die.py BASE WIDE NARROW``.

For every line "OUT SEED STEPS FRACTION" on its input, a child trains in the folder OUT, from the last whole
checkpoint there if any. It is killed when it has ended so many steps and a fraction of a step's time has
passed; with STEPS -1 it goes on to the end. The answer is a letter for the step that it began from, a dot for
each step that it ended, and at the end a digest of all weights; then how the child ended.
"""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import SFTConfig  # noqa: F401  (imported once, before the children are)

from peft_moe import MoLoraConfig
from peft_moe.training import last_good_checkpoint
from support.training import make_trainer, samples

STEPS = 6


class Tell(TrainerCallback):
    """One byte for each step, before the checkpoint is written that follows it."""

    def __init__(self, pipe: int) -> None:
        self.pipe = pipe

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        os.write(self.pipe, bytes([ord("a") + state.global_step]))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        os.write(self.pipe, b".")


def train(base: str, experts: dict[str, str], out: str, seed: int, pipe: int) -> None:
    """A router whose scores are noisy, so that random numbers count, and a schedule that falls."""
    torch.manual_seed(seed)
    config = MoLoraConfig(experts=experts, router="noisy_top_k")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    settings = {
        "max_steps": STEPS,
        "save_strategy": "steps",
        "save_steps": 1,
        "save_total_limit": 3,
        "lr_scheduler_type": "linear",
        "per_device_train_batch_size": 2,
        "seed": seed,
    }
    data, given = Dataset.from_list(samples(16)), {"callbacks": [Tell(pipe)]}
    trainer = make_trainer("sft", model, data, Path(out), given=given, **settings)
    trainer.train(resume_from_checkpoint=bool(last_good_checkpoint(out)))
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode() + value.contiguous().view(torch.uint8).numpy().tobytes())
    os.write(pipe, digest.hexdigest().encode())


def main() -> None:
    base, wide, narrow = sys.argv[1:]
    torch.set_num_threads(1)
    seconds = 0.1
    print("ready", flush=True)
    for line in sys.stdin:
        out, seed, wanted, fraction = line.split()
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reading)
            os.dup2(2, 1)  # what the trainer prints is no answer
            train(base, {"wide": wide, "narrow": narrow}, out, int(seed), writing)
            os._exit(0)
        os.close(writing)
        said = b""
        if int(wanted) >= 0:
            begin = time.perf_counter()
            while said.count(b".") < int(wanted) and (part := os.read(reading, 1)):
                said += part
                if part != b".":
                    begin = time.perf_counter()
            if said.count(b"."):
                seconds = (time.perf_counter() - begin) / said.count(b".")
            time.sleep(float(fraction) * seconds)
            os.kill(child, signal.SIGKILL)
        with os.fdopen(reading, "rb") as pipe:
            said += pipe.read()
        _, status = os.waitpid(child, 0)
        print(said.decode() or "-", os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
