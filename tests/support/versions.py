"""What the installed versions of PEFT and transformers do together."""

from __future__ import annotations

import importlib.metadata

import pytest
from packaging.version import Version
from transformers.integrations import peft as integration

_WANTED = integration.MIN_PEFT_VERSION
_INSTALLED = importlib.metadata.version("peft")

# transformers 5.24 wants a PEFT that was not released when it was.
transformers_own_loading = pytest.mark.skipif(
    Version(_INSTALLED) < Version(_WANTED),
    reason=f"transformers' own adapters want peft >= {_WANTED}, installed is {_INSTALLED}",
)
