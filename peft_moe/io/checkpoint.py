"""A full model on disk, read one tensor at a time: config, headers, (sharded) safetensors. Never a pickle."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from accelerate import init_empty_weights
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from ..errors import PeftMoeError, shown
from .dtypes import FILE_BYTES
from .sources import CONFIG_FILE, find_source

MODEL_CONFIG = "config.json"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.bin")
_HUB_FILES = ["*.json", "*.safetensors", "tokenizer*", "*.model", "vocab*", "merges.txt"]


class TensorAt(NamedTuple):
    """Where a tensor is, and what its header says."""

    path: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return int(torch.Size(self.shape).numel())

    @property
    def num_bytes(self) -> int:
        """Its size in the file."""
        return self.numel * FILE_BYTES.get(self.dtype, 1)


def model_refusal(location: str, what: str, fix: str) -> PeftMoeError:
    """The two lines of every refusal of a full model.

    Args:
        location: folder or Hub id.
        what: what is wrong, without a final stop.
        fix: what to do, without a final stop.
    """
    return PeftMoeError(f"Model {shown(location)}: {what}.\nFix: {fix}.")


@dataclass(frozen=True)
class Checkpoint:
    """One full model; no weight is in memory.

    Attributes:
        location: as the user named it.
        folder: where its files are.
        config: its ``config.json``.
        tensors: header of every tensor, by the name in the files.
    """

    location: str
    folder: str
    config: dict[str, Any]
    tensors: dict[str, TensorAt]

    @classmethod
    def open(cls, source: str | os.PathLike[str], *, download: bool = True) -> Checkpoint:
        """Find a model and read its config and headers.

        Args:
            source: folder, ``"org/name"`` or ``"org/name@revision"``.
            download: whether a Hub model that is not in the cache may be downloaded.

        Raises:
            PeftMoeError: there is no such model, it is an adapter, has pickles only, lacks a shard, is
                quantised, or its files are damaged.
        """
        location = os.fspath(source)
        folder = _folder(location, download)
        config = _config(location, folder)
        return cls(location, folder, config, _headers(location, folder))

    @contextmanager
    def mapped(self, name: str) -> Iterator[Tensor]:
        """One tensor as it is in its file, which is mapped only within the block: copy what is to stay.

        Raises:
            PeftMoeError: the file changed meanwhile.
        """
        at = self.tensors[name]
        try:
            with safe_open(at.path, framework="pt", device="cpu") as file:
                yield file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            what = f"{shown(at.path)}: tensor {name!r} cannot be read: {error}"
            raise model_refusal(self.location, what, "copy or download it again") from error

    @property
    def name(self) -> str:
        """Its location as PEFT records a base: a Hub id without its revision."""
        return self.location if os.path.isdir(self.location) else self.location.split("@")[0]

    @property
    def num_bytes(self) -> int:
        """Size of its weights on disk."""
        return sum(at.num_bytes for at in self.tensors.values())

    @property
    def dtype(self) -> str:
        """safetensors' word for the dtype that most of its numbers have."""
        sizes: dict[str, int] = {}
        for at in self.tensors.values():
            sizes[at.dtype] = sizes.get(at.dtype, 0) + at.numel
        return max(sizes, key=lambda word: (sizes[word], word))

    def empty_model(self) -> PreTrainedModel:
        """The model of its config without memory for weights: its modules, sizes and ties.

        Raises:
            PeftMoeError: transformers does not know the architecture; code beside a model is never run.
        """
        names = self.config.get("architectures") or []
        kind = getattr(transformers, str(names[0]), None) if names else None
        if not (isinstance(kind, type) and issubclass(kind, PreTrainedModel)):
            what = f"architectures={shown(names)} in {MODEL_CONFIG} is none of transformers' own"
            fix = "name the class that it was saved as, such as ['LlamaForCausalLM']; own code is not run"
            raise model_refusal(self.location, what, fix)
        try:
            with quiet_transformers(), init_empty_weights(include_buffers=False):
                config = AutoConfig.from_pretrained(self.folder, trust_remote_code=False)
                return kind(config).eval()  # type: ignore[no-untyped-call]  # untyped, transformers' and torch's
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            what = f"{MODEL_CONFIG} does not make a {kind.__name__}: {str(error).splitlines()[0]}"
            raise model_refusal(self.location, what, "repair it, or upgrade transformers") from error


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without transformers' remarks and bars while many small things are made."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # untyped, transformers' and torch's
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # untyped, transformers' and torch's
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]  # untyped, transformers' and torch's


def _folder(location: str, download: bool) -> str:
    source = find_source(Path(location).name or location, location)
    if not source.is_hub:
        return source.location
    try:
        return snapshot_download(
            source.location,
            revision=source.revision,
            allow_patterns=_HUB_FILES,
            local_files_only=not download,
        )
    # The client lets errors of its transport through: any of them means no model.
    except Exception as error:
        first_line = str(error).split("\n")[0]
        what = f"no folder of that name, and the Hub says: {first_line}"
        fix = f"correct the path or Hub id, log in with `hf auth login`, or run: hf download {location}"
        raise model_refusal(location, what, fix) from error


def _config(location: str, folder: str) -> dict[str, Any]:
    path = Path(folder) / MODEL_CONFIG
    if not path.is_file():
        if (Path(folder) / CONFIG_FILE).is_file():
            what = f"it holds {CONFIG_FILE}, not {MODEL_CONFIG}: it is an adapter already"
            raise model_refusal(location, what, "use it as an expert as it is")
        raise model_refusal(location, f"no {MODEL_CONFIG}", "give the folder that save_pretrained() wrote")
    config = _json(location, path)
    if config.get("quantization_config"):
        method = config["quantization_config"]
        method = method.get("quant_method") if isinstance(method, dict) else method
        what = f"quantization_config says {shown(method)}: packed weights have no difference"
        raise model_refusal(location, what, "give the model in 16 or 32 bits")
    return config


def _json(location: str, path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        what = f"{path.name} cannot be read as JSON: {error}"
        raise model_refusal(location, what, "copy or download it again") from error
    if not isinstance(found, dict):
        raise model_refusal(location, f"{path.name} holds no JSON object", "copy or download it again")
    return found


def _headers(location: str, folder: str) -> dict[str, TensorAt]:
    place = Path(folder)
    if (place / INDEX).is_file():
        wanted = _json(location, place / INDEX).get("weight_map")
        if not isinstance(wanted, dict) or not all(isinstance(v, str) for v in wanted.values()):
            raise model_refusal(location, f"{INDEX} has no weight_map", "copy or download it again")
        shards = sorted(set(wanted.values()))
    elif (place / SINGLE).is_file():
        wanted, shards = None, [SINGLE]
    else:
        raise _no_weights(location, place)
    found: dict[str, TensorAt] = {}
    for shard in shards:
        if Path(shard).name != shard or not (place / shard).is_file():
            what = f"{INDEX} names {shown(shard)}, which is not there"
            raise model_refusal(location, what, "copy or download it again")
        found.update(_header(location, place / shard))
    missing = sorted(set(wanted or ()) - set(found))
    if missing:
        what = f"{INDEX} names {missing[0]!r}{_more(missing)}, which no shard holds"
        raise model_refusal(location, what, "copy or download it again")
    return found


def _header(location: str, path: Path) -> dict[str, TensorAt]:
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118  (not a dict)
            return {
                key: TensorAt(str(path), part.get_dtype(), tuple(part.get_shape()))
                for key, part in slices.items()
            }
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        what = f"{path.name} is not a sound safetensors file: {error}"
        raise model_refusal(location, what, "copy or download it again; it may be truncated") from error


def _no_weights(location: str, place: Path) -> PeftMoeError:
    pickles = [name for name in PICKLES if (place / name).is_file()]
    if not pickles:
        what = f"neither {SINGLE} nor {INDEX}"
        return model_refusal(location, what, "give the folder that save_pretrained() wrote")
    what = f"only {pickles[0]}: a pickle can run code, so it is not opened"
    fix = "convert it where you trust it: from_pretrained(folder), then save_pretrained(folder)"
    return model_refusal(location, what, fix)


def _more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""
