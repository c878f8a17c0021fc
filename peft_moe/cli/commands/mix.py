"""``peft-moe mix``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..console import wide_console


def mix(
    config: Annotated[Path, typer.Argument(help="The mixture in YAML; mergekit-moe's form is understood.")],
    out: Annotated[Path, typer.Option(help="Folder of the mixture to write.")],
    device: Annotated[str, typer.Option(help="Where the base runs while routers are fitted.")] = "cpu",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the folder.")] = False,
) -> None:
    """Build a mixture from a file: adapters and full models side by side, routers from prompts or labels.

    What `peft-moe inspect` says of the file is printed first; if there is a problem, nothing is loaded.
    """
    from ...mixfile.build import build_mixture
    from ...mixfile.inspection_report import as_table

    console = wide_console()
    report = build_mixture(
        config,
        out,
        device=device,
        overwrite=overwrite,
        before=lambda found: console.print(as_table([found])),
    )
    for name, folder in report.kept.items():
        if name in report.extracted:
            console.print(f"{name}: " + "; ".join(report.extracted[name].summary()), highlight=False)
        else:
            console.print(f"{name}: extracted before, {folder}", highlight=False)
    if report.fit is not None:
        share = report.fit.training_accuracy
        console.print(
            f"router fitted by {report.fit.method} on {report.fit.samples} rows, {share:.0%} of them right"
        )
    console.print(
        f"Kept: {report.out} ({report.seconds:.0f} s). Load it with PeftModel.from_pretrained(base, folder)."
    )
