"""What a mixture's experts are, from configs and headers alone."""

from __future__ import annotations

import torch
from safetensors import safe_open

from ..experts.adapter import spec_of
from ..experts.config_rules import check_config
from ..experts.spec import ExpertSpec
from ..io.dtypes import FILE_DTYPES
from ..io.sources import CONFIG_FILE, WEIGHTS_FILE, find_source, read_config
from ..tuner.config.mixture import MoLoraConfig


def expert_specs(config: MoLoraConfig) -> tuple[list[ExpertSpec], torch.dtype | None]:
    """The experts of a config, and the widest type that their files hold; None without files.

    Raises:
        PeftMoeError: an adapter that is not there, or that cannot be mixed.
    """
    sources = config.sources()
    if not sources:
        return config.specs(), None
    specs, dtype = [], None
    for name, place in sources.items():
        source = find_source(name, place)
        found = read_config(name, source.file(CONFIG_FILE))
        check_config(name, found)
        specs.append(spec_of(source, found))
        with safe_open(source.file(WEIGHTS_FILE), framework="pt") as file:
            for key in file.keys():  # noqa: SIM118  (not a dict)
                stored = FILE_DTYPES.get(file.get_slice(key).get_dtype(), torch.float32)
                dtype = stored if dtype is None else torch.promote_types(dtype, stored)
    return specs, dtype
