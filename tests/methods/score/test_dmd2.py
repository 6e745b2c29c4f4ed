"""DMD2: the gradient in numbers, who learns from which sample, and when."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from points import B, Rows, batch, build, says, two_points
from torch import Tensor

from gaussians import draws, moved, play
from stillroom.engine.config import EngineConfig
from stillroom.engine.distributed import finished
from stillroom.engine.trainer import Trainer
from stillroom.errors import UserError
from stillroom.method import Batch, frozen


def test_dmd2_s_gradient_in_numbers() -> None:
    """D_r = 0, D_f = (1, -2): mean|x0 - D_r| is 2 and 1, so dL/dx0 = (D_f - D_r) / (2 * 2) and / (1 * 2), halved."""
    method = build("dmd2", gan_weight=0.0)
    method.teacher, method.fake = frozen(says(0.0, 0.0)), frozen(says(1.0, -2.0))
    x0, data = two_points()
    method.sample_student = lambda batch, grad: x0
    method.draw = draws(2)
    method.generator(data)["dm"].backward()
    torch.testing.assert_close(x0.grad, torch.tensor([[1 / 8, -2 / 8], [1 / 4, -2 / 4]]))


@pytest.mark.parametrize("passes", ["own", "shared"])
@pytest.mark.parametrize(("divergence", "h"), [("forward_kl", lambda r: r), ("js", lambda r: r / (r + 1))])
def test_f_distill_weighs_each_sample_s_direction_by_its_density_ratio(divergence: str, h: Any, passes: str) -> None:
    """As above, times h(r) of each sample, r = exp(logit); the weight itself has no gradient."""
    method = build("dmd2", gan_weight=0.1, divergence=divergence, gan_pass=passes)
    method.teacher, method.fake = frozen(says(0.0, 0.0)), frozen(says(1.0, -2.0))
    logits = torch.tensor([[0.5], [-1.0]])

    class Judge(torch.nn.Module):
        def logits(self, fake: Any, x_t: Tensor, t: Tensor, cond: Any) -> Tensor:
            return logits + 0 * x_t.sum(1, keepdim=True)

        def forward(self, fake: Any, x_t: Tensor, t: Tensor, cond: Any) -> Any:
            return fake(x_t, t, cond), self.logits(fake, x_t, t, cond)

    method.discriminator = Judge()
    x0, data = two_points()
    method.sample_student = lambda batch, grad: x0
    method.draw = draws(2)
    method.generator(data)["dm"].backward()
    plain = torch.tensor([[1 / 8, -2 / 8], [1 / 4, -2 / 4]])
    torch.testing.assert_close(x0.grad, h(logits.exp()) * plain)
    torch.testing.assert_close(method.notes["ratio"], logits.exp().mean())


def test_a_divergence_without_a_discriminator_is_refused() -> None:
    with pytest.raises(UserError, match="divergence=js weighs samples by what a discriminator says"):
        build("dmd2", divergence="js", gan_weight=0.0)


def test_dmd2_guides_the_teacher_alone_and_the_normaliser_sees_the_guided_answer() -> None:
    """The teacher says (label, label): conditional 7 and 6, null 8, so at guidance 2 it says 6 and 4."""
    method = build("dmd2", gan_weight=0.0, guidance=2.0)
    method.teacher, method.fake = frozen(says(0.0, 0.0, slope=1.0)), frozen(says(0.0, 0.0, slope=-1.0))
    x0, data = two_points()
    method.sample_student = lambda batch, grad: x0
    method.draw = draws(2)
    method.generator(data)["dm"].backward()
    first = (-7 - 6) / ((5 + 3) / 2) / 4
    second = (-6 - 4) / ((5 + 3) / 2) / 4
    torch.testing.assert_close(x0.grad, torch.tensor([[first, first], [second, second]]))


def test_dmd2_s_critic_learns_from_the_very_sample_of_the_generator() -> None:
    method, made = build("dmd2"), []
    inner = method.sample_student

    def sample(batch: Batch, grad: bool) -> Tensor:
        made.append((inner(batch, grad), grad))
        return made[-1][0]

    method.sample_student = sample
    play(method, "generator", batch(), seed=0)
    ((x0, grad),) = made
    assert grad
    assert torch.equal(method.shared["x0"], x0)
    assert not method.shared["x0"].requires_grad
    denoised = play(method, "critic", batch(), seed=1)["denoise"].detach()
    assert len(made) == 1  # nothing new was made
    method.shared = {"x0": x0.detach() + 1}
    assert not torch.equal(play(method, "critic", batch(), seed=1)["denoise"].detach(), denoised)
    method.shared = {}  # a step without the generator
    play(method, "critic", batch(), seed=1)
    assert len(made) == 2
    assert not made[1][1]
    assert not made[1][0].requires_grad


def test_dmd2_updates_the_student_once_per_period_and_the_critic_at_every_step() -> None:
    method, seen = build("dmd2", critic_turns=3), []
    inner = {name: getattr(method, name) for name in ("generator", "critic")}

    def watched(name: str, data: Batch) -> Any:
        seen.append((method.step, name, "x0" in method.shared))
        return inner[name](data)

    for name in inner:
        setattr(method, name, functools.partial(watched, name))
    Trainer(method, Rows(), EngineConfig(steps=5, batch=4, device="cpu", check_freezing=True), show=False).fit()
    critic = [(step, "critic", step % 3 == 0) for step in range(5)]
    assert [s for s in seen if s[1] == "critic"] == critic
    assert [s[0] for s in seen if s[1] == "generator"] == [0, 3]
    assert seen.index((3, "generator", False)) < seen.index((3, "critic", True))


def test_dmd2_without_backward_simulation_starts_later_steps_from_noised_real_data() -> None:
    """With data and student far apart the input shows where it came from."""
    starts = {}
    for simulated in (True, False):
        method = build("dmd2", student_steps=2, backward_simulation=simulated)
        assert method.times == (1.0, 0.5)
        method.student = says(50.0, 50.0)
        inputs: list[Tensor] = []
        method.student.register_forward_pre_hook(lambda _, args, inputs=inputs: inputs.append(args[0]))
        for seed in range(8):
            method.draw = draws(B, seed)
            method.sample_student(batch() | {"x": torch.full((B, 2), -50.0)}, grad=False)
        starts[simulated] = {round(float(x.mean()) / 25) for x in inputs}
    assert starts == {True: {0, 1}, False: {0, -1}}  # noise, or half of +-50


def test_both_terms_of_dmd2_s_critic_train_the_fake_score_and_the_gan_alone_trains_the_head() -> None:
    method = build("dmd2")
    method.requires_grad_(False)
    for role in ("fake", "discriminator"):
        method.role(role).requires_grad_(True)
    for term, roles in (("denoise", {"fake"}), ("gan", {"fake", "discriminator"})):
        method.zero_grad(set_to_none=True)
        method.shared, method.draw = {}, draws(B)
        finished(method.critic(batch()))[term].backward()
        assert moved(method) == roles


PASSES = [
    ({}, {"teacher": "w", "fake": "we"}, {"fake": "wee"}),
    ({"gan_pass": "shared"}, {"teacher": "w", "fake": "w"}, {"fake": "we"}),
    ({"gan_network": "teacher"}, {"teacher": "we", "fake": "w"}, {"teacher": "e", "fake": "w"}),
    ({"gan_network": "teacher", "gan_pass": "shared"}, {"teacher": "w", "fake": "w"}, {"teacher": "e", "fake": "w"}),
]


@pytest.mark.parametrize(("options", "generator", "critic"), PASSES)
def test_dmd2_s_discriminator_takes_no_more_passes_than_it_must(
    options: dict[str, str], generator: dict[str, str], critic: dict[str, str]
) -> None:
    """w: a whole pass; e: one that ends at the tapped block."""
    method = build("dmd2", **options)
    taken: dict[str, str] = {}
    for name in ("teacher", "fake"):
        network = method.role(name).network

        def ended(module: Any, *_: Any, name: str = name) -> None:
            taken[name] = taken.get(name, "") + "e"

        def whole(module: Any, *_: Any, name: str = name) -> None:
            taken[name] = taken[name][:-1] + "w"

        network.register_forward_pre_hook(ended)
        network.register_forward_hook(whole)
    method.shared = {}
    for turn, expected in (("generator", generator), ("critic", critic)):
        taken.clear()
        play(method, turn, batch())
        assert {name: "".join(sorted(kinds, reverse=True)) for name, kinds in taken.items()} == expected


@pytest.mark.parametrize("guidance", [0.0, 1.0, 2.0])
def test_dmd2_s_shared_passes_leave_distribution_matching_as_it_is(guidance: float) -> None:
    """What the scores are asked, and what they say, does not depend on whether the discriminator listens."""
    found = []
    for options in ({}, {"gan_pass": "shared"}, {"gan_pass": "shared", "gan_network": "teacher"}):
        method = build("dmd2", guidance=guidance, **options)
        method.shared = {}
        found.append(play(method, "generator", batch(), seed=4)["dm"].detach())
    torch.testing.assert_close(found[1], found[0])
    torch.testing.assert_close(found[2], found[0])


def test_dmd2_s_critic_leaves_the_teacher_alone_where_the_teacher_s_features_are_read() -> None:
    method = build("dmd2", gan_network="teacher", critic_gan_weight=1.0)
    method.shared = {}
    play(method, "critic", batch())
    assert moved(method) == {"fake", "discriminator"}
    method.zero_grad(set_to_none=True)
    method.requires_grad_(False)
    method.discriminator.requires_grad_(True)
    method.draw = draws(B)
    finished(method.critic(batch()))["gan"].backward()
    assert moved(method) == {"discriminator"}
