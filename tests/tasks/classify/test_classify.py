"""Classifiers: networks by name and folder, new weights, scores, the noisy-label benches, and whole runs."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import stillroom as sr
from stillroom.bench import get_bench
from stillroom.bench.digits.bench import DigitsBench
from stillroom.data.source import ArrayData
from stillroom.diffusion.sampling import sampler_from_dict
from stillroom.errors import UserError
from stillroom.evaluation.metrics import calibration_error
from stillroom.folders.image_networks import ARCHITECTURES, make_classifier
from stillroom.networks.recognition import ForwardPass, class_logits
from stillroom.proofs.base import Arm
from stillroom.proofs.runner import run_arm
from stillroom.recipe import Recipe
from stillroom.run import run
from stillroom.surgery.initial import fresh_weights
from stillroom.task import make_task, sample_rows
from stillroom.tasks.classify.model import ImageClassifier
from tiny import CLASSES, make_data

SMALL = "resnet-small"


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


# --- networks ---------------------------------------------------------------------------------------------------------
def test_the_named_resnets_have_the_sizes_of_the_literature() -> None:
    counts = {name: sum(p.numel() for p in make_classifier(name, 3, 1000).parameters()) for name in ARCHITECTURES}
    assert counts["resnet-18"] == 11_689_512
    assert counts["resnet-50"] == 25_557_032
    assert counts[SMALL] < 200_000
    with pytest.raises(UserError, match="did you mean 'resnet-18'"):
        make_classifier("resnet-81", 3, 10)


def test_a_saved_classifier_is_read_by_us_and_by_transformers(tmp_path: Path) -> None:
    from transformers import AutoModelForImageClassification

    made = ImageClassifier(make_classifier(SMALL, 1, 3), CLASSES)
    images = torch.randn(5, 1, 8, 8)
    made.save(tmp_path / "student")
    again = sr.load(tmp_path / "student")
    assert isinstance(again, ImageClassifier)
    torch.testing.assert_close(again.probabilities(images, batch=2), made.probabilities(images))
    theirs = AutoModelForImageClassification.from_pretrained(tmp_path / "student", local_files_only=True)
    torch.testing.assert_close(theirs(images).logits.softmax(-1), made.probabilities(images))
    assert theirs.config.id2label == dict(enumerate(CLASSES))
    assert again.classify(images) == [CLASSES[i] for i in made.probabilities(images).argmax(-1)]
    with pytest.raises(UserError, match=r"give \[N, 1, H, W\]"):
        again.classify(torch.randn(2, 3, 8, 8))
    with pytest.raises(UserError, match="recognises images"):
        sample_rows(again, (), (), 1, 0)


def test_broken_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no classifier"):
        ImageClassifier.load(tmp_path)
    ImageClassifier(make_classifier(SMALL, 1, 3), CLASSES).save(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(UserError, match="cannot be read"):
        ImageClassifier.load(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match="are missing"):
        ImageClassifier.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": ["BertModel"]}))
    with pytest.raises(UserError, match="no image classifier"):
        ImageClassifier.load(tmp_path)


def test_a_forward_pass_is_a_sampler_of_one_evaluation() -> None:
    sampler = sampler_from_dict(ForwardPass().to_dict())
    network, x = nn.Linear(3, 2), torch.randn(4, 3)
    assert sampler == ForwardPass()
    assert sampler.nfe == 1
    logits = sampler.sample(network, x)  # type: ignore[arg-type]
    assert not logits.requires_grad
    torch.testing.assert_close(logits, network(x).detach())


@pytest.mark.parametrize("network", [nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)), make_classifier(SMALL, 1, 3)])
def test_fresh_weights_follow_the_seed_alone(network: nn.Module) -> None:
    before = {name: value.clone() for name, value in network.state_dict().items()}
    torch.manual_seed(0)
    expected = torch.randn(3)
    torch.manual_seed(0)
    first, again, other = fresh_weights(network, 1), fresh_weights(network, 1), fresh_weights(network, 2)
    torch.testing.assert_close(torch.randn(3), expected)  # torch's own generator is left alone
    assert equal(first, again)
    assert not equal(first, other)
    assert not equal(first, before)
    assert equal(dict(network.state_dict()), before)


def test_weights_that_cannot_be_drawn_are_refused() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor = nn.Parameter(torch.ones(1))

    with pytest.raises(UserError, match="'1' cannot be drawn anew"):
        fresh_weights(nn.Sequential(nn.Linear(2, 2), Scale()), 0)


# --- scores -----------------------------------------------------------------------------------------------------------
def test_calibration_error_by_hand() -> None:
    p = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6], [0.45, 0.55]])
    labels = torch.tensor([0, 1, 1, 1])  # bins of 0.2: |0.5 - 0.9| at half the weight, |1 - 0.6| and |1 - 0.55|
    assert calibration_error(p, labels, bins=10) == pytest.approx((2 * 0.4 + 0.4 + 0.45) / 4)
    rng = np.random.default_rng(0)
    q = torch.from_numpy(rng.uniform(0.5, 1, 50_000))
    right = torch.from_numpy(rng.random(50_000)) < q
    assert calibration_error(torch.stack([q, 1 - q], 1), (~right).long()) < 0.01


# --- benches ----------------------------------------------------------------------------------------------------------
def test_digits_are_split_and_mislabelled_by_the_seed() -> None:
    bench, other, again = (DigitsBench(seed) for seed in (1, 2, 1))
    assert bench.train.fingerprint == again.train.fingerprint
    assert bench.train.fingerprint != other.train.fingerprint
    assert (bench.train.n, bench.held_out.n, bench.test.n) == (600, 400, 797)
    rows = torch.cat([part.images().flatten(1) for part in (bench.train, bench.held_out, bench.test)])
    assert len(torch.unique(rows, dim=0)) == 1797
    assert torch.equal(bench.train.images(), bench.clean.images())
    wrong = (bench.train.labels != bench.clean.labels).float().mean()
    assert float(wrong) == pytest.approx(0.4 * 0.9, abs=0.06)
    perfect = bench.judge(torch.nn.functional.one_hot(bench.test.labels, 10).float())
    assert perfect == {"accuracy": 1.0, "mse": 0.0}
    assert bench.floor()["accuracy"] > 0.93
    data = bench.data(images=50)
    assert data.n == 50
    assert data.parts["heldout"].n == 400
    with pytest.raises(UserError, match="there are 600"):
        bench.data(images=601)


def test_fashion_labels_are_a_bench_of_its_own() -> None:
    bench: Any = get_bench("fashion-labels")
    data = bench.data()
    assert data.n == bench.train.n
    assert float((data.labels != bench.clean.labels).float().mean()) == pytest.approx(0.36, abs=0.04)
    images = data.images(slice(4))
    model = bench.model(bench.given()["student"].eval(), ForwardPass())
    assert model.probabilities(images).sum(-1).tolist() == pytest.approx([1.0] * 4)
    with pytest.raises(UserError, match="no trained network"):
        bench.network()


@pytest.mark.parametrize("name", ["digits", "fashion-labels"])
def test_a_misleading_teacher_answers_for_the_next_class(name: str) -> None:
    bench: Any = get_bench(name)
    teacher = bench.given()["student"].eval()
    data = bench.data(images=8)
    right = class_logits(teacher, data.images()).argmax(-1)
    assert bench.mislead(SimpleNamespace(teachers=lambda: {"teacher": teacher}), data) is data
    assert torch.equal(class_logits(teacher, data.images()).argmax(-1), (right + 1) % 10)


def test_a_kernel_arm_is_the_estimator() -> None:
    arm = Arm("kernel", data={"ridge": 0.1, "rounds": 3, "gt_weight": "validation"}, sampler={"name": "forward"})
    result = run_arm(arm, get_bench("digits", 0))
    assert result["scores"]["accuracy"] > 0.8
    assert result["scores"] == run_arm(arm, get_bench("digits", 0))["scores"]
    assert result["scores"] != run_arm(arm, get_bench("digits", 1))["scores"]


# --- runs -------------------------------------------------------------------------------------------------------------
FAST = ["engine.steps=6", "engine.batch=6", "engine.log_every=1", "evaluate.n=5", "options.rounds=2"]


def test_a_whole_run_leaves_a_classifier_with_card_and_report(tmp_path: Path) -> None:
    data = make_data(tmp_path / "data")
    recipe = Recipe.load("gt-self-distill", FAST, data=str(data))
    result = run(recipe, tmp_path / "run")
    assert set(result.scores["student"]) == {"accuracy", "nll", "ece"}
    classifier = sr.load(tmp_path / "run" / "student")
    assert isinstance(classifier, ImageClassifier)
    assert classifier.classes == list(CLASSES)
    card = (tmp_path / "run" / "student" / "README.md").read_text()
    assert "pipeline_tag: image-classification" in card
    assert "student.classify(images)" in card
    assert "makes an image" not in card
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Images under the class they are given" in page
    assert "The floor is" not in page
    finished = json.loads((tmp_path / "run" / "result.json").read_text())
    assert finished["rows"] == list(CLASSES)
    go_on = Recipe.load("gt-self-distill", FAST, data=str(data), student=str(tmp_path / "run" / "student"))
    task = make_task("classify")
    task.load(go_on)
    assert equal(task.given()["student"].state_dict(), classifier.network.state_dict())


def test_teachers_named_beside_the_students_network_teach_and_are_scored(tmp_path: Path) -> None:
    data = make_data(tmp_path / "data")
    for name in ("one", "two"):
        ImageClassifier(make_classifier(SMALL, 1, 3), CLASSES).save(tmp_path / name)
    teacher = f"{tmp_path / 'one'}, {tmp_path / 'two'}"
    recipe = Recipe.load("meal-v2", FAST[:-1], data=str(data), student=SMALL, teacher=teacher)
    result = run(recipe, tmp_path / "run")
    assert set(result.scores) == {"student", "teacher-1", "teacher-2"}
    log = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["stage"] for row in log] == 3 * ["init"] + 2 * ["distil"] + ["settle"]
    assert (tmp_path / "run" / "samples" / "teacher-2.png").is_file()
    assert isinstance(sr.load(tmp_path / "run" / "student"), ImageClassifier)


def loaded(tmp_path: Path, student: Any = None, **named: Any) -> Any:
    named = {"data": str(make_data(tmp_path / "data"))} | named
    task = make_task("classify")
    task.load(Recipe.load("gt-self-distill", **named), {} if student is None else {"student": student})
    return task


def test_every_fifth_image_is_held_out(tmp_path: Path) -> None:
    task = loaded(tmp_path)
    assert task.data.parts["heldout"].n * 4 == pytest.approx(task.data.n, abs=4)
    both = torch.cat([task.data.images(), task.data.parts["heldout"].images()]).flatten(1)
    assert len(torch.unique(both, dim=0)) == len(both)


def test_the_network_by_name_follows_the_seed(tmp_path: Path) -> None:
    first, again = (loaded(tmp_path / str(i)).own.state_dict() for i in range(2))
    other = loaded(tmp_path / "other", overrides=["engine.seed=1"]).own.state_dict()
    assert equal(first, again)
    assert not equal(first, other)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no classifier 'resnet-smal' .did you mean 'resnet-small'"):
        loaded(tmp_path / "a", overrides=["student=resnet-smal"])
    with pytest.raises(UserError, match="teacher 'resnet-small' is an untrained network; it can be the student"):
        loaded(tmp_path / "f", overrides=["teacher=resnet-small"])
    with pytest.raises(UserError, match=r"has 3 channels, data .* 1"):
        loaded(tmp_path / "b", make_classifier(SMALL, 3, 3))
    with pytest.raises(UserError, match=r"has 4 classes, data .* 3"):
        loaded(tmp_path / "c", ImageClassifier(make_classifier(SMALL, 1, 4)))
    with pytest.raises(UserError, match="no image classifier"):
        loaded(tmp_path / "d", nn.Linear(2, 2))
    with pytest.raises(UserError, match="no classes to tell apart"):
        make_task("classify").load(Recipe.load("gt-self-distill"), {"data": ArrayData(torch.zeros(4, 1, 8, 8))})
