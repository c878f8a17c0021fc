"""Trained LoRA adapters: verified as a whole, then read tensor by tensor.

``open_experts`` looks at all configs, then at all headers, then at all values, and raises before
anything is built: a mixture is either made of sound experts or not begun. Tensors stay on disk until
``ExpertFile.read`` asks for the two of one module. They are read, not mapped: pages of a mapping would stay
in memory beside what was copied out of them, for every adapter its whole size.
"""

from __future__ import annotations

import difflib
import json
import os
import warnings
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..errors import PeftMoeError, refusal, shown
from ..io.adapter_files import tensor_key
from ..io.digests import file_sha256
from ..io.dtypes import FILE_DTYPES
from ..io.hub import CARD_FILE, license_of
from ..io.sources import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    Source,
    find_source,
    read_config,
)
from .base_modules import BaseView
from .checks import (
    check_expert_names,
    check_one_base,
    check_same_base,
)
from .config_rules import check_config
from .spec import ExpertSpec
from .tensor_checks import TensorHeader, check_header


class ExpertFile:
    """One adapter, verified and open; its tensors are read on demand.

    The file stays open until :meth:`close`, so that what is read is what was verified even if a
    new file is renamed over it.

    Attributes:
        spec: name, ranks, scales and targets.
        modules: names of the base's modules that it adapts, sorted.
        path: the ``adapter_model.safetensors`` behind it.
    """

    def __init__(self, spec: ExpertSpec, path: str) -> None:
        """Open ``path``; nothing but the header is read.

        Raises:
            PeftMoeError: if the file is no sound safetensors file.
        """
        self.spec = spec
        self.path = path
        self.modules: tuple[str, ...] = ()
        try:
            # Whether the header is sound, safetensors knows.
            with safe_open(path, framework="pt", device="cpu") as file:
                slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118  (not a dict)
                self._header = {
                    k: TensorHeader(part.get_dtype(), tuple(part.get_shape())) for k, part in slices.items()
                }
            self._file = Path(path).open("rb")  # noqa: SIM115  # until close()
            size = int.from_bytes(self._file.read(8), "little")
            offsets = {
                k: v["data_offsets"] for k, v in json.loads(self._file.read(size)).items() if k in slices
            }
            self._places = {key: (8 + size + start, end - start) for key, (start, end) in offsets.items()}
        except (SafetensorError, OSError, ValueError, RuntimeError) as error:
            what = f"{shown(path)} is not a sound safetensors file: {error}"
            raise refusal(spec.name, what, "copy or download it again; it may be truncated") from error

    def read(self, module_name: str) -> tuple[Tensor, Tensor]:
        """The expert's two matrices at one module, bit for bit as in the file.

        Args:
            module_name: one of ``modules``.

        Returns:
            A [r, I] and B [O, r], in the file's dtype.

        Raises:
            PeftMoeError: if the expert does not adapt this module.
        """
        if module_name not in self.modules:
            near = difflib.get_close_matches(module_name, self.modules, n=1) or self.modules[:1]
            what = f"it does not adapt {shown(module_name)}; it does adapt {near[0]!r}"
            raise refusal(self.spec.name, what, "ask for a name in `modules`")
        return self._tensor(tensor_key(module_name, "A")), self._tensor(tensor_key(module_name, "B"))

    def dtype(self, module_name: str) -> torch.dtype:
        """The wider dtype of the expert's two matrices at one of ``modules``."""
        one, other = (FILE_DTYPES[self._header[tensor_key(module_name, side)].dtype] for side in "AB")
        return torch.promote_types(one, other)

    def close(self) -> None:
        """Close the file; tensors already read stay valid."""
        self._file.close()

    def __repr__(self) -> str:
        return f"ExpertFile({self.spec.name!r}, {self.path!r}, {len(self.modules)} modules)"

    def check_header(self, base: BaseView) -> None:
        """Hold keys, dtypes, shapes and ranks against config and base, and fill ``modules``."""
        self.modules = check_header(self.spec, self._header, base)

    def dtypes(self) -> set[torch.dtype]:
        """Of all its tensors."""
        return {t.dtype for module in self.modules for t in self.read(module)}

    def check_values(self) -> None:
        """Refuse NaN and infinity, which attention kernels can swallow without a trace."""
        for module in self.modules:
            for side in "AB":
                tensor = self._tensor(key := tensor_key(module, side))
                finite = torch.isfinite(tensor)
                if not finite.all():
                    at = (~finite).nonzero()[0].tolist()
                    value = tensor[tuple(at)].item()
                    what = f"tensor {key!r} in {WEIGHTS_FILE} is {value} at index {at}"
                    raise refusal(self.spec.name, what, "retrain, or use an earlier checkpoint")

    def _tensor(self, key: str) -> Tensor:
        header, (start, size) = self._header[key], self._places[key]
        data = bytearray(size)
        try:
            self._file.seek(start)
            read = self._file.readinto(data)
        except (OSError, ValueError) as error:
            what = f"{shown(self.path)}: tensor {key!r} cannot be read: {error}"
            raise refusal(self.spec.name, what, "copy or download it again") from error
        if read != size:
            what = f"{shown(self.path)}: tensor {key!r} cannot be read: the file ends before it"
            raise refusal(self.spec.name, what, "copy or download it again")
        return torch.frombuffer(data, dtype=FILE_DTYPES[header.dtype]).view(header.shape)


def open_experts(
    experts: Mapping[str, str | os.PathLike[str]],
    base: nn.Module,
    *,
    allow_base_mismatch: bool = False,
) -> list[ExpertFile]:
    """Open trained PEFT LoRA adapters, after verifying every one of them.

    Args:
        experts: adapter folder or Hub id (``"org/name"``, ``"org/name@revision"``) by expert name.
        base: the base model, bare or with other adapters injected. It is looked at, never changed.
        allow_base_mismatch: accept experts that name another base, revision or architecture; shapes
            and module names must fit all the same.

    Returns:
        One open file per expert, in the order given.

    Raises:
        PeftMoeError: for the first problem; no file is left open.
    """
    if not isinstance(experts, Mapping) or not experts:
        raise PeftMoeError(
            f"experts={shown(experts)} must map one or more names to adapter folders or Hub ids.\n"
            "Fix: pass for example experts={'math': 'adapters/math'}."
        )
    view = BaseView.of(base)
    check_expert_names(experts, base)
    sources = [find_source(name, source) for name, source in experts.items()]
    configs = _checked_configs(sources, view, allow_base_mismatch)
    with ExitStack() as opened:
        files = []
        for source in sources:
            file = ExpertFile(spec_of(source, configs[source.expert]), source.file(WEIGHTS_FILE))
            opened.callback(file.close)
            files.append(file)
        for file in files:
            file.check_header(view)
        for file in files:
            file.check_values()
            file.spec.sha256 = file_sha256(file.path)
        for file, source in zip(files, sources, strict=True):
            file.spec.license = license_of(source.optional(CARD_FILE))
        _note_dtypes(files)
        warn_of_twins([file.spec for file in files])
        opened.pop_all()  # all is well: the caller closes them
    return files


def _note_dtypes(files: list[ExpertFile]) -> None:
    """Experts of several dtypes are kept in the widest; each then remembers its own, to be given back in."""
    own = [file.dtypes() for file in files]
    for file, dtypes in zip(files, own, strict=True):
        if len(dtypes) == 1 and len(set().union(*own)) > 1:
            file.spec.dtype = str(next(iter(dtypes))).removeprefix("torch.")


def _checked_configs(
    sources: list[Source], base: BaseView, allow_base_mismatch: bool
) -> dict[str, dict[str, Any]]:
    configs = {}
    for source in sources:
        config = read_config(source.expert, source.file(CONFIG_FILE))
        check_config(source.expert, config)
        configs[source.expert] = config
    if not allow_base_mismatch:
        for expert, config in configs.items():
            check_same_base(expert, config, base)
        check_one_base(configs)
    return configs


def spec_of(source: Source, config: Mapping[str, Any]) -> ExpertSpec:
    """A spec in a fixed order: PEFT writes sets, whose order changes from run to run."""
    lists: dict[str, Any] = {}
    for field in ("target_modules", "exclude_modules", "layers_to_transform"):
        value = config.get(field)
        lists[field] = sorted(set(value)) if isinstance(value, list) else value
    return ExpertSpec(
        name=source.expert,
        source=source.location,
        revision=source.revision,
        base_model=config.get("base_model_name_or_path") or None,
        r=config["r"],
        lora_alpha=config["lora_alpha"],
        use_rslora=bool(config.get("use_rslora")),
        rank_pattern=dict(config.get("rank_pattern") or {}),
        alpha_pattern=dict(config.get("alpha_pattern") or {}),
        layers_pattern=config.get("layers_pattern"),
        fan_in_fan_out=bool(config.get("fan_in_fan_out")),
        **lists,
    )


def warn_of_twins(specs: Iterable[ExpertSpec]) -> None:
    """Say so if two experts were read from the same bytes."""
    first: dict[str, str] = {}
    for spec in specs:
        twin = first.setdefault(spec.sha256, spec.name) if spec.sha256 else spec.name
        if twin != spec.name:
            text = f"experts {twin!r} and {spec.name!r} have the same {WEIGHTS_FILE}"
            warnings.warn(f"{text}: a router cannot tell them apart.", stacklevel=3)
