"""What a bake-off is told, reads and remembers: settings, methods, texts, fingerprints."""

from __future__ import annotations

import json

import pytest
import yaml

from peft_moe import PeftMoeError
from peft_moe.evaluation import TurnScore
from peft_moe.evaluation.bakeoff.build import Cost
from peft_moe.evaluation.bakeoff.methods import (
    FITTED,
    NO_DATA,
    RETRAINED,
    TRAINED,
    method_from,
    read_methods,
    unsupported_reason,
)
from peft_moe.evaluation.bakeoff.records import Fingerprints, Record, read_record, write_record
from peft_moe.evaluation.bakeoff.settings_file import read_settings, settings_from
from peft_moe.evaluation.bakeoff.texts import MARKED, RUNNING, load_texts

DOMAINS = ("law", "code", "news", "poems")


@pytest.fixture
def folder(tmp_path):
    """Files of four domains, two of them with experts, and a settings file beside them."""
    for name in (*DOMAINS, "base"):
        (tmp_path / "data" / name).mkdir(parents=True)
    for name in DOMAINS:
        for split in ("train", "test"):
            rows = [{"prompt": f"{name} {split} {n}?", "completion": f" {name} {n}."} for n in range(20)]
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (tmp_path / "data" / name / f"{split}.jsonl").write_text(text)
    for expert in ("law", "code"):
        (tmp_path / expert).mkdir()
        (tmp_path / expert / "adapter_config.json").write_text("{}")
    settings = {
        "base": "base",
        "experts": {"law": "law", "code": "code"},
        "domains": "data",
        "unseen": ["poems"],
        "texts": {"train_records": 5, "test_records": 6, "mixed_per_pair": 2, "mixed_chars": 4},
    }
    (tmp_path / "bakeoff.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    return tmp_path


@pytest.fixture
def settings(folder):
    return read_settings(folder / "bakeoff.yaml")


def test_paths_of_a_file_start_from_its_folder(folder, settings) -> None:
    assert settings.experts == {"law": str(folder / "law"), "code": str(folder / "code")}
    assert settings.domains["law"].train == folder / "data" / "law" / "train.jsonl"
    assert (settings.generic, settings.unseen) == (["news"], ["poems"])


def test_overrides_go_over_the_file(folder) -> None:
    settings = read_settings(
        folder / "bakeoff.yaml", ["train.steps=5", "seeds=[3, 4]", "score.measures=[exact]"]
    )
    assert (settings.train.steps, settings.seeds, settings.score.measures) == (5, (3, 4), ("exact",))
    assert settings.texts.train_records == 5  # of the file


def test_settings_without_a_file(folder) -> None:
    given = [
        f"base={folder}/base",
        f"experts={{law: {folder}/law, code: {folder}/code}}",
        f"domains={folder}/data",
    ]
    assert read_settings(None, given).generic == ["news", "poems"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("train.step=5", "train.step is not known. Did you mean 'steps'"),
        ("experts={law: a}", "two or more"),
        ("experts={law: a, code: b, maths: c}", "maths.*no domain"),
        ("unseen=[poem]", "unseen='poem' is no domain. Did you mean 'poems'"),
        ("unseen=[law]", "law.*no `train` file"),
        ("score.measures=[speed]", "speed.*choose from"),
        ("seeds=[]", "seeds is empty"),
        ("train.steps", "has no '='"),
        ("domains=nowhere", "no <domain>/test.jsonl"),
    ],
)
def test_settings_that_cannot_work(folder, change, message) -> None:
    with pytest.raises(PeftMoeError, match=message):
        read_settings(folder / "bakeoff.yaml", [change])


@pytest.mark.parametrize(
    ("line", "message"), [("seeds: [1]\nseeds: [2]", "'seeds' appears twice"), ("no: data", "'no'.*quote it")]
)
def test_yaml_that_readers_disagree_about(folder, line, message) -> None:
    (folder / "bakeoff.yaml").write_text((folder / "bakeoff.yaml").read_text() + line + "\n")
    with pytest.raises(PeftMoeError, match=message):
        read_settings(folder / "bakeoff.yaml")
    (folder / "methods.yaml").write_text(line + "\n")
    with pytest.raises(PeftMoeError, match=message):
        read_methods(folder / "methods.yaml")


def test_settings_that_lack_something() -> None:
    with pytest.raises(PeftMoeError, match="lack \\['base', 'experts', 'domains'\\]"):
        settings_from({})


def test_the_table_of_methods() -> None:
    methods = {one.name: one for one in read_methods()}
    group = {name: one.group for name, one in methods.items()}
    assert group["uniform"] == group["merge-cat-mean"] == group["peft-arrow"] == NO_DATA
    assert group["context-fitted"] == FITTED
    assert group["context-fitted-trained"] == group["peft-xlora"] == TRAINED
    assert group["one-wide-lora"] == group["wide-lora-same-steps"] == RETRAINED
    assert methods["one-wide-lora"].own_budget
    assert not methods["wide-lora-same-steps"].own_budget
    assert methods["linear"].varies
    assert not methods["uniform"].varies
    assert methods["context-fitted-trained"].learning_rate == pytest.approx(2e-3)


def test_a_methods_file_adds_changes_and_removes(tmp_path) -> None:
    (tmp_path / "mine.yaml").write_text(
        "mine: {mixture: {router: linear}, fit: {method: ridge, regularisation: 2.0}, needs: nothing}\n"
        "uniform: null\nrandom: {mixture: {router: random, top_k: 3}}\n"
    )
    methods = {one.name: one for one in read_methods(tmp_path / "mine.yaml")}
    assert "uniform" not in methods
    assert methods["random"].fields == {"router": "random", "top_k": 3}
    assert methods["mine"].fit == {"method": "ridge", "regularisation": 2.0}
    assert methods["mine"].group == NO_DATA


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({}, "has none of"),
        ({"mixture": {}, "merge": {}}, "must be one of them"),
        ({"mixture": {}, "trian": True}, "'trian' is not known. Did you mean 'train'"),
        ({"mixture": {}, "train": {"steps": 9}}, "is the same for all"),
        ({"mixture": {}, "budget": "train"}, "only a width method has a budget"),
        ({"width": {}, "budget": "routers"}, "budget='routers'.*'train'"),
        ({"mixture": {}, "needs": "label"}, "Did you mean 'labels'"),
        ("uniform", "write it as"),
    ],
)
def test_entries_that_cannot_be_read(entry, message) -> None:
    with pytest.raises(PeftMoeError, match=message):
        method_from("mine", entry)


def test_what_this_version_does_not_know_is_said() -> None:
    assert unsupported_reason(method_from("a", {"mixture": {"router": "linear"}})) is None
    assert "'linaer' is not registered. Did you mean 'linear'" in unsupported_reason(
        method_from("b", {"mixture": {"router": "linaer"}})
    )
    assert "'router_colour'" in unsupported_reason(method_from("c", {"mixture": {"router_colour": "red"}}))


def test_rows_and_samples(settings) -> None:
    texts = load_texts(settings)
    rows = {row.name: row for row in texts.rows}
    assert list(rows) == ["law", "code", "news", "poems", MARKED, RUNNING]
    assert [row.kind for row in texts.rows] == ["expert", "expert", "generic", "unseen", "mixed", "mixed"]
    assert all(len(rows[name].texts) == 6 for name in DOMAINS)
    assert rows["law"].owners[0] == ["law"]
    assert rows["news"].owners[0] == [None]
    assert sorted(s["domain"] for s in texts.train) == ["code"] * 5 + ["law"] * 5 + ["news"] * 5
    assert len(texts.pool) == 60  # all training samples; poems are unseen
    assert all("test" not in s["prompt"] for s in (*texts.train, *texts.pool))


def test_texts_of_two_domains(settings) -> None:
    rows = {row.name: row for row in load_texts(settings).rows}
    marked, running = rows[MARKED], rows[RUNNING]
    assert (marked.marked, running.marked) == (True, False)
    assert marked.texts == running.texts
    assert len(marked.texts) == 4  # two ordered pairs, two texts each
    for text, owners, last in zip(marked.texts, marked.owners, running.owners, strict=True):
        assert [prompt.split()[0] for prompt, _ in text] == owners
        assert owners[1:] == last
        assert all(len(completion) <= 4 for _, completion in text)


def test_more_texts_keep_the_fewer(settings, folder) -> None:
    more = read_settings(folder / "bakeoff.yaml", ["texts.test_records=9", "texts.train_records=7"])
    few, many = load_texts(settings), load_texts(more)
    assert many.rows[0].texts[:6] == few.rows[0].texts
    assert {s["prompt"] for s in few.train} < {s["prompt"] for s in many.train}


def test_generic_records_have_a_number_of_their_own(folder) -> None:
    texts = load_texts(read_settings(folder / "bakeoff.yaml", ["texts.generic_records=9"]))
    assert [sum(s["domain"] == name for s in texts.train) for name in ("law", "news")] == [5, 9]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a"}', "line 1.*completion"),
        ("nonsense", "line 1 is not JSON"),
        ('{"prompt": "a", "completion": ""}', "not empty"),
        ('{"prompt": ["a"], "completion": "b"}', "texts"),
        ("", "is empty"),
    ],
)
def test_records_that_cannot_be_used(folder, settings, line, message) -> None:
    (folder / "data" / "law" / "test.jsonl").write_text(line)
    with pytest.raises(PeftMoeError, match=message):
        load_texts(settings)


UNIFORM = {"mixture": {"router": "uniform"}}
FITTED_ONE = {"mixture": {"router": "context"}, "fit": "logistic"}
TRAINED_ONE = {"mixture": {"router": "linear"}, "train": True}
WIDE = {"width": {}}


@pytest.mark.parametrize(
    ("change", "uniform", "fitted", "trained", "wide"),
    [
        ("score.batch_size=3", True, True, True, True),
        ("score.draws=7", True, True, True, True),
        ("train.steps=7", True, True, False, True),
        ("texts.train_records=4", True, False, False, True),
        ("width.steps=7", True, True, True, False),
        ("score.max_length=9", False, False, False, False),
        ("texts.test_records=4", False, False, False, False),
        ("texts.mixed_chars=3", False, False, False, False),
        ("dtype=bfloat16", False, False, False, False),
    ],
)
def test_scores_are_reused_where_the_change_means_nothing_to_them(
    folder, settings, change, uniform, fitted, trained, wide
) -> None:
    changed = read_settings(folder / "bakeoff.yaml", [change])
    before, after = (Fingerprints(s, load_texts(s)) for s in (settings, changed))
    entries = (UNIFORM, FITTED_ONE, TRAINED_ONE, WIDE)
    same = [before.of(method_from("x", e), 0) == after.of(method_from("x", e), 0) for e in entries]
    assert same == [uniform, fitted, trained, wide]


def test_other_weights_seeds_and_fields_are_other_scores(folder, settings) -> None:
    texts = load_texts(settings)
    before = Fingerprints(settings, texts)
    uniform = method_from("x", UNIFORM)
    assert before.of(uniform, 0) != before.of(uniform, 1)
    assert before.of(uniform, 0) != before.of(method_from("x", {"mixture": {"router": "linear"}}), 0)
    assert before.of(uniform, 0) == Fingerprints(settings, texts).of(method_from("renamed", UNIFORM), 0)
    (folder / "law" / "adapter_config.json").write_text('{"r": 3}')
    assert before.of(uniform, 0) != Fingerprints(settings, texts).of(uniform, 0)


def test_records_come_back_and_only_under_the_same_settings(tmp_path) -> None:
    scores = {"law": [[TurnScore(1.5, 3, True)], [TurnScore(2.5, 4, False), TurnScore(0.0, 0, True)]]}
    record = Record("mine", 2, "abc", Cost(5, 1.0, 2.0, [3.0]), scores)
    path = tmp_path / "scores" / "mine-2.json"
    assert read_record(path, "abc") is None
    write_record(path, record, {"peft": "1"})
    assert read_record(path, "abc") == record
    assert read_record(path, "other") is None
    path.write_text(path.read_text()[:40])  # a file that was cut off by hand or by a full disk
    assert read_record(path, "abc") is None
    assert list(path.parent.iterdir()) == [path]
