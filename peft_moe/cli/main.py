"""The command line ``peft-moe``: the list of its commands, and the entry point."""

from __future__ import annotations

import typer
from rich.console import Console

from ..errors import PeftMoeError
from .commands.bakeoff import bakeoff
from .commands.demo import chat, demo
from .commands.edit import add_expert, remove_expert, rename_expert, reorder_experts, replace_expert
from .commands.export import card, export
from .commands.extract import extract
from .commands.inspect import inspect
from .commands.mix import mix
from .commands.plan import plan
from .commands.routers import routers

PANELS = {
    "Start": (demo, chat, routers),
    "Build": (inspect, plan, extract, mix),
    "Compare": (bakeoff,),
    "Edit a saved mixture": (add_expert, remove_expert, replace_expert, rename_expert, reorder_experts),
    "Use a saved mixture elsewhere": (export, card),
}
"""Heading in ``peft-moe --help`` → its commands, in this order."""

app = typer.Typer(no_args_is_help=True, add_completion=False)
for heading, commands in PANELS.items():
    for command in commands:
        app.command(rich_help_panel=heading)(command)


@app.callback()
def main() -> None:
    """Combine trained LoRA adapters in one model, with a router that decides which of them to use."""


def run() -> None:
    """Run the command line; a :class:`PeftMoeError` becomes a message and exit code 2, not a traceback."""
    try:
        app()
    except PeftMoeError as error:
        Console(stderr=True).print(f"[red]error:[/] {error}", highlight=False)
        raise SystemExit(2) from None
