"""``peft-moe demo`` and ``peft-moe chat``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..console import wide_console


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the mixture and results.json.")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(help="Seed of the samples and of the training.")] = 0,
    questions: Annotated[int, typer.Option(help="Test questions per column of the table.", min=20)] = 200,
    steps: Annotated[int, typer.Option(help="Training steps of the router.", min=1)] = 60,
) -> None:
    """Combine five embedded experts, train their router, and print how well each skill survives."""
    from ..demo.methods import Training
    from ..demo.run import run_demo

    run_demo(out, seed=seed, per_domain=questions, plan=Training(steps=steps), console=wide_console())


def chat(
    mixture: Annotated[Path, typer.Argument(help="Folder of a saved mixture.")],
    marker: Annotated[str, typer.Option(help="Text that the base expects after a question.")] = "",
) -> None:
    """Ask a saved mixture questions, and see which expert answers."""
    from ..demo.chat import chat as start_chat

    start_chat(str(mixture), marker)
