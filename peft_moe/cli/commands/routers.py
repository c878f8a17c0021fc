"""``peft-moe routers``: the table of routers, read from the presets and the registry of scorers."""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import typer
from rich.table import Table

from ...routers import PRESETS, available_scorers
from ...tuner.config.mixture import MoLoraConfig
from ..console import print_json, wide_console


def routers(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table of ROUTERS.md.")] = False,
) -> None:
    """List the routers: what each of them does, needs and costs."""
    rows = catalogue()
    if as_json:
        print_json([row.to_dict() for row in rows])
    elif markdown:
        typer.echo(as_markdown(rows))
    else:
        wide_console().print(as_table(rows))


@dataclass(frozen=True)
class CatalogueRow:
    """One router.

    Attributes:
        name: value of ``MoLoraConfig(router=…)``.
        summary: what it does, in one line.
        needs: what it needs before it routes well.
        scorer, scope, granularity, selection: its parts.
        fit: method of ``fit_router`` that fills it without training; None if there is none.
        trains: whether training changes it.
        cost: what it costs in addition to the experts, in words.
        mergeable: whether its gates are the same for every input, so that the mixture merges into one LoRA.
        paper: arXiv number, or another source.
    """

    name: str
    summary: str
    needs: str
    scorer: str
    scope: str
    granularity: str
    selection: str
    fit: str | None
    trains: bool
    cost: str
    mergeable: bool
    paper: str

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain data for JSON."""
        return asdict(self)


def catalogue() -> list[CatalogueRow]:
    """Return all presets in the order of their file, then the registered scorers that have no preset."""
    without_preset = [name for name in available_scorers() if name not in PRESETS]
    return [_row(name) for name in (*PRESETS, *without_preset)]


def as_table(rows: list[CatalogueRow]) -> Table:
    """Return the catalogue as a table for the terminal."""
    table = Table(title="MoLoraConfig(router=…)", header_style="bold")
    for heading in ("router", "what it does", "needs", "scope, per", "paper"):
        table.add_column(heading)
    for row in rows:
        needs = row.needs + (f" (fit: {row.fit})" if row.fit else "")
        table.add_row(row.name, row.summary, needs, f"{row.scope}, {row.granularity}", row.paper)
    return table


def as_markdown(rows: list[CatalogueRow]) -> str:
    """Return the catalogue as the table of ROUTERS.md."""
    head = ("router", "what it does", "needs", "scope, per", "selection", "costs", "paper")
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        needs = row.needs + (f" (`fit_router(method={row.fit!r})`)" if row.fit else "")
        paper = f"[{row.paper}](https://arxiv.org/abs/{row.paper})" if row.paper[:2].isdigit() else row.paper
        parts = (row.summary, needs, f"{row.scope}, {row.granularity}", row.selection, row.cost, paper)
        lines.append(f"| `{row.name}` | " + " | ".join(parts) + " |")
    return "\n".join(lines)


def _row(name: str) -> CatalogueRow:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about combinations that matter only when the router runs
        config = MoLoraConfig(router=name, experts=8)
    preset, scorer = PRESETS.get(name), config.scorer
    first_line = (scorer.__doc__ or "").strip().split("\n")[0]
    return CatalogueRow(
        name=name,
        summary=preset.summary if preset else first_line,
        needs=preset.needs if preset else ("training text" if scorer.trainable else "nothing"),
        scorer=config.router_settings().scorer,
        scope=str(config.router_scope),
        granularity=_granularity(config),
        selection=_selection(config),
        fit=preset.fit if preset else None,
        trains=scorer.trainable,
        cost=_cost(config),
        mergeable=not scorer.reads_input,
        paper=preset.paper if preset else scorer.paper.removeprefix("arXiv "),
    )


def _granularity(config: MoLoraConfig) -> str:
    if not config.scorer.reads_input:
        return "constant"
    if not config.scorer.reads_hidden:
        return "token id" if config.router_settings().scorer == "hash" else "label"
    return {"token": "token", "sequence": "prompt", "running": "prompt, then running"}[
        str(config.router_granularity)
    ]


def _selection(config: MoLoraConfig) -> str:
    choice = "dense" if config.top_k is None else f"top-{config.top_k}"
    if config.topk_method != "greedy":
        choice = f"top-p {config.top_p}" if config.topk_method == "top_p" else "expert choice"
    extra = [word for word, on in (("hard", config.straight_through), ("null", config.null_expert)) if on]
    return " ".join([f"{config.scoring_func} {choice}", *extra])


def _cost(config: MoLoraConfig) -> str:
    scorer = config.scorer
    if not scorer.reads_input or not scorer.reads_hidden:
        return "nothing"
    if scorer.reads_experts:
        return "a small product per module, from the experts' weights"
    if config.router_scope != "model":
        return f"a small product per {config.router_scope}"
    if config.router_tap == 0:
        return "nothing: it reads the embeddings"
    prefill_only = config.router_granularity == "sequence" or config.router_below_tap == "prompt"
    return "half a forward pass of the bare base, " + ("at prefill only" if prefill_only else "in every step")
