"""`load_text_dataset`: what is accepted, what is kept, and what the refusals say."""

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict

from peft_moe.io import text_data as data_module
from peft_moe.io.text_data import load_text_dataset, text_kind

PAIR = {"prompt": "2+2=", "completion": "4", "domain": "math"}
CHAT = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        (PAIR, "prompt_completion"),
        ({"prompt": CHAT["messages"][:1], "completion": CHAT["messages"][1:]}, "prompt_completion"),
        (CHAT, "messages"),
        ({"text": "hello"}, "text"),
        ({"prompt": "", "completion": "an empty prompt is fine"}, "prompt_completion"),
    ],
)
def test_each_kind_is_read_back_unchanged(tmp_path: Path, row: dict[str, Any], kind: str) -> None:
    loaded = load_text_dataset(write(tmp_path / "a.jsonl", [row, row]))
    assert loaded.to_list() == [row, row]
    assert text_kind(loaded.column_names) == kind


def test_extra_columns_are_kept_even_where_the_first_record_lacks_them(tmp_path: Path) -> None:
    rows = [{"text": "a"}, {"text": "b", "domain": "law"}]
    assert load_text_dataset(write(tmp_path / "a.jsonl", rows))["domain"] == [None, "law"]


def test_columns_of_another_kind_are_dropped(tmp_path: Path) -> None:
    # UltraChat has `prompt` beside `messages`; TRL would look for a completion.
    loaded = load_text_dataset(write(tmp_path / "a.jsonl", [{"prompt": "a", "id": 1, **CHAT}]))
    assert sorted(loaded.column_names) == ["id", "messages"]


def test_json_may_be_a_list_or_lines(tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text(json.dumps([PAIR, PAIR], indent=1))
    write(tmp_path / "lines.json", [PAIR, PAIR])
    for name in ("list.json", "lines.json"):
        assert load_text_dataset(tmp_path / name).to_list() == [PAIR, PAIR]


def test_blank_lines_a_bom_and_unicode_line_separators_do_no_harm(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    text = json.dumps({"text": "a\u2028b\x85c"}, ensure_ascii=False)
    file.write_text(f"\ufeff{text}\r\n\n{text}", encoding="utf-8")
    assert load_text_dataset(file)["text"] == ["a\u2028b\x85c"] * 2


def test_lists_are_joined_and_dict_keys_become_the_domain(tmp_path: Path) -> None:
    one = write(tmp_path / "1.jsonl", [{"text": "a", "domain": "old"}])
    two = write(tmp_path / "2.jsonl", [{"text": "b"}, {"text": "c"}])
    assert load_text_dataset([one, two])["domain"] == ["old", None, None]
    labelled = load_text_dataset({"math": one, "law": two})
    assert labelled["domain"] == ["math", "law", "law"]
    assert labelled["text"] == ["a", "b", "c"]


def test_a_saved_directory_and_its_splits(tmp_path: Path) -> None:
    train, test = Dataset.from_list([PAIR]), Dataset.from_list([PAIR, PAIR])
    train.save_to_disk(tmp_path / "one")
    DatasetDict(train=train, test=test).save_to_disk(tmp_path / "two")
    assert len(load_text_dataset(tmp_path / "one")) == 1
    assert len(load_text_dataset(tmp_path / "two")) == 1
    assert len(load_text_dataset(tmp_path / "two", "test")) == 2
    with pytest.raises(ValueError, match="no split 'dev'; it has train, test"):
        load_text_dataset(tmp_path / "two", "dev")


def test_a_hub_name_reaches_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(name: str, config: str | None) -> DatasetDict:
        asked.append((name, config))
        return DatasetDict(train=Dataset.from_list([PAIR]), test=Dataset.from_list([PAIR, PAIR]))

    monkeypatch.setattr(data_module, "load_dataset", load)
    assert len(load_text_dataset("owner/name", "test", config="main")) == 2
    assert asked == [("owner/name", "main")]


def test_a_source_may_name_its_configuration_and_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def load(name: str, config: str | None) -> DatasetDict:
        asked.append((name, config))
        return DatasetDict(train=Dataset.from_list([PAIR]), test=Dataset.from_list([PAIR, PAIR]))

    monkeypatch.setattr(data_module, "load_dataset", load)
    hub = {"path": "owner/name", "name": "main", "split": "test"}
    file = write(tmp_path / "a.jsonl", [PAIR])
    assert load_text_dataset({"math": hub, "law": file})["domain"] == ["math", "math", "law"]
    assert len(load_text_dataset({"path": "owner/name"}, "test")) == 2
    assert asked == [("owner/name", "main"), ("owner/name", None)]
    with pytest.raises(ValueError, match=r"a source is a path or \{path, name, split\}, not .*'config'"):
        load_text_dataset({"math": {"path": "owner/name", "config": "main"}})
    with pytest.raises(ValueError, match="a source is a path or"):
        load_text_dataset({"math": {"split": "main"}})
    with pytest.raises(ValueError, match=r"a\.jsonl is a file, which has no `name`"):
        load_text_dataset({"math": {"path": str(file), "split": "test"}})


RATED = {"prompt": "2+2=", "completion": "4", "label": True, "domain": "math"}
PREFERRED = {"prompt": "2+2=", "chosen": "4", "rejected": "5", "domain": "math"}


@pytest.mark.parametrize(
    ("method", "row", "kept"),
    [
        ("dpo", PREFERRED, PREFERRED),
        ("dpo", {**PREFERRED, "text": "away"}, PREFERRED),
        ("kto", RATED, RATED),
        ("kto", PREFERRED, PREFERRED),
        ("grpo", PAIR, PAIR),
    ],
)
def test_preferences_are_kinds_of_their_own(
    tmp_path: Path, method: str, row: dict[str, Any], kept: dict[str, Any]
) -> None:
    kinds = data_module.PREFERENCES[method]
    assert load_text_dataset(write(tmp_path / "a.jsonl", [row]), kinds=kinds).to_list() == [kept]


@pytest.mark.parametrize(
    ("method", "row", "message"),
    [
        ("dpo", PAIR, r"needed: `prompt` \+ `chosen` \+ `rejected`\. Fix: rename a column"),
        ("dpo", {**PREFERRED, "rejected": ""}, "`rejected` is empty"),
        ("dpo", {**PREFERRED, "rejected": CHAT["messages"]}, "must all be strings or all lists"),
        ("dpo", {"prompt": "a", "chosen": "b"}, "Fix: add `rejected`"),
        ("kto", {**RATED, "label": 1}, "`label` must be true or false, got 1"),
    ],
)
def test_bad_preferences_are_named(tmp_path: Path, method: str, row: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_text_dataset(write(tmp_path / "a.jsonl", [row]), kinds=data_module.PREFERENCES[method])


@pytest.mark.parametrize(
    ("row", "advice"),
    [
        ({"instruction": "a", "input": "", "output": "b"}, "`instruction` and `input` as `prompt`"),
        ({"conversations": [{"from": "human", "value": "a"}]}, "ShareGPT.*`messages`"),
        ({"question": "a", "answer": "b"}, "rename `question` to `prompt`"),
        ({"prompt": "a", "response": "b"}, "rename `response` to `completion`"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "preference pairs"),
        ({"input_ids": [1, 2]}, "tokenised already"),
        ({"prompt": "a"}, "add `completion`"),
        ({"Prompt": "a", "Completions": "b"}, "`Prompt` to `prompt` and .*`Completions`"),
        ({"sentence": "a"}, "rename a column"),
    ],
)
def test_unknown_columns_name_file_found_needed_and_fix(
    tmp_path: Path, row: dict[str, Any], advice: str
) -> None:
    file = write(tmp_path / "a.jsonl", [row])
    with pytest.raises(ValueError, match=advice) as caught:
        load_text_dataset(file)
    message = str(caught.value)
    assert str(file) in message
    assert all(column in message for column in row)
    assert "`prompt` + `completion`, or `messages`, or `text`" in message


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([PAIR, {**PAIR, "completion": " \n"}], "line 2: `completion` is empty"),
        ([{"text": ""}], "line 1: `text` is empty"),
        ([{"text": "a"}, {"domain": "b"}], "line 2: `text` must be a string, got NoneType"),
        ([{"messages": "hello"}], "`messages` must be a list of messages, got str"),
        ([{"messages": []}], "`messages` is empty"),
        ([{"messages": [{"from": "human", "value": "a"}]}], "this is ShareGPT"),
        ([{"messages": [{"role": "gpt", "content": "a"}]}], "role 'gpt' .*write 'assistant'"),
        ([{"messages": [{"role": "user"}]}], "needs `role` and `content`"),
        ([{"prompt": "a", "completion": CHAT["messages"]}], "both be strings or both lists"),
        ([["a", "list"]], "line 1: .* is not a JSON object"),
        ([{"text": "a", "n": 1}, {"text": "b", "n": "x"}], "mixes types"),
        ([], "is empty"),
    ],
)
def test_bad_records_are_named(tmp_path: Path, rows: list[Any], message: str) -> None:
    file = write(tmp_path / "bad.jsonl", rows)
    with pytest.raises(ValueError, match=message) as caught:
        load_text_dataset(file)
    assert str(file) in str(caught.value)


def test_bad_json_names_the_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n\n{"text": "b"\n')
    with pytest.raises(ValueError, match=r"a\.jsonl, line 3: not JSON"):
        load_text_dataset(tmp_path / "a.jsonl")
    (tmp_path / "a.json").write_text('[\n{"text": "a"},\n]')
    with pytest.raises(ValueError, match=r"a\.json, line \d: not JSON"):
        load_text_dataset(tmp_path / "a.json")


def test_bad_records_of_a_saved_directory_are_named(tmp_path: Path) -> None:
    Dataset.from_list([PAIR, {**PAIR, "completion": ""}]).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match="record 1: `completion` is empty"):
        load_text_dataset(tmp_path / "saved")


def test_bad_sources(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"missing\.jsonl: no such file"):
        load_text_dataset("missing.jsonl")
    (tmp_path / "a.csv").write_text("a,b\n")
    with pytest.raises(ValueError, match=r"must be \.jsonl or \.json, not '\.csv'"):
        load_text_dataset(tmp_path / "a.csv")
    with pytest.raises(ValueError, match="list of sources is empty"):
        load_text_dataset([])
    pair, text = write(tmp_path / "p.jsonl", [PAIR]), write(tmp_path / "t.jsonl", [{"text": "a"}])
    with pytest.raises(ValueError, match=r"t\.jsonl': 'text'}. Convert one"):
        load_text_dataset([pair, text])
    with pytest.raises(ValueError, match=r"name p\.jsonl, t\.jsonl"):
        load_text_dataset(tmp_path)
    number = write(tmp_path / "n.jsonl", [{"text": "a", "id": 1}])
    string = write(tmp_path / "s.jsonl", [{"text": "a", "id": "x"}])
    with pytest.raises(ValueError, match="types differ"):
        load_text_dataset([number, string])
