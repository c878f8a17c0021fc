"""Fixtures of all tests."""

from __future__ import annotations

import pytest
from support.zoo import Zoo


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    """Tiny bases, real adapters and mixtures of them, cached for the session."""
    return Zoo(tmp_path_factory.mktemp("zoo"))
