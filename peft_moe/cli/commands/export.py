"""``peft-moe export`` and ``peft-moe card``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ...errors import PeftMoeError
from ..console import wide_console

To = Annotated[
    str,
    typer.Option(
        help="lora, merged, adapters (each expert back), distilled-lora, native (the MoE of the base)."
    ),
]
Gates = Annotated[
    str | None,
    typer.Option(help="lora, merged: fixed gates, as 'math=0.5,code=0.5'; 'math' alone is that expert."),
]
Rank = Annotated[
    int | None, typer.Option(help="lora: cut to this rank by SVD; distilled-lora: its rank.", min=1)
]
Dtype = Annotated[
    str | None, typer.Option(help="float32, bfloat16, float16; default: what there is, if exact.")
]
Base = Annotated[
    str | None, typer.Option(help="merged, distilled-lora, native: the base, if the mixture's is not here.")
]
Data = Annotated[
    Path | None, typer.Option(help="distilled-lora, native: .jsonl of prompt + completion, messages or text.")
]
EvalData = Annotated[
    Path | None, typer.Option(help="distilled-lora: held-out texts; default: a tenth of --data.")
]


def export(
    mixture: Annotated[str, typer.Argument(help="Folder or Hub id of a saved mixture; it stays as it is.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    to: To = "lora",
    gates: Gates = None,
    rank: Rank = None,
    dtype: Dtype = None,
    base: Base = None,
    data: Data = None,
    eval_data: EvalData = None,
    steps: Annotated[int, typer.Option(help="distilled-lora: training steps.", min=0)] = 200,
    learning_rate: Annotated[float, typer.Option(help="distilled-lora.")] = 1e-3,
    batch_size: Annotated[int, typer.Option(help="distilled-lora: texts per step.", min=1)] = 8,
    max_length: Annotated[int, typer.Option(help="distilled-lora: tokens per text.", min=2)] = 1024,
    temperature: Annotated[float, typer.Option(help="distilled-lora: of the distillation.")] = 1.0,
    seed: Annotated[int, typer.Option(help="distilled-lora.")] = 0,
    approximate: Annotated[
        bool, typer.Option("--approximate", help="native: what is near, and the measured gap.")
    ] = False,
    max_shard_size: Annotated[
        str | None, typer.Option(help="native: of one file of weights; default: 5GB.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the folder.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Write a mixture as something that works without peft-moe.

    lora and merged equal a mixture whose gates do not depend on the input, or are fixed with --gates;
    distilled-lora trains one LoRA to imitate any mixture, and says how far it is from it; native (or mixtral,
    qwen2-moe, qwen3-moe) makes a model of that architecture of a mixture with mixing="block".
    """
    from ...export import Distillation
    from ...export import export as write
    from ...export.export import NATIVE_KINDS
    from ...export.gates import read_gates

    how = None
    native = to in NATIVE_KINDS
    if data is not None and not native:
        how = Distillation(
            str(data), str(eval_data) if eval_data else None, steps=steps, learning_rate=learning_rate,
            batch_size=batch_size, max_length=max_length, temperature=temperature, seed=seed,
            trainer={"disable_tqdm": as_json},
        )  # fmt: skip
    elif eval_data is not None:
        raise PeftMoeError("--eval-data has no effect without --data and --to distilled-lora")
    fixed = read_gates(gates) if gates is not None else None
    report = write(
        mixture, out, to, gates=fixed, rank=rank, dtype=dtype, base=base, distillation=how,
        approximate=approximate, data=str(data) if data is not None and native else None,
        max_shard_size=max_shard_size, overwrite=overwrite,
    )  # fmt: skip
    _show(report, out, as_json)


def _show(report: Any, out: Path, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(report.to_dict(), indent=1))
        return
    console = wide_console()
    for line in report.lines():
        console.print(line, highlight=False)
    console.print(f"Kept: {out}", highlight=False)


def card(
    mixture: Annotated[Path, typer.Argument(help="Folder of a saved mixture.")],
    metrics: Annotated[
        Path | None,
        typer.Option(help="JSON of figures: a training's summary.json, a bake-off's results.json."),
    ] = None,
) -> None:
    """Write the model card of a saved mixture anew, with figures."""
    from ...export.mixture_tensors import open_mixture
    from ...tuner.config.model_card import update_card

    console = wide_console()
    console.print(
        f"Kept: {update_card(mixture, open_mixture(mixture).config, metrics=metrics)}", highlight=False
    )
