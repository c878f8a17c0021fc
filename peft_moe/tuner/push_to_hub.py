"""What PEFT's ``push_to_hub`` needs for a mixture: a base that others can load, and its card.

PEFT's method makes the repository first, and puts a blank card over the one that was saved; it offers no hook
for either. For every other method the two functions are PEFT's own.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from typing import Any

from peft import PeftModel

from .config.mixture import MoLoraConfig
from .config.model_card import check_base_on_hub, update_card

_PUSH, _UPLOAD = "push_to_hub", "_upload_modified_files"


def watch_pushes() -> None:
    """Wrap both methods of ``PeftModel``, once."""
    if getattr(PeftModel.push_to_hub, "mixtures", False):
        return
    push, upload = getattr(PeftModel, _PUSH), getattr(PeftModel, _UPLOAD)

    @functools.wraps(push)
    def push_to_hub(self: PeftModel, *args: Any, **kwargs: Any) -> Any:
        for _, config in _mixtures(self):
            if config.base_model_name_or_path is None:
                # As a save would fill it in.
                config.base_model_name_or_path = getattr(self.get_base_model(), "name_or_path", None) or None
            check_base_on_hub(config)
        return push(self, *args, **kwargs)

    @functools.wraps(upload)
    def upload_modified_files(self: PeftModel, working_dir: Any, *args: Any, **kwargs: Any) -> Any:
        for adapter, config in _mixtures(self):
            update_card(working_dir if adapter == "default" else os.path.join(working_dir, adapter), config)
        return upload(self, working_dir, *args, **kwargs)

    push_to_hub.mixtures = True  # type: ignore[attr-defined]
    setattr(PeftModel, _PUSH, push_to_hub)
    setattr(PeftModel, _UPLOAD, upload_modified_files)


def _mixtures(model: PeftModel) -> Iterator[tuple[str, MoLoraConfig]]:
    for adapter, config in model.peft_config.items():
        if isinstance(config, MoLoraConfig):
            yield adapter, config
