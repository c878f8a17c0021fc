"""The embedded demo: a small base model, LoRA experts on it, and questions to ask them."""

from __future__ import annotations

from pathlib import Path

BASE_NAME = "peft-moe-demo-base"
"""What the experts' configs call their base model; its files are ``asset_path("base")``."""


def asset_path(name: str) -> Path:
    """The folder of an asset: ``base``, ``experts`` or ``experts/<skill>``.

    Raises FileNotFoundError when the installation lacks it.
    """
    path = Path(__file__).parent / "assets" / name
    if not path.exists():
        raise FileNotFoundError(
            f"The demo has no asset {name!r} at {path}; "
            "build the assets with `python recipes/demo/build_assets.py`."
        )
    return path
