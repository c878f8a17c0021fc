"""Checks of a saved mixture's two files before any model is touched: both are intact and fit together."""

from __future__ import annotations

import os
import re
from pathlib import Path

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

from ...errors import PeftMoeError
from ...experts.spec import ExpertSpec

_FACTOR = re.compile(r"base_model\.model\.(?P<module>.+)\.molora_(?P<side>[AB])\.weight")


def check_weights_file(
    folder: str | os.PathLike[str], specs: list[ExpertSpec], *, all_everywhere: bool = True
) -> None:
    """Compare the header of a mixture's weights with its experts; a folder without weights passes.

    Args:
        folder: folder of the mixture.
        specs: the mixture's experts.
        all_everywhere: whether every layer has all experts.

    Raises:
        PeftMoeError: the file is damaged, or does not belong to these experts.
    """
    path = Path(folder) / SAFETENSORS_WEIGHTS_NAME
    if not path.is_file():
        return
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            rows = {key: file.get_slice(key).get_shape()[:1] for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise PeftMoeError(
            f"{path} is not a sound safetensors file: {error}; copy the folder again, it may be truncated"
        ) from error
    for key, shape in rows.items():
        factor = _FACTOR.fullmatch(key)
        if factor is None:
            continue
        ranks = sum(spec.rank_in(factor["module"]) for spec in specs)
        if not shape or shape[0] > ranks or (all_everywhere and shape[0] < ranks):
            raise PeftMoeError(
                f"{path}: {key} has {list(shape)} rows, and the experts in {CONFIG_NAME} have {ranks} ranks "
                "there; weights and config are not from one save: copy the folder again"
            )
