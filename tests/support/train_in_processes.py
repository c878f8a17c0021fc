"""Train tiny mixtures, alone or as one of several processes that ``torchrun`` started.

``python train_in_processes.py CASES.json``: a list of cases, each of which names the experts' folders, the
routing, the trainer, how it is spread, and the folder where process 0 leaves its results.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState
from peft import get_peft_model
from torch import Tensor

from peft_moe import MoLoraConfig
from support.bases import make_base
from support.routing import ROUTINGS, set_routers
from support.training import make_trainer, samples, tokenised

ROWS = 4
STEPS = 3


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may be cut over processes."""
    full = getattr(tensor, "full_tensor", None)
    return (full() if full is not None else tensor).detach().clone()


@contextmanager
def sharded() -> Iterator[None]:
    """Have accelerate shard by FSDP2, which it offers on accelerators only; torch itself does it on CPUs.

    The kind of distribution is put into its state by hand; wrapping, optimizer, clipping and gathering are
    its own.
    """
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        state_dict_type="full_state_dict",
        cpu_ram_efficient_loading=False,
    )
    make = Accelerator.__init__

    def make_sharding(self: Accelerator, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        assert self.distributed_type == DistributedType.MULTI_CPU
        AcceleratorState._shared_state.update(distributed_type=DistributedType.FSDP, fsdp_plugin=plugin)

    Accelerator.__init__ = make_sharding
    try:
        yield
    finally:
        Accelerator.__init__ = make


def train(case: dict[str, Any], processes: int) -> dict[str, Any]:
    """A few steps on the same rows, however many processes share them."""
    torch.manual_seed(0)
    given = {"experts": case["experts"], **ROUTINGS[case["routing"]], **case.get("config", {})}
    model = get_peft_model(make_base("llama"), MoLoraConfig(task_type="CAUSAL_LM", **given))
    set_routers(model)
    folder = Path(case["folder"])
    data = tokenised(samples(STEPS * ROWS, equal=case.get("equal", False)))
    trainer = make_trainer(
        case["trainer"], model, data, folder / "run",
        max_steps=STEPS, per_device_train_batch_size=ROWS // processes, max_grad_norm=1.0,
    )  # fmt: skip
    assert trainer.accelerator.num_processes == processes
    trainer.train()
    unwrapped = trainer.accelerator.unwrap_model(trainer.model)
    # On CPUs torch leaves the shards of a "full" state dict as they are.
    gathered = trainer.accelerator.get_state_dict(trainer.model)
    saved = {name: whole(value) for name, value in gathered.items()}
    if trainer.accelerator.is_main_process:
        unwrapped.save_pretrained(str(folder / "saved"), state_dict=saved)
    return {
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "grad_norms": [entry["grad_norm"] for entry in trainer.state.log_history if "loss" in entry],
        "wrapped": type(trainer.model_wrapped).__name__,
        "cut": sum(hasattr(parameter, "full_tensor") for parameter in unwrapped.parameters()),
        "parameters": sum(1 for _ in unwrapped.parameters()),
    }


def main() -> None:
    """All cases, one after the other, in one group of processes."""
    for case in json.loads(Path(sys.argv[1]).read_text()):
        if case["spread"] == "fsdp2":
            with sharded():
                found = train(case, processes=2)
        else:
            found = train(case, processes=2)
        if torch.distributed.get_rank() == 0:
            (Path(case["folder"]) / "found.json").write_text(json.dumps(found))
    # A process that leaves while the other still talks to it may be aborted.
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
