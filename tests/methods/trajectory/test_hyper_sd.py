"""Hyper-SD: segments, the jump between two times, targets, feedback that can be taken off again, one-step scores."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gaussians import central, draws, exact, play
from small_methods import check_that_it_also_draws_in
from stillroom.data.source import ArrayData
from stillroom.diffusion.denoiser import Denoiser, Prediction
from stillroom.diffusion.process import VP, Process, RectifiedFlow
from stillroom.diffusion.sampling import FewStepSampler, TCDSampler, jump
from stillroom.draws import Draws
from stillroom.engine.config import EngineConfig
from stillroom.engine.trainer import Trainer
from stillroom.errors import UserError
from stillroom.methods.trajectory.hyper_sd import HyperSD, even_grid
from stillroom.surgery.lora import LoraDenoiser
from tiny_denoisers import ask, dit_teacher, point_teacher
from workers.toy import Stop, stop_after

SMALL: dict[str, Any] = {"grids": (16, 16, 16, 16), "offset_noise": 0.0, "reward_steps": 5, "feedback_rank": 2}
LABELS = torch.tensor([0, 1, 2, 3])


def built(teacher: Denoiser | None = None, lora: dict[str, Any] | None = None, **options: Any) -> HyperSD:
    torch.manual_seed(0)
    method = HyperSD(HyperSD.Options(**{**SMALL, **options}), lora)
    method.build(point_teacher().eval() if teacher is None else teacher)
    method.stage = method.stages()[0]
    return method


def points(n: int = 64) -> ArrayData:
    generator = torch.Generator().manual_seed(0)
    return ArrayData(torch.randn(n, 2, generator=generator), {"label": torch.arange(n) % 4})


def trained(folder: Path, lora: dict[str, Any] | None = None, steps: int = 8, **options: Any) -> HyperSD:
    method = built(lora=lora, **options)
    Trainer(method, points(), engine(steps), folder).fit()
    return method


def engine(steps: int) -> EngineConfig:
    return EngineConfig(
        steps=steps, batch=8, checkpoint_every=2, check_freezing=True, optim={"all": {"lr": 0.01, "name": "adam"}}
    )


# --- the formulas -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("process", [RectifiedFlow(), VP()])
def test_a_jump_is_the_ode_s_solution_where_x0_is_known(process: Process) -> None:
    """Data that are one point m: x_s = alpha_s m + sigma_s eps exactly, whatever t and s, and nothing where s = t."""
    m = torch.tensor([[0.7, -1.2]]).double()
    eps = torch.randn(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([1.0, 0.8, 0.5, 0.2, 0.0], dtype=torch.float64) * process.t_max
    s = torch.tensor([0.0, 0.8, 0.1, 0.1, 0.0], dtype=torch.float64) * process.t_max
    x_t = process.add_noise(m, eps, t)
    found = jump(Prediction(process, "x0", m.expand(5, 2), x_t, t), s)
    torch.testing.assert_close(found, process.add_noise(m, eps, s), rtol=1e-9, atol=1e-9)


def test_many_jumps_are_the_gaussian_s_own_path() -> None:
    """Data N(0, c^2): x_t / sqrt(alpha^2 c^2 + sigma^2) stays what it is along the path."""
    process, c = RectifiedFlow(), 0.6
    teacher = exact(process, "v", ((0.0, 0.0),), (c,))
    x = x_1 = torch.randn(6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    times = torch.linspace(1, 0, 201, dtype=torch.float64)
    for t, s in zip(times, times[1:], strict=False):
        x = jump(teacher(x, t.expand(6), {}), s.expand(6))
    torch.testing.assert_close(x, c * x_1, rtol=2e-2, atol=2e-3)


class Known(Draws):
    """Uniform numbers that the test chooses."""

    def __init__(self, *rows: list[float]) -> None:
        super().__init__(torch.Generator().manual_seed(0), slice(0, len(rows[0])), len(rows[0]))
        self.rows_ = list(rows)

    def uniform(self, *shape: int) -> Tensor:
        return torch.tensor(self.rows_.pop(0))


class Asked(nn.Module):
    """Notes the times at which it is asked, and says that the data are at the origin."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.times = nn.Parameter(torch.zeros(1)), []

    def forward(self, x: Tensor, time: Tensor, cond: Any) -> Tensor:
        self.times.append((time / 1000).tolist())
        return 0 * x + self.weight


def test_times_are_those_of_a_hand_worked_grid() -> None:
    """16 steps in 4 segments of 4: n = 1, 4, 5, 16 belong to segments that begin at 0, 0, 4, 12."""
    teacher = Denoiser(Asked(), RectifiedFlow(), "x0", shape=(2,))
    method = built(teacher, segments=(4,), mse=(1.0,), adversarial=(0.0,), grids=(16,))
    u = [(n - 0.5) / 16 for n in (1, 4, 5, 16)]
    seen: dict[str, Any] = {}
    real = method.student.forward
    method.student.forward = lambda x, t, *rest: (seen.update(x=x, t=t), real(x, t, *rest))[1]  # type: ignore[assignment]
    method.draw = Known(u, [0.0, 0.3, 0.99, 0.99])
    batch = {"x": torch.zeros(4, 2), "cond": {}}
    loss = method.consistency(batch)["mse"]
    assert [16 * t for t in method.teacher.network.times[0]] == [1, 4, 5, 16]  # type: ignore[union-attr,index]
    assert [16 * t for t in method.target.network.times[0]] == [0, 3, 4, 15]  # type: ignore[union-attr,index]
    assert [16 * t for t in seen["t"].tolist()] == [1, 4, 5, 16]
    assert loss.item() == pytest.approx(0)  # both answers are the same point's, so both ends are
    # ends 0 of 0..0, 0 + int(.3 * 4) = 1 of 0..3, 4 of 4..4, 12 + int(.99 * 4) = 15 of 12..15
    nn.init.ones_(method.student.network.weight)  # type: ignore[union-attr,arg-type]
    method.draw = Known(u, [0.0, 0.3, 0.99, 0.99])
    t, s = torch.tensor([1.0, 4, 5, 16]) / 16, torch.tensor([0.0, 1, 4, 15]) / 16
    expected = ((1 - s) - s / t * (1 - t)).square().mean().item()
    assert method.consistency(batch)["mse"].item() == pytest.approx(expected, rel=1e-5)


def test_a_gaussian_s_perfect_student_is_left_alone_by_a_fine_grid() -> None:
    """f(x, t) with Psi(x, f, s) on the Gaussian's own path for every s: then student and target agree to O(1/N^2)."""
    process, c = RectifiedFlow(), 0.6

    class Perfect(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))

        def forward(self, x: Tensor, time: Tensor, cond: Any) -> Tensor:
            t = (time / 1000).double()[:, None]
            v = ((1 - t) ** 2 * c**2 + t**2).sqrt()
            return c * x / v + self.weight  # the end of the path, exactly

    teacher = exact(process, "v", ((0.0, 0.0),), (c,))
    losses = []
    for steps in (32, 256):
        method = built(teacher, segments=(1,), mse=(1.0,), adversarial=(0.0,), grids=(steps,))
        method.student = Denoiser(Perfect(), process, "x0", shape=(2,))
        method.target = copy.deepcopy(method.student)
        x = 0.6 * torch.randn(512, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        u = torch.linspace(0.3, 0.95, 512).tolist()
        method.draw = Known(u, [0.0] * 512)  # ends at 0, the only s that one x0 answers for all of a path
        losses.append(method.consistency({"x": x, "cond": {}})["mse"].item())
    assert losses[0] < 1e-3
    assert losses[1] < losses[0] / 16


def test_the_gradient_is_that_of_finite_differences() -> None:
    teacher = exact(RectifiedFlow(), "v", ((0.3, -0.4),), (0.5,))
    method = built(teacher, segments=(2,), mse=(0.5,), adversarial=(0.0,), grids=(16,))
    nn.init.constant_(method.student.network.log_stds, -0.2)  # type: ignore[union-attr,arg-type]
    batch = {"x": torch.randn(8, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2)), "cond": {}}
    batch["cond"] = {"n": torch.zeros(8)}

    def loss(a: float, b: float) -> Tensor:
        with torch.no_grad():
            method.student.network.means.copy_(torch.tensor([[a, b]]))  # type: ignore[union-attr]
        method.draw = draws(8)
        return method.consistency(batch)["mse"].detach()

    expected = central(loss, (0.1, 0.2))
    loss(0.1, 0.2)
    play(method, "consistency", batch)
    torch.testing.assert_close(method.student.network.means.grad[0], expected, rtol=1e-3, atol=1e-6)  # type: ignore[union-attr,index]


def test_one_step_s_gradient_is_fake_minus_real() -> None:
    """Teacher N(0, c^2) and fake score N(1, c^2): D_f - D_r = sigma^2 / (alpha^2 c^2 + sigma^2), and dL/dx is that over
    mean |x - D_r|, elements and rows."""
    c, a = 0.5, 0.4
    teacher = exact(RectifiedFlow(), "v", ((0.0, 0.0),), (c,))
    method = built(
        teacher, segments=(1,), mse=(1.0,), adversarial=(0.0,), grids=(8,), consistency_share=0.0, one_step_share=1.0,
        one_step_mse=0.0, real="teacher",
    )  # fmt: skip
    nn.init.constant_(method.fake.network.means, 1.0)
    x = torch.randn(16, 2, generator=torch.Generator().manual_seed(0)).requires_grad_()
    eps, t = torch.randn(16, 2, generator=torch.Generator().manual_seed(1)), torch.full((16,), 1 - a)
    method.draw = draws(16)
    method.sample_student = lambda cond: (x, eps)  # type: ignore[method-assign]
    method.noised = lambda x, law: (a * x + (1 - a) * eps, t, eps)  # type: ignore[method-assign]
    method.generate({"x": torch.zeros(16, 2), "cond": {"n": torch.zeros(16)}})["dm"].backward()
    v = a**2 * c**2 + (1 - a) ** 2
    real = a * c**2 / v * (a * x + (1 - a) * eps).detach()
    expected = (1 - a) ** 2 / v / (x.detach() - real).abs().mean(1, keepdim=True) / 2 / 16
    torch.testing.assert_close(x.grad, expected.expand(16, 2), rtol=1e-4, atol=1e-6)


# --- the parts --------------------------------------------------------------------------------------------------------
def test_stages_and_turns_follow_the_options() -> None:
    method = built(feedback_share=0.5, one_step_share=0.25)
    told = [(s.name, s.turns, s.share) for s in method.stages()]
    assert told == [
        ("8 segments", ("consistency",), 0.25),
        ("4 segments", ("consistency", "judge"), 0.25),
        ("2 segments", ("consistency", "judge"), 0.25),
        ("1 segment", ("consistency", "judge"), 0.25),
        ("feedback", ("refl",), 0.5),
        ("one step", ("generate", "follow"), 0.25),
    ]
    assert [t.name for t in built(adversarial=(0.0,) * 4).turns()] == ["consistency"]


def test_turns_move_what_they_train_alone() -> None:
    method = built(dit_teacher().eval(), feedback_share=1.0, one_step_share=1.0)
    batch = {"x": torch.randn(4, 1, 8, 8), "cond": {"label": LABELS}}
    method.prepare(ArrayData(torch.randn(16, 1, 8, 8), {"label": torch.arange(16) % 4}))
    trains = {"consistency": (1, "student"), "refl": (4, "feedback"), "generate": (5, "student"), "follow": (5, "fake")}
    for name, (index, expected) in trains.items():
        method.stage = method.stages()[index]
        method.shared = {}
        play(method, name, batch, seed=index)
        own = {n for role in ("student", "feedback", "fake") for n in ([role] if _has_gradient(method, role) else [])}
        assert own == {expected}, name


def _has_gradient(method: HyperSD, role: str) -> bool:
    return any(p.grad is not None and bool(p.grad.abs().max() > 0) for p in method.trained_parameters(role).values())


@pytest.mark.parametrize("lora", [None, {"student": {"rank": 2}}])
def test_without_the_feedback_s_adapter_the_student_is_as_before(lora: Any, tmp_path: Path) -> None:
    plain = trained(tmp_path / "a", lora, steps=8)
    fed = trained(tmp_path / "b", lora, steps=12, feedback_share=0.5, feedback_steps=2)
    other = ask(fed.student)
    assert not torch.allclose(other, ask(plain.student), atol=1e-4)
    assert isinstance(fed.student, LoraDenoiser)
    fed.student.adapter = "student" if lora else None
    assert torch.equal(ask(fed.student), ask(plain.student))
    fed.student.adapter = "student+feedback" if lora else "feedback"
    torch.testing.assert_close(ask(fed.student.merged()), other, rtol=1e-4, atol=1e-5)


def test_an_adapter_for_each_number_of_segments_is_kept(tmp_path: Path) -> None:
    options = {"segments": (2, 1), "grids": (8, 4), "mse": (1, 1), "adversarial": (0, 0), "one_step_share": 1.0}
    method = trained(tmp_path, {"student": {"rank": 2}}, 8, **options)
    assert set(method.kept) == {"steps2", "steps1"}
    answers = [ask(view) for view in (method.teacher, method.kept["steps2"], method.kept["steps1"], method.student)]  # type: ignore[arg-type]
    for i, one in enumerate(answers):
        assert not any(torch.allclose(one, other, atol=1e-5) for other in answers[:i])


def test_later_stages_learn_from_the_student_before(tmp_path: Path) -> None:
    found = {}
    for whom in ("previous", "original"):
        method = built(stage_teacher=whom, segments=(2, 1), mse=(1, 1), adversarial=(0, 0), grids=(8, 4))
        method.enter(method.stages()[0], None, False)
        with torch.no_grad():
            next(method.student.parameters()).add_(0.1)
        method.enter(method.stages()[1], None, False)
        method.stage = method.stages()[1]
        x, t = torch.randn(4, 2, generator=torch.Generator().manual_seed(0)), torch.full((4,), 0.5)
        found[whom] = method.nearer(x, t, t - 0.1, {"label": LABELS})
        asked = method.student if whom == "previous" else method.teacher
        torch.testing.assert_close(found[whom], jump(asked(x, t, {"label": LABELS}), t - 0.1))
    assert not torch.allclose(found["previous"], found["original"])


@pytest.mark.parametrize("lora", [None, {"student": {"rank": 2}}])
def test_an_interrupted_run_ends_in_the_same_weights(lora: Any, tmp_path: Path) -> None:
    options = {
        "segments": (2, 1),
        "mse": (1, 1),
        "adversarial": (0, 1),
        "grids": (8, 4),
        "feedback_share": 0.5,
        "one_step_share": 0.5,
    }
    straight = trained(tmp_path / "a", lora, 12, **options)
    for at in (5, 8, 11):  # within the second stage, the feedback, the one step
        folder = tmp_path / f"b{at}"
        for resume in (False, True):
            method = built(lora=lora, **options)
            trainer = Trainer(method, points(), engine(12), folder, resume)
            if resume:
                trainer.fit()
            else:
                trainer.callbacks.append(stop_after(at))
                with pytest.raises(Stop):
                    trainer.fit()
        for (name, p), q in zip(straight.named_parameters(), method.parameters(), strict=True):
            assert torch.equal(p, q), (at, name)


def test_micro_batches_change_nothing_but_rounding() -> None:
    options = {"segments": (2, 1), "mse": (1, 1), "adversarial": (0, 1), "grids": (8, 4), "feedback_share": 0.5}
    found = []
    for accumulate in (1, 2):
        method = built(**options, one_step_share=0.5)
        config = EngineConfig(steps=8, batch=8, accumulate=accumulate, optim={"all": {"lr": 0.01, "name": "sgd"}})
        Trainer(method, points(), config).fit()
        found.append(dict(method.named_parameters()))
    for name, p in found[0].items():
        torch.testing.assert_close(p, found[1][name], rtol=1e-5, atol=1e-6)


def test_a_reward_of_the_user_s_own_moves_samples_towards_it(tmp_path: Path) -> None:
    method = built(
        reward=f"{__name__}:to_the_right", consistency_share=0.0,
        feedback_share=1.0, reward_margin=5.0, feedback_steps=1,
    )  # fmt: skip
    before = FewStepSampler((1.0,)).sample(method.student, torch.ones(4, 2), {"label": LABELS})
    Trainer(method, points(), engine(30), tmp_path).fit()
    after = FewStepSampler((1.0,)).sample(method.student, torch.ones(4, 2), {"label": LABELS})
    assert bool((after[:, 0] > before[:, 0] + 0.05).all())


def to_the_right(images: Tensor, cond: Any) -> Tensor:
    return images[:, 0]


def test_what_is_drawn_for_the_report_is_the_sampler_s(tmp_path: Path) -> None:
    assert built(student_steps=2, eta=0.5).sampler() == TCDSampler((1.0, 0.5), eta=0.5)
    assert built(student_steps=4, scheduler="ddim").sampler() == FewStepSampler((1.0, 0.75, 0.5, 0.25), "ddim")
    check_that_it_also_draws_in(built(), 2, 4, 8)
    assert HyperSD.also(HyperSD.Options(scheduler="ddim"), VP()) == {}
    assert even_grid(VP(), 4).tolist() == [0, 249.75, 499.5, 749.25, 999]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"segments": (8, 1)}, "options.grids 4"),
        ({"segments": (1, 2, 4, 8)}, r"fewer at each stage, not \[1, 2, 4, 8\]"),
        ({"grids": (12, 8, 8, 8)}, r"options\.grids: 12 steps cannot be cut into 8"),
        ({"guidance_low": 3.0}, r"is above options\.guidance_high"),
        ({"consistency_share": 0.0}, "every part"),
        ({"reward": "nowhere:nothing"}, "is not there"),
        ({"reward": "math"}, "names no function"),
    ],
)
def test_what_cannot_be_is_refused_with_a_cure(change: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        built(**change)


def test_data_without_pictures_have_no_agreement() -> None:
    from stillroom.data.conditions import NoPictures

    class Prompts:
        def batch(self, *where: Any) -> Any:
            batch = NoPictures()
            batch["cond"] = {"label": LABELS}
            return batch

    with pytest.raises(UserError, match="prompts alone"):
        built(feedback_share=1.0).prepare(Prompts())
