"""Mixtures on quantised bases: one black-box wrapper serves them all.

bitsandbytes is always here; the others run where their packages are (QUANTISATION.md says which were).
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from support.batches import batch_for, labels_for, logits_of, texts
from support.quantised import QUANTISERS, base_of
from support.routing import choose, routers
from support.training import make_trainer, router_values, samples
from support.zoo import Zoo

from peft_moe import PeftMoeError
from peft_moe.tuner.layers.linear import MoLoraLayer

ROOT = Path(__file__).parents[2]
DATA = Dataset.from_list(samples(8))
TOP2 = "top2"
# float32 sums in another order; layers that round their inputs turn a last bit into a step of their own.
EXACT = {"atol": 1e-5, "rtol": 1e-5}
ROUNDED = {"atol": 0.15, "rtol": 0.0}
MOVED = 0.3


# Two of the four 4-bit kinds differ from the others in one setting each: enough for the long run.
LATER = ("fp4", "nf4, double")
KINDS = [pytest.param(n, marks=pytest.mark.slow) if n in LATER else n for n in QUANTISERS]


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_equalities(zoo: Zoo, kind: str, tmp_path: Path) -> None:
    batch = batch_for("llama", texts())
    bare = logits_of(base_of(zoo, kind), batch)
    assert (bare - logits_of(zoo.base("llama"), batch)).abs().max() > 1e-3  # it is quantised
    model = zoo.mixture("llama", TOP2, base=base_of(zoo, kind))
    mixed = logits_of(model, batch)
    assert (mixed - bare).abs().max() > MOVED
    with model.disable_adapter():
        assert torch.equal(logits_of(model, batch), bare)
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(base_of(zoo, kind), str(tmp_path)).eval()
    assert torch.equal(logits_of(loaded, batch), mixed)
    tolerance = EXACT if QUANTISERS[kind].exact else ROUNDED
    prompt = batch_for("llama", texts(lengths=(7,)))["input_ids"]
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    scored = model.generate(input_ids=prompt, output_logits=True, return_dict_in_generate=True, **options)
    whole = logits_of(model, {"input_ids": scored.sequences[:, :-1]})
    torch.testing.assert_close(torch.stack(scored.logits, 1), whole[:, -4:], **tolerance)
    choose(model, 0)
    plain = zoo.lora("llama", "wide", base_of(zoo, kind))
    torch.testing.assert_close(logits_of(model, batch), logits_of(plain, batch), **tolerance)


def test_routers_train_in_float32_and_nothing_else_does(zoo: Zoo, kind: str, tmp_path: Path) -> None:
    model = zoo.mixture("llama", TOP2, base=base_of(zoo, kind))
    before = router_values(model)
    logits_of(model, batch_for("llama", texts()))  # an eval pass first: nothing may be lost by it
    if QUANTISERS[kind].trains:
        trainer = make_trainer("sft", model, DATA, tmp_path, max_steps=3, learning_rate=1e-4)
        model = trainer.model
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    assert len(names) == 2 * len(list(routers(model)))
    assert all("molora_router" in n for n in names)
    if QUANTISERS[kind].trains:
        trainer.train()
    else:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
        batch = batch_for("llama", texts())
        for _ in range(3):
            model.train()(**batch, labels=labels_for("llama", batch)).loss.backward()
            optimizer.step()
    assert {p.dtype for _, r in routers(model) for p in r.parameters()} == {torch.float32}
    moved = (router_values(model) - before).abs()
    # A bf16 value of 0.1 moves by 5e-4 or not at all; Adam goes about 1e-4 a step.
    assert (moved > 0).float().mean() > 0.99
    assert moved.max() < 1e-3


def test_merging_reports_what_it_costs_or_is_refused(zoo: Zoo, kind: str) -> None:
    batch = batch_for("llama", texts())
    base = base_of(zoo, kind)
    bare = logits_of(base, batch)
    model = zoo.mixture("llama", "uniform", base=base)
    exact = logits_of(model, batch)
    if QUANTISERS[kind].merge == "refused":
        with pytest.raises(PeftMoeError, match="nothing can be merged; serve the mixture unmerged"):
            model.merge_adapter()
        assert torch.equal(logits_of(model, batch), exact)  # nor was anything touched
        return
    with pytest.warns(UserWarning, match=r"packing 21 weights again") as caught:
        merged = model.merge_and_unload()
    found = re.search(r"error of (\d+\.\d)% .* (\d+\.\d)% in ", str(caught[0].message))
    assert found
    # Measured anew for one layer: the base's own rounding is part of what is packed again.
    assert 0 < float(found[1]) <= float(found[2]) < 150
    after = logits_of(merged, batch)
    assert not torch.equal(after, bare)
    # The error that is reported is in the weights; of the outputs it leaves more than it takes.
    assert (after - exact).norm() < 1.5 * (exact - bare).norm()


def test_the_reported_error_is_that_of_the_weights(zoo: Zoo) -> None:
    """For one layer by hand, with bitsandbytes' own functions."""
    bnb = pytest.importorskip("bitsandbytes")
    wide = {"wide": zoo.experts("llama")["wide"]}
    targets = ["layers.1.mlp.up_proj"]
    base = base_of(zoo, "nf4")
    with pytest.warns(UserWarning, match="that target_modules leaves out"):
        model = zoo.mixture("llama", "uniform", base=base, experts=wide, target_modules=targets)
    layer = next(m for m in model.modules() if isinstance(m, MoLoraLayer))
    before = bnb.functional.dequantize_4bit(layer.base_layer.weight.data, layer.base_layer.weight.quant_state)
    change = layer.get_delta_weight("default").float()
    with pytest.warns(UserWarning, match="packing 1 weights again") as caught:
        model.merge_adapter()
    packed_again = layer.base_layer.weight
    after = bnb.functional.dequantize_4bit(packed_again.data, packed_again.quant_state)
    error = (after - (before + change)).norm() / change.norm()
    reported = re.search(r"error of (\d+\.\d)%", str(caught[-1].message))
    assert reported
    assert float(reported[1]) / 100 == pytest.approx(error.item(), abs=1e-3)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_gates_that_read_the_input_are_not_merged(zoo: Zoo, kind: str) -> None:
    model = zoo.mixture("llama", TOP2, base=base_of(zoo, kind))
    expected = logits_of(model, batch_for("llama", texts()))
    with pytest.raises(PeftMoeError, match="routes by its input, so it cannot be merged"):
        model.merge_and_unload()
    assert torch.equal(logits_of(model, batch_for("llama", texts())), expected)


def test_a_plain_base_reports_nothing(zoo: Zoo) -> None:
    model = zoo.mixture("llama", "uniform")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.merge_adapter(safe_merge=True)
        model.unmerge_adapter()


def test_the_table_of_documents_names_all_of_them() -> None:
    table = (ROOT / "QUANTISATION.md").read_text()
    for name, quantiser in QUANTISERS.items():
        row = next((line for line in table.splitlines() if line.startswith(f"| {name} |")), "")
        assert row, f"QUANTISATION.md has no row for {name}"
        assert quantiser.merge in row
        assert ("Trainer: yes" in row) == quantiser.trains
