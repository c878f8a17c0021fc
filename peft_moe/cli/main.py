"""The command line: ``peft-moe``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from ..errors import PeftMoeError
from .bakeoff import bakeoff
from .commands.edit import add_expert, remove_expert, rename_expert, reorder_experts, replace_expert
from .commands.export import card, export
from .commands.extract import extract
from .commands.inspect import inspect
from .commands.mix import mix
from .commands.plan import plan
from .console import wide_console

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="Mix trained LoRA adapters into one model."
)


@app.callback()
def main() -> None:
    """Mix trained LoRA adapters into one model."""


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the mixture and results.json.")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(help="Of samples and training.")] = 0,
    questions: Annotated[int, typer.Option(help="Fresh questions per row of the table.", min=20)] = 200,
    steps: Annotated[int, typer.Option(help="Training steps of the router.", min=1)] = 60,
) -> None:
    """Mix five embedded experts, train the router, and print what becomes of every skill."""
    from .demo.methods import Training
    from .demo.run import run_demo

    run_demo(out, seed=seed, per_domain=questions, plan=Training(steps=steps), console=wide_console())


@app.command()
def chat(
    mixture: Annotated[Path, typer.Argument(help="Folder of a saved mixture.")],
    marker: Annotated[str, typer.Option(help="Text between a question and its answer.")] = "",
) -> None:
    """Put questions to a saved mixture, and see which expert answers."""
    from .demo.chat import chat as talk

    talk(str(mixture), marker)


@app.command()
def routers(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table of ROUTERS.md.")] = False,
) -> None:
    """List the routers: what each does, what it needs, what it costs."""
    from .routers import as_markdown, catalogue

    rows = catalogue()
    if as_json:
        typer.echo(json.dumps([row.to_dict() for row in rows], indent=1))
        return
    if markdown:
        typer.echo(as_markdown(rows))
        return
    table = Table(title="MoLoraConfig(router=…)", header_style="bold")
    for heading in ("router", "what it does", "needs", "scope, per", "paper"):
        table.add_column(heading)
    for row in rows:
        needs = row.needs + (f" (fit: {row.fit})" if row.fit else "")
        table.add_row(row.name, row.summary, needs, f"{row.scope}, {row.granularity}", row.paper)
    wide_console().print(table)


app.command()(bakeoff)
app.command()(card)
app.command()(export)
app.command()(extract)
app.command()(inspect)
app.command()(mix)
app.command()(plan)
for edited in (add_expert, remove_expert, replace_expert, rename_expert, reorder_experts):
    app.command()(edited)


def run() -> None:
    """Entry point: refusals are messages, not tracebacks."""
    try:
        app()
    except PeftMoeError as error:
        Console(stderr=True).print(f"[red]error:[/] {error}", highlight=False)
        raise SystemExit(2) from None
