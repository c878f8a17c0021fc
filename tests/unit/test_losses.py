"""Losses on routing decisions against an independent float64 loop, and the properties they are for."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from peft_moe.losses import LOSSES, auxiliary_losses, decision_weights, label_loss
from peft_moe.losses import load_balancing_loss as balance
from peft_moe.losses import router_z_loss as z_loss
from peft_moe.routers import RouterSettings, select
from peft_moe.routing import Routing, RoutingContext, RoutingRecord

B, T, X, K = 3, 5, 4, 2
NAMES = list(LOSSES)


def logits_of(seed=0, shape=(B, T, X)):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def decided(logits, top_k=K, **fields):
    return select(logits, RouterSettings("linear", num_experts=logits.shape[-1], top_k=top_k, **fields))


def context(real=True, domains=None):
    mask = torch.ones(B, T, dtype=torch.bool)
    if real is not True:
        mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 1, 1, 1]]).bool()
    return RoutingContext(real=mask, domains=domains)


PADDED = context(real="padded", domains=torch.tensor([2, -1, 0]))


def by_hand(name, logits, real, domains, k=K):
    """One layer's loss in plain loops over Python floats."""
    z = logits.detach().numpy()
    count, shares, means, squares, crosses, labelled = 0, np.zeros(X), np.zeros(X), 0.0, 0.0, 0
    for b in range(B):
        for t in range(T):
            if not real[b][t]:
                continue
            count += 1
            norm = sum(math.exp(v) for v in z[b, t])
            for e in range(X):
                means[e] += math.exp(z[b, t, e]) / norm
            for e in sorted(range(X), key=lambda e, b=b, t=t: -z[b, t, e])[:k]:
                shares[e] += 1
            squares += math.log(norm) ** 2
            if domains[b] >= 0:
                labelled += 1
                crosses += math.log(norm) - z[b, t, domains[b]]
    return {
        "router_aux_loss_coef": X * float((shares / count * means / count).sum()),
        "router_z_loss_coef": squares / count,
        "router_label_loss_coef": crosses / max(labelled, 1),
    }[name]


def computed(name, logits, ctx=PADDED, **fields):
    routing = decided(logits, **fields)
    return LOSSES[name](routing, decision_weights(routing, ctx), ctx)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_equals_the_plain_loop(name, seed):
    logits = logits_of(seed)
    wanted = by_hand(name, logits, PADDED.real.tolist(), PADDED.domains.tolist())
    assert computed(name, logits).item() == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_gradcheck(name):
    assert torch.autograd.gradcheck(
        lambda z: computed(name, z), (logits_of().requires_grad_(),), fast_mode=True
    )


@pytest.mark.parametrize("name", NAMES)
def test_content_of_padding_does_not_matter(name):
    logits = logits_of()
    other = torch.where(PADDED.real[..., None], logits, 100 * logits_of(7))
    assert computed(name, other).item() == pytest.approx(computed(name, logits).item(), rel=1e-12)
    logits.requires_grad_()
    computed(name, logits).backward()
    assert (logits.grad[~PADDED.real] == 0).all()
    assert (logits.grad[PADDED.real].abs().sum()) > 0


@pytest.mark.parametrize("name", NAMES)
def test_more_padding_changes_nothing(name):
    logits = logits_of()
    wider = torch.cat([logits, logits_of(3)], dim=1)
    mask = torch.cat([PADDED.real, torch.zeros_like(PADDED.real)], dim=1)
    found = computed(name, wider, RoutingContext(real=mask, domains=PADDED.domains))
    assert found.item() == pytest.approx(computed(name, logits).item(), rel=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_mean_over_layers(name):
    routings = {f"layer{i}": decided(logits_of(i)) for i in range(3)}
    record = RoutingRecord({**routings, "unscored": Routing(torch.ones(1, 1, X))}, context=PADDED)
    each = [computed(name, logits_of(i)).item() for i in range(3)]
    found = auxiliary_losses(record, [name])
    assert set(found) == {name}
    assert found[name].item() == pytest.approx(sum(each) / 3, rel=1e-12)


def test_nothing_scored_gives_no_losses():
    assert auxiliary_losses(RoutingRecord(), NAMES) == {}
    assert auxiliary_losses(RoutingRecord({"a": Routing(torch.ones(1, 1, 2))}, context()), NAMES) == {}


class TestLoadBalancing:
    def test_collapse_of_each_layer_is_not_hidden_by_the_others(self):
        # Layer e sends everything to expert e: pooled over layers this looks balanced, and scores 1.
        record = RoutingRecord(context=context())
        for expert in range(X):
            logits = torch.full((B, T, X), -50.0)
            logits[..., expert] = 50.0
            record.decisions[f"layer{expert}"] = decided(logits, top_k=1)
        assert auxiliary_losses(record, ["router_aux_loss_coef"])[
            "router_aux_loss_coef"
        ].item() == pytest.approx(X)

    @pytest.mark.parametrize("k", [1, 2, 3])
    def test_balanced_routing_scores_k(self, k):
        logits = torch.zeros(1, X, X)
        for t in range(X):
            for j in range(k):
                logits[0, t, (t + j) % X] = 1e-3 * (j + 1)
        ctx = RoutingContext(real=torch.ones(1, X).bool())
        routing = decided(logits, top_k=k)
        found = balance(routing, decision_weights(routing, ctx), ctx).item()
        assert found == pytest.approx(k, rel=1e-5)

    def test_dense_gates_have_no_gradient(self):
        logits = logits_of().requires_grad_()
        found = computed("router_aux_loss_coef", logits, top_k=None)
        found.backward()
        assert found.item() == pytest.approx(X)
        assert logits.grad.abs().max() < 1e-15

    def test_it_pushes_away_from_the_crowded_expert(self):
        logits = logits_of() + torch.tensor([1.5, 0, 0, 0])
        logits.requires_grad_()
        computed("router_aux_loss_coef", logits, top_k=1).backward()
        assert logits.grad[PADDED.real].sum(0)[0] > 0

    def test_temperature_counts(self):
        logits = logits_of()
        cold = computed("router_aux_loss_coef", logits, temperature=0.5)
        assert cold.item() == pytest.approx(computed("router_aux_loss_coef", 2 * logits).item())


class TestZLoss:
    def test_zero_where_logsumexp_is_zero(self):
        logits = torch.full((B, T, X), -math.log(X), dtype=torch.float64)
        assert computed("router_z_loss_coef", logits).item() == pytest.approx(0, abs=1e-25)

    def test_uniform_scores(self):
        ctx = context()
        routing = decided(torch.zeros(B, T, X))
        assert z_loss(routing, decision_weights(routing, ctx), ctx).item() == pytest.approx(math.log(X) ** 2)


class TestLabelLoss:
    def test_zero_when_certain_and_right(self):
        domains = torch.tensor([2, 0, 3])
        logits = torch.full((B, T, X), -60.0, dtype=torch.float64)
        logits[torch.arange(B), :, domains] = 60.0
        assert computed("router_label_loss_coef", logits, context(domains=domains)).item() < 1e-30

    def test_uniform_scores_cost_log_x(self):
        found = computed("router_label_loss_coef", torch.zeros(B, T, X))
        assert found.item() == pytest.approx(math.log(X))

    def test_unlabelled_sequences_do_not_dilute(self):
        logits = logits_of()
        logits[1:] = logits[0]
        some, every = (context(domains=torch.tensor(d)) for d in ([2, -1, -1], [2, 2, 2]))
        found = [computed("router_label_loss_coef", logits, ctx).item() for ctx in (some, every)]
        assert found[0] == pytest.approx(found[1])

    @pytest.mark.parametrize("domains", [None, torch.tensor([-1, -1, -1]), torch.tensor([1, 1])])
    def test_nothing_known_is_zero_with_a_gradient_of_zero(self, domains):
        logits = logits_of().requires_grad_()
        ctx = context(domains=domains)
        routing = decided(logits)
        found = label_loss(routing, decision_weights(routing, ctx), ctx)
        found.backward()
        assert found.item() == 0
        assert (logits.grad == 0).all()

    def test_null_column_takes_part_in_the_softmax(self):
        logits = torch.zeros(B, T, X, dtype=torch.float64)
        routing = select(logits, RouterSettings("linear", num_experts=X - 1, null_expert=True))
        ctx = context(domains=torch.tensor([0, 1, 2]))
        assert label_loss(routing, decision_weights(routing, ctx), ctx).item() == pytest.approx(math.log(X))


class TestDecisionWeights:
    def weights(self, shape, real):
        logits = torch.zeros(*shape, X)
        return decision_weights(Routing(logits, logits), RoutingContext(real=real))

    def test_per_token(self):
        assert torch.equal(self.weights((B, T), PADDED.real), PADDED.real.float())

    def test_no_mask_counts_everything(self):
        assert self.weights((B, T), None).eq(1).all()

    def test_constant_decision_counts_once(self):
        assert self.weights((1, 1), PADDED.real).tolist() == [[1]]

    def test_one_decision_per_sequence_counts_if_any_token_is_real(self):
        real = torch.tensor([[1, 0, 0], [0, 0, 0], [0, 1, 1]]).bool()
        assert self.weights((3, 1), real).tolist() == [[1], [0], [1]]

    def test_flattened_tokens_find_their_mask(self):
        assert self.weights((1, B * T), PADDED.real).tolist() == [PADDED.real.flatten().float().tolist()]

    def test_other_tokens_have_no_known_padding(self):
        assert self.weights((1, 4), PADDED.real).tolist() == [[1, 1, 1, 1]]

    def test_all_padding_gives_zero_not_nan(self):
        ctx = RoutingContext(real=torch.zeros(B, T).bool(), domains=torch.tensor([0, 0, 0]))
        for name in NAMES:
            assert computed(name, logits_of(), ctx).item() == 0
