"""TwinFlow on Gaussians: both kinds of velocity, the jumps between them, and what is read."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gaussian_flow import mean_velocity, velocity
from only_conditions import OnlyConditions
from small_methods import check_that_it_also_draws_in
from stillroom.data.source import ArrayData
from stillroom.diffusion.denoiser import Denoiser, Prediction
from stillroom.diffusion.process import VP, RectifiedFlow
from stillroom.diffusion.sampling import FewStepSampler, FlowMapSampler
from stillroom.draws import Draws
from stillroom.engine.config import EngineConfig
from stillroom.engine.trainer import Trainer
from stillroom.errors import UserError
from stillroom.methods.trajectory.twinflow import TwinFlow
from stillroom.surgery.attached import AttachedDenoiser
from stillroom.tasks.class_images.model import ImageGenerator
from tiny_denoisers import dit_teacher, point_teacher

FAKE = 1.5  # mean of what the network draws, where the data have 0.7


class Known(Denoiser):
    """Exact at all times: mean velocities of N(0.7, 0.4^2) at positive ones, velocities of N(1.5, 0.4^2) at negative
    ones; and jumps that end at the latter."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(1, 1), RectifiedFlow(), "v", shape=(2,))

    def forward(self, x_t: Tensor, t: Any, cond: Any = None, guidance: Any = 1.0) -> Prediction:
        real, fake = mean_velocity(x_t, t, cond["r"].abs()), velocity(x_t, t, FAKE)
        value = torch.where(cond["sign"][:, None] > 0, real, fake)
        return Prediction(self.process, "v", value, x_t, t)


def built(teacher: Denoiser | None = None, rows: int = 64, **options: Any) -> TwinFlow:
    method = TwinFlow(TwinFlow.Options(**options))
    method.build(teacher or point_teacher().eval())
    again(method, rows)
    return method


def again(method: TwinFlow, rows: int = 64) -> None:
    method.draw = Draws(torch.Generator().manual_seed(0), slice(0, rows), rows)


def labels(count: int) -> dict[str, Tensor]:
    return {"label": torch.arange(count) % 4}


@pytest.mark.parametrize("make", [point_teacher, dit_teacher])
def test_it_begins_as_its_teacher_at_every_time_that_it_is_told(make: Any) -> None:
    teacher = make().eval()
    method = built(teacher)
    x, t, cond = torch.randn(4, *teacher.shape), torch.tensor([0.2, 0.5, 0.8, 1.0]), labels(4)
    with torch.no_grad():
        for r in (t, t / 2, 0 * t):
            said = method.ask(method.student, x, t, r, cond).value
            torch.testing.assert_close(said, teacher(x, t, cond).value, rtol=0, atol=1e-6)
        below = method.ask(method.student, x, -t, -t, cond).value
        torch.testing.assert_close(below, teacher.native(x, -t, cond), rtol=0, atol=1e-6)
    assert not torch.allclose(below, said, atol=1e-3)


def test_the_rectification_is_the_difference_of_the_two_gaussians_velocities() -> None:
    """Closed form; its sign takes samples, too far up, down to the data."""
    method = built()
    method.student = Known()  # type: ignore[assignment]
    x, rows = FAKE + 0.4 * torch.randn(64, 2), list(range(64))
    gap = method.gap(x, rows, {})
    again(method)
    t = 0.02 + 0.98 * method.draw.uniform(64)
    z = method.draw.normal(64, 2)
    x_t = (1 - t)[:, None] * x + t[:, None] * z
    torch.testing.assert_close(gap, velocity(x_t, t, FAKE) - velocity(x_t, t), rtol=1e-4, atol=1e-5)
    assert float(gap.mean()) < -0.3  # x = z - F: F - G lets x fall
    assert float(method.notes["twin_gap"]) == pytest.approx(float(gap.square().mean()))


def test_its_gradient_reaches_the_jump_alone_and_is_the_gap() -> None:
    """With squared errors ``dL_rect / dF = 2 G / numel``."""
    method = built(loss="l2", near_parts=0, any_parts=0, fake_parts=0, guidance=1.0, average=0.0)
    jumped = torch.zeros(64, 2, requires_grad=True)
    asked: list[bool] = []

    class Free(Known):
        def forward(self, x_t: Tensor, t: Any, cond: Any = None, guidance: Any = 1.0) -> Prediction:
            asked.append(torch.is_grad_enabled())
            exact = super().forward(x_t, t, cond, guidance)
            return Prediction(self.process, "v", exact.value + jumped, x_t, t) if len(asked) == 1 else exact

    method.student = Free()  # type: ignore[assignment]
    terms = method.jump({"x": torch.randn(64, 2), "cond": {}})
    assert asked == [True] + [False] * (len(asked) - 1)
    terms["rectify"].backward()  # type: ignore[union-attr]
    again(method)
    z, _ = (method.draw.normal(64, 2) for _ in "ab")  # and the noise of own samples, then the times
    method.jumps(method.rows(), z)
    gap = method.gap(z - mean_velocity(z, torch.ones(64), torch.zeros(64)), list(range(64)), {})
    torch.testing.assert_close(jumped.grad, 0.5 * 2 * gap.clamp(-1, 1) / 128, rtol=1e-4, atol=1e-6)


def test_rows_have_the_times_of_their_parts_and_the_fake_branch_is_told_of_own_samples() -> None:
    """``fake`` rows are told the velocity of paths to samples of the network itself."""
    method = built(loss="l2", guidance=1.0, average=0.0, rectification=0.0)
    method.student = Known()  # type: ignore[assignment]
    x = 0.7 + 0.4 * torch.randn(64, 2)
    method.jump({"x": x, "cond": {}})
    again(method)
    rows = method.rows()
    z, fresh = (method.draw.normal(64, 2) for _ in "ab")
    t, r = method.jumps(rows, z)
    fakes = rows["fake"]
    assert fakes == list(range(3, 64, 4))
    assert bool((t[fakes] < 0).all())
    torch.testing.assert_close(t[fakes], r[fakes])
    assert torch.equal(t[rows["end"]], torch.ones(16))
    assert torch.equal(r[rows["end"]], torch.zeros(16))
    assert bool((r[rows["near"]] >= 0.95 * t[rows["near"]] - 1e-6).all())
    own = fresh[fakes] - mean_velocity(fresh[fakes], torch.ones(16), torch.zeros(16))
    share = t[fakes].abs()[:, None]
    x_t = (1 - share) * own + share * z[fakes]
    error = (velocity(x_t, share[:, 0], FAKE) - (z[fakes] - own)).square().mean()
    assert float(method.notes["fake_error"]) == pytest.approx(float(error), rel=1e-4)


class Linear(Denoiser):
    """``F = a x + b t + c r + d``, d at negative times alone."""

    def __init__(self, a: float, b: float, c: float, d: float) -> None:
        super().__init__(nn.Linear(1, 1), RectifiedFlow(), "v", shape=(2,))
        self.factors = (a, b, c, d)

    def of(self, x: float, t: float, r: float) -> float:
        a, b, c, d = self.factors
        return a * x + b * abs(t) + c * r + (d if t < 0 else 0.0)

    def forward(self, x_t: Tensor, t: Any, cond: Any = None, guidance: Any = 1.0) -> Prediction:
        a, b, c, d = self.factors
        below = (cond["sign"] < 0).float()
        value = a * x_t + (b * t + c * cond["r"] + d * below)[:, None].expand_as(x_t)
        return Prediction(self.process, "v", value, x_t, t)


def test_the_loss_is_the_one_worked_by_hand() -> None:
    """Row by row in plain numbers: targets of the average, the clamp, the weight, and fake rows apart."""
    method = built(loss="l2", guidance=1.0, rectification=0.0)
    own, average = Linear(0.9, -0.3, 0.5, 0.7), Linear(0.95, -0.2, 0.45, 0.0)
    method.student, method.target = own, average  # type: ignore[assignment]
    x = 0.7 + 0.4 * torch.randn(64, 2, generator=torch.Generator().manual_seed(5))
    found = method.jump({"x": x, "cond": {}})
    again(method)
    z, fresh = (method.draw.normal(64, 2) for _ in "ab")
    times = method.jumps(method.rows(), z)
    whole, clamped, weights = 0.0, 0, []
    for row, (t, r) in enumerate(zip(*(one.tolist() for one in times), strict=True)):
        fake = row % 4 == 3
        weight = 1.0 if fake else 1 + math.tan((1 - (t - r)) * math.pi / 2.5)
        weights.append(weight)
        error = 0.0
        for i in range(2):
            noise = float(z[row, i])
            data = float(fresh[row, i]) - own.of(float(fresh[row, i]), 1.0, 0.0) if fake else float(x[row, i])
            share = abs(t)
            x_t, v = share * noise + (1 - share) * data, noise - data
            said = own.of(x_t, t, r)
            if fake:
                error += (said - v) ** 2 / 2
                continue
            if t - r < 0.01:
                d = said - v
            else:
                at, place, integral = t - 0.01, x_t - 0.01 * v, 0.0
                for _ in range(2):
                    step = (t - 0.01 - r) / 2
                    moved = step * average.of(place, at, at - step)
                    at, place, integral = at - step, place - moved, integral + moved
                d = ((t - r) * said - integral - 0.01 * v) / 0.01
            clamped += abs(d) > 1
            error += min(abs(d), 1.0) ** 2 / 2
        whole += weight * error / 64
    assert float(found["jump"]) == pytest.approx(whole, rel=1e-3)  # type: ignore[arg-type]
    assert 0 < clamped < 96
    assert min(weights) == 1.0
    assert 3.5 < max(weights) < 1 + math.tan(math.pi / 2.5) + 1e-6


def test_guidance_goes_into_the_target_as_w_less_one_of_the_difference() -> None:
    """Of the average, as it answers at t for jumps of no length."""
    teacher = point_teacher().eval()
    method = built(teacher, guidance=1.8, guided_to=0.5)
    assert isinstance(method.target, AttachedDenoiser)
    for network in (method.target, method.student):  # which part, and from the teacher, only when they have learnt
        for out in network.attachment.out:  # type: ignore[union-attr]
            nn.init.normal_(out.weight)
    x, t, cond = torch.randn(4, 2), torch.tensor([0.2, 0.4, 0.6, 0.8]), labels(4)
    v, none = torch.randn(4, 2), {"label": torch.full((4,), 4)}
    with torch.no_grad():
        k, u = (method.target(x, t, {**one, "r": t, "sign": torch.ones(4)}).v for one in (cond, none))
        found = method.velocity(x, t, v, cond)
        torch.testing.assert_close(found, torch.where((t <= 0.5)[:, None], v + 0.8 * (k - u), v))
        free = built(teacher, guidance=4.0, image_free=True)
        torch.testing.assert_close(free.velocity(x, t, v, cond), teacher(x, t, cond, 4.0).v)
        partly = built(teacher, guidance=4.0, image_free=True, guided_to=0.5).velocity(x, t, v, cond)
    torch.testing.assert_close(partly[:2], teacher(x, t, cond, 4.0).v[:2])
    torch.testing.assert_close(partly[2:], teacher(x, t, cond).v[2:])


@pytest.mark.parametrize("rows", [slice(0, 2), slice(2, 4), slice(0, 1)])
def test_micro_batches_without_all_parts_are_refused_on_every_process(rows: slice) -> None:
    """Two processes of two rows each, and draws of one row alone: the same word, before anything is asked."""
    method = built()
    method.draw = Draws(torch.Generator().manual_seed(0), rows, 4 if rows.stop > 1 else 1)
    with pytest.raises(UserError, match="does not hold the 4 parts of a batch"):
        method.jump({"x": torch.randn(rows.stop - rows.start, 2), "cond": {}})


@pytest.mark.parametrize("rows", [64, 6])
def test_the_rectification_is_a_mean_over_its_rows(rows: int) -> None:
    method = built(rows=rows, loss="l2", guidance=1.0)
    method.student = Known()  # type: ignore[assignment]
    ends = method.rows()["end"]
    ones = torch.ones(len(ends), 2)
    method.gap = lambda *_: ones  # type: ignore[method-assign]
    found = method.jump({"x": torch.randn(rows, 2), "cond": {}})["rectify"]
    assert float(found) == pytest.approx(0.5)  # type: ignore[arg-type]


def trained(method: TwinFlow, data: Any, folder: Path, **engine: Any) -> dict[str, Tensor]:
    config = EngineConfig(**{"steps": 3, "batch": 8, "check_freezing": True, "optim": {"all": {"lr": 1e-2}}, **engine})
    Trainer(method, data, config, folder).fit()
    return {name: p.detach().clone() for name, p in method.named_parameters()}


def data_of(teacher: Denoiser) -> ArrayData:
    x = torch.randn(32, *teacher.shape, generator=torch.Generator().manual_seed(0))
    return ArrayData(x, {"label": torch.arange(32) % 4})


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"fake_parts": 0, "rectification": 0.0},
        {"fake_parts": 0},
        {"rectification": 0.0},
        {"average": 0.0},
        {"loss": "l2", "order": 1, "any_parts": 0, "guidance": 1.0},
        {"image_free": True},
    ],
)
def test_every_arm_trains_and_is_kept(change: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    method = TwinFlow(TwinFlow.Options(**change))
    method.build(dit_teacher().eval())
    before = {name: p.detach().clone() for name, p in method.named_parameters()}
    data = OnlyConditions() if change.get("image_free") else data_of(method.student)
    after = trained(method, data, tmp_path)
    moved = {name.split(".")[0] for name in after if not torch.equal(after[name], before[name])}
    follows = change.get("average", 0.99) and not change.get("image_free")
    assert moved == ({"student", "target"} if follows else {"student"})
    model = ImageGenerator(method.student, method.sampler())
    model.save(tmp_path / "student")
    loaded = ImageGenerator.load(tmp_path / "student")
    assert torch.equal(loaded.sample([0, 1], seed=1), model.sample([0, 1], seed=1))
    assert loaded.sampler.nfe == 1


def test_micro_batches_learn_what_the_whole_batch_does(tmp_path: Path) -> None:
    found = []
    for accumulate in (1, 2):
        torch.manual_seed(0)
        method = TwinFlow(TwinFlow.Options())
        method.build(point_teacher().eval())
        how = {"accumulate": accumulate, "optim": {"all": {"name": "sgd", "lr": 1e-2}}}
        found.append(trained(method, data_of(method.student), tmp_path / str(accumulate), **how))
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-4, atol=1e-5)


def test_a_trained_student_goes_on_with_the_inputs_that_it_has() -> None:
    first = built(dit_teacher().eval())
    nn.init.normal_(first.student.attachment.out[0].weight)  # type: ignore[union-attr]
    second = TwinFlow(TwinFlow.Options(sample_times=(0.999, 0.6)))
    second.build(dit_teacher().eval(), student=copy.deepcopy(first.student))
    x, t, cond = torch.randn(4, 1, 8, 8), torch.full((4,), 0.7), labels(4)
    assert isinstance(second.student, AttachedDenoiser)
    with torch.no_grad():
        asked = [m.ask(m.student, x, t, 0 * t, cond).value for m in (first, second)]
    assert torch.equal(*asked)


def test_the_sampler_s_jumps_are_exact_where_the_network_is() -> None:
    """To the end in one, to the next time in any number: the same path. Told nothing of a jump it is Euler's."""
    network, noise = Known(), torch.randn(50, 2)
    sign = {"sign": torch.ones(50)}
    one = noise - mean_velocity(noise, torch.ones(50), torch.zeros(50))
    torch.testing.assert_close(FlowMapSampler((1.0,)).sample(network, noise, sign), one)
    for times in ((1.0,), (1.0, 0.7, 0.2)):
        torch.testing.assert_close(FlowMapSampler(times, to="next").sample(network, noise, sign), one)
    x = noise
    for t, s in ((1.0, 0.5), (0.5, 0.0)):
        x = x - (t - s) * velocity(x, torch.full((50,), t))
    torch.testing.assert_close(FlowMapSampler((1.0, 0.5), to="here").sample(network, noise, sign), x)
    generator = [torch.Generator().manual_seed(3) for _ in range(2)]
    again = FlowMapSampler((0.999, 0.6)).sample(network, noise, sign, generator[0])
    plain = FewStepSampler((0.999, 0.6)).sample(network, noise, {**sign, "r": torch.zeros(50)}, generator[1])
    assert torch.equal(again, plain)
    with pytest.raises(UserError, match="one second time for all steps"):
        FlowMapSampler((1.0,), to="next").conditions(2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"end_parts": 0, "near_parts": 0, "any_parts": 0, "rectification": 0.0}, "no part of a batch learns to jump"),
        ({"end_parts": 0}, "the part that jumps to the end"),
        ({"sample_times": ()}, "from 1 down, not \\[\\]"),
        ({"sample_times": (0.2, 0.9)}, "from 1 down"),
        ({"sample_times": (1.5, 0.9)}, "from 1 down"),
        ({"sample_times": (1.0, 0.0)}, "from 1 down"),
    ],
)
def test_what_cannot_be_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        TwinFlow(TwinFlow.Options(**change)).build(point_teacher())


def test_other_processes_and_adapters_are_refused() -> None:
    plain = point_teacher()
    with pytest.raises(UserError, match="is of flows"):
        TwinFlow(TwinFlow.Options()).build(Denoiser(plain.network, VP(), "v", null=plain.null, shape=(2,)))
    with pytest.raises(UserError, match="trains all weights"):
        TwinFlow(TwinFlow.Options(), lora={"student": {"rank": 2}}).build(plain)


def test_a_report_shows_its_other_numbers_of_steps_too() -> None:
    check_that_it_also_draws_in(built(), 2)
    check_that_it_also_draws_in(built(sample_times=(0.999, 0.6)), 1)
