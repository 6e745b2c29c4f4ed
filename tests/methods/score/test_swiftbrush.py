"""SwiftBrush: the gradient in numbers, guidance, and the adapters on the teacher's own weights."""

from __future__ import annotations

from typing import Any

import torch
from points import FLOW, FULL, NULL, X0, B, batch, build, labels_seen, says, teacher, two_points
from torch import Tensor

from gaussians import draws, play
from stillroom.method import frozen


def swiftbrush_at(x0: Tensor, **options: Any) -> tuple[Any, Tensor, Tensor]:
    """A SwiftBrush whose student gives ``x0``, and the times and noise that its generator will draw."""
    method = build("swiftbrush", fake="full", guidance=1.0, fake_guidance=1.0, **options)
    method.teacher, method.fake = frozen(says(0.5, -1.0)), frozen(says(2.0, 1.0))
    method.one_step = lambda batch: x0
    method.draw, twin = draws(2), draws(2)
    return method, method.options.student_times.sample(twin, FLOW)[:, None], twin.normal(2, 2)


def test_swiftbrush_s_gradient_is_alpha_sigma_times_the_difference_of_denoisings() -> None:
    x0, data = two_points()
    method, t, _ = swiftbrush_at(x0)
    method.generator(data)["vsd"].backward()
    expected = (1 - t) * t * torch.tensor([1.5, 2.0]) / 2 / 2  # per element, then per sample
    torch.testing.assert_close(x0.grad, expected)


def test_swiftbrush_s_sds_option_puts_the_true_noise_in_the_place_of_the_fake_score() -> None:
    """sigma^2 (e_psi - eps), in the units of the paper."""
    x0, data = two_points()
    method, t, eps = swiftbrush_at(x0, score="sds")
    method.generator(data)["vsd"].backward()
    x_t = (1 - t) * x0.detach() + t * eps
    e_psi = (x_t - (1 - t) * torch.tensor([0.5, -1.0])) / t
    torch.testing.assert_close(x0.grad, t**2 * (e_psi - eps) / 4)


def test_swiftbrush_s_finished_student_reads_its_output_as_it_was_trained_to() -> None:
    for reparametrise in (True, False):
        method = build("swiftbrush", fake="full", reparametrise=reparametrise)
        method.draw, twin = draws(2), draws(2)
        noise = twin.normal(2, *method.student.shape)
        data = batch(2)
        drawn = method.sampler().sample(method.student, noise, data["cond"])
        torch.testing.assert_close(method.one_step(data), drawn)
        answer = method.student(noise, 1.0, data["cond"])
        assert torch.equal(answer.x0, answer.value) == (not reparametrise)


def test_swiftbrush_guides_both_scores() -> None:
    """Both say (label, label) times a slope; at guidance w: 8 + w (label - 8)."""
    x0, data = two_points()
    method, t, _ = swiftbrush_at(x0)
    method.options.guidance, method.options.fake_guidance = 3.0, 2.0
    method.teacher, method.fake = frozen(says(0.0, 0.0, slope=1.0)), frozen(says(0.0, 0.0, slope=-1.0))
    method.generator(data)["vsd"].backward()
    gap = torch.tensor([[-6.0 - 5.0], [-4.0 - 2.0]])
    torch.testing.assert_close(x0.grad, ((1 - t) * t * gap / 4).expand(2, 2))


def test_swiftbrush_s_lora_teacher_shares_the_teacher_s_weights_and_leaves_its_answers() -> None:
    method = build("swiftbrush", **FULL["swiftbrush"])
    assert method.fake.network is method.teacher.network
    assert method.student.network is not method.teacher.network
    ask = (torch.randn(B, 2), torch.full((B,), 0.5), batch()["cond"])
    before, fake_before = method.teacher(*ask).value, method.fake(*ask).value
    assert not torch.allclose(before, fake_before)
    plain = teacher()
    torch.testing.assert_close(before, plain(*ask).value)
    adapter = method.trained_parameters("fake")
    optimizer = torch.optim.SGD(adapter.values(), lr=0.1)
    for seed in range(3):
        method.shared = {"x0": torch.ones(B, 2)}
        play(method, "critic", batch(), seed)
        assert all(p.grad is None for n, p in method.teacher.network.named_parameters() if ".fake." not in n)
        optimizer.step()
    assert torch.equal(method.teacher(*ask).value, before)
    assert not torch.allclose(method.fake(*ask).value, fake_before)


def test_swiftbrush_s_critic_weighs_the_noise_error_by_alpha_squared() -> None:
    method = build("swiftbrush", fake="full", condition_drop=0.0)
    method.shared = {"x0": torch.tensor(X0)}
    method.draw, twin = draws(2), draws(2)
    t = method.options.fake_times.sample(twin, FLOW)[:, None]
    eps, data = twin.normal(2, 2), two_points()[1]
    answer = method.fake((1 - t) * torch.tensor(X0) + t * eps, t[:, 0], data["cond"])
    expected = ((1 - t) ** 2 * (answer.eps - eps) ** 2).mean()
    torch.testing.assert_close(method.critic(data)["denoise"], expected)


def test_swiftbrush_drops_the_condition_of_a_whole_batch_or_of_none() -> None:
    method = build("swiftbrush", condition_drop=0.5, **FULL["swiftbrush"])
    seen = labels_seen(method, "critic", range(40))
    dropped = [bool((labels == NULL).all()) for labels in seen]
    assert all(
        drop or torch.equal(labels, batch()["cond"]["label"]) for drop, labels in zip(dropped, seen, strict=True)
    )
    assert 10 <= sum(dropped) <= 30
