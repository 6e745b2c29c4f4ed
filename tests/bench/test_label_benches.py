"""Benches of labelled images: their ensembles, their annealed training, and teachers that are wrong on purpose."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stillroom.bench import get_bench
from stillroom.bench.digits.bench import DigitsEnsembleBench, SemiDigitsBench, larger_network
from stillroom.bench.fashion_labels import bench as clothes
from stillroom.bench.labels import anneal
from stillroom.errors import UserError
from stillroom.networks.recognition import class_logits
from stillroom.surgery.modules import parameter_count, weights_hash


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("STILLROOM_CACHE", str(tmp_path))
    return tmp_path


def test_an_ensemble_is_three_wider_networks_made_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DigitsEnsembleBench, "training", {"steps": 3, "pixels": 1})
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    bench = DigitsEnsembleBench(1)
    teachers = bench.teachers()
    torch.testing.assert_close(torch.rand(2), expected)
    hashes = [weights_hash(teacher) for teacher in teachers]
    assert len(set(hashes)) == 3
    files = {file.name: file.stat().st_mtime_ns for file in cache.rglob("*.safetensors")}
    assert len(files) == 3
    given, one = bench.given(), bench.given(teacher="one")
    assert [weights_hash(teacher) for teacher in given["teachers"]] == hashes
    assert [weights_hash(teacher) for teacher in one["teachers"]] == hashes[:1]
    assert files == {file.name: file.stat().st_mtime_ns for file in cache.rglob("*.safetensors")}
    assert not any(teacher.training for teacher in teachers)
    assert parameter_count(teachers[0]) > 1.5 * parameter_count(given["student"])
    assert weights_hash(DigitsEnsembleBench(2).teachers("one")[0]) not in hashes
    with pytest.raises(UserError, match="no teacher 'two'"):
        bench.given(teacher="two")
    found = bench.floor()
    assert {"one teacher", "ensemble teacher"} < set(found)


def test_an_ensemble_is_misled_as_one(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DigitsEnsembleBench, "training", {"steps": 3})
    bench = DigitsEnsembleBench(1)
    teachers = bench.teachers()
    images = bench.test.images(slice(8))
    right = [class_logits(teacher, images) for teacher in teachers]
    bench.mislead(SimpleNamespace(teachers=lambda: dict(enumerate(teachers))), bench.data())
    for teacher, said in zip(teachers, right, strict=True):
        torch.testing.assert_close(class_logits(teacher, images), said.roll(1, -1))


def test_teachers_of_clothes_are_twice_as_wide_and_learn_from_the_student_s_labels() -> None:
    bench: Any = get_bench("fashion-ensemble", 3)
    assert bench.train.n <= 2_000
    assert parameter_count(bench.wide()) > 3 * parameter_count(bench.student())
    assert torch.equal(bench.data().labels, bench.train.labels)
    assert float((bench.train.labels != bench.clean.labels).float().mean()) == pytest.approx(0.36, abs=0.05)


def test_annealed_training_learns_what_it_is_told_with_a_rate_that_falls_to_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rates: list[float] = []
    step = torch.optim.AdamW.step

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        rates.append(self.param_groups[0]["lr"])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    bench: Any = get_bench("digits", 0)
    torch.manual_seed(0)
    network = larger_network()
    told = (bench.clean.labels + 1) % 10
    with torch.no_grad():  # as floors are made
        anneal(network, bench.clean, told, seed=1, steps=80, pixels=1, mirrored=0.1)
    said = network(bench.clean.images()).argmax(-1)
    assert float((said == told).float().mean()) > 0.8
    assert len(rates) == 80
    assert rates[0] == pytest.approx(2e-3)
    assert rates[40] == pytest.approx(1e-3)
    assert rates[-1] < 2e-6


def test_a_biased_teacher_of_clothes_is_told_three_classes_wrongly(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Tensor] = []

    def watched(network: nn.Module, images: Any, labels: Tensor, *args: Any, **kwargs: Any) -> None:
        told.append(labels)

    monkeypatch.setattr(clothes, "anneal", watched)
    bench: Any = get_bench("fashion-semi", 3)
    bench.given(teacher="biased")
    truth, (labels,) = bench.clean.labels, told
    for true, false in clothes.CONFUSED.items():
        assert set(labels[truth == true].tolist()) == {true, false}
        assert float((labels[truth == true] == false).float().mean()) == pytest.approx(0.6, abs=0.1)
    right = ~torch.isin(truth, torch.tensor(list(clothes.CONFUSED)))
    assert torch.equal(labels[right], truth[right])
    with pytest.raises(UserError, match="did you mean 'biased'"):
        bench.given(teacher="biassed")


def test_a_bench_judges_teachers_that_it_first_has_to_train(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SemiDigitsBench, "kinds", ("biased",))
    found = SemiDigitsBench(0).floor()
    assert 0.3 < found["biased teacher"] < 0.95
