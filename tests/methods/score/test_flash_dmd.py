"""Flash-DMD: which loss sees which step, what flows where, the coupling, preferences by Gaussian transitions."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from points import FLOW, NULL, B, batch, says, two_points
from points import teacher as point_mlp
from torch import Tensor, nn

from gaussians import draws, moved, play
from stillroom.data.source import ArrayData
from stillroom.diffusion.denoiser import Denoiser
from stillroom.diffusion.process import TrigFlow
from stillroom.diffusion.sampling import approach, continued, few_step_times, rollout
from stillroom.engine.config import EngineConfig
from stillroom.engine.trainer import Trainer
from stillroom.errors import UserError
from stillroom.losses.preference import best_and_worst, dpo_loss, transition_loss
from stillroom.method import frozen
from stillroom.methods.score.flash_dmd import FlashDMD
from stillroom.networks.discriminators import PictureDiscriminator
from stillroom.networks.point_mlp import PointMLP
from stillroom.proofs.flash_dmd import IMAGE
from tiny_denoisers import dit_teacher
from tiny_text_images import tiny_codec
from workers.toy import fitted

RADIUS = "stillroom.bench.ring.bench:outward"
FREE = {"coupling": 1.0}


def built(teacher: Denoiser | None = None, lora: Any = None, given: Any = None, **options: Any) -> Any:
    torch.manual_seed(0)
    method = FlashDMD(FlashDMD.Options(**options), lora)
    method.build(point_mlp() if teacher is None else teacher, **(given or {}))
    method.stage = method.stages()[-1]
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for role in ("student", "fake"):
            for p in method.trained_parameters(role).values():
                p += 0.1 * torch.randn(p.shape, generator=generator)
    return method


def latents(**options: Any) -> tuple[Any, dict[str, Any]]:
    """On latents with a decoder, whose own encoder the discriminator reads; and a batch."""
    codec, teacher = tiny_codec(channels=1), dit_teacher()
    method = built(teacher, given={"decode": codec.pictures, "autoencoder": codec.network}, **options)
    data = {"x": torch.randn(4, *teacher.shape), "cond": {"label": torch.tensor([0, 1, 2, 0])}}
    return method, data


# --- which loss sees which step ---------------------------------------------------------------------------------------
def asked(method: Any, name: str = "generator", seeds: int = 12, data: Any = None) -> dict[str, set[float]]:
    """The times of the calls of the student with a graph, and of those without."""
    found: dict[str, set[float]] = {"graph": set(), "plain": set()}

    def note(module: Any, args: Any) -> None:
        found["graph" if torch.is_grad_enabled() else "plain"].add(round(float(args[1]), 4))

    hook = method.student.register_forward_pre_hook(note)
    for seed in range(seeds):
        method.shared = {}
        play(method, name, data or batch(), seed)
    hook.remove()
    return found


def test_matching_sees_the_noisy_steps_and_the_discriminator_the_late_ones() -> None:
    """Each term is told by its gradient with respect to what the student says at a time, from a student of as many
    points as there are times."""
    method, data = latents(gan_weight=0.1)
    assert (method.high, method.low) == ([0, 1], [2, 3])
    assert asked(method, data=data)["graph"] == {1.0, 0.75, 0.5, 0.25}
    answers: dict[float, Tensor] = {}
    inner = method.student.forward

    def recorded(x: Tensor, t: Tensor, cond: Any) -> Any:
        said = inner(x, t, cond)
        if torch.is_grad_enabled():
            said.x0.retain_grad()
            answers[float(t)] = said.x0
        return said

    method.student.forward = recorded
    for term, times in (("dm", {1.0, 0.75}), ("gan", {0.5, 0.25})):
        reached: set[float] = set()
        for seed in range(12):
            answers.clear()
            method.shared, method.draw = {}, draws(4, seed)
            method.requires_grad_(False)
            method.student.requires_grad_(True)
            method.generator(data)[term].backward()
            reached |= {time for time, x0 in answers.items() if x0.grad is not None and bool(x0.grad.any())}
        assert reached == times


def test_the_adversarial_gradient_does_not_reach_the_noisy_call() -> None:
    """The clean sample that is noised again is detached: with the late call cut, nothing is left."""
    method, data = latents(gan_weight=0.1)
    x0 = torch.randn(4, *method.student.shape, requires_grad=True)
    method.draw = draws(4)
    y = method.late(x0, 0, data["cond"])
    assert y.requires_grad
    y.sum().backward()
    assert x0.grad is None


def test_what_is_noised_again_is_where_the_student_s_own_sampler_ends() -> None:
    """As a rollout to the last step, from the same draws."""
    method = built(gan_weight=0.0)
    times = few_step_times(4)
    method.draw = draws(B, 3)
    whole = rollout(method.student, method.draw, batch()["cond"], times, grad=False, last=3)
    method.draw = draws(B, 3)
    first = rollout(method.student, method.draw, batch()["cond"], times, grad=False, last=1)
    torch.testing.assert_close(continued(method.student, method.draw, batch()["cond"], first, times[2:]), whole)
    assert torch.equal(continued(method.student, method.draw, batch()["cond"], first, ()), first)


def test_summed_losses_see_every_step_and_one_call() -> None:
    method = built(placement="summed", gan_weight=0.1, encoder="teacher")
    found = asked(method)
    assert found["graph"] == {1.0, 0.75, 0.5, 0.25}
    method.shared = {}
    assert set(play(method, "generator", batch())) == {"dm", "gan"}
    torch.testing.assert_close(method.shared["x0"], method.shared["y"])


def test_without_a_discriminator_distributions_are_matched_at_all_steps() -> None:
    """Late ones too, which nothing else would train."""
    assert asked(built(gan_weight=0.0))["graph"] == {1.0, 0.75, 0.5, 0.25}


def test_the_arm_of_five_critic_updates_asks_as_many_networks_as_the_recipe() -> None:
    """Calls of student, fake score and teacher, a guided one twice, in all of either arm's training."""
    arms = {arm.name: arm for arm in IMAGE.arms}
    calls = {}
    for name in ("flash-dmd", "five critic updates, equal calls"):
        asks = ("student_steps", "guidance", "critic_turns", "placement", "gan_weight")
        method = built(encoder="teacher", **{key: arms[name].options[key] for key in asks})
        counted = [0]

        def count(module: Any, args: Any, counted: list[int] = counted) -> None:
            counted[0] += 2 if len(args) > 3 and args[3] != 1 else 1

        for role in (method.student, method.fake, method.teacher):
            role.register_forward_pre_hook(count)
        turns, rounds = method.options.critic_turns, 16
        for step in range(turns * rounds):
            method.shared = {}
            if step % turns == 0:
                play(method, "generator", batch(), step)
            play(method, "critic", batch(), step)
        calls[name] = counted[0] / rounds * (arms[name].engine["steps"] / turns)
    recipe, five = calls.values()
    assert five == pytest.approx(recipe, rel=0.1)


def test_the_matching_term_in_numbers() -> None:
    """D_r = 0, D_f = (1, -2): mean |x0 - D_r| is 2 and 1, so dL/dx0 = (D_f - D_r) / (2 * 2) and / (1 * 2), halved."""
    method = built(gan_weight=0.0)
    method.teacher, method.fake = frozen(says(0.0, 0.0)), frozen(says(1.0, -2.0))
    x0, data = two_points()
    method.sample_student = lambda batch, grad: (x0, 0)
    method.draw, method.shared = draws(2), {}
    method.generator(data)["dm"].backward()
    torch.testing.assert_close(x0.grad, torch.tensor([[1 / 8, -2 / 8], [1 / 4, -2 / 4]]))


# --- the discriminator ------------------------------------------------------------------------------------------------
def test_the_discriminator_s_terms_in_numbers() -> None:
    """Logits 2 and -1 of the student's pictures, 0 and 3 of real ones: the student is to raise its own, the heads are
    to lower these and to raise the others."""

    def logits(x: Tensor, cond: Any) -> Tensor:
        return x[:, :1]

    def soft(value: float) -> float:
        return math.log(1 + math.exp(value))

    method = built(gan_weight=0.5, encoder="teacher")
    method.judged = logits
    method.late = lambda x0, k, cond: torch.tensor([[2.0, 0.0], [-1.0, 0.0]])
    data = {"x": torch.tensor([[0.0, 5.0], [3.0, 5.0]]), "cond": {"label": torch.tensor([0, 1])}}
    method.draw, method.shared = draws(2), {}
    told = method.generator(data)["gan"]
    assert float(told) == pytest.approx(0.5 * (soft(-2) + soft(1)) / 2)
    heads = method.critic(data)["gan"]()
    assert float(heads) == pytest.approx((soft(2) + soft(-1)) / 2 + (soft(0) + soft(-3)) / 2)


def test_the_discriminator_s_gradient_passes_the_frozen_decoder_and_encoder() -> None:
    method, data = latents(gan_weight=0.1)
    method.shared = {}
    play(method, "generator", data)
    assert moved(method) == {"student"}
    assert isinstance(method.discriminator, PictureDiscriminator)
    x = torch.randn(2, *method.student.shape, requires_grad=True)
    method.judged(x, {}).sum().backward()
    assert float(x.grad.abs().max()) > 0
    play(method, "critic", data)
    assert moved(method) == {"fake", "discriminator"}
    assert not any(p.requires_grad for p in method.autoencoder.parameters())


def test_without_an_autoencoder_the_teacher_s_blocks_are_read() -> None:
    method = built(gan_weight=0.1)
    assert method.encoder is None
    method.shared = {}
    play(method, "generator", batch())
    play(method, "critic", batch())
    assert moved(method) == {"fake", "discriminator"}


def test_the_discriminator_learns_where_the_student_was_updated() -> None:
    method = built(gan_weight=0.1)
    method.shared = {}
    assert set(play(method, "critic", batch())) == {"denoise"}
    play(method, "generator", batch())
    assert set(play(method, "critic", batch())) == {"denoise", "gan"}


def test_a_crop_is_the_same_square_of_all_rows() -> None:
    method, data = latents(gan_weight=0.1, crop=4)
    place = torch.arange(64.0).reshape(1, 1, 8, 8).expand(3, 1, 8, 8)
    corners = set()
    for seed in range(20):
        method.draw = draws(3, seed)
        part = method.part(place)
        assert part.shape == (3, 1, 4, 4)
        assert torch.equal(part[0], part[2])
        corners.add(float(part[0, 0, 0, 0]))
    assert len(corners) > 5
    method.shared = {}
    play(method, "generator", data)
    assert moved(method) == {"student"}


def test_an_encoder_of_one_s_own_is_found_by_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_encoders.py").write_text(
        "from torch import nn\n\n\nclass Own(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.body = nn.Conv2d(3, 5, 3, 2)\n\n    def forward(self, pictures):\n"
        "        maps = self.body(pictures)\n"
        "        return [maps, maps.flatten(2).transpose(1, 2), maps.mean((2, 3))]\n"
        "\n\ndef none():\n    return nn.Identity()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    codec = tiny_codec(channels=1)
    given = {"decode": codec.pictures, "autoencoder": codec.network}
    method = built(dit_teacher(), given=given, gan_weight=0.1, encoder="my_encoders:Own")
    assert len(method.discriminator.heads) == 3
    assert method.judged(torch.randn(2, *method.student.shape), {}).shape[0] == 2
    for entry, message in (("my_encoders:none", "no list of feature maps"), ("my_encoders:other", "is not there")):
        with pytest.raises(UserError, match=message):
            built(dit_teacher(), given=given, gan_weight=0.1, encoder=entry)


# --- the coupling -----------------------------------------------------------------------------------------------------
def points(n: int = 64) -> ArrayData:
    generator = torch.Generator().manual_seed(0)
    return ArrayData(torch.randn(n, 2, generator=generator), {"label": torch.arange(n) % 8})


def engine(steps: int, **more: Any) -> EngineConfig:
    optim = {"all": {"lr": 0.01, "name": "sgd", "betas": (0.0, 0.0), "clip_norm": 0.0}}
    return EngineConfig(steps=steps, batch=8, checkpoint_every=2, check_freezing=True, **{"optim": optim, **more})


def test_after_each_update_of_the_student_the_fake_score_moves_towards_it() -> None:
    """psi <- lambda psi + (1 - lambda) theta, with rates so small that nothing else moves them."""
    method = built(gan_weight=0.0, coupling=0.9, critic_turns=2)
    theta = [p.detach().clone() for p in method.student.parameters()]
    psi = [p.detach().clone() for p in method.fake.parameters()]
    still = {"all": {"lr": 0.0, "name": "sgd", "betas": (0.0, 0.0)}}
    Trainer(method, points(), engine(5, optim=still), show=False).fit()  # updates at steps 0, 2 and 4
    for now, mine, theirs in zip(method.fake.parameters(), psi, theta, strict=True):
        torch.testing.assert_close(now.detach(), 0.9**3 * mine + (1 - 0.9**3) * theirs)


def test_without_coupling_nothing_follows() -> None:
    assert built(gan_weight=0.0, **FREE).followers() == {}
    other, method = point_mlp(), FlashDMD(FlashDMD.Options())
    other.network = nn.Linear(2, 2)
    with pytest.raises(UserError, match="cannot follow a Linear"):
        method.build(point_mlp(), student=other)


def other_student(what: str) -> Denoiser:
    """Of the teacher's class, but of other weights, of other answers, or of another process."""
    if what == "width":
        return Denoiser(PointMLP(2, 24, 3, NULL), FLOW, "v", null={"label": NULL}, shape=(2,))
    made = point_mlp()
    if what == "answers":
        made.prediction = "x0"
    else:
        made.process = TrigFlow()
    return made


@pytest.mark.parametrize(
    ("what", "said"),
    [("width", "other trained weights"), ("answers", "predicts x0"), ("process", "on trigflow")],
)
def test_a_student_whose_weights_mean_something_else_is_not_followed(what: str, said: str) -> None:
    options = {"gan_weight": 0.0}
    with pytest.raises(UserError, match=said):
        FlashDMD(FlashDMD.Options(**options)).build(point_mlp(), student=other_student(what))
    FlashDMD(FlashDMD.Options(**options, **FREE)).build(point_mlp(), student=other_student(what))


def test_adapters_of_another_rank_are_not_followed() -> None:
    lora = {role: {"rank": rank, "targets": ["to_q", "to_v"]} for role, rank in (("student", 2), ("fake", 4))}
    with pytest.raises(UserError, match="the same adapters"):
        FlashDMD(FlashDMD.Options(gan_weight=0.0), lora).build(dit_teacher())


# --- preferences ------------------------------------------------------------------------------------------------------
def test_log_ratios_are_those_of_gaussians() -> None:
    """H by torch.distributions: the mean over elements of the log densities of N(alpha x0, sigma^2)."""
    generator = torch.Generator().manual_seed(0)
    win, lose, mean, ref = (torch.randn(5, 2, 3, generator=generator).double() for _ in range(4))
    sigma, beta = 0.7, 3.0
    normal = torch.distributions.Normal

    def ratio(z: Tensor) -> Tensor:
        return (normal(mean, sigma).log_prob(z) - normal(ref, sigma).log_prob(z)).flatten(1).mean(1)

    expected = -torch.nn.functional.logsigmoid(beta * (ratio(win) - ratio(lose))).mean()
    found = dpo_loss(*(transition_loss(z, m, sigma) for m in (mean, ref) for z in (win, lose)), beta)
    torch.testing.assert_close(found.terms["dpo"], expected)


def test_best_and_worst_are_chosen_row_by_row() -> None:
    candidates = torch.arange(12.0).reshape(3, 2, 2)
    best, worst = best_and_worst(candidates, torch.tensor([[1.0, 5.0], [3.0, 4.0], [2.0, 9.0]]))
    assert best.tolist() == [[4, 5], [10, 11]]
    assert worst.tolist() == [[0, 1], [6, 7]]


def preferring(**options: Any) -> Any:
    method = built(gan_weight=0.0, student_steps=2, reward=RADIUS, rl_share=0.5, **options)
    method.reference.load_state_dict(method.student.state_dict())
    return method


def test_preferences_begin_without_a_lean_and_move_towards_the_better_candidate() -> None:
    """At the start H is 0 and the loss log 2; a step along its gradient brings the guess nearer to the winners, which
    lie farther out."""
    method = preferring(beta=2.0)
    terms = play(method, "prefer", batch())
    assert float(terms["dpo"].detach()) == pytest.approx(math.log(2), abs=1e-5)
    assert moved(method) == {"student"}
    for role in ("student", "reference"):  # whose guess is one point, not at the middle
        setattr(method, role, says(0.6, -0.8))
    play(method, "prefer", batch())
    slope = method.student.network.point.grad
    assert float(-(slope @ torch.tensor([0.6, -0.8])) / slope.norm()) > 0.8


def test_pairs_are_taken_from_noisy_steps_and_never_from_the_last() -> None:
    """At the last step there is no noise in what follows."""
    assert built(gan_weight=0.0, rl_share=0.5, reward=RADIUS).paired == [0, 1]
    assert built(gan_weight=0.0, rl_share=0.5, reward=RADIUS, rl_steps="all").paired == [0, 1, 2]
    with pytest.raises(UserError, match="a step with another after it"):
        built(gan_weight=0.0, rl_share=0.5, student_steps=1, placement="summed")


def test_a_reward_of_one_s_own_is_told_the_time_of_a_state_or_sees_a_prediction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_state_rewards.py").write_text(
        "seen = []\n\n\ndef states(z, cond):\n    seen.append((z, cond))\n    return z.sum(1)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import my_state_rewards  # type: ignore[import-not-found]

    for rewarded in ("states", "predictions"):
        method = built(
            gan_weight=0.0, student_steps=2, rl_share=1.0, candidates=3, reward="my_state_rewards:states",
            rewarded=rewarded,
        )  # fmt: skip
        play(method, "prefer", batch())
        shown = my_state_rewards.seen[-3:]
        assert len(shown) == 3
        told = [cond.get("time") for _, cond in shown]
        if rewarded == "states":
            assert all(torch.equal(one, torch.full((B,), 0.5)) for one in told)
        else:
            assert told == [None] * 3


def test_five_updates_by_preferences_come_with_one_of_distillation() -> None:
    method = preferring(rl_turns=5)
    seen: list[tuple[str, int]] = []

    def watched(name: str, inner: Any, data: Any) -> Any:
        seen.append((name, method.step))
        return inner(data)

    for name in ("distil", "follow", "prefer"):
        setattr(method, name, functools.partial(watched, name, getattr(method, name)))
    Trainer(method, points(), engine(24), show=False).fit()
    names = [name for name, _ in seen]
    assert min(step for _, step in seen) == 12
    assert names.count("prefer") == 12
    assert [step for name, step in seen if name == "distil"] == [12, 17, 22]
    assert [step for name, step in seen if name == "follow"] == [12, 17, 22]
    assert [t.name for t in preferring(rl_turns=0).turns()] == ["generator", "critic", "prefer"]


def test_the_reward_learns_agreement_at_all_noise_levels() -> None:
    method = built(gan_weight=0.0, student_steps=2, rl_share=0.5, reward_steps=30)
    data = points()
    method.prepare(data)
    z = torch.randn(8, 2)
    scores = method.reward(z, torch.tensor(0.5), {"label": torch.arange(8)})
    assert scores.shape == (8,)
    assert bool((scores < 0).all())  # log probabilities
    assert not torch.equal(scores, method.reward(z, torch.tensor(0.1), {"label": torch.arange(8)}))


@pytest.mark.parametrize("lora", [None, {r: {"rank": 2, "targets": ["to_q", "to_v"]} for r in ("student", "fake")}])
def test_a_run_that_is_cut_short_in_either_stage_ends_as_one_that_is_not(lora: Any, tmp_path: Path) -> None:
    def run(folder: Path, stop: int) -> dict[str, Tensor]:
        method = built(lora=lora, gan_weight=0.1, encoder="teacher", rl_share=0.5, rl_turns=2, reward=RADIUS)
        method.stage = method.stages()[0]
        fitted(Trainer(method, points(), engine(12), folder, folder.is_dir(), show=False), stop)
        if stop:
            return run(folder, 0)
        return {name: p.detach().clone() for name, p in method.trained_parameters("student").items()}

    whole = run(tmp_path / "whole", 0)
    for stop in (3, 9):
        again = run(tmp_path / f"cut{stop}", stop)
        assert all(torch.equal(again[name], value) for name, value in whole.items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": 0.1}, "on one side"),
        ({"split": 1.0, "gan_weight": 0.0}, "no noisy step"),
        ({"renoise": "ddim", "encoder": "teacher"}, "fresh noise at each step"),
        ({"renoise": "fixed", "gan_weight": 0.0, "rl_share": 0.5, "reward": RADIUS}, "fresh noise at each step"),
    ],
)
def test_what_cannot_be_is_said(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        built(**options)


def test_what_a_step_is_asked_is_what_its_rollout_asks() -> None:
    method = built(gan_weight=0.0)
    times = few_step_times(4)
    z, t = approach(method.student, draws(B, 5), batch()["cond"], times, 2)
    assert float(t) == 0.5
    expected = rollout(method.student, draws(B, 5), batch()["cond"], times, grad=False, last=2)
    with torch.no_grad():
        torch.testing.assert_close(method.student(z, t, batch()["cond"]).x0, expected)
