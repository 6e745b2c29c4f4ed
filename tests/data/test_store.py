"""Stores: the same samples are the same bytes, every reader can read them, and nothing bad goes unsaid."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from stillroom.data.captioned_folders import centre_square
from stillroom.data.store import (
    BadShard,
    check_store,
    encode_json,
    encode_png,
    read_manifest,
    read_shard,
    read_store,
    write_shard,
)
from stillroom.errors import UserError
from stillroom.tasks.text_images.data import store_data
from tiny_text_images import tiny_codec, tiny_space, tiny_text
from workers.draw import FEW_CAPTIONS, Samplewise

SHARDS = ["shard-00000.tar", "shard-00001.tar", "shard-00002.tar"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """14 images of 12x12 in three shards."""
    from stillroom.synthesis import synthesize

    folder = tmp_path_factory.mktemp("made") / "store"
    synthesize({"t": Samplewise()}, FEW_CAPTIONS, folder, repeats="redraw", shard_size=6, progress=False)
    return folder


@pytest.fixture
def store(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "store"))


def hush(line: str) -> None:
    raise AssertionError(f"nothing was to be said, but: {line}")


# --- format -----------------------------------------------------------------------------------------------------------
def test_what_is_written_is_read(store: Path) -> None:
    images, captions, records = read_store(store, report=hush)
    assert images.dtype == torch.uint8
    assert images.shape == (14, 3, 12, 12)
    assert captions == FEW_CAPTIONS
    for image, record in zip(images, records, strict=True):
        drawn = Samplewise().sample_each([record["caption"]], [record["draw_seed"]])[0]
        assert torch.equal(image, ((drawn + 1) * 127.5).round().to(torch.uint8))


def test_the_same_samples_are_the_same_bytes(tmp_path: Path) -> None:
    png = encode_png(torch.arange(48, dtype=torch.uint8).reshape(3, 4, 4))
    samples = [(f"{i:09d}", png, encode_json({"b": 1, "a": "ü", "c": i})) for i in range(3)]
    first = write_shard(tmp_path / "a.tar", samples, tmp_path / "aside")
    os.utime(tmp_path / "a.tar", (0, 0))
    second = write_shard(tmp_path / "b.tar", iter(samples), tmp_path / "aside")
    assert first == second
    assert first["sha256"] == hashlib.sha256((tmp_path / "b.tar").read_bytes()).hexdigest()
    assert (first["count"], first["bytes"]) == (3, (tmp_path / "a.tar").stat().st_size)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar", "b.tar"]
    with tarfile.open(tmp_path / "a.tar") as tar:
        members = tar.getmembers()
    assert [member.name for member in members[:3]] == ["000000000.png", "000000000.json", "000000001.png"]
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {(0, 0, 0, "", "", 0o644)}
    with (tmp_path / "a.tar").open("rb") as file:
        assert list(read_shard(file)) == samples


def test_records_hold_no_nan() -> None:
    with pytest.raises(ValueError, match="Out of range float values"):
        encode_json({"score": float("nan")})


def test_a_shard_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    def broken() -> Any:
        yield "000000000", b"png", b"{}"
        raise RuntimeError

    write_shard(tmp_path / "s.tar", [], tmp_path / "aside")
    before = (tmp_path / "s.tar").read_bytes()
    with pytest.raises(RuntimeError):
        write_shard(tmp_path / "s.tar", broken(), tmp_path / "aside")
    assert (tmp_path / "s.tar").read_bytes() == before


def test_hugging_face_datasets_reads_it(store: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    images, captions, records = read_store(store)
    whole = datasets.load_dataset(str(store), split="train", cache_dir=str(tmp_path / "cache"))
    assert [row["caption"] for row in whole["json"]] == captions
    stream = datasets.load_dataset(str(store), split="train", streaming=True)
    named = datasets.load_dataset(
        "webdataset", data_files=str(store / "shard-*.tar"), split="train", cache_dir=str(tmp_path / "cache")
    )
    for rows in (whole, stream, named):
        for image, record, row in zip(images, records, rows, strict=True):
            assert row["json"] == record
            assert np.array_equal(np.asarray(row["png"]), image.permute(1, 2, 0).numpy())


def test_webdataset_reads_it(store: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    images, _, records = read_store(store)
    rows = webdataset.WebDataset([str(store / name) for name in SHARDS], shardshuffle=False).decode("rgb8")
    for image, record, row in zip(images, records, rows, strict=True):
        assert row["json"] == record
        assert np.array_equal(row["png"], image.permute(1, 2, 0).numpy())


def test_reading_runs_no_pickle_and_unpacks_nothing(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("pickle.loads", "pickle.load", "torch.load", "tarfile.TarFile.extract", "tarfile.TarFile.extractall"):
        monkeypatch.setattr(name, None)
    before = sorted(path for path in store.parent.rglob("*"))
    read_store(store)
    assert sorted(path for path in store.parent.rglob("*")) == before


# --- bad shards -------------------------------------------------------------------------------------------------------
def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (Path.unlink, "it is missing"),
    "a flipped bit": (flip, "it does not match its checksum"),
    "cut short": (lambda path: os.truncate(path, 700), "it does not match its checksum"),
    "empty": (lambda path: path.write_bytes(b""), "it does not match its checksum"),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), "it is missing"),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_bad_shard_is_refused_or_skipped_with_a_word_about_it(store: Path, how: str) -> None:
    damage, reason = DAMAGE[how]
    damage(store / SHARDS[1])
    with pytest.raises(UserError) as refused:
        read_store(store)
    what = f"store {store}: 1 of 3 shards are bad, with 6 of 14 samples ({SHARDS[1]}: {reason})"
    assert str(refused.value) == f"{what}; restore them from a copy, or leave them out with on_corrupt=skip"
    said: list[str] = []
    images, captions, _ = read_store(store, on_corrupt="skip", report=said.append)
    assert said == [f"skipped: {what}"]
    assert captions == FEW_CAPTIONS[:6] + FEW_CAPTIONS[12:]
    assert len(images) == 8


def test_every_bad_shard_is_named(store: Path) -> None:
    flip(store / SHARDS[0])
    (store / SHARDS[2]).unlink()
    with pytest.raises(UserError, match=rf"2 of 3 shards are bad, with 8 of 14 samples \({SHARDS[0]}.*; {SHARDS[2]}"):
        read_store(store)
    manifest, good = check_store(store, "skip", lambda line: None)
    assert good == [SHARDS[1]]
    assert manifest["count"] == 14


def test_when_all_shards_are_bad_nothing_is_left(store: Path) -> None:
    for name in SHARDS:
        (store / name).unlink()
    with pytest.raises(UserError, match="has no readable samples"):
        read_store(store, on_corrupt="skip", report=lambda line: None)


def test_an_unknown_way_with_bad_shards_is_an_error(store: Path) -> None:
    with pytest.raises(UserError, match=r"on_corrupt is 'skp' \(did you mean 'skip'\?\)"):
        read_store(store, on_corrupt="skp")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: shutil.rmtree(f), "store .* does not exist"),
        (lambda f: (f / "manifest.json").unlink(), "is no store: it has no manifest.json"),
        (lambda f: ((f / "manifest.json").unlink(), (f / ".synthesis").mkdir()), "is unfinished; finish it"),
        (lambda f: (f / "manifest.json").write_text("{"), "manifest.json is damaged"),
        (lambda f: (f / "manifest.json").write_text("[]"), "manifest.json is damaged"),
        (lambda f: edit(f, format=99), "has the format 99; this version reads 1"),
        (lambda f: edit(f, count=13), "manifest.json is damaged"),
        (lambda f: edit(f, size=[12]), "manifest.json is damaged"),
        (lambda f: edit(f, size=[0, 12]), "manifest.json is damaged"),
        (lambda f: edit(f, shards={}), "manifest.json is damaged"),
        (lambda f: move(f, "../shard-00000.tar"), "manifest.json is damaged"),
        (lambda f: move(f, "/etc/passwd"), "manifest.json is damaged"),
    ],
)
def test_what_is_no_whole_store_is_refused(store: Path, change: Callable[[Path], Any], message: str) -> None:
    change(store)
    for way in ("refuse", "skip"):
        with pytest.raises(UserError, match=message):
            read_store(store, on_corrupt=way)  # type: ignore[arg-type]


def edit(folder: Path, **values: Any) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def move(folder: Path, name: str) -> None:
    shards = json.loads((folder / "manifest.json").read_text())["shards"]
    edit(folder, shards={name if old == SHARDS[0] else old: entry for old, entry in shards.items()})


# --- tar files made to do harm ----------------------------------------------------------------------------------------
def tar_of(*members: tuple[str, bytes] | tarfile.TarInfo) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                tar.addfile(info, io.BytesIO(member[1]))
    return buffer.getvalue()


def link(name: str, target: str, kind: bytes) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def png(size: tuple[int, int] = (12, 12), mode: str = "RGB", kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, kind)
    return buffer.getvalue()


RECORD = b'{"caption": "a"}'
HARM = {
    "a path upwards": tar_of(("../000000000.png", png()), ("../000000000.json", RECORD)),
    "an absolute path": tar_of(("/000000000.png", png()), ("/000000000.json", RECORD)),
    "another name": tar_of(("run.sh", b"rm -rf /")),
    "a symbolic link": tar_of(link("000000000.png", "/etc/passwd", tarfile.SYMTYPE), ("000000000.json", RECORD)),
    "a hard link": tar_of(link("000000000.png", "/etc/passwd", tarfile.LNKTYPE), ("000000000.json", RECORD)),
    "a device": tar_of(link("000000000.png", "", tarfile.CHRTYPE), ("000000000.json", RECORD)),
    "a folder": tar_of(link("000000000.png", "", tarfile.DIRTYPE), ("000000000.json", RECORD)),
    "no record": tar_of(("000000000.png", png())),
    "no image": tar_of(("000000000.json", RECORD)),
    "another's record": tar_of(("000000000.png", png()), ("000000001.json", RECORD)),
    "an image twice": tar_of(("000000000.png", png()), ("000000000.png", png()), ("000000000.json", RECORD)),
    "no tar": b"this is no tar file" * 100,
}
CONTENT = {
    "no picture": (b"GIF89a", RECORD),
    "a picture of another kind": (png(kind="BMP"), RECORD),
    "a larger picture": (png((13, 12)), RECORD),
    "a grey picture": (png(mode="L"), RECORD),
    "a cut picture": (png()[:-30], RECORD),
    "no JSON": (png(), b"{"),
    "no caption": (png(), b'{"text": "a"}'),
    "a caption that is none": (png(), b'{"caption": 3}'),
    "a list": (png(), b"[1]"),
}  # fmt: skip


@pytest.mark.parametrize("harm", HARM)
def test_a_tar_file_made_to_do_harm_is_no_shard(harm: str) -> None:
    with pytest.raises(BadShard):
        list(read_shard(io.BytesIO(HARM[harm])))


def test_a_sparse_file_is_no_sample(tmp_path: Path) -> None:
    """A few bytes that claim to be a gigabyte of zeros."""
    info = tarfile.TarInfo("000000000.png")
    info.type, info.size = tarfile.GNUTYPE_SPARSE, 0
    raw = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    raw[386:398], raw[398:410] = b"00000000000\0", b"00000000000\0"
    raw[483:495] = b"10000000000\0"
    raw[148:156] = b" " * 8
    raw[148:156] = b"%06o\0 " % sum(raw[:512])
    with pytest.raises(BadShard, match="which is no sample"):
        list(read_shard(io.BytesIO(bytes(raw) + b"\0" * 1024)))


@pytest.mark.parametrize("case", [*HARM, *CONTENT])
def test_a_bad_shard_with_a_right_checksum_is_refused_and_named(store: Path, case: str) -> None:
    if case in CONTENT:
        image, record = CONTENT[case]
        data = tar_of(
            ("000000000.png", png()), ("000000000.json", RECORD), ("1" * 9 + ".png", image), ("1" * 9 + ".json", record)
        )
    else:
        data = HARM[case]
    (store / SHARDS[0]).write_bytes(data)
    manifest = json.loads((store / "manifest.json").read_text())
    manifest["shards"][SHARDS[0]] |= {"sha256": hashlib.sha256(data).hexdigest(), "count": 2}
    edit(store, shards=manifest["shards"], count=10)
    with pytest.raises(UserError, match=rf"{SHARDS[0]} cannot be used: "):
        read_store(store)


def test_a_shard_with_too_few_samples_is_refused(store: Path) -> None:
    manifest = json.loads((store / "manifest.json").read_text())
    manifest["shards"][SHARDS[0]]["count"] += 1
    edit(store, shards=manifest["shards"], count=15)
    with pytest.raises(UserError, match=f"{SHARDS[0]} cannot be used: it holds 6 samples"):
        read_store(store)


# --- for training -----------------------------------------------------------------------------------------------------
class Counting:
    """A space that counts what it is asked to encode."""

    def __init__(self) -> None:
        torch.manual_seed(1)
        self.space = tiny_space((12, 12))
        self.images, self.texts = 0, 0
        moments, encode = self.space.codec.moments, self.space.text.encode

        def counted_moments(images: torch.Tensor, *more: Any) -> Any:
            self.images += len(images)
            return moments(images, *more)

        def counted_encode(captions: Any, *more: Any) -> Any:
            self.texts += len(captions)
            return encode(captions, *more)

        object.__setattr__(self.space.codec, "moments", counted_moments)
        object.__setattr__(self.space.text, "encode", counted_encode)


def test_latents_and_text_features_are_those_of_the_space(store: Path) -> None:
    counting = Counting()
    data = store_data(store, counting.space, cache=False, report=hush)
    images, captions, _ = read_store(store)
    mean, std = counting.space.codec.moments(images.float().div(127.5).sub(1.0))
    assert data.shape == (2, 6, 6)
    assert data.n == 14
    assert data.std is not None
    assert torch.equal(data.mean, mean.half())
    assert torch.equal(data.std, std.half())
    assert data.mirrored is None
    assert [data.captions[which] for which in data.which.tolist()] == captions
    assert len(data.captions) == 5
    assert data.origin == "store: 14 images"
    batch = data.batch(seed=3, step=1, size=4)
    text = counting.space.text.encode([captions[i] for i in batch["index"].tolist()])
    assert torch.allclose(batch["cond"]["encoder_hidden_states"], text["encoder_hidden_states"], atol=2e-3)
    assert not list(store.glob("**/*.safetensors"))


def test_a_smaller_version_is_a_part(store: Path) -> None:
    counting = Counting()
    data = store_data(store, counting.space, sizes={"small": 8, "tiny": 4}, mirror=True, report=hush)
    assert {name: part.shape for name, part in data.parts.items()} == {"small": (2, 4, 4), "tiny": (2, 2, 2)}
    images, captions, _ = read_store(store)
    scaled = centre_square(images.float().div(127.5).sub(1.0), 8)
    levels = ((scaled + 1) * 127.5).round() / 127.5 - 1
    small = data.parts["small"]
    assert small.mirrored is not None
    assert torch.allclose(small.mean.float(), counting.space.codec.moments(levels)[0], atol=2e-3)
    assert torch.allclose(small.mirrored.float(), counting.space.codec.moments(levels.flip(-1))[0], atol=2e-3)
    assert [small.caption_of(i) for i in range(14)] == captions
    assert store_data(store, counting.space, sizes=8, mirror=True).parts["small"].fingerprint == small.fingerprint


def test_the_second_run_encodes_nothing(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Counting()
    data = store_data(store, first.space, sizes=8, report=hush)
    assert (first.images, first.texts) == (28, 10)
    with monkeypatch.context() as patch:
        patch.setattr("stillroom.data.store._read", hush)  # not even the images are read
        second = Counting()
        again = store_data(store, second.space, sizes=8, report=hush)
    assert (second.images, second.texts) == (0, 0)
    assert again.fingerprint == data.fingerprint
    assert again.parts["small"].fingerprint == data.parts["small"].fingerprint
    assert {path.suffix for path in (store / "cache").iterdir()} == {".safetensors", ".sha256"}


def other_codec(space: Any) -> None:
    torch.manual_seed(2)
    space.codec = tiny_codec()


def other_text(space: Any) -> None:
    torch.manual_seed(2)
    space.text = tiny_text()


@pytest.mark.parametrize("change", [other_codec, other_text, lambda space: setattr(space, "text", tiny_text(length=9))])
def test_another_space_has_a_cache_of_its_own(store: Path, change: Callable[[Any], None]) -> None:
    space = Counting().space
    first = store_data(store, space)
    change(space)
    assert store_data(store, space).fingerprint != first.fingerprint
    assert len(list((store / "cache").glob("*.safetensors"))) == 2


def test_another_store_and_other_settings_have_caches_of_their_own(store: Path, tmp_path: Path) -> None:
    from stillroom.synthesis import synthesize

    space = Counting().space
    shelf = tmp_path / "shelf"
    store_data(store, space, cache=shelf)
    store_data(store, space, cache=shelf, mirror=True)
    synthesize({"t": Samplewise()}, FEW_CAPTIONS, tmp_path / "other", shard_size=6, progress=False)
    store_data(tmp_path / "other", space, cache=shelf)
    (store / SHARDS[1]).unlink()
    said: list[str] = []
    data = store_data(store, space, cache=shelf, on_corrupt="skip", report=said.append)
    assert data.origin == "store: 8 images (6 more in bad shards)"
    assert data.n == 8
    assert len(said) == 1
    assert len(list(shelf.glob("*.safetensors"))) == 4
    assert not (store / "cache").exists()


@pytest.mark.parametrize("how", ["flip", "cut", "no sum"])
def test_a_damaged_cache_is_made_again(store: Path, how: str) -> None:
    whole = store_data(store, Counting().space)
    (file,) = (store / "cache").glob("*.safetensors")
    if how == "flip":
        flip(file)
    elif how == "cut":
        os.truncate(file, 100)
    else:
        file.with_suffix(".sha256").unlink()
    counting = Counting()
    assert store_data(store, counting.space).fingerprint == whole.fingerprint
    assert counting.images == 14
    third = Counting()
    store_data(store, third.space)
    assert third.images == 0


def test_a_cache_that_cannot_be_written_costs_time_only(store: Path) -> None:
    (store / "cache").write_text("in the way")
    said: list[str] = []
    assert store_data(store, Counting().space, report=said.append).n == 14
    assert len(said) == 1
    assert "cannot be written" in said[0]
    assert "encoded again next time" in said[0]


def test_a_bad_shard_is_noticed_though_its_latents_are_cached(store: Path) -> None:
    space = Counting().space
    store_data(store, space)
    flip(store / SHARDS[0])
    with pytest.raises(UserError, match="1 of 3 shards are bad"):
        store_data(store, space)


def test_what_does_not_fit_the_space_is_refused(store: Path, tmp_path: Path) -> None:
    from stillroom.synthesis import synthesize

    space = Counting().space
    with pytest.raises(UserError, match="7x7 pixels do not divide"):
        store_data(store, space, sizes=7)
    synthesize({"t": Samplewise()}, ["a green dog"], tmp_path / "dogs", progress=False)
    with pytest.raises(UserError, match="green"):
        store_data(tmp_path / "dogs", space)


def test_a_manifest_says_what_the_store_holds(made: Path) -> None:
    manifest = read_manifest(made)
    assert manifest["count"] == 14
    assert manifest["size"] == [12, 12]
    assert manifest["plan"]["seeds"] == [0]
    assert {name: entry["count"] for name, entry in manifest["shards"].items()} == dict(
        zip(SHARDS, (6, 6, 2), strict=True)
    )
    card = (made / "README.md").read_text()
    assert card.startswith("---\n")
    assert "14 images of 12x12" in card
    assert "`readable` (at least 1): 0 dropped" in card
