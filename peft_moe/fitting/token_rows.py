"""Texts to fit on as tokens in a temporary file: of each, memory holds a few numbers."""

from __future__ import annotations

import tempfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import overload


@dataclass
class Row:
    """One tokenised text to fit on.

    Attributes:
        ids: token ids.
        label: router column of the text's expert; X + column for a negative example of that expert.
        prompt: number of prompt tokens, which come first.
    """

    ids: list[int]
    label: int
    prompt: int


class TokenRows(Sequence[Row]):
    """A sequence of rows whose tokens are in an anonymous temporary file.

    A row costs 24 bytes of memory, whatever its length. Its tokens take 4 bytes each on disk, in the folder
    of ``tempfile`` (``TMPDIR``). A list of Python's numbers would take 36 bytes per token.

    Args:
        rows: rows to append at once.
    """

    def __init__(self, rows: Iterable[Row] = ()) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115  # open as long as this object exists
        self._end = 0
        self._starts, self._labels, self._prompts = array("q"), array("i"), array("i")
        self.lengths = array("i")
        for row in rows:
            self.append(row)

    def append(self, row: Row) -> None:
        """Append one row."""
        # Reads move the position of the file, hence the seek.
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
        """The labels of all rows, without reading their tokens."""
        return self._labels

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        """Read one row, or the rows of a slice."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        tokens = array("i")
        self._file.seek(self._starts[index])
        tokens.frombytes(self._file.read(self.lengths[index] * tokens.itemsize))
        return Row(tokens.tolist(), self._labels[index], self._prompts[index])

    def __iter__(self) -> Iterator[Row]:
        """Read the rows in the order in which they were appended."""
        return (self[index] for index in range(len(self)))

    def __len__(self) -> int:
        return len(self._labels)
