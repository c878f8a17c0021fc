"""Arguments of a recipe: TRL's parser, over YAML that is read strictly."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from trl import TrlParser

from ..mixfile.strict_yaml import read_yaml


class StrictTrlParser(TrlParser):  # type: ignore[misc]  # trl is untyped here
    """``TrlParser``, which by itself keeps the last of two experts of one name without a word."""

    def parse_args_and_config(self, args: Iterable[str] | None = None, *more: Any, **named: Any) -> Any:
        """As TRL's own.

        Raises:
            PeftMoeError: the file of ``--config`` is no plain YAML: a key twice, a name that is a truth
                (``no``), with the line.
        """
        given = list(args) if args is not None else sys.argv[1:]
        if "--config" in given[:-1]:
            read_yaml(given[given.index("--config") + 1])
        return super().parse_args_and_config(given, *more, **named)
