"""Losses on routing decisions against an independent float64 loop, and the properties they are for."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from peft_moe.routers import RouterSettings, select
from peft_moe.routers.losses import (
    LOSSES,
    auxiliary_losses,
    decision_weights,
    distillation_kl,
    label_loss,
    localised_balancing_loss,
    orthogonality_loss,
    zero_share,
)
from peft_moe.routers.losses import load_balancing_loss as balance
from peft_moe.routers.losses import router_z_loss as z_loss
from peft_moe.routing.context import Routing, RoutingContext, RoutingRecord

B, T, X, K = 3, 5, 4, 2
NAMES = list(LOSSES)
DELTA = 0.3
OPTIONS = {"router_lbc_coef": {"delta": DELTA}}
# ReLU gates are what the L1 loss is for; the mean of others is constant.
FIELDS = {"router_l1_coef": {"top_k": None, "scoring_func": "relu", "norm_topk_prob": False}}


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
    entropies, gates, loads = 0.0, 0.0, []
    for b in range(B):
        load = np.zeros(X)
        for t in range(T):
            if not real[b][t]:
                continue
            count += 1
            norm = sum(math.exp(v) for v in z[b, t])
            for e in range(X):
                p = math.exp(z[b, t, e]) / norm
                means[e] += p
                entropies -= p * math.log(p)
                gates += max(0.0, z[b, t, e]) / X
                load[e] += p * (1 - DELTA if e == domains[b] else 1 + DELTA)
            for e in sorted(range(X), key=lambda e, b=b, t=t: -z[b, t, e])[:k]:
                shares[e] += 1
            squares += math.log(norm) ** 2
            if domains[b] >= 0:
                labelled += 1
                crosses += math.log(norm) - z[b, t, domains[b]]
        if domains[b] >= 0:
            loads.append(load / sum(real[b]))
    return {
        "router_aux_loss_coef": X * float((shares / count * means / count).sum()),
        "router_z_loss_coef": squares / count,
        "router_label_loss_coef": crosses / max(labelled, 1),
        "router_entropy_coef": entropies / count,
        "router_lbc_coef": float(np.var(loads) / np.mean(loads) ** 2),
        "router_l1_coef": gates / count,
    }[name]


def computed(name, logits, ctx=PADDED, **fields):
    routing = decided(logits, **{**FIELDS.get(name, {}), **fields})
    return LOSSES[name].function(routing, decision_weights(routing, ctx), ctx, **OPTIONS.get(name, {}))


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
    routings = {f"layer{i}": decided(logits_of(i), **FIELDS.get(name, {})) for i in range(3)}
    record = RoutingRecord({**routings, "unscored": Routing(torch.ones(1, 1, X))}, context=PADDED)
    each = [computed(name, logits_of(i)).item() for i in range(3)]
    found = auxiliary_losses(record, [name], options=OPTIONS)
    assert set(found) == {name}
    assert found[name].item() == pytest.approx(sum(each) / 3, rel=1e-12)


@pytest.mark.parametrize("null", [False, True], ids=["", "null"])
@pytest.mark.parametrize("name", NAMES)
def test_columns_that_a_layer_lacks_do_not_count(name, null):
    """A layer with two of four experts has the losses of a router that never knew of the others."""
    columns = [0, 1, 4] if null else [0, 1]
    fields = {"null_expert": null, "top_k": 1, **FIELDS.get(name, {})}
    wide = logits_of(1, (B, T, 5 if null else 4))
    lacking = RouterSettings("linear", num_experts=4, present=2, **fields)
    small = RouterSettings("linear", num_experts=2, **fields)
    elsewhere = 4 if null else -1  # sample 1 belongs to an expert that is not here, sample 2 to none
    domains = {lacking: [1, 3, elsewhere], small: [1, -1, 2 if null else -1]}
    found = []
    for settings, logits in ((lacking, wide), (small, wide[..., columns])):
        ctx = context("padded", torch.tensor(domains[settings]))
        record = RoutingRecord({"layer": select(logits, settings)}, ctx)
        known = {"layer": settings}
        found.append(auxiliary_losses(record, [name], settings=known, options=OPTIONS)[name].item())
    assert found[0] == pytest.approx(found[1], rel=1e-12)
    assert found[0] != 0


@pytest.mark.parametrize("name", NAMES)
def test_shared_experts_do_not_count(name):
    """They have no column and a constant gate."""
    fields = FIELDS.get(name, {"top_k": 1})
    logits = logits_of(2, (B, T, 2))
    some = RouterSettings("linear", num_experts=3, shared=(1,), **fields)
    none = RouterSettings("linear", num_experts=2, **fields)
    ctx = context("padded", torch.tensor([1, 0, -1]))
    found = [
        auxiliary_losses(
            RoutingRecord({"layer": select(logits, s)}, ctx), [name], settings={"layer": s}, options=OPTIONS
        )[name].item()
        for s in (some, none)
    ]
    assert found[0] == pytest.approx(found[1], rel=1e-12)


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

    def test_a_domain_per_token_equals_one_per_sequence_where_they_agree(self):
        logits, domains = logits_of(), torch.tensor([2, -1, 0])
        per_token = domains[:, None].expand(B, T).masked_fill(~PADDED.real, -1)
        for name in ("router_label_loss_coef", "router_lbc_coef"):
            found = [computed(name, logits, context("padded", d)).item() for d in (domains, per_token)]
            assert found[0] == pytest.approx(found[1], rel=1e-12)

    def test_each_token_has_its_own_target(self):
        logits, domains = logits_of(), torch.tensor([[0, 0, 1, -1, -1], [3, 3, 2, 2, 2], [-1, -1, -1, 1, 0]])
        log = torch.log_softmax(logits, dim=-1)
        wanted = [
            -log[b, t, domains[b, t]].item()
            for b in range(B)
            for t in range(T)
            if PADDED.real[b, t] and domains[b, t] >= 0
        ]
        found = computed("router_label_loss_coef", logits, context("padded", domains)).item()
        assert found == pytest.approx(sum(wanted) / len(wanted), rel=1e-12)

    def test_one_decision_for_two_domains_has_no_right_column(self):
        logits = logits_of(shape=(B, 1, X))
        domains = torch.tensor([[2, 2, 2, -1, -1], [1, 1, 0, 0, 0], [-1, -1, 3, 3, 3]])  # padding is -1
        found = computed("router_label_loss_coef", logits, context("padded", domains)).item()
        log = torch.log_softmax(logits, dim=-1)
        assert found == pytest.approx(-(log[0, 0, 2] + log[2, 0, 3]).item() / 2, rel=1e-12)


class TestEntropy:
    def test_range(self):
        logits = torch.zeros(B, T, X, dtype=torch.float64)
        assert computed("router_entropy_coef", logits).item() == pytest.approx(math.log(X))
        logits[..., 1] = 1e4
        assert computed("router_entropy_coef", logits).item() == 0

    def test_descent_sharpens(self):
        logits = logits_of().requires_grad_()
        computed("router_entropy_coef", logits).backward()
        one, two = (torch.softmax(z, -1).amax(-1)[PADDED.real] for z in (logits, logits - 0.5 * logits.grad))
        assert (two > one).all()


class TestLocalisedBalancing:
    def test_its_minimum_favours_the_right_column(self):
        logits = torch.zeros(B, T, X, dtype=torch.float64, requires_grad=True)
        ctx = context(domains=torch.tensor([2, 0, 3]))
        optimizer = torch.optim.LBFGS([logits], max_iter=200, tolerance_grad=1e-14, tolerance_change=1e-16)

        def closure():
            optimizer.zero_grad()
            loss = computed("router_lbc_coef", logits, ctx)
            loss.backward()
            return loss

        optimizer.step(closure)
        assert closure().item() < 1e-12
        shares = torch.softmax(logits.detach(), -1).mean(1)
        for b, domain in enumerate(ctx.domains):
            wrong = [e for e in range(X) if e != domain]
            assert shares[b, wrong].tolist() == pytest.approx([shares[b, wrong[0]].item()] * 3, rel=1e-3)
            assert (shares[b, domain] / shares[b, wrong[0]]).item() == pytest.approx(1.3 / 0.7, rel=1e-3)

    @pytest.mark.parametrize("domains", [None, torch.tensor([-1, -1, -1])])
    def test_nothing_known_is_zero_with_a_gradient_of_zero(self, domains):
        logits = logits_of().requires_grad_()
        ctx = context(domains=domains)
        routing = decided(logits)
        found = localised_balancing_loss(routing, decision_weights(routing, ctx), ctx, delta=DELTA)
        found.backward()
        assert found.item() == 0
        assert (logits.grad == 0).all()


class TestSparsity:
    def test_share_of_zero_gates(self):
        logits = logits_of()
        routing = decided(logits, **FIELDS["router_l1_coef"])
        wanted = (logits[PADDED.real] <= 0).float().mean().item()
        assert zero_share(routing, decision_weights(routing, PADDED)).item() == pytest.approx(wanted)

    def test_only_open_gates_are_pulled(self):
        logits = logits_of().requires_grad_()
        computed("router_l1_coef", logits).backward()
        assert torch.equal(logits.grad > 0, (logits > 0) & PADDED.real[..., None])


class TestOrthogonality:
    @pytest.mark.parametrize("ranks", [(2, 3, 1), (4, 0, 2), (6,), (6, 0)])
    def test_equals_the_plain_loop(self, ranks):
        A = torch.randn(6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        owners = [e for e, r in enumerate(ranks) for _ in range(r)]
        squares = [
            (float(A[i] @ A[j]) / math.sqrt(float(A[i] @ A[i]) * float(A[j] @ A[j]))) ** 2
            for i in range(6)
            for j in range(6)
            if owners[i] != owners[j]
        ]
        wanted = sum(squares) / max(1, len(squares))
        assert orthogonality_loss(A, ranks).item() == pytest.approx(wanted, rel=1e-12)

    def test_range_and_gradient(self):
        assert orthogonality_loss(torch.eye(4), (2, 2)).item() == 0
        assert orthogonality_loss(torch.ones(4, 3), (1, 3)).item() == pytest.approx(1.0)
        A = torch.randn(5, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        assert torch.autograd.gradcheck(lambda a: orthogonality_loss(a, (2, 3)), A.requires_grad_())

    def test_a_zero_row_gives_no_nan(self):
        A = torch.zeros(4, 3, requires_grad=True)
        orthogonality_loss(A, (2, 2)).backward()
        assert torch.isfinite(A.grad).all()


class TestDistillation:
    @pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
    def test_equals_the_plain_loop(self, temperature):
        teacher, student = (logits_of(seed, (6, 9)).float() for seed in (0, 1))
        wanted = 0.0
        for t, s in zip(teacher.double().tolist(), student.double().tolist(), strict=True):
            p, q = (np.exp(np.array(z) / temperature) for z in (t, s))
            p, q = p / p.sum(), q / q.sum()
            wanted += temperature**2 * float((p * (np.log(p) - np.log(q))).sum())
        found = distillation_kl(teacher, student, temperature).item()
        assert found == pytest.approx(wanted, rel=1e-5)  # float32

    def test_the_teacher_gets_no_gradient_and_an_equal_student_none_to_follow(self):
        teacher = logits_of(0, (6, 9)).requires_grad_()
        student = teacher.detach().clone().requires_grad_()
        loss = distillation_kl(teacher, student, 2.0)
        loss.backward()
        assert loss.item() == pytest.approx(0, abs=1e-6)
        assert teacher.grad is None
        assert student.grad.abs().max() < 1e-6


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
