"""``peft-moe extract``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Option

from ...errors import PeftMoeError
from ..console import print_json, print_lines, wide_console


def extract(
    base: Annotated[str, Option(help="Folder or Hub id of the base that the model was trained from.")],
    model: Annotated[str, Option(help="Folder or Hub id of the fully fine-tuned model.")],
    out: Annotated[Path, Option(help="Folder to write the adapter to.")],
    rank: Annotated[int | None, Option(help="Use this rank in every layer.", min=1)] = None,
    energy: Annotated[
        float | None,
        Option(help="Use in each layer the smallest rank that keeps this share of ‖ΔW‖², such as 0.95."),
    ] = None,
    max_rank: Annotated[int, Option(help="Largest rank of a layer.", min=1)] = 64,
    dense: Annotated[
        bool, Option("--dense", help="Keep the exact change of each layer instead of a low rank.")
    ] = False,
    target_modules: Annotated[
        str, Option(help="Linear layers to extract, such as 'q_proj,v_proj'. Default: all but the LM head.")
    ] = "",
    dtype: Annotated[str, Option(help="Dtype of the factors: float32, bfloat16, float16 or auto.")] = "auto",
    calibration: Annotated[
        Path | None,
        Option(help=".jsonl of texts; adds each layer's output error and the logits' KL to the report."),
    ] = None,
    device: Annotated[str, Option(help="Device that runs the decompositions.")] = "cpu",
    overwrite: Annotated[bool, Option("--overwrite", help="Replace the folder.")] = False,
    as_json: Annotated[bool, Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Extract a LoRA adapter from a fully fine-tuned model, by SVD of its weights' difference from the base.

    Without --rank or --energy each layer keeps the singular values that stand out from its noise (Gavish and
    Donoho). This recovers the rank of a merged LoRA.
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
        print_json(report.to_dict())
        return
    wide_console().print(report.table())
    print_lines([*report.summary(), f"Saved: {out}, an ordinary PEFT adapter ({report.seconds:.0f} s)."])


def read_texts(path: Path) -> list[str]:
    """Read calibration texts from a .jsonl file with ``text``, ``prompt`` + ``completion``, or ``messages``.

    Raises:
        PeftMoeError: the file cannot be read as texts; the message names the line and the remedy.
    """
    from ...io.text_data import load_text_dataset

    try:
        rows = load_text_dataset(path)
    except ValueError as error:
        raise PeftMoeError(str(error)) from error
    return [_as_text(row) for row in rows]


def _as_text(row: dict[str, object]) -> str:
    parts = [row[key] for key in ("text", "prompt", "completion", "messages") if row.get(key)]
    return "".join(part if isinstance(part, str) else _join_messages(part) for part in parts)


def _join_messages(messages: object) -> str:
    assert isinstance(messages, list)  # load_text_dataset checks this
    return "\n".join(str(message["content"]) for message in messages)
