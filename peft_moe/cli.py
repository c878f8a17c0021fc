"""The command line: ``peft-moe demo`` and ``peft-moe chat``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .errors import PeftMoeError

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

    run_demo(out, seed=seed, per_domain=questions, plan=Training(steps=steps))


@app.command()
def chat(
    mixture: Annotated[Path, typer.Argument(help="Folder of a saved mixture.")],
    marker: Annotated[str, typer.Option(help="Text between a question and its answer.")] = "",
) -> None:
    """Put questions to a saved mixture, and see which expert answers."""
    from .demo.chat import chat as talk

    talk(str(mixture), marker)


def run() -> None:
    """Entry point: refusals are messages, not tracebacks."""
    try:
        app()
    except PeftMoeError as error:
        Console(stderr=True).print(f"[red]error:[/] {error}", highlight=False)
        raise SystemExit(2) from None
