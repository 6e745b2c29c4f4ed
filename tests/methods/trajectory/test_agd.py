"""Adapters that guide: what they change, what they leave alone, what they learn from."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from only_conditions import OnlyConditions
from stillroom.bench import get_bench
from stillroom.bench.mixture import GaussianMixture, MixtureDenoiser
from stillroom.data.source import ArrayData
from stillroom.data.trajectories import Paths, trajectories
from stillroom.diffusion.denoiser import Denoiser
from stillroom.diffusion.process import RectifiedFlow
from stillroom.diffusion.sampling import ODESampler, ScaleSampler
from stillroom.engine.config import EngineConfig
from stillroom.engine.trainer import Trainer
from stillroom.errors import UserError
from stillroom.folders.attachments import ATTACHED, attach, save_attachment
from stillroom.folders.denoisers import load_denoiser
from stillroom.methods.trajectory.agd import AGD, SCALE
from stillroom.methods.trajectory.kd import KD
from stillroom.networks.guidance_adapters import CrossAttention, GuidanceAdapters, Offset, guidance_adapters
from stillroom.surgery.attached import AttachedDenoiser, Widths
from stillroom.tasks.class_images.model import ImageGenerator
from tiny_denoisers import dit_teacher, point_teacher

MADE = {"point": point_teacher, "dit": dit_teacher}
SMALL: dict[str, Any] = {
    "width": 8,
    "paths": 12,
    "path_steps": 6,
    "eta": 0.0,
    "steps": 6,
    "stored_precision": "float32",
}
LABELS = torch.tensor([0, 1, 2, 3])


def trained(folder: Path, name: str = "point", steps: int = 3, **options: Any) -> AGD:
    torch.manual_seed(0)
    method = AGD(AGD.Options(**{**SMALL, **options}))
    method.build(MADE[name]().eval())
    config = EngineConfig(
        steps=steps, batch=8, checkpoint_every=2, check_freezing=True, optim={"imitate": {"lr": 0.01}}
    )
    Trainer(method, OnlyConditions(), config, folder).fit()
    return method


def asked(denoiser: Denoiser, w: Tensor | None = None, guidance: float = 1.0) -> Tensor:
    x = torch.randn(4, *denoiser.shape, generator=torch.Generator().manual_seed(0))
    cond = {"label": LABELS} | ({} if w is None else {SCALE: w})
    with torch.no_grad():
        return denoiser(x, torch.tensor([0.2, 0.4, 0.6, 0.9]), cond, guidance).value


@pytest.mark.parametrize("name", MADE)
def test_silent_adapters_leave_the_base_and_its_guidance_alone_bit_for_bit(name: str, tmp_path: Path) -> None:
    plain, method = MADE[name]().eval(), trained(tmp_path, name)
    student = method.student
    for guidance in (0.0, 1.0, 3.0):
        assert torch.equal(asked(student, guidance=guidance), asked(plain, guidance=guidance))
    spoken = asked(student, torch.full((4,), 3.0))
    assert not torch.allclose(spoken, asked(plain), atol=1e-5)
    assert torch.equal(asked(student), asked(plain))
    moved = {key for key, p in student.named_parameters() if not key.startswith("network.")}
    assert set(student.role_parameters()) == moved
    for key, p in student.network.state_dict().items():
        assert torch.equal(p, plain.network.state_dict()[key])


@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize("kind", ["offset", "attention"])
def test_new_adapters_say_what_the_base_says_without_guidance(name: str, kind: Any) -> None:
    torch.manual_seed(0)
    plain = MADE[name]().eval()
    student = AttachedDenoiser(copy.deepcopy(plain), guidance_adapters(plain, kind, width=8))
    assert torch.equal(asked(student, torch.tensor([1.0, 2.0, 4.0, 6.0])), asked(plain))
    for adapter in student.attachment.adapters:  # type: ignore[union-attr]
        torch.nn.init.normal_(adapter.out.weight)  # type: ignore[union-attr]
    each = asked(student, torch.tensor([1.0, 2.0, 4.0, 6.0]))
    whole = torch.stack([asked(student, torch.full((4,), w))[i] for i, w in enumerate((1.0, 2.0, 4.0, 6.0))])
    torch.testing.assert_close(each, whole)  # a scale for each sample
    x, cond = torch.zeros(4, *plain.shape), {"label": LABELS, SCALE: torch.full((4,), 2.0)}
    with torch.no_grad():
        early, late, other = (
            student(x, torch.tensor(t), {**cond, "label": label}).value
            - plain(x, torch.tensor(t), {"label": label}).value
            for t, label in ((0.1, LABELS), (0.9, LABELS), (0.1, LABELS.flip(0)))
        )
    assert not torch.allclose(early, late, atol=1e-4)  # the time of each call, not of the first
    assert not torch.allclose(early, other, atol=1e-4)


def test_adapters_are_the_paper_s_formulas() -> None:
    """With weights of one: the offset is LN(ReLU(W c)) summed, attention a mean of values weighted by softmax."""
    torch.manual_seed(0)
    w, h = torch.tensor([2.0]), torch.randn(1, 5, 6)
    seen, text = {"time": torch.randn(1, 3), "label": torch.randn(1, 4)}, torch.randn(1, 2, 7)
    offset = Offset(Widths(6, 6, 7), 3, 4, 8, 1.0)
    torch.nn.init.normal_(offset.out.weight)
    assert offset.time is not None
    assert offset.label is not None
    assert offset.text is not None
    c = offset.encode(w) + offset.time(seen["time"]) + offset.label(seen["label"]) + offset.text(text.mean(1))
    linear, norm = offset.body[0], offset.body[2]
    expected = torch.relu(c @ linear.weight.T + linear.bias)  # type: ignore[operator,union-attr]
    expected = (expected - expected.mean()) / (expected.var(unbiased=False) + 1e-5).sqrt()
    assert isinstance(norm, torch.nn.LayerNorm)
    torch.testing.assert_close(offset(w, seen, h, text)[0, 0], (expected @ offset.out.weight.T)[0])
    cross = CrossAttention(Widths(6, 6, 7), 3, 4, 8, 1.0)
    torch.nn.init.normal_(cross.out.weight)
    assert cross.time is not None
    assert cross.label is not None
    assert cross.text is not None
    s = torch.cat([cross.encode(w), cross.time(seen["time"]), cross.label(seen["label"]), cross.text(text)[0]])
    places, half = torch.arange(5)[:, None], 10_000.0 ** -(torch.arange(4) / 4)
    s = s + torch.cat([(places * half).sin(), (places * half).cos()], 1)
    q, k, v = h[0] @ cross.to_q.weight.T, s @ cross.to_k.weight.T, s @ cross.to_v.weight.T
    answer = (q @ k.T / 8**0.5).softmax(1) @ v @ cross.out.weight.T
    torch.testing.assert_close(cross(w, seen, h, text)[0], answer)


def test_on_two_gaussians_the_stored_target_is_the_guided_closed_form() -> None:
    """Classes N(-1, s^2) and N(1, s^2) on a line; x0-predictions, g = u + w (k - u)."""
    s, process = 0.5, RectifiedFlow()
    mixture = GaussianMixture(torch.tensor([[-1.0], [1.0]]), s, classes=torch.tensor([0, 1]))
    teacher = MixtureDenoiser(mixture, process).eval()
    paths = Paths(8, steps=4, low=2.0, high=5.0, precision="float32")
    found = trajectories("", teacher, {"label": torch.tensor([0, 1])}, paths, name="exact")
    row = found.read(torch.arange(found.size))
    x, t, w = row["x_t"][:, 0].double(), row["t"].double(), row["scale"].double()
    a = 1 - t
    v = a**2 * s**2 + t**2
    of = [m + a * s**2 / v * (x - a * m) for m in (-1.0, 1.0)]
    share = torch.stack([-((x - a * m) ** 2) / (2 * v) for m in (-1.0, 1.0)]).softmax(0)
    u = share[0] * of[0] + share[1] * of[1]
    k = torch.where(row["cond"]["label"] == 1, of[1], of[0])
    torch.testing.assert_close(row["answer"][:, 0].double(), u + w * (k - u), rtol=1e-4, atol=1e-5)


def test_an_interrupted_run_with_stored_paths_ends_in_the_same_weights(tmp_path: Path) -> None:
    from workers.toy import Stop, stop_after

    straight = trained(tmp_path / "a", steps=5)
    torch.manual_seed(0)
    options, config = (
        AGD.Options(**SMALL, stored=str(tmp_path / "paths")),
        EngineConfig(steps=5, batch=8, checkpoint_every=2, optim={"imitate": {"lr": 0.01}}),
    )
    for resume in (False, True):
        torch.manual_seed(0)
        method = AGD(options)
        method.build(point_teacher().eval())
        trainer = Trainer(method, OnlyConditions(), config, tmp_path / "b", resume)
        if resume:
            trainer.fit()
        else:
            trainer.callbacks.append(stop_after(3))
            with pytest.raises(Stop):
                trainer.fit()
    for (name, p), q in zip(straight.student.named_parameters(), method.student.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_adapters_alone_are_put_on_the_base_again_in_ten_lines(tmp_path: Path) -> None:
    student = trained(tmp_path / "run", "dit").student
    ImageGenerator(student, ScaleSampler("euler", 4, scale=3.0)).save(tmp_path / "student")
    again = ImageGenerator.load(tmp_path / "student")
    assert torch.equal(again.sample([0, 1], seed=1), ImageGenerator(student, again.sampler).sample([0, 1], seed=1))
    assert again.sampler.nfe == 4
    alone = attach(dit_teacher().eval(), tmp_path / "student" / ATTACHED)
    w = torch.full((4,), 2.5)
    assert torch.equal(asked(alone, w), asked(student, w))
    weights = (tmp_path / "student" / ATTACHED / "attachment.safetensors").stat().st_size
    assert weights < 4 * sum(p.numel() for p in student.attachment.parameters()) + 20_000
    base = load_denoiser(tmp_path / "student")
    assert torch.equal(asked(base, guidance=2.0), asked(dit_teacher().eval(), guidance=2.0))


def test_the_page_s_lines_for_the_adapters_alone_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[3] / "docs/methods/agd.md").read_text(encoding="utf-8")
    block = next(text for text in page.split("```python\n")[1:] if "attach(" in text).split("```")[0]
    method = AGD(AGD.Options(**SMALL))
    method.build(get_bench("fashion").network())
    save_attachment(method.student, tmp_path / "runs/agd/student/attached")
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    exec(block, found)
    plain = ODESampler("euler", 25).sample(found["teacher"], found["noise"], found["cond"])
    torch.testing.assert_close(found["images"], plain)  # new adapters say what the base says
    assert (found["guided"] - plain).abs().max() > 0.01


def test_another_scale_is_asked_for_at_the_call(tmp_path: Path) -> None:
    student = trained(tmp_path).student
    model = ImageGenerator(student, ScaleSampler("euler", 6, scale=3.0))
    samples = [model.sampler.sample(student, torch.ones(4, 2), {"label": LABELS})]
    samples += [
        ScaleSampler("euler", 6, scale=w).sample(student, torch.ones(4, 2), {"label": LABELS}) for w in (3.0, 1.5, 0.0)
    ]
    assert torch.equal(samples[0], samples[1])
    assert not torch.allclose(samples[1], samples[2], atol=1e-5)
    plain = ODESampler("euler", 6).sample(point_teacher().eval(), torch.ones(4, 2), {"label": LABELS})
    assert torch.equal(samples[3], plain)


def test_new_adapters_measure_what_guidance_does() -> None:
    """They answer as the teacher does without it: at stored states, and in samples."""
    method = AGD(AGD.Options(**SMALL, held_out=5, held_out_low=9.0))
    method.build(point_teacher().eval())
    method.prepare(OnlyConditions())
    others = method.others
    assert others is not None
    assert others.states is not None
    assert others.answers is not None
    assert others.times is not None
    torch.testing.assert_close(others.scale, torch.full((5,), 6.0))  # within the scales that are learnt
    method.measure(others)
    plain, gaps = point_teacher().eval(), []
    with torch.no_grad():
        for k in range(6):
            said = plain(others.states[:, k], others.times[:, k], others.cond).value
            gaps.append((said - others.answers[:, k]).square().mean())
        ends = [ODESampler("euler", 6, guidance=w).sample(plain, others.noise, others.cond) for w in (1.0, 6.0)]
    torch.testing.assert_close(method.notes["held_out_gap"], torch.stack(gaps).mean())
    torch.testing.assert_close(method.notes["end_gap"], (ends[0] - ends[1]).square().mean(), rtol=1e-4, atol=1e-6)


def test_without_guidance_to_learn_new_adapters_have_no_loss_and_ancestral_paths_no_ends(tmp_path: Path) -> None:
    torch.manual_seed(0)
    method = AGD(AGD.Options(**{**SMALL, "eta": 1.0}, taught="plain", held_out=3, measure_every=1))
    method.build(point_teacher().eval())
    trainer = Trainer(method, OnlyConditions(), EngineConfig(steps=1, batch=8), tmp_path / "plain")
    trainer.fit()
    row = trainer.history[-1]
    assert row["loss/imitate/guidance"] < 1e-12
    assert row["health/held_out_gap"] > 0
    assert "health/end_gap" not in row
    assert trained(tmp_path / "guided", eta=1.0).notes["gap"] > 0


def test_adapters_that_are_given_go_on_and_others_are_refused(tmp_path: Path) -> None:
    first = trained(tmp_path).student
    second = AGD(AGD.Options(**SMALL))
    second.build(point_teacher().eval(), student=first)
    w = torch.full((4,), 3.0)
    assert torch.equal(asked(second.student, w), asked(first, w))
    assert second.student.attachment is not first.attachment
    with pytest.raises(UserError, match="no guidance adapters to go on with"):
        AGD(AGD.Options(**SMALL)).build(point_teacher().eval(), student=point_teacher().eval())
    whole = AGD(AGD.Options(**SMALL, tune="all"))
    whole.build(point_teacher().eval())
    torch.nn.init.normal_(whole.student.attachment.out[0].weight)  # type: ignore[union-attr]
    again = AGD(AGD.Options(**SMALL, tune="all"))
    again.build(point_teacher().eval(), student=whole.student)
    assert torch.equal(asked(again.student, w), asked(whole.student, w))


@pytest.mark.parametrize("change", [{"states": "noised"}, {"tune": "all"}])
def test_the_ablations_train(change: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    method = AGD(AGD.Options(**SMALL, **change))
    method.build(point_teacher().eval())
    points = ArrayData(torch.randn(32, 2), {"label": torch.arange(32) % 4})
    before = {name: p.detach().clone() for name, p in method.student.named_parameters()}
    Trainer(method, points, EngineConfig(steps=2, batch=8, check_freezing=True), tmp_path).fit()
    moved = {name.split(".")[0] for name, p in method.student.named_parameters() if not torch.equal(p, before[name])}
    assert moved == ({"attachment", "network"} if change == {"tune": "all"} else {"attachment"})


def test_other_methods_do_not_train_adapters_beside_a_frozen_model() -> None:
    """They would be silent, and have no gradient."""
    teacher = point_teacher()
    student = AttachedDenoiser(point_teacher(), guidance_adapters(point_teacher(), "auto", (), 2, 1.0))
    with pytest.raises(UserError, match="adapters beside a frozen one"):
        KD(KD.Options()).build(student)
    with pytest.raises(UserError, match="kd trains all weights of its student"):
        KD(KD.Options()).build(teacher, student)


def test_what_cannot_be_learnt_is_refused_with_a_cure() -> None:
    plain = point_teacher()
    plain.null = {}
    with pytest.raises(UserError, match="no unconditional value"):
        AGD(AGD.Options(**SMALL)).build(plain)
    with pytest.raises(UserError, match=r"is above options\.high"):
        AGD(AGD.Options(**{**SMALL, "low": 9.0})).build(point_teacher())
    with pytest.raises(UserError, match="'attn7' names no module"):
        AGD(AGD.Options(**SMALL, modules=("attn7",))).build(dit_teacher())


def test_the_bench_s_teacher_takes_adapters_of_a_third_of_its_size() -> None:
    bench = get_bench("ring")
    adapters = guidance_adapters(bench.network(), width=16)
    assert isinstance(adapters, GuidanceAdapters)
    own, base = (sum(p.numel() for p in m.parameters()) for m in (adapters, bench.network()))
    assert own < base / 3
