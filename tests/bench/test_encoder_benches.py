"""The encoders' benches: what is on the canvas, teachers that are made once, and arms that run and are scored."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from stillroom.bench import autoencoders, encoders, get_bench
from stillroom.bench.canvas.bench import Canvas, FreshCanvas, FreshCanvasBench, FreshCanvasTwoBench, heights
from stillroom.bench.canvas.painting import Canvases, painted
from stillroom.bench.fashion_encoders.bench import ImageEncodersBench
from stillroom.data.source import ArrayData
from stillroom.errors import UserError
from stillroom.evaluation.probes import patch_targets, probe_scores
from stillroom.networks.mae import make_encoder
from stillroom.proofs import get_proofs
from stillroom.proofs.runner import run_arm
from stillroom.tasks.encode.model import ImageEncoder


def test_a_digit_lies_where_its_quarters_are() -> None:
    ink = torch.ones(30, 1, 16, 16)
    images, belongs = painted(ink, 0)
    inside = belongs > 0
    assert images[:, 0][inside].min() > images[:, 0][~inside].max() - 0.5
    assert images[:, 0][~inside].mean() == pytest.approx(-1, abs=0.02)
    assert inside.sum((1, 2)).tolist() == [256] * 30
    assert all((belongs == quarter).sum((1, 2)).tolist() == [64] * 30 for quarter in (1, 2, 3, 4))
    rows = (belongs == 1).any(2).float().argmax(1), (belongs == 3).any(2).float().argmax(1)
    assert (rows[1] - rows[0]).tolist() == [8] * 30
    assert len(set(rows[0].tolist())) == 5
    contrast = (images[:, 0] * inside).sum((1, 2)) / 256
    assert float(contrast.min()) > 0.1
    assert float(contrast.max()) < 1.9
    assert torch.equal(painted(ink, 0)[0], images)


def test_every_batch_is_painted_anew_by_seed_and_step() -> None:
    ink = torch.rand(6, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    data = Canvases(ink, torch.arange(6), "abcdef", 1, "six digits")
    first, again, later, other = (data.batch(*at, 6) for at in ((0, 3), (0, 3), (0, 4), (1, 3)))
    assert torch.equal(first["x"], again["x"])
    assert torch.equal(data.batch(0, 3, 6, slice(2, 5))["x"], first["x"][2:5])
    for changed in (later, other):
        rows = [changed["cond"]["label"].tolist().index(digit) for digit in first["cond"]["label"].tolist()]
        assert (changed["x"][rows] - first["x"]).abs().mean() > 0.1
    assert torch.equal(data.images(), painted(ink, 1)[0])
    assert torch.equal(data.take(torch.tensor([4])).images()[0], data.images(4))
    assert data.fingerprint != Canvases(ink, torch.arange(6), "abcdef", 2, "six digits").fingerprint


def told_by_place(seen: torch.Tensor, asked: torch.Tensor) -> float:
    """Share of ``asked [N, patches]`` that is the commonest answer at its place in ``seen``."""
    return float((asked == seen.mode(0).values).float().mean())


def test_a_patch_knows_its_quarter_but_not_the_digits_height_by_its_place() -> None:
    bench = FreshCanvasTwoBench()
    seen, asked = (bench.dense[what] for what in ("labelled", "test"))
    assert heights(seen[:3]).tolist() == [int(torch.nonzero(one)[0, 0]) for one in seen[:3]]
    assert told_by_place(patch_targets(seen, 4), patch_targets(asked, 4)) > 0.65
    assert told_by_place(*(heights(one)[:, None].expand(-1, 25) for one in (seen, asked))) < 0.25


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Few images, and teachers of two steps in a cache of their own; what was trained is noted."""
    made: list[str] = []

    class Counting(autoencoders.Trainer):
        def fit(self) -> None:
            made.append(self.method.slug)
            super().fit()

    monkeypatch.setenv("STILLROOM_CACHE", str(tmp_path))
    monkeypatch.setattr(autoencoders, "Trainer", Counting)
    monkeypatch.setattr(encoders, "probe_scores", partial(probe_scores, tuning=1))
    whole = Canvas.__init__

    def few(self: Any, seed: int = 0) -> None:
        whole(self, seed)
        for part, what, n in (("probe", "labelled", 300), ("test", "test", 60)):
            setattr(self, part, getattr(self, part).take(torch.arange(n)))
            self.dense[what] = self.dense[what][:n]

    monkeypatch.setattr(Canvas, "__init__", few)
    for name, value in {"steps": 2, "tuning": 1, "copies": 1}.items():
        monkeypatch.setattr(FreshCanvas, name, value)
    return made


def test_a_teacher_is_made_once(small: list[str]) -> None:
    first, again = FreshCanvasBench(), FreshCanvasBench()
    assert small == []
    teacher = first.teacher
    assert small == ["dmae"]
    state = again.teacher.state_dict()
    assert small == ["dmae"]
    assert all(torch.equal(value, state[name]) for name, value in teacher.state_dict().items())
    fresh: Any = again.autoencoder("mae-micro")
    assert not torch.equal(state["vit.layers.0.mlp.fc1.weight"], fresh.vit.layers[0].mlp.fc1.weight)
    tutor, twin = first.tutor, first.supervised("mae-mini")
    assert tutor.encoder.config.hidden_size == 96  # type: ignore[union-attr]
    assert twin.encoder.config.hidden_size == 64  # type: ignore[union-attr]
    assert tutor(first.test.images(slice(2))).shape == (2, 10)


@pytest.mark.parametrize(
    ("slug", "names"),
    [
        ("dmae", {"shuffled-teacher"}),
        ("g2sd", {"both-stages", "untouched"}),
        ("hybrid-distill", {"shuffled-teachers"}),
    ],
)
def test_arms_run_and_have_every_score(small: list[str], slug: str, names: set[str]) -> None:
    proof = next(p for p in get_proofs(slug) if p.level == "mechanism")
    bench = get_bench(proof.bench, 100)
    for arm in proof.arms:
        if arm.name in names:
            options = {"generic_share": 1, "specific_share": 1} if arm.name == "both-stages" else {}
            steps = 0 if arm.name == "untouched" else 2
            result = run_arm(arm.with_(arm.name, options=options, engine={"steps": steps, "batch": 8}), bench)
            assert set(result["scores"]) == {score.key for score in bench.scores}
            assert all(0 <= value <= 1 for value in result["scores"].values())
            assert "diverged" not in result


def few_pictures(classes: int, each: int) -> ArrayData:
    images = torch.randint(0, 256, (classes * each, 1, 8, 8), generator=torch.Generator().manual_seed(0)).byte()
    return ArrayData(images, {"label": torch.arange(classes).repeat(each)}, [str(i) for i in range(classes)], "few")


@pytest.mark.parametrize("each", [3, 10])
def test_a_class_with_few_images_leaves_out_the_score_that_needs_more(
    each: int, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = ImageEncodersBench()
    bench.train = bench.probe = few_pictures(3, each)  # type: ignore[misc]
    bench.test = few_pictures(3, 2)  # type: ignore[misc]
    student = ImageEncoder(make_encoder("mae-nano", 1, 8))
    bench.try_out(student)
    found = bench.compare({"student": student}, 6, 0)["scores"]["student"]
    assert found.keys() >= {"probe", "knn", "probe_occluded", "probe_noisy"}
    assert ("tuned" in found) == (each == 10)
    assert ("left out, for a class has 3" in capsys.readouterr().err) == (each == 3)


def test_one_class_is_refused_before_the_training() -> None:
    bench = ImageEncodersBench()
    bench.train = bench.probe = few_pictures(1, 12)  # type: ignore[misc]
    with pytest.raises(UserError, match=r"one class.*evaluate\.n=0"):
        bench.try_out(None)
