"""The embedded demo: a small base model, LoRA experts on it, and questions to ask them."""

from __future__ import annotations

from pathlib import Path

BASE_NAME = "peft-moe-demo-base"
"""What the experts' configs call their base model; the folder has that name.

An adapter is matched with its base by the last part of the base's name or path."""


def asset_path(name: str) -> Path:
    """The folder of an asset: `BASE_NAME`, ``experts`` or ``experts/<skill>``.

    Raises FileNotFoundError when the installation lacks it.
    """
    path = Path(__file__).parent / "assets" / name
    if not path.exists():
        raise FileNotFoundError(
            f"The demo has no asset {name!r} at {path}; "
            "build the assets with `python recipes/demo/build_assets.py`."
        )
    return path
