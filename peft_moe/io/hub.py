"""Names on the Hub, and the cards of other people's models."""

from __future__ import annotations

import os
import re
from pathlib import Path

from huggingface_hub import ModelCard

CARD_FILE = "README.md"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", re.ASCII)


def is_on_hub(name: str | None) -> bool:
    """Whether a base's name can be a Hub id, and is not a folder on this machine."""
    if not name or not _HUB_ID.fullmatch(name):
        return False
    return not os.path.isdir(os.path.expanduser(name))


def license_of(card: str | os.PathLike[str] | None) -> str | None:
    """Return the licence in the metadata of a card; None without a card or without a licence.

    Args:
        card: path of a README.md.
    """
    if card is None or not os.path.isfile(card):
        return None
    try:
        data = ModelCard.load(Path(card), ignore_metadata_errors=True).data
    # A card may hold anything. A broken one must not stop a mixture from being made.
    except Exception:
        return None
    licence = data.license_name if data.license == "other" and data.get("license_name") else data.license
    licence = ", ".join(map(str, licence)) if isinstance(licence, list) else licence
    return str(licence) if licence else None
