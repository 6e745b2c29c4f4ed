"""Phased DMD: where a phase ends, what the fake score learns from there, which expert moves, and what begins anew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from points import NULL, B, Rows, batch, says, teacher, two_points
from torch import Tensor

from gaussians import draws, exact, moved, play
from stillroom.bench import get_bench
from stillroom.diffusion.denoiser import Denoiser
from stillroom.diffusion.process import VP, RectifiedFlow
from stillroom.diffusion.routed import ByNoise, RoutedDenoiser
from stillroom.diffusion.sampling import ddim_step
from stillroom.diffusion.transitions import Transition
from stillroom.engine.config import EngineConfig
from stillroom.engine.interrupt import Interrupted
from stillroom.engine.trainer import Trainer
from stillroom.errors import UserError
from stillroom.evaluation.metrics import energy_distance
from stillroom.method import frozen, get_method
from stillroom.networks.point_mlp import PointMLP
from stillroom.tasks.class_images.model import ImageGenerator

FLOW = RectifiedFlow()


def build(phase: int = 0, given: Denoiser | None = None, lora: Any = None, **options: Any) -> Any:
    cls = get_method("phased-dmd")
    method = cls(cls.Options(**options), lora)
    torch.manual_seed(1)
    method.build(given or teacher())
    method.stage = method.stages()[phase]
    return method


def config(**more: Any) -> EngineConfig:
    optim = {"all": {"lr": 1e-3}}
    settings = {"steps": 8, "batch": 4, "device": "cpu", "check_freezing": True, "optim": optim, **more}
    return EngineConfig(**settings)


def test_the_gradient_in_numbers() -> None:
    """As DMD2's: D_r = 0, D_f = (1, -2), so dL/dx0 = (D_f - D_r) / mean|x0 - D_r| / 2, halved by the batch."""
    method = build(1)
    method.teacher, method.fake = frozen(says(0.0, 0.0)), frozen(says(1.0, -2.0))
    x0, data = two_points()
    method.reach = lambda cond, grad, whole=False: (x0, x0)
    method.draw = draws(2)
    method.generator(data)["dm"].backward()
    torch.testing.assert_close(x0.grad, torch.tensor([[1 / 8, -2 / 8], [1 / 4, -2 / 4]]))


def test_the_divergence_s_gradient_in_numbers() -> None:
    """a alpha_t / sigma_t^2 (D_f - D_r) on x_s, at the time that the law draws."""
    method = build(0, gradient="divergence")
    method.teacher, method.fake = frozen(says(0.0, 0.0)), frozen(says(1.0, -2.0))
    x_s, data = two_points()
    method.reach = lambda cond, grad, whole=False: (x_s, x_s * 3)
    method.draw = draws(2)
    method.generator(data)["dm"].backward()
    method.draw = draws(2)
    t = method.transition(x_s, method.options.generator_times).t
    a = (1 - t) / 0.5
    expected = (a * (1 - t) / t**2)[:, None] * torch.tensor([1.0, -2.0]) / 2 / 2
    torch.testing.assert_close(x_s.grad, expected)
    assert bool((t > 0.5).all())


def test_a_phase_ends_where_the_next_begins_and_stands_there_as_its_network_says() -> None:
    """With a student that says one point p, every jump is a straight line towards p: x_s = (1 - s) p + s eps."""
    for phase, end in ((0, 0.5), (1, 0.0)):
        method = build(phase)
        method.student = says(3.0, -1.0)
        method.draw = draws(B, 5)
        x_s, x0 = method.reach(batch()["cond"], grad=False)
        method.draw = draws(B, 5)
        method.draw.index(2)
        eps = method.draw.normal(B, 2)
        assert method.end == end
        torch.testing.assert_close(x_s, (1 - end) * x0 + end * eps)


def test_only_the_last_call_has_a_graph_and_earlier_experts_are_asked_for_earlier_phases() -> None:
    method, asked = build(1), list[tuple[str, float, bool]]()
    for name, expert in method.student.experts.items():
        expert.network.register_forward_hook(
            lambda _, given, out, name=name: asked.append((name, float(given[1][0]), out.requires_grad))
        )
    seen = set()
    for seed in range(8):
        asked.clear()
        method.requires_grad_(True)
        method.draw = draws(B, seed)
        method.reach(batch()["cond"], grad=True)
        assert asked[:2] == [("phase-1", 1000.0, False), ("phase-1", 750.0, False)]
        assert [name for name, *_ in asked[2:]] == ["phase-2"] * len(asked[2:])
        assert [graph for *_, graph in asked] == [False] * (len(asked) - 1) + [True]
        seen.add(len(asked))
    assert seen == {3, 4}


@pytest.mark.parametrize("phase", [0, 1])
def test_a_phase_moves_its_own_expert_alone(phase: int) -> None:
    method = build(phase)
    with torch.no_grad():
        for p in method.fake.parameters():
            p += 0.1 * torch.randn_like(p)
    play(method, "generator", batch())
    assert moved(method) == {"student"}
    names = {
        name
        for name, expert in method.student.experts.items()
        if any(p.grad is not None and bool(p.grad.abs().max() > 0) for p in expert.parameters())
    }
    assert names == {f"phase-{phase + 1}"}
    play(method, "critic", batch())
    assert moved(method) == {"fake"}


def test_the_exact_fake_score_of_a_gaussian_minimises_the_critic_s_loss_and_the_biased_one_does_not() -> None:
    """x_s ~ N((1 - s) m, ...) from x_0 ~ N(m, c^2): the exact flow's velocity has a zero mean gradient on the loss, by
    regression of the residual on what the network may use (x_t, at each time)."""
    residual = {}
    for target in ("unbiased", "biased"):
        method = build(0, given=exact(FLOW, means=((0.7, 0.7),), stds=(0.4,)), target=target)
        n = 40_000
        generator = torch.Generator().manual_seed(0)
        x_0 = 0.7 + 0.4 * torch.randn(n, 2, generator=generator)
        x_s = FLOW.add_noise(x_0, torch.randn(n, 2, generator=generator), torch.tensor(0.5))
        way = Transition(FLOW, torch.tensor(0.5), 0.6 + 0.4 * torch.rand(n, generator=generator))
        eps = torch.randn(n, 2, generator=generator)
        x_t = way.noised(x_s, eps)
        said = (way.velocity if target == "unbiased" else way.biased_velocity)(x_s, eps)
        error = said - method.teacher(x_t, way.t, {}).v
        residual[target] = max(float(error.mean().abs()), float((error * x_t).mean().abs()))
    assert residual["unbiased"] < 0.02
    assert residual["biased"] > 0.2


def test_the_fake_score_is_the_teacher_again_in_each_phase() -> None:
    for restart in (True, False):
        method = build(0, restart=restart)
        with torch.no_grad():
            for p in method.fake.parameters():
                p += 1
        method.enter(method.stages()[1], None, resumed=True)
        same = [torch.equal(p, q) for p, q in zip(method.fake.parameters(), method.teacher.parameters(), strict=True)]
        assert not any(same)
        method.enter(method.stages()[1], None, resumed=False)
        same = [torch.equal(p, q) for p, q in zip(method.fake.parameters(), method.teacher.parameters(), strict=True)]
        assert all(same) is restart


def test_in_a_run_the_first_expert_rests_while_the_second_learns(tmp_path: Path) -> None:
    method, seen = build(), dict[int, list[Tensor]]()

    def look(trainer: Trainer, done: int) -> None:
        experts = method.student.experts
        seen[done] = [next(experts[name].parameters()).detach().clone() for name in ("phase-1", "phase-2")]

    Trainer(method, Rows(), config(), tmp_path, callbacks=[look], show=False).fit()
    begun = next(teacher().parameters())
    assert not torch.equal(seen[4][0], begun)
    assert torch.equal(seen[4][1], begun)
    assert torch.equal(seen[8][0], seen[4][0])
    assert not torch.equal(seen[8][1], begun)


def test_a_run_that_is_stopped_inside_a_phase_ends_as_one_that_is_not(tmp_path: Path) -> None:
    def run(folder: str, stop: int = 0, resume: bool = False) -> dict[str, Tensor]:
        def halt(trainer: Trainer, done: int) -> None:
            if done == stop:
                raise Interrupted("here")

        method, settings = build(), config(checkpoint_every=1)
        trainer = Trainer(method, Rows(), settings, tmp_path / folder, resume, callbacks=[halt], show=False)
        trainer.fit()
        return method.state_dict()

    whole = run("whole")
    for stop in (4, 6):  # between the phases, and inside the second
        with pytest.raises(Interrupted):
            run(f"cut {stop}", stop)
        again = run(f"cut {stop}", resume=True)
        assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_the_finished_student_asks_its_experts_in_turn_and_comes_back_from_its_folder(tmp_path: Path) -> None:
    method = build()
    for k, expert in enumerate(method.student.experts.values()):
        with torch.no_grad():
            for p in expert.parameters():
                p += 0.05 * (k + 1)
    model = ImageGenerator(method.student, method.sampler(), [str(c) for c in range(NULL)])
    assert model.nfe == 4
    model.save(tmp_path)
    again = ImageGenerator.load(tmp_path)
    assert isinstance(again.denoiser, RoutedDenoiser)
    assert again.denoiser.route == ByNoise((0.625,))
    torch.testing.assert_close(again.sample([0, 3], seed=1), model.sample([0, 3], seed=1))


def test_training_ends_a_phase_as_the_sampler_passes_it() -> None:
    """The last step of a phase, run to its end, stands where the finished student's third call begins."""
    method = build(0)
    method.draw = draws(B, 0)
    while True:
        seed = method.draw.generator.initial_seed() + 1
        method.draw = draws(B, seed)
        if method.draw.index(2) == 1:
            break
    method.draw = draws(B, seed)
    x_s = method.reach(batch()["cond"], grad=False)[0]
    method.draw = draws(B, seed)
    method.draw.index(2)
    noise, seen = method.draw.normal(B, 2), []
    method.student.experts["phase-2"].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    method.sampler().sample(method.student, noise, batch()["cond"])
    torch.testing.assert_close(x_s, seen[0])


def test_each_phase_begins_as_the_teacher_s_expert_of_its_noise() -> None:
    low, high = teacher(), teacher()
    with torch.no_grad():
        high.network.out.bias += 1
    two = RoutedDenoiser({"low": low, "high": high}, ByNoise((0.6,)))
    method = build(given=two)
    mine = method.student.experts
    assert torch.equal(mine["phase-1"].network.out.bias, high.network.out.bias)
    assert torch.equal(mine["phase-2"].network.out.bias, low.network.out.bias)
    assert isinstance(method.fake, RoutedDenoiser)
    play(method, "generator", batch())
    play(method, "critic", batch())


def test_experts_may_be_adapters_on_one_teacher(tmp_path: Path) -> None:
    method = build(lora={"student": {"rank": 2, "targets": ["to_q", "to_v"]}})
    Trainer(method, Rows(), config(), tmp_path, show=False).fit()
    assert method.student.adapter == "student-2, student-1"
    assert all("lora" in name for name in method.trained_parameters("student"))
    base = teacher().network.state_dict()
    plain = {name.replace(".base_layer", ""): p for name, p in method.teacher.network.state_dict().items()}
    assert all(torch.equal(plain[name], value) for name, value in base.items())
    model = ImageGenerator(method.student, method.sampler())
    model.save(tmp_path / "student")
    again = ImageGenerator.load(tmp_path / "student")
    torch.testing.assert_close(again.sample([1, 2], seed=3), model.sample([1, 2], seed=3), atol=1e-5, rtol=1e-4)


def test_a_fake_score_that_is_an_adapter_begins_anew_by_adding_nothing() -> None:
    method = build(lora={"fake": {"rank": 2, "targets": ["to_q"]}})
    with torch.no_grad():
        for p in method.trained_parameters("fake").values():
            p += 1
    x, cond = batch()["x"], batch()["cond"]
    assert not torch.equal(method.fake(x, 0.5, cond).v, method.teacher(x, 0.5, cond).v)
    method.enter(method.stages()[1], None, resumed=False)
    torch.testing.assert_close(method.fake(x, 0.5, cond).v, method.teacher(x, 0.5, cond).v)


def test_so_do_the_adapters_of_a_teacher_of_two_experts() -> None:
    low, high = teacher(), teacher()
    with torch.no_grad():
        high.network.out.bias += 1
    two = RoutedDenoiser({"low": low, "high": high}, ByNoise((0.6,)))
    method = build(given=two, lora={"fake": {"rank": 2, "targets": ["to_q"]}})
    with torch.no_grad():
        for p in method.trained_parameters("fake").values():
            p += 1
    x, cond = batch()["x"], batch()["cond"]
    for t in (0.3, 0.8):
        assert not torch.equal(method.fake(x, t, cond).v, method.teacher(x, t, cond).v)
    method.enter(method.stages()[1], None, resumed=False)
    for t in (0.3, 0.8):
        torch.testing.assert_close(method.fake(x, t, cond).v, method.teacher(x, t, cond).v)


def test_times_are_shifted_towards_noise_and_the_border_lies_between_two_calls() -> None:
    method = build(shift=7.0)
    assert method.times == pytest.approx((1.0, 21 / 22, 7 / 8, 7 / 10))
    assert method.student.route.bounds == pytest.approx(((21 / 22 + 7 / 8) / 2,))
    assert method.end == pytest.approx(7 / 8)


def test_within_its_own_interval_nothing_is_noised_beyond_where_the_phase_begins() -> None:
    method = build(1, nested=False, student_steps=4)
    method.draw = draws(500)
    t = method.transition(torch.zeros(500, 2), method.options.critic_times).t
    assert float(t.max()) <= 0.5
    method = build(1)
    method.draw = draws(500)
    assert float(method.transition(torch.zeros(500, 2), method.options.critic_times).t.max()) > 0.9


def test_one_phase_has_one_network_and_more_experts_if_asked() -> None:
    assert not isinstance(build(phases=1).student, RoutedDenoiser)
    assert list(build(phases=1, experts=2).student.experts) == ["phase-2", "phase-1"]
    assert len(build(phases=2, experts=4).student.experts) == 4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"student_steps": 3}, r"options.student_steps=3 cannot be shared by options.phases=2"),
        ({"experts": 3}, r"options.experts=3 for 2 phases"),
        ({"experts": 1}, r"options.experts=1 for 2 phases"),
    ],
)
def test_steps_that_cannot_be_shared_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        build(**options)


def test_other_processes_are_trained_too() -> None:
    for phase in (0, 1):
        method = build(phase, given=exact(VP(), "eps", means=((0.0, 0.5),), stds=(0.5,)))
        method.double()
        data = {"x": torch.zeros(B, 2, dtype=torch.float64), "cond": {"label": torch.zeros(B, dtype=torch.long)}}
        for name in ("generator", "critic"):
            assert all(bool(torch.isfinite(value)) for value in play(method, name, data).values())


# --- three targets for a network that begins from nothing ------------------------------------------------------------
def learnt(target: str, steps: int, width: int) -> tuple[float, float]:
    """A new network shown what ``target`` says at t in (0.5, 1]: RMSE to the ring teacher's velocity, and the energy
    distance of its samples at 0.5 to data noised to 0.5."""
    bench, s = get_bench("ring"), torch.tensor(0.5)
    real, data = bench.network(), bench.points(20_000)
    torch.manual_seed(0)
    mine = Denoiser(PointMLP(2, width, 3, 8), FLOW, "v", null={"label": 8}, shape=(2,))
    optimizer = torch.optim.Adam(mine.parameters(), lr=2e-3)
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / steps)
        rows = torch.randint(data.n, (512,), generator=generator)
        x_0, cond = data.array[rows], {"label": data.labels[rows]}
        first, eps = torch.randn(512, 2, generator=generator), torch.randn(512, 2, generator=generator)
        way = Transition(FLOW, s, 0.5 + 0.5 * torch.rand(512, generator=generator))
        x_s = FLOW.add_noise(x_0, first, s)
        x_t, weight = way.noised(x_s, eps), way.weight(10.0)
        if target == "data":  # flow matching: noised at once, its own noise known
            x_t, wanted, weight = FLOW.add_noise(x_0, eps, way.t), eps - x_0, torch.ones(512)
        else:
            wanted = way.velocity(x_s, eps) if target == "unbiased" else way.biased_velocity(x_s, eps)
        loss = (weight[:, None] * (mine(x_t, way.t, cond).v - wanted).square()).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        cond = {"label": data.labels[:4000]}
        x_s = FLOW.add_noise(data.array[:4000], torch.randn(4000, 2, generator=generator), s)
        way = Transition(FLOW, s, 0.51 + 0.49 * torch.rand(4000, generator=generator))
        x_t = way.noised(x_s, torch.randn(4000, 2, generator=generator))
        rmse = float((mine(x_t, way.t, cond).v - real(x_t, way.t, cond).v).square().mean().sqrt())
        x = torch.randn(4000, 2, generator=generator)
        grid = torch.linspace(1, 0.5, 26)
        for t, following in zip(grid[:-1], grid[1:], strict=True):
            x = ddim_step(mine(x, t, cond), FLOW, following)
    return rmse, float(energy_distance(x, x_s))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_network_that_sees_noised_points_alone_learns_the_full_velocity_by_the_unbiased_target() -> None:
    """2,000 steps, 3 x 128. Measured: velocity .021, .048 and .554, samples .00025, .00019 and .0022. The unbiased
    target's samples are within 1.5 times those of the full data target; its velocity is not, since the target is
    noisier (at a constant rate of 1e-3 .041 and .116). The biased one is at least 5 times worse in both."""
    found = {target: learnt(target, 2000, 128) for target in ("data", "unbiased", "biased")}
    print(found)
    assert found["unbiased"][0] <= 3 * found["data"][0]
    assert found["unbiased"][1] <= 1.5 * found["data"][1]
    for k in (0, 1):
        assert found["biased"][k] >= 5 * max(found["data"][k], found["unbiased"][k])
