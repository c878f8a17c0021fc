"""Every method of ``fit_router`` in every scope, against plain float64 sums over one text at a time."""

from __future__ import annotations

import gc
import random
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from support.batches import logits_of, pad
from support.routing import routers
from support.training import make_trainer, router_values, samples, tokenizer
from support.zoo import Zoo
from torch import Tensor, nn
from torch.nn import Parameter
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from peft_moe import MoLoraConfig, PeftMoeError, routing_inputs
from peft_moe.fitting import FitReport, fit_router
from peft_moe.fitting.router_inputs import InputReader
from peft_moe.fitting.samples import batches, labelled_rows
from peft_moe.fitting.sufficient_statistics import InputStatistics
from peft_moe.fitting.token_rows import Row, TokenRows
from peft_moe.tuner.layers.linear import MoLoraLayer

ROWS = samples(24)  # domains wide, narrow, upper, weather; the last is no expert's
NAMES = ["wide", "narrow", "upper", "weather"]
HARD = {"top_k": 1, "straight_through": True, "null_expert": True}
SCOPES: dict[str, dict[str, Any]] = {
    "module, token": {"router_scope": "module", "router_granularity": "token"},
    "module, prompt": {"router_scope": "module", "router_granularity": "sequence"},
    "block, token": {"router_scope": "block", "router_granularity": "token"},
    "block, prompt": {"router_scope": "block", "router_granularity": "sequence"},
    "model, token": {"router_scope": "model", "router_tap": 2, "router_granularity": "token"},
    "model, running": {"router_scope": "model", "router_tap": 2, "router_granularity": "running"},
    "block, running": {"router_scope": "block", "router_granularity": "running"},
    "model, prompt": {"router_scope": "model", "router_tap": 2, "router_granularity": "sequence"},
}


def build(zoo: Zoo, router: str = "linear", **fields: Any) -> PeftModel:
    base = fields.pop("base", None)
    config = MoLoraConfig(
        experts=zoo.experts("llama"), router=router, task_type="CAUSAL_LM", **{**HARD, **fields}
    )
    return get_peft_model(zoo.base("llama") if base is None else base, config).eval()


def fit(model: PeftModel, data: Any = ROWS, **settings: Any) -> FitReport:
    return fit_router(model, data, tokenizer(), **{"progress": False, **settings})


def watched(scope: str, name: str) -> str:
    """Which layer of the plain base shows a router its input: the first that a block calls."""
    first = {"self_attn": "q_proj", "mlp": "gate_proj"}
    return f"{name}.{first[name.rpartition('.')[2]]}" if scope.startswith("block") else name


def followed(x: Tensor, prompt: int, half_life: float = 12.0) -> Tensor:
    """The prompt's mean, once, and a running mean behind it: all of one half-life, then two of each."""
    share, running = 0.5 ** (1 / half_life), x[:prompt].mean(0)
    out = [running]
    for number, token in enumerate(x[prompt:], start=1):
        running = share * running + (1 - share) * token
        out += [running] if number <= half_life or number % (half_life / 2) == 0 else []
    return torch.stack(out)


def plain_inputs(zoo: Zoo, scope: str, name: str, behind: str) -> tuple[Tensor, list[int]]:
    """A router's inputs, caught in plain models (no mixture), one unpadded text at a time: [M, I] float64."""
    features, labels = [], []
    whole = not scope.endswith("prompt")
    for row in ROWS:
        text = row["prompt"] + (row["completion"] if whole else "")
        own = behind == "own" and row["domain"] != "weather"
        model: Any = zoo.lora("llama", row["domain"]) if own else zoo.base("llama")
        if scope.startswith("model"):
            with torch.no_grad():
                ids = torch.tensor([tokenizer()(text)["input_ids"]])
                x = zoo.base("llama")(ids, output_hidden_states=True).hidden_states[2][0]
        else:
            layer = (model.get_base_model() if own else model).get_submodule(watched(scope, name))
            seen: list[Tensor] = []
            handle = layer.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0][0]))
            logits_of(model, {"input_ids": torch.tensor([tokenizer()(text)["input_ids"]])})
            handle.remove()
            x = seen[0]
        x = x.double()
        if scope.endswith("running"):
            x = followed(x, len(row["prompt"]))
        features.append(x if whole else x.mean(0, keepdim=True))
        labels += [NAMES.index(row["domain"])] * len(features[-1])
    return torch.cat(features), labels


def one_router(model: PeftModel, scope: str) -> tuple[str, Any]:
    """A router in the last layer, where everything below it matters."""
    found = dict(routers(model))
    parts = {"module": "layers.2.mlp.up_proj.", "block": "layers.2.mlp.", "model": ""}
    wanted = parts[scope.partition(",")[0]]
    full = next(name for name in found if wanted in name)
    name = full.removeprefix("base_model.model.").split(".molora_router")[0].removesuffix(".block_router")
    return name, found[full]


PLACES = [(scope, "base") for scope in SCOPES] + [("module, token", "own"), ("block, prompt", "own")]


@pytest.mark.parametrize(("scope", "behind"), PLACES)
def test_ridge_is_the_closed_form_on_the_true_inputs(zoo: Zoo, scope: str, behind: str) -> None:
    model = build(zoo, **SCOPES[scope])
    report = fit(model, method="ridge", regularisation=0.3, inputs=behind)
    name, router = one_router(model, scope)
    x, labels = plain_inputs(zoo, scope, name, behind)
    assert report.samples == len(x)
    assert report.per_column == {"wide": 6, "narrow": 6, "upper": 6, "null": 6}
    h = x.numpy() - x.numpy().mean(0)
    y = np.eye(4)[labels]
    penalty = 0.3 * np.mean(np.sum(h * h, axis=0)) * np.eye(h.shape[1])
    wanted = np.linalg.inv(h.T @ h + penalty) @ (h.T @ (y - y.mean(0)))
    bias = y.mean(0) - x.numpy().mean(0) @ wanted
    # InputStatistics are float32 hidden states of two implementations; the weights are of size 0.1.
    torch.testing.assert_close(
        router.scorer.weight.double(), torch.from_numpy(wanted.T), atol=2e-5, rtol=1e-3
    )
    torch.testing.assert_close(router.scorer.bias.double(), torch.from_numpy(bias), atol=2e-5, rtol=1e-3)
    right = ((x.numpy() @ wanted + bias).argmax(1) == np.array(labels)).mean()
    of_one = next(share for key, share in report.accuracies.items() if key in ("shared_router.default", name))
    assert of_one == pytest.approx(right, abs=1.5 / len(x))


def test_what_the_layers_below_do_matters(zoo: Zoo) -> None:
    weights = []
    for behind in ("base", "own"):
        model = build(zoo)
        fit(model, method="ridge", inputs=behind)
        weights.append({name: router.scorer.weight.detach() for name, router in routers(model)})
    same = {name for name in weights[0] if torch.allclose(weights[0][name], weights[1][name], atol=1e-4)}
    assert same == {name for name in weights[0] if "layers.0.self_attn" in name and "o_proj" not in name}


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("router", ["centroid", "linear", "phatgoose"])
def test_centroids_are_means_of_each_experts_texts(zoo: Zoo, scope: str, router: str) -> None:
    model = build(zoo, router, router_input_norm=False, **SCOPES[scope])
    fit(model, method="centroid", batch_size=5, inputs="base")
    name, found = one_router(model, scope)
    x, labels = plain_inputs(zoo, scope, name, "base")
    means = torch.stack([x[torch.tensor(labels) == column].mean(0) for column in range(4)])
    origin = means.mean(0)
    wanted = torch.stack([(mean - origin) / (mean - origin).norm() for mean in means])
    close = {"atol": 1e-4, "rtol": 1e-3}  # hidden states are of size 10, in float32; differences of means
    torch.testing.assert_close(found.scorer.weight.double(), wanted, **close)
    if router == "centroid":
        torch.testing.assert_close(found.scorer.origin.double(), origin, **close)
    if router == "linear":
        torch.testing.assert_close(found.scorer.bias.double(), -wanted @ origin, **close)


def test_layers_below_a_tap_follow_the_prompt(zoo: Zoo) -> None:
    """Such a router has two inputs: prompts of the bare base, and tokens behind the right expert."""
    model = build(zoo, router_scope="model", router_tap=2, router_below_tap="prompt")
    report = fit(model, method="centroid")
    pooled, pooled_labels = plain_inputs(zoo, "model, prompt", "", "base")
    tokens, labels = [], []
    for row in ROWS:
        own = row["domain"] != "weather"
        plain: Any = zoo.lora("llama", row["domain"]) if own else zoo.base("llama")
        ids = torch.tensor([tokenizer()(row["prompt"] + row["completion"])["input_ids"]])
        with torch.no_grad():
            tokens.append(plain(ids, output_hidden_states=True).hidden_states[2][0].double())
        labels += [NAMES.index(row["domain"])] * ids.shape[1]
    x, every = torch.cat([pooled, *tokens]), torch.tensor(pooled_labels + labels)
    assert report.samples == len(x)
    means = torch.stack([x[every == column].mean(0) for column in range(4)])
    unit = torch.nn.functional.normalize(means - means.mean(0), dim=-1)
    torch.testing.assert_close(next(routers(model))[1].scorer.weight.double(), unit, atol=1e-4, rtol=1e-3)


def test_prompts_describe_experts(zoo: Zoo) -> None:
    scope = "model, prompt"
    model = build(zoo, "centroid", router_input_norm=False, **SCOPES[scope])
    sides = {
        "wide": {"positive": ["abc", "bca=="], "negative": ["klm", "uvwxy"]},
        "narrow": {"positive": ["klmn"]},
        "upper": {"positive": ["uv", "xy="]},
        "anything else": {"positive": ["012", "."]},
    }
    report = fit(model, (), prompts=sides)
    assert report.per_column == {"wide": 2, "narrow": 1, "upper": 2, "null": 2}

    def mean(texts: list[str]) -> Tensor:
        rows = [torch.tensor([tokenizer()(text)["input_ids"]]) for text in texts]
        with torch.no_grad():
            states = [zoo.base("llama")(ids, output_hidden_states=True).hidden_states[2] for ids in rows]
        return torch.stack([state[0].double().mean(0) for state in states]).mean(0)

    positive = torch.stack([mean(side["positive"]) for side in sides.values()])
    wanted = positive - positive.mean(0)
    wanted[0] = positive[0] - mean(sides["wide"]["negative"])
    unit = torch.nn.functional.normalize(wanted, dim=-1)
    torch.testing.assert_close(next(routers(model))[1].scorer.weight.double(), unit, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("method", ["ridge", "centroid", "logistic"])
def test_batches_and_padding_do_not_matter(zoo: Zoo, method: str) -> None:
    left = tokenizer()
    left.padding_side = "left"

    def fitted(**settings: Any) -> Tensor:
        model = build(zoo, router_scope="block")
        fit_router(
            model, ROWS, settings.pop("encode", tokenizer()), method=method, progress=False, **settings
        )
        return router_values(model)

    # Sampled rows are the same as well, whatever the batches are.
    expected = fitted(max_rows=80)
    for settings in ({"encode": left}, {"batch_size": 1}, {"batch_size": 7}):
        tolerance = 2e-2 if method == "logistic" else 1e-4  # L-BFGS stops a little elsewhere
        torch.testing.assert_close(fitted(max_rows=80, **settings), expected, atol=tolerance, rtol=1e-3)
    if method == "logistic":
        assert (fitted(max_rows=80, seed=1) - expected).abs().max() > 0.1


@pytest.mark.parametrize("gram", [False, True])
def test_sums_do_not_grow_with_the_rows(gram: bool) -> None:
    inputs = InputStatistics(16, 4, gram=gram, keep=50)
    sizes = set()
    rows, labels = torch.randn(4000, 16), torch.randint(0, 4, (4000,))
    for part in range(40):
        inputs.add(rows[100 * part : 100 * part + 100], labels[100 * part : 100 * part + 100])
        held = [value for value in vars(inputs).values() if isinstance(value, Tensor)]
        sizes.add(sum(value.untyped_storage().nbytes() for value in held))
    assert len(sizes) == 1
    assert sizes.pop() <= InputStatistics.num_bytes(16, 4, gram=gram, keep=50)
    torch.testing.assert_close(inputs.sums[2], rows[labels == 2].double().sum(0))
    kept, of = inputs.sample()
    assert len(kept) == len(of) == 50
    places = [int((rows == row).all(-1).nonzero()) for row in kept]
    assert places == sorted(places)  # rows of the stream, each once, spread over all of it
    assert torch.equal(of, labels[places])
    assert min(places) < 1000 < 3000 < max(places)


def test_streaming_keeps_no_features(zoo: Zoo) -> None:
    """All live tensors, counted whenever a router gets its inputs."""
    model = build(zoo)
    config = model.peft_config["default"]
    layers = dict(routers(model))
    by_name = {m.name: m.molora_router["default"] for m in model.modules() if isinstance(m, MoLoraLayer)}
    assert len(by_name) == len(layers)

    def peak(copies: int) -> int:
        rows = labelled_rows(ROWS * copies, config, tokenizer(), completions=True)
        rows = TokenRows(Row(row.ids[:4], row.label, 4) for row in rows)  # batches of one size
        sizes: list[int] = []

        def take(name: str, features: Tensor, labels: Tensor) -> None:
            if name.endswith("layers.2.mlp.down_proj"):
                gc.collect()
                live = {
                    t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
                    for t in gc.get_objects()
                    if type(t) in (Tensor, Parameter) and t.device.type == "cpu"
                }
                sizes.append(sum(live.values()))

        reader = InputReader(model.get_base_model(), "default", config, "base")
        reader.stream(by_name, rows, take, batch_size=8, progress=False, title="")
        assert len(sizes) == 3 * copies
        return max(sizes)

    # A batch is 8 × 4 rows of up to 128 floats in each of 21 routers; 24 more batches would show.
    assert peak(9) - peak(1) < 10_000


def test_a_small_limit_reads_the_texts_several_times(zoo: Zoo) -> None:
    one, many = build(zoo), build(zoo)
    assert fit(one, method="ridge").passes == 1
    # Sums of a router of 64 inputs take 33 kB and its kept rows 140 kB; of one of 128 the double.
    report = fit(many, method="ridge", max_gigabytes=6e-4)
    assert 4 <= report.passes < len(report.accuracies) == 21
    torch.testing.assert_close(router_values(many), router_values(one), atol=1e-6, rtol=1e-5)


FITTED: dict[str, tuple[str, dict[str, Any]]] = {
    "ridge": ("ridge", {}),
    "running": ("logistic", {}),
    "centroid": ("centroid", {}),
    "hidden": ("centroid", {}),
    "cheap_embed": ("centroid", {}),
    "phatgoose": ("phatgoose", {"steps": 2}),
    "classifier": ("logistic", {"data": [row for row in ROWS if row["domain"] != "weather"]}),
    "context": ("logistic", {}),
}
READ = ["arrow", "spectr", "spectr_unit"]


def by_preset(zoo: Zoo, preset: str, base: nn.Module | None = None) -> PeftModel:
    """The preset as it is, fitted as it says."""
    config = MoLoraConfig(experts=zoo.experts("llama"), router=preset, task_type="CAUSAL_LM")
    model = get_peft_model(zoo.base("llama") if base is None else base, config).eval()
    if preset in FITTED:
        method, settings = FITTED[preset]
        known = ROWS if config.null_expert else [row for row in ROWS if row["domain"] != "weather"]
        report = fit(model, **{"data": known, **settings})
        assert report.method == method
        assert 0 <= report.training_accuracy <= 1
    return model


@pytest.mark.parametrize("preset", [*FITTED, *READ])
def test_saved_and_loaded_they_decide_alike(zoo: Zoo, preset: str, tmp_path: Path) -> None:
    batch = pad([torch.arange(3, 12), torch.arange(20, 26)])
    base = AutoModelForCausalLM.from_pretrained(zoo.saved_base("llama"))
    model = by_preset(zoo, preset, base)
    wanted = logits_of(model, batch)
    assert not torch.allclose(wanted, logits_of(zoo.base("llama"), batch))
    model.save_pretrained(str(tmp_path))
    for lazy in (False, True):
        loaded = PeftModel.from_pretrained(zoo.base("llama"), str(tmp_path), low_cpu_mem_usage=lazy)
        assert torch.equal(logits_of(loaded.eval(), batch), wanted)
        assert not [n for n, p in loaded.named_parameters() if p.requires_grad]
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(str(tmp_path)).eval(), batch), wanted)


@pytest.mark.parametrize("kind", ["bf16", "nf4"])
def test_narrow_bases(zoo: Zoo, kind: str) -> None:
    """Fits run on what such a base computes; the routers stay float32."""
    if kind == "nf4":
        pytest.importorskip("bitsandbytes")
    quant = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    how: dict[str, Any] = {"quantization_config": quant} if kind == "nf4" else {"dtype": torch.bfloat16}
    for preset in ("ridge", "hidden", "phatgoose", "spectr"):
        base = AutoModelForCausalLM.from_pretrained(zoo.saved_base("llama"), **how)
        model = by_preset(zoo, preset, base)
        values = [p for _, router in routers(model) for p in router.parameters()]
        assert {p.dtype for p in values} == {torch.float32}
        moved = [bool(p.abs().max() > 0) for p in values if p.numel()]
        assert sum(moved) >= 0.9 * len(moved)  # a router of absent experts alone keeps its zeros
        assert torch.isfinite(logits_of(model, pad([torch.arange(3, 12)]))).all()


@pytest.mark.parametrize("scope", ["module, token", "block, prompt", "model, token"])
def test_phatgoose_trains_each_vector_on_its_expert_alone(zoo: Zoo, scope: str) -> None:
    model = build(zoo, "phatgoose", **{**SCOPES[scope], "top_k": 2, "straight_through": False})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    wanted = {name: p.requires_grad for name, p in model.named_parameters()}
    report = fit(model.train(), steps=12, learning_rate=0.05, batch_size=6)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if ".molora_router." in name}
    assert {name: p.requires_grad for name, p in model.named_parameters()} == wanted
    assert all(p.grad is None for p in model.parameters())
    assert model.get_base_model().training
    assert all(last < first for first, last in report.losses.values())
    for name, router in routers(model):
        start = before[f"{name}.scorer.weight"]
        assert torch.equal(router.scorer.weight[3], start[3])  # the null expert's
        assert (router.scorer.weight[0] != start[0]).all()  # "wide" adapts all layers


def test_phatgoose_starts_with_half_of_the_expert(zoo: Zoo) -> None:
    model = build(zoo, "phatgoose", top_k=2, straight_through=False, null_expert=False)
    rows = [row for row in ROWS if row["domain"] != "weather"]
    report = fit(model, rows, steps=1, batch_size=6)
    for column, name in enumerate(NAMES[:3]):
        own = [row for row in rows if row["domain"] == name]
        ids = [torch.tensor(tokenizer()(row["prompt"] + row["completion"])["input_ids"]) for row in own]
        batch = pad(ids)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        for number, row in enumerate(own):
            labels[number, : len(row["prompt"])] = -100
        with torch.no_grad(), routing_inputs(gates=0.5 * torch.eye(3)[column : column + 1]):
            loss = model(**batch, labels=labels).loss
        assert report.losses[name][0] == pytest.approx(float(loss), rel=1e-5)


def test_phatgoose_is_reproducible(zoo: Zoo) -> None:
    values = []
    for seed in (0, 0, 1):
        model = build(zoo, "phatgoose", top_k=2, straight_through=False)
        fit(model, steps=3, batch_size=4, seed=seed)
        # Not the null expert's row, which nobody trains and which starts at random.
        values.append(torch.cat([router.scorer.weight[:3].flatten() for _, router in routers(model)]))
    assert torch.equal(values[0], values[1])
    assert not torch.equal(values[0], values[2])


def test_arrow_reads_trained_experts_again(zoo: Zoo) -> None:
    model = build(zoo, "arrow", null_expert=False, straight_through=False, top_k=2, train_experts=True)
    before = router_values(model)
    layer = next(
        m for m in model.modules() if isinstance(m, MoLoraLayer) and m.mixtures["default"].rank_map.ranks[0]
    )
    with torch.no_grad():
        layer.molora_A["default"].weight.copy_(torch.randn_like(layer.molora_A["default"].weight))
    assert torch.equal(router_values(model), before)
    assert fit_router(model, method="arrow").method == "arrow"
    ranks = layer.mixtures["default"].rank_map
    part = ranks.slices()[0]
    delta = layer.molora_B["default"].weight[part].T @ layer.molora_A["default"].weight[part]
    top = torch.linalg.svd(delta.detach().double()).Vh[0]
    cosine = layer.molora_router["default"].scorer.weight[0].double() @ top
    torch.testing.assert_close(cosine.abs(), torch.ones((), dtype=torch.float64), atol=1e-5, rtol=0)
    assert not torch.equal(router_values(model), before)


@pytest.mark.parametrize("preset", ["ridge", "hidden"])
def test_they_train_further(zoo: Zoo, preset: str, tmp_path: Path) -> None:
    config = {"router_label_loss_coef": 1.0, "null_expert": True}
    model = build(zoo, preset, straight_through=None, top_k=None, **config)
    fit(model)
    start = router_values(model)
    trainer = make_trainer("sft", model, Dataset.from_list(ROWS), tmp_path, max_steps=2, learning_rate=1e-3)
    trainer.train()
    # Two steps of Adam, of 1e-3 each, from where the fit ended.
    assert 0 < (router_values(model) - start).abs().max() < 3e-3


@pytest.mark.parametrize(
    ("router", "fields", "settings", "message"),
    [
        ("linear", {}, {"method": "ridges"}, "Did you mean 'ridge'"),
        ("linear", {}, {"inputs": "bare"}, r"inputs='bare' is not known.*Available: base, own"),
        ("linear", {}, {"method": "phatgoose"}, "fits a phatgoose router; this one is router='linear'"),
        ("linear", {}, {"method": "arrow"}, "router='linear' is not, use router='arrow'"),
        (
            "centroid",
            {},
            {"method": "ridge"},
            "fits a linear router; this one is router='centroid'.*centroid",
        ),
        ("centroid", {}, {"prompts": {"wides": {"positive": ["a"]}}, "null": False}, "Did you mean 'wide'"),
        ("centroid", {}, {"prompts": {"wide": {"positiv": ["a"]}}}, "Did you mean 'positive'"),
        ("centroid", {}, {"prompts": {"wide": {"positive": "a"}}}, "give a list of prompts"),
        ("linear", {}, {"prompts": {"wide": {"positive": ["a"]}}, "method": "ridge"}, "give data"),
        ("linear", {}, {"max_rows": 5, "method": "logistic"}, "raise max_rows"),
    ],
)
def test_refusals(zoo: Zoo, router: str, fields: Any, settings: Any, message: str) -> None:
    if settings.pop("null", True) is False:
        fields = {**fields, "null_expert": False}
    model = build(zoo, router, **fields)
    before = router_values(model)
    with pytest.raises(PeftMoeError, match=message):
        fit(model, **settings)
    assert torch.equal(router_values(model), before)


def test_an_inactive_mixture_is_refused(zoo: Zoo) -> None:
    model = build(zoo)
    model.add_adapter("other", MoLoraConfig(experts=zoo.experts("llama"), task_type="CAUSAL_LM", **HARD))
    with pytest.raises(PeftMoeError, match=r"set_adapter\('other'\) first"):
        fit(model, adapter_name="other")
    model.set_adapter("other")
    assert fit(model, adapter_name="other", method="centroid").passes == 1


def test_shared_experts_are_on_while_inputs_are_read(zoo: Zoo) -> None:
    model = build(zoo, shared_experts=["wide"])
    found = {}
    for inputs in ("own", "base"):
        reader = InputReader(model.get_base_model(), "default", model.peft_config["default"], inputs)
        found[inputs] = reader._gates(torch.tensor([0, 1, 2])).tolist()
    # Columns are narrow, upper, null; gates are wide, narrow, upper.
    assert found["own"] == [[1, 1, 0], [1, 0, 1], [1, 0, 0]]
    assert found["base"] == [[1, 0, 0]] * 3
    assert fit(model, method="ridge").per_column == {"narrow": 6, "upper": 6, "null": 12}


def test_rows_of_tokens_cost_memory_by_the_row_and_not_by_the_token() -> None:
    """Ten times the tokens: the same memory, where lists of numbers take 36 bytes for each."""

    def grown(length: int) -> int:
        gc.collect()
        tracemalloc.start()
        try:
            made = (Row(list(range(1000, 1000 + length)), n % 3, length // 2) for n in range(2000))
            rows = TokenRows(made)
            gc.collect()
            return tracemalloc.get_traced_memory()[0] + 0 * len(rows)
        finally:
            tracemalloc.stop()

    short, long = grown(20), grown(200)
    assert long < short + 20_000  # 360,000 tokens more, which would be 13 MB
    assert long < 2000 * 60


def test_rows_of_tokens_are_read_back_in_any_order() -> None:
    draw = random.Random(0)
    made = [Row([draw.randrange(2**31) for _ in range(draw.randint(1, 9))], n % 5, n % 3) for n in range(50)]
    rows = TokenRows(made[:30])
    assert rows[7] == made[7]  # reading in between does not disturb writing
    for row in made[30:]:
        rows.append(row)
    assert list(rows) == made
    assert rows[-1] == made[-1]
    assert rows[10:40:7] == made[10:40:7]
    assert [rows[i] for i in (41, 3, 3, 40)] == [made[i] for i in (41, 3, 3, 40)]
    assert list(rows.labels) == [row.label for row in made]
    for one, other in zip(batches(rows, 8), batches(made, 8), strict=True):
        assert torch.equal(one.call["input_ids"], other.call["input_ids"])
        assert torch.equal(one.labels, other.labels)
        assert torch.equal(one.prompt, other.prompt)
    with pytest.raises(IndexError):
        rows[50]
