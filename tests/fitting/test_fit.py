"""``fit_router``: a router solved from labelled prompts, against scikit-learn itself."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from sklearn.linear_model import LogisticRegression
from support.routing import routers
from support.training import make_trainer, router_values, tokenizer
from support.zoo import Zoo
from torch import Tensor

from peft_moe import PeftMoeError, record_routing
from peft_moe.fitting import fit_router

# Each domain has letters of its own, so that a linear map of the tap's pooled states can tell them apart.
LETTERS = {"wide": "abcde", "narrow": "klmno", "upper": "uvwxy", "weather": "01234"}
PLANTED = ("wide", "narrow", "upper", "weather")


def planted(domains: tuple[str, ...] = PLANTED, each: int = 12, seed: int = 0) -> list[dict[str, str]]:
    rng = random.Random(seed)
    return [
        {"prompt": "".join(rng.choices(LETTERS[name], k=rng.randint(4, 12))) + "=", "domain": name}
        for _ in range(each)
        for name in domains
    ]


def fit(model: PeftModel, data: Any, **settings: Any) -> Any:
    return fit_router(model, data, settings.pop("encode", tokenizer()), progress=False, **settings)


def scores(model: PeftModel, rows: list[dict[str, str]]) -> list[Tensor]:
    """What the router scores in a forward pass of the whole mixture, one prompt at a time: [B=1, T|1, X]."""
    out = []
    for row in rows:
        with torch.no_grad(), record_routing() as record:
            model(torch.tensor([tokenizer()(row["prompt"])["input_ids"]]))
        out.append(next(iter(record.decisions.values())).logits)
    return out


def features(model: PeftModel, rows: list[dict[str, str]]) -> Tensor:
    """The router's inputs, caught in those passes: [M, I]."""
    seen: list[Tensor] = []
    router = next(routers(model))[1]
    handle = router.scorer.register_forward_pre_hook(lambda module, args: seen.append(args[0][0]))
    scores(model, rows)
    handle.remove()
    return torch.cat(seen)


def columns(rows: list[dict[str, str]]) -> list[int]:
    return [PLANTED.index(row["domain"]) for row in rows]


@pytest.mark.parametrize("routing", ["prompt-probe", "prompt-base"])
def test_planted_domains_are_told_apart_on_new_prompts(zoo: Zoo, routing: str) -> None:
    model = zoo.mixture("llama", routing)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = fit(model, planted())
    assert report.samples == 48
    assert report.per_column == {"wide": 12, "narrow": 12, "upper": 12, "null": 12}
    assert report.training_accuracy == 1.0
    fresh = planted(seed=1)
    assert [int(one.argmax(-1)) for one in scores(model, fresh)] == columns(fresh)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if ".molora_router." in name}
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("domains", [PLANTED, ("wide", "narrow")], ids=["four classes", "two classes"])
def test_the_router_is_scikit_learns_own_classifier(zoo: Zoo, domains: tuple[str, ...]) -> None:
    """Noisy labels, so that the two could disagree; logits equal up to what softmax does not see."""
    experts = {name: path for name, path in zoo.experts("llama").items() if name in domains}
    model = zoo.mixture("llama", "prompt-soft", experts=experts, null_expert="weather" in domains)
    rows = planted(domains, each=20)
    rng = random.Random(3)
    for row in rows:
        if rng.random() < 0.3:
            row["domain"] = rng.choice(domains)
    labels = [domains.index(row["domain"]) for row in rows]
    x_MI = features(model, rows)
    scale_I = x_MI.std(0)
    theirs = LogisticRegression(C=1 / 3.0, max_iter=1000).fit((x_MI - x_MI.mean(0)) / scale_I, labels)

    report = fit(model, rows, regularisation=3.0)
    new = planted(domains, each=20, seed=2)
    expected = theirs.predict_proba((features(model, new) - x_MI.mean(0)) / scale_I)
    ours = torch.cat(scores(model, new))[:, 0].softmax(-1)
    # Two L-BFGS runs on features that differ by float32 noise; probabilities range over 0 to 1.
    torch.testing.assert_close(ours.double(), torch.from_numpy(expected).double(), atol=5e-3, rtol=0)
    assert expected.min(axis=1).max() > 0.05  # not saturated, else any separating map would do
    assert report.training_accuracy == pytest.approx(
        theirs.score((x_MI - x_MI.mean(0)) / scale_I, labels), abs=0.5 / len(rows)
    )
    assert report.training_accuracy < 1


def test_padding_and_batch_size_do_not_matter(zoo: Zoo) -> None:
    # Learned positions: a row that is shifted by padding would have other hidden states.
    def fitted(**settings: Any) -> Tensor:
        model = zoo.mixture("gpt2", "prompt-probe")
        fit(model, planted(), **settings)
        return torch.stack([one[0, 0] for one in scores(model, planted(seed=1, each=2))])

    left, bare = tokenizer(), tokenizer()
    left.padding_side, bare.pad_token = "left", None
    expected = fitted()
    for settings in ({"encode": left}, {"encode": bare}, {"batch_size": 1}, {"batch_size": 7}):
        # Batches change float32 sums by 1e-6, and L-BFGS stops a little elsewhere; scores are of size 5.
        torch.testing.assert_close(fitted(**settings), expected, atol=2e-2, rtol=0)
    unlike = fitted(regularisation=30.0)
    assert (unlike - expected).abs().max() > 0.2


def test_a_router_per_token_fits_on_tokens(zoo: Zoo) -> None:
    model = zoo.mixture("llama", "token-probe", null_expert=True)
    rows = planted()
    report = fit(model, rows)
    assert report.samples == sum(len(row["prompt"]) for row in rows)
    # All tokens but the last, "=", which tells nothing by itself.
    right = [
        (one[0, :-1].argmax(-1) == column).float().mean()
        for one, column in zip(scores(model, planted(seed=1)), columns(planted(seed=1)), strict=True)
    ]
    assert torch.stack(right).mean() > 0.95
    assert fit(model, [{"text": row["prompt"], "domain": row["domain"]} for row in rows]) == report


def test_a_fitted_router_trains_further(zoo: Zoo, tmp_path: Path) -> None:
    model = zoo.mixture("llama", "prompt-probe", router_label_loss_coef=1.0)
    rows = [{**row, "completion": "abc"} for row in planted()]
    for training in (True, False):
        fit(model.train(training), Dataset.from_list(rows))
        assert model.get_base_model().training is training  # as it was before
    start = router_values(model)
    given = {"eval_dataset": Dataset.from_list([{**row, "completion": "abc"} for row in planted(seed=1)])}
    trainer = make_trainer("sft", model, Dataset.from_list(rows), tmp_path, given=given, max_steps=4)
    first = trainer.evaluate()["eval_router_label_loss"]
    trainer.train()
    assert not torch.equal(router_values(model), start)
    assert trainer.evaluate()["eval_router_label_loss"] < first < 0.7  # log(4) = 1.39 knows nothing


def test_chats_are_fitted_on_their_prompts(zoo: Zoo) -> None:
    encode = tokenizer()
    encode.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    plain = zoo.mixture("llama", "prompt-probe")
    fit(plain, planted(), encode=encode)
    for shape in ("prompt", "messages"):
        chats = []
        for row in planted():
            turn = {"role": "user", "content": row["prompt"]}
            answer = {"role": "assistant", "content": "the answer is not read"}
            chats.append({shape: [turn, answer][: 1 if shape == "prompt" else 2], "domain": row["domain"]})
        model = zoo.mixture("llama", "prompt-probe")
        fit(model, chats, encode=encode)
        assert torch.equal(router_values(model), router_values(plain))


@pytest.mark.parametrize(
    ("routing", "rows", "message"),
    [
        ("prompt-probe", planted(("wide", "narrow", "weather")), r"no sample for \['upper'\]"),
        (
            "prompt-probe",
            planted(("wide", "narrow", "upper")),
            r"\['null'\].*of no expert \(any other domain\)",
        ),
        ("token-base", [{"prompt": "a", "domain": "wides"}], r"'wides' is no expert\. Did you mean 'wide'"),
        ("prompt-probe", [{"prompt": "a"}], r"sample 0 has no `domain`"),
        ("prompt-probe", [{"text": "a", "domain": "wide"}], r"\['domain', 'text'\] has no prompt"),
        ("prompt-probe", [*planted(), {"prompt": "", "domain": "wide"}], "prompt='' has no token"),
        ("uniform", planted(), "fits a linear router; this one is router='uniform'"),
    ],
)
def test_refusals(zoo: Zoo, routing: str, rows: list[dict[str, str]], message: str) -> None:
    model = zoo.mixture("llama", routing)
    before = router_values(model) if routing != "uniform" else None
    with pytest.raises(PeftMoeError, match=message):
        fit(model, rows)
    assert before is None or torch.equal(router_values(model), before)


def test_wrong_models_and_methods_are_refused(zoo: Zoo) -> None:
    with pytest.raises(PeftMoeError, match="carries no mixture"):
        fit(zoo.base("llama"), planted())
    with pytest.raises(PeftMoeError, match=r"no mixture named \['other'\]; its adapters are \['default'\]"):
        fit(zoo.mixture("llama", "prompt-probe"), planted(), adapter_name="other")
    with pytest.raises(PeftMoeError, match="carries no mixture"):
        fit(zoo.lora("llama", "wide"), planted())
    with pytest.raises(PeftMoeError, match=r"method='logistics' is not known\. Did you mean 'logistic'"):
        fit(zoo.mixture("llama", "prompt-probe"), planted(), method="logistics")
    frozen = {"router": "random", "top_k": 2, "null_expert": True}
    with pytest.raises(PeftMoeError, match="fits a linear router; this one is router='random'"):
        fit(zoo.mixture("llama", "token-base", **frozen), planted())
    one = {"experts": {"wide": zoo.experts("llama")["wide"]}}
    with (
        pytest.warns(UserWarning, match="one expert"),
        pytest.raises(PeftMoeError, match="nothing to choose"),
    ):
        fit(zoo.mixture("llama", "token-base", **one), planted(("wide",)))
