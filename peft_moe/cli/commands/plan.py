"""``peft-moe plan``: the peak memory of a training, before it starts."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from ..console import print_json, wide_console

if TYPE_CHECKING:
    from ...planning.plan import MemoryPlan


def plan(
    base: Annotated[str, typer.Argument(help="Folder or Hub id of the base; only its config.json is read.")],
    expert: Annotated[
        list[str] | None,
        typer.Option(help="Folder or Hub id of an adapter; only its config and header are read. Repeatable."),
    ] = None,
    experts: Annotated[int, typer.Option(help="Number of experts, where no adapters are named.", min=1)] = 4,
    rank: Annotated[int, typer.Option(help="Rank of these experts, on all linear layers.", min=1)] = 16,
    router: Annotated[str, typer.Option(help="Name of a router; see `peft-moe routers`.")] = "auto",
    train_experts: Annotated[bool, typer.Option(help="Train the experts as well.")] = False,
    batch: Annotated[int, typer.Option(help="Sequences per device and step.")] = 1,
    sequence: Annotated[int, typer.Option(help="Tokens per sequence.")] = 1024,
    precision: Annotated[
        str | None,
        typer.Option(help="Storage of the base's linear layers: full, nf4, fp4, int8. Default: as stored."),
    ] = None,
    double_quant: Annotated[bool, typer.Option(help="Quantise the scales of 4-bit layers as well.")] = False,
    dtype: Annotated[
        str, typer.Option(help="Dtype of everything else: bfloat16, float16, float32.")
    ] = "bfloat16",
    autocast: Annotated[
        str | None,
        typer.Option(help="Autocast dtype: bfloat16 (trainer's bf16) or float16 (its fp16)."),
    ] = None,
    checkpointing: Annotated[bool, typer.Option(help="Use gradient checkpointing.")] = True,
    optimizer: Annotated[str, typer.Option(help="adamw, adamw_8bit, adafactor or sgd.")] = "adamw",
    loss: Annotated[str, typer.Option(help="fused (TRL's SFTTrainer) or full (all logits).")] = "fused",
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Estimate the peak memory of training a router, without loading any weights."""
    from ...planning.plan import Training, plan_memory
    from ...tuner.config.mixture import MoLoraConfig

    training = Training(
        batch=batch, sequence=sequence, precision=precision, double_quant=double_quant, dtype=dtype,
        autocast=autocast, checkpointing=checkpointing, optimizer=optimizer, loss=loss, device=device,
    )  # fmt: skip
    rank_field: dict[str, Any] = {} if expert else {"r": rank}
    mixture = MoLoraConfig(
        experts=list(expert) if expert else experts,
        **rank_field,
        router=router,
        train_experts=train_experts or None,
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        memory = plan_memory(_expand_home(base), mixture, training)
    if as_json:
        print_json(memory.to_dict())
    else:
        wide_console().print(as_table(memory))


def as_table(plan: MemoryPlan) -> Table:
    """Return the plan as a table with one line per part."""
    from ...planning.plan import MIB

    training = plan.training
    checkpointing = "checkpointing" if training.checkpointing else "no checkpointing"
    table = Table(
        title=f"{plan.base}: {len(plan.experts)} experts, {training.batch} × {training.sequence} tokens, "
        f"{checkpointing}",
        header_style="bold",
        show_footer=True,
        caption=f"{plan.trained:,} numbers train. Tensors only: Python and libraries, or a CUDA context of "
        "about half a GiB, come on top.",
    )
    table.add_column("peak of a training step", footer="total")
    table.add_column("MiB", justify="right", footer=f"{plan.total / MIB:,.0f}")
    for name, size in plan.parts.items():
        table.add_row(name, f"{size / MIB:,.0f}")
    return table


def _expand_home(base: str) -> str:
    """Expand ``~`` in a folder's path; leave a Hub id as it is."""
    path = Path(base).expanduser()
    return str(path) if path.exists() else base
