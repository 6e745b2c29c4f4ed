"""Losses on logits and features, layer maps and the mutual-information bound: worked examples and closed forms."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div

from stillroom.errors import UserError
from stillroom.losses import features as f
from stillroom.losses import layer_maps as maps
from stillroom.losses import soft_labels as soft
from stillroom.losses.adversarial import logit_discrimination
from stillroom.losses.mutual_information import i_alpha
from stillroom.networks.critics import LogitDiscriminator, MICritic, TokenEncoder

HALF, QUARTER = math.log(0.5), math.log(0.25)
S = torch.tensor([[HALF, HALF]])  # the student is undecided
T = torch.tensor([[math.log(0.75), QUARTER]])  # the teacher is not


# --- logits -----------------------------------------------------------------------------------------------------------
def test_divergences_of_two_coins() -> None:
    torch.testing.assert_close(soft.forward_kl(S, T), torch.tensor(0.75 * math.log(1.5) + 0.25 * math.log(0.5)))
    torch.testing.assert_close(soft.reverse_kl(S, T), torch.tensor(0.5 * math.log(2 / 3) + 0.5 * math.log(2)))
    torch.testing.assert_close(soft.soft_cross_entropy(S, T.exp()), torch.tensor(math.log(2)))
    m = (0.625, 0.375)
    expected = 0.5 * (0.75 * math.log(0.75 / m[0]) + 0.25 * math.log(0.25 / m[1]))
    expected += 0.5 * (0.5 * math.log(0.5 / m[0]) + 0.5 * math.log(0.5 / m[1]))
    torch.testing.assert_close(soft.jsd(S, T), torch.tensor(expected))


def test_forward_kl_is_torchs() -> None:
    student, teacher = torch.randn(2, 6, 5)
    for tau in (1.0, 2.5):
        reference = kl_div(
            (student / tau).log_softmax(-1), (teacher / tau).log_softmax(-1), log_target=True, reduction="batchmean"
        )
        torch.testing.assert_close(soft.forward_kl(student, teacher, temperature=tau, reduction="batchmean"), reference)
        squared = soft.forward_kl(student, teacher, temperature=tau, temperature_squared=True)
        torch.testing.assert_close(squared, tau**2 * reference)


def test_jsd_ends_in_the_two_divergences() -> None:
    student, teacher = torch.randn(2, 4, 5)
    low, high = soft.jsd(student, teacher, beta=1e-3) / 1e-3, soft.jsd(student, teacher, beta=1 - 1e-3) / 1e-3
    torch.testing.assert_close(low, soft.forward_kl(student, teacher), rtol=2e-2, atol=0)
    torch.testing.assert_close(high, soft.reverse_kl(student, teacher), rtol=2e-2, atol=0)


def test_gradient_of_soft_cross_entropy_is_the_difference_of_probabilities() -> None:
    student = torch.randn(4, 3, requires_grad=True)
    target = soft.ensemble_probabilities([torch.randn(4, 3), torch.randn(4, 3)])
    soft.soft_cross_entropy(student, target).backward()
    torch.testing.assert_close(student.grad, (student.detach().softmax(-1) - target) / 4)


def test_an_ensemble_averages_probabilities_not_logits() -> None:
    one, two = torch.tensor([[4.0, 0.0, 0.0]]), torch.tensor([[0.0, 2.0, 0.0]])
    mean = soft.ensemble_probabilities([one, two])
    torch.testing.assert_close(mean, (one.softmax(-1) + two.softmax(-1)) / 2)
    assert float((mean - ((one + two) / 2).softmax(-1)).abs().max()) > 0.1


def test_a_class_that_a_model_rules_out_gives_no_nan() -> None:
    teacher = torch.tensor([[0.0, 0.0, -torch.inf]])
    student = torch.zeros(1, 3, requires_grad=True)
    loss = soft.forward_kl(student, teacher)
    torch.testing.assert_close(loss.detach(), torch.tensor(math.log(1.5)))
    loss.backward()
    torch.testing.assert_close(student.grad, torch.tensor([[-1 / 6, -1 / 6, 1 / 3]]))
    assert float(soft.reverse_kl(torch.zeros(1, 3), teacher)) == math.inf


def test_reductions_and_masks() -> None:
    student, teacher = torch.randn(2, 2, 3, 5)
    keep = torch.tensor([[True, True, False], [True, False, False]])
    each = soft.forward_kl(student, teacher, reduction="none", keep=keep)
    assert each.shape == (2, 3)
    assert bool((each[~keep] == 0).all())
    torch.testing.assert_close(soft.forward_kl(student, teacher, keep=keep), each.sum() / 3)
    torch.testing.assert_close(soft.forward_kl(student, teacher, reduction="sum", keep=keep), each.sum())
    torch.testing.assert_close(soft.forward_kl(student, teacher, reduction="batchmean", keep=keep), each.sum() / 2)
    poisoned = torch.where(keep[..., None], student, torch.nan)
    torch.testing.assert_close(soft.forward_kl(poisoned, teacher, keep=keep), each.sum() / 3)
    assert float(soft.forward_kl(student, teacher, keep=torch.zeros(2, 3, dtype=torch.bool))) == 0


def test_the_two_ways_to_mix_in_the_ground_truth_agree() -> None:
    logits, target, labels = torch.randn(5, 4), torch.randn(5, 4).softmax(-1), torch.tensor([0, 3, 1, 1, 2])
    mixed = soft.soft_cross_entropy(logits, soft.mix_labels(target, labels, 0.3))
    apart = soft.mix_ground_truth(soft.soft_cross_entropy(logits, target), cross_entropy(logits, labels), 0.3)
    torch.testing.assert_close(mixed, apart)
    torch.testing.assert_close(soft.mix_labels(target, labels, 0.3).sum(-1), torch.ones(5))


def test_two_heads_mix_their_probabilities() -> None:
    """Heads that fit label and teacher reproduce, with alpha = lambda, the one head's optimum (DHO)."""
    label, teacher = torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([[0.2, 0.5, 0.3]])
    ce, kd = label.clamp(min=1e-12).log(), teacher.log()
    torch.testing.assert_close(soft.mix_heads(ce, kd, 0.4), 0.4 * label + 0.6 * teacher)
    torch.testing.assert_close(soft.mix_heads(ce, kd, 1.0, 7.0), label)
    torch.testing.assert_close(soft.mix_heads(ce, kd, 0.0, 2.0), (kd / 2).softmax(-1))


def test_decoupled_loss_by_hand() -> None:
    student, teacher = torch.tensor([[1.0, 2.0, 0.5]]), torch.tensor([[0.0, 1.0, 3.0]])
    p_s, p_t = student.softmax(-1)[0].tolist(), teacher.softmax(-1)[0].tolist()
    rest_s = [p_s[0] / (p_s[0] + p_s[2]), p_s[2] / (p_s[0] + p_s[2])]
    rest_t = [p_t[0] / (p_t[0] + p_t[2]), p_t[2] / (p_t[0] + p_t[2])]
    expected = -p_t[1] * math.log(p_s[1]) - 1.5 * sum(a * math.log(b) for a, b in zip(rest_t, rest_s, strict=True))
    loss = soft.decoupled_loss(student, teacher, torch.tensor([1]), alpha=1.5)
    torch.testing.assert_close(loss, torch.tensor(expected))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: soft.forward_kl(torch.zeros(2, 3), torch.zeros(2, 4)), "same classes"),
        (lambda: soft.forward_kl(S, T, temperature=0.0), "above 0"),
        (lambda: soft.forward_kl(S, T, reduction="max"), "unknown reduction"),  # type: ignore[arg-type]
        (lambda: soft.forward_kl(S, T, keep=torch.ones(2, dtype=torch.bool)), "the mask has shape"),
        (lambda: soft.jsd(S, T, beta=1.0), "strictly between"),
        (lambda: soft.mix_ground_truth(torch.tensor(1.0), torch.tensor(1.0), 1.5), "lies in"),
        (lambda: soft.ensemble_probabilities([]), "at least one teacher"),
        (lambda: f.mse(torch.zeros(1, 2, 3), torch.zeros(1, 2, 4)), "project the student"),
        (lambda: f.get_distance("cosin"), "did you mean 'cosine'"),
        (lambda: f.normalised(torch.zeros(1, 2), "l3"), "unknown normalisation"),  # type: ignore[arg-type]
        (lambda: f.relation_kl(torch.zeros(1, 2, 3, 3), torch.zeros(1, 4, 3, 3)), "split_heads"),
        (lambda: maps.layer_map("skp", 4, 2), "did you mean 'skip'"),
        (lambda: maps.skip(5, 2), "uniform map"),
        (lambda: maps.last(2, 3), "no layer map"),
        (lambda: maps.at_fraction(1.5, 4), "lies in"),
        (lambda: maps.emd(torch.tensor([[torch.nan]])), "finite matrix"),
        (lambda: maps.emd(torch.zeros(2, 2), rows=torch.tensor([1.0, 1.0])), "of sum 1"),
        (lambda: i_alpha(torch.zeros(2, 2), torch.zeros(2), 1.5), "lies in"),
        (lambda: i_alpha(torch.zeros(1, 1), torch.zeros(1), 1.0), "B >= 2"),
        (lambda: i_alpha(torch.zeros(2, 2), torch.zeros(2), 1.0, torch.eye(2).bool()), "no negative"),
        (lambda: logit_discrimination(nn.Linear(2, 2), S, T, sign=0), "student ascends"),
    ],
)
def test_mistakes_are_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        call()


# --- features ---------------------------------------------------------------------------------------------------------
def test_distances_by_hand() -> None:
    s, t = torch.tensor([[[3.0, 4.0]]]), torch.tensor([[[0.0, 2.0]]])
    expected = {"mse": 6.5, "l1": 2.5, "l2": 13.0, "smooth_l1": 2.0, "cosine": 0.2}
    for name, value in expected.items():
        torch.testing.assert_close(f.get_distance(name)(s, t), torch.tensor(value), msg=name)
    # normalised: (0.6, 0.8) against (0, 1)
    torch.testing.assert_close(f.l1(s, t, normalise="l2"), torch.tensor(0.4))
    torch.testing.assert_close(f.l2(s, t, normalise="l2"), torch.tensor(0.4))
    torch.testing.assert_close(f.l2(s, t, normalise="l2"), 2 * f.cosine(s, t))
    # G2SD: the target alone is whitened, to (-1, 1); differences 4 and 3, both beyond beta = 2
    torch.testing.assert_close(f.smooth_l1(s, t, beta=2.0, target="layer"), torch.tensor(2.5), rtol=1e-5, atol=1e-5)


def test_masked_tokens_do_not_count() -> None:
    s, t, keep = torch.randn(2, 3, 4), torch.randn(2, 3, 4), torch.tensor([[True, True, False], [True, False, False]])
    changed = torch.where(keep[..., None], s, 100 * torch.randn(2, 3, 4))
    for name, distance in f.DISTANCES.items():
        torch.testing.assert_close(distance(s, t, keep=keep), distance(changed, t, keep=keep), msg=name)
    torch.testing.assert_close(f.mse(s, t, keep=keep), (s - t)[keep].square().mean())
    torch.testing.assert_close(f.cka_loss(s, t, keep=keep), f.cka_loss(s[keep], t[keep]))


def test_teachers_get_no_gradient_and_halves_are_made_floats() -> None:
    for name, distance in f.DISTANCES.items():
        s, t = (torch.randn(2, 5, 4, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
        loss = distance(s, t)
        assert loss.dtype == torch.float32, name
        loss.backward()
        assert t.grad is None, name
        assert s.grad is not None, name
        assert float(s.grad.abs().sum()) > 0, name


def test_cka_does_not_see_rotation_scale_or_shift_but_sees_everything_else() -> None:
    x = torch.randn(50, 6)
    rotation = torch.linalg.qr(torch.randn(6, 6))[0]
    assert float(f.cka_loss(3 * x @ rotation + 5, x)) < 1e-5
    # one example in each of two orthogonal directions: closed form. x has one direction, y shares it in half its energy
    a, b = torch.tensor([1.0, -1.0, 0.0, 0.0]), torch.tensor([0.0, 0.0, 1.0, -1.0])
    torch.testing.assert_close(f.cka_loss(torch.stack([a, b], 1), a[:, None]), torch.tensor(1 - 1 / math.sqrt(2)))
    torch.testing.assert_close(f.cka_loss(b[:, None], a[:, None]), torch.tensor(1.0))


def test_relation_kl_by_hand() -> None:
    teacher = torch.tensor([[[[math.log(3.0), 0.0], [0.0, 0.0]]]])  # rows (3/4, 1/4) and (1/2, 1/2)
    student = torch.zeros(1, 1, 2, 2)
    first = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    torch.testing.assert_close(f.relation_kl(student, teacher), torch.tensor(first / 2))
    torch.testing.assert_close(f.attention_kl(student.softmax(-1), teacher.softmax(-1)), torch.tensor(first / 2))
    torch.testing.assert_close(f.attention_mse(student, teacher), torch.tensor(math.log(3.0) ** 2 / 4))


def test_padded_tokens_count_neither_as_queries_nor_as_keys() -> None:
    student, teacher = torch.randn(2, 1, 3, 4, 4)
    keep = torch.tensor([[True, True, True, False]])
    inside = student[..., :3, :3], teacher[..., :3, :3]
    torch.testing.assert_close(f.relation_kl(student, teacher, keep=keep), f.relation_kl(*inside))
    torch.testing.assert_close(f.attention_mse(student, teacher, keep=keep), f.attention_mse(*inside))
    tokens = torch.tensor([[0, 1, 2]])
    torch.testing.assert_close(f.gather_relation(student, tokens), inside[0])
    torch.testing.assert_close(f.gather_relation(student, torch.tensor([[3, 1]]))[0, 2, 0, 1], student[0, 2, 3, 1])


def test_relation_scales_by_the_head_width() -> None:
    q = torch.ones(1, 1, 2, 16)
    torch.testing.assert_close(f.relation(q, q), torch.full((1, 1, 2, 2), 4.0))


# --- layer maps -------------------------------------------------------------------------------------------------------
def test_maps_of_depths() -> None:
    assert maps.layer_map("skip", 12, 4) == maps.layer_map("uniform", 12, 4) == (2, 5, 8, 11)
    assert maps.layer_map("uniform", 12, 5) == (1, 4, 6, 9, 11)
    assert maps.layer_map("last", 12, 4) == (8, 9, 10, 11)
    assert maps.at_fraction(0.75, 24, 12) == (17, 8)
    assert maps.uniform(3, 3) == maps.last(3, 3) == (0, 1, 2)
    expected = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 0.0], [0.0, 1.0]])
    torch.testing.assert_close(maps.as_weights(maps.skip(4, 2), 4), expected)


@given(st.integers(1, 40), st.integers(1, 40))
def test_uniform_maps_rise_and_end_at_the_last_layer(teacher: int, student: int) -> None:
    if student > teacher:
        with pytest.raises(UserError):
            maps.uniform(teacher, student)
        return
    layers = maps.uniform(teacher, student)
    assert layers[0] >= 0
    assert layers[-1] == teacher - 1
    assert all(a < b for a, b in itertools.pairwise(layers))


def cheapest_by_brute_force(cost: Tensor, rows: Tensor, columns: Tensor) -> float:
    """Over all vertices of the transport polytope: plans with at most M + N - 1 used cells, each found by solving the
    marginal equations on those cells."""
    m, n = cost.shape
    cells = list(itertools.product(range(m), range(n)))
    wanted = torch.cat([rows, columns]).double()
    best = math.inf
    for used in itertools.combinations(cells, m + n - 1):
        equations = torch.zeros(m + n, len(used), dtype=torch.float64)
        for k, (i, j) in enumerate(used):
            equations[i, k] = equations[m + j, k] = 1
        mass = torch.linalg.lstsq(equations, wanted, driver="gelsd").solution
        if float((equations @ mass - wanted).abs().max()) < 1e-9 and float(mass.min()) > -1e-9:
            best = min(best, sum(float(x) * float(cost[c]) for x, c in zip(mass, used, strict=True)))
    return best


@pytest.mark.parametrize(("m", "n"), [(2, 2), (4, 2), (3, 3), (4, 3), (5, 1)])
@pytest.mark.parametrize("uniform", [True, False])
def test_emd_is_the_cheapest_plan(m: int, n: int, uniform: bool) -> None:
    for _ in range(2):
        cost = torch.rand(m, n, dtype=torch.float64) - 0.3
        rows = torch.full((m,), 1 / m).double() if uniform else torch.rand(m).double().add(0.01)
        columns = torch.full((n,), 1 / n).double() if uniform else torch.rand(n).double().add(0.01)
        rows, columns = rows / rows.sum(), columns / columns.sum()
        plan = maps.emd(cost) if uniform else maps.emd(cost, rows, columns)
        torch.testing.assert_close(plan.sum(1), rows, rtol=0, atol=1e-7)
        torch.testing.assert_close(plan.sum(0), columns, rtol=0, atol=1e-7)
        assert float(plan.min()) >= 0
        assert float((plan * cost).sum()) == pytest.approx(cheapest_by_brute_force(cost, rows, columns), abs=1e-7)


def test_emd_undoes_an_early_choice() -> None:
    """Cell (0, 0) is the cheapest of all, and wrong: it leaves 10 for the other pair."""
    plan = maps.emd(torch.tensor([[0.0, 1.0], [1.0, 10.0]]))
    torch.testing.assert_close(plan, torch.tensor([[0.0, 0.5], [0.5, 0.0]]))


def test_emd_of_deep_networks_and_of_large_costs() -> None:
    """Costs |i/M - j/N| are cheapest in order: sorted against sorted, the optimum on a line."""
    m, n = 24, 10
    position = (torch.arange(m).double() + 0.5) / m, (torch.arange(n).double() + 0.5) / n
    cost = (position[0][:, None] - position[1]).abs()
    fine = torch.arange(m * n) // n, torch.arange(m * n) // m
    best = float(cost[fine].mean())
    for scale in (1.0, 1e6):
        plan = maps.emd(scale * cost)
        assert float((plan * cost).sum()) == pytest.approx(best, abs=1e-9)


def test_a_mapped_loss_moves_the_losses_not_the_plan() -> None:
    losses = torch.tensor([[1.0, 4.0], [2.0, 3.0]], requires_grad=True)
    loss = maps.mapped_loss(maps.emd(losses), losses)
    torch.testing.assert_close(loss.detach(), torch.tensor(2.0))
    loss.backward()
    torch.testing.assert_close(losses.grad, torch.tensor([[0.5, 0.0], [0.0, 0.5]]))


# --- mutual information -----------------------------------------------------------------------------------------------
def test_i_alpha_ends_in_infonce_and_tuba() -> None:
    scores, baseline = torch.randn(6, 6), torch.randn(6)
    infonce = (scores.diagonal() - scores.logsumexp(0) + math.log(6)).mean()
    torch.testing.assert_close(i_alpha(scores, baseline, 1.0), infonce)
    off = scores.masked_fill(torch.eye(6).bool(), -torch.inf)
    tuba = 1 + (scores.diagonal() - baseline).mean() - (off.logsumexp(0) - math.log(5) - baseline).exp().mean()
    torch.testing.assert_close(i_alpha(scores, baseline, 0.0), tuba)


def test_i_alpha_by_hand_and_without_duplicates() -> None:
    scores, baseline = torch.tensor([[2.0, 0.0], [1.0, 3.0]]), torch.tensor([0.5, -0.5])
    alpha, total = 0.25, 0.0
    for j in range(2):
        every = (math.exp(scores[0, j]) + math.exp(scores[1, j])) / 2
        other = math.exp(scores[1 - j, j])
        q = math.exp(baseline[j])
        total += float(scores[j, j]) - math.log(alpha * every + (1 - alpha) * q)
        total -= other / (alpha * other + (1 - alpha) * q)
    torch.testing.assert_close(i_alpha(scores, baseline, alpha), torch.tensor(1 + total / 2))


def test_a_duplicate_that_is_no_negative_is_as_good_as_absent() -> None:
    scores, baseline = torch.randn(3, 3), torch.randn(3)
    twice = torch.tensor([0, 1, 2, 0])  # example 3 is example 0 again
    negatives = twice[:, None] != twice
    negatives[3] = False  # nor does it count twice against the others
    alone = [_column(scores, baseline, j) for j in range(3)]
    found = i_alpha(scores[twice][:, twice], baseline[twice], 0.25, negatives)
    torch.testing.assert_close(found, 1 + torch.stack([alone[j] for j in twice]).mean())
    torch.testing.assert_close(i_alpha(scores, baseline, 0.25), 1 + torch.stack(alone).mean())


def _column(scores: Tensor, baseline: Tensor, j: int, alpha: float = 0.25) -> Tensor:
    q, rest = (1 - alpha) * baseline[j].exp(), torch.arange(3) != j
    other = scores[rest, j].exp().mean()
    return scores[j, j] - (alpha * scores[:, j].exp().mean() + q).log() - other / (alpha * other + q)


def test_i_alpha_on_gaussians_trades_variance_for_bias() -> None:
    """Correlated Gaussians in 20 dimensions, the best critic log p(y|x) / p(y), batches of 64: the bias grows and the
    spread falls with alpha, and no value passes its ceiling (Poole et al., arXiv 1905.06922)."""
    dim, size, true = 20, 64, 6.0
    rho = math.sqrt(1 - math.exp(-2 * true / dim))
    means, spreads = [], []
    for alpha in (0.01, 0.1, 0.5, 1.0):
        torch.manual_seed(1)
        values = []
        for _ in range(200):
            x = torch.randn(size, dim)
            y = rho * x + math.sqrt(1 - rho**2) * torch.randn(size, dim)
            gap = (y[None] - rho * x[:, None]).square().sum(-1) / (1 - rho**2)
            scores = -0.5 * gap - 0.5 * dim * math.log(1 - rho**2) + 0.5 * y.square().sum(-1)
            values.append(float(i_alpha(scores, torch.zeros(size), alpha)))
        assert max(values) <= 1 + math.log(size / alpha)
        means.append(sum(values) / len(values))
        spreads.append(float(torch.tensor(values).std()))
    assert means == pytest.approx([5.80, 5.29, 4.60, 3.75], abs=0.12)
    assert sorted(means, reverse=True) == means
    assert sorted(spreads, reverse=True) == spreads


def test_i_alpha_survives_huge_scores() -> None:
    scores = (500 * torch.randn(8, 8)).requires_grad_()
    for alpha in (0.0, 0.3, 1.0):
        value = i_alpha(scores, torch.zeros(8), alpha)
        (gradient,) = torch.autograd.grad(value, scores)
        assert bool(torch.isfinite(value) & torch.isfinite(gradient).all())


@pytest.mark.parametrize("kind", ["transformer", "mlp"])
def test_critics_start_at_a_baseline_of_one_and_ignore_padding(kind: Literal["transformer", "mlp"]) -> None:
    critic = MICritic(6, 4, width=8, heads=2, kind=kind)
    x, y = torch.randn(5, 3, 6), torch.randn(5, 7, 4)
    keep = torch.ones(5, 7, dtype=torch.bool)
    keep[:, 5:] = False
    scores, log_q = critic(x, y, keep_y=keep)
    assert scores.shape == (5, 5)
    assert bool((log_q == 0).all())
    changed = torch.where(keep[..., None], y, 50 * torch.randn(5, 7, 4))
    torch.testing.assert_close(critic(x, changed, keep_y=keep)[0], scores)
    (-i_alpha(scores, log_q, 0.5)).backward()
    for part in (critic.g, critic.h, critic.log_q):
        assert all(p.grad is not None for p in part.parameters())
    torch.testing.assert_close(critic(x, y[:, :5])[0], scores)
    assert TokenEncoder(4, 8, 2, kind)(torch.randn(3, 4)).shape == (3, 8)


def test_a_critic_learns_the_information_that_there_is() -> None:
    """Two bits: x says which of four classes y belongs to. The bound rises to log 4 and not beyond."""
    critic = MICritic(4, 4, width=16, kind="mlp")
    optimizer = torch.optim.Adam(critic.parameters(), 1e-2)
    label = torch.arange(4)
    for _ in range(60):
        scores, log_q = critic(4 * torch.eye(4)[label], 4 * torch.eye(4)[label])
        loss = -i_alpha(scores, log_q, 1.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert -float(loss.detach()) == pytest.approx(math.log(4), abs=0.05)


# --- the discriminator of logits --------------------------------------------------------------------------------------
def test_a_discriminator_has_meal_v2s_sizes() -> None:
    sizes = [tuple(m.weight.shape) for m in LogitDiscriminator(1000).modules() if isinstance(m, nn.Linear)]
    assert sizes == [(125, 1000), (15, 125), (2, 15)]
    assert [tuple(m.weight.shape) for m in LogitDiscriminator(10).modules() if isinstance(m, nn.Linear)] == [
        (16, 10), (16, 16), (2, 16)
    ]  # fmt: skip


def test_discrimination_by_hand_and_the_floor_of_the_final_relu() -> None:
    identity = nn.Identity()
    student, teacher = torch.tensor([[2.0, -1.0]]), torch.tensor([[0.5, 1.0]])
    softplus = [math.log1p(math.exp(v)) for v in (-2.0, -1.0, 0.5, -1.0)]
    torch.testing.assert_close(logit_discrimination(identity, student, teacher), torch.tensor(sum(softplus) / 4))
    assert float(LogitDiscriminator(70, final_relu=True)(torch.randn(9, 70)).min()) >= 0
    perfect = logit_discrimination(nn.ReLU(), torch.tensor([[50.0, -50.0]]), torch.tensor([[-50.0, 50.0]]))
    torch.testing.assert_close(perfect, torch.tensor(math.log(2) / 2))


def test_the_sign_turns_the_students_gradient_alone() -> None:
    discriminator = LogitDiscriminator(6)
    student = torch.randn(4, 6, requires_grad=True)
    teacher = torch.randn(4, 6, requires_grad=True)
    loss, found = {}, {}
    for sign in (1, -1):
        loss[sign] = logit_discrimination(discriminator, student, teacher, sign)
        inputs = [student, *discriminator.parameters()]
        found[sign] = torch.autograd.grad(loss[sign], inputs, retain_graph=True)
        assert torch.autograd.grad(loss[sign], teacher, allow_unused=True) == (None,)
    torch.testing.assert_close(loss[1], loss[-1])
    torch.testing.assert_close(found[1][0], -found[-1][0])
    assert float(found[1][0].abs().sum()) > 0
    for a, b in zip(found[1][1:], found[-1][1:], strict=True):
        torch.testing.assert_close(a, b)
