"""`python -m benchmarks.nmt --quick`: base, systems by the recipes, scores, a resumed run and the page."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from benchmarks.nmt.__main__ import main
from benchmarks.nmt.page import page, summary
from benchmarks.nmt.text import SEEN, UNSEEN
from peft_moe import PeftMoeError

pytest.importorskip("sacrebleu", reason="needs sacrebleu: pip install peft-moe[bench]")

WORDS = {"stop": "arrête", "the": "le", "file": "fichier", "law": "loi", "read": "lis", "new": "nouveau"}
QUICK = ("smoe+generic", "tags+random", "gates+random", "routed")  # one of each kind that trains


@pytest.fixture
def source(tmp_path: Path) -> Path:
    rng = random.Random(0)
    for domain in (*SEEN, UNSEEN):
        folder = tmp_path / "source" / "nmt" / "en-fr" / domain
        folder.mkdir(parents=True)
        for split, size in (("train", 60), ("test", 5)):
            rows = []
            for _ in range(size):
                words = [domain, *rng.choices(list(WORDS), k=5)]
                rows.append({"src": " ".join(words), "tgt": " ".join(WORDS.get(w, w) for w in words)})
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")
    return tmp_path / "source"


def test_quick_run_goes_on_where_it_stopped(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PEFT_MOE_DATA", str(source))
    out = tmp_path / "run"
    main(["--quick", "--out", str(out), "--systems", "base", *QUICK])
    files = {path.stem: path for path in (out / "scores").glob("*.json")}
    assert set(files) == {f"{name}-0" for name in ("base", *QUICK)}
    told = {name: set(json.loads(path.read_text())["scores"]) for name, path in files.items()}
    assert told["smoe+generic-0"] == {"it/none", "law/none", "shell/none"}
    assert told["gates+random-0"] == told["tags+random-0"] == told["smoe+generic-0"] | {
        "it/right", "it/wrong", "law/right", "law/wrong", "shell/wrong",
    }  # fmt: skip
    for path in files.values():
        for row in json.loads(path.read_text())["scores"].values():
            assert len(row["nll"]) == len(row["tokens"]) == 3
            assert all(nll > 0 and count > 1 for nll, count in zip(row["nll"], row["tokens"], strict=True))
            assert 0 <= row.get("bleu", 0) <= 100
            assert 0 <= row.get("chrf", 0) <= 100
    # What a system is told reaches it: by the prompt, or by the gates.
    for name in ("tags+random-0", "gates+random-0"):
        scores = json.loads(files[name].read_text())["scores"]
        assert scores["it/right"]["nll"] != scores["it/wrong"]["nll"], name
        assert "chrf" in scores["it/right"]
        assert "chrf" not in scores["it/none"]  # which no claim asks for

    # A finished system is left as it is; an unfinished one is trained on nothing new if its parts are there.
    stamp = files["smoe+generic-0"].stat().st_mtime_ns
    files["routed-0"].unlink()
    capsys.readouterr()
    main(["--quick", "--out", str(out), "--systems", "smoe+generic", "routed"])
    assert files["routed-0"].exists()
    assert files["smoe+generic-0"].stat().st_mtime_ns == stamp
    assert "trainable params" not in capsys.readouterr().out

    kept = json.loads(json.dumps(summary(out)))
    assert list(kept["systems"]) == ["base", *QUICK]
    assert {one["verdict"] for one in kept["claims"] if one["seeds"] == 0} == {"not decidable here"}
    assert "| `gates+random` | 1 |" in page(kept)

    with pytest.raises(PeftMoeError, match="another plan; take another --out"):
        main(["--out", str(out)])
