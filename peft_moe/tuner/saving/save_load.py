"""Saving and loading a mixture so that nothing is half done: the folder, or the model, changes as a whole.

``model.save_pretrained`` and ``PeftModel.from_pretrained`` of PEFT work on mixtures too. These two add what
PEFT cannot: the folder that is replaced stays whole whenever the process dies, what was written is read back,
and a load that fails for whatever reason leaves the base as it was.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ...errors import PeftMoeError
from ...io.atomic import check_new_folder, new_folder
from ...io.json_files import read_json
from ..config.mixture import MoLoraConfig
from .snapshot import untouched_on_failure

_SPARE = 1 << 20  # config, card, headers
# A mixture as PEFT's pickle: whoever trusts it converts it.
_PICKLE = "adapter_model.bin"


def save_mixture(model: PeftModel, folder: str | os.PathLike[str], **arguments: Any) -> None:
    """Save a mixture into ``folder``, as a whole or not at all.

    The folder is written beside its place, read back, brought to the disk, and exchanged with what was there
    in one step. Other files that lie there, such as a tokenizer's, come along.

    Args:
        model: a PeftModel with a mixture; one process saves it.
        folder: a folder of its own: new, empty, or a mixture's.
        arguments: for PEFT's ``save_pretrained``.

    Raises:
        PeftMoeError: the folder cannot be used, the disk is too full, or what was written is not what is in
            memory. What was in the folder is still there then.
    """
    place = check_new_folder(folder, overwrite=True)
    adapters = [a for a, config in model.peft_config.items() if isinstance(config, MoLoraConfig)]
    adapters = [a for a in adapters if a in (arguments.get("selected_adapters") or adapters)]
    if not adapters:
        raise PeftMoeError(f"{type(model).__name__} carries no mixture; make one with get_peft_model()")
    states = {adapter: _state(model, adapter) for adapter in adapters}
    _check_space(place, sum(t.nbytes for state in states.values() for t in state.values()))
    others = _others(place, adapters)
    try:
        with new_folder(place) as beside:
            for path in others:
                shutil.copy2(path, beside / path.name)
            model.save_pretrained(str(beside), **arguments)
            for adapter, state in states.items():
                _read_back(beside if adapter == "default" else beside / adapter, state)
    except (OSError, SafetensorError) as error:
        raise PeftMoeError(
            f"{place} could not be written: {error}; what was there is as it was. Make room, or save "
            "elsewhere"
        ) from error


def load_mixture(model: nn.Module, folder: str | os.PathLike[str], **arguments: Any) -> PeftModel:
    """Load a mixture onto a base, or leave the base as it was.

    Args:
        model: the base.
        folder: of the mixture, or its Hub id.
        arguments: for PEFT's ``from_pretrained``; ``allow_base_mismatch=True`` and ``verify_experts=False``
            are set in the mixture's config first.

    Returns:
        As ``PeftModel.from_pretrained``.

    Raises:
        PeftMoeError: the files are damaged, not of one save, or not a mixture's; or it is another base.
    """
    place = Path(folder) / (arguments.get("subfolder") or "")
    if place.is_dir():
        _check_folder(place)
    ours = {n: arguments.pop(n) for n in ("allow_base_mismatch", "verify_experts") if n in arguments}
    config = arguments.pop("config", None) or MoLoraConfig.from_pretrained(
        os.fspath(folder), **{k: v for k, v in arguments.items() if k in ("subfolder", "revision", "token")}
    )
    for name, value in ours.items():
        setattr(config, name, value)
    with untouched_on_failure(model):
        try:
            return PeftModel.from_pretrained(model, os.fspath(folder), config=config, **arguments)
        except PeftMoeError:
            raise
        except (SafetensorError, RuntimeError, KeyError, OSError) as error:
            first = str(error).strip().splitlines()[:2]
            raise PeftMoeError(
                f"{folder} could not be loaded onto {type(model).__name__}: {' '.join(first)}; load it on "
                "the base that it was made on, or copy the folder again"
            ) from error


def _check_folder(place: Path) -> None:
    if not (place / CONFIG_NAME).is_file():
        raise PeftMoeError(f"no {CONFIG_NAME} in {place}; give the folder that save_mixture() wrote")
    method = read_json(place / CONFIG_NAME).get("peft_type")
    if method != "MOLORA":
        raise PeftMoeError(
            f"{place / CONFIG_NAME} has peft_type={method!r}, and a mixture's is 'MOLORA'; load other "
            "adapters with PeftModel.from_pretrained, or mix them: MoLoraConfig(experts={'name': 'folder'})"
        )
    if not (place / SAFETENSORS_WEIGHTS_NAME).is_file():
        pickle = f", only {_PICKLE}: a pickle can run code" if (place / _PICKLE).is_file() else ""
        raise PeftMoeError(
            f"no {SAFETENSORS_WEIGHTS_NAME} in {place}{pickle}; save the mixture again, as safetensors"
        )


def _state(model: PeftModel, adapter: str) -> dict[str, Tensor]:
    found: dict[str, Any] = get_peft_model_state_dict(model, adapter_name=adapter)
    return {name: tensor for name, tensor in found.items() if isinstance(tensor, Tensor)}


def _check_space(place: Path, wanted: int) -> None:
    parent = next(path for path in (place, *place.parents) if path.is_dir())
    free = shutil.disk_usage(parent).free
    if free < wanted + _SPARE:
        raise PeftMoeError(
            f"{place} needs {wanted + _SPARE:,} bytes, and the disk has {free:,}; make room, or save "
            "elsewhere"
        )


def _others(place: Path, adapters: list[str]) -> list[Path]:
    """What lies in a folder and is not written anew; a card is, from the one that is there."""
    if not place.is_dir():
        return []
    others = [p for p in sorted(place.iterdir()) if p.name not in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME)]
    for path in others:
        if path.is_dir() and path.name not in adapters:
            raise PeftMoeError(
                f"{place} holds the folder {path.name!r}, and would be replaced as a whole; save the mixture "
                "into a folder of its own"
            )
    return [path for path in others if path.is_file()]


def _read_back(folder: Path, state: dict[str, Tensor]) -> None:
    """PEFT leaves tensors out whose names it takes for another adapter's; a disk may lie."""
    path = folder / SAFETENSORS_WEIGHTS_NAME
    with safe_open(str(path), framework="pt", device="cpu") as file:
        names = set(file.keys())
        for name in sorted(names | state.keys()):
            same = name in names and name in state
            if not same or not _same_bytes(file.get_tensor(name), state[name]):
                raise PeftMoeError(
                    f"{path.name} does not hold {name} as it is in memory; what was in the folder is as it "
                    "was. Save again; if it happens again, the disk or the adapter's name is at fault"
                )


def _same_bytes(one: Tensor, other: Tensor) -> bool:
    other = other.detach().cpu().contiguous()
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))
