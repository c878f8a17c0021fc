"""Loading of training text, shared by all recipes and by evaluation.

Three kinds of records are accepted, as TRL's ``SFTTrainer`` reads them: ``prompt`` + ``completion``
(two strings or two message lists), ``messages``, or ``text``; trainers of preferences have kinds of their
own. Other columns (``domain``) are kept.
What a trainer would misread in silence (ShareGPT roles, an empty completion) is refused here.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from datasets import Dataset, DatasetDict, concatenate_datasets, load_dataset, load_from_disk

from ..errors import PeftMoeError

# In TRL's own order: a record with a `prompt` is read as prompt + completion before anything else.
KINDS: dict[str, tuple[str, ...]] = {
    "prompt_completion": ("prompt", "completion"),
    "messages": ("messages",),
    "text": ("text",),
}
# What trainers of preferences and rewards read, by TRL's names of them; GRPO's completions are right answers.
PREFERENCES: dict[str, dict[str, tuple[str, ...]]] = {
    "dpo": {"pairs": ("prompt", "chosen", "rejected")},
    "kto": {"rated": ("prompt", "completion", "label"), "pairs": ("prompt", "chosen", "rejected")},
    "grpo": {"answers": ("prompt", "completion")},
}
ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}
SHAREGPT = (
    "this is ShareGPT: rename the column to `messages`, and in every turn `from` to `role` "
    "(human -> user, gpt -> assistant) and `value` to `content`"
)
# The first row whose columns are all present gives the advice.
FIXES: dict[tuple[str, ...], str] = {
    ("conversations",): SHAREGPT,
    ("instruction", "output"): "join `instruction` and `input` as `prompt`, rename `output` to `completion`",
    ("question", "answer"): "rename `question` to `prompt` and `answer` to `completion`",
    ("prompt", "response"): "rename `response` to `completion`",
    ("chosen", "rejected"): "preference pairs are for DPO; here rename `chosen` to `completion`",
    ("input", "output"): "rename `input` to `prompt` and `output` to `completion`",
    ("input_ids",): "this is tokenised already; pass the text it was made from",
    ("content",): "rename `content` to `text`",
}

Source = str | os.PathLike[str] | Mapping[str, str]
Kinds = Mapping[str, tuple[str, ...]]
# Of a source that is written as a dict, in the words of TRL's `datasets:`.
SOURCE_KEYS = ("path", "name", "split")


def text_kind(columns: Sequence[str], kinds: Kinds = KINDS) -> str | None:
    """The kind of records that ``columns`` make (a key of ``kinds``), or None if they make none."""
    return next((kind for kind, need in kinds.items() if set(need) <= set(columns)), None)


def load_text_dataset(
    source: Source | Sequence[Source] | Mapping[str, Source],
    split: str | None = None,
    *,
    config: str | None = None,
    kinds: Kinds = KINDS,
) -> Dataset:
    """Load text for training or evaluation and check every record.

    Args:
        source: a ``.jsonl`` or ``.json`` file, a directory written by ``save_to_disk``, or the
            name of a dataset on the Hub; a dict ``{"path": …, "name": …, "split": …}`` of one of
            these, its configuration and its split; a list of these (concatenated); or a dict
            ``{domain: source}``, whose keys become the column ``domain``.
        split: which split of a dataset that has several, "train" by default; files have one.
        config: the configuration of a Hub dataset ("main" of ``openai/gsm8k``).
        kinds: what records may be, a name and the columns of each, in the order of their preference.

    Returns:
        Records of one kind with their other columns, except columns of another kind (`prompt`
        beside `messages`): a trainer would take the wrong one.

    Raises:
        PeftMoeError: for every fault of the data; the message names the place and the remedy.
    """
    if isinstance(source, str | os.PathLike) or (isinstance(source, Mapping) and "path" in source):
        return _load_one(cast(Source, source), split, config, kinds)
    if not source:
        raise PeftMoeError("No training data: the list of sources is empty.")
    if isinstance(source, Mapping):
        names = [source_name(one) for one in source.values()]
        parts = []
        for domain, one in source.items():
            part = _load_one(one, split, config, kinds)
            kept = part.remove_columns([c for c in part.column_names if c == "domain"])
            parts.append(kept.add_column("domain", [domain] * len(kept)))
    else:
        names = [source_name(one) for one in source]
        parts = [_load_one(one, split, config, kinds) for one in source]
    found = {name: text_kind(part.column_names, kinds) for name, part in zip(names, parts, strict=True)}
    if len(set(found.values())) > 1:
        raise PeftMoeError(f"Sources of one dataset must be of one kind, got {found}. Convert one.")
    try:
        return concatenate_datasets(parts)
    except (ValueError, TypeError) as error:  # e.g. string prompts beside message lists
        files = ", ".join(names)
        raise PeftMoeError(f"{files}: types differ ({error}). Convert or drop columns.") from error


def source_name(source: Source) -> str:
    """What a source is called: its path, or the path in its dict."""
    return str(source.get("path") if isinstance(source, Mapping) else source)


def _load_one(source: Source, split: str | None, config: str | None, kinds: Kinds) -> Dataset:
    if isinstance(source, Mapping):
        unknown = [key for key in source if key not in SOURCE_KEYS]
        if unknown or not isinstance(source.get("path"), str):
            raise PeftMoeError(
                f"a source is a path or {{{', '.join(SOURCE_KEYS)}}}, not {dict(source)}; `path` is a "
                "file, a saved directory or a name on the Hub"
            )
        split, config = source.get("split") or split, source.get("name") or config
    name = os.path.expanduser(source_name(source))
    path = Path(name)
    if path.is_file():
        if isinstance(source, Mapping) and len(source) > 1:
            raise PeftMoeError(f"{name} is a file, which has no `name` and no `split`; leave them out.")
        return _from_file(path, kinds)
    if path.is_dir():
        if not any((path / mark).is_file() for mark in ("state.json", "dataset_dict.json")):
            inside = ", ".join(sorted(p.name for p in path.glob("*.json*"))) or "a .jsonl file"
            raise PeftMoeError(f"{name} is not a directory saved by `datasets`; name {inside}.")
        data: Any = load_from_disk(name)
    else:
        if path.suffix in (".json", ".jsonl") or path.is_absolute() or name.startswith("."):
            raise PeftMoeError(f"{name}: no such file (working directory: {Path.cwd()}).")
        data = load_dataset(name, config)
    if isinstance(data, DatasetDict):
        if (wanted := split or "train") not in data:
            raise PeftMoeError(f"{name} has no split {wanted!r}; it has {', '.join(data)}.")
        data = data[wanted]
    kind = _check_columns(name, data.column_names, len(data), kinds)
    for index, row in enumerate(data.select_columns(list(kinds[kind]))):
        _check_record(kinds[kind], row, f"{name}, record {index}")
    return _drop_other_kinds(data, kind, kinds)


def _from_file(path: Path, kinds: Kinds) -> Dataset:
    if path.suffix not in (".json", ".jsonl"):
        raise PeftMoeError(f"{path}: files must be .jsonl or .json, not {path.suffix!r}. Convert it.")
    numbered = list(_records(path, path.read_text(encoding="utf-8-sig")))
    columns = list(dict.fromkeys(key for _, row in numbered for key in row))
    kind = _check_columns(str(path), columns, len(numbered), kinds)
    for where, row in numbered:
        _check_record(kinds[kind], row, f"{path}, {where}")
    try:
        data = Dataset.from_dict({key: [row.get(key) for _, row in numbered] for key in columns})
    except (ValueError, TypeError) as error:  # pyarrow's: a column of strings and numbers
        raise PeftMoeError(f"{path}: a column mixes types ({error}). Give it one type.") from error
    return _drop_other_kinds(data, kind, kinds)


def _records(path: Path, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield ("line 3", record); a .json file may also be one list of records ("item 3")."""
    whole = path.suffix == ".json" and text.lstrip().startswith("[")
    # Not splitlines(): U+2028 and friends are legal inside a JSON string.
    chunks = [text] if whole else text.split("\n")
    for number, chunk in enumerate(chunks, start=1):
        if not chunk.strip():
            continue
        try:
            parsed = json.loads(chunk)
        except json.JSONDecodeError as error:
            place = f"{path}, line {number + error.lineno - 1}"
            raise PeftMoeError(f"{place}: not JSON ({error}). Write one object per line.") from error
        for index, item in enumerate(parsed if whole else [parsed]):
            where = f"item {index}" if whole else f"line {number}"
            if not isinstance(item, dict):
                raise PeftMoeError(f"{path}, {where}: {item!r:.40} is not a JSON object.")
            yield where, item


def _check_columns(name: str, columns: list[str], count: int, kinds: Kinds) -> str:
    if count == 0:
        raise PeftMoeError(f"{name} is empty: no records to train on.")
    if kind := text_kind(columns, kinds):
        return kind
    advice = None
    if kinds is KINDS:
        advice = next((fix for has, fix in FIXES.items() if set(has) <= set(columns)), None)
    if advice is None:
        missing = [n for need in kinds.values() for n in need if n not in columns]
        near = [(difflib.get_close_matches(n, columns, 1, 0.75), n) for n in missing]
        renames = [f"rename `{match[0]}` to `{n}`" for match, n in near if match]
        half = [f"add `{n}`" for n in next(iter(kinds.values())) if n in missing]
        advice = " and ".join(renames or (half if len(half) == 1 else ["rename a column"]))
    found = ", ".join(columns)
    needed = ", or ".join(" + ".join(f"`{n}`" for n in need) for need in kinds.values())
    raise PeftMoeError(f"{name} has columns {found}; needed: {needed}. Fix: {advice}.")


def _check_record(columns: Sequence[str], row: Mapping[str, Any], where: str) -> None:
    for column in columns:
        value = row.get(column)
        if column == "label":
            if not isinstance(value, bool):
                raise PeftMoeError(f"{where}: `label` must be true or false, got {value!r}.")
        elif column != "text" and isinstance(value, list):
            _check_messages(value, f"{where}, `{column}`")
        elif not isinstance(value, str) or column == "messages":
            need = "a list of messages" if column == "messages" else "a string"
            raise PeftMoeError(f"{where}: `{column}` must be {need}, got {type(value).__name__}.")
        elif column != "prompt" and not value.strip():
            raise PeftMoeError(f"{where}: `{column}` is empty. Fill it or drop the record.")
    texts = [column for column in columns if column != "label"]
    if len({type(row[column]) for column in texts}) > 1:
        named, all_of = " and ".join(f"`{c}`" for c in texts), "both" if len(texts) == 2 else "all"
        raise PeftMoeError(f"{where}: {named} must {all_of} be strings or {all_of} lists.")


def _check_messages(messages: list[Any], where: str) -> None:
    if not messages:
        raise PeftMoeError(f"{where} is empty. Fill it or drop the record.")
    for message in messages:
        if isinstance(message, Mapping) and {"from", "value"} <= set(message):
            raise PeftMoeError(f"{where}: {SHAREGPT}.")
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            raise PeftMoeError(f"{where}: every message needs `role` and `content`, got {message!r}.")
        if (role := message["role"]) in ROLES:
            raise PeftMoeError(f"{where}: role {role!r} is ShareGPT's; write {ROLES[role]!r}.")


def _drop_other_kinds(data: Dataset, kind: str, kinds: Kinds) -> Dataset:
    others = {c for need in (*KINDS.values(), *kinds.values()) for c in need} - set(kinds[kind])
    return data.remove_columns(sorted(others & set(data.column_names)))
