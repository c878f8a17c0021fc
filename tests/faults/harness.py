"""One fault, one row: how to spoil a sound thing, what a user then does, and what the refusal must say.

After each refusal the model that was at hand has the same modules, weights, hooks and output, the same
parameters train, and the disk holds the same bytes as before.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from support.batches import batch_for, logits_of, texts
from support.zoo import Zoo
from torch import Tensor, nn

from peft_moe import MoLoraConfig, PeftMoeError, load_mixture

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
BATCH = batch_for("llama", texts())


class Bench:
    """What a row may spoil: two adapters, a saved mixture of them, the base, the arguments."""

    def __init__(self, zoo: Zoo, folder: Path) -> None:
        self.zoo, self.folder = zoo, folder
        self.base: nn.Module = zoo.base("llama")
        self.fields: dict[str, Any] = {}
        self._live: PeftModel | None = None

    @property
    def adapter(self) -> Path:
        """A copy of a trained adapter, the first expert of what :func:`mix` makes."""
        return self._copied("wide", self.zoo.experts("llama")["wide"])

    @property
    def mixture(self) -> Path:
        """A saved mixture: two frozen experts, a linear router in each layer."""
        return self._copied("mixture", _saved(self.zoo, "frozen"))

    @property
    def learning(self) -> Path:
        """A saved mixture whose experts train as well."""
        return self._copied("learning", _saved(self.zoo, "learning", train_experts=True))

    @property
    def live(self) -> PeftModel:
        """A model that carries a mixture already."""
        if self._live is None:
            self._live = _mixture(self.zoo, self.base)
        return self._live

    def _copied(self, name: str, source: str | Path) -> Path:
        if not (self.folder / name).exists():
            shutil.copytree(source, self.folder / name)
        return self.folder / name

    @property
    def watched(self) -> nn.Module:
        """What must be as it was after the refusal."""
        return self.base if self._live is None else self._live


def _mixture(zoo: Zoo, base: nn.Module, **fields: Any) -> PeftModel:
    experts = {name: zoo.experts("llama")[name] for name in ("wide", "narrow")}
    torch.manual_seed(3)
    config = MoLoraConfig(experts=experts, router="linear", router_init_std=0.5, **fields)
    return get_peft_model(base, config).eval()


def _saved(zoo: Zoo, name: str, **fields: Any) -> Path:
    folder = zoo.folder / "faults" / name
    if not folder.exists():
        _mixture(zoo, zoo.base("llama"), **fields).save_pretrained(str(folder))
    return folder


def edit(folder: Path, **values: Any) -> None:
    """Set fields of a folder's config."""
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def edit_record(folder: Path, **values: Any) -> None:
    """Set fields of a saved mixture's first expert."""
    records = json.loads((folder / CONFIG).read_text())["experts"]
    edit(folder, experts=[records[0] | values, *records[1:]])


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors of a folder's weights."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def edit_bytes(path: Path, change: Callable[[bytes], bytes]) -> None:
    """Change the bytes of a file."""
    path.write_bytes(change(path.read_bytes()))


def flipped(data: bytes, bit: int) -> bytes:
    """The same bytes with one bit turned."""
    at = bit // 8
    return data[:at] + bytes([data[at] ^ (1 << bit % 8)]) + data[at + 1 :]


def mix(bench: Bench) -> Any:
    """A user makes a mixture of trained adapters."""
    experts = {"first": str(bench.adapter), "second": bench.zoo.experts("llama")["narrow"]}
    return get_peft_model(bench.base, MoLoraConfig(**{"experts": experts, **bench.fields}))


def load(bench: Bench) -> Any:
    """A user loads a saved mixture with PEFT."""
    return PeftModel.from_pretrained(bench.base, str(bench.mixture), **bench.fields)


def load_safely(bench: Bench) -> Any:
    """A user loads a saved mixture with ``load_mixture``."""
    return load_mixture(bench.base, bench.mixture, **bench.fields)


def load_learning(bench: Bench) -> Any:
    """The same, of a mixture whose experts train."""
    return PeftModel.from_pretrained(bench.base, str(bench.learning), **bench.fields)


def load_over(bench: Bench) -> Any:
    """A user, or a trainer that resumes, loads over a mixture that is there."""
    return bench.live.load_adapter(str(bench.mixture), adapter_name="default")


def load_second(bench: Bench) -> Any:
    """A user loads a further mixture into a model that has one."""
    return bench.live.load_adapter(str(bench.mixture), adapter_name="second")


@dataclass(frozen=True)
class Row:
    """One case of a fault.

    Attributes:
        fault: id in the list of faults, such as "A7".
        case: what is special about it.
        spoil: makes the damage.
        words: what the message must hold.
        act: what the user does.
    """

    fault: str
    case: str
    spoil: Callable[[Bench], object]
    words: tuple[str, ...]
    act: Callable[[Bench], Any] = field(default=load)

    @property
    def id(self) -> str:
        return f"{self.fault} {self.case}"


def parametrized(rows: list[Row]) -> Any:
    """A decorator; the ids of rows must differ."""
    assert len({row.id for row in rows}) == len(rows)
    return pytest.mark.parametrize("row", rows, ids=[row.id for row in rows])


def look_at(bench: Bench) -> tuple[Any, ...]:
    """Everything that a refusal must leave alone."""
    model = bench.watched
    tree = [
        (name, type(m), id(m), len(m._forward_pre_hooks), len(m._forward_hooks))
        for name, m in model.named_modules()
    ]
    trains = {name: p.requires_grad for name, p in model.named_parameters()}
    config = {name: str(c.to_dict()) for name, c in getattr(model, "peft_config", {}).items()}
    files = {p: p.is_file() and p.read_bytes() for p in sorted(bench.folder.rglob("*"))}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    return tree, trains, config, files, state, logits_of(model, BATCH)


def check_refused(row: Row, bench: Bench) -> str:
    """Spoil, act, and hold the refusal to what every refusal promises.

    Returns:
        The message.
    """
    row.spoil(bench)
    _ = (
        bench.mixture if row.act in (load, load_safely, load_second, load_over) else None
    )  # copied before the look
    _ = bench.adapter if row.act is mix else None
    _ = bench.learning if row.act is load_learning else None
    _ = bench.live if row.act in (load_second, load_over) else None
    before = look_at(bench)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(PeftMoeError) as caught:
            row.act(bench)
    message = str(caught.value)
    assert [word for word in row.words if word not in message] == [], message
    assert len(message) < 900, message
    after = look_at(bench)
    for one, other in zip(before[:4], after[:4], strict=True):
        assert one == other
    assert before[4].keys() == after[4].keys()
    assert all(torch.equal(value, after[4][name]) for name, value in before[4].items())
    assert torch.equal(before[5], after[5])
    return message
