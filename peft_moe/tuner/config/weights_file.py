"""A saved mixture's two files: whether they are sound and belong together, before a model is touched."""

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
    """Hold the header of a mixture's weights against its experts; a folder without weights passes.

    Args:
        folder: of the mixture.
        specs: its experts.
        all_everywhere: no layer has fewer experts than others.

    Raises:
        PeftMoeError: the file is damaged, or is not that of these experts.
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
        found = _FACTOR.fullmatch(key)
        wanted = sum(spec.rank_in(found["module"]) for spec in specs) if found else None
        if wanted is not None and (not shape or shape[0] > wanted or (all_everywhere and shape[0] < wanted)):
            raise PeftMoeError(
                f"{path}: {key} has {list(shape)} rows, and the experts in {CONFIG_NAME} have {wanted} ranks "
                "there; weights and config are not of one save: copy the folder again"
            )
