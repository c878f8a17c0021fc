"""The table of equalities over architectures: every base × every row, none left out in silence.

What does not apply to a base is in NOT_APPLICABLE with its reason, and each such cell is held against the
base itself; the grid of routings is in test_equalities.py, over fewer bases. Models are tiny, weights random
and adapters strong: a wrong gate, scale, expert or token moves outputs by 0.05 and more.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from support.adapters import RECIPES, randomise
from support.bases import BASES, MORE
from support.batches import batch_for, logits_of, real_logits, texts
from support.routing import choose, permute_columns, routers
from support.zoo import Zoo, silence_below_tap
from torch import Tensor, nn

from peft_moe import MoLoraConfig, PeftMoeError, routing_inputs
from peft_moe.routing.decision import per_token
from peft_moe.tuner.layers.linear import MoLoraLayer

# float32 against float32 along another order of summation: outputs of size 3 hold about 1e-6.
FP32 = {"atol": 1e-5, "rtol": 1e-5}
# Different numbers must differ by far more than that, else an equality proves nothing.
MOVED = 1e-2
EXPERTS = list(RECIPES)
# A router in every layer, per token; and one decision per prompt for the whole model.
TOKEN, PROMPT = "top2", "prompt-probe"
NEW_TOKENS = 4
# Bases whose own outputs change with padding on the left: they count positions from the first column, or
# read their answer there.
COUNTS_PADDING = ("bart", "bert_classifier", "roberta_classifier")
# A tower that reads images cannot follow a decision that is taken from the text; refused, see below.
ONE_TEXT = {"llava": "prompt-base"}


def bare(zoo: Zoo, name: str) -> nn.Module:
    """The base, frozen as under an adapter: torch picks Mamba's convolution by what wants gradients."""
    return zoo.base(name).requires_grad_(False)


def apart(left: Tensor, right: Tensor) -> float:
    return (left - right).abs().max().item()


def disabled_is_the_base(zoo: Zoo, name: str, routing: str, folder: Path) -> None:
    batch = batch_for(name, texts())
    expected = logits_of(bare(zoo, name), batch)
    model = zoo.mixture(name, routing)
    mixed = logits_of(model, batch)
    assert apart(mixed, expected) > MOVED
    with model.disable_adapter():
        assert torch.equal(logits_of(model, batch), expected)
    assert torch.equal(logits_of(model, batch), mixed)


def one_hot_is_the_adapter(zoo: Zoo, name: str, routing: str, folder: Path) -> None:
    batch = batch_for(name, texts())
    alone, model = logits_of(zoo.base(name), batch), zoo.mixture(name, routing)
    for index, expert in enumerate(EXPERTS):
        choose(model, index)
        plain = zoo.lora(name, expert)
        silence_below_tap(plain, model, name)
        expected = logits_of(plain, batch)
        assert apart(expected, alone) > MOVED
        torch.testing.assert_close(logits_of(model, batch), expected, **FP32)


def uniform_is_cat_and_merged(zoo: Zoo, name: str, routing: str, folder: Path) -> None:
    batch = batch_for(name, texts())
    model = zoo.mixture(name, "uniform")
    mixed = logits_of(model, batch)
    plain = zoo.lora(name, EXPERTS[0])
    for expert in EXPERTS[1:]:
        plain.load_adapter(zoo.experts(name)[expert], adapter_name=expert)
    share = [1 / len(EXPERTS)] * len(EXPERTS)
    plain.add_weighted_adapter(["default", *EXPERTS[1:]], share, "all", combination_type="cat")
    plain.set_adapter("all")
    torch.testing.assert_close(mixed, logits_of(plain, batch), **FP32)
    merged = model.merge_and_unload(safe_merge=True)
    assert not any(
        "molora" in key or "router." in key for key in merged.state_dict() if "mlp.router" not in key
    )
    torch.testing.assert_close(logits_of(merged, batch), mixed, **FP32)


def all_of_top_k_is_dense(zoo: Zoo, name: str, routing: str, folder: Path) -> None:
    batch, fields = batch_for(name, texts()), {"router": "linear"}
    dense = logits_of(zoo.mixture(name, "dense"), batch)
    assert torch.equal(logits_of(zoo.mixture(name, "dense", **fields, top_k=len(EXPERTS)), batch), dense)
    assert apart(logits_of(zoo.mixture(name, "dense", **fields, top_k=2), batch), dense) > MOVED


def identical_experts_are_one(zoo: Zoo, name: str, routing: str, folder: Path) -> None:
    batch, source = batch_for(name, texts()), zoo.experts(name)["wide"]
    with pytest.warns(UserWarning, match="router cannot tell them apart"):
        model = zoo.mixture(name, routing, experts={"a": source, "b": source, "c": source}, null_expert=False)
    plain = zoo.lora(name, "wide")
    silence_below_tap(plain, model, name)
    torch.testing.assert_close(logits_of(model, batch), logits_of(plain, batch), **FP32)


def null_is_the_base(zoo: Zoo, name: str, routing: str, folder: Path) -> None:
    batch = batch_for(name, texts())
    model = zoo.mixture(name, routing, null_expert=True)
    choose(model, len(EXPERTS))
    # Gates of exactly 0 add exact zeros.
    assert torch.equal(logits_of(model, batch), logits_of(bare(zoo, name), batch))


def order_does_not_matter(zoo: Zoo, name: str, routing: str, folder: Path) -> None:
    batch, order, folders = batch_for(name, texts()), [2, 0, 1], zoo.experts(name)
    expected = logits_of(zoo.mixture(name, routing), batch)
    other = zoo.mixture(name, routing, experts={EXPERTS[i]: folders[EXPERTS[i]] for i in order})
    assert apart(logits_of(other, batch), expected) > MOVED  # the router's rows still in the old order
    permute_columns(other, order)
    torch.testing.assert_close(logits_of(other, batch), expected, **FP32)


def company_changes_nothing(zoo: Zoo, name: str, routing: str, folder: Path) -> None:
    """Rows of equal length, alone and together."""
    rows, model = texts(lengths=(7, 7, 7)), zoo.mixture(name, routing)
    alone = [logits_of(model, batch_for(name, [row]))[0] for row in rows]
    together = logits_of(model, batch_for(name, rows))
    assert apart(alone[0], alone[1]) > MOVED
    for one, other in zip(alone, together, strict=True):
        torch.testing.assert_close(other, one, **FP32)


def padding_changes_nothing(zoo: Zoo, name: str, routing: str, folder: Path) -> None:
    rows, model = texts(lengths=(9, 6, 4)), zoo.mixture(name, routing)
    alone = [real_logits(name, model, batch_for(name, [row]))[0] for row in rows]
    for side in ("right", "left"):
        if side == "left" and name in COUNTS_PADDING:
            base = zoo.base(name)
            moved = zip(
                *(real_logits(name, base, batch_for(name, rows, s)) for s in ("right", "left")), strict=True
            )
            assert max(apart(one, other) for one, other in moved) > MOVED
            continue
        together = real_logits(name, model, batch_for(name, rows, side, extra=3))
        for one, other in zip(alone, together, strict=True):
            torch.testing.assert_close(other, one, **FP32)


def cache_changes_nothing(zoo: Zoo, name: str, routing: str, folder: Path) -> None:
    """Logits of every generated token, against one pass over the whole text."""
    model = zoo.mixture(name, routing)
    batch = batch_for(name, texts(lengths=(7, 7)))
    batch.pop("position_ids", None)
    batch.pop("decoder_input_ids", None)
    out = model.generate(
        **batch,
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    found = torch.stack(out.logits, dim=1)
    width = batch["input_ids"].shape[1]
    if BASES[name].kind == "seq2seq":
        whole = {**batch, "decoder_input_ids": out.sequences[:, :-1]}
        expected = logits_of(model, whole)
    else:
        more = torch.ones_like(out.sequences[:, :-1])
        whole = {**batch, "input_ids": out.sequences[:, :-1], "attention_mask": more}
        prompt = (torch.arange(more.shape[1]) < width).expand_as(more)
        with routing_inputs(prompt_mask=prompt):
            expected = logits_of(model, whole)
    torch.testing.assert_close(found, expected[:, -NEW_TOKENS:], **FP32)


def saved_and_loaded_is_the_same(zoo: Zoo, name: str, routing: str, folder: Path) -> None:
    batch, model = batch_for(name, texts()), zoo.mixture(name, routing, seed=5)
    model.save_pretrained(str(folder))
    loaded = PeftModel.from_pretrained(zoo.base(name), str(folder)).eval()
    assert torch.equal(logits_of(loaded, batch), logits_of(model.requires_grad_(False), batch))


def experts_come_out_again(zoo: Zoo, name: str, routing: str, folder: Path) -> None:
    model = zoo.mixture(name, routing)
    layers = {m.name: m for m in model.modules() if isinstance(m, MoLoraLayer)}
    for index, expert in enumerate(EXPERTS):
        tensors = load_file(f"{zoo.experts(name)[expert]}/adapter_model.safetensors")
        found = 0
        for module, layer in layers.items():
            factors = layer.expert_factors("default", index)
            if factors is not None:
                keys = [f"base_model.model.{module}.lora_{side}.weight" for side in "AB"]
                assert all(torch.equal(f, tensors[key]) for f, key in zip(factors, keys, strict=True))
                found += 2
        assert found == len(tensors) > 0


def only_routers_train(zoo: Zoo, name: str, routing: str, folder: Path) -> None:
    """Every router gets a gradient, nothing else does."""
    model = zoo.mixture(name, routing).train()
    trained_gradients(model, name)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all("molora_router" in n for n in trained)
    assert len({n.rpartition("molora_router")[0] for n in trained}) == len(list(routers(model)))
    for key, parameter in trained.items():
        layer = model.get_submodule(key.rpartition(".molora_router")[0])
        # Where only one of the chosen experts adapts a layer, or no token was sent, nothing can be learnt.
        idle = isinstance(layer, MoLoraLayer) and (
            0 in layer.mixtures["default"].rank_map.ranks or "expert_" in key
        )
        assert idle or (parameter.grad.isfinite().all() and parameter.grad.abs().max() > 0), key
    assert all(p.grad is None for n, p in model.named_parameters() if n not in trained)


def checkpointing_changes_nothing(zoo: Zoo, name: str, routing: str, folder: Path) -> None:
    plain = trained_gradients(zoo.mixture(name, routing).train(), name)
    model = zoo.mixture(name, routing).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if BASES[name].reads != "pixels":
        model.enable_input_require_grads()
    again = trained_gradients(model, name)
    assert plain.keys() == again.keys()
    for key, gradient in plain.items():
        assert torch.equal(again[key], gradient), key


def trained_gradients(model: nn.Module, name: str) -> dict[str, Tensor]:
    output = model(**batch_for(name, texts()))
    values = output.logits if "logits" in output else output.last_hidden_state
    values.float().pow(2).mean().backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


Row = Callable[[Zoo, str, str, Path], None]
ROWS: dict[str, Row] = {
    "disabled = base": disabled_is_the_base,
    "one-hot = that adapter": one_hot_is_the_adapter,
    "uniform = cat = merged": uniform_is_cat_and_merged,
    "k = E is dense": all_of_top_k_is_dense,
    "identical = one": identical_experts_are_one,
    "null = base": null_is_the_base,
    "permuted = same": order_does_not_matter,
    "company": company_changes_nothing,
    "padding": padding_changes_nothing,
    "KV cache": cache_changes_nothing,
    "save = load": saved_and_loaded_is_the_same,
    "experts come out": experts_come_out_again,
    "only routers train": only_routers_train,
    "checkpointing": checkpointing_changes_nothing,
}
# Rows that have one routing of their own.
FIXED = ("uniform = cat = merged", "k = E is dense", "experts come out")

NO_TEXT = "images are never padded"
NO_GENERATION = "it does not generate"
TWO_TEXTS = "an encoder-decoder's layers see different texts, which one decision cannot serve: refused"
NOT_APPLICABLE: dict[tuple[str, str, str], str] = {
    **{(name, "padding", r): NO_TEXT for name in ("vit",) for r in (TOKEN, PROMPT)},
    **{
        (name, "KV cache", r): NO_GENERATION
        for name in ("bert_classifier", "roberta_classifier", "roberta_tokens", "vit", "clip_text")
        for r in (TOKEN, PROMPT)
    },
    **{(name, row, PROMPT): TWO_TEXTS for name in ("bart", "switch") for row in ROWS if row not in FIXED},
}
CELLS = [
    (name, row, routing) for name in MORE for row in ROWS for routing in (TOKEN, PROMPT)
    if not (row in FIXED and routing == PROMPT)
]  # fmt: skip


@pytest.mark.parametrize(("name", "row", "routing"), CELLS)
def test_table(zoo: Zoo, name: str, row: str, routing: str, tmp_path: Path) -> None:
    if (name, row, routing) in NOT_APPLICABLE:
        check_inapplicable(zoo, name, row, routing)
    else:
        ROWS[row](zoo, name, ONE_TEXT.get(name, PROMPT) if routing == PROMPT else routing, tmp_path)


def check_inapplicable(zoo: Zoo, name: str, row: str, routing: str) -> None:
    """The reason that the table gives is true of the base."""
    reason, base = NOT_APPLICABLE[name, row, routing], zoo.base(name)
    if reason == NO_TEXT:
        assert base.main_input_name == "pixel_values"
        assert "input_ids" not in inspect.signature(base.forward).parameters
    elif reason == NO_GENERATION:
        assert not base.can_generate()
    else:
        assert reason == TWO_TEXTS
        with pytest.raises(PeftMoeError, match="use router_scope='module'"):
            zoo.mixture(name, routing)


def test_what_is_left_out_is_in_the_table() -> None:
    assert set(NOT_APPLICABLE) <= set(CELLS)
    # Nothing that generates, pads or reads one text is excused.
    for (name, _, _), reason in NOT_APPLICABLE.items():
        arch = BASES[name]
        assert {
            NO_TEXT: arch.reads == "pixels",
            NO_GENERATION: arch.kind in {"encoder", "classifier"},
            TWO_TEXTS: arch.kind == "seq2seq",
        }[reason]


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_experts_of_a_sparse_base_are_bare_parameters(zoo: Zoo, name: str) -> None:
    """transformers keeps them as 3-D tensors: no layer to mix in, and an adapter on them is refused."""
    base = zoo.base(name)
    fused = [n for n, p in base.named_parameters() if p.dim() == 3]
    assert len(fused) >= 2
    with pytest.raises(ValueError, match=r"not found in the base model|is not supported|not linear-like"):
        get_peft_model(base, MoLoraConfig(experts=2, target_modules=["mlp.experts"]))
    model = get_peft_model(zoo.base(name), MoLoraConfig(experts=2, target_modules="all-linear"))
    assert not any("experts" in m.name for m in model.modules() if isinstance(m, MoLoraLayer))


def test_linears_inside_of_expert_modules_are_mixed(zoo: Zoo) -> None:
    """They see the tokens that the base sent there, without a batch, and route each for itself."""
    model = zoo.mixture("switch", TOKEN)
    inside = [m.name for m in model.modules() if isinstance(m, MoLoraLayer) and ".experts.expert_" in m.name]
    assert len(inside) == 2 * 3 * 2  # wi and wo of three experts, in one sparse layer of each stack


@pytest.mark.parametrize(
    ("name", "targets", "word"),
    [
        ("llama", ["embed_tokens", "q_proj"], r"model\.embed_tokens"),
        ("gpt2", ["wte", "c_attn"], r"transformer\.wte"),
        ("vit", ["projection", "q_proj"], r"vit\.embeddings\.patch_embeddings\.projection"),
        ("llama", ["lm_head", "q_proj"], "lm_head"),
        ("qwen2", ["lm_head", "q_proj"], "lm_head"),
    ],
)
def test_adapters_on_embeddings_convolutions_and_heads_are_refused_by_name(
    zoo: Zoo, name: str, targets: list[str], word: str, tmp_path: Path
) -> None:
    lora = get_peft_model(zoo.base(name), LoraConfig(target_modules=targets))
    randomise(lora, 1)
    lora.save_pretrained(str(tmp_path))
    with pytest.raises(PeftMoeError, match=rf"Expert 'a'[\s\S]*{word}[\s\S]*Fix: "):
        get_peft_model(zoo.base(name), MoLoraConfig(experts={"a": str(tmp_path)}))


@pytest.mark.parametrize(
    ("name", "target", "kind"),
    [("llama", "embed_tokens", "Embedding"), ("vit", "projection", "Conv2d"), ("mamba", "conv1d", "Conv1d")],
)
def test_fresh_experts_go_on_linear_layers_only(zoo: Zoo, name: str, target: str, kind: str) -> None:
    with pytest.raises((PeftMoeError, ValueError), match=f"{kind}, which is not linear-like|{target}"):
        get_peft_model(zoo.base(name), MoLoraConfig(experts=2, target_modules=[target]))


def test_conv1d_is_transposed_whatever_the_adapter_says(zoo: Zoo) -> None:
    """GPT-2's weights are [I, O]; the flag of the adapter's config is not what decides."""
    folder = Path(zoo.experts("gpt2")["wide"])
    assert '"fan_in_fan_out": true' in (folder / "adapter_config.json").read_text()
    model = zoo.mixture("gpt2", "uniform", experts={"wide": str(folder)})
    layer = next(m for m in model.modules() if isinstance(m, MoLoraLayer) and "c_attn" in m.name)
    assert layer.get_delta_weight("default").shape == layer.get_base_layer().weight.shape == (64, 192)


def test_a_model_of_two_towers_is_tapped_where_it_reads_text(zoo: Zoo) -> None:
    """Its vision tower is as deep, and comes first."""
    model = zoo.mixture("llava", "prompt-base")
    seat = next(m for n, m in model.named_modules() if n.endswith("shared_router"))
    assert seat.taps["default"].name == "model.language_model.layers.1"
    adapted = [m.name for m in model.modules() if isinstance(m, MoLoraLayer)]
    assert adapted
    assert all(re.search(r"language_model\.layers\.[12]\.", name) for name in adapted)


@pytest.mark.parametrize("routing", ["prompt-probe", "token-probe"])
@pytest.mark.parametrize("targets", [None, "all-linear"])
def test_a_tower_that_reads_images_cannot_follow_the_text(
    zoo: Zoo, routing: str, targets: str | None
) -> None:
    words = r"model\.vision_tower\..* lies outside of model\.language_model; use router_scope='module'"
    with pytest.raises(PeftMoeError, match=words):
        zoo.mixture("llava", routing, target_modules=targets)
    # As the message says: experts of the text alone take every routing.
    text_only = r".*language_model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj"
    with pytest.warns(UserWarning, match="that target_modules leaves out"):
        model = zoo.mixture("llava", routing, target_modules=text_only)
    logits_of(model, batch_for("llava", texts()))


def test_a_decision_per_text_is_not_spread_over_images() -> None:
    """Four rows for two texts might be two images each, or three and one."""
    decisions_B1E = torch.rand(2, 1, 3)
    assert per_token(decisions_B1E, torch.zeros(2, 5, 8), 10).shape == (10, 3)
    assert per_token(decisions_B1E, torch.zeros(10, 8), 10).shape == (10, 3)
    with pytest.raises(PeftMoeError, match="sees other tokens than the router"):
        per_token(decisions_B1E, torch.zeros(4, 5, 8), 20)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("routing", [TOKEN, PROMPT])
@pytest.mark.parametrize("name", BASES)
def test_narrow_bases_err_as_peft_does(zoo: Zoo, name: str, routing: str, dtype: torch.dtype) -> None:
    if routing == PROMPT and BASES[name].kind == "seq2seq":
        routing = "dense"
    routing = ONE_TEXT.get(name, routing) if routing == PROMPT else routing
    batch = batch_for(name, texts())
    if "pixel_values" in batch:
        batch["pixel_values"] = batch["pixel_values"].to(dtype)
    model = zoo.mixture(name, routing, base=zoo.base(name).to(dtype))
    expected = logits_of(bare(zoo, name).to(dtype), batch)
    with model.disable_adapter():
        assert torch.equal(logits_of(model, batch), expected)
    choose(model, 0)
    truth, plain = (
        zoo.lora(name, EXPERTS[0], base)
        for base in (zoo.base(name).to(dtype).float(), zoo.base(name).to(dtype))
    )
    for lora in (truth, plain):
        silence_below_tap(lora, model, name)
    wide = {k: v.float() if v.is_floating_point() else v for k, v in batch.items()}
    exact, peft, ours = logits_of(truth, wide), logits_of(plain, batch), logits_of(model, batch)
    error, theirs = ((m.float() - exact).pow(2).mean().sqrt().item() for m in (ours, peft))
    # Rounding is random: two equally good roundings of some hundred logits differ by well under a half, of
    # the six logits of two classified texts by more.
    assert error <= (1.5 if exact.numel() > 100 else 3) * theirs + 1e-6
