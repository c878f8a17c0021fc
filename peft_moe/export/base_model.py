"""A mixture on its base, loaded as transformers loads it, and what lies beside a base."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from transformers import AutoTokenizer

from ..errors import PeftMoeError
from ..io.checkpoint import MODEL_CONFIG, Checkpoint, quiet_transformers
from ..io.hub import is_on_hub
from ..io.sources import find_source
from .mixture_tensors import Mixture
from .report import ExportReport

# What makes text of a model's numbers.
_BESIDE = ("token", "vocab.", "merges.txt", "spiece", "chat_template", "processor_config", "preprocessor")


def load_on_base(
    mixture: Mixture, base: str | None, dtype: torch.dtype | None, report: ExportReport
) -> tuple[PeftModel, str]:
    """The mixture of a folder on its base, in eval mode, and the folder of the base.

    Args:
        mixture: from a folder.
        base: folder or Hub id.
        dtype: of the base's weights; None takes that of its files.
        report: gets a note where the mixture was made on a quantised base.

    Raises:
        PeftMoeError: no base, a quantised one, or one that transformers does not know.
    """
    if base is None:
        raise PeftMoeError(f"{mixture.label} does not name its base; give its folder or Hub id as `base`")
    checkpoint = Checkpoint.open(base)
    checkpoint.empty_model()  # the architecture is known, before gigabytes load
    kind: Any = getattr(transformers, str(checkpoint.config["architectures"][0]))
    made_on = mixture.config.base_precision
    if made_on not in (None, "full"):
        report.notes.append(
            f"The mixture was made on a base in {made_on}; here it stands on {base} in full precision, whose "
            "hidden states differ a little: measure before you rely on it."
        )
    with quiet_transformers(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="this mixture was made on a base")
        model = kind.from_pretrained(
            checkpoint.folder, dtype="auto" if dtype is None else dtype, trust_remote_code=False
        )
        return PeftModel.from_pretrained(model, str(mixture.folder)).eval(), checkpoint.folder


def find_tokenizer(places: Sequence[Any], instead: str) -> Any:
    """The tokenizer of the first of these places that has one.

    Args:
        places: folders or Hub ids, of the mixture and of its base; empty ones are passed over.
        instead: what else the user can give, for the message.

    Raises:
        PeftMoeError: none has one.
    """
    for place in places:
        if place and (Path(place, "tokenizer_config.json").is_file() or is_on_hub(str(place))):
            return AutoTokenizer.from_pretrained(place, trust_remote_code=False)
    raise PeftMoeError(
        f"neither the mixture nor its base has a tokenizer; save it in one of the two folders, or {instead}"
    )


def packed_files(base: str | None) -> str | None:
    """What says that the weights of a base are quantised on disk; nothing else of it is read."""
    path = find_source("base", base).optional(MODEL_CONFIG) if base is not None else None
    if path is None:
        return None
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError:
        return None  # whoever opens it for good says so
    packed = isinstance(config, dict) and config.get("quantization_config")
    return f"{base} is quantised (quantization_config in {MODEL_CONFIG})" if packed else None


def take_along(source: str | os.PathLike[str] | None, folder: Path, *, text_only: bool = False) -> None:
    """Copy tokenizer, processors and, unless ``text_only``, the generation config of a model."""
    place = Path(source) if source else None
    if place is None or not place.is_dir():
        return
    for path in sorted(place.iterdir()):
        wanted = any(mark in path.name for mark in _BESIDE) or path.suffix == ".model"
        if path.is_file() and wanted:
            shutil.copyfile(path, folder / path.name)
    generation = place / "generation_config.json"
    if generation.is_file() and not text_only:
        shutil.copyfile(generation, folder / generation.name)
