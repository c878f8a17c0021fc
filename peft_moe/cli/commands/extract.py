"""``peft-moe extract``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ...errors import PeftMoeError
from ..console import wide_console


def extract(
    base: Annotated[str, typer.Option(help="Folder or Hub id of the base that the model was trained from.")],
    model: Annotated[str, typer.Option(help="Folder or Hub id of the full fine-tuned model.")],
    out: Annotated[Path, typer.Option(help="Folder of the adapter to write.")],
    rank: Annotated[int | None, typer.Option(help="The same rank in every layer.", min=1)] = None,
    energy: Annotated[
        float | None, typer.Option(help="Instead: the fewest ranks that keep this share of ‖ΔW‖², as 0.95.")
    ] = None,
    max_rank: Annotated[int, typer.Option(help="Never more than so many ranks in a layer.", min=1)] = 64,
    dense: Annotated[
        bool, typer.Option("--dense", help="Instead: all of each layer's change, exactly.")
    ] = False,
    target_modules: Annotated[
        str, typer.Option(help="Linear layers to take, as 'q_proj,v_proj'. Default: all but the head.")
    ] = "",
    dtype: Annotated[str, typer.Option(help="Of the factors: float32, bfloat16, float16, auto.")] = "auto",
    calibration: Annotated[
        Path | None,
        typer.Option(help=".jsonl of texts: adds each layer's output error and the KL of the logits."),
    ] = None,
    device: Annotated[str, typer.Option(help="Where the decompositions run.")] = "cpu",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the folder.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Make a LoRA adapter of what a full fine-tuned model learnt, by SVD of the weights' difference.

    Without --rank or --energy each layer keeps the singular values that stand out of its noise (Gavish and
    Donoho), which finds a merged LoRA's rank again.
    """
    from ...experts.extraction.extract import extract_adapter

    report = extract_adapter(
        base,
        model,
        out,
        rank=rank,
        energy=energy,
        max_rank=max_rank,
        dense=dense,
        target_modules=[part.strip() for part in target_modules.split(",") if part.strip()] or None,
        dtype=dtype,
        texts=read_texts(calibration) if calibration else (),
        device=device,
        overwrite=overwrite,
        progress=not as_json,
    )
    if as_json:
        typer.echo(json.dumps(report.to_dict(), indent=1))
        return
    console: Console = wide_console()
    console.print(report.table())
    for line in report.summary():
        console.print(line, highlight=False)
    console.print(f"Kept: {out}, an ordinary PEFT adapter ({report.seconds:.0f} s).")


def read_texts(path: Path) -> list[str]:
    """Calibration texts of a .jsonl file with ``text``, ``prompt`` + ``completion``, or ``messages``.

    Raises:
        PeftMoeError: the file's own faults, with place and remedy.
    """
    from ...io.text_data import load_text_dataset

    try:
        rows = load_text_dataset(path)
    except ValueError as error:
        raise PeftMoeError(str(error)) from error
    return [_plain(row) for row in rows]


def _plain(row: dict[str, object]) -> str:
    parts = [row[key] for key in ("text", "prompt", "completion", "messages") if row.get(key)]
    return "".join(one if isinstance(one, str) else _spoken(one) for one in parts)


def _spoken(messages: object) -> str:
    assert isinstance(messages, list)  # load_text_dataset saw to it
    return "\n".join(str(message["content"]) for message in messages)
