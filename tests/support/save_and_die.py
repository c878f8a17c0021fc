"""Save a mixture again and again in a child process, and kill it: ``python save_and_die.py BASE START OUT``.

For every line "ROUNDS FRACTION" on its input, a child starts to save, each time with other weights and
another config; it is killed when it has ended that many saves and a fraction of a save's time has passed. The
answer is how many saves it had ended.
"""

from __future__ import annotations

import os
import signal
import sys
import time

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from peft_moe import save_mixture


def save_for_ever(model: PeftModel, out: str, pipe: int, number: int) -> None:
    """Round after round; every number of the routers is the round's, and the config's revision too."""
    weights = [p for name, p in model.named_parameters() if "molora_router" in name]
    assert weights
    while True:
        number += 1
        with torch.no_grad():
            for weight in weights:
                weight.fill_(number)
        model.peft_config["default"].revision = str(number)
        save_mixture(model, out)
        os.write(pipe, b".")


def main() -> None:
    base, start, out = sys.argv[1:]
    torch.set_num_threads(1)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), start)
    ended, seconds = 0, 0.0
    print("ready", flush=True)
    for line in sys.stdin:
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reading)
            save_for_ever(model, out, writing, ended)
        os.close(writing)
        wanted, fraction = line.split()
        begin, rounds = time.perf_counter(), 0
        while rounds < int(wanted):
            rounds += len(os.read(reading, 1))
        if rounds:
            seconds = (time.perf_counter() - begin) / rounds
        time.sleep(float(fraction) * seconds)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with os.fdopen(reading, "rb") as pipe:
            rounds += len(pipe.read())
        ended += rounds + 1  # the one that was killed may have arrived
        print(rounds, flush=True)


if __name__ == "__main__":
    main()
