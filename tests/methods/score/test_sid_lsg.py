"""SiD: the loss of the paper, its guidance, its GAN and its steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from points import FLOW, NULL, B, batch, build, labels_seen
from torch import Tensor, nn

from gaussians import draws, play
from stillroom.bench.mixture import GaussianMixture, MixtureDenoiser
from stillroom.diffusion.denoiser import Cond, Denoiser
from stillroom.draws import Draws
from stillroom.methods.score.sid_lsg import SiDLSG


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.2])
def test_sid_s_loss_and_gradient_are_the_paper_s_product_form(alpha: float) -> None:
    """sum (Y_r - Y_f) [(Y_r - x0) - alpha (Y_r - Y_f)] / w, the graph through x_t kept in every factor."""
    method = build("sid-lsg", alpha=alpha)
    o, data, twin = method.options, batch(), draws(B)
    loss = play(method, "generator", data)["sid"]
    ours = [p.grad.clone() for p in method.student.parameters()]
    z, t0 = twin.normal(B, 2), torch.tensor(o.t_init)
    x0 = method.student(t0 * z, t0, data["cond"]).x0
    t, eps = o.generator_times.sample(twin, FLOW), twin.normal(B, 2)
    x_t = (1 - t)[:, None] * x0 + t[:, None] * eps
    real, fake = method.teacher(x_t, t, data["cond"]).x0, method.fake(x_t, t, data["cond"]).x0
    w = (x0 - real).abs().mean(1).detach()
    by_hand = (((real - fake) * ((real - x0) - alpha * (real - fake))).sum(1) / w).mean()
    torch.testing.assert_close(loss, by_hand)
    for a, b in zip(ours, torch.autograd.grad(by_hand, list(method.student.parameters())), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


KAPPAS = {
    "none": (1.0, 1.0, 1.0),
    "lsg": (3.0, 3.0, 3.0),
    "long": (1.0, 1.0, 3.0),
    "short": (3.0, 1.0, 1.0),
    "zero-cfg": (0.0, 0.0, 1.0),
    "anti-cfg": (1.0, -1.0, 1.0),
}


@pytest.mark.parametrize("guidance", KAPPAS)
def test_sid_s_presets_guide_the_scores_as_documented(guidance: str) -> None:
    """kappa_1: the fake score while it trains; kappa_2 = kappa_3: the fake score asked; kappa_4: the teacher asked."""
    method = build("sid-lsg", guidance=guidance, guidance_scale=3.0)
    asked: dict[str, float] = {}
    for role in ("fake", "teacher"):
        network = method.role(role)
        inner = network.forward

        def watched(
            x: Tensor, t: Tensor, cond: Cond, guidance: float = 1.0, role: str = role, inner: Any = inner
        ) -> Any:
            asked[role] = guidance
            return inner(x, t, cond, guidance)

        network.forward = watched
    play(method, "critic", batch())
    assert asked == {"fake": KAPPAS[guidance][0]}
    play(method, "generator", batch())
    assert (asked["fake"], asked["teacher"]) == KAPPAS[guidance][1:]


def test_the_fake_score_s_own_scale_is_that_of_the_difference_unless_it_is_given() -> None:
    """(Y_r - Y_f) [(D_f^(k3) - x0) + (1 - alpha) (Y_r - Y_f)] / w with k2 = -1, k3 = 1."""
    method = build("sid-lsg", guidance="anti-cfg", kappa_3=1.0, alpha=0.7)
    data, twin, o = batch(), draws(B), method.options
    loss = play(method, "generator", data)["sid"]
    x0 = method.student(torch.tensor(o.t_init) * twin.normal(B, 2), torch.tensor(o.t_init), data["cond"]).x0
    t, eps = o.generator_times.sample(twin, FLOW), twin.normal(B, 2)
    x_t = (1 - t)[:, None] * x0 + t[:, None] * eps
    real = method.teacher(x_t, t, data["cond"]).x0
    fake, own = (method.fake(x_t, t, data["cond"], k).x0 for k in (-1.0, 1.0))
    w = (x0 - real).abs().mean(1)
    by_hand = ((real - fake) * ((own - x0) + 0.3 * (real - fake))).sum(1) / w
    torch.testing.assert_close(loss, by_hand.mean())
    same = play(build("sid-lsg", guidance="anti-cfg", kappa_3=-1.0), "generator", data)
    torch.testing.assert_close(same, play(build("sid-lsg", guidance="anti-cfg"), "generator", data))


class Affine(nn.Module):
    """``x0 = mean[label] + std x`` in one dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.tensor([[-1.0], [1.0]]))
        self.log_std = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        return self.mean[cond["label"]] + self.log_std.exp() * x


def with_exact_scores(steps: int, n: int, **options: Any) -> tuple[float, float]:
    """Share on the own class's side and spread where a student ends whose teacher, N(-1, 1) against N(1, 1), and whose
    fake score are exact."""

    def mixture(mean: Tensor, std: Tensor) -> MixtureDenoiser:
        law = GaussianMixture(mean.detach(), std.detach().expand(2), classes=torch.arange(2))
        return MixtureDenoiser(law, FLOW)

    method = SiDLSG(SiDLSG.Options(t_init=1.0, condition_drop=0.0, **options))
    method.build(mixture(torch.tensor([[-1.0], [1.0]]), torch.ones(1)))
    network = Affine()
    method.student = Denoiser(network, FLOW, "x0", null={"label": 2}, shape=(1,))
    optimizer = torch.optim.Adam(network.parameters(), 0.1, betas=(0.0, 0.99))
    fall = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, steps)
    generator, labels, ends = torch.Generator().manual_seed(0), torch.arange(n) % 2, []
    for _ in range(steps):
        method.fake = mixture(network.mean, network.log_std.exp())
        method.draw = Draws(generator, slice(0, n), n)
        optimizer.zero_grad()
        method.generator({"cond": {"label": labels}})["sid"].backward()
        optimizer.step()
        fall.step()
        ends.append(torch.stack([(network.mean[1] - network.mean[0])[0] / 2, network.log_std.exp()[0]]).detach())
    shift, std = torch.stack(ends[-20:]).mean(0)
    return float(torch.special.ndtr(shift / std)), float(std)


def test_anti_cfg_guides_without_widening_once_the_fake_score_s_own_scale_is_one() -> None:
    """A formula's answer, no network's: the preset at alpha = 1 widens the classes, and either mend gathers them."""
    preset, own_scale, fisher = (
        with_exact_scores(100, 128, guidance="anti-cfg", **options)
        for options in ({}, {"kappa_3": 1.0}, {"alpha": 0.5})
    )
    assert preset[0] < 0.95
    assert preset[1] > 1.1
    for accuracy, spread in (own_scale, fisher):
        assert accuracy > 0.995
        assert spread < 0.8


def test_sid_drops_conditions_sample_by_sample_and_only_under_guidance() -> None:
    plain = labels_seen(build("sid-lsg", condition_drop=0.5), "critic", range(3))
    assert all(torch.equal(labels, batch()["cond"]["label"]) for labels in plain)
    guided = torch.cat(labels_seen(build("sid-lsg", condition_drop=0.5, guidance="lsg"), "critic", range(20)))
    null = (guided == NULL).reshape(20, B)
    assert 0.35 < float(null.float().mean()) < 0.65
    assert bool((null.any(1) & ~null.all(1)).all())  # some and not all, in every batch
    asked = torch.cat(labels_seen(build("sid-lsg", condition_drop=0.5, guidance="lsg"), "generator", range(3)))
    assert not bool((asked == NULL).any())


@pytest.mark.parametrize(
    ("guidance", "passes"), [("long", ((1, 1), (1, 0))), ("zero-cfg", ((1, 2), (1, 1))), ("anti-cfg", ((1, 2), (1, 1)))]
)
def test_sid_s_gan_reads_its_logits_from_the_fake_score_s_own_pass_where_it_can(
    guidance: str, passes: tuple[tuple[int, int], tuple[int, int]]
) -> None:
    """Whole passes, and those that end at the tapped block. Critic: generated and real; generator: generated. One more
    each where the fake score is asked something else."""
    method, whole, ended = build("sid-lsg", guidance=guidance, gan_weight=0.1), [], []
    method.fake.register_forward_pre_hook(lambda _, args: whole.append(args))
    logits = method.discriminator.logits
    method.discriminator.logits = lambda *args: ended.append(args) or logits(*args)
    for name, expected in zip(("critic", "generator"), passes, strict=True):
        whole.clear(), ended.clear()
        play(method, name, batch())
        assert (len(whole), len(ended)) == expected


def test_sid_trains_every_step_of_its_student_or_only_the_last() -> None:
    for choice, times in (("uniform", {0.625, 0.625 * 2 / 3, 0.625 / 3}), ("last", {0.625 / 3})):
        method, last = build("sid-lsg", student_steps=3, step_choice=choice), set()
        for seed in range(12):
            asked: list[Tensor] = []
            hook = method.student.register_forward_pre_hook(lambda _, args, asked=asked: asked.append(args[1]))
            play(method, "generator", batch(), seed)
            hook.remove()
            last.add(round(float(asked[-1]), 4))
        assert last == {round(t, 4) for t in times}
