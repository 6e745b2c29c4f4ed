"""Benches: the exact mixture against autograd, and the image bench's protocol."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from stillroom.bench.fashion import bench as fashion
from stillroom.bench.fashion.bench import ClassImagesBench
from stillroom.bench.mixture import GaussianMixture
from stillroom.bench.ring.bench import RingBench
from stillroom.data import source
from stillroom.data.source import ASSETS, LABELS, ArrayData
from stillroom.diffusion.process import EDM, RectifiedFlow, TrigFlow
from stillroom.errors import UserError
from stillroom.evaluation.extractor import load_extractor, train_extractor


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def mixture() -> GaussianMixture:
    factors = normal(4, 3, 3)
    return GaussianMixture(
        means=2 * normal(4, 3, seed=1),
        covariances=factors @ factors.mT + 0.1 * torch.eye(3, dtype=torch.float64),
        weights=torch.tensor([0.1, 0.2, 0.3, 0.4]),
        classes=torch.tensor([0, 1, 1, 0]),
    )


LEVELS = [(1.0, 0.0), (0.9, 0.3), (0.5, 0.5), (0.0, 1.0), (1.0, 5.0)]


# --- mixture ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("alpha", "sigma"), LEVELS)
@pytest.mark.parametrize("conditional", [False, True])
def test_score_is_the_gradient_of_the_log_density(
    mixture: GaussianMixture, alpha: float, sigma: float, conditional: bool
) -> None:
    x = (2 * normal(6, 3, seed=2)).requires_grad_()
    labels = torch.tensor([0, 1, 2, 0, 1, 2]) if conditional else None
    (expected,) = torch.autograd.grad(mixture.log_density(x, alpha, sigma, labels).sum(), x)
    torch.testing.assert_close(mixture.score(x, alpha, sigma, labels), expected, rtol=1e-9, atol=1e-9)


def test_log_density_is_that_of_torch_distributions(mixture: GaussianMixture) -> None:
    from torch import distributions as D

    alpha, sigma = 0.7, 0.6
    covariances = mixture.axes @ torch.diag_embed(mixture.spread) @ mixture.axes.mT
    noised = D.MultivariateNormal(alpha * mixture.means, alpha**2 * covariances + sigma**2 * torch.eye(3))
    reference = D.MixtureSameFamily(D.Categorical(logits=mixture.log_weights), noised)
    x = normal(5, 3, seed=3)
    torch.testing.assert_close(mixture.log_density(x, alpha, sigma), reference.log_prob(x))


@pytest.mark.parametrize(("alpha", "sigma"), LEVELS[1:])
def test_posterior_mean_obeys_tweedie(mixture: GaussianMixture, alpha: float, sigma: float) -> None:
    x = normal(6, 3, seed=4)
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    score = (alpha * mixture.posterior_mean(x, alpha, sigma, labels) - x) / sigma**2
    torch.testing.assert_close(score, mixture.score(x, alpha, sigma, labels), rtol=1e-9, atol=1e-9)


def test_posterior_mean_at_the_ends_is_the_point_and_the_prior_mean(mixture: GaussianMixture) -> None:
    x = normal(4, 3, seed=5)
    torch.testing.assert_close(mixture.posterior_mean(x, 1.0, 0.0), x)
    prior = (mixture.log_weights.exp()[:, None] * mixture.means).sum(0)
    torch.testing.assert_close(mixture.posterior_mean(x, 0.0, 1.0), prior.expand(4, 3))


def test_each_row_has_its_own_noise_level_and_keeps_its_shape_and_type(mixture: GaussianMixture) -> None:
    x = normal(2, 3, 1, 1, seed=6).float()
    alpha, sigma = torch.tensor([0.9, 0.2]), torch.tensor([0.1, 0.8])
    both = mixture.score(x, alpha, sigma)
    assert both.shape == x.shape
    assert both.dtype == torch.float32
    for i in range(2):
        torch.testing.assert_close(both[i : i + 1], mixture.score(x[i : i + 1], float(alpha[i]), float(sigma[i])))


def test_samples_have_the_mixtures_moments(mixture: GaussianMixture) -> None:
    labels = torch.ones(200_000, dtype=torch.int64)
    x = mixture.sample(len(labels), torch.Generator().manual_seed(0), labels)
    weights = torch.tensor([0.2, 0.3], dtype=torch.float64) / 0.5
    means = mixture.means[1:3]
    covariances = mixture.axes @ torch.diag_embed(mixture.spread) @ mixture.axes.mT
    mean = weights @ means
    second = torch.einsum("k,kij->ij", weights, covariances[1:3] + means[:, :, None] * means[:, None, :])
    torch.testing.assert_close(x.mean(0), mean, rtol=0, atol=0.05)
    torch.testing.assert_close(x.T @ x / len(x), second, rtol=0.02, atol=0.1)


# --- ring ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("process", [RectifiedFlow(), TrigFlow(), EDM()])
def test_the_ring_teacher_is_exact_under_every_process(process: RectifiedFlow | TrigFlow | EDM) -> None:
    ring = RingBench()
    labels = torch.tensor([0, 3, 8])
    t = torch.full((3,), 0.4, dtype=torch.float64) * min(process.t_max, 2.0)
    x = normal(3, 2).requires_grad_()
    (expected,) = torch.autograd.grad(ring.mixture.log_density(x, process.alpha(t), process.sigma(t), labels).sum(), x)
    found = ring.exact(process)(x.detach(), t, {LABELS: labels})
    torch.testing.assert_close(found.score.double(), expected, rtol=1e-4, atol=1e-4)


def test_ring_guidance_zero_is_the_unconditional_answer() -> None:
    ring = RingBench()
    teacher = ring.exact(RectifiedFlow())
    x, labels = normal(4, 2), torch.tensor([0, 1, 2, 3])
    free = teacher(x, 0.6, {LABELS: labels}, guidance=0.0).x0
    torch.testing.assert_close(free, teacher(x, 0.6, {LABELS: torch.full((4,), 8)}).x0)
    assert not torch.allclose(free, teacher(x, 0.6, {LABELS: labels}).x0)


def test_ring_teacher_refuses_conditions_it_does_not_know() -> None:
    with pytest.raises(ValueError, match="colour"):
        RingBench().exact(RectifiedFlow())(normal(1, 2), 0.5, {"colour": torch.zeros(1)})


def test_many_teacher_steps_reach_the_ring_and_one_step_does_not() -> None:
    ring = RingBench()
    teacher, labels = ring.exact(RectifiedFlow()), ring.labels(2000)
    x = normal(2000, 2).float()
    one = ring.judge(teacher(x, 1.0, {LABELS: labels}).x0, labels)
    times = torch.linspace(1, 0, 41)
    for t, s in itertools.pairwise(times):
        x = x + (s - t) * teacher(x, t, {LABELS: labels}).v
    many, floor = ring.judge(x, labels), ring.floor_of(2000)
    assert many["ced"] < 3 * floor["ced"]
    assert one["ced"] > 50 * floor["ced"]


def test_ring_scores_of_data_blur_and_mode_drop() -> None:
    ring = RingBench()
    floor = ring.floor_of(4000)
    assert floor["ced"] < 0.0015
    assert floor["std"] == pytest.approx(0.731, abs=0.005)
    assert floor["in_mode"] == pytest.approx(0.989, abs=0.005)
    assert floor["mode_balance"] > 0.4
    data = ring.points(4000, seed=3)
    inner = torch.nn.functional.normalize(data.array, dim=1) * 0.75
    dropped = ring.judge(inner, data.labels)
    assert dropped["mode_balance"] == 0.0
    assert dropped["in_mode"] > 0.9
    assert dropped["ced"] > 20 * floor["ced"]
    assert ring.judge(data.array, data.labels.roll(1))["in_mode"] < 0.05


def test_the_ring_s_students_start_where_their_names_say() -> None:
    ring = RingBench()
    torch.manual_seed(0)
    students = {name: ring.given(student=name)["student"] for name in ("inner", "raw")}
    labels, noise = ring.labels(2000), normal(2000, 2).float()
    with torch.no_grad():
        inner = ring.judge(students["inner"](noise, 1.0, {LABELS: labels}).x0, labels)
        raw = ring.judge(students["raw"](noise, 1.0, {LABELS: labels}).value, labels)
        guess = ring.judge(ring.network()(noise, 1.0, {LABELS: labels}).x0, labels)
    assert (inner["mode_balance"], inner["in_mode"] > 0.95) == (0.0, True)
    assert raw["ced"] == pytest.approx(guess["ced"], rel=0.05)
    with pytest.raises(UserError, match="no student 'outer'"):
        ring.given(student="outer")
    with pytest.raises(UserError, match="not teacher=x"):
        ring.given(student="raw", teacher="x")


# --- extractor ----------------------------------------------------------------------------------------------------
def test_the_shipped_extractor_is_what_its_card_says() -> None:
    extractor = load_extractor(ASSETS / "fashion-extractor")
    assert extractor.card.accuracy >= 0.90
    assert extractor.name == f"fashion@{extractor.card.sha256[:8]}"
    assert not any(p.requires_grad for p in extractor.parameters())
    images = torch.zeros(3, 1, 28, 28, dtype=torch.uint8)
    features = extractor.train()(images)
    assert (features.shape, features.dtype) == ((3, 64), torch.float64)
    assert torch.equal(features[0], features[2])
    for wrong in (images.float(), images[:, :, :27]):
        with pytest.raises(UserError, match="uint8 images"):
            extractor(wrong)


def test_the_shipped_extractor_classifies_the_shipped_sample(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(source, "DEBIAN_FASHION", tmp_path)
    monkeypatch.delenv("STILLROOM_FASHION_DIR", raising=False)
    test = source.load_data("fashion", "test")
    extractor = load_extractor(ASSETS / "fashion-extractor")
    right = extractor.logits(extractor(test.array)).argmax(1) == test.labels
    assert right.double().mean() >= 0.90


def test_a_changed_extractor_file_is_refused(tmp_path: Path) -> None:
    shutil.copytree(ASSETS / "fashion-extractor", tmp_path / "x")
    file = tmp_path / "x" / "model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(bytes(raw))
    with pytest.raises(UserError, match="SHA-256"):
        load_extractor(tmp_path / "x")
    with pytest.raises(UserError, match="no extractor"):
        load_extractor(tmp_path / "nowhere")


def test_training_an_extractor_learns_repeats_and_round_trips(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(300) % 3
    images = torch.randint(0, 60, (300, 1, 28, 28), generator=generator, dtype=torch.uint8)
    for label in range(3):
        images[labels == label, :, 8 * label : 8 * label + 8] += 150
    data = ArrayData(images, {LABELS: labels}, ["top", "middle", "bottom"], "bars")
    state = torch.random.get_rng_state()
    first, second = (train_extractor(data, data, seed=1, epochs=8, batch=32) for _ in range(2))
    assert first.card.accuracy > 0.9
    assert first.name == second.name
    assert torch.equal(torch.random.get_rng_state(), state)
    first.save(tmp_path / "e")
    assert torch.equal(load_extractor(tmp_path / "e")(images), first(images))
    assert json.loads((tmp_path / "e" / "config.json").read_text())["classes"] == ["top", "middle", "bottom"]


# --- fashion ------------------------------------------------------------------------------------------------------
@pytest.fixture
def sample_bench(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> ClassImagesBench:
    """The bench on the shipped sample, so that the test says the same on every machine."""
    monkeypatch.setattr(source, "DEBIAN_FASHION", Path("/nonexistent"))
    monkeypatch.delenv("STILLROOM_FASHION_DIR", raising=False)
    monkeypatch.setenv("STILLROOM_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.setattr(fashion, "NEIGHBOURS", 100)
    return ClassImagesBench()


def test_the_bench_tells_real_from_blurred_and_copied(sample_bench: ClassImagesBench) -> None:
    n = 1000
    floor = sample_bench.floor_of(n)
    real = sample_bench.train.images(slice(0, n))
    labels = sample_bench.train.labels[:n]
    blurred = sample_bench.judge(torch.nn.functional.avg_pool2d(real, 3, 1, 1), labels)
    copied = sample_bench.judge(real, labels)
    assert blurred["fd"] > 10 * floor["fd"]
    assert blurred["recall"] < floor["recall"] / 2
    assert copied["fd"] < 2 * floor["fd"]
    assert copied["nearest_train_pixel"] == 0.0 < copied["nearest_train_pixel_test"]
    called = {score.key: score.name for score in sample_bench.called(1000)}
    assert called["fd"] == f"FD-{sample_bench.extractor.name}, N=1000"
    assert called["class_agreement"] == "Class agreement"
    assert "shipped sample" in copied["reference"]
    assert "FID" not in sample_bench.card(n, {"copies": copied})


def test_wrong_labels_show_in_agreement_alone(sample_bench: ClassImagesBench) -> None:
    images, labels = sample_bench.train.array[:300], sample_bench.train.labels[:300]
    right, wrong = (sample_bench.judge(images, y) for y in (labels, (labels + 1) % 10))
    assert right["class_agreement"] > 0.85
    assert wrong["class_agreement"] < 0.15
    assert right["fd"] == wrong["fd"]


def test_reference_statistics_are_read_back_from_the_cache(
    sample_bench: ClassImagesBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = sample_bench.floor_of(500)
    again = ClassImagesBench()
    monkeypatch.setattr(type(again.extractor), "forward", None)
    assert again.floor_of(500) == first
    assert torch.equal(again.test_features, sample_bench.test_features)


def test_a_damaged_or_unwritable_cache_costs_time_only(
    sample_bench: ClassImagesBench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("STILLROOM_CACHE", str(tmp_path / "c"))
    expected = sample_bench.test_features
    for file in (tmp_path / "c" / "fashion").glob("*.safetensors"):
        file.write_bytes(b"half a fi")
    assert torch.equal(ClassImagesBench().test_features, expected)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("STILLROOM_CACHE", str(tmp_path / "file"))
    assert torch.equal(ClassImagesBench().test_features, expected)


def test_labels_are_balanced_also_in_their_leading_part(sample_bench: ClassImagesBench) -> None:
    labels = sample_bench.labels(1000)
    assert torch.bincount(labels).tolist() == [100] * 10
    assert torch.bincount(labels[:500]).min() > 30


def test_sizes_that_cannot_be_are_refused(sample_bench: ClassImagesBench) -> None:
    assert sample_bench.size(10_000) == 4000
    with pytest.raises(UserError, match="4000"):
        sample_bench.floor_of(10_000)
    with pytest.raises(ValueError, match="every image needs a label, got 10 and 20"):
        sample_bench.judge(torch.zeros(10, 1, 28, 28), torch.zeros(20))


def test_a_folder_gets_an_extractor_of_its_own_once(
    sample_bench: ClassImagesBench, tmp_path: Path, monkeypatch
) -> None:
    import numpy as np

    train = sample_bench.train
    np.savez(tmp_path / "train.npz", images=train.array[:300, 0].numpy(), labels=train.labels[:300].numpy())
    said: list[str] = []
    monkeypatch.setenv("STILLROOM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(fashion, "EXTRACTOR_IMAGES", 1200)
    own = ClassImagesBench(source=tmp_path, report=said.append)
    name = own.extractor.name
    assert name.startswith(f"{tmp_path.name}@")
    assert "training one" in said[0]
    said.clear()
    assert ClassImagesBench(source=tmp_path, report=said.append).extractor.name == name
    assert said == []
