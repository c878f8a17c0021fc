"""YAML without its traps: no key twice, no word that one reader takes for a name and another for a truth.

Numbers are read as YAML 1.2 reads them (``1e-4`` is one); what only YAML 1.1 takes for a number or a truth
(``no``, ``1_000``, ``12:30``) is refused unless it is quoted.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from ..errors import PeftMoeError

_TRUTHS = re.compile(r"yes|no|on|off|y|n", re.IGNORECASE)
_OLD_NUMBERS = re.compile(
    r"[-+]?(?:[0-9][0-9_]*_[0-9_]*(?:\.[0-9_]*)?|0b[01_]+|0x[0-9a-fA-F_]+|0o?[0-7_]+(?<!^0)"
    r"|[0-9][0-9_]*(?::[0-5]?[0-9])+(?:\.[0-9_]*)?)"
)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  (PyYAML's own way to start from none)


_WORDS = {
    "null": r"~|null|Null|NULL|",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?[0-9]+",
    "float": r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
}
for _name, _pattern in _WORDS.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(rf"(?:{_pattern})\Z"), None)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A file's keys and values.

    Raises:
        PeftMoeError: no such file, no YAML, no mapping at the top, a key twice, a key that is no text, or a
            plain word that readers disagree about; with the line.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PeftMoeError(f"{path} cannot be read: {error}") from error
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        _check(node, path, set())
        found = loader.construct_document(node) if node is not None else None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        if isinstance(error, PeftMoeError):
            raise
        where = getattr(error, "problem_mark", None)
        line = f", line {where.line + 1}" if where else ""
        what = getattr(error, "problem", None) or str(error).split("\n")[0]
        raise PeftMoeError(f"{path}{line}: not plain YAML ({what}); correct it") from error
    finally:
        loader.dispose()
    if not isinstance(found, dict):
        raise PeftMoeError(f"{path} holds a {type(found).__name__}, not keys and values")
    return found


def _check(node: yaml.Node | None, path: Path, seen: set[int]) -> None:
    """Every node once; a node that is referred to again is the same one."""
    if node is None or id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.ScalarNode):
        _check_word(node, path)
    elif isinstance(node, yaml.SequenceNode):
        for child in node.value:
            _check(child, path, seen)
    elif isinstance(node, yaml.MappingNode):
        keys: dict[str, int] = {}
        for key, value in node.value:
            _check_key(key, path, keys)
            _check(value, path, seen)


def _check_key(key: yaml.Node, path: Path, keys: dict[str, int]) -> None:
    line = key.start_mark.line + 1
    if not isinstance(key, yaml.ScalarNode):
        raise PeftMoeError(f"{path}, line {line}: a key must be text")
    _check_word(key, path)
    if key.tag != "tag:yaml.org,2002:str" or key.value == "<<":
        raise PeftMoeError(f"{path}, line {line}: the key {key.value!r} is no text; quote it: '{key.value}'")
    if key.value in keys:
        raise PeftMoeError(
            f"{path}, line {line}: the key {key.value!r} appears twice, first in line {keys[key.value]}; "
            "readers keep only one of them, so remove or rename one"
        )
    keys[key.value] = line


def _check_word(node: yaml.ScalarNode, path: Path) -> None:
    plain = node.style is None
    if plain and (_TRUTHS.fullmatch(node.value) or _OLD_NUMBERS.fullmatch(node.value)):
        raise PeftMoeError(
            f"{path}, line {node.start_mark.line + 1}: {node.value!r} is text to some readers of YAML and a "
            f"truth or number to others; quote it: '{node.value}', or write true, false or plain digits"
        )
