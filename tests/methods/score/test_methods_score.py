"""The score-distillation methods together: who is moved, towards what, and every value of every option."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import torch
from points import FLOW, FULL, B, Rows, batch, build, names, play_step
from torch import Tensor, nn

from gaussians import draws, moved, play
from stillroom.bench.mixture import GaussianMixture, MixtureDenoiser
from stillroom.diffusion.denoiser import Cond, Denoiser, Prediction
from stillroom.diffusion.sampling import FewStepSampler
from stillroom.diffusion.times import TimeLaw
from stillroom.draws import Draws
from stillroom.engine.config import EngineConfig
from stillroom.engine.distributed import finished
from stillroom.engine.trainer import Trainer
from stillroom.losses.divergence import DIVERGENCES
from stillroom.method import frozen, get_method
from stillroom.planning import plan
from stillroom.recipe import Recipe, shipped
from stillroom.surgery.lora import LoraDenoiser

# --- who is moved -----------------------------------------------------------------------------------------------------
ROUTES = [
    ("dmd2", {}, "generator", {"student"}),
    ("dmd2", {}, "critic", {"fake", "discriminator"}),
    ("dmd2", {"gan_weight": 0.0}, "generator", {"student"}),
    ("dmd2", {"gan_weight": 0.0}, "critic", {"fake"}),
    ("dmd2", {"distribution_matching": 0.0}, "generator", {"student"}),
    ("decoupled-dmd", {}, "generator", {"student"}),
    ("decoupled-dmd", {}, "critic", {"fake"}),
    ("decoupled-dmd", {"gan_weight": 0.1}, "critic", {"fake", "discriminator"}),
    ("swiftbrush", {"fake": "full"}, "generator", {"student"}),
    ("swiftbrush", {"fake": "full"}, "critic", {"fake"}),
    ("swiftbrush", {"fake": "full", "score": "sds"}, "generator", {"student"}),
    ("snoopi", {"fake": "full"}, "generator", {"student"}),
    ("snoopi", {"fake": "full"}, "critic", {"fake"}),
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


PARTED = [
    ("dmd2", {"gan_weight": 0.5, "critic_gan_weight": 0.5}),
    ("dmd2", {"gan_weight": 0.5, "critic_gan_weight": 0.5, "gan_pass": "shared"}),
    ("dmd2", {"gan_weight": 0.5, "critic_gan_weight": 0.5, "gan_network": "teacher"}),
    ("decoupled-dmd", {"gan_weight": 0.5, "critic_gan_weight": 0.5}),
    ("uni-instruct", {"gan_head": "mlp"}),
    ("uni-instruct", {"gan_head": "mlp", "gan_time_weight": "edm", "critic_gan_weight": 1e-3}),
    ("sid-lsg", {"gan_weight": 0.1, "gan_head": "mlp"}),
    ("sid-lsg", {"gan_weight": 0.1, "gan_head": "mlp", "guidance": "zero-cfg"}),
]


@pytest.mark.parametrize(("slug", "options"), PARTED)
def test_one_backward_pass_per_term_gives_the_gradients_of_one_for_all(slug: str, options: dict[str, Any]) -> None:
    def trained(apart: bool) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
        method = build(slug, **options)
        optim = {"all": {"name": "sgd", "lr": 0.05, "betas": (0.9, 0.0), "clip_norm": 0.0}}
        config = EngineConfig(steps=3, batch=4, device="cpu", optim=optim, log_every=1, backward_per_term=apart)
        run = Trainer(method, Rows(), config, show=False)
        run.fit()
        return dict(method.fake.named_parameters()) | dict(method.discriminator.named_parameters()), run.history

    (together, rows), (apart, others) = trained(False), trained(True)
    for name, value in apart.items():
        torch.testing.assert_close(value, together[name], msg=lambda m, name=name: f"{name}: {m}")
    for row, other in zip(rows, others, strict=True):
        for key in row.keys() - {"seconds", "stage"}:
            assert other[key] == pytest.approx(row[key], rel=1e-4, abs=1e-6), key


@pytest.mark.parametrize("slug", ["dmd2", "sid-lsg", "uni-instruct"])
def test_one_backward_pass_per_term_takes_less_memory(slug: str) -> None:
    """The real data's pass ends at the tapped block, the denoising's does not: of the two three fifths are left."""

    def activations(apart: bool) -> int:
        changes = ["options.gan_weight=0.1", "engine.batch=64", f"engine.backward_per_term={str(apart).lower()}"]
        found = plan(Recipe.load(slug, [*changes, "engine.device=cpu"]))
        return max(turn.activations for turn in found.turns if turn.turn == "critic")

    assert activations(True) < 0.65 * activations(False)


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

    def logits(self, fake: Any, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return self(fake, x_t, t, cond)[1]


ARMS: list[tuple[str, dict[str, Any]]] = [
    ("dmd2", {"gan_weight": 0.0}),
    ("dmd2", {"gan_weight": 1.0}),
    ("dmd2", {"gan_weight": 1.0, "distribution_matching": 0.0}),
    ("swiftbrush", {"fake": "full"}),
    ("swiftbrush", {"fake": "full", "score": "sds"}),
    ("swiftbrush", {"fake": "full", "reparametrise": False}),
    ("snoopi", {"fake": "full"}),
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
    play(method, "generator", {"x": torch.zeros(4096, 2), "cond": {}})
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
    "decoupled-dmd": {
        "student_steps": 2, "t_init": 0.5, "step_shift": 2.0, "guidance": 2.0, "augmentation": 0.0,
        "regulariser_weight": 0.0, "gan_weight": 0.0, "critic_gan_weight": 2.0, "gan_block": "blocks.0",
        "augmentation_times": TimeLaw("logit-normal"), "generator_times": TimeLaw("logit-normal"),
        "critic_times": TimeLaw("logit-normal"),
    },
    "swiftbrush": {
        "rank": 2, "lora_alpha": 4.0, "targets": ("to_v",), "guidance": 1.0, "fake_guidance": 1.0,
        "condition_drop": 1.0, "t_init": 0.7, "student_times": TimeLaw("logit-normal"),
        "fake_times": TimeLaw("logit-normal"),
    },
    "snoopi": {
        "k_low": 1.0, "k_high": 2.0, "rank": 2, "lora_alpha": 4.0, "targets": ("to_v",), "condition_drop": 1.0,
        "t_init": 0.7, "student_times": TimeLaw("logit-normal"), "fake_times": TimeLaw("logit-normal"),
    },
    "sim": {
        "c": 1.0, "fgm": 0.5, "guidance": 2.0, "t_init": 0.5, "generator_times": TimeLaw("logit-normal"),
        "critic_times": TimeLaw("logit-normal"),
    },
    "sid-lsg": {
        "student_steps": 2, "t_init": 0.5, "alpha": 0.5, "guidance_scale": 3.0, "kappa_3": 1.0, "condition_drop": 0.0,
        "gan_weight": 0.0, "critic_gan_weight": 2.0, "gan_block": "blocks.0",
        "generator_times": TimeLaw("logit-normal"), "critic_times": TimeLaw("logit-normal"),
    },
    "uni-instruct": {
        "gan_weight": 0.0, "critic_gan_weight": 2.0, "gan_block": "blocks.0", "guidance": 2.0, "t_init": 0.5,
        "generator_times": TimeLaw("logit-normal"), "critic_times": TimeLaw("logit-normal"),
    },
}  # fmt: skip
ELSEWHERE = {
    "dmd2": {"critic_turns"}, "decoupled-dmd": {"critic_turns", "mean", "variance"}, "sim": {"beta"},
    "uni-instruct": {"critic_share", "warmup_share"},
    "snoopi": {
        "k_fixed", "negatives", "heeded_by", "away_low", "away_high", "negative_scale", "reward", "reward_weight",
        "reward_margin", "measured", "measure_every",
    },
}  # fmt: skip
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


@pytest.mark.parametrize(
    ("slug", "options"),
    [
        ("dmd2", {"student_steps": 2}),
        ("decoupled-dmd", {"student_steps": 2, "step_shift": 3.0}),
        ("sid-lsg", {"student_steps": 2}),
        ("swiftbrush", {}),
        ("snoopi", {}),
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
        part = {"x": batch()["x"][rows], "cond": {"label": batch()["cond"]["label"][rows]}}
        for name in names(method):
            method.draw = Draws(torch.Generator().manual_seed(4), rows, B)
            found |= {f"{name}/{term}": value.detach() for term, value in finished(getattr(method, name)(part)).items()}
        halves.append(found)
    for term in halves[0]:
        torch.testing.assert_close((halves[0][term] + halves[1][term]) / 2, whole[term], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in shipped() if Recipe.load(name).method in FULL])
def test_shipped_recipes_train_the_fake_score_wherever_the_student_asks_it(name: str) -> None:
    options: Any = Recipe.load(name).method_options()
    asked, trained = (
        (options.student_times, options.fake_times)
        if hasattr(options, "fake_times")
        else (options.generator_times, options.critic_times)
    )
    ends = torch.tensor([0.0, 1.0])
    (first, last), (low, high) = (law.quantile(ends, FLOW).tolist() for law in (asked, trained))
    assert low <= first
    assert high >= last
