"""Decoupled DMD: the two terms in numbers, together DMD2's update, noise that knows the student's level."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from points import B, batch, build, says, two_points
from torch import Tensor

from gaussians import draws, moved, play
from stillroom.data.source import ArrayData
from stillroom.diffusion.denoiser import Denoiser
from stillroom.diffusion.process import VP, RectifiedFlow
from stillroom.errors import UserError
from stillroom.losses.score import moment_loss
from stillroom.method import frozen, get_method
from tiny_denoisers import dit_teacher

SHARED = {"schedule": "coupled-shared", "normaliser": "guided"}


def gradient(method: Any, terms: tuple[str, ...], seed: int = 5) -> Tensor:
    """Of the student's weights, by these terms of one generator turn."""
    method.zero_grad(set_to_none=True)
    method.shared, method.draw = {}, draws(B, seed)
    found = method.generator(batch())
    sum(found[name] for name in terms).backward()
    return torch.cat([p.grad.flatten() for p in method.student.parameters() if p.grad is not None])


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("guidance", [3.0, 0.5, -1.0])
def test_with_one_time_noise_and_normaliser_the_two_terms_are_dmd2_s_update(guidance: float, steps: int) -> None:
    """D_w - D_f = (D_c - D_f) + (w - 1) (D_c - D_u), and the guided prediction in the normaliser: the same draws give
    the same gradient, to the rounding of two sums in another order."""
    dmd2 = build("dmd2", gan_weight=0.0, guidance=guidance, student_steps=steps)
    ours = build("decoupled-dmd", guidance=guidance, student_steps=steps, **SHARED)
    for seed in range(4):
        expected = gradient(dmd2, ("dm",), seed)
        torch.testing.assert_close(gradient(ours, ("augment", "dm"), seed), expected, rtol=1e-4, atol=1e-6)
        assert float((gradient(ours, ("dm",), seed) - expected).abs().max()) > 1e-4  # one term alone is not


def test_without_guidance_the_method_is_dmd2_s_matching_alone() -> None:
    dmd2 = build("dmd2", gan_weight=0.0, guidance=1.0, student_steps=2)
    for normaliser in ("own", "guided"):
        ours = build("decoupled-dmd", guidance=1.0, student_steps=2, normaliser=normaliser)
        torch.testing.assert_close(gradient(ours, ("dm",)), gradient(dmd2, ("dm",)), rtol=1e-5, atol=1e-8)


def placed(**options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Gradients of the hand-worked points, by term. The teacher says (label, label): 7 and 6, without a label 8; the
    fake score -7 and -6."""
    found = {}
    for term in ("augment", "dm"):
        method = build("decoupled-dmd", **options)
        method.teacher, method.fake = frozen(says(0.0, 0.0, slope=1.0)), frozen(says(0.0, 0.0, slope=-1.0))
        x0, data = two_points()
        method.sample_student = lambda batch, grad, x0=x0: (x0, 1.0)
        method.draw = draws(2)
        method.generator(data)[term].backward()
        found[term] = x0.grad
    return x0, found


def test_each_term_in_numbers_with_its_own_normaliser() -> None:
    """Points (1, 3) and (-1, 1); w = 3. mean |x0 - D_c| is (6 + 4) / 2 = 5 and (7 + 5) / 2 = 6. Over 2 elements of 2
    points: dm (-7 - 7) / 5 / 4 and (-6 - 6) / 6 / 4; augment 2 (8 - 7) / 5 / 4 and 2 (8 - 6) / 6 / 4."""
    _, found = placed(guidance=3.0)
    torch.testing.assert_close(found["dm"], torch.tensor([[-14 / 20] * 2, [-12 / 24] * 2]))
    torch.testing.assert_close(found["augment"], torch.tensor([[2 / 20] * 2, [4 / 24] * 2]))


@pytest.mark.parametrize("schedule", ["coupled-shared", "decoupled-hybrid"])
def test_each_term_in_numbers_with_dmd_s_normaliser(schedule: str) -> None:
    """w = 3: D_w is 8 + 3 (7 - 8) = 5 and 8 + 3 (6 - 8) = 2; mean |x0 - D_w| is (4 + 2) / 2 = 3 and (3 + 1) / 2 = 2."""
    _, found = placed(guidance=3.0, normaliser="guided", schedule=schedule)
    torch.testing.assert_close(found["dm"], torch.tensor([[-14 / 12] * 2, [-12 / 8] * 2]))
    torch.testing.assert_close(found["augment"], torch.tensor([[2 / 12] * 2, [4 / 8] * 2]))


def test_a_step_along_augmentation_goes_from_the_unconditional_to_the_conditional_answer() -> None:
    x0, found = placed(guidance=3.0)
    assert bool((x0.detach() - found["augment"] < x0.detach()).all())  # 7 and 6 lie below 8
    backwards = placed(guidance=0.0)[1]["augment"]  # w < 1 pushes the other way
    assert bool((backwards < 0).all())


def levels(schedule: str, process: Any = None, steps: int = 4, **options: Any) -> dict[float, dict[str, Tensor]]:
    """The times at which each term asks, by the student's level s_k, over many turns."""
    method = build("decoupled-dmd", schedule=schedule, student_steps=steps, **options)
    if process is not None:
        method.teacher.process = method.student.process = process
    found: dict[float, dict[str, list[Tensor]]] = {}
    asked: dict[str, list[Tensor]] = {"augment": [], "dm": []}
    apart = method.teacher.apart
    method.teacher.apart = lambda x, t, cond: (asked["augment"].append(t), apart(x, t, cond))[1]
    method.fake.register_forward_pre_hook(lambda _, args: asked["dm"].append(args[1]))
    for seed in range(60):
        method.draw = draws(B, seed)
        level = method.times[method.draw.index(steps)] * method.student.process.t_max
        method.draw = draws(B, seed)
        for times in asked.values():
            times.clear()
        x0, own = method.sample_student(batch(), grad=False)
        assert own == level
        method.directions(x0, own, batch())
        for name, times in asked.items():
            found.setdefault(level, {"augment": [], "dm": []})[name] += times
    assert len(found) == steps
    return {level: {name: torch.cat(times) for name, times in both.items()} for level, both in found.items()}


def test_the_schedules_draw_from_where_they_say() -> None:
    """Uniform on (0.02, upper end): means within 4 standard errors of the middle."""
    ends = {
        "decoupled-hybrid": (True, False), "decoupled-constrained": (True, True), "decoupled-full": (False, False),
        "coupled-shared": (False, False),
    }  # fmt: skip
    for schedule, (augment, dm) in ends.items():
        for level, times in levels(schedule).items():
            for name, below in (("augment", augment), ("dm", dm)):
                end = min(level, 0.98) if below else 0.98
                assert float(times[name].max()) <= end + 1e-6
                error = (end - 0.02) / (12 * len(times[name])) ** 0.5
                assert float(times[name].mean()) == pytest.approx((end + 0.02) / 2, abs=4 * error)
            assert torch.equal(times["augment"], times["dm"]) == (schedule == "coupled-shared")


def test_under_a_shift_levels_are_drawn_in_unshifted_time() -> None:
    """The card's example: at shift 3 an input at the unshifted level 0.25 (shifted: 0.5) gives levels uniform in
    unshifted (0.02, 0.25)."""
    found = levels("decoupled-hybrid", RectifiedFlow(3.0), step_shift=3.0)
    assert sorted(found) == pytest.approx([0.5, 0.75, 0.9, 1.0])
    for level, times in found.items():
        unshifted, end = (t / (3 - 2 * t) for t in (times["augment"], torch.tensor(level)))
        end = min(float(end), 0.98)
        assert float(unshifted.max()) <= end + 1e-5
        assert float(unshifted.mean()) == pytest.approx((end + 0.02) / 2, abs=4 * end / (12 * len(unshifted)) ** 0.5)


def test_on_vp_levels_stay_below_the_student_s_step() -> None:
    for level, times in levels("decoupled-hybrid", VP()).items():
        assert float(times["augment"].max()) <= level * (1 + 1e-6)
        assert float(times["dm"].max()) > 700


def test_the_level_of_a_student_of_another_process_is_the_teacher_s_time() -> None:
    """A VP student's step 499.5 has signal and noise as alpha to sigma; a flow's time of these is their share."""
    method = build("decoupled-dmd", student_steps=2)
    process = method.student.process = VP()
    found = set()
    for seed in range(12):
        method.draw = draws(B, seed)
        found.add(round(method.sample_student(batch(), grad=False)[1], 6))
    for level, t in zip(sorted(found), (499.5, 999.0), strict=True):
        alpha, sigma = (float(rate(torch.tensor(t, dtype=torch.float64))) for rate in (process.alpha, process.sigma))
        assert level == pytest.approx(sigma / (alpha + sigma), abs=1e-5)


def test_only_what_there_is_is_asked_and_trained() -> None:
    whole = build("decoupled-dmd", gan_weight=0.1)
    assert [t.name for t in whole.turns()] == ["generator", "critic"]
    assert whole.turns()[1].trains == ("fake", "discriminator")
    for options in ({"regulariser": "none"}, {"regulariser": "moments", "mean": 0.0, "variance": 1.0}):
        alone = get_method("decoupled-dmd")
        method: Any = alone(alone.Options(**options))
        method.build(whole.teacher)
        assert method.fake is None
        assert [t.name for t in method.turns()] == ["generator"]
        play(method, "generator", batch())
        assert moved(method) == {"student"}


def test_a_gan_in_the_place_of_matching_trains_no_score() -> None:
    method = build("decoupled-dmd", regulariser="gan", gan_weight=0.1)
    assert set(play(method, "generator", batch())) == {"augment", "gan"}
    assert moved(method) == {"student"}
    assert set(play(method, "critic", batch())) == {"gan"}


def test_the_moments_loss_is_the_kl_of_two_gaussians() -> None:
    """Against torch.distributions, and 0 with no slope where the moments agree."""
    x = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0)) * 1.7 + 0.4
    normal = torch.distributions.Normal
    own = [normal(row.mean(), row.std(unbiased=False)) for row in x]
    expected = sum(torch.distributions.kl_divergence(one, normal(0.1, 0.8**0.5)) for one in own) / 3
    torch.testing.assert_close(moment_loss(x, 0.1, 0.8), torch.as_tensor(expected))
    same = x[:1].clone().requires_grad_()
    loss = moment_loss(same, float(x[0].mean()), float(x[0].var(unbiased=False)))
    loss.backward()
    assert float(loss) == pytest.approx(0.0, abs=1e-6)
    assert float(same.grad.abs().max()) < 1e-6


def test_moments_that_are_not_given_are_the_data_s() -> None:
    data = ArrayData(torch.randn(300, 2) * 2 + 1, {"label": torch.arange(300) % 8})
    for given, index, expected in (({}, 0, 1.0), ({"mean": 7.0}, 0, 7.0), ({"variance": 3.0}, 1, 3.0)):
        cls = get_method("decoupled-dmd")
        method: Any = cls(cls.Options(regulariser="moments", **given))
        method.build(build("dmd2").teacher)
        method.prepare(data)
        assert method.moments[index] == pytest.approx(expected, abs=0.3)


@pytest.mark.parametrize(
    ("options", "null", "message"),
    [
        ({"regulariser": "gan"}, True, "has no weight"),
        ({}, False, "no unconditional answer"),
        ({"regulariser": "none", "guidance": 1.0}, True, "nothing moves the student"),
    ],
)
def test_what_cannot_work_is_said(options: dict[str, Any], null: bool, message: str) -> None:
    cls = get_method("decoupled-dmd")
    teacher: Denoiser = build("dmd2").teacher
    if not null:
        teacher.null = {}
    with pytest.raises(UserError, match=message):
        cls(cls.Options(**options)).build(teacher)


def test_on_images_as_adapters_both_turns_move_their_own() -> None:
    cls = get_method("decoupled-dmd")
    lora = {role: {"rank": 2, "targets": ["to_q", "to_v"]} for role in ("student", "fake")}
    method: Any = cls(cls.Options(student_steps=2, guidance=2.0), lora)
    teacher = dit_teacher()
    method.build(teacher)
    method.stage = method.stages()[0]
    data = {"x": torch.randn(4, *teacher.shape), "cond": {"label": torch.tensor([0, 1, 2, 0])}}
    method.shared = {}
    for name, role in (("generator", "student"), ("critic", "fake")):
        play(method, name, data)
        gradients = [n for n, p in method.teacher.network.named_parameters() if p.grad is not None and p.grad.any()]
        assert gradients
        assert all(f".{role}." in n for n in gradients)
