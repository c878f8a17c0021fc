"""PEFT's own tests, of exactly the installed version, pass with a mixture in the place of PEFT's methods."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from peft_contract.fetch import suite
from peft_contract.run import EXPERTS, recorded, run


@pytest.mark.parametrize("experts", EXPERTS)
def test_peft_own_tests(experts: str, tmp_path: Path) -> None:
    if not suite().exists():
        message = (
            f"{suite()} is missing; `python tests/peft_contract/fetch.py` fetches it, as `make test` does"
        )
        (pytest.fail if os.environ.get("PEFT_CONTRACT") == "required" else pytest.skip)(message)
    results = run(experts, tmp_path)
    assert results.failed == [], results.log
    # Neither a pass that is lost nor one that nobody wrote down: `python tests/peft_contract/run.py` does.
    assert results.passed == recorded()[experts], results.log
