"""``peft-moe mix``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..console import wide_console


def mix(
    config: Annotated[
        Path, typer.Argument(help="YAML file that describes the mixture; mergekit-moe's format works too.")
    ],
    out: Annotated[Path, typer.Option(help="Folder to write the mixture to.")],
    device: Annotated[str, typer.Option(help="Device that runs the base while routers are fitted.")] = "cpu",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the folder.")] = False,
) -> None:
    """Build a mixture from a YAML file of adapters and full models, and fit its router.

    The report of `peft-moe inspect` is printed before anything is loaded; if it names a problem, nothing is.
    """
    from ...mixfile.build import build_mixture
    from ...mixfile.inspection_report import as_table

    console = wide_console()
    report = build_mixture(
        config,
        out,
        device=device,
        overwrite=overwrite,
        before=lambda inspection: console.print(as_table([inspection])),
    )
    for name, folder in report.kept.items():
        if name in report.extracted:
            console.print(f"{name}: " + "; ".join(report.extracted[name].summary()))
        else:
            console.print(f"{name}: extracted earlier, {folder}")
    if report.fit is not None:
        console.print(
            f"The router was fitted by {report.fit.method} on {report.fit.samples} samples; it is right on "
            f"{report.fit.training_accuracy:.0%} of them."
        )
    console.print(
        f"Saved: {report.out} ({report.seconds:.0f} s). Load it with PeftModel.from_pretrained(base, folder)."
    )
