"""Methods with all but the student exact: where each leads, where its critic rests, on every process."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gaussians import KINDS, PROCESSES, exact, play
from stillroom.diffusion.denoiser import Cond, Denoiser, Prediction
from stillroom.diffusion.process import RectifiedFlow
from stillroom.method import get_method
from stillroom.networks.point_mlp import PointMLP

SLUGS = ["dmd2", "sid-lsg", "sim", "swiftbrush", "uni-instruct"]
START = 0.7  # time of the one-step students
MEAN, STD = 0.8, 0.5  # the teacher's


class ExactLogits(nn.Module):
    """The ideal discriminator: ``log q_t - log p_t`` of the teacher and the fake score, both exact."""

    def __init__(self, teacher: Denoiser) -> None:
        super().__init__()
        object.__setattr__(self, "teacher", teacher)  # not a network of its own

    def forward(self, denoiser: Denoiser, x_t: Tensor, t: Tensor, cond: Cond) -> tuple[Prediction, Tensor]:
        rates = denoiser.process.alpha(t).double(), denoiser.process.sigma(t).double()
        real, fake = (d.network.log_density(x_t.double(), *rates) for d in (self.teacher, denoiser))
        return denoiser(x_t, t, cond), (real - fake).float()[:, None]


def law(student: Any) -> tuple[Tensor, Tensor]:
    """Mean and std of a one-step student that is the denoiser of one Gaussian: it is affine in its noise."""
    m, v, a, s = student.network.means[0], student.network.log_stds[0].exp() ** 2, 1 - START, START
    gain = a * v / (a * a * v + s * s)
    return m * (1 - gain * a), gain * s


def world(slug: str, mean: float, std: float, **options: Any) -> Any:
    """Teacher N(MEAN, STD^2) and student N(mean, std^2) in 2-D on a flow, fake score and discriminator exact."""
    options = {"t_init": START, **options}
    if slug == "swiftbrush":
        options |= {"fake": "full", "guidance": 1.0, "fake_guidance": 1.0}
    if slug in ("dmd2", "sid-lsg"):
        options |= {"gan_weight": 0.0}
    cls = get_method(slug)
    method: Any = cls(cls.Options(**options))
    method.build(exact(RectifiedFlow(), "v", ((MEAN, MEAN),), (STD,)))
    method.stage = method.stages()[-1]
    method.discriminator = ExactLogits(method.teacher)
    a, s = 1 - START, START
    gain = std / s
    with torch.no_grad():  # the inverse of law()
        method.student.network.means.fill_(mean / (1 - gain * a))
        method.student.network.log_stds.fill_(0.5 * math.log(gain * s * s / (a - gain * a * a)))
    follow(method)
    return method


def follow(method: Any) -> None:
    """The fake score at the end of its training: that of the student of this moment."""
    mean, std = law(method.student)
    with torch.no_grad():
        method.fake.network.means.copy_(mean[None])
        method.fake.network.log_stds.copy_(std.log())


def noise_for(n: int) -> dict[str, Any]:
    return {"cond": {"unused": torch.zeros(n)}, "x": torch.zeros(n, 2)}


VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("dmd2", {}),
    ("swiftbrush", {}),
    *(("sid-lsg", {"alpha": alpha}) for alpha in (0.5, 1.0)),
    *(("sim", {"distance": distance}) for distance in ("pseudo_huber", "l2", "sid", "power")),
    *(("uni-instruct", {"divergence": d, "fgm": True}) for d in ("reverse_kl", "forward_kl", "jeffreys", "js")),
]


def name_of(value: Any) -> str:
    return value if isinstance(value, str) else "-".join(map(str, value.values()))


@pytest.mark.parametrize(("slug", "options"), VARIANTS, ids=name_of)
@pytest.mark.parametrize("std", [0.25, 0.9], ids=["narrow", "wide"])
def test_one_step_corrects_a_spread_that_is_wrong(slug: str, options: dict[str, Any], std: float) -> None:
    method = world(slug, MEAN, std, **options)
    play(method, "generator", noise_for(4096))
    network = method.student.network
    with torch.no_grad():
        step = 0.02 / max(float(p.grad.abs().max()) for p in (network.means, network.log_stds))
        for p in (network.means, network.log_stds):
            p -= step * p.grad
    assert abs(float(law(method.student)[1].detach()) - STD) < abs(std - STD)


ARRIVALS = [("dmd2", {}), ("swiftbrush", {}), ("sid-lsg", {"alpha": 0.5}), ("sid-lsg", {"alpha": 1.0})]
ARRIVALS += [("sim", {}), ("uni-instruct", {"divergence": "forward_kl", "fgm": True})]


@pytest.mark.parametrize(("slug", "options"), ARRIVALS, ids=name_of)
def test_with_an_exact_fake_score_the_student_arrives_at_the_teacher(slug: str, options: dict[str, Any]) -> None:
    method = world(slug, 0.2, 0.3, **options)
    network = method.student.network
    optimizer = torch.optim.Adam([network.means, network.log_stds], lr=0.06, betas=(0.5, 0.9))
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, 150)
    for seed in range(150):
        method.shared = {}
        play(method, "generator", noise_for(128), seed)
        optimizer.step()
        schedule.step()
        follow(method)
    mean, std = (v.detach() for v in law(method.student))
    assert mean.tolist() == pytest.approx([MEAN, MEAN], abs=0.08)
    assert float(std) == pytest.approx(STD, abs=0.08)


@pytest.mark.parametrize("slug", SLUGS)
def test_the_critic_rests_at_the_student_s_own_law(slug: str) -> None:
    """There the expected gradient of the denoising loss vanishes; beside it, it points back."""
    options: dict[str, Any] = {"swiftbrush": {"condition_drop": 0.0}}.get(slug, {})
    if slug == "uni-instruct":
        options = {"gan_weight": 0.0, "divergence": "reverse_kl"}
    method = world(slug, 0.2, 0.4, **options)

    def gradient(shift: float) -> Tensor:
        follow(method)
        with torch.no_grad():
            method.fake.network.means.add_(shift)
        method.shared = {}
        if slug == "swiftbrush":  # its critic learns from what the generator's turn has drawn
            play(method, "generator", noise_for(8192))
        play(method, "critic", noise_for(8192))
        return method.fake.network.means.grad.clone()

    at, above, below = gradient(0.0), gradient(0.3), gradient(-0.3)
    assert bool((above > 0).all())
    assert bool((below < 0).all())
    assert float(at.abs().max()) < 0.15 * float(above.abs().min())


@pytest.mark.parametrize("slug", SLUGS)
@pytest.mark.parametrize("process", PROCESSES)
def test_every_method_steps_and_samples_on_every_process(slug: str, process: str) -> None:
    """With the network outputs that are usual there: v, preconditioned, and noise."""
    options: dict[str, Any] = {"student_steps": 2} if slug in ("dmd2", "sid-lsg") else {}
    cls = get_method(slug)
    method: Any = cls(cls.Options(**options))
    network = PointMLP(2, 16, 3, 4, time_scale=1e-3 if process in ("flow", "vp") else 0.5)
    method.build(Denoiser(network, PROCESSES[process], KINDS[process], null={"label": 4}, shape=(2,)))  # type: ignore[arg-type]
    method.stage = method.stages()[-1]
    with torch.no_grad():
        for p in method.trained_parameters("fake").values():
            p += 0.05 * torch.randn_like(p)
    label = {"label": torch.arange(8) % 4}
    for seed in range(3):
        method.shared = {}
        for turn in method.turns():
            terms = play(method, turn.name, {"x": torch.randn(8, 2), "cond": label}, seed)
            assert all(bool(torch.isfinite(value)) for value in terms.values()), terms
            for role in turn.trains:
                gradients = [p.grad for p in method.trained_parameters(role).values() if p.grad is not None]
                assert all(bool(torch.isfinite(g).all()) for g in gradients)
    samples = method.sampler().sample(method.student, torch.randn(8, 2), label)
    assert bool(torch.isfinite(samples).all())


def test_turns_that_need_no_images_never_look_at_them() -> None:
    cases: list[tuple[str, dict[str, Any]]] = [
        ("sim", {}),
        ("swiftbrush", {}),
        ("sid-lsg", {}),
        ("dmd2", {"gan_weight": 0.0}),
    ]
    cases.append(("uni-instruct", {"gan_weight": 0.0, "divergence": "reverse_kl"}))
    for slug, options in cases:
        cls = get_method(slug)
        method: Any = cls(cls.Options(**options))
        method.build(Denoiser(PointMLP(2, 16, 3, 4), RectifiedFlow(), "v", null={"label": 4}, shape=(2,)))
        method.stage, method.shared = method.stages()[-1], {}
        for turn in method.turns():
            play(method, turn.name, {"cond": {"label": torch.arange(8) % 4}})
