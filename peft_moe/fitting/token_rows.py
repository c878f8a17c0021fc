"""Texts to fit on as tokens in a temporary file: of each, memory holds a few numbers."""

from __future__ import annotations

import tempfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import overload


@dataclass
class Row:
    """One text to fit on.

    Attributes:
        ids: its tokens.
        label: the router's column of its expert; X + column for an example of what is not its expert's.
        prompt: how many of its tokens are prompt.
    """

    ids: list[int]
    label: int
    prompt: int


class TokenRows(Sequence[Row]):
    """Rows that are read again and again, in any order, from a file without a name.

    Each costs 24 bytes of memory, whatever its length; its tokens take 4 bytes each on disk, where
    ``tempfile`` puts its files (``TMPDIR``). A list of Python's numbers takes 36 bytes a token.

    Args:
        rows: to begin with.
    """

    def __init__(self, rows: Iterable[Row] = ()) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115  # open as long as the rows live
        self._end = 0
        self._starts, self._labels, self._prompts = array("q"), array("i"), array("i")
        self.lengths = array("i")
        for row in rows:
            self.append(row)

    def append(self, row: Row) -> None:
        """Write one more."""
        # Not at the file's own place: others may have read meanwhile.
        tokens = array("i", row.ids).tobytes()
        self._file.seek(self._end)
        self._file.write(tokens)
        self._starts.append(self._end)
        self.lengths.append(len(row.ids))
        self._labels.append(row.label)
        self._prompts.append(row.prompt)
        self._end += len(tokens)

    @property
    def labels(self) -> Sequence[int]:
        """Of all rows, without reading their tokens."""
        return self._labels

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        """A row with its tokens; of a slice, all of its rows."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        tokens = array("i")
        self._file.seek(self._starts[index])
        tokens.frombytes(self._file.read(self.lengths[index] * tokens.itemsize))
        return Row(tokens.tolist(), self._labels[index], self._prompts[index])

    def __iter__(self) -> Iterator[Row]:
        """In the order in which they came."""
        return (self[index] for index in range(len(self)))

    def __len__(self) -> int:
        return len(self._labels)
