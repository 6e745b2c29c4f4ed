"""Denoisers: exact answers for exact networks, guidance algebra, costs, errors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from gaussians import PROCESSES, exact
from stillroom.diffusion.denoiser import KINDS, Denoiser
from stillroom.diffusion.process import EDM, RectifiedFlow
from stillroom.errors import UserError
from tiny_denoisers import point_teacher

MIXTURE = {"means": ((0.5, -1.0), (-0.7, 0.6), (1.5, 1.0)), "stds": (0.3, 0.5, 0.8), "weights": (0.2, 0.5, 0.3)}
CASES = [(name, kind) for name in PROCESSES for kind in KINDS if kind != "edm" or name == "edm"]


def noisy(process_name: str) -> tuple[Tensor, Tensor]:
    process = PROCESSES[process_name]
    t = process.time_of(torch.ones(6), torch.tensor([0.1, 0.3, 0.7, 1.0, 2.0, 6.0])).float()
    return process.add_noise(torch.randn(6, 2), torch.randn(6, 2), t), t


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_an_exact_network_gives_the_gradient_of_the_log_density_and_the_posterior_mean(name: str, kind: str) -> None:
    process, denoiser = PROCESSES[name], exact(PROCESSES[name], kind, **MIXTURE)
    x_t, t = noisy(name)
    answer = denoiser(x_t, t)
    a, s = process.alpha(t.double()), process.sigma(t.double())
    x = x_t.double().requires_grad_()
    score = torch.autograd.grad(denoiser.network.log_density(x, a, s).sum(), x)[0]  # type: ignore[operator]
    torch.testing.assert_close(answer.score.double(), score, rtol=2e-3, atol=2e-3)
    tweedie = (x_t + s[:, None] ** 2 * score) / a[:, None]
    torch.testing.assert_close(answer.x0.double(), tweedie, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(answer.eps.double(), -s[:, None] * score, rtol=2e-3, atol=2e-3)


def test_the_posterior_mean_of_one_gaussian_is_the_precision_weighted_mean() -> None:
    m, v, x = torch.tensor([0.3, -0.4]), 0.49, torch.tensor([[1.0, 2.0]])
    a, s = 0.6, 0.4
    answer = exact(RectifiedFlow(), "v", (m.tolist(),), (v**0.5,))(x, torch.tensor([s]))
    torch.testing.assert_close(answer.x0, (m / v + a * x / s**2) / (1 / v + a**2 / s**2), rtol=1e-5, atol=1e-6)


class Affine(nn.Module):
    """Says ``label * x``; counts calls and rows."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def forward(self, x: Tensor, time: Tensor, cond: dict[str, Tensor]) -> Tensor:
        self.seen.append(len(x))
        return cond["label"][:, None] * x if "label" in cond else x


@pytest.fixture
def affine() -> Denoiser:
    return Denoiser(Affine(), RectifiedFlow(), "v", null={"label": 7}, shape=(2,))


@pytest.mark.parametrize(("w", "factor", "rows"), [(0.0, 7.0, 3), (1.0, 2.0, 3), (2.0, -3.0, 6), (-1.0, 12.0, 6)])
def test_guidance_is_uncond_plus_w_times_the_difference(affine: Denoiser, w: float, factor: float, rows: int) -> None:
    x, t = torch.randn(3, 2), torch.tensor([0.2, 0.5, 0.9])
    for time in (t, torch.tensor(0.4)):
        affine.network.seen.clear()  # type: ignore[union-attr,operator]
        answer = affine(x, time, {"label": torch.full((3,), 2)}, w)
        torch.testing.assert_close(answer.value, factor * x)
        assert affine.network.seen == [rows]  # one call, and twice the rows only where two answers are needed


def test_guidance_acts_in_the_network_output_space_and_then_converts() -> None:
    denoiser = exact(RectifiedFlow(), "v", ((0.0, 0.0),), (0.5,), offsets=((1.0, 0.0), (-1.0, 0.0), (0.0, 0.0)))
    x, t = torch.randn(4, 2), torch.full((4,), 0.6)
    label = torch.tensor([0, 1, 0, 1])
    conditional, null = denoiser(x, t, {"label": label}), denoiser(x, t, {"label": torch.full((4,), 2)})
    guided = denoiser(x, t, {"label": label}, 3.0)
    torch.testing.assert_close(guided.v, null.v + 3 * (conditional.v - null.v), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(guided.score, null.score + 3 * (conditional.score - null.score), rtol=1e-4, atol=1e-4)


def test_null_values_may_be_tensors_and_keep_the_type_of_the_condition() -> None:
    denoiser = Denoiser(Affine(), RectifiedFlow(), null={"text": torch.arange(6.0).reshape(2, 3), "label": 4})
    null = denoiser.null_cond(
        {"text": torch.ones(5, 2, 3, dtype=torch.float64), "label": torch.zeros(5, dtype=torch.long)}
    )
    assert null["text"].shape == (5, 2, 3)
    assert null["text"].dtype == torch.float64
    assert torch.equal(null["label"], torch.full((5,), 4))
    torch.testing.assert_close(null["text"][3], torch.arange(6.0).double().reshape(2, 3))


def test_chosen_rows_are_told_nothing() -> None:
    denoiser = exact(RectifiedFlow(), offsets=((0.0, 0.0),) * 5)
    cond = {"label": torch.arange(4)}
    assert torch.equal(denoiser.without(cond, cond["label"] > 1)["label"], torch.tensor([0, 1, 4, 4]))


def test_guidance_without_conditions_is_the_plain_answer(affine: Denoiser) -> None:
    x = torch.randn(2, 2)
    assert torch.equal(affine(x, 0.5, {}, 4.0).value, x)


def test_guidance_without_a_null_value_names_the_condition() -> None:
    denoiser = Denoiser(Affine(), RectifiedFlow(), "v")
    with pytest.raises(UserError, match="unconditional value for: label"):
        denoiser(torch.ones(1, 2), 0.5, {"label": torch.ones(1)}, 2.0)


def test_a_scalar_time_is_the_same_time_for_all() -> None:
    denoiser, x = exact(EDM(), "edm", **MIXTURE), torch.randn(3, 2)
    torch.testing.assert_close(denoiser(x, 0.7).x0, denoiser(x, torch.full((3,), 0.7)).x0)


def test_answers_are_float32_whatever_the_network_computes_in() -> None:
    class Half(nn.Module):
        def forward(self, x: Tensor, time: Tensor, cond: dict[str, Tensor]) -> Tensor:
            return x.bfloat16()

    assert Denoiser(Half(), RectifiedFlow(), "v")(torch.ones(1, 2), 0.5).value.dtype == torch.float32


def test_gradients_reach_the_input_through_the_answer() -> None:
    """Score identities need d x0 / d x_t."""
    denoiser = exact(RectifiedFlow(), "v", **MIXTURE)
    x = torch.randn(1, 2, requires_grad=True)
    slope = torch.autograd.grad(denoiser(x, 0.6).x0[0, 0], x)[0][0, 0]
    h = torch.tensor([[1e-2, 0.0]])
    numeric = (denoiser(x + h, 0.6).x0 - denoiser(x - h, 0.6).x0)[0, 0] / 2e-2
    torch.testing.assert_close(slope, numeric, rtol=5e-3, atol=5e-3)


def test_wrong_prediction_kinds_are_refused() -> None:
    with pytest.raises(ValueError, match="prediction kind"):
        Denoiser(nn.Identity(), RectifiedFlow(), "noise")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="EDM"):
        Denoiser(nn.Identity(), RectifiedFlow(), "edm")


def test_each_sample_may_have_a_scale_of_its_own() -> None:
    plain, scales = point_teacher().eval(), torch.tensor([0.0, 1.0, 2.5, 4.0])
    x, t, cond = torch.randn(4, 2), torch.tensor([0.2, 0.4, 0.6, 0.8]), {"label": torch.arange(4)}
    with torch.no_grad():
        each = plain(x, t, cond, scales).value
        for i, w in enumerate(scales.tolist()):
            torch.testing.assert_close(each[i], plain(x, t, cond, w).value[i])
        assert torch.equal(plain(x, t, {}, scales).value, plain(x, t).value)  # nothing to guide


def test_both_answers_apart_are_what_guidance_is_made_of() -> None:
    denoiser = point_teacher()
    x, t, cond = torch.randn(4, 2), torch.tensor([0.2, 0.4, 0.6, 0.8]), {"label": torch.arange(4)}
    conditional, unconditional = denoiser.apart(x, t, cond)
    torch.testing.assert_close(conditional.value, denoiser(x, t, cond).value)
    torch.testing.assert_close(unconditional.value, denoiser(x, t, cond, 0.0).value)
    mixed = unconditional.x0 + 3 * (conditional.x0 - unconditional.x0)
    torch.testing.assert_close(mixed, denoiser(x, t, cond, 3.0).x0)
    scalar = denoiser.apart(x, 0.5, cond)[1]
    torch.testing.assert_close(scalar.x0, denoiser(x, 0.5, cond, 0.0).x0)
    with pytest.raises(UserError, match="unconditional value for: other"):
        denoiser.apart(x, t, {"other": torch.arange(4)})


def test_guidance_may_lead_away_from_another_condition() -> None:
    denoiser = point_teacher()
    x, t = torch.randn(4, 2), torch.tensor([0.2, 0.4, 0.6, 0.8])
    cond, other = {"label": torch.arange(4)}, {"label": torch.tensor([3, 3, 0, 1])}
    w = torch.tensor([0.5, 1.0, 2.0, 4.0])
    plain, away = denoiser(x, t, cond).value, denoiser(x, t, other).value
    torch.testing.assert_close(denoiser.against(x, t, cond, other, w).value, away + w[:, None] * (plain - away))
    torch.testing.assert_close(denoiser.against(x, 0.5, cond, cond, 3.0).value, denoiser(x, 0.5, cond).value)
    null = denoiser.null_cond(cond)
    assert torch.equal(denoiser.against(x, t, cond, null, 3.0).value, denoiser(x, t, cond, 3.0).value)
    with pytest.raises(UserError, match="do not fit each other"):
        denoiser.against(x, t, cond, {"label": torch.arange(3)}, 2.0)
