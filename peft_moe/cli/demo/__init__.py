"""The embedded demo: a small base model, LoRA experts for it, and questions with checkable answers."""

from __future__ import annotations

from pathlib import Path

BASE_NAME = "peft-moe-demo-base"
"""Name of the base's folder, and of the base in the experts' configs.

An adapter is matched with its base by the last part of the base's name or path."""


def asset_path(name: str) -> Path:
    """Return the folder of an asset: `BASE_NAME`, ``experts`` or ``experts/<skill>``.

    Raises:
        FileNotFoundError: the installation lacks the asset.
    """
    path = Path(__file__).parent / "assets" / name
    if not path.exists():
        raise FileNotFoundError(
            f"The demo has no asset {name!r} at {path}; "
            "build the assets with `python recipes/demo/build_assets.py`."
        )
    return path
