"""A network that learns from the data which condition belongs to which sample."""

from __future__ import annotations

import math

import pytest
import torch

from stillroom.data.source import ArrayData
from stillroom.diffusion.process import RectifiedFlow
from stillroom.errors import UserError
from stillroom.evaluation.agreement import Agreement, timed, trained_agreement, trained_timed_agreement


def test_of_two_gaussians_it_learns_the_posterior() -> None:
    """Classes N(-1, 1) and N(1, 1) along the first axis: log p(c = 1 | x) = -log(1 + exp(-2 x_1))."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(4000) % 2
    points = torch.randn(4000, 2, generator=generator)
    points[:, 0] += 2.0 * labels - 1
    judge = trained_agreement(ArrayData(points, {"label": labels}, ["a", "b"]), (2,), steps=300)
    x = torch.tensor([[-1.5, 0.0], [-0.5, 1.0], [0.0, 0.0], [1.0, -1.0]])
    found = judge(x, {"label": torch.ones(4, dtype=torch.long)}).exp()
    torch.testing.assert_close(found, torch.sigmoid(2 * x[:, 0]), rtol=0, atol=0.08)
    again = trained_agreement(ArrayData(points, {"label": labels}, ["a", "b"]), (2,), steps=300)
    assert torch.equal(again(x, {"label": torch.ones(4, dtype=torch.long)}).exp(), found)


def test_of_texts_it_learns_which_belongs_to_which_latent() -> None:
    generator = torch.Generator().manual_seed(0)
    which = torch.arange(600) % 3
    words = torch.randn(3, 5, 8, generator=generator)
    latents = torch.randn(600, 4, 8, 8, generator=generator) * 0.3 + which[:, None, None, None] - 1.0

    class Captioned:
        def batch(self, seed: int, step: int, size: int) -> dict[str, object]:
            rows = (torch.arange(size) * 7 + step) % 600
            return {"x": latents[rows], "cond": {"pooled": words[which[rows]].mean(1), "states": words[which[rows]]}}

    judge = trained_agreement(Captioned(), (4, 8, 8), steps=40)
    assert judge.name == "states"
    right = judge(latents[:30], {"states": words[which[:30]]})
    wrong = judge(latents[:30], {"states": words[(which[:30] + 1) % 3]})
    assert bool((right > wrong).all())


def test_it_begins_knowing_nothing_and_is_differentiable() -> None:
    torch.manual_seed(0)
    judge, x = Agreement((1, 28, 28), "label", 10), torch.zeros(4, 1, 28, 28, requires_grad=True)
    scores = judge(x, {"label": torch.arange(4)})
    assert scores.mean().item() == pytest.approx(-math.log(10), abs=0.2)
    scores.sum().backward()
    assert x.grad is not None
    assert bool(x.grad.abs().max() > 0)


def test_data_without_conditions_have_nothing_to_agree_with() -> None:
    with pytest.raises(UserError, match="neither classes nor texts"):
        trained_agreement(ArrayData(torch.randn(8, 2), {}), (2,), steps=1)


def test_of_noised_gaussians_it_learns_the_posterior_at_each_noise_level() -> None:
    """Classes N(-1, 1) and N(1, 1): under a flow x_t is N(+-(1 - t), (1 - t)^2 + t^2), so the log odds of a class are
    2 (1 - t) x_1 / ((1 - t)^2 + t^2)."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(4000) % 2
    points = torch.randn(4000, 2, generator=generator)
    points[:, 0] += 2.0 * labels - 1
    data = ArrayData(points, {"label": labels}, ["a", "b"])
    judge = trained_timed_agreement(data, (2,), 300, RectifiedFlow())
    x = torch.tensor([[-1.0, 0.0], [0.5, 1.0], [1.0, -1.0]])
    for t in (0.1, 0.5, 0.9):
        found = judge(x, {"label": torch.ones(3, dtype=torch.long)}, torch.full((3,), t)).exp()
        expected = torch.sigmoid(2 * (1 - t) * x[:, 0] / ((1 - t) ** 2 + t**2))
        torch.testing.assert_close(found, expected, rtol=0, atol=0.16)


def test_the_time_is_one_more_channel() -> None:
    share = torch.tensor([0.25, 0.75])
    assert timed(torch.zeros(2, 3), share)[:, 3].tolist() == [0.25, 0.75]
    wide = timed(torch.zeros(2, 3, 4, 5), share)
    assert wide.shape == (2, 4, 4, 5)
    assert torch.equal(wide[1, 3], torch.full((4, 5), 0.75))
