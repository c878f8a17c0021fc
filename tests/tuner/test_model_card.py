"""The model card of a mixture, and pushes that nobody else could load: no network anywhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import ModelCard
from peft import PeftModel
from support.zoo import Zoo
from typer.testing import CliRunner

from peft_moe import MoLoraConfig, PeftMoeError
from peft_moe.cli.main import app
from peft_moe.tuner.config.model_card import update_card


def licensed(zoo: Zoo, folder: Path, card: str) -> str:
    """One of the adapters with a card of its own."""
    folder.mkdir()
    for path in Path(zoo.experts("llama")["wide"]).iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "README.md").write_text(card)
    return str(folder)


def card_of(model: PeftModel, folder: Path) -> ModelCard:
    model.save_pretrained(str(folder))
    return ModelCard.load(folder / "README.md")


def test_a_saved_mixture_has_a_card(zoo: Zoo, tmp_path: Path) -> None:
    experts = {
        "free": licensed(zoo, tmp_path / "free", "---\nlicense: apache-2.0\n---\n"),
        "own": licensed(zoo, tmp_path / "own", "---\nlicense: other\nlicense_name: house-rules\n---\n"),
        "silent": zoo.experts("llama")["narrow"],
        "broken": licensed(zoo, tmp_path / "broken", "---\nlicense: [\n---\n"),
    }
    with pytest.warns(UserWarning, match="cannot tell them apart"):
        model = zoo.mixture("llama", "dense", experts=experts, top_k=2)
    model.peft_config["default"].base_model_name_or_path = "org/base"
    card = card_of(model, tmp_path / "mixture")
    for words in (
        "import peft_moe",
        "`org/base`; licence: unknown",
        "| `free` | a local folder, `free` | apache-2.0 | 4 |",
        "house-rules",
        "| `silent` | a local folder, `narrow` | unknown | 3 |",
        "- router: `linear`",
        "- top_k: `2`",
        "AutoModelForCausalLM.from_pretrained",
    ):
        assert words in card.text, words
    assert "| `broken` | a local folder, `broken` | unknown" in card.text
    assert card.data.base_model == "org/base"
    assert card.data.library_name == "peft"
    assert {"peft-moe", "lora"} <= set(card.data.tags)
    # Once more, and loaded and saved: the same card, licences included.
    loaded = PeftModel.from_pretrained(zoo.base("llama"), str(tmp_path / "mixture"))
    loaded.save_pretrained(str(tmp_path / "mixture"))
    assert ModelCard.load(tmp_path / "mixture" / "README.md").content == card.content


def test_the_snippet_runs(zoo: Zoo, tmp_path: Path) -> None:
    model = zoo.mixture("llama", "dense")
    model.peft_config["default"].base_model_name_or_path = zoo.saved_base("llama")
    text = card_of(model, tmp_path / "mixture").text
    snippet = (
        text.split("```python\n")[1]
        .split("```")[0]
        .replace("this folder or repository", str(tmp_path / "mixture"))
    )
    names: dict[str, Any] = {}
    exec(snippet, names)
    assert names["model"].peft_config["default"].expert_names == ["wide", "narrow", "upper"]


def test_a_local_base_is_no_metadata(zoo: Zoo, tmp_path: Path) -> None:
    model = zoo.mixture("llama", "dense")
    model.get_base_model().config._name_or_path = model.get_base_model().name_or_path = zoo.saved_base(
        "llama"
    )
    card = card_of(model, tmp_path / "mixture")
    assert card.data.base_model is None
    assert not any("base_model" in tag for tag in card.data.tags)


def test_what_others_wrote_stays(zoo: Zoo, tmp_path: Path) -> None:
    model = zoo.mixture("llama", "dense")
    folder = tmp_path / "mixture"
    folder.mkdir()
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n\nMy words.\n")
    for _ in range(2):
        card = card_of(model, folder)
        assert card.text.count("My words.") == 1
        assert card.text.count("import peft_moe") == 1
        assert card.data.license == "mit"


def test_figures_are_shown_until_the_next_save(zoo: Zoo, tmp_path: Path) -> None:
    model, folder = zoo.mixture("llama", "dense"), tmp_path / "mixture"
    model.save_pretrained(str(folder))
    summary = {
        "heldout_loss": {"math": 1.25, "law": 2.5},
        "load": {"math": {"wide": 0.75}},
        "steps": 3,
        "note": "x",
    }
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    words = ["card", str(folder), "--metrics", str(tmp_path / "summary.json")]
    assert CliRunner().invoke(app, words, catch_exceptions=False).exit_code == 0
    text = (folder / "README.md").read_text()
    for words_of in ("| math | 1.25 |", "| law | 2.5 |", "| steps | 3 |", "**load**", "| math | 0.75 |"):
        assert words_of in text
    # Other weights may have been saved: figures that are not known to be theirs are gone.
    assert "1.25" not in card_of(model, folder).text
    for wrong in ({}, {"note": "x"}, tmp_path / "nothing.json"):
        with pytest.raises(PeftMoeError):
            update_card(folder, model.peft_config["default"], metrics=wrong)


@pytest.mark.parametrize("base", ["folder", "relative", None])
def test_a_local_base_cannot_be_pushed(
    zoo: Zoo, base: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def touched(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(huggingface_hub.utils._http, "http_backoff", touched)
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", touched)
    name = {"folder": zoo.saved_base("llama"), "relative": "runs/text/base", None: None}[base]
    model = zoo.mixture("llama", "dense")
    config: MoLoraConfig = model.peft_config["default"]
    config.base_model_name_or_path = name
    for push in (model.push_to_hub, config.push_to_hub):
        with pytest.raises(PeftMoeError, match=r"base_model_name_or_path = 'org/name'"):
            push("me/mixture")


def test_a_push_carries_the_card(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hub's own calls alone are replaced: what would be sent is looked at."""
    sent: dict[str, str] = {}

    def commit(self: Any, *, operations: Any, **kwargs: Any) -> str:
        for one in operations:
            if one.path_in_repo == "README.md":
                sent["card"] = Path(one.path_or_fileobj).read_text()
            sent[one.path_in_repo] = "sent"
        return "done"

    class Repo:
        repo_id = "me/mixture"

    def no_card(*args: Any, **kwargs: Any) -> Any:
        raise huggingface_hub.errors.EntryNotFoundError("none yet")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda *args, **kwargs: Repo())
    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", commit)
    monkeypatch.setattr(
        huggingface_hub.ModelCard, "load", classmethod(_load_local(huggingface_hub.ModelCard.load))
    )
    model = zoo.mixture("llama", "dense")
    model.peft_config["default"].base_model_name_or_path = "org/base"
    assert model.push_to_hub("me/mixture") == "done"
    assert {"adapter_model.safetensors", "adapter_config.json"} <= set(sent)
    assert "import peft_moe" in sent["card"]
    assert "[More Information Needed]" not in sent["card"]


def _load_local(load: Any) -> Any:
    """Cards on disk as ever; the repository has none yet."""

    def only_files(cls: type, place: Any, *args: Any, **kwargs: Any) -> Any:
        if not Path(place).exists():
            raise huggingface_hub.errors.EntryNotFoundError("none yet")
        return load(place, *args, **kwargs)

    return only_files
