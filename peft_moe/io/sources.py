"""Where an expert's two files are: a local folder or a Hub repository. Pickles are never opened."""

from __future__ import annotations

import difflib
import json
import os
import re
from dataclasses import dataclass
from typing import Any

from huggingface_hub import constants, errors, hf_hub_download

from ..errors import PeftMoeError, refusal, shown
from .json_files import unique_keys

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"

_HUB_ID = re.compile(r"(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)(?:@(?P<revision>[\w./-]+))?", re.ASCII)
# The first class that fits counts: a gated repository is reported as one that does not exist.
_HUB_REFUSALS = (
    (errors.GatedRepoError, "it is gated", "accept its terms and log in with `hf auth login`"),
    (errors.RevisionNotFoundError, "no such revision", "name an existing branch, tag or commit"),
    (
        errors.RepositoryNotFoundError,
        "no such repository, and no such folder here",
        "correct the path or Hub id; for a private repository log in with `hf auth login`",
    ),
    (errors.RemoteEntryNotFoundError, "no such file", "give the id of a PEFT adapter"),
)


@dataclass(frozen=True)
class Source:
    """One adapter: a local folder, or a Hub repository at the revision that was asked for."""

    expert: str
    location: str
    is_hub: bool = False
    revision: str | None = None

    def file(self, filename: str) -> str:
        """Local path of ``filename``, downloaded first if the adapter is on the Hub.

        Raises:
            PeftMoeError: if there is no such file, naming what is there instead.
        """
        if self.is_hub:
            return self._download(filename)
        path = os.path.join(self.location, filename)
        if os.path.isfile(path):
            return path
        what = f"no {filename} in {shown(self.location)}"
        if filename == WEIGHTS_FILE and os.path.isfile(os.path.join(self.location, PICKLE_FILE)):
            raise self._pickle_only(what)
        raise refusal(self.expert, what, "give the folder that save_pretrained() wrote")

    def optional(self, filename: str) -> str | None:
        """Local path of a file that an adapter may lack; None where it does, or the Hub does not answer."""
        if not self.is_hub:
            path = os.path.join(self.location, filename)
            return path if os.path.isfile(path) else None
        try:
            return hf_hub_download(self.location, filename, revision=self.revision)
        except Exception:  # as in _download: any error of its transport
            return None

    def _pickle_only(self, what: str) -> PeftMoeError:
        what += f", only {PICKLE_FILE}: a pickle can run code, so it is not opened"
        fix = (
            "convert it where you trust it: PeftModel.from_pretrained(base, folder), then"
            " .save_pretrained(folder), which writes safetensors"
        )
        return refusal(self.expert, what, fix)

    def _download(self, filename: str) -> str:
        at = f" at revision {shown(self.revision)}" if self.revision else ""
        what = f"cannot get {filename} of {shown(self.location)}{at} from the Hub"
        try:
            return hf_hub_download(self.location, filename, revision=self.revision)
        # The client lets errors of its transport through: any of them means no expert.
        except Exception as error:
            if filename == WEIGHTS_FILE and isinstance(error, errors.RemoteEntryNotFoundError):
                raise self._pickle_only(f"{what}: no such file") from error
            if constants.HF_HUB_OFFLINE:
                why = "HF_HUB_OFFLINE=1 is set, it is not cached, and no folder has this path"
                fix = "unset HF_HUB_OFFLINE, or give a local folder"
            else:
                known = (words for kind, *words in _HUB_REFUSALS if isinstance(error, kind))
                first_line = str(error).split("\n")[0]
                why, fix = next(known, (first_line, "try again, or give a local folder"))
            raise refusal(self.expert, f"{what}: {why}", fix) from error


def find_source(expert: str, source: str | os.PathLike[str]) -> Source:
    """Decide whether ``source`` is a folder here or a Hub id; nothing is downloaded.

    Args:
        expert: the expert's name.
        source: folder, ``"org/name"`` or ``"org/name@revision"``.

    Raises:
        PeftMoeError: if it is neither.
    """
    if not isinstance(source, (str, os.PathLike)):
        what = f"the path is {shown(source)}, a {type(source).__name__}"
        raise refusal(expert, what, "give a folder or a Hub id as a string")
    text = os.fspath(source)
    folder = os.path.expanduser(text)
    if os.path.isdir(folder):
        return Source(expert, folder)
    if os.path.isfile(folder):
        raise refusal(expert, f"{shown(text)} is a file", "give the adapter's folder")
    hub = _HUB_ID.fullmatch(text)
    # A misspelt "adapters/mth" must not be fetched from whoever owns that name on the Hub.
    if hub and (hub["revision"] or not os.path.isdir(text.split("/")[0])):
        return Source(expert, hub["repo"], is_hub=True, revision=hub["revision"])
    parent, name = os.path.split(os.path.normpath(folder))
    siblings = sorted(os.listdir(parent or ".")) if os.path.isdir(parent or ".") else []
    close = difflib.get_close_matches(name, siblings, n=2)
    hint = f"; near it: {', '.join(map(shown, close))}" if close else ""
    fix = "correct the path; a Hub id is written 'org/name' or 'org/name@revision'"
    raise refusal(expert, f"there is no folder {shown(text)}{hint}", fix)


def read_config(expert: str, path: str) -> dict[str, Any]:
    """Parse ``adapter_config.json`` strictly.

    Raises:
        PeftMoeError: not UTF-8, not JSON, not an object, or a key that appears twice.
    """
    fix = "save the adapter with PEFT again, or repair the file"
    try:
        with open(path, encoding="utf-8") as file:
            config = json.load(file, object_pairs_hook=unique_keys)
    except (OSError, ValueError, RecursionError) as error:
        raise refusal(expert, f"{shown(path)} cannot be read as JSON: {error}", fix) from error
    if not isinstance(config, dict):
        raise refusal(expert, f"{shown(path)} holds a {type(config).__name__}, not a JSON object", fix)
    return config
