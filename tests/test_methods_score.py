"""The score-distillation methods, turn by turn: who is moved, by which number, and towards what."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import torch
from torch import Tensor, nn

from gaussians import draws, moved, play
from stillroom.bench.mixture import GaussianMixture, MixtureDenoiser
from stillroom.diffusion.denoiser import Cond, Denoiser, Prediction
from stillroom.diffusion.process import RectifiedFlow
from stillroom.diffusion.sampling import FewStepSampler
from stillroom.diffusion.times import TimeLaw
from stillroom.draws import Draws
from stillroom.engine.config import EngineConfig
from stillroom.engine.trainer import Trainer
from stillroom.losses.divergence import DIVERGENCES
from stillroom.method import Batch, Method, frozen, get_method
from stillroom.networks.point_mlp import PointMLP
from stillroom.surgery.lora import LoraDenoiser

FLOW = RectifiedFlow()
B = 16
NULL = 8
# Every optional part on, so that there is a number behind each option.
FULL: dict[str, dict[str, Any]] = {
    "dmd2": {"student_steps": 3, "gan_weight": 0.5, "critic_gan_weight": 0.5},
    "swiftbrush": {"rank": 4, "lora_alpha": 8.0},
    "sim": {},
    "sid-lsg": {"student_steps": 3, "gan_weight": 0.1, "guidance": "lsg"},
    "uni-instruct": {"gan_weight": 0.1},
}


def teacher() -> Denoiser:
    torch.manual_seed(1)
    return Denoiser(PointMLP(2, 16, 3, NULL), FLOW, "v", null={"label": NULL}, shape=(2,))


def build(slug: str, lora: dict[str, Any] | None = None, **options: Any) -> Any:
    """A method some way into its training: no two of its networks say the same. In its last stage."""
    cls = get_method(slug)
    method = cls(cls.Options(**options), lora)
    method.build(teacher())
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for role in ("student", "fake"):
            for p in method.trained_parameters(role).values():
                p += 0.1 * torch.randn(p.shape, generator=generator)
    method.stage = method.stages()[-1]
    return method


def batch(n: int = B) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)
    return {"image": torch.randn(n, 2, generator=generator), "cond": {"label": torch.arange(n) % NULL}}


def names(method: Method) -> list[str]:
    return [turn.name for turn in method.turns()]


def play_step(method: Method, seed: int = 0) -> dict[str, Tensor]:
    """All turns of one step in order, as ``turn/term``, with the gradients' size under ``turn``."""
    method.shared, found = {}, {}
    for name in names(method):
        for term, value in play(method, name, batch(), seed).items():
            found[f"{name}/{term}"] = value.detach()
        gradients = [p.grad.flatten() for p in method.parameters() if p.grad is not None]
        found[name] = torch.cat(gradients).norm()
    return found


class Says(nn.Module):
    """A network that answers with a constant point plus ``slope`` per label, whatever it is asked."""

    def __init__(self, point: tuple[float, float], slope: float = 0.0) -> None:
        super().__init__()
        self.point, self.slope = nn.Parameter(torch.tensor(point)), slope

    def forward(self, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        label = cond["label"][:, None] if "label" in cond else 0
        return self.point.expand_as(x) + self.slope * label


def says(*point: float, slope: float = 0.0) -> Denoiser:
    return Denoiser(Says((point[0], point[1]), slope), FLOW, "x0", null={"label": NULL}, shape=(2,))


X0 = ((1.0, 3.0), (-1.0, 1.0))


def two_points() -> tuple[Tensor, dict[str, Any]]:
    """The two generated points of the hand-worked examples."""
    x0 = torch.tensor(X0, requires_grad=True)
    return x0, {"image": torch.zeros(2, 2), "cond": {"label": torch.tensor([7, 6])}}


# --- who is moved -----------------------------------------------------------------------------------------------------
ROUTES = [
    ("dmd2", {}, "generator", {"student"}),
    ("dmd2", {}, "critic", {"fake", "discriminator"}),
    ("dmd2", {"gan_weight": 0.0}, "generator", {"student"}),
    ("dmd2", {"gan_weight": 0.0}, "critic", {"fake"}),
    ("dmd2", {"distribution_matching": 0.0}, "generator", {"student"}),
    ("swiftbrush", {"fake": "full"}, "generator", {"student"}),
    ("swiftbrush", {"fake": "full"}, "critic", {"fake"}),
    ("swiftbrush", {"fake": "full", "score": "sds"}, "generator", {"student"}),
    ("sim", {}, "generator", {"student"}),
    ("sim", {}, "critic", {"fake"}),
    ("sid-lsg", {}, "generator", {"student"}),
    ("sid-lsg", {}, "critic", {"fake"}),
    ("sid-lsg", {"gan_weight": 0.1, "gan_head": "mlp"}, "generator", {"student"}),
    ("sid-lsg", {"gan_weight": 0.1, "gan_head": "mlp"}, "critic", {"fake", "discriminator"}),
    ("uni-instruct", {"gan_head": "mlp"}, "generator", {"student"}),
    ("uni-instruct", {"gan_head": "mlp"}, "critic", {"fake", "discriminator"}),
    ("uni-instruct", {"gan_weight": 0.0, "divergence": "reverse_kl"}, "critic", {"fake"}),
]


@pytest.mark.parametrize(("slug", "options", "name", "roles"), ROUTES)
def test_a_turn_moves_its_own_networks_and_no_other(slug: str, options: Any, name: str, roles: set[str]) -> None:
    method = build(slug, **options)
    for other in names(method):  # a turn may use what an earlier one of the step has made
        play(method, other, batch())
        if other == name:
            break
    assert moved(method) == roles
    turn = next(t for t in method.turns() if t.name == name)
    assert roles <= set(turn.trains)


@pytest.mark.parametrize("slug", ["dmd2", "sid-lsg", "uni-instruct"])
def test_the_generator_s_gan_term_goes_through_the_fake_score_to_the_student(slug: str) -> None:
    method = build(slug, gan_weight=1.0)
    method.requires_grad_(False)
    method.student.requires_grad_(True)
    method.draw = draws(B)
    method.generator(batch())["gan"].backward()
    assert moved(method) == {"student"}
    assert all(p.grad is None for p in [*method.fake.parameters(), *method.discriminator.parameters()])


def test_both_terms_of_dmd2_s_critic_train_the_fake_score_and_the_gan_alone_trains_the_head() -> None:
    method = build("dmd2")
    method.requires_grad_(False)
    for role in ("fake", "discriminator"):
        method.role(role).requires_grad_(True)
    for term, roles in (("denoise", {"fake"}), ("gan", {"fake", "discriminator"})):
        method.zero_grad(set_to_none=True)
        method.shared, method.draw = {}, draws(B)
        method.critic(batch())[term].backward()
        assert moved(method) == roles


@pytest.mark.parametrize("slug", ["dmd2", "sim", "sid-lsg", "uni-instruct"])
def test_with_adapters_a_turn_moves_its_adapter_and_the_weights_stay(slug: str) -> None:
    lora = {role: {"rank": 2} for role in ("student", "fake")}
    method = build(slug, lora)
    assert isinstance(method.student, LoraDenoiser)
    assert isinstance(method.fake, LoraDenoiser)
    assert method.student.network is method.fake.network is method.teacher.network
    method.shared = {}
    for name in names(method):
        play(method, name, batch())
        role = "student" if name == "generator" else "fake"
        for parameter, value in method.teacher.network.named_parameters():
            assert (value.grad is not None and bool(value.grad.abs().max() > 0)) == (f".{role}." in parameter)


# --- DMD2 -------------------------------------------------------------------------------------------------------------
def test_dmd2_s_gradient_in_numbers() -> None:
    """D_r = 0, D_f = (1, -2): mean|x0 - D_r| is 2 and 1, so dL/dx0 = (D_f - D_r) / (2 * 2) and / (1 * 2), halved."""
    method = build("dmd2", gan_weight=0.0)
    method.teacher, method.fake = frozen(says(0.0, 0.0)), frozen(says(1.0, -2.0))
    x0, data = two_points()
    method.sample_student = lambda batch, grad: x0
    method.draw = draws(2)
    method.generator(data)["dm"].backward()
    torch.testing.assert_close(x0.grad, torch.tensor([[1 / 8, -2 / 8], [1 / 4, -2 / 4]]))


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


class Rows:
    """Data for the engine: always the same rows."""

    def batch(self, seed: int, step: int, size: int, rows: slice) -> Batch:
        return {k: v[rows] if isinstance(v, Tensor) else {"label": v["label"][rows]} for k, v in batch(size).items()}


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
            method.sample_student(batch() | {"image": torch.full((B, 2), -50.0)}, grad=False)
        starts[simulated] = {round(float(x.mean()) / 25) for x in inputs}
    assert starts == {True: {0, 1}, False: {0, -1}}  # noise, or half of +-50


# --- SwiftBrush -------------------------------------------------------------------------------------------------------
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


def labels_seen(method: Any, name: str, seeds: range) -> list[Tensor]:
    """The labels that the fake score is asked for, one tensor per played turn."""
    seen: list[Tensor] = []
    hook = method.fake.register_forward_pre_hook(lambda _, args: seen.append(args[2]["label"]))
    for seed in seeds:
        method.shared = {"x0": torch.zeros(B, 2)}
        play(method, name, batch(), seed)
    hook.remove()
    return seen


def test_swiftbrush_drops_the_condition_of_a_whole_batch_or_of_none() -> None:
    method = build("swiftbrush", condition_drop=0.5, **FULL["swiftbrush"])
    seen = labels_seen(method, "critic", range(40))
    dropped = [bool((labels == NULL).all()) for labels in seen]
    assert all(
        drop or torch.equal(labels, batch()["cond"]["label"]) for drop, labels in zip(dropped, seen, strict=True)
    )
    assert 10 <= sum(dropped) <= 30


# --- SiD --------------------------------------------------------------------------------------------------------------
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


def test_sid_drops_conditions_sample_by_sample_and_only_under_guidance() -> None:
    plain = labels_seen(build("sid-lsg", condition_drop=0.5), "critic", range(3))
    assert all(torch.equal(labels, batch()["cond"]["label"]) for labels in plain)
    guided = torch.cat(labels_seen(build("sid-lsg", condition_drop=0.5, guidance="lsg"), "critic", range(20)))
    null = (guided == NULL).reshape(20, B)
    assert 0.35 < float(null.float().mean()) < 0.65
    assert bool((null.any(1) & ~null.all(1)).all())  # some and not all, in every batch
    asked = torch.cat(labels_seen(build("sid-lsg", condition_drop=0.5, guidance="lsg"), "generator", range(3)))
    assert not bool((asked == NULL).any())


@pytest.mark.parametrize(("guidance", "passes"), [("long", (2, 1)), ("zero-cfg", (3, 2)), ("anti-cfg", (3, 2))])
def test_sid_s_gan_reads_its_logits_from_the_fake_score_s_own_pass_where_it_can(
    guidance: str, passes: tuple[int, int]
) -> None:
    """Critic: generated and real; generator: generated. One more each where the fake score is asked something else."""
    method, asked = build("sid-lsg", guidance=guidance, gan_weight=0.1), []
    method.fake.register_forward_pre_hook(lambda _, args: asked.append(args))
    for name, expected in zip(("critic", "generator"), passes, strict=True):
        asked.clear()
        play(method, name, batch())
        assert len(asked) == expected


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


# --- Uni-Instruct -----------------------------------------------------------------------------------------------------
def test_uni_instruct_with_reverse_kl_and_no_gan_is_sid_at_alpha_one() -> None:
    uni = build("uni-instruct", divergence="reverse_kl", gan_weight=0.0)
    o = uni.options
    shared = {name: getattr(o, name) for name in ("t_init", "generator_times", "critic_times", "fake_loss")}
    sid = build("sid-lsg", alpha=1.0, gan_weight=0.0, **shared)
    assert uni.stage.name == "divergence"
    for name in ("critic", "generator"):
        ours, theirs = play(uni, name, batch(), 5), play(sid, name, batch(), 5)
        torch.testing.assert_close(*(torch.stack(list(terms.values())) for terms in (ours, theirs)))
        role = "student" if name == "generator" else "fake"
        for a, b in zip(uni.role(role).parameters(), sid.role(role).parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad)


def test_uni_instruct_s_stages_start_with_the_critics_alone() -> None:
    method = build("uni-instruct", critic_share=0.1, warmup_share=0.2)
    plan = method.stages()
    assert [(s.name, s.turns) for s in plan] == [("critics", ("critic",)), ("warm-up", None), ("divergence", None)]
    assert [s.share for s in plan] == pytest.approx([0.1, 0.2, 0.7])
    bare = build("uni-instruct", critic_share=0.0, warmup_share=0.0)
    assert [s.name for s in bare.stages()] == ["divergence"]


def test_uni_instruct_warms_up_as_reverse_kl_without_a_gan() -> None:
    method, plain = (
        build("uni-instruct", divergence="js"),
        build("uni-instruct", divergence="reverse_kl", gan_weight=0.0),
    )
    method.stage = method.stages()[1]
    warm = play(method, "generator", batch())
    assert warm.keys() == {"score"}
    torch.testing.assert_close(warm, play(plain, "generator", batch()))
    method.stage = method.stages()[2]
    full = play(method, "generator", batch())
    assert full.keys() == {"score", "gan"}
    assert float(full["score"]) != pytest.approx(float(warm["score"]))


# --- the direction ----------------------------------------------------------------------------------------------------
TARGET, START, GAIN = (1.0, -0.5), (-0.5, 0.5), 0.6


class Affine(nn.Module):
    """``mean + gain * x``: the student's law is a Gaussian. The blocks are there to be tapped."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.gain = nn.Parameter(torch.tensor(START)), nn.Parameter(torch.tensor(GAIN))
        self.blocks = nn.ModuleList(nn.Identity() for _ in range(2))

    def forward(self, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        return self.blocks[1](self.mean + self.gain * x)


class ExactDiscriminator(nn.Module):
    """The logit of an ideal discriminator: log density of the real over that of the generated, at the noise level."""

    def __init__(self, real: GaussianMixture) -> None:
        super().__init__()
        self.real = real

    def forward(self, fake: Any, x_t: Tensor, t: Tensor, cond: Cond) -> tuple[Prediction, Tensor]:
        rates = FLOW.alpha(t).double(), FLOW.sigma(t).double()
        return fake(x_t, t, cond), self.real.log_density(x_t, *rates) - fake.network.log_density(x_t, *rates)


ARMS: list[tuple[str, dict[str, Any]]] = [
    ("dmd2", {"gan_weight": 0.0}),
    ("dmd2", {"gan_weight": 1.0}),
    ("dmd2", {"gan_weight": 1.0, "distribution_matching": 0.0}),
    ("swiftbrush", {"fake": "full"}),
    ("swiftbrush", {"fake": "full", "score": "sds"}),
    ("swiftbrush", {"fake": "full", "reparametrise": False}),
    *(("sim", {"distance": distance}) for distance in ("pseudo_huber", "l2", "power", "sid")),
    ("sim", {"distance": "l2", "fgm": 0.5}),
    ("sim", {"score_space": True}),
    *(("sid-lsg", {"alpha": alpha}) for alpha in (0.5, 1.0, 1.2)),
    ("sid-lsg", {"gan_weight": 1.0}),
    *(("uni-instruct", {"divergence": f, "gan_weight": 0.0}) for f in DIVERGENCES),
    *(("uni-instruct", {"divergence": f, "gan_weight": 0.0, "fgm": True}) for f in DIVERGENCES),
    ("uni-instruct", {"gan_weight": 1.0, "divergence": "reverse_kl"}),
]


def exact_world(slug: str, options: dict[str, Any]) -> Any:
    """A method whose student is affine and whose other networks are exact for it."""
    cls = get_method(slug)
    method: Any = cls(cls.Options(**options))
    method.build(Denoiser(Affine(), FLOW, "x0", shape=(2,)))
    width = GAIN * getattr(method.options, "t_init", 1.0)
    real, generated = (GaussianMixture(torch.tensor([mean]), std=width) for mean in (TARGET, START))
    method.teacher, method.fake = (frozen(MixtureDenoiser(law, FLOW)) for law in (real, generated))
    method.discriminator = frozen(ExactDiscriminator(real))
    method.stage = method.stages()[-1]
    return method


@pytest.mark.parametrize(("slug", "options"), ARMS)
def test_a_step_moves_the_student_s_mean_towards_the_teacher_s(slug: str, options: dict[str, Any]) -> None:
    """Teacher, fake score and discriminator exact; teacher and student are Gaussians of the same width."""
    method = exact_world(slug, options)
    play(method, "generator", {"image": torch.zeros(4096, 2), "cond": {}})
    mean, step = method.student.network.mean.detach(), method.student.network.mean.grad
    away = torch.tensor(TARGET) - mean
    moved_to = mean - 0.1 * step / step.norm()
    assert float((torch.tensor(TARGET) - moved_to).norm()) < float(away.norm())
    assert float(-(step @ away) / (step.norm() * away.norm())) > 0.9


# --- every choice -----------------------------------------------------------------------------------------------------
def choices(slug: str) -> Iterator[tuple[str, Any]]:
    """Every value of every option that is a choice or a switch, read off the types."""
    for name, kind in get_type_hints(get_method(slug).Options).items():
        if get_origin(kind) is Literal:
            yield from ((name, value) for value in get_args(kind))
        elif kind is bool:
            yield from ((name, value) for value in (False, True))


# Options that are numbers or laws, at another value than the default's; some switch a part of the loss off.
NUMBERS: dict[str, dict[str, Any]] = {
    "dmd2": {
        "student_steps": 2, "t_init": 0.5, "guidance": 2.0, "distribution_matching": 0.0, "gan_weight": 0.0,
        "critic_gan_weight": 2.0, "gan_block": "blocks.0", "generator_times": TimeLaw("logit-normal"),
        "critic_times": TimeLaw("logit-normal"),
    },
    "swiftbrush": {
        "rank": 2, "lora_alpha": 4.0, "targets": ("to_v",), "guidance": 1.0, "fake_guidance": 1.0,
        "condition_drop": 1.0, "t_init": 0.7, "student_times": TimeLaw("logit-normal"),
        "fake_times": TimeLaw("logit-normal"),
    },
    "sim": {
        "c": 1.0, "fgm": 0.5, "guidance": 2.0, "t_init": 0.5, "generator_times": TimeLaw("logit-normal"),
        "critic_times": TimeLaw("logit-normal"),
    },
    "sid-lsg": {
        "student_steps": 2, "t_init": 0.5, "alpha": 0.5, "guidance_scale": 3.0, "condition_drop": 0.0,
        "gan_weight": 0.0, "critic_gan_weight": 2.0, "gan_block": "blocks.0",
        "generator_times": TimeLaw("logit-normal"), "critic_times": TimeLaw("logit-normal"),
    },
    "uni-instruct": {
        "gan_weight": 0.0, "critic_gan_weight": 2.0, "gan_block": "blocks.0", "guidance": 2.0, "t_init": 0.5,
        "generator_times": TimeLaw("logit-normal"), "critic_times": TimeLaw("logit-normal"),
    },
}  # fmt: skip
ELSEWHERE = {"dmd2": {"critic_turns"}, "sim": {"beta"}, "uni-instruct": {"critic_share", "warmup_share"}}
CHOICES = [(slug, name, value) for slug in FULL for name, value in choices(slug)]
CASES = CHOICES + [(slug, name, value) for slug in FULL for name, value in NUMBERS[slug].items()]


@pytest.fixture(scope="module")
def usual() -> dict[str, list[dict[str, Tensor]]]:
    """The numbers of three steps of each method at its usual options."""
    return {slug: [play_step(build(slug, **FULL[slug]), seed) for seed in range(3)] for slug in FULL}


@pytest.mark.parametrize(("slug", "name", "value"), CASES)
def test_every_option_value_runs_all_turns_and_changes_something(
    slug: str, name: str, value: Any, usual: dict[str, list[dict[str, Tensor]]]
) -> None:
    default = FULL[slug].get(name, getattr(get_method(slug).Options(), name))
    steps = [play_step(build(slug, **FULL[slug] | {name: value}), seed) for seed in range(3)]
    for step in steps:
        assert all(bool(torch.isfinite(number)) for number in step.values())
        assert all(turn in step and float(step[turn]) > 0 for turn in ("generator", "critic"))
    same = all(
        ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
        for ours, theirs in zip(steps, usual[slug], strict=True)
    )
    assert same == (value == default)


@pytest.mark.parametrize("slug", FULL)
def test_no_option_is_left_untried(slug: str) -> None:
    tried = {name for method, name, _ in CASES if method == slug} | ELSEWHERE.get(slug, set())
    assert tried == {field.name for field in dataclasses.fields(get_method(slug).Options)}


def test_sim_s_exponent_is_that_of_the_power_family() -> None:
    mild, steep = (play_step(build("sim", distance="power", beta=beta))["generator/sim"] for beta in (1.5, 2.0))
    l2 = play_step(build("sim", distance="l2"))["generator/sim"]
    torch.testing.assert_close(steep, 2 * l2)  # the gradient of |d|^2 is 2 d
    assert float(mild) != pytest.approx(float(steep))


@pytest.mark.parametrize(
    ("slug", "options"),
    [
        ("dmd2", {"student_steps": 2}),
        ("sid-lsg", {"student_steps": 2}),
        ("swiftbrush", {}),
        ("sim", {}),
        ("uni-instruct", {}),
    ],
)
def test_the_finished_student_is_run_from_where_it_was_trained(slug: str, options: dict[str, Any]) -> None:
    """The first call of a rollout and of the saved sampler are the same question."""
    method = build(slug, **options)
    sampler = method.sampler()
    assert isinstance(sampler, FewStepSampler)
    asked: list[tuple[Tensor, Tensor]] = []
    method.student.register_forward_pre_hook(lambda _, args: asked.append((args[0].detach(), args[1])))
    play(method, "generator", batch(), 0)
    twin = draws(B)
    if len(sampler.times) > 1:
        twin.index(len(sampler.times))
    trained, asked[:] = asked[0], []
    sampler.sample(method.student, twin.normal(B, 2), batch()["cond"], torch.Generator())
    assert torch.equal(asked[0][0], trained[0])
    assert float(asked[0][1]) == pytest.approx(float(trained[1]))
    assert len(asked) == sampler.nfe == options.get("student_steps", 1)


# --- what all methods share -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("slug", FULL)
def test_the_teacher_stays_in_eval_mode_and_the_others_follow(slug: str) -> None:
    method = build(slug)
    method.train()
    assert not any(part.training for part in method.teacher.modules())
    assert method.student.training
    assert method.student.network.training
    assert not any(p.requires_grad for n, p in method.teacher.named_parameters() if "lora" not in n)
    method.eval()
    assert not any(part.training for part in method.modules())


def test_a_copy_of_a_frozen_teacher_is_free() -> None:
    method = build("sim")
    assert all(p.requires_grad for role in ("student", "fake") for p in method.role(role).parameters())
    own = [{id(p) for p in method.role(role).parameters()} for role in ("teacher", "student", "fake")]
    assert not own[0] & own[1]
    assert not own[1] & own[2]


def test_an_unknown_role_names_those_that_there_are() -> None:
    with pytest.raises(AttributeError, match=r"'sim' has no network 'critc'; it owns: teacher, student, fake"):
        build("sim").role("critc")


def test_a_draw_of_the_wrong_size_is_refused() -> None:
    with pytest.raises(ValueError, match="micro-batch size 4, got 3"):
        Draws(torch.Generator(), slice(4, 8), 16).normal(3, 2)


@pytest.mark.parametrize("slug", FULL)
def test_the_rows_of_a_split_batch_are_those_of_the_whole(slug: str) -> None:
    """Two halves, averaged, give the terms of the whole batch: what accumulation and several processes rely on."""
    method, halves = build(slug, **FULL[slug]), []
    whole = play_step(method, 4)
    for rows in (slice(0, B // 2), slice(B // 2, B)):
        method.shared, found = {}, {}
        part = {"image": batch()["image"][rows], "cond": {"label": batch()["cond"]["label"][rows]}}
        for name in names(method):
            method.draw = Draws(torch.Generator().manual_seed(4), rows, B)
            found |= {f"{name}/{term}": value.detach() for term, value in getattr(method, name)(part).items()}
        halves.append(found)
    for term in halves[0]:
        torch.testing.assert_close((halves[0][term] + halves[1][term]) / 2, whole[term], rtol=1e-4, atol=1e-5)
