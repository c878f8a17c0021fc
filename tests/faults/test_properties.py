"""Properties of what may be damaged: any bit, any cut, any lost key, any value of any field.

25 examples each at every push, the same ones; ``HYPOTHESIS_PROFILE=long`` draws 10,000 (PEFT_MOE_EXAMPLES).
"""

from __future__ import annotations

import contextlib
import json
import shutil
import string
import struct
import tempfile
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from support.adapters import randomise
from support.batches import logits_of
from support.routing import choose
from support.zoo import Zoo
from torch import nn

from faults.harness import BATCH, CONFIG, WEIGHTS, Bench, edit_bytes, edit_tensors, flipped
from peft_moe import MoLoraConfig, PeftMoeError, load_mixture
from peft_moe.experts.spec import RESERVED_NAMES
from peft_moe.io import atomic as new_folder


class Damaged:
    """Two saved mixtures, one with frozen and one with training experts, and bases that are never harmed."""

    def __init__(self, zoo: Zoo, folder: Path) -> None:
        bench = Bench(zoo, folder)
        self.base = bench.base
        self.folders = {"frozen": bench.mixture, "learning": bench.learning}
        self.keys = {name: sorted(load_file(f / WEIGHTS)) for name, f in self.folders.items()}
        self.expected = {n: self._logits(f) for n, f in self.folders.items()}
        self.names = list(self.base.state_dict())

    def _logits(self, folder: Path) -> torch.Tensor:
        model = load_mixture(self.base, folder).eval()
        logits = logits_of(model, BATCH)
        model.unload()
        return logits

    @contextlib.contextmanager
    def copy(self, kind: str) -> Iterator[Path]:
        with tempfile.TemporaryDirectory() as folder:
            shutil.copytree(self.folders[kind], Path(folder) / kind)
            yield Path(folder) / kind

    def refused(self, folder: Path) -> str | None:
        """What is said of a folder; None if it loads, and then it must compute what it did before."""
        kind = folder.name
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                logits = self._logits(folder)
            except PeftMoeError as error:
                assert list(self.base.state_dict()) == self.names
                return str(error)
        assert torch.equal(logits, self.expected[kind])
        return None


@pytest.fixture(scope="module")
def damaged(zoo: Zoo, tmp_path_factory: pytest.TempPathFactory) -> Damaged:
    return Damaged(zoo, tmp_path_factory.mktemp("damaged"))


KINDS = st.sampled_from(["frozen", "learning"])


def payload(data: bytes) -> int:
    """Where the tensors' bytes begin."""
    return 8 + int(struct.unpack("<Q", data[:8])[0])


@given(kind=KINDS, share=st.floats(0, 1, exclude_max=True))
def test_any_flipped_bit_of_a_payload_is_caught(damaged: Damaged, kind: str, share: float) -> None:
    with damaged.copy(kind) as folder:
        data = (folder / WEIGHTS).read_bytes()
        start = 8 * payload(data)
        edit_bytes(folder / WEIGHTS, lambda d: flipped(d, start + int(share * (8 * len(d) - start))))
        assert damaged.refused(folder) is not None


@given(kind=KINDS, share=st.floats(0, 1, exclude_max=True))
def test_a_flipped_bit_of_a_header_is_caught_or_harmless(damaged: Damaged, kind: str, share: float) -> None:
    with damaged.copy(kind) as folder:
        edit_bytes(folder / WEIGHTS, lambda d: flipped(d, int(share * 8 * payload(d))))
        damaged.refused(folder)


@given(kind=KINDS, share=st.floats(0, 1, exclude_max=True))
def test_a_cut_anywhere_is_refused_by_the_name_of_the_file(damaged: Damaged, kind: str, share: float) -> None:
    with damaged.copy(kind) as folder:
        edit_bytes(folder / WEIGHTS, lambda d: d[: int(share * len(d))])
        assert WEIGHTS in str(damaged.refused(folder))


@given(kind=KINDS, data=st.data())
def test_any_lost_tensors_are_noticed(damaged: Damaged, kind: str, data: st.DataObject) -> None:
    lost = data.draw(st.sets(st.sampled_from(damaged.keys[kind]), min_size=1))
    with damaged.copy(kind) as folder:
        edit_tensors(folder, lambda t: [t.pop(key) for key in lost])
        assert damaged.refused(folder) is not None


@given(kind=KINDS, data=st.data(), value=st.sampled_from(["nan", "inf", "-inf"]))
def test_a_value_that_is_no_number_is_noticed(
    damaged: Damaged, kind: str, data: st.DataObject, value: str
) -> None:
    key = data.draw(st.sampled_from(damaged.keys[kind]))
    with damaged.copy(kind) as folder:

        def poison(tensors: dict[str, torch.Tensor]) -> None:
            flat = tensors[key].view(-1)
            flat[data.draw(st.integers(0, len(flat) - 1))] = float(value)

        edit_tensors(folder, poison)
        assert damaged.refused(folder) is not None


@given(kind=KINDS, one=st.data())
def test_two_tensors_in_each_other_s_place_are_noticed(
    damaged: Damaged, kind: str, one: st.DataObject
) -> None:
    """Equal shapes, other layer: nothing but the digests can tell."""
    tensors = load_file(damaged.folders[kind] / WEIGHTS)
    shapes: dict[tuple[int, ...], list[str]] = {}
    for key in damaged.keys[kind]:
        shapes.setdefault(tuple(tensors[key].shape), []).append(key)
    alike = one.draw(st.sampled_from([keys for keys in shapes.values() if len(keys) > 1]))
    first, second = one.draw(st.permutations(alike))[:2]
    with damaged.copy(kind) as folder:
        edit_tensors(folder, lambda t: t.update({first: t[second].clone(), second: t[first].clone()}))
        assert torch.equal(tensors[first], tensors[second]) or damaged.refused(folder) is not None


@given(share=st.floats(0, 1, exclude_max=True))
def test_a_flipped_bit_of_a_config_never_escapes(damaged: Damaged, share: float) -> None:
    """Refused by our exception, or read as another config that is right in itself."""
    with damaged.copy("frozen") as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        edit_bytes(folder / CONFIG, lambda d: flipped(d, int(share * 8 * len(d))))
        with contextlib.suppress(PeftMoeError):
            load_mixture(damaged.base, folder).unload()
        assert list(damaged.base.state_dict()) == damaged.names


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)
# Read by PEFT's base classes before us.
THEIRS = {"peft_type", "task_type", "auto_mapping", "peft_version", "revision", "inference_mode"}


@given(data=st.data(), value=JSON)
def test_no_value_of_any_field_escapes(damaged: Damaged, data: st.DataObject, value: Any) -> None:
    values = json.loads((damaged.folders["frozen"] / CONFIG).read_text())
    name = data.draw(st.sampled_from(sorted(set(values) - THEIRS)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with contextlib.suppress(PeftMoeError):
            MoLoraConfig(**{**values, name: value})


@given(data=st.data(), value=JSON)
def test_no_value_of_any_field_of_a_record_escapes(damaged: Damaged, data: st.DataObject, value: Any) -> None:
    values = json.loads((damaged.folders["frozen"] / CONFIG).read_text())
    first = values["experts"][0]
    name = data.draw(st.sampled_from([*first, "new"]))
    records = [{**first, name: value}, *values["experts"][1:]]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with contextlib.suppress(PeftMoeError):
            MoLoraConfig(**{**values, "experts": records}).specs()


# -- what fits is mixed exactly ----------------------------------------------------------------------

TARGETS = ("q_proj", "v_proj", "up_proj")
SCALES = st.fixed_dictionaries(
    {
        "r": st.integers(1, 64),
        "lora_alpha": st.integers(1, 128),
        "use_rslora": st.booleans(),
        "target_modules": st.sets(st.sampled_from(TARGETS), min_size=1).map(sorted),
        "rank_pattern": st.dictionaries(st.sampled_from(TARGETS), st.integers(1, 16), max_size=2),
        "alpha_pattern": st.dictionaries(st.sampled_from(TARGETS), st.integers(1, 64), max_size=2),
    }
)


@cache
def base_of(zoo: Zoo) -> nn.Module:
    return zoo.base("llama")


@given(experts=st.lists(SCALES, min_size=1, max_size=3), data=st.data())
def test_each_expert_alone_is_peft_with_that_adapter(
    zoo: Zoo, experts: list[dict[str, Any]], data: st.DataObject
) -> None:
    """Whatever ranks, scales and targets the others have."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number, lora in enumerate(experts):
            alone = get_peft_model(base_of(zoo), LoraConfig(**lora))
            randomise(alone, number)
            alone.save_pretrained(f"{folder}/e{number}")
            alone.unload()
        chosen = data.draw(st.integers(0, len(experts) - 1))
        alone = PeftModel.from_pretrained(base_of(zoo), f"{folder}/e{chosen}").eval()
        wanted = logits_of(alone, BATCH)
        alone.unload()
        sources = {f"e{number}": f"{folder}/e{number}" for number in range(len(experts))}
        model = get_peft_model(base_of(zoo), MoLoraConfig(experts=sources)).eval()
        choose(model, chosen)
        found = logits_of(model, BATCH)
        model.unload()
    # Sums of at most 192 ranks in another order, in float32.
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


# -- files and folders -------------------------------------------------------------------------------

NAMES = st.sampled_from(["a", "b", "c", "sub/a", "sub/b"])
FOLDERS = st.dictionaries(NAMES, st.binary(max_size=20), max_size=4)


def put(folder: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def found(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@given(old=st.none() | FOLDERS, new=FOLDERS, fails=st.booleans(), swap=st.booleans())
def test_a_folder_is_replaced_as_a_whole_or_not_at_all(
    old: dict[str, bytes] | None, new: dict[str, bytes], fails: bool, swap: bool
) -> None:
    with tempfile.TemporaryDirectory() as parent, pytest.MonkeyPatch.context() as patch:
        place = Path(parent) / "place"
        if old is not None:
            place.mkdir()
            put(place, old)
        if not swap:
            patch.setattr(new_folder, "_exchange", lambda one, other: False)
        with contextlib.suppress(KeyError), new_folder.new_folder(place) as beside:
            put(beside, new)
            if fails:
                raise KeyError
        assert [p.name for p in Path(parent).iterdir()] == (["place"] if place.exists() else [])
        assert place.exists() is (not fails or old is not None)
        if place.exists():
            assert found(place) == (old if fails else new)


@given(name=st.text(max_size=70))
def test_any_name_of_an_expert_is_plain_or_refused(damaged: Damaged, name: str) -> None:
    values = json.loads((damaged.folders["frozen"] / CONFIG).read_text())
    assume(name not in [record["name"] for record in values["experts"]])
    records = [values["experts"][0] | {"name": name}, *values["experts"][1:]]
    config = None
    with contextlib.suppress(PeftMoeError):
        config = MoLoraConfig(**{**values, "experts": records})
    plain = 0 < len(name) <= 64 and set(name) <= set(string.ascii_letters + string.digits + "_-")
    if config is None:
        assert not plain or name.lower() in {*RESERVED_NAMES, "narrow"}
    else:
        assert plain
        assert config.expert_names[0] == name
