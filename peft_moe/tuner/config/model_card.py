"""The model card of a mixture: README.md with base, experts, licences, router, figures, and how to load it.

What others wrote into a card stays; our part lies between two marks and is written anew at every save.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import peft
from huggingface_hub import ModelCard, ModelCardData, try_to_load_from_cache

from ...errors import PeftMoeError
from ...io.hub import CARD_FILE, is_on_hub, license_of
from ...io.values import is_number
from .fields import MixtureFields

UNKNOWN = "unknown"
BEGIN, END = "<!-- peft-moe: written at every save -->", "<!-- peft-moe: end -->"
_TAGS = ("lora", "mixture-of-experts", "peft-moe")
_OURS = re.compile(rf"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
# PEFT's own card is a form to fill in; nothing of it is lost.
_BLANK = "[More Information Needed]"
_AUTO = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}
_SETTINGS = (
    "router_scope", "router_granularity", "router_tap", "router_below_tap", "scoring_func", "topk_method",
    "top_k", "top_k_per_layer", "router_temperature", "null_expert", "shared_experts",
)  # fmt: skip
_USUAL = (("router_temperature", 1.0), ("topk_method", "greedy"))
_DEEPEST = 3


def check_base_on_hub(config: MixtureFields) -> None:
    """Refuse to upload what nobody else could load.

    Raises:
        PeftMoeError: the config names a folder as its base, or nothing; says how to name it.
    """
    name = config.base_model_name_or_path
    if not is_on_hub(name):
        said = f"its base is the local path {name!r}" if name else "it does not say what its base is"
        raise PeftMoeError(
            f"this mixture cannot be pushed: {said}, which nobody else could load. Name the base's Hub id "
            "first: model.peft_config[adapter].base_model_name_or_path = 'org/name' (in a saved folder: "
            "base_model_name_or_path in adapter_config.json). Nothing was uploaded"
        )


def update_card(
    folder: str | os.PathLike[str],
    config: MixtureFields,
    *,
    metrics: Mapping[str, Any] | str | os.PathLike[str] | None = None,
) -> Path:
    """Write our part of the card of a saved mixture.

    Args:
        folder: the mixture's.
        config: its own.
        metrics: figures to show, nested up to three deep, or a JSON file of such: a training's summary.json,
            a bake-off's results.json. They belong to the weights as they are: the next save leaves them out.

    Raises:
        PeftMoeError: the file of figures cannot be read, or holds none.
    """
    shown = _figures(metrics) if metrics is not None else []
    path = Path(folder) / CARD_FILE
    try:
        card = ModelCard.load(path, ignore_metadata_errors=True) if path.exists() else None
    except Exception:  # damaged metadata are written anew
        card = None
    old = card.text if card is not None else ""
    block = "\n".join([BEGIN, *_body(config, shown), END])
    if _OURS.search(old):
        text = _OURS.sub(lambda _: block, old)
    else:
        text = block if not old.strip() or _BLANK in old else f"{old.rstrip()}\n\n{block}"
    data = card.data.to_dict() if card is not None else {}
    made = ModelCard(f"---\n{ModelCardData(**_metadata(data, config)).to_yaml()}\n---\n\n{text.strip()}\n")
    # Beside and renamed: a reader never sees half a card.
    beside = path.with_suffix(".md.new")
    made.save(beside)
    os.replace(beside, path)
    return path


def _metadata(data: dict[str, Any], config: MixtureFields) -> dict[str, Any]:
    base = config.base_model_name_or_path
    tags = [tag for tag in data.get("tags") or [] if not str(tag).startswith("base_model:")]
    data = {**data, "library_name": "peft"}
    data.pop("base_model", None)
    if is_on_hub(base):
        data["base_model"] = base
        tags.append(f"base_model:adapter:{base}")
    data["tags"] = sorted({*tags, *_TAGS})
    return data


def _body(config: MixtureFields, figures: list[str]) -> Iterator[str]:
    base = config.base_model_name_or_path
    names = ", ".join(f"`{name}`" for name in config.expert_names)
    yield f"# A mixture of {config.num_experts} LoRA experts"
    yield f"\nTrained LoRA adapters of one base, gated by a router: {names}. Made with peft-moe.\n"
    yield "## Load it\n"
    yield from _snippet(config)
    yield f"\n## Base\n\n`{base or UNKNOWN}`; licence: {base_license(base)}.\n"
    yield "## Experts\n"
    yield from experts_table(config)
    yield "\nThe experts' weights are inside. Licences are what the experts' own cards said.\n"
    yield "## Router\n"
    yield f"- router: `{config.router}`"
    for name in _SETTINGS:
        value = getattr(config, name)
        idle = name == "router_below_tap" and config.router_scope != "model"
        if value not in (None, [], False) and (name, value) not in _USUAL and not idle:
            yield f"- {name}: `{value}`"
    if figures:
        yield "\n## Figures\n"
        yield from figures
    # PEFT looks for these two lines, and would add them below.
    yield f"\n### Framework versions\n\n- PEFT {peft.__version__}"


def _snippet(config: MixtureFields) -> Iterator[str]:
    auto = _AUTO.get(str(getattr(config.task_type, "value", config.task_type)), "AutoModel")
    yield "```python"
    yield "import peft_moe  # registers the method with PEFT; without it loading ends in KeyError: 'MOLORA'"
    yield "from peft import PeftModel"
    yield f"from transformers import {auto}\n"
    yield f'base = {auto}.from_pretrained("{config.base_model_name_or_path or "the base"}")'
    yield 'model = PeftModel.from_pretrained(base, "this folder or repository")'
    yield "```"


def experts_table(config: MixtureFields) -> Iterator[str]:
    """Lines of a Markdown table: name, source, licence and rank of each expert."""
    yield "| expert | source | licence | rank |"
    yield "|---|---|---|---|"
    for record in config.records():
        source = record.get("source")
        revision = f" at `{record['revision']}`" if record.get("revision") else ""
        said = "trained in this mixture"
        if source:
            # Where a folder lies on this machine is nobody's business.
            said = f"`{source}`{revision}" if is_on_hub(source) else f"a local folder, `{Path(source).name}`"
        ranks = {int(record.get("r", 8)), *(record.get("rank_pattern") or {}).values()}
        span = str(min(ranks)) if len(ranks) == 1 else f"{min(ranks)} to {max(ranks)}"
        yield f"| `{record['name']}` | {said} | {record.get('license') or UNKNOWN} | {span} |"


def base_license(base: str | None) -> str:
    """From the card in the base's folder, or in the Hub's cache on this machine; nothing is downloaded."""
    if not base:
        return UNKNOWN
    if os.path.isdir(base):
        return license_of(Path(base) / CARD_FILE) or UNKNOWN
    cached = try_to_load_from_cache(base, CARD_FILE) if is_on_hub(base) else None
    return (license_of(cached) if isinstance(cached, str) else None) or UNKNOWN


def _figures(metrics: Mapping[str, Any] | str | os.PathLike[str]) -> list[str]:
    if isinstance(metrics, Mapping):
        values: Any = metrics
    else:
        try:
            values = json.loads(Path(metrics).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise PeftMoeError(f"{os.fspath(metrics)} cannot be read as JSON: {error}") from error
    lines = list(_tables("", values)) if isinstance(values, Mapping) else []
    if not lines:
        raise PeftMoeError("metrics hold no figures; give names and numbers, such as {'heldout_loss': 1.23}")
    return lines


def _tables(name: str, values: Mapping[str, Any]) -> Iterator[str]:
    """Numbers of this level as a table; below it, tables by name."""
    numbers = {key: one for key, one in values.items() if is_number(one)}
    inner = {key: one for key, one in values.items() if isinstance(one, Mapping)}
    if numbers:
        yield f"\n**{name}**\n" if name else ""
        yield "| | |\n|---|---|"
        yield from (f"| {key} | {one:.6g} |" for key, one in numbers.items())
    rows = {key: one for key, one in inner.items() if one and all(map(is_number, one.values()))}
    if name and rows and len(rows) == len(inner):
        columns = list(dict.fromkeys(column for row in rows.values() for column in row))
        yield f"\n**{name}**\n"
        yield "| | " + " | ".join(columns) + " |"
        yield "|---" * (len(columns) + 1) + "|"
        for key, row in rows.items():
            yield f"| {key} | " + " | ".join(f"{row[c]:.6g}" if c in row else "" for c in columns) + " |"
        return
    for key, one in inner.items():
        inside = f"{name}, {key}" if name else str(key)
        if inside.count(", ") < _DEEPEST:
            yield from _tables(inside, one)
