"""The five score methods as classes: hand-worked gradients, who learns from what, which way a step goes, every option."""

from __future__ import annotations

import dataclasses
import math
import sys
import typing
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from gaussians import KINDS, PROCESSES, exact, moved, play
from torch import Tensor, nn

from stillroom.diffusion.denoiser import Cond, Denoiser, Prediction
from stillroom.diffusion.process import Process, RectifiedFlow, expand
from stillroom.diffusion.sampling import FewStepSampler
from stillroom.diffusion.times import TimeLaw
from stillroom.method import Method, Stage, frozen, get_method
from stillroom.models.lora import LoraDenoiser
from stillroom.models.mlp import PointMLP

SLUGS = ["dmd2", "sid-lsg", "sim", "swiftbrush", "uni-instruct"]
FLOW = RectifiedFlow()
FULL = Stage("divergence")


def make(slug: str, teacher: Denoiser | None = None, lora: Any = None, **options: Any) -> Method:
    cls = get_method(slug)
    method = cls(cls.Options(**options), lora=lora)
    method.build(teacher or points())
    method.stage = FULL
    return method


def points(process: str = "flow", classes: int = 4) -> Denoiser:
    torch.manual_seed(0)
    network = PointMLP(2, 24, 3, classes, time_scale=1e-3 if process in ("flow", "vp") else 0.5)
    denoiser = Denoiser(network, PROCESSES[process], KINDS[process], null={"label": classes}, shape=(2,))  # type: ignore[arg-type]
    return denoiser


def data(n: int = 16, classes: int = 4) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(7)
    label = torch.arange(n) % classes
    return {"image": torch.randn(n, 2, generator=generator) * 0.3 + 0.5, "cond": {"label": label}}


def step(method: Method, seed: int = 0) -> dict[str, Tensor]:
    """All turns of a step, in order, on one batch, as the engine plays them."""
    method.shared = {}
    out = {}
    for turn in method.turns():
        out |= {f"{turn.name}/{k}": v for k, v in play(method, turn.name, data(), seed + 17).items()}
    return out


def roles(method: Method) -> set[str]:
    return {turn.name for turn in method.turns()}


# --- which networks learn -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("slug", SLUGS)
@pytest.mark.parametrize("gan", [False, True])
def test_each_turn_sends_gradient_to_its_own_networks_alone(slug: str, gan: bool) -> None:
    options: dict[str, Any] = {"gan_weight": 0.01 if gan else 0.0} if hasattr(get_method(slug).Options(), "gan_weight") else {}
    if gan and not options:
        pytest.skip("this method has no discriminator")
    method = make(slug, gan_head="mlp", **options) if hasattr(get_method(slug).Options(), "gan_head") else make(slug, **options)
    play(method, "generator", data())
    assert moved(method) == {"student"}
    play(method, "critic", data())
    needs = gan or slug == "uni-instruct"  # whose default divergence needs a ratio, GAN or not
    assert moved(method) == ({"fake", "discriminator"} if needs else {"fake"})


@pytest.mark.parametrize("slug", SLUGS)
def test_the_critic_s_samples_are_cut_from_the_student(slug: str) -> None:
    """Even if every network asked for gradients, the critic's turn would leave student and teacher alone."""
    options = {"fake": "full"} if slug == "swiftbrush" else {}
    method = make(slug, **options)
    play(method, "generator", data())
    play(method, "critic", data(), train_all=True)
    assert moved(method) <= {"fake", "discriminator"}


@pytest.mark.parametrize("slug", ["dmd2", "swiftbrush"])
def test_diffuse_instruct_directions_need_no_graph_through_the_scores(slug: str) -> None:
    options = {"gan_weight": 0.0} if slug == "dmd2" else {"fake": "full"}
    method = make(slug, **options)
    play(method, "generator", data(), train_all=True)
    assert moved(method) == {"student"}


@pytest.mark.parametrize("slug", ["sim", "sid-lsg", "uni-instruct"])
def test_score_identities_keep_the_graph_through_both_scores(slug: str) -> None:
    """The gradient by x_t passes through teacher and fake; freezing with no_grad would cut it."""
    method = make(slug)
    play(method, "generator", data(), train_all=True)
    assert {"student", "fake", "teacher"} <= moved(method)


@pytest.mark.parametrize("slug", ["dmd2", "sid-lsg", "uni-instruct"])
def test_the_gan_term_alone_teaches_the_student_through_the_fake_score_s_features(slug: str) -> None:
    method = make(slug, gan_weight=0.01)

    def only_gan(batch: Any) -> dict[str, Tensor]:
        return {"gan": type(method).generator(method, batch)["gan"]}  # type: ignore[attr-defined]

    method.generator = only_gan  # type: ignore[method-assign,assignment]
    play(method, "generator", data())
    assert moved(method) == {"student"}


@pytest.mark.parametrize("slug", SLUGS)
def test_the_teacher_never_moves_and_stays_in_eval_mode(slug: str) -> None:
    method = make(slug)
    before = {k: v.clone() for k, v in method.teacher.state_dict().items()}
    for seed in range(2):
        step(method, seed)
        for turn in method.turns():
            for role in turn.trains:
                with torch.no_grad():
                    for p in method.trained_parameters(role).values():
                        p.add_(0.01)
    method.train()
    after = method.teacher.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items())
    assert not any(m.training for m in method.teacher.modules())


@pytest.mark.parametrize("slug", SLUGS)
def test_student_and_fake_start_as_the_teacher(slug: str) -> None:
    method = make(slug)
    x, t = torch.randn(4, 2), torch.full((4,), 0.5)
    expected = method.teacher(x, t, data(4)["cond"]).value
    assert torch.equal(method.student(x, t, data(4)["cond"]).value, expected)
    assert torch.equal(method.fake(x, t, data(4)["cond"]).value, expected)


def test_swiftbrush_s_fake_is_an_adapter_on_the_teacher_and_trains_nothing_else() -> None:
    method = make("swiftbrush", rank=4)
    assert isinstance(method.fake, LoraDenoiser)
    assert method.fake.network is method.teacher.network
    assert method.student.network is not method.teacher.network
    step(method)
    named = dict(method.fake.network.named_parameters())
    assert {n for n, p in named.items() if p.grad is not None} == set(method.trained_parameters("fake"))
    assert all("lora_" in n for n in method.trained_parameters("fake"))


@pytest.mark.parametrize("slug", SLUGS)
def test_student_and_fake_may_be_adapters_on_the_teacher(slug: str) -> None:
    lora = {role: {"rank": 2} for role in ("student", "fake")}
    method = make(slug, lora=lora)
    play(method, "generator", data())
    assert moved(method) == {"student"}
    play(method, "critic", data())
    assert "fake" in moved(method)
    assert "student" not in moved(method)


# --- gradients worked by hand -------------------------------------------------------------------------------------


class Table(nn.Module):
    """Says a fixed x0 for each row, plus ``gain`` times its input; the rows are its only weights."""

    def __init__(self, rows: Any) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.tensor(rows))
        self.blocks = nn.ModuleList(nn.Identity() for _ in range(3))
        self.times: list[Tensor] = []

    def forward(self, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        self.times.append(time)
        for block in self.blocks:
            x = block(x)
        return self.rows.expand(len(x), -1) if self.rows.ndim == 1 else self.rows[: len(x)]


def table(rows: Any, process: Process = FLOW) -> Denoiser:
    return Denoiser(Table(rows), process, "x0", null={"label": 4}, shape=(4,))


def fixed(slug: str, student: Any, fake: Any, real: Any, **options: Any) -> Method:
    method = make(slug, table(real), **options)
    method.student, method.fake = table(student), table(fake)
    return method


STUDENT = [[1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 1.0, 1.0]]
REAL = [[0.0, 0.0, 1.0, 3.0], [0.5, 0.5, 0.5, 0.5]]  # mean |x0 - D_r|: 1.5 and 0.5
FAKE = [[3.0, 0.0, 1.0, 0.0], [0.5, 1.5, 0.5, 0.5]]
TWO = {"cond": {"label": torch.zeros(2, dtype=torch.long)}, "image": torch.zeros(2, 4)}


def test_dmd2_moves_x0_by_the_normalised_difference_over_numel() -> None:
    method = fixed("dmd2", STUDENT, FAKE, REAL, gan_weight=0.0)
    play(method, "generator", TWO)
    g = torch.tensor([[2.0, 0.0, 0.0, -2.0], [0.0, 2.0, 0.0, 0.0]])  # (D_f - D_r) / mean |x0 - D_r|
    torch.testing.assert_close(method.student.network.rows.grad, g / 8)  # two samples of four numbers


def test_dmd2_s_generator_and_critic_time_ranges() -> None:
    method = fixed("dmd2", STUDENT[0], FAKE[0], REAL[0], gan_weight=0.0)
    n = 4000
    many = {"cond": {"label": torch.zeros(n, dtype=torch.long)}, "image": torch.zeros(n, 4)}
    play(method, "generator", many)
    t = method.teacher.network.times[-1] / 1000
    assert 0.02 <= float(t.min()) < 0.03
    assert 0.97 < float(t.max()) <= 0.98
    play(method, "critic", many)
    t = method.fake.network.times[-1] / 1000
    assert float(t.min()) < 0.01
    assert float(t.max()) > 0.99


def test_swiftbrush_weighs_the_difference_by_alpha_sigma() -> None:
    law = TimeLaw("uniform", 0.2999, 0.3001)
    method = fixed("swiftbrush", STUDENT, FAKE, REAL, fake="full", student_times=law, guidance=1.0, fake_guidance=1.0)
    play(method, "generator", TWO)
    d = torch.tensor(FAKE) - torch.tensor(REAL)
    torch.testing.assert_close(method.student.network.rows.grad, 0.7 * 0.3 * d / 8, rtol=1e-3, atol=1e-6)


def test_swiftbrush_s_direction_is_the_difference_of_noise_predictions_times_sigma_squared() -> None:
    """The paper's own form, on VP: sigma^2 (e_psi - e_phi)."""
    from stillroom.diffusion.process import VP

    law, process = TimeLaw("uniform", 0.4999, 0.5001), VP()
    method = make("swiftbrush", table(REAL, process), fake="full", student_times=law, guidance=1.0, fake_guidance=1.0)
    method.student, method.fake = table(STUDENT, process), table(FAKE, process)
    play(method, "generator", TWO)
    t = torch.full((2,), 0.5 * 999)
    x_t = torch.zeros(2, 4)  # the difference of two x0-predictions does not depend on it
    eps = [Prediction(process, "x0", torch.tensor(v), x_t, t).eps for v in (REAL, FAKE)]
    g = expand(process.sigma(t) ** 2, x_t) * (eps[0] - eps[1])
    torch.testing.assert_close(method.student.network.rows.grad, g / 8, rtol=2e-3, atol=1e-5)


def test_swiftbrush_as_sds_takes_the_added_noise_for_the_fake_score() -> None:
    law = TimeLaw("uniform", 0.2999, 0.3001)
    method = fixed("swiftbrush", STUDENT, FAKE, REAL, fake="full", score="sds", student_times=law, guidance=1.0)
    play(method, "generator", TWO)
    expected = 0.7 * 0.3 * (torch.tensor(STUDENT) - torch.tensor(REAL)) / 8
    torch.testing.assert_close(method.student.network.rows.grad, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.2])
def test_sid_s_loss_is_the_paper_s_product(alpha: float) -> None:
    method = fixed("sid-lsg", STUDENT, FAKE, REAL, alpha=alpha)
    terms = play(method, "generator", TWO)
    x0, fake, real = (torch.tensor(v) for v in (STUDENT, FAKE, REAL))
    product = ((real - fake) * ((real - x0) - alpha * (real - fake))).sum(1) / torch.tensor([1.5, 0.5])
    torch.testing.assert_close(terms["sid"].detach(), product.mean())


def test_sim_s_pseudo_huber_loss_in_numbers() -> None:
    method = fixed("sim", STUDENT, FAKE, REAL, c=0.5)
    terms = play(method, "generator", TWO)
    x0, fake, real = (torch.tensor(v) for v in (STUDENT, FAKE, REAL))
    d = fake - real
    expected = -((d * (fake - x0)).sum(1) / (d.square().sum(1) + 0.25).sqrt()).mean()
    torch.testing.assert_close(terms["sim"].detach(), expected)


def test_sim_s_default_constant_grows_with_the_root_of_the_dimension() -> None:
    psi = make("sim", table(REAL)).distance_grad()  # type: ignore[operator]
    d = torch.tensor([[0.03, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(psi(d), d / math.sqrt(0.03**2 + 4 * 1e-4))


def test_sim_in_score_space_weighs_by_the_square_of_alpha_over_sigma_squared() -> None:
    law = TimeLaw("uniform", 0.2999, 0.3001)
    losses = []
    for score_space in (False, True):
        method = fixed("sim", STUDENT, FAKE, REAL, distance="l2", score_space=score_space, generator_times=law)
        losses.append(play(method, "generator", TWO)["sim"].detach())
    torch.testing.assert_close(losses[1], losses[0] * (0.7 / 0.09) ** 2, rtol=5e-3, atol=0)


def test_uni_instruct_as_reverse_kl_is_sid() -> None:
    """RKL: C = 1, so the SIM part alone is SiD at alpha = 1 and with the Fisher part SiD at alpha = 1/2."""
    for fgm, alpha in ((False, 1.0), (True, 0.5)):
        uni = fixed("uni-instruct", STUDENT, FAKE, REAL, divergence="reverse_kl", gan_weight=0.0, fgm=fgm)
        sid = fixed("sid-lsg", STUDENT, FAKE, REAL, alpha=alpha)
        a, b = play(uni, "generator", TWO), play(sid, "generator", TWO)
        torch.testing.assert_close(a["score"].detach(), b["sid"].detach())


def test_uni_instruct_warms_up_with_reverse_kl_and_without_gan() -> None:
    stages = make("uni-instruct").stages()
    assert [s.name for s in stages] == ["critics", "warm-up", "divergence"]
    assert stages[0].turns == ("critic",)
    assert sum(s.share for s in stages) == pytest.approx(1.0)
    warm, full = make("uni-instruct", divergence="chi2"), make("uni-instruct", divergence="chi2")
    warm.stage = Stage("warm-up")
    plain = make("uni-instruct", divergence="reverse_kl", gan_weight=0.0)
    a, b, c = (play(m, "generator", data()) for m in (warm, full, plain))
    assert set(a) == {"score"}
    assert set(b) == {"score", "gan"}
    torch.testing.assert_close(a["score"], c["score"])
    assert not torch.allclose(a["score"], b["score"])


def test_the_critic_learns_from_the_very_sample_that_the_generator_made() -> None:
    for slug in ("dmd2", "swiftbrush"):
        method = make(slug, **({"fake": "full"} if slug == "swiftbrush" else {"gan_weight": 0.0}))
        method.shared = {}
        play(method, "generator", data())
        x0 = method.shared["x0"]
        assert not x0.requires_grad
        wanted = method.shared["x0"] = torch.full_like(x0, 3.0)  # if the critic looks here, its targets move with it
        far = sum(play(method, "critic", data()).values())
        method.shared["x0"] = wanted * 10
        assert float(sum(play(method, "critic", data()).values()).detach()) > float(far.detach())  # type: ignore[union-attr]


def test_dmd2_s_critic_makes_its_own_samples_on_steps_without_a_generator_turn() -> None:
    method = make("dmd2", critic_turns=5)
    turns = {t.name: t.period(method) for t in method.turns()}
    assert turns == {"generator": 5, "critic": 1}
    assert list(turns) == ["generator", "critic"]  # the generator first, so that the critic can reuse its sample
    method.shared = {}
    assert all(torch.isfinite(v) for v in play(method, "critic", data()).values())


def test_dmd2_without_backward_simulation_starts_from_noised_real_data() -> None:
    """Real data far away: simulated inputs cannot know it."""
    far = data() | {"image": torch.full((16, 2), 1000.0)}
    for simulated in (True, False):
        method = make("dmd2", student_steps=4, backward_simulation=simulated, gan_weight=0.0)
        largest = 0.0
        for seed in range(8):
            method.shared = {}
            seen: list[float] = []
            hook = method.student.network.register_forward_pre_hook(lambda _m, a, seen=seen: seen.append(float(a[0].abs().max())))
            play(method, "generator", far, seed)
            hook.remove()
            largest = max(largest, seen[-1])
        assert (largest > 100) == (not simulated)


def test_the_sampler_is_the_rollout_that_was_trained() -> None:
    assert make("dmd2", student_steps=4).sampler() == FewStepSampler((1.0, 0.75, 0.5, 0.25))
    assert make("sid-lsg", student_steps=2, renoise="fixed").sampler() == FewStepSampler((0.625, 0.3125), "fixed")
    for slug in ("sim", "uni-instruct"):
        assert make(slug).sampler() == FewStepSampler((0.714,))
    method = make("swiftbrush")
    noise, cond = torch.randn(16, 2), data()["cond"]
    method.draw = type("Given", (), {"local": 16, "normal": lambda _s, *_shape: noise})()  # type: ignore[assignment]
    torch.testing.assert_close(method.sampler().sample(method.student, noise, cond), method.one_step(data()).detach())  # type: ignore[operator]


# --- guidance -----------------------------------------------------------------------------------------------------


class Labelled(nn.Module):
    """Says the label as x0 in all coordinates; notes the labels it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(()))
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        self.seen.append(cond["label"])
        return cond["label"][:, None].to(x) + self.bias + 0 * x


def labelled() -> Denoiser:
    return Denoiser(Labelled(), FLOW, "x0", null={"label": 10}, shape=(2,))


GUIDANCE = {  # kappa of the fake score while it trains, in the generator's loss, and of the teacher there
    "none": (1, 1, 1), "zero-cfg": (0, 0, 1), "anti-cfg": (-1, -1, 1), "lsg": (2, 2, 2), "long": (1, 1, 2),
    "short": (2, 1, 1),
}  # fmt: skip


@pytest.mark.parametrize("preset", GUIDANCE)
def test_sid_guidance_presets_set_the_scale_of_each_network(preset: str) -> None:
    method = make("sid-lsg", labelled(), guidance=preset, guidance_scale=2.0, condition_drop=0.0, fake_loss="x0")
    batch = {"cond": {"label": torch.full((6,), 1)}}
    train, fake, real = (10 + k * (1 - 10) for k in GUIDANCE[preset])  # uncond + k (cond - uncond)
    terms = play(method, "critic", batch)
    torch.testing.assert_close(terms["denoise"].detach(), torch.tensor((train - 1.0) ** 2))
    terms = play(method, "generator", batch)
    d, e, x0 = fake - real, fake - 1.0, 1.0
    expected = -2 * d * e / max(abs(x0 - real), 1e-5)
    torch.testing.assert_close(terms["sid"].detach(), torch.tensor(expected, dtype=torch.float32), rtol=1e-4, atol=1e-3)


def test_sid_drops_conditions_only_while_a_guided_fake_score_trains() -> None:
    n = 2000
    batch = {"cond": {"label": torch.full((n,), 1)}}
    for preset, share in (("none", 0.0), ("lsg", 0.1)):
        method = make("sid-lsg", labelled(), guidance=preset, condition_drop=0.1)
        play(method, "critic", batch)
        first = method.fake.network.seen[-1][:n]
        assert float((first == 10).float().mean()) == pytest.approx(share, abs=0.02)


def test_sid_gan_under_zero_cfg_keeps_the_condition() -> None:
    network = points()
    method = make("sid-lsg", network, guidance="zero-cfg", gan_weight=0.001)
    seen: list[Tensor] = []
    method.fake.network.register_forward_pre_hook(lambda _m, a: seen.append(a[2]["label"]))
    play(method, "critic", data())
    assert [bool((s == 4).all()) for s in seen] == [True, False, False]  # score without text, logits with it


def test_swiftbrush_drops_the_prompt_of_a_whole_batch_one_time_in_ten() -> None:
    method = make("swiftbrush", labelled(), fake="full")
    batch, dropped = {"cond": {"label": torch.full((2,), 1)}}, []
    for seed in range(300):
        method.shared = {"x0": torch.zeros(2, 2)}
        play(method, "critic", batch, seed)
        seen = method.fake.network.seen[-1]
        assert len(set(seen.tolist())) == 1
        dropped.append(bool((seen == 10).all()))
    assert sum(dropped) / 300 == pytest.approx(0.1, abs=0.05)


def test_guidance_is_on_the_teacher_alone_where_the_paper_says_so() -> None:
    for slug, options in (("dmd2", {"gan_weight": 0.0}), ("sim", {}), ("uni-instruct", {"gan_weight": 0.0, "divergence": "reverse_kl"})):
        method = make(slug, labelled(), guidance=3.0, **options)
        batch = {"cond": {"label": torch.full((6,), 1)}}
        play(method, "generator", batch)
        assert len(method.teacher.network.seen[-1]) == 12
        assert len(method.fake.network.seen[-1]) == 6
        play(method, "critic", batch)
        assert len(method.fake.network.seen[-1]) == 6


# --- which way a step goes ----------------------------------------------------------------------------------------


class ExactLogits(nn.Module):
    """The optimal discriminator: ``log q_t - log p_t`` of teacher and fake, both exact."""

    def __init__(self, teacher: Denoiser) -> None:
        super().__init__()
        object.__setattr__(self, "teacher", teacher)

    def forward(self, denoiser: Denoiser, x_t: Tensor, t: Tensor, cond: Cond) -> tuple[Prediction, Tensor]:
        rates = denoiser.process.alpha(t).double(), denoiser.process.sigma(t).double()
        x = x_t.double()
        real = self.teacher.network.log_density(x, *rates)  # type: ignore[operator]
        return denoiser(x_t, t, cond), (real - denoiser.network.log_density(x, *rates)).float()[:, None]  # type: ignore[operator]


START = 0.7  # time of the one-step students below


def law(student: Denoiser, t: float = START) -> tuple[Tensor, Tensor]:
    """Mean and std of a one-step student made of one Gaussian: x0 = m + gain (sigma z - alpha m) is affine in z."""
    m, v, a, s = student.network.means[0], student.network.log_stds[0].exp() ** 2, 1 - t, t  # type: ignore[index,union-attr]
    gain = a * v / (a * a * v + s * s)
    return m - gain * a * m, gain * s * torch.ones_like(m)


def gaussians(slug: str, mean: float, std: float, **options: Any) -> Method:
    """Teacher N(0.8, 0.5^2) in 2-D, student N(mean, std^2), everything else exact."""
    options = {"t_init": START, **options}
    if slug == "swiftbrush":
        options |= {"fake": "full", "guidance": 1.0, "fake_guidance": 1.0}
    if slug in ("dmd2", "sid-lsg"):
        options.setdefault("gan_weight", 0.0)
    method = make(slug, exact(FLOW, "v", ((0.8, 0.8),), (0.5,)), **options)
    method.discriminator = ExactLogits(method.teacher)
    a, s = 1 - START, START
    # invert the law above: gain s = std gives a quadratic in the spread, its small root below the peak s / (2 a)
    gain = std / s
    variance = gain * s * s / (a - gain * a * a)
    with torch.no_grad():
        method.student.network.means.fill_(mean / (1 - gain * a))  # type: ignore[union-attr]
        method.student.network.log_stds.fill_(0.5 * math.log(variance))  # type: ignore[union-attr]
    measured = law(method.student)
    torch.testing.assert_close(measured[0].detach(), torch.full((2,), mean).double())
    torch.testing.assert_close(measured[1].detach(), torch.full((2,), std).double())
    follow(method)
    return method


def follow(method: Method) -> None:
    """The fake score as the limit of its training: exact for the student of this moment."""
    mean, std = law(method.student)
    with torch.no_grad():
        method.fake.network.means.copy_(mean[None])  # type: ignore[union-attr]
        method.fake.network.log_stds.copy_(std[:1].log())  # type: ignore[union-attr]


def many(n: int) -> dict[str, Any]:
    return {"cond": {"none": torch.zeros(n)}, "image": torch.zeros(n, 2)}


VARIANTS = [
    ("dmd2", {}),
    ("swiftbrush", {}),
    ("sid-lsg", {"alpha": 1.0}),
    ("sid-lsg", {"alpha": 0.5}),
    ("sim", {"distance": "pseudo_huber"}),
    ("sim", {"distance": "l2"}),
    ("sim", {"distance": "sid"}),
    ("sim", {"distance": "power"}),
    *(("uni-instruct", {"divergence": d, "fgm": True}) for d in ("reverse_kl", "forward_kl", "jeffreys", "js", "hellinger")),
]


def name_of(value: Any) -> str:
    return value if isinstance(value, str) else "-".join(map(str, value.values()))


@pytest.mark.parametrize(("slug", "options"), VARIANTS, ids=name_of)
@pytest.mark.parametrize(("mean", "std"), [(0.2, 0.5), (1.4, 0.5), (0.8, 0.25), (0.8, 0.9)])
def test_one_step_moves_a_gaussian_student_towards_the_teacher(
    slug: str, options: dict[str, Any], mean: float, std: float
) -> None:
    method = gaussians(slug, mean, std, **options)
    play(method, "generator", many(4096))
    network = method.student.network
    before = [v.detach().clone() for v in law(method.student)]
    with torch.no_grad():
        scale = 0.02 / max(float(p.grad.abs().max()) for p in (network.means, network.log_stds))  # type: ignore[union-attr]
        for p in (network.means, network.log_stds):
            p -= scale * p.grad  # type: ignore[operator]
    after = law(method.student)
    gaps = [float((a.mean() - target).abs().detach()) for a, target in zip((*before, *after), (0.8, 0.5, 0.8, 0.5), strict=True)]
    axis = 0 if mean != 0.8 else 1  # the coordinate that is off
    assert gaps[2 + axis] < gaps[axis]


@pytest.mark.parametrize(("slug", "options"), VARIANTS, ids=name_of)
def test_with_an_exact_fake_score_the_student_arrives_at_the_teacher(slug: str, options: dict[str, Any]) -> None:
    method = gaussians(slug, 0.2, 0.3, **options)
    network = method.student.network
    optimizer = torch.optim.Adam([network.means, network.log_stds], lr=0.04, betas=(0.5, 0.9))  # type: ignore[list-item]
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, 200)
    for seed in range(200):
        method.shared = {}
        play(method, "generator", many(128), seed)
        optimizer.step()
        schedule.step()
        follow(method)
    mean, std = (v.detach() for v in law(method.student))
    assert mean.tolist() == pytest.approx([0.8, 0.8], abs=0.08)
    assert float(std[0]) == pytest.approx(0.5, abs=0.08)


@pytest.mark.parametrize("slug", ["dmd2", "sid-lsg", "uni-instruct"])
def test_the_gan_term_moves_the_student_towards_the_real_law(slug: str) -> None:
    options: dict[str, Any] = {"gan_weight": 1.0} | ({"distribution_matching": 0.0} if slug == "dmd2" else {})
    method = gaussians(slug, 0.2, 0.5, **options)
    terms = play(method, "generator", many(4096))
    if slug != "dmd2":  # its score part is tested above
        method.zero_grad(set_to_none=True)
        wanted = {"gan": 0.0}
        method.shared = {}

        def only(batch: Any) -> dict[str, Tensor]:
            return {"gan": type(method).generator(method, batch)["gan"]}  # type: ignore[attr-defined]

        method.generator = only  # type: ignore[method-assign,assignment]
        terms = play(method, "generator", many(4096))
        assert set(terms) == set(wanted)
    assert bool((method.student.network.means.grad < 0).all())  # type: ignore[union-attr,operator]


@pytest.mark.parametrize("slug", SLUGS)
def test_the_critic_s_turn_pulls_the_fake_score_to_the_student_s_law(slug: str) -> None:
    """At the student's own law the expected gradient of the denoising loss is zero; away from it, it points there."""
    options = {"gan_weight": 0.0} if slug in ("dmd2", "sid-lsg") else {}
    if slug == "uni-instruct":
        options = {"gan_weight": 0.0, "divergence": "reverse_kl"}
    if slug == "swiftbrush":
        options = {"condition_drop": 0.0}
    method = gaussians(slug, 0.2, 0.4, **options)
    n = 8192

    def gradient(shift: float) -> Tensor:
        follow(method)
        with torch.no_grad():
            method.fake.network.means.add_(shift)  # type: ignore[union-attr]
        method.shared = {}
        if slug == "swiftbrush":
            play(method, "generator", many(n))
        play(method, "critic", many(n))
        return method.fake.network.means.grad.clone()  # type: ignore[union-attr]

    at, above, below = gradient(0.0), gradient(0.3), gradient(-0.3)
    assert bool((above > 0).all())
    assert bool((below < 0).all())
    assert float(at.abs().max()) < 0.15 * float(above.abs().min())


# --- every option -------------------------------------------------------------------------------------------------


def variations() -> Iterator[tuple[str, dict[str, Any]]]:
    """Each value of each option with a closed set of values, each switch, each time law, and the off-switches by number."""
    numbers: dict[str, list[Any]] = {
        "student_steps": [1, 4], "guidance": [0.0, 3.0], "gan_weight": [0.0, 0.1], "distribution_matching": [0.0],
        "alpha": [0.5, 1.2], "condition_drop": [0.0, 1.0], "fgm": [0.5], "c": [0.3], "beta": [1.1, 3.0], "t_init": [0.3],
        "fake_guidance": [1.0], "rank": [1], "guidance_scale": [4.5], "critic_share": [0.0], "warmup_share": [0.0],
        "critic_turns": [1], "critic_gan_weight": [0.0], "gan_block": ["blocks.0"],
    }  # fmt: skip
    laws = [
        TimeLaw("logit-normal"), TimeLaw("log-normal"), TimeLaw("karras", 0, 0.8), TimeLaw("segments", 0.02),
        TimeLaw("uniform", 0.02, 0.98, stratified=True, at_max=0.2),
    ]  # fmt: skip
    for slug in SLUGS:
        cls = get_method(slug)
        hints = typing.get_type_hints(cls.Options, vars(sys.modules[cls.__module__]))
        yield slug, {}
        for field in dataclasses.fields(cls.Options):
            hint = hints[field.name]
            if typing.get_origin(hint) is typing.Literal:
                values: list[Any] = list(typing.get_args(hint))
            elif hint is bool:
                values = [False, True]
            elif hint is TimeLaw:
                values = laws
            else:
                values = numbers.get(field.name, [])
                assert hint in (int, float, str, tuple[str, ...]), f"{slug}.{field.name}: no test values for {hint}"
            default = field.default
            for value in values:
                if value != default:
                    yield slug, {field.name: value}
    for gan_head in ("mean", "mlp"):
        yield "sid-lsg", {"gan_weight": 0.01, "gan_head": gan_head, "guidance": "zero-cfg", "student_steps": 4}
    yield "dmd2", {"distribution_matching": 0.0, "gan_weight": 0.1}
    for renoise in ("fresh", "fixed", "ddim"):
        yield "dmd2", {"student_steps": 4, "renoise": renoise}
    yield "dmd2", {"student_steps": 4, "backward_simulation": False}
    for divergence in ("forward_kl", "chi2", "js", "hellinger"):
        yield "uni-instruct", {"divergence": divergence, "fgm": True, "normalise_ratio": True}


def label_of(value: Any) -> str:
    if isinstance(value, dict):
        return ",".join(f"{k}={v.law if isinstance(v, TimeLaw) else v}" for k, v in value.items()) or "default"
    return str(value)


@pytest.mark.parametrize(("slug", "options"), list(variations()), ids=label_of)
def test_every_option_gives_a_finite_step(slug: str, options: dict[str, Any]) -> None:
    method = make(slug, **options)
    losses = step(method)
    assert losses
    for name, loss in losses.items():
        assert loss.ndim == 0
        assert bool(torch.isfinite(loss)), f"{name} is {float(loss)}"
    for turn in method.turns():
        for role in turn.trains:
            for name, p in method.trained_parameters(role).items():
                assert p.grad is None or bool(torch.isfinite(p.grad).all()), f"gradient of {role}.{name}"
    assert all(bool(torch.isfinite(v)) for v in method.notes.values())
    samples = method.sampler().sample(method.student, torch.randn(4, 2), data(4)["cond"])
    assert bool(torch.isfinite(samples).all())


@pytest.mark.parametrize("slug", SLUGS)
@pytest.mark.parametrize("process", PROCESSES)
def test_every_method_works_on_every_process(slug: str, process: str) -> None:
    options = {"student_steps": 2} if slug in ("dmd2", "sid-lsg") else {}
    if process == "trig" and slug in ("dmd2", "swiftbrush"):
        options["t_init"] = 0.9
    method = make(slug, points(process), **options)
    for seed in range(3):
        for name, loss in step(method, seed).items():
            assert bool(torch.isfinite(loss)), f"{name} is {float(loss)}"
    samples = method.sampler().sample(method.student, torch.randn(4, 2), data(4)["cond"])
    assert bool(torch.isfinite(samples).all())


@pytest.mark.parametrize("slug", SLUGS)
def test_methods_work_without_any_condition(slug: str) -> None:
    teacher = points()
    method = make(slug, teacher)
    batch = {"image": data()["image"], "cond": {}}
    method.shared = {}
    for turn in method.turns():
        assert all(bool(torch.isfinite(v)) for v in play(method, turn.name, batch).values())


@pytest.mark.parametrize("slug", SLUGS)
def test_the_same_seed_gives_the_same_gradients(slug: str) -> None:
    first, second, other = make(slug), make(slug), make(slug)
    for method, seed in ((first, 3), (second, 3), (other, 4)):
        play(method, "generator", data(), seed)
    a, b, c = (torch.cat([p.grad.flatten() for p in m.student.parameters()]) for m in (first, second, other))  # type: ignore[union-attr]
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_image_free_methods_never_look_at_images() -> None:
    cases = [("sim", {}), ("swiftbrush", {}), ("sid-lsg", {}), ("dmd2", {"gan_weight": 0.0})]
    cases.append(("uni-instruct", {"gan_weight": 0.0, "divergence": "reverse_kl"}))
    for slug, options in cases:
        method = make(slug, **options)
        method.shared = {}
        for turn in method.turns():
            play(method, turn.name, {"cond": data()["cond"]})


def test_frozen_stays_frozen_in_copies_only_as_asked() -> None:
    teacher = frozen(points())
    student = make("sim", teacher).student
    assert all(p.requires_grad for p in student.parameters())
    assert not any(p.requires_grad for p in teacher.parameters())
