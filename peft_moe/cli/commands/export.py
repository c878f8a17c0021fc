"""``peft-moe export`` and ``peft-moe card``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ...errors import PeftMoeError
from ..console import print_json, print_lines

To = Annotated[
    str,
    typer.Option(
        help="lora, merged, adapters (every expert as its own adapter), distilled-lora, or native (a MoE of "
        "the base's architecture)."
    ),
]
Gates = Annotated[
    str | None,
    typer.Option(
        help="lora, merged: fixed gates, such as 'math=0.5,code=0.5'; 'math' alone means that expert only."
    ),
]
Rank = Annotated[
    int | None,
    typer.Option(help="lora: reduce to this rank by SVD; distilled-lora: rank of the new LoRA.", min=1),
]
Dtype = Annotated[
    str | None,
    typer.Option(help="float32, bfloat16 or float16. Default: the stored dtype where it is exact."),
]
Base = Annotated[
    str | None,
    typer.Option(
        help="merged, distilled-lora, native: folder or Hub id of the base. Default: as in the "
        "mixture's config."
    ),
]
Data = Annotated[
    Path | None,
    typer.Option(help="distilled-lora, native: .jsonl with prompt + completion, messages, or text."),
]
EvalData = Annotated[
    Path | None, typer.Option(help="distilled-lora: held-out texts. Default: a tenth of --data.")
]


def export(
    mixture: Annotated[str, typer.Argument(help="Folder or Hub id of a saved mixture; it is not changed.")],
    out: Annotated[Path, typer.Option(help="Folder to write to.")],
    to: To = "lora",
    gates: Gates = None,
    rank: Rank = None,
    dtype: Dtype = None,
    base: Base = None,
    data: Data = None,
    eval_data: EvalData = None,
    steps: Annotated[int, typer.Option(help="distilled-lora: training steps.", min=0)] = 200,
    learning_rate: Annotated[float, typer.Option(help="distilled-lora: learning rate.")] = 1e-3,
    batch_size: Annotated[int, typer.Option(help="distilled-lora: texts per step.", min=1)] = 8,
    max_length: Annotated[int, typer.Option(help="distilled-lora: tokens per text.", min=2)] = 1024,
    temperature: Annotated[float, typer.Option(help="distilled-lora: distillation temperature.")] = 1.0,
    seed: Annotated[int, typer.Option(help="distilled-lora: seed of the training.")] = 0,
    approximate: Annotated[
        bool,
        typer.Option("--approximate", help="native: allow an approximation, and report its measured error."),
    ] = False,
    max_shard_size: Annotated[
        str | None, typer.Option(help="native: largest size of a weights file. Default: 5GB.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the folder.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Write a mixture in a form that works without peft-moe.

    lora and merged are exact for a mixture whose gates do not depend on the input, or are fixed with --gates.
    distilled-lora trains one LoRA to imitate any mixture, and reports how far it is from it.
    native (or mixtral, qwen2-moe, qwen3-moe) turns a mixture with mixing="block" into a model of that
    architecture.
    """
    from ...export import Distillation
    from ...export import export as write
    from ...export.export import native_kinds
    from ...export.gates import read_gates

    distillation = None
    native = to in native_kinds()
    if data is not None and not native:
        distillation = Distillation(
            str(data), str(eval_data) if eval_data else None, steps=steps, learning_rate=learning_rate,
            batch_size=batch_size, max_length=max_length, temperature=temperature, seed=seed,
            trainer={"disable_tqdm": as_json},
        )  # fmt: skip
    elif eval_data is not None:
        raise PeftMoeError("--eval-data has no effect without --data and --to distilled-lora")
    fixed_gates = read_gates(gates) if gates is not None else None
    report: Any = write(
        mixture, out, to, gates=fixed_gates, rank=rank, dtype=dtype, base=base, distillation=distillation,
        approximate=approximate, data=str(data) if data is not None and native else None,
        max_shard_size=max_shard_size, overwrite=overwrite,
    )  # fmt: skip
    if as_json:
        print_json(report.to_dict())
    else:
        print_lines([*report.lines(), f"Saved: {out}"])


def card(
    mixture: Annotated[Path, typer.Argument(help="Folder of a saved mixture.")],
    metrics: Annotated[
        Path | None,
        typer.Option(help="JSON of figures: a training's summary.json or a bake-off's results.json."),
    ] = None,
) -> None:
    """Rewrite the model card of a saved mixture, with figures if a file of them is given."""
    from ...export.mixture_tensors import open_mixture
    from ...tuner.config.model_card import update_card

    print_lines([f"Saved: {update_card(mixture, open_mixture(mixture).config, metrics=metrics)}"])
