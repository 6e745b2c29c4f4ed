"""MSD: who learns from which classes, what begins anew for each student, and students that were trained apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from points import NULL, B, batch, says, teacher, two_points
from torch import Tensor

from gaussians import draws, exact, moved, play
from stillroom.cli import main
from stillroom.data.source import LABELS, ArrayData
from stillroom.diffusion.denoiser import Denoiser
from stillroom.diffusion.process import RectifiedFlow
from stillroom.diffusion.routed import ByCondition, RoutedDenoiser
from stillroom.diffusion.sampling import FewStepSampler
from stillroom.engine.config import EngineConfig
from stillroom.engine.interrupt import Interrupted
from stillroom.engine.trainer import Trainer
from stillroom.errors import UserError
from stillroom.method import frozen, get_method
from stillroom.methods.score.msd import partition
from stillroom.networks.point_mlp import PointMLP
from stillroom.task import load_model
from stillroom.tasks.class_images.model import ImageGenerator

FLOW = RectifiedFlow()
ALL = {"matching_share": 1.0, "adversarial_share": 1.0}


def small() -> Denoiser:
    torch.manual_seed(5)
    return Denoiser(PointMLP(2, 8, 2, NULL), FLOW, "v", null={"label": NULL}, shape=(2,))


def build(stage: int = 0, given: Denoiser | None = None, start: Any = None, lora: Any = None, **options: Any) -> Any:
    cls = get_method("msd")
    method = cls(cls.Options(**{"students": 2, **options}), lora)
    torch.manual_seed(1)
    method.build(given or teacher(), start, [str(c) for c in range(NULL)])
    method.stage = method.stages()[stage]
    return method


def points() -> ArrayData:
    generator = torch.Generator().manual_seed(4)
    labels = torch.arange(80) % NULL
    return ArrayData(torch.randn(80, 2, generator=generator), {LABELS: labels}, [str(c) for c in range(NULL)])


def config(**more: Any) -> EngineConfig:
    settings = {"steps": 8, "batch": 4, "device": "cpu", "check_freezing": True, "optim": {"all": {"lr": 1e-3}}, **more}
    return EngineConfig(**settings)


def test_the_gradient_in_numbers() -> None:
    """As DMD2's: dL/dx0 = (D_f - D_r) / mean|x0 - D_r| / 2, halved by the batch."""
    method = build()
    method.teacher, method.fake = frozen(says(0.0, 0.0)), frozen(says(1.0, -2.0))
    data = two_points()[1]
    method.student.experts["student-1"].network = says(1.0, 3.0).network
    method.student.experts["student-1"].prediction = "x0"
    method.draw = draws(2)
    method.generator(data)["dm"].backward()
    found = method.student.experts["student-1"].network.point.grad
    torch.testing.assert_close(found, 2 * torch.tensor([1 / 8, -2 / 8]))


def test_matching_has_no_loss_where_the_student_is_the_teacher_and_edm_s_weight_elsewhere() -> None:
    method = build(matching_share=1.0)
    assert float(play(method, "match", batch())["tsm"].detach()) == 0
    method.teacher = frozen(says(0.0, 0.0))
    for expert in method.student.experts.values():
        expert.network, expert.prediction = says(1.0, 3.0).network, "x0"
    loss = float(play(method, "match", batch(), seed=3)["tsm"].detach())
    method.draw = draws(B, 3)
    t = method.options.matching_times.sample(method.draw, FLOW)
    ratio = t / (1 - t).clamp_min(1e-4)
    weight = (ratio**2 + 0.25) / (ratio * 0.5) ** 2
    assert loss == pytest.approx(float((weight * (1 + 9) / 2).mean()), rel=1e-5)


def test_a_matched_student_of_a_gaussian_is_its_exact_denoiser() -> None:
    """The minimum of the matching is the teacher: its gradient is 0 there and nowhere near it."""
    method = build(given=exact(FLOW, means=((0.5, -0.5),), stds=(0.6,), offsets=[[0.0, 0.0]] * (NULL + 1)),
                   matching_share=1.0)  # fmt: skip
    data = {"x": torch.zeros(B, 2, dtype=torch.float64), "cond": {"label": torch.zeros(B, dtype=torch.long)}}
    play(method, "match", data)
    assert all(p.grad is None or float(p.grad.abs().max()) < 1e-12 for p in method.student.parameters())
    with torch.no_grad():
        method.student.experts["student-1"].network.means += 0.1
    play(method, "match", data)
    assert float(method.student.experts["student-1"].network.means.grad.abs().max()) > 1e-3


def test_classes_are_shared_equally_in_runs_or_at_random() -> None:
    assert partition(8, 4) == (0, 0, 1, 1, 2, 2, 3, 3)
    assert partition(10, 4) == (0, 0, 0, 1, 1, 2, 2, 2, 3, 3)
    assert partition(5, 1) == (0,) * 5
    mixed = partition(8, 4, "random", 3)
    assert sorted(mixed) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert mixed == partition(8, 4, "random", 3) != partition(8, 4, "random", 4)


def test_each_student_sees_its_own_classes_alone_and_moves_alone(tmp_path: Path) -> None:
    method, seen = build(**ALL), dict[str, set[int]]()
    for name in ("match", "generator", "critic"):
        inner = getattr(method, name)

        def watched(data: Any, inner: Any = inner) -> Any:
            seen.setdefault(method.stage.name, set()).update(data["cond"]["label"].tolist())
            return inner(data)

        setattr(method, name, watched)
    weights: dict[int, list[Tensor]] = {}

    def look(trainer: Trainer, done: int) -> None:
        weights[done] = [p.detach().clone() for p in (e.network.out.bias for e in method.student.experts.values())]

    Trainer(method, points(), config(steps=24), tmp_path, callbacks=[look], show=False).fit()
    assert list(seen) == [f"student {k}, {kind}" for k in (1, 2) for kind in ("matching", "distilling", "adversarial")]
    for name, classes in seen.items():
        assert classes <= ({0, 1, 2, 3} if "student 1" in name else {4, 5, 6, 7})
    begun = teacher().network.out.bias
    assert not torch.equal(weights[12][0], begun)
    assert torch.equal(weights[12][1], begun)
    assert torch.equal(weights[24][0], weights[12][0])
    assert not torch.equal(weights[24][1], begun)


def test_turns_move_what_they_train() -> None:
    method = build(2, **ALL)
    with torch.no_grad():
        for p in method.fake.parameters():
            p += 0.1 * torch.randn_like(p)
    for name, roles in (("match", {"student"}), ("generator", {"student"}), ("critic", {"fake", "discriminator"})):
        method.shared = {}
        with torch.no_grad():
            for p in method.student.parameters():
                p += 0.01
        play(method, name, batch())
        assert moved(method) == roles


def test_the_fake_score_is_the_teacher_s_network_and_begins_anew_for_each_student() -> None:
    method = build(start=small(), **ALL)
    shapes = [p.shape for p in teacher().parameters()]
    assert [p.shape for p in method.fake.parameters()] == shapes
    assert [p.shape for p in method.student.experts["student-2"].parameters()] == [
        p.shape for p in small().parameters()
    ]
    head = {name: value.clone() for name, value in method.discriminator.state_dict().items()}
    for stage in method.stages():
        with torch.no_grad():
            for p in (*method.fake.parameters(), *method.discriminator.parameters()):
                p += 1
        method.enter(stage, None, resumed=False)
        anew = [torch.equal(p, q) for p, q in zip(method.fake.parameters(), method.teacher.parameters(), strict=True)]
        heads = [torch.equal(value, head[name]) for name, value in method.discriminator.state_dict().items()]
        assert all(anew) is all(heads) is (stage.kind == "distilling")


@torch.no_grad()
def test_a_mixed_batch_is_drawn_by_each_class_s_student(tmp_path: Path) -> None:
    method = build()
    for k, expert in enumerate(method.student.experts.values()):
        expert.network.out.bias += k + 1
    ImageGenerator(method.student, method.sampler(), [str(c) for c in range(NULL)]).save(tmp_path)
    model = load_model(tmp_path)
    assert sorted(path.name for path in (tmp_path / "experts").iterdir()) == ["student-1", "student-2"]
    assert json.loads((tmp_path / "stillroom.json").read_text())["route"]["condition"] == "label"
    found = model.sample([0, 7, 3, 4], seed=2)
    for k, name in ((0, "student-1"), (1, "student-2"), (2, "student-1"), (3, "student-2")):
        alone = ImageGenerator(method.student.experts[name], method.sampler()).sample([0, 7, 3, 4], seed=2)
        torch.testing.assert_close(found[k], alone[k])


def test_students_that_are_trained_apart_are_joined(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    own = {}
    for k in (1, 2):
        method = build(only=k)
        trainer = Trainer(method, points(), config(), tmp_path / f"run{k}", show=False)
        trainer.fit()
        assert {stage.round for stage in method.stages()} == {k}
        network = trainer.export_role()
        assert network.own == f"student-{k}"
        own[f"student-{k}"] = network.experts[f"student-{k}"].state_dict()
        ImageGenerator(network, method.sampler(), [str(c) for c in range(NULL)]).save(tmp_path / str(k))
        assert len(list((tmp_path / str(k) / "experts").iterdir())) == 2  # its own, and one for all others
    out = tmp_path / "whole"
    assert main(["join", str(tmp_path / "2"), str(tmp_path / "1"), "--out", str(out)]) == 0
    whole = load_model(out).denoiser
    assert isinstance(whole, RoutedDenoiser)
    assert whole.own == ""
    assert list(whole.experts) == ["student-1", "student-2"]
    for name, expert in whole.experts.items():
        assert all(torch.equal(value, own[name][key]) for key, value in expert.state_dict().items())
    capsys.readouterr()
    for names, words in (
        (["1"], "student-2 is missing"),
        (["1", "1"], "'student-1' comes twice"),
        (["1", "whole"], "this student is whole"),
    ):
        assert main(["join", *(str(tmp_path / name) for name in names), "--out", str(tmp_path / "x")]) == 2
        assert words in capsys.readouterr().err
    one = load_model(tmp_path / "1")
    for other, words in (
        (ImageGenerator(one.denoiser, FewStepSampler((0.5,)), one.classes), "other sampler"),
        (ImageGenerator(one.denoiser, one.sampler, one.classes[::-1]), "other classes"),
    ):
        with pytest.raises(UserError, match=words):
            load_model(tmp_path / "2").join([other])
    with torch.no_grad():  # of another teacher, or of another seed where the student's weights were new
        one.denoiser.experts["student-2"].network.out.bias += 1
    with pytest.raises(UserError, match="'student-1' and 'student-2' did not begin as the same network; give students"):
        load_model(tmp_path / "2").join([one])
    assert main(["join", str(tmp_path / "1"), "--out", str(out)]) == 2
    assert "already exists" in capsys.readouterr().err
    assert main(["join", "fashion", "--out", str(tmp_path / "x")]) == 2
    assert "no student of a part of the classes" in capsys.readouterr().err


def test_of_students_trained_apart_the_others_are_not_trained_and_lie_there_once() -> None:
    method = build(only=2, students=4)
    experts = method.student.experts
    assert experts["student-1"] is experts["student-3"] is experts["student-4"]
    mine = {id(p) for p in experts["student-2"].parameters()}
    assert {id(p) for p in method.trained_parameters("student").values()} == mine


def test_a_run_that_is_stopped_inside_a_student_ends_as_one_that_is_not(tmp_path: Path) -> None:
    def run(folder: str, stop: int = 0, resume: bool = False) -> dict[str, Tensor]:
        def halt(trainer: Trainer, done: int) -> None:
            if done == stop:
                raise Interrupted("here")

        method, settings = build(start=small(), **ALL), config(steps=12, checkpoint_every=1)
        trainer = Trainer(method, points(), settings, tmp_path / folder, resume, callbacks=[halt], show=False)
        trainer.fit()
        return method.state_dict()

    whole = run("whole")
    for stop in (6, 9, 11):
        with pytest.raises(Interrupted):
            run(f"cut {stop}", stop)
        again = run(f"cut {stop}", resume=True)
        assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_one_student_is_one_network_and_students_may_be_adapters() -> None:
    assert not isinstance(build(students=1).student, RoutedDenoiser)
    method = build(lora={"student": {"rank": 2, "targets": ["to_q"]}})
    assert method.student.adapter == "student-1, student-2"
    assert method.student.route == ByCondition("label", (0, 0, 0, 0, 1, 1, 1, 1))
    play(method, "generator", batch())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"students": 9}, "8 among 9 leave some without"),
        ({"only": 3}, r"options.only=3 of 2 students"),
        ({"distilling_share": 0.0}, "every stage of msd has share 0"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        build(**options)


def test_data_without_a_student_s_classes_are_refused() -> None:
    method, data = build(), points()
    with pytest.raises(UserError, match="nothing of the classes of student 2"):
        method.prepare(data.take((data.labels < 4).nonzero()[:, 0]))
