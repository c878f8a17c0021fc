"""The pages name paths that exist, in the order of the layering; ARCHITECTURE.md stays one page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from .test_layering import ORDER

REPO = Path(__file__).parents[2]
ARCHITECTURE = REPO / "ARCHITECTURE.md"
DECISIONS = REPO / "docs" / "decisions"
PAGES = [ARCHITECTURE, *sorted(DECISIONS.glob("*.md"))]
MAX_LINES = 120
# The roots from which pages name paths. ARCHITECTURE.md names the package's files without "peft_moe/".
ROOTS = (REPO, REPO / "peft_moe")


def folders_of(page: str) -> list[str]:
    """Names in the tree of peft_moe/, in the page's order."""
    tree = page.split("    peft_moe/\n", 1)[1].split("\n\n", 1)[0]
    return [line.split()[0].removesuffix("/").removesuffix(".py") for line in tree.splitlines()]


def paths_of(page: str) -> list[str]:
    """Paths in code quotes with a slash, as `io/atomic.py`, and targets of links within the repository."""
    quoted = re.findall(r"`([\w.-]+/[\w./-]*)`", page)
    linked = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page)
    return [*quoted, *linked]


def missing_paths(page: Path) -> list[str]:
    roots = (*ROOTS, page.parent)
    return [path for path in paths_of(page.read_text()) if not any((root / path).exists() for root in roots)]


def test_the_tree_is_the_order_of_the_layering():
    assert tuple(folders_of(ARCHITECTURE.read_text())) == ORDER


def test_architecture_is_one_page():
    assert len(ARCHITECTURE.read_text().splitlines()) <= MAX_LINES


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_path_exists(page):
    assert missing_paths(page) == [], f"{page.name} names files that moved or do not exist; name the new ones"


def test_every_page_of_decisions_is_in_the_index_and_belongs_to_a_folder():
    index = (DECISIONS / "README.md").read_text()
    names = {path.stem for path in DECISIONS.glob("*.md")} - {"README"}
    assert {name for name in names if f"({name}.md)" not in index} == set()
    assert names - set(ORDER) == {"tests"}


def test_the_check_sees_a_missing_path(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("`io/nowhere.py`, `io/atomic.py`, [a](gone.md), [b](https://example.org/x)")
    assert missing_paths(page) == ["io/nowhere.py", "gone.md"]
