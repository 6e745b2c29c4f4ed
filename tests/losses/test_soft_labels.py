"""Losses on class probabilities where a class is impossible: as if it were not there."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from stillroom.losses import soft_labels as sl
from stillroom.losses.features import attention_kl, relation_kl

INF = float("inf")
Loss = Callable[[Tensor, Tensor], Tensor]


def to_probabilities(student: Tensor, teacher: Tensor) -> Tensor:
    return sl.soft_cross_entropy(student, teacher.softmax(-1))


def to_mixed_labels(student: Tensor, teacher: Tensor) -> Tensor:
    return sl.soft_cross_entropy(student, sl.mix_labels(teacher.softmax(-1), torch.zeros(len(teacher)), 0.3))


def to_an_ensemble(student: Tensor, teacher: Tensor) -> Tensor:
    return sl.soft_cross_entropy(student, sl.ensemble_probabilities([teacher, 2 * teacher], 2.0), temperature=2.0)


def decoupled(student: Tensor, teacher: Tensor) -> Tensor:
    return sl.decoupled_loss(student, teacher, torch.tensor([0, 1]), temperature=2.0)


def two_heads(student: Tensor, teacher: Tensor) -> Tensor:
    return sl.probability_mse(sl.mix_heads(student, 2 * student), teacher.softmax(-1)) * student.shape[-1]


def of_queries(loss: Loss) -> Loss:
    """A loss of attention maps ``[B, heads, N, N]``, of rows of logits."""
    return lambda student, teacher: loss(student[None, None], teacher[None, None])


def of_maps(student: Tensor, teacher: Tensor) -> Tensor:
    return attention_kl(student.softmax(-1)[None, None], teacher.softmax(-1)[None, None])


LOSSES: dict[str, Loss] = {
    "forward_kl": sl.forward_kl,
    "reverse_kl": sl.reverse_kl,
    "jsd": sl.jsd,
    "jsd-0.1": functools.partial(sl.jsd, beta=0.1, temperature=2.0),
    "soft_cross_entropy": to_probabilities,
    "mix_labels": to_mixed_labels,
    "ensemble": to_an_ensemble,
    "decoupled": decoupled,
    "mix_heads": two_heads,
    "relation_kl": of_queries(relation_kl),
    "attention_kl": of_maps,
}


def judged(loss: Loss, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    student = student.clone().requires_grad_()
    value = loss(student, teacher)
    (gradient,) = torch.autograd.grad(value, student)
    return value.detach(), gradient


@pytest.mark.parametrize("name", LOSSES)
def test_a_class_impossible_for_both_is_as_if_it_were_not_there(name: str) -> None:
    student, teacher = (
        torch.tensor([[1.0, 0.5, 0.2, -0.7], [0.1, 0.9, 0.0, 0.4]]),
        torch.tensor([[0.3, 1.0, 0.1, 0.2], [2.0, -1.0, 0.5, 0.6]]),
    )
    value, gradient = judged(LOSSES[name], student, teacher)
    assert bool(value.isfinite())
    assert bool(gradient.abs().max() > 0)
    nowhere = torch.full((2, 1), -INF)
    more, slope = judged(LOSSES[name], *(torch.cat([z, nowhere], 1) for z in (student, teacher)))
    torch.testing.assert_close(more, value)
    torch.testing.assert_close(slope, torch.cat([gradient, torch.zeros(2, 1)], 1))


@pytest.mark.parametrize("name", ["forward_kl", "jsd", "soft_cross_entropy", "decoupled"])
def test_a_class_impossible_for_the_teacher_alone_keeps_the_student_s_gradient_finite(name: str) -> None:
    """By central differences in float64."""
    student = torch.tensor([[1.0, 0.5, 0.1, 0.2], [0.1, 0.9, 0.0, 0.4]], dtype=torch.float64)
    teacher = torch.tensor([[0.3, 1.0, -INF, 0.1], [2.0, -1.0, -INF, 0.6]], dtype=torch.float64)
    _, gradient = judged(LOSSES[name], student, teacher)
    h, by_differences = 1e-2, torch.zeros_like(student)
    for place in range(student.numel()):
        step = torch.zeros(student.numel(), dtype=torch.float64)
        step[place] = h
        ends = [float(LOSSES[name](student + sign * step.view_as(student), teacher)) for sign in (1, -1)]
        by_differences.view(-1)[place] = (ends[0] - ends[1]) / (2 * h)
    torch.testing.assert_close(gradient, by_differences, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd", "soft_cross_entropy"])
@pytest.mark.parametrize("filling", [-INF, float("nan"), 6e4])
def test_what_stands_at_positions_that_do_not_count_spoils_nothing(name: str, filling: float) -> None:
    student, teacher = (
        torch.tensor([[1.0, 0.5, 0.2], [0.1, 0.9, 0.0]]),
        torch.tensor([[0.3, 1.0, 0.1], [2.0, -1.0, 0.5]]),
    )
    keep = torch.tensor([True, False])

    def loss(student: Tensor, teacher: Tensor, keep: Tensor | None = keep) -> Tensor:
        if name == "soft_cross_entropy":
            return sl.soft_cross_entropy(student, teacher.softmax(-1), keep=keep)
        return getattr(sl, name)(student, teacher, keep=keep)

    value, gradient = judged(functools.partial(loss, keep=None), student[:1], teacher[:1])
    for both in (False, True):
        spoilt, other = student.clone(), teacher.clone()
        other[1] = filling
        if both:
            spoilt[1] = filling
        more, slope = judged(loss, spoilt, other)
        torch.testing.assert_close(more, value)
        torch.testing.assert_close(slope, torch.cat([gradient, torch.zeros(1, 3)]))


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd"])
def test_a_low_temperature_keeps_gradients_finite(name: str) -> None:
    student, teacher = torch.tensor([[1.0, 0.5, 9.0]]), torch.tensor([[8.0, 1.0, -3.0]])
    for kind in (torch.float32, torch.float16, torch.bfloat16):
        value, gradient = judged(functools.partial(getattr(sl, name), temperature=0.05), student.to(kind), teacher)
        assert bool(value.isfinite())
        assert bool(gradient.isfinite().all())


def test_a_student_that_excludes_what_the_teacher_may_choose_is_infinitely_wrong() -> None:
    student, teacher = torch.tensor([[1.0, -INF]]), torch.tensor([[0.0, 0.0]])
    assert float(sl.forward_kl(student, teacher)) == INF
    assert float(sl.soft_cross_entropy(student, teacher.softmax(-1))) == INF
    assert float(sl.jsd(student, teacher)) < float(torch.tensor(2.0).log())
