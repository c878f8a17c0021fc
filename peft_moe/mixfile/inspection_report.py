"""What an inspection finds, as a tree: facts, notes, problems; as JSON and as a table."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table
from rich.text import Text

MIB = 2**20


@dataclass
class Inspection:
    """One thing that was looked at; only configs and headers were read.

    Attributes:
        kind: "adapter", "model", "mixture", "mix file", or "unknown".
        name: of the expert, or the path.
        location: folder or Hub id.
        facts: what is known, by words that JSON keeps.
        notes: what will happen that one might not expect.
        problems: what would be refused, with the fix.
        parts: a mix file's base and experts.
    """

    kind: str
    name: str
    location: str
    facts: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    parts: list[Inspection] = field(default_factory=list)

    @property
    def all_problems(self) -> list[str]:
        """Its own and its parts'."""
        return [*self.problems, *(problem for part in self.parts for problem in part.all_problems)]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "kind": self.kind,
            "name": self.name,
            "location": self.location,
            "ok": not self.all_problems,
            **{key: getattr(self, key) for key in ("facts", "notes", "problems")},
            "parts": [part.to_dict() for part in self.parts],
        }


def as_table(found: list[Inspection]) -> Table:
    """A row for each fact, note and problem."""
    table = Table(header_style="bold", title="before any weight loads")
    for heading in ("what", "", "", ""):
        table.add_column(heading, overflow="fold")
    for one in found:
        for number, (word, value, style) in enumerate(_lines(one)):
            head = (one.kind, one.name) if number == 0 else ("", "")
            table.add_row(*head, Text(word, style), Text(value, style))
        table.add_section()
        for part in one.parts:
            for number, (word, value, style) in enumerate(_lines(part)):
                head = (f"· {part.kind}", part.name) if number == 0 else ("", "")
                table.add_row(*head, Text(word, style), Text(value, style))
            table.add_section()
    return table


def _lines(one: Inspection) -> Iterator[tuple[str, str, str]]:
    yield "location", one.location, ""
    for word, value in one.facts.items():
        yield word, _said(word, value), ""
    for note in one.notes:
        yield "note", note, "yellow"
    for problem in one.problems:
        yield "problem", problem, "red"


def _said(word: str, value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_said(word, inner)}" for key, inner in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if word.startswith(("bytes", "memory")):
        return f"{value / MIB:,.1f} MiB"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
