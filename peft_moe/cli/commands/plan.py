"""``peft-moe plan``: will it fit?"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from ...planning.plan import MIB, MemoryPlan, Training, plan_memory
from ...tuner.config.mixture import MoLoraConfig
from ..console import wide_console


def plan(
    base: Annotated[str, typer.Argument(help="Folder or Hub id of the base; only its config.json is read.")],
    expert: Annotated[
        list[str] | None,
        typer.Option(help="An adapter's folder or Hub id; repeat it. Only configs and headers are read."),
    ] = None,
    experts: Annotated[int, typer.Option(help="How many, where no adapters are given.", min=1)] = 4,
    rank: Annotated[int, typer.Option(help="Of each of those, on all linear layers.", min=1)] = 16,
    router: Annotated[str, typer.Option(help="See `peft-moe routers`.")] = "auto",
    train_experts: Annotated[bool, typer.Option(help="The experts train as well.")] = False,
    batch: Annotated[int, typer.Option(help="Sequences per device and step.")] = 1,
    sequence: Annotated[int, typer.Option(help="Tokens of each.")] = 1024,
    precision: Annotated[
        str | None, typer.Option(help="Of the base's linear layers: full, nf4, fp4, int8; else as stored.")
    ] = None,
    double_quant: Annotated[bool, typer.Option(help="4-bit scales are quantised as well.")] = False,
    dtype: Annotated[str, typer.Option(help="Of all the rest: bfloat16, float16, float32.")] = "bfloat16",
    autocast: Annotated[str | None, typer.Option(help="The trainer's bf16: bfloat16; fp16: float16.")] = None,
    checkpointing: Annotated[bool, typer.Option(help="Gradient checkpointing.")] = True,
    optimizer: Annotated[str, typer.Option(help="adamw, adamw_8bit, adafactor, sgd.")] = "adamw",
    loss: Annotated[str, typer.Option(help="fused (TRL's SFTTrainer) or full (all logits).")] = "fused",
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Estimate the peak memory of training a router, before anything is loaded."""
    training = Training(
        batch=batch,
        sequence=sequence,
        precision=precision,
        double_quant=double_quant,
        dtype=dtype,
        autocast=autocast,
        checkpointing=checkpointing,
        optimizer=optimizer,
        loss=loss,
        device=device,
    )
    fresh: dict[str, Any] = {} if expert else {"r": rank}
    mixture = MoLoraConfig(
        experts=list(expert) if expert else experts,
        **fresh,
        router=router,
        train_experts=train_experts or None,
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = plan_memory(_local(base), mixture, training)
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=1))
    else:
        wide_console().print(as_table(found))


def as_table(plan: MemoryPlan) -> Table:
    """The plan, a line for each part."""
    training = plan.training
    where = "" if training.checkpointing else "no "
    table = Table(
        title=f"{plan.base}: {len(plan.experts)} experts, {training.batch} × {training.sequence} tokens, "
        f"{where}checkpointing",
        header_style="bold",
        show_footer=True,
        caption=f"{plan.trained:,} numbers train. Tensors only: Python and libraries, or a CUDA context of "
        "about half a GiB, come on top.",
    )
    table.add_column("peak of a training step", footer="together")
    table.add_column("MiB", justify="right", footer=f"{plan.total / MIB:,.0f}")
    for name, size in plan.parts.items():
        table.add_row(name, f"{size / MIB:,.0f}")
    return table


def _local(base: str) -> str:
    return str(Path(base).expanduser()) if Path(base).expanduser().exists() else base
