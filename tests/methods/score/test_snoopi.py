"""SNOOPI: the gradient in numbers, one scale for both networks, negative prompts, and what is measured."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from points import FLOW, FULL, NULL, X0, build, labels_seen, says, two_points
from torch import Tensor

from gaussians import draws, play
from stillroom.bench import get_bench
from stillroom.data.prompt_sources import Texts
from stillroom.data.source import ArrayData
from stillroom.diffusion.denoiser import Denoiser
from stillroom.engine.config import EngineConfig
from stillroom.engine.trainer import Trainer
from stillroom.errors import UserError
from stillroom.method import frozen, get_method
from stillroom.surgery.negatives import NEGATIVE, SCALE
from stillroom.tasks.pipelines.data import encode_prompts
from stillroom.tasks.pipelines.model import PipelineGenerator
from tiny_pipelines import SIDE, make_pipeline


def snoopi_at(x0: Tensor, **options: Any) -> tuple[Any, Tensor, Tensor]:
    """A SNOOPI whose student gives ``x0``, and the times and scales that its generator will draw. Its networks say the
    label times a slope, ``none`` being label 8."""
    method = build("snoopi", fake="full", **options)
    method.teacher, method.fake = frozen(says(0.0, 0.0, slope=1.0)), frozen(says(0.0, 0.0, slope=-1.0))
    method.sample_student = lambda cond, negatives: x0
    method.draw, twin = draws(2), draws(2)
    t = method.options.student_times.sample(twin, FLOW)[:, None]
    twin.normal(2, 2)
    return method, t, 0.5 + 3.5 * twin.uniform(2)[:, None]


@pytest.mark.parametrize("random", ["both", "teacher", "fake", "none"])
def test_each_sample_has_a_scale_of_its_own_and_both_networks_the_same(random: str) -> None:
    """Labels 7 and 6: a guided answer is 8 + k (label - 8) of the teacher, minus that of the other."""
    x0, data = two_points()
    method, t, k = snoopi_at(x0, random=random, k_fixed=3.0)
    method.generator(data)["vsd"].backward()
    away = torch.tensor([[-1.0], [-2.0]])
    of_teacher = 8 + (k if random in ("both", "teacher") else torch.full_like(k, 3.0)) * away
    of_fake = -(8 + (k if random in ("both", "fake") else torch.full_like(k, 3.0)) * away)
    expected = (1 - t) * t * (of_fake - of_teacher) / 2 / 2  # D_phi - D_psi, per element, then per sample
    torch.testing.assert_close(x0.grad, expected.expand(2, 2))
    assert float(k[0]) != float(k[1])


def test_a_scale_of_one_is_no_guidance() -> None:
    """The paper's convention: ``(1 - k) e(none) + k e(y)``."""
    x0, data = two_points()
    method, t, _ = snoopi_at(x0, k_low=1.0, k_high=1.0)
    method.generator(data)["vsd"].backward()
    expected = (1 - t) * t * torch.tensor([[-14.0], [-12.0]]) / 4
    torch.testing.assert_close(x0.grad, expected.expand(2, 2))


def test_the_scale_cancels_where_both_networks_say_the_same() -> None:
    x0, data = two_points()
    method, _, _ = snoopi_at(x0)
    method.fake = frozen(says(0.0, 0.0, slope=1.0))
    method.generator(data)["vsd"].backward()
    torch.testing.assert_close(x0.grad, torch.zeros(2, 2))


def test_the_lora_teacher_weighs_the_noise_error_by_alpha_squared_and_knows_no_scale() -> None:
    method = build("snoopi", fake="full", condition_drop=0.0)
    method.shared = {"x0": torch.tensor(X0)}
    method.draw, twin = draws(2), draws(2)
    t = method.options.fake_times.sample(twin, FLOW)[:, None]
    eps, data = twin.normal(2, 2), two_points()[1]
    answer = method.fake((1 - t) * torch.tensor(X0) + t * eps, t[:, 0], data["cond"])
    expected = ((1 - t) ** 2 * (answer.eps - eps) ** 2).mean()
    torch.testing.assert_close(method.critic(data)["denoise"], expected)


def test_the_condition_of_a_whole_batch_is_dropped_or_of_none() -> None:
    method = build("snoopi", condition_drop=0.5, **FULL["swiftbrush"])
    dropped = [bool((labels == NULL).all()) for labels in labels_seen(method, "critic", range(40))]
    assert 10 <= sum(dropped) <= 30


def test_a_reward_that_is_good_enough_is_left_alone() -> None:
    x0, data = two_points()
    method, _, _ = snoopi_at(x0, reward_weight=0.5, reward_margin=2.5)
    method.asks = lambda x, cond: x[:, 1]  # 3 and 1
    loss = method.generator(data)["reward"]
    torch.testing.assert_close(loss, torch.tensor(0.5 * (2.5 - 1.0) / 2))
    loss.backward()
    torch.testing.assert_close(x0.grad, torch.tensor([[0.0, 0.0], [0.0, -0.25]]))


def test_the_reward_s_weight_falls_evenly_to_nothing() -> None:
    """The paper's clamped loss begins at its weight and is "gradually" reduced to zero."""
    x0, data = two_points()
    found = []
    for done in (0.0, 0.25, 1.0):
        method, _, _ = snoopi_at(x0, reward_weight=0.5, reward_margin=2.5)
        method.asks, method.progress = (lambda x, cond: x[:, 1]), done
        found.append(float(method.generator(data)["reward"].detach()))
    assert found == pytest.approx([0.375, 0.75 * 0.375, 0.0])


def test_settings_that_cannot_be_are_refused() -> None:
    method = build("snoopi", fake="full", measured=2)
    with pytest.raises(UserError, match="compares rows of each class"):
        method.prepare(ArrayData(torch.zeros(4, 2), {}))
    with pytest.raises(UserError, match="k_low=5"):
        build("snoopi", k_low=5.0)
    with pytest.raises(UserError, match="this teacher reads none"):
        build("snoopi", negatives=("red",))


def test_the_student_is_measured_from_noises_that_stay_the_same() -> None:
    bench = get_bench("ring")
    cls = get_method("snoopi")
    method = cls(cls.Options(fake="full", measured=64, measure_every=2))
    method.build_from(bench.given())
    data = bench.data()
    method.prepare(data)
    seen = {}
    for step in range(6):
        method.step, method.notes = step, {}
        play(method, "generator", data.batch(0, step, 64), step)
        seen[step] = {name: float(value) for name, value in method.notes.items() if name in ("distance", "fluctuation")}
        if step == 3:  # it moves with the student alone
            with torch.no_grad():
                next(iter(method.student.parameters())).add_(0.1)
    assert [sorted(seen[step]) for step in range(6)] == [
        [], ["distance"], [], ["distance", "fluctuation"], [], ["distance", "fluctuation"],
    ]  # fmt: skip
    assert seen[3]["distance"] == seen[1]["distance"]
    assert seen[3]["fluctuation"] == 0
    assert seen[5]["fluctuation"] == pytest.approx(abs(seen[5]["distance"] - seen[3]["distance"])) != 0


# --- negative prompts -------------------------------------------------------------------------------------------------
def prompted(**options: Any) -> tuple[Any, dict[str, Any], PipelineGenerator]:
    torch.manual_seed(0)
    made = PipelineGenerator(make_pipeline("pixart"), size=(SIDE, SIDE))
    with torch.no_grad():
        for p in made.denoiser.network.parameters():
            p += 0.05 * torch.randn(p.shape)
    cond, null = made.conditions(["a red cat", "the boat"])
    made.denoiser.null = dict(null)
    cls = get_method("snoopi")
    method = cls(cls.Options(fake="full", negatives=("blue", "a dog", "red"), **options))

    def prompts(texts: Any) -> Any:
        return encode_prompts(Texts(texts), made, report=lambda _: None)

    method.build(made.denoiser, prompts=prompts, decode=None)
    method.draw = draws(2)
    return method, {"cond": cond}, made


def test_the_teacher_answers_from_the_negative_prompt_and_the_lora_teacher_from_none() -> None:
    method, batch, made = prompted()
    cond = batch["cond"]
    method.draw, twin = draws(2), draws(2)
    negatives = method.negatives(torch.zeros(2))
    rows = twin.integers(3)
    expected = made.conditions([["blue", "a dog", "red"][i] for i in rows.tolist()])[0]
    torch.testing.assert_close(
        negatives["encoder_hidden_states"], expected["encoder_hidden_states"], rtol=1e-2, atol=1e-2
    )
    x, t, k = torch.randn(2, *method.teacher.shape), torch.tensor([200.0, 700.0]), torch.tensor([0.5, 3.0])
    with torch.no_grad():
        plain, other = method.teacher(x, t, cond).value, method.teacher(x, t, negatives).value
        none = method.teacher(x, t, method.teacher.null_cond(cond)).value
        scale = k[:, None, None, None]
        taught = method.guided("teacher", x, t, cond, k, negatives).value
        torch.testing.assert_close(taught, (1 - scale) * other + scale * plain, rtol=1e-4, atol=1e-4)
        followed = method.guided("fake", x, t, cond, k, negatives).value
        torch.testing.assert_close(followed, (1 - scale) * none + scale * plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("heeds", [True, False])
def test_the_student_is_told_the_negative_prompt_with_a_scale_of_each_sample(heeds: bool) -> None:
    method, batch, _ = prompted(heeded_by=("student", "teacher") if heeds else ("teacher",))
    told: list[Any] = []
    method.student.register_forward_pre_hook(lambda _, args: told.append(args[2]))
    terms = play(method, "generator", batch, 1)
    assert torch.isfinite(terms["vsd"])
    assert all(p.grad is None for p in method.teacher.parameters())
    assert any(float(p.grad.abs().sum()) > 0 for p in method.student.parameters() if p.grad is not None)
    assert (NEGATIVE in told[0]) == heeds
    if heeds:
        scales = told[0][SCALE]
        assert scales.shape == (2,)
        assert 0 <= float(scales.min()) < float(scales.max()) <= 1
    play(method, "critic", batch, 1)


def test_a_student_that_heeds_is_saved_as_the_plain_pipeline_that_it_is(tmp_path: Any) -> None:
    method, batch, made = prompted()
    play(method, "generator", batch, 1)
    play(method, "critic", batch, 1)
    student = made.student(method.student, method.sampler())
    student.save(tmp_path)
    assert not (tmp_path / "attached").exists()
    again = PipelineGenerator.load(tmp_path)
    assert type(again.denoiser) is Denoiser
    assert again.sampler.negative_scale == 0.5  # type: ignore[attr-defined]
    asked = ["a red cat", "a dog"]
    torch.testing.assert_close(again.sample(asked), student.sample(asked))
    away = again.away("red").sample(asked)
    assert not torch.allclose(away, again.sample(asked), atol=1e-4)
    torch.testing.assert_close(away, again.away("red", 0.5).sample(asked))
    assert torch.equal(again.away("red", 0.0).sample(asked), again.sample(asked))


def test_a_training_that_heeds_negative_prompts_is_the_same_in_micro_batches(tmp_path: Any) -> None:
    found = []
    for parts in (1, 2):
        method, _, made = prompted()
        data = encode_prompts(Texts(["a red cat", "the boat", "a dog", "a house"]), made, report=lambda _: None)
        config = EngineConfig(steps=2, batch=4, accumulate=parts, warmup=0, device="cpu", optim={"all": {"lr": 1e-4}})
        trainer = Trainer(method, data, config, tmp_path / str(parts))
        trainer.fit()
        found.append([p.detach().clone() for p in method.student.network.parameters()])
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=2e-5)
