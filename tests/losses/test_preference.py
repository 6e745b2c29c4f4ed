"""The preference loss: numbers worked by hand, its gradient, and what must make it vanish or turn round."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from stillroom.losses.preference import dpo_loss

F64 = {"dtype": torch.float64}


def losses(seed: int = 0, n: int = 5) -> list[Tensor]:
    """Policy on winner and loser, reference on winner and loser."""
    return list(torch.rand(4, n, generator=torch.Generator().manual_seed(seed), **F64))


def test_by_hand() -> None:
    """Pair 1: Delta = (0.10 - 0.12) - (0.30 - 0.20) = -0.12, logit 50 * 0.12 = 6. Pair 2: Delta = 0.02, logit -1."""
    found = dpo_loss(
        torch.tensor([0.10, 0.40], **F64), torch.tensor([0.30, 0.50], **F64),
        torch.tensor([0.12, 0.38], **F64), torch.tensor([0.20, 0.50], **F64), beta=100.0, anchor=2.0,
    )  # fmt: skip
    expected = (math.log1p(math.exp(-6)) + math.log1p(math.exp(1))) / 2
    assert float(found.terms["dpo"]) == pytest.approx(expected, rel=1e-9)
    assert float(found.terms["anchor"]) == pytest.approx(2.0 * 0.25)
    assert {name: float(value) for name, value in found.health.items()} == pytest.approx(
        {"preference_accuracy": 0.5, "winner_drift": 0.0, "loser_drift": 0.05, "margin": 2.5}
    )


def test_gradient_against_finite_differences() -> None:
    win, lose, ref_win, ref_lose = losses()
    assert torch.autograd.gradcheck(
        lambda w, l: sum(dpo_loss(w, l, ref_win, ref_lose, 3.0, 0.7).terms.values()),  # noqa: E741
        (win.requires_grad_(), lose.requires_grad_()),
    )


def test_gradient_in_closed_form() -> None:
    """``d/dL_w = beta/2 sigmoid(beta/2 Delta) / B``, and the same with the other sign for the loser."""
    win, lose, ref_win, ref_lose = losses()
    win.requires_grad_(), lose.requires_grad_()
    dpo_loss(win, lose, ref_win, ref_lose, beta=8.0).terms["dpo"].backward()
    delta = (win - ref_win - lose + ref_lose).detach()
    assert win.grad is not None
    assert torch.allclose(win.grad, 4.0 * torch.sigmoid(4.0 * delta) / 5)
    assert torch.allclose(lose.grad, -win.grad)  # type: ignore[arg-type]


def test_identical_pairs_teach_nothing() -> None:
    """Winner and loser are one sample: whatever the student has become, its parameters get no gradient."""
    scale = torch.tensor(1.3, requires_grad=True, **F64)
    error, ref = losses()[:2]
    found = dpo_loss(scale * error, scale * error, ref, ref, beta=500.0)
    found.terms["dpo"].backward()
    assert float(found.terms["dpo"]) == pytest.approx(math.log(2))
    assert float(scale.grad) == pytest.approx(0.0, abs=1e-12)  # type: ignore[arg-type]
    assert float(found.health["preference_accuracy"]) == 0.5


def test_swapped_labels_turn_the_margin_round() -> None:
    """-log s(a) + log s(-a) = -a."""
    win, lose, ref_win, ref_lose = losses()
    right, wrong = dpo_loss(win, lose, ref_win, ref_lose, 6.0), dpo_loss(lose, win, ref_lose, ref_win, 6.0)
    assert float(right.health["margin"]) == pytest.approx(-float(wrong.health["margin"]))
    assert float(right.terms["dpo"] - wrong.terms["dpo"]) == pytest.approx(-float(right.health["margin"]))
    assert float(right.health["preference_accuracy"] + wrong.health["preference_accuracy"]) == 1.0


def test_a_shift_common_to_winner_and_loser_changes_nothing() -> None:
    win, lose, ref_win, ref_lose = losses()
    one = dpo_loss(win, lose, ref_win, ref_lose, 6.0).terms["dpo"]
    assert float(dpo_loss(win + 0.3, lose + 0.3, ref_win, ref_lose, 6.0).terms["dpo"]) == pytest.approx(float(one))


def test_the_reference_gets_no_gradient() -> None:
    win, lose, ref_win, ref_lose = (value.requires_grad_() for value in losses())
    dpo_loss(win, lose, ref_win, ref_lose, 6.0, 1.0).terms["dpo"].backward()
    assert ref_win.grad is None
    assert ref_lose.grad is None


def test_the_anchor_is_a_term_only_where_it_weighs() -> None:
    assert set(dpo_loss(*losses(), beta=1.0).terms) == {"dpo"}
    assert set(dpo_loss(*losses(), beta=1.0, anchor=0.1).terms) == {"dpo", "anchor"}


def test_large_margins_stay_finite() -> None:
    win = torch.tensor([1.0, -1.0], requires_grad=True)
    found = dpo_loss(win, torch.zeros(2), torch.zeros(2), torch.zeros(2), beta=5000.0)
    found.terms["dpo"].backward()
    assert float(found.terms["dpo"]) == pytest.approx(1250.0)
    assert bool(torch.isfinite(win.grad).all())  # type: ignore[union-attr]
