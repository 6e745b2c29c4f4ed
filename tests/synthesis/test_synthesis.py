"""Synthesis: what is drawn depends on the plan alone, whoever draws it and however often it is interrupted."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from stillroom import cli
from stillroom.data.captioned_folders import FolderTeacher, check_caption, read_captions
from stillroom.data.source import ASSETS
from stillroom.data.store import read_store
from stillroom.errors import UserError
from stillroom.evaluation import filters as filter_module
from stillroom.evaluation.filters import Dedup, Filter, difference_hash, filters, make_filters, register_filter
from stillroom.synthesis import plan_hash, synthesize
from stillroom.synthesis.plan import make_plan
from stillroom.synthesis.teachers import PipelineTeacher, Teacher, draw_seed
from workers.draw import CAPTIONS, SETTINGS, SIZE, Batchwise, Samplewise, draw, noise

WORKERS = Path(__file__).parents[1] / "workers"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("straight") / "store"
    draw(folder)
    return folder


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("short") / "store"
    draw(folder, captions=CAPTIONS[:10])
    return folder


# --- what is drawn ----------------------------------------------------------------------------------------------------
def test_every_caption_teacher_and_seed_is_drawn_once(straight: Path) -> None:
    _, captions, records = read_store(straight)
    kept = {(r["caption"], r["teacher"], r["seed"]) for r in records}
    assert len(kept) == len(records)
    dropped = [json.loads(line) for line in (straight / "dropped.jsonl").read_text().splitlines()]
    gone = {(r["caption"], r["teacher"], r["seed"]) for r in dropped}
    assert not kept & gone
    assert kept | gone == {(c, t, s) for c in CAPTIONS for t in ("batchwise", "samplewise") for s in (0, 1)}
    assert captions == [r["caption"] for r in records]


def test_filters_drop_what_they_should_and_say_so(straight: Path) -> None:
    dropped = [json.loads(line) for line in (straight / "dropped.jsonl").read_text().splitlines()]
    flat = {(c, s) for c in CAPTIONS if c[-1] in "78" for s in (0, 1)}
    assert {(r["caption"], r["seed"]) for r in dropped if r["filter"] == "readable"} == flat
    assert {r["score"] for r in dropped if r["filter"] == "readable"} == {0.0, -1.0}
    alike = [(c, s) for c in CAPTIONS if c[-1] in "34" for s in (0, 1)]
    assert [(r["caption"], r["seed"]) for r in dropped if r["filter"] == "dedup"] == alike[1:]  # the first one stays
    manifest = json.loads((straight / "manifest.json").read_text())
    assert manifest["dropped"]["readable"] == {"batchwise": len(flat), "samplewise": 0}
    assert manifest["dropped"]["dedup"] == {"batchwise": 0, "samplewise": len(alike) - 1}
    assert manifest["planned"] == {"batchwise": 80, "samplewise": 80}
    assert manifest["kept"] == {"batchwise": 80 - len(flat), "samplewise": 80 - len(alike) + 1}
    assert manifest["count"] == sum(entry["count"] for entry in manifest["shards"].values())


def test_provenance_is_enough_to_draw_an_image_again(straight: Path) -> None:
    images, _, records = read_store(straight)
    rows = {name: [i for i, r in enumerate(records) if r["teacher"] == name] for name in ("batchwise", "samplewise")}
    for name, row in (("batchwise", rows["batchwise"][5]), ("samplewise", rows["samplewise"][9])):
        record = records[row]
        if name == "batchwise":
            again = noise(record["draw_seed"], record["draw_row"] + 1)[-1:]
        else:
            again = Samplewise().sample_each([record["caption"]], [record["draw_seed"]])
        assert torch.equal(((again + 1) * 127.5).round().to(torch.uint8)[0], images[row])
    assert json.loads(records[rows["batchwise"][0]]["sampler"]) == {"guidance": 2.0}
    assert records[rows["batchwise"][0]]["weights"] == "b" * 16
    assert records[rows["samplewise"][0]]["scores"]["readable"] > 200


def test_seeds_differ_between_captions_seeds_teachers_and_batches(straight: Path) -> None:
    _, _, records = read_store(straight)
    each = [r["draw_seed"] for r in records if r["teacher"] == "samplewise"]
    assert len(set(each)) == len(each)
    batches = Counter(r["draw_seed"] for r in records if r["teacher"] == "batchwise")
    assert max(batches.values()) <= SETTINGS["batch"]
    assert draw_seed("a", [("x", 0)]) != draw_seed("b", [("x", 0)])


def test_a_sample_with_its_own_seed_depends_on_nothing_else(tmp_path: Path) -> None:
    """The same caption and seed in another plan, batch and shard gives the same image."""
    one = synthesize({"t": Samplewise()}, CAPTIONS[:9], tmp_path / "a", batch=2, shard_size=4, progress=False)
    two = synthesize({"t": Samplewise()}, CAPTIONS[5:20], tmp_path / "b", batch=7, shard_size=50, progress=False)
    assert one.drawn == 9
    assert two.drawn == 15
    first, second = read_store(tmp_path / "a"), read_store(tmp_path / "b")
    shared = [c for c in first.captions if c in second.captions]
    assert len(shared) == 4
    for caption in shared:
        here, there = first.captions.index(caption), second.captions.index(caption)
        assert torch.equal(first.images[here], second.images[there])


# --- routes and repeats -----------------------------------------------------------------------------------------------
def planned(captions: Sequence[str], **settings: Any) -> list[tuple[str, str, int]]:
    teachers = {name: Teacher(name, Samplewise()) for name in ("a", "b")}
    return [(item.caption, item.teacher, item.seed) for item in make_plan(teachers, captions, **settings).items]


def test_route_one_sends_a_caption_to_the_same_teacher_whatever_else_is_asked() -> None:
    sent = {caption: teacher for caption, teacher, _ in planned(CAPTIONS, route="one")}
    assert len(sent) == len(CAPTIONS)
    assert {teacher for _, teacher, _ in planned(CAPTIONS, route="one")} == {"a", "b"}
    for caption, teacher, _ in planned(CAPTIONS[10:3:-1], route="one", seeds=(4, 2)):
        assert sent[caption] == teacher


def test_round_robin_takes_turns_and_all_takes_all() -> None:
    assert [teacher for _, teacher, _ in planned(CAPTIONS[:4], route="round-robin")] == ["a", "b", "a", "b"]
    assert planned(["x"], route="all", seeds=(1, 3)) == [("x", "a", 1), ("x", "a", 3), ("x", "b", 1), ("x", "b", 3)]


def test_a_route_of_ones_own() -> None:
    route: Callable[[str, Sequence[str]], str] = lambda caption, names: names[-1] if "3" in caption else names[0]  # noqa: E731
    sent = planned(CAPTIONS[:5], route=route)
    assert [teacher for _, teacher, _ in sent] == ["a", "a", "a", "b", "a"]
    with pytest.raises(UserError, match="the route sends 'x' to 'c'; choose one of a, b"):
        planned(["x"], route=lambda caption, names: "c")


def test_repeated_captions_and_seeds_are_drawn_once_or_with_further_seeds() -> None:
    assert planned(["x", "y", "x ", "x"], route="round-robin", seeds=(0, 0)) == [("x", "a", 0), ("y", "b", 0)]
    again = planned(["x", "x", "x"], route="all", seeds=(0, 5), repeats="redraw")
    assert len(set(again)) == len(again) == 12
    assert {seed for _, _, seed in again} == {0, 5, 6, 11, 12, 17}
    plan = make_plan({"a": Teacher("a", Samplewise())}, ["x", "x", "x"])
    assert plan.repeated == 2


def test_scenes_captions_that_repeat_are_drawn_again() -> None:
    plan = make_plan({"a": Teacher("a", Samplewise())}, "scenes:400")
    assert len(plan.items) == 400
    assert len({item.caption for item in plan.items}) < 400
    assert len({(item.caption, item.seed) for item in plan.items}) == 400
    assert [i.caption for i in make_plan({"a": Teacher("a", Samplewise())}, "scenes:30").items] == [
        item.caption for item in plan.items[:30]
    ]


def test_captions_that_were_read_before_are_taken_as_they_are() -> None:
    read = read_captions("scenes:400", seed=2)
    cut = read._replace(texts=read.texts[:300])
    plan = make_plan({"a": Teacher("a", Samplewise())}, cut)
    assert [item.caption for item in plan.items] == read.texts[:300]
    assert plan.settings["repeats"] == "redraw"


# --- resuming ---------------------------------------------------------------------------------------------------------
class Died(BaseException):
    pass


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize(
    ("name", "moments"),
    [
        ("os.replace", lambda start: start % 5 + 1),  # the plan, then shards and notes in turn
        ("tarfile.TarFile.addfile", lambda start: 1 + 17 * start),
        ("shutil.rmtree", lambda start: start + 1),
        ("pathlib.Path.unlink", lambda start: start + 1),
    ],
)
def test_cut_off_at_every_step_the_store_is_the_same_in_the_end(
    tmp_path: Path, short: Path, monkeypatch: pytest.MonkeyPatch, name: str, after: bool, moments: Any
) -> None:
    """The process dies at its n-th rename (or the like), just before or just after it, and is started again with
    another n each time, until it gets to the end."""
    place, _, function = name.rpartition(".")
    target = {"tarfile.TarFile": tarfile.TarFile, "pathlib.Path": Path}.get(place) or sys.modules[place]
    real = getattr(target, function)
    deaths = 0
    for start in range(200):
        calls, moment = 0, moments(start)

        def dying(*arguments: Any, moment: int = moment, **named: Any) -> Any:
            nonlocal calls
            calls += 1
            fatal = calls == moment
            if fatal and not after:
                raise Died
            result = real(*arguments, **named)
            if fatal:
                raise Died
            return result

        with monkeypatch.context() as patch:
            patch.setattr(target, function, dying)
            try:
                draw(tmp_path / "store", resume=True, captions=CAPTIONS[:10])
                break
            except Died:
                deaths += 1
    assert deaths > 0 or function == "unlink"
    # once more: clears away what a death in the very last step leaves
    draw(tmp_path / "store", resume=True, captions=CAPTIONS[:10])
    assert contents(tmp_path / "store") == contents(short)


def test_a_finished_store_is_left_alone(tmp_path: Path, straight: Path) -> None:
    shutil.copytree(straight, tmp_path / "store")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "store").iterdir()}
    for resume in (False, True):
        made = draw(tmp_path / "store", resume=resume)
        assert made.drawn == 0
        assert sum(made.kept.values()) == len(read_store(straight).captions)
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "store").iterdir()}


def stop_after(batches: int) -> Any:
    class Stopping(Batchwise):
        def sample(self, captions: list[str], seed: int) -> Tensor:
            if self.calls == batches:
                raise Died
            return super().sample(captions, seed)

    return Stopping()


def test_only_the_shards_that_are_missing_are_drawn_again(tmp_path: Path) -> None:
    half = stop_after(5)
    settings: dict[str, Any] = {"shard_size": 8, "batch": 4, "progress": False}
    with pytest.raises(Died):
        synthesize({"batchwise": half}, CAPTIONS, tmp_path / "store", **settings)
    assert len(list((tmp_path / "store").glob("shard-*.tar"))) == 2
    teacher = Batchwise()
    made = synthesize({"batchwise": teacher}, CAPTIONS, tmp_path / "store", resume=True, **settings)
    assert teacher.calls == 6
    assert made.drawn == 24
    assert sum(made.planned.values()) == 40


@pytest.mark.parametrize("how", ["flip", "cut", "missing", "note"])
def test_a_shard_that_was_damaged_meanwhile_is_drawn_again(tmp_path: Path, how: str) -> None:
    settings: dict[str, Any] = {"shard_size": 8, "batch": 4, "progress": False}
    synthesize({"batchwise": Batchwise()}, CAPTIONS, tmp_path / "whole", **settings)
    with pytest.raises(Died):
        synthesize({"batchwise": stop_after(7)}, CAPTIONS, tmp_path / "store", **settings)
    shard, note = tmp_path / "store/shard-00001.tar", tmp_path / "store/.synthesis/shard-00001.tar.json"
    if how == "flip":
        data = bytearray(shard.read_bytes())
        data[700] ^= 1
        shard.write_bytes(data)
    elif how == "cut":
        os.truncate(shard, 512)
    elif how == "missing":
        shard.unlink()
    else:
        note.write_text('{"entry"')
    synthesize({"batchwise": Batchwise()}, CAPTIONS, tmp_path / "store", resume=True, **settings)
    assert contents(tmp_path / "store") == contents(tmp_path / "whole")


def test_ctrl_c_keeps_the_finished_shards(tmp_path: Path) -> None:
    class Pressed(Batchwise):
        def sample(self, captions: list[str], seed: int) -> Tensor:
            if self.calls == 5:
                signal.raise_signal(signal.SIGINT)
            return super().sample(captions, seed)

    settings: dict[str, Any] = {"shard_size": 8, "batch": 4, "progress": False}
    with pytest.raises(KeyboardInterrupt, match="carry on with --resume"):
        synthesize({"batchwise": Pressed()}, CAPTIONS, tmp_path / "store", **settings)
    assert len(list((tmp_path / "store").glob("shard-*.tar"))) == 2
    with pytest.raises(UserError, match="is unfinished; finish it"):
        read_store(tmp_path / "store")


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}


@pytest.mark.parametrize("kills", [5, pytest.param(60, marks=[pytest.mark.slow, pytest.mark.timeout(900)])])
def test_killed_at_random_moments_the_store_is_the_same_in_the_end(tmp_path: Path, short: Path, kills: int) -> None:
    """kill -9 of a process that makes the store, again and again, until enough were killed and the store is whole."""
    processes, moments, killed, stores = multiprocessing.get_context("fork"), random.Random(0), 0, 0
    settings = {"resume": True, "captions": CAPTIONS[:10], "wait": 0.01}
    began = time.monotonic()
    draw(tmp_path / "timed", **settings)
    usual = time.monotonic() - began
    while killed < kills:
        store = tmp_path / f"store-{stores}"
        stores += 1
        while True:
            worker = processes.Process(target=draw, args=(store,), kwargs=settings)
            worker.start()
            worker.join(moments.uniform(0.0, 0.7 * usual))
            if worker.is_alive():
                worker.kill()
                killed += 1
            worker.join()
            if worker.exitcode == 0:
                break
            assert worker.exitcode == -signal.SIGKILL
        draw(store, **settings)  # once more: clears away what a death in the very last step leaves
        assert contents(store) == contents(short)
    print(f"{killed} kills, {stores} stores")


def test_two_processes_make_what_one_makes(tmp_path: Path, straight: Path) -> None:
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", WORKERS / "draw.py",
            tmp_path / "store",
        ],
        env=environment(), capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert contents(tmp_path / "store") == contents(straight)


def test_ranks_share_the_shards_evenly(tmp_path: Path) -> None:
    """Each rank draws only its own: the first rank's call, alone, leaves the others' shards undone."""
    from stillroom.engine.distributed import World
    from stillroom.synthesis import execution

    plan = make_plan({"t": Teacher("t", Samplewise())}, CAPTIONS, shard_size=10)
    for rank, numbers in ((0, {0, 2}), (1, {1, 3})):
        out = tmp_path / str(rank)
        (out / ".synthesis").mkdir(parents=True)
        assert execution._make_shards(plan, out, World(rank, 2), progress=False) == 20
        assert {path.name for path in out.glob("*.tar")} == {f"shard-{n:05d}.tar" for n in numbers}


# --- folders of images ------------------------------------------------------------------------------------------------
def picture(file: Path, value: int, size: tuple[int, int] = (SIZE, SIZE)) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(value)
    Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(file)


def pairs(folder: Path, captions: Sequence[str], metadata: str = "") -> Path:
    for number, caption in enumerate(captions):
        picture(folder / f"{number}.png", number)
        if not metadata:
            (folder / f"{number}.txt").write_text(caption + "\n")
    rows = [{"file_name": f"{number}.png", "text": caption} for number, caption in enumerate(captions)]
    if metadata == "metadata.jsonl":
        (folder / metadata).write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif metadata:
        (folder / metadata).write_text("file_name,text\n" + "".join(f'{r["file_name"]},"{r["text"]}"\n' for r in rows))
    return folder


@pytest.mark.parametrize("metadata", ["", "metadata.jsonl", "metadata.csv"])
def test_a_folder_of_images_is_a_teacher(tmp_path: Path, metadata: str) -> None:
    folder = pairs(tmp_path / "images", ["a dog, brown", "a cat", "a dog, brown", "a fish"], metadata)
    made = synthesize({"mine": folder}, None, tmp_path / "store", progress=False)
    assert made.kept == {"mine": 4}
    images, captions, records = read_store(tmp_path / "store")
    assert captions == ["a dog, brown", "a dog, brown", "a cat", "a fish"]
    assert [record["source"] for record in records] == ["0.png", "2.png", "1.png", "3.png"]
    for image, record in zip(images, records, strict=True):
        stored = np.asarray(Image.open(folder / record["source"]))
        assert np.array_equal(image.permute(1, 2, 0).numpy(), stored)  # not a level is changed on the way


def test_what_a_folder_leaves_out_is_told(tmp_path: Path) -> None:
    folder, told = pairs(tmp_path / "images", ["a dog"]), []
    (folder / "1.heic").write_bytes(b"x")
    synthesize({"mine": folder}, None, tmp_path / "store", progress=False, report=told.append)
    assert told[0] == f"images of {folder} (left out: 1 file: 1 .heic)"


def test_folders_and_models_together(tmp_path: Path) -> None:
    pairs(tmp_path / "images", ["a dog", "a cat"])
    teachers = {"mine": tmp_path / "images", "model": Samplewise()}
    synthesize(teachers, ["a dog", "a bird"], tmp_path / "store", route="all", progress=False)
    _, captions, records = read_store(tmp_path / "store")
    assert [(c, r["teacher"]) for c, r in zip(captions, records, strict=True)] == [
        ("a dog", "mine"), ("a dog", "model"), ("a bird", "model")
    ]  # fmt: skip
    with pytest.raises(UserError, match="caption 2: no teacher has an image of 'a bird'"):
        synthesize({"mine": tmp_path / "images"}, ["a dog", "a bird"], tmp_path / "other", progress=False)
    assert not (tmp_path / "other").exists()


def test_a_folders_fingerprint_follows_its_images_and_captions(tmp_path: Path) -> None:
    first = FolderTeacher(pairs(tmp_path / "images", ["a dog", "a cat"])).fingerprint
    assert FolderTeacher(tmp_path / "images").fingerprint == first
    picture(tmp_path / "images/1.png", 99)
    second = FolderTeacher(tmp_path / "images").fingerprint
    (tmp_path / "images/1.txt").write_text("a cow")
    assert len({first, second, FolderTeacher(tmp_path / "images").fingerprint}) == 3


def test_images_of_several_sizes_need_a_size(tmp_path: Path) -> None:
    pairs(tmp_path / "images", ["a dog", "a cat"])
    picture(tmp_path / "images/1.png", 1, (30, 20))
    with pytest.raises(UserError, match=r"1.png is 20x30, other images are 12x12; give a size"):
        synthesize({"mine": tmp_path / "images"}, None, tmp_path / "store", progress=False)
    synthesize({"mine": tmp_path / "images", "t": Samplewise()}, None, tmp_path / "sized", size=16, progress=False)
    assert read_store(tmp_path / "sized").images.shape[2:] == (16, 16)


def test_teachers_of_several_sizes_need_a_size(tmp_path: Path) -> None:
    teachers = {"small": Samplewise(), "large": lambda captions, seed: torch.rand(len(captions), 3, 20, 24)}
    with pytest.raises(UserError, match="teacher 'large' draws 24x20, another one 12x12; give a size"):
        synthesize(teachers, CAPTIONS, tmp_path / "a", progress=False)
    with pytest.raises(UserError, match="images of several sizes: 12x12, 24x20"):
        synthesize(teachers, CAPTIONS[:8], tmp_path / "b", shard_size=1, progress=False)
    synthesize(teachers, CAPTIONS[:8], tmp_path / "c", size=12, progress=False)
    assert read_store(tmp_path / "c").images.shape[2:] == (12, 12)


def test_an_unreadable_image_is_dropped_and_counted_or_refused(tmp_path: Path) -> None:
    folder = pairs(tmp_path / "images", ["a dog", "a cat", "a fish"])
    (folder / "1.png").write_bytes(b"\x89PNG no picture")
    made = synthesize({"mine": folder}, None, tmp_path / "store", progress=False)
    assert made.dropped == {"readable": {"mine": 1}}
    assert read_store(tmp_path / "store").captions == ["a dog", "a fish"]
    with pytest.raises(UserError, match=r"teacher 'mine' gave the file 1.png for 'a cat' \(seed 0\), which is no"):
        synthesize({"mine": folder}, None, tmp_path / "strict", filters=(), progress=False)


def metadata_row(row: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "x"}\n' + row + "\n")

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "1.txt").unlink(), r"1.png has no caption; write one into 1.txt beside it"),
        (lambda f: (f / "1.txt").write_text(" \n"), r"1.txt: the caption is empty"),
        (lambda f: (f / "1.txt").write_bytes(b"\xe9\xfe"), r"1.txt, line 1 is not UTF-8"),
        (lambda f: [p.unlink() for p in f.iterdir()], "holds no images with captions"),
        (shutil.rmtree, "does not exist"),
        (metadata_row('{"file_name": "9.png", "text": "x"}'), r"metadata.jsonl:2: there is no image .*9.png"),
        (metadata_row('{"file_name": "../out.png", "text": "x"}'), r"jsonl:2: ../out.png lies outside the folder"),
        (metadata_row('{"file_name": "/etc/passwd", "text": "x"}'), r"jsonl:2: /etc/passwd lies outside the folder"),
        (metadata_row('{"file_name": "1.png"}'), r"jsonl:2: file_name or caption is missing"),
        (metadata_row('{"text": "x"}'), r"jsonl:2: file_name or caption is missing"),
        (metadata_row('{"file_name": "1.png", "text": ""}'), r"jsonl:2: the caption is empty"),
        (metadata_row('{"file_name": "1.png", "text": 3}'), r"jsonl:2: the caption is 3, not a text"),
        (metadata_row("nonsense"), r"jsonl:2: this line is no JSON"),
        (metadata_row("[1]"), r"jsonl:2: this line is no JSON object"),
    ],
)
def test_a_folder_with_something_missing_is_refused(
    tmp_path: Path, change: Callable[[Path], Any], message: str
) -> None:
    folder = pairs(tmp_path / "images", ["a dog", "a cat"])
    picture(tmp_path / "out.png", 0)
    change(folder)
    with pytest.raises(UserError, match=message):
        FolderTeacher(folder)


# --- captions ---------------------------------------------------------------------------------------------------------
def test_captions_from_files(tmp_path: Path) -> None:
    plain, rows = tmp_path / "c.txt", tmp_path / "c.jsonl"
    plain.write_text("\ufeffa  dog \r\na cat\nün café", encoding="utf-8")
    rows.write_text('{"caption": "a\\ndog", "x": 1}\n{"caption": "a cat"}\n')
    assert read_captions(plain) == (["a dog", "a cat", "ün café"], [f"{plain}:{i}" for i in (1, 2, 3)], False)
    assert read_captions(rows).texts == ["a dog", "a cat"]
    assert len(read_captions("scenes").texts) > 5000
    assert read_captions("scenes:50", seed=1) == read_captions("scenes:50", seed=1)
    assert read_captions("scenes:50", seed=1).texts != read_captions("scenes:50", seed=2).texts


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("c.txt", "", "c.txt holds no captions"),
        ("c.jsonl", "", "c.jsonl holds no captions"),
        ("c.txt", "a dog\n\na cat\n", r"c.txt:2: the caption is empty"),
        ("c.txt", "a dog\n" + "x" * 10_000, r"c.txt:2: the caption has 10,000 characters; at most 4,000"),
        ("c.txt", "a \x00dog", r"c.txt:1: the caption holds control characters"),
        ("c.jsonl", '{"caption": "a"}\n{"title": "a"}', r"c.jsonl:2 has no caption or text or prompt; it has: title"),
        ("c.jsonl", '{"caption": null}', r"c.jsonl:1: the caption is None, not a text"),
        ("c.jsonl", '{"caption": "\\ud800"}', r"c.jsonl:1: the caption holds control characters"),
        ("c.jsonl", "a dog", r"c.jsonl:1: this line is no JSON"),
    ],
)
def test_bad_files_of_captions(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        read_captions(tmp_path / name)


@pytest.mark.parametrize("source", ["scenes:0", "scenes:-3", "scenes:many", "scenes:"])
def test_zero_scenes_captions_are_refused(source: str) -> None:
    with pytest.raises(UserError, match=f"captions '{source}' are no number of captions"):
        read_captions(source)


def test_what_is_no_file_of_captions(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no file of captions nowhere.txt"):
        read_captions("nowhere.txt")
    with pytest.raises(UserError, match="is a folder, not a file of captions"):
        read_captions(tmp_path)
    (tmp_path / "c.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(UserError, match=r"c.txt, line 1 is not UTF-8"):
        read_captions(tmp_path / "c.txt")
    with pytest.raises(UserError, match="caption 2: the caption is empty"):
        planned(["x", " "])
    assert check_caption(" a\tdog ", "here") == "a dog"


# --- filters ----------------------------------------------------------------------------------------------------------
@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filter_module._FILTERS, "found", dict(filter_module._FILTERS.found))


def test_a_filter_of_ones_own(tmp_path: Path, registry: None) -> None:
    @register_filter("bright", threshold=0.0)
    def bright(images: Tensor, captions: Sequence[str]) -> list[float | None]:
        means = images.mean((1, 2, 3)).tolist()
        return [None if caption.endswith("0") else mean for mean, caption in zip(means, captions, strict=True)]

    assert filters()["bright"] == 0.0
    made = synthesize({"t": Samplewise()}, CAPTIONS, tmp_path / "a", filters=("bright",), progress=False)
    images, captions, records = read_store(tmp_path / "a")
    assert 0 < made.dropped["bright"]["t"] < 40
    for image, caption, record in zip(images, captions, records, strict=True):
        if caption.endswith("0"):
            assert record["scores"]["bright"] == -1.0  # not judged, and kept
        else:
            assert record["scores"]["bright"] == pytest.approx(float(image.float().div(127.5).sub(1).mean()))
            assert record["scores"]["bright"] >= 0
    assert sum(caption.endswith("0") for caption in captions) == 4
    darker = synthesize({"t": Samplewise()}, CAPTIONS, tmp_path / "b", filters={"bright": -0.02}, progress=False)
    assert darker.dropped["bright"]["t"] < made.dropped["bright"]["t"]


def test_filters_of_installed_packages_are_found(registry: None, monkeypatch: pytest.MonkeyPatch) -> None:
    class Point:
        def load(self) -> None:
            register_filter("from-afar", 2.0)(lambda images, captions: [3.0] * len(captions))

    asked = []
    monkeypatch.setattr("stillroom.registry.entry_points", lambda group: asked.append(group) or [Point()])
    (made,) = make_filters(["from-afar=2.5"])
    assert (made.name, made.threshold, asked) == ("from-afar", 2.5, ["stillroom.filters"])


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (["readabel"], r"unknown filter 'readabel' \(did you mean 'readable'\?\); filters: dedup, parser, readable"),
        (["dedup=much"], "filter 'dedup=much': 'much' is no threshold"),
        (["dedup=nan"], "filter 'dedup=nan': 'nan' is no threshold"),
        (["dedup", "dedup=3"], "filter 'dedup' is named twice"),
    ],
)
def test_bad_filters(wanted: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_filters(wanted)


@pytest.mark.parametrize("given", [[1.0], [1.0, float("nan")]])
def test_a_filter_that_gives_nonsense_is_named(given: list[float]) -> None:
    with pytest.raises(UserError, match=r"filter 'odd' gave \d scores for 2 samples"):
        Filter("odd", 0.5, lambda images, captions: given)(torch.zeros(2, 3, 4, 4), ["a", "b"])


def test_two_filters_of_one_name_are_an_error(registry: None) -> None:
    with pytest.raises(ValueError, match="two filters claim the name 'readable'"):

        @register_filter("readable")
        def other(images: Tensor, captions: Sequence[str]) -> list[float]:
            return []


def test_the_difference_hash_bit_by_bit() -> None:
    image = torch.zeros(1, 3, 8, 9)
    image[:, :, 2, 4] = 1.0  # brighter than the cell to its right: one bit, row 2, column 4, most significant first
    assert difference_hash(image) == [1 << (63 - (2 * 8 + 4))]
    assert difference_hash(torch.zeros(1, 3, 32, 32) + 0.3) == [0]
    ramp = torch.linspace(1, -1, 9).expand(1, 3, 8, 9)
    assert difference_hash(ramp) == [2**64 - 1]
    large = torch.nn.functional.interpolate(torch.rand(1, 3, 8, 9) * 2 - 1, scale_factor=4)
    assert difference_hash(large) == difference_hash(large[:, :, ::4, ::4])


def nearest_by_hand(marks: list[str], threshold: float) -> list[bool]:
    kept: list[str] = []
    keep = []
    for mark in marks:
        near = [
            other for other in kept
            if (int(mark[:16], 16) ^ int(other[:16], 16)).bit_count() < threshold
            and max(abs(a - b) for a, b in zip(bytes.fromhex(mark[16:]), bytes.fromhex(other[16:]))) <= Dedup.tolerance
        ]  # fmt: skip
        keep.append(not near)
        if not near:
            kept.append(mark)
    return keep


@pytest.mark.parametrize("threshold", [1, 4, 9, 30])
def test_near_duplicates_are_those_of_an_exhaustive_search(threshold: int) -> None:
    rng = random.Random(threshold)
    base = [(rng.getrandbits(64), bytes(rng.randrange(256) for _ in range(112))) for _ in range(12)]
    marks = []
    for _ in range(300):
        value, colours = rng.choice(base)
        for _ in range(rng.randrange(14)):
            value ^= 1 << rng.randrange(64)
        shift = rng.choice([0, 0, 7, 20])
        marks.append(f"{value:016x}{bytes(min(255, c + shift) for c in colours).hex()}")
    scores = Dedup().scores(marks, threshold)
    assert [score >= threshold for score in scores] == nearest_by_hand(marks, threshold)
    assert 0 < sum(score >= threshold for score in scores) < 300


def test_images_of_one_shape_in_other_colours_are_no_duplicates() -> None:
    red, blue = torch.full((2, 3, 32, 32), -1.0).unbind(0)
    red[0, 8:20, 8:20], blue[2, 8:20, 8:20] = 1.0, 1.0
    rule = Dedup()
    marks = list(rule.marks(torch.stack([red, blue, (red + 0.01).clamp(-1, 1)]), ["", "", ""]))
    assert marks[0][:16] != "0" * 16
    assert rule.scores(marks, 4.0) == [64.0, 64.0, 0.0]


def test_readable_scores() -> None:
    images = torch.stack([torch.zeros(3, 4, 4), noise(0)[0, :, :4, :4], torch.zeros(3, 4, 4)])
    images[2, 0, 0, 0] = torch.inf
    flat, good, infinite = make_filters(["readable"])[0](images, ["a", "b", "c"])
    assert (flat, infinite) == (0.0, -1.0)
    assert good is not None
    assert good > 100


# --- teachers ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "answer", [torch.zeros(3, 3, 4, 4), torch.zeros(2, 4, 4, 4), torch.zeros(2, 3, 4), "a picture", None]
)
def test_a_teacher_that_gives_something_else_is_named(answer: Any) -> None:
    with pytest.raises(UserError, match=r"teacher 'odd' gave .* for 2 captions; a teacher gives images \[N, 3, H, W\]"):
        Teacher("odd", lambda captions, seed: answer).draw(["a", "b"], [0, 0])


def test_bytes_and_grey_images_are_taken() -> None:
    grey = torch.arange(2 * 16, dtype=torch.uint8).reshape(2, 1, 4, 4)
    images = Teacher("grey", lambda captions, seed: grey).draw(["a", "b"], [0, 0]).images
    assert torch.equal(((images + 1) * 127.5).round().to(torch.uint8), grey.expand(-1, 3, -1, -1))


def test_something_that_cannot_draw_is_refused() -> None:
    with pytest.raises(UserError, match="teacher 'seven' is a int"):
        Teacher("seven", 7)


def test_a_diffusers_pipeline_is_a_teacher(tmp_path: Path) -> None:
    """Called as diffusers' text-to-image pipelines are: prompts, one generator each, tensors in [0, 1]."""

    class Pipeline:
        components = {"transformer": torch.nn.Linear(2, 2), "scheduler": object()}

        def set_progress_bar_config(self, disable: bool) -> None:
            assert disable

        def __call__(self, prompt: list[str], generator: list, output_type: str, guidance_scale: float) -> Any:
            assert (output_type, guidance_scale) == ("pt", 3.0)
            images = torch.cat([torch.rand(1, 3, SIZE, SIZE, generator=one) for one in generator])
            return type("Output", (), {"images": images})

    teacher = PipelineTeacher(Pipeline(), guidance_scale=3.0)
    synthesize({"pipe": teacher}, CAPTIONS[:5], tmp_path / "store", batch=2, progress=False)
    images, _, records = read_store(tmp_path / "store")
    alone = torch.rand(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(records[4]["draw_seed"]))
    assert torch.equal((alone * 255).round().to(torch.uint8)[0], images[4])
    assert json.loads(records[0]["sampler"]) == {"guidance_scale": 3.0}
    other = PipelineTeacher(type("P", (Pipeline,), {"components": {"transformer": torch.nn.Linear(2, 2)}})())
    assert teacher.fingerprint != other.fingerprint


@pytest.mark.slow
def test_a_folder_of_a_diffusers_pipeline_is_a_teacher(tmp_path: Path) -> None:
    from diffusers import DPMSolverMultistepScheduler, PixArtSigmaPipeline

    from tiny_text_images import pixart, tiny_space

    space = tiny_space()
    parts = (space.text.tokenizer, space.text.network, space.codec.network, pixart().network)
    PixArtSigmaPipeline(*parts, DPMSolverMultistepScheduler()).save_pretrained(tmp_path / "pipe")
    settings: dict[str, Any] = {"steps": 2, "guidance": 2.0, "height": 8, "width": 8, "max_sequence_length": 8}
    settings |= {"use_resolution_binning": False, "clean_caption": False}
    for batch in (1, 3):
        store = tmp_path / f"store-{batch}"
        synthesize({"p": tmp_path / "pipe"}, WORDS, store, batch=batch, settings=settings, progress=False)
    one, three = read_store(tmp_path / "store-1"), read_store(tmp_path / "store-3")
    assert one.images.shape == (3, 3, 8, 8)
    assert (one.images.int() - three.images.int()).abs().max() <= 1
    assert json.loads(one.records[0]["sampler"])["num_inference_steps"] == 2
    (tmp_path / "pipe/vae/diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"the pipeline .*pipe cannot be read"):
        synthesize({"p": tmp_path / "pipe"}, WORDS, tmp_path / "other", progress=False)


def test_a_caption_that_a_teacher_cannot_read_is_named_with_its_line(tmp_path: Path) -> None:
    class Picky(Samplewise):
        def check(self, caption: str) -> None:
            if "dgo" in caption:
                raise UserError("unknown word 'dgo' (did you mean 'dog'?)", cure="use known words")

    (tmp_path / "c.txt").write_text("a cat\na dgo\n")
    with pytest.raises(UserError, match=r"c.txt:2: unknown word 'dgo' \(did you mean 'dog'\?\); use known words"):
        synthesize({"t": Picky()}, tmp_path / "c.txt", tmp_path / "store", progress=False)
    assert not (tmp_path / "store").exists()


# --- what is refused --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seeds": ()}, "seeds must be whole numbers from 0, got none"),
        ({"seeds": (-1,)}, "seeds must be whole numbers from 0, got -1"),
        ({"shard_size": 0}, "the shard size must be at least 1, got 0"),
        ({"batch": 0}, "the batch must be at least 1, got 0"),
        ({"size": -1}, "the size must be at least 0, got -1"),
        ({"route": "two"}, r"unknown route 'two'; routes: one, all, round-robin"),
        ({"repeats": "drp"}, r"repeats is 'drp' \(did you mean 'drop'\?\)"),
        ({"captions": []}, "no captions were given"),
        ({"captions": None}, "no captions were given"),
        ({"teachers": {}}, "no teachers were named"),
        ({"teachers": {"x": "no-such-folder"}}, "no teacher 'no-such-folder'"),
    ],
)
def test_bad_settings_write_nothing(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    usual = {"teachers": {"t": Samplewise()}, "captions": CAPTIONS, "out": tmp_path / "store", "progress": False}
    with pytest.raises(UserError, match=message):
        synthesize(**(usual | changed))
    assert not list(tmp_path.iterdir())


def test_folders_that_cannot_be_used(tmp_path: Path, straight: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.doc").write_text("x")
    for out, message in (
        ("file", "file is a file"),
        ("file/store", r"cannot write to .*/file"),
        ("full", "full is not empty and holds no store"),
    ):
        with pytest.raises(UserError, match=message):
            draw(tmp_path / out)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "full", "thesis.doc"]
    with pytest.raises(UserError, match="cannot write"):
        draw(Path("/proc/stillroom"))


def test_a_folder_that_may_not_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", denied)
    with pytest.raises(UserError, match=r"cannot write .*store.*: Permission denied"):
        draw(tmp_path / "store")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_named_and_resumed_from(tmp_path: Path, short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = os.fsync, 0

    def full(fd: int) -> None:
        nonlocal calls
        calls += 1
        if calls > 9:
            raise OSError(28, "No space left on device")
        real(fd)

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(UserError, match=r"no space left on the disk while writing .*; free some space"):
            draw(tmp_path / "store", captions=CAPTIONS[:10])
    draw(tmp_path / "store", resume=True, captions=CAPTIONS[:10])
    assert contents(tmp_path / "store") == contents(short)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seeds": (0, 2)}, r"another plan: seeds is \[0, 1\] there and \[0, 2\] here"),
        ({"batch": 5}, "another plan: batch is 4 there and 5 here"),
        ({"filters": ("dedup=5", "readable")}, "another plan: filters.dedup.threshold is 4.0 there and 5.0 here"),
        ({"filters": ("readable",)}, "another plan: filter_order is"),
    ],
)
def test_another_plans_store_is_refused(tmp_path: Path, straight: Path, changed: dict[str, Any], message: str) -> None:
    before = contents(straight)
    for resume in (False, True):
        with pytest.raises(UserError, match=message):
            draw(straight, resume=resume, **changed)
    assert contents(straight) == before
    (tmp_path / "half").mkdir()
    with pytest.raises(Died):
        synthesize({"batchwise": stop_after(3)}, CAPTIONS, tmp_path / "half/store", progress=False, batch=4)
    unfinished = contents(tmp_path)
    with pytest.raises(UserError, match="another plan: batch is 4 there and 8 here"):
        synthesize({"batchwise": Batchwise()}, CAPTIONS, tmp_path / "half/store", progress=False, batch=8, resume=True)
    with pytest.raises(UserError, match="holds an unfinished store of this plan; carry on with --resume"):
        synthesize({"batchwise": Batchwise()}, CAPTIONS, tmp_path / "half/store", progress=False, batch=4)
    assert contents(tmp_path) == unfinished


def test_other_captions_or_weights_are_another_plan(tmp_path: Path) -> None:
    synthesize({"t": Samplewise()}, CAPTIONS[:4], tmp_path / "store", progress=False)
    with pytest.raises(UserError, match=r"another plan: captions.count is 4 there and 5 here"):
        synthesize({"t": Samplewise()}, CAPTIONS[:5], tmp_path / "store", progress=False)
    retrained = Samplewise()
    retrained.fingerprint = "6" * 64
    with pytest.raises(UserError, match=r"another plan: teachers.t.fingerprint is 555"):
        synthesize({"t": retrained}, CAPTIONS[:4], tmp_path / "store", progress=False)


def test_a_store_in_the_making_is_held(tmp_path: Path) -> None:
    class Nosy(Batchwise):
        def sample(self, captions: list[str], seed: int) -> Tensor:
            if not self.calls:
                other = subprocess.run(
                    ["flock", "--nonblock", tmp_path / "store/.synthesis/.lock", "true"], capture_output=True
                )
                assert other.returncode == 1
            return super().sample(captions, seed)

    synthesize({"batchwise": Nosy()}, CAPTIONS[:3], tmp_path / "store", progress=False)


def test_when_every_image_is_dropped_it_says_so(tmp_path: Path) -> None:
    flat = {"flat": lambda captions, seed: torch.zeros(len(captions), 3, 4, 4)}
    with pytest.raises(UserError, match=r"no image is left for .*store: readable dropped 40"):
        synthesize(flat, CAPTIONS, tmp_path / "store", progress=False)


def test_shards_that_lose_all_their_images_are_left_out(tmp_path: Path) -> None:
    def flat(captions: list[str], seed: int) -> Tensor:
        images = noise(seed, len(captions))
        for image, caption in zip(images, captions, strict=True):
            if int(caption.split()[-1]) < 10:
                image.zero_()
        return images

    synthesize({"t": flat}, CAPTIONS[:20], tmp_path / "store", shard_size=5, progress=False)
    assert sorted(path.name for path in (tmp_path / "store").glob("*.tar")) == ["shard-00002.tar", "shard-00003.tar"]
    assert len(read_store(tmp_path / "store").captions) == 10


def test_an_image_with_nan_is_refused_where_no_filter_drops_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'b' gave an image with NaN or infinity for 'a picture of thing 8' \(seed"):
        synthesize({"b": Batchwise()}, CAPTIONS, tmp_path / "store", filters=("dedup",), progress=False)


# --- the scenes world -------------------------------------------------------------------------------------------------
@pytest.mark.skipif(not (ASSETS / "scenes-parser").is_dir(), reason="the parser is not shipped yet")
def test_the_parser_filter_asks_for_exactly_what_the_caption_says(tmp_path: Path) -> None:
    from stillroom.data.scenes.captions import draw_scenes, parse_caption
    from stillroom.data.scenes.pictures import render

    captions = ["a red three", "two fives", "a seven above a two", "a blue one and a green four"] * 5
    generator = torch.Generator().manual_seed(3)
    images = render(draw_scenes([parse_caption(text) for text in captions], generator), "train", generator)

    def draw_scenes_wrongly(asked: list[str], seed: int) -> Tensor:
        """Right pictures, but every fifth is that of the caption before, and captions outside the grammar are noise."""
        rows = [captions.index(text) if text in captions else 0 for text in asked]
        rows = [row - 1 if i % 5 == 4 else row for i, row in enumerate(rows)]
        return images[rows].float().div(127.5).sub(1.0)

    asked = [*captions[:4], "a dog on a mat"]
    (parser,) = make_filters(["parser"])
    right = parser(draw_scenes_wrongly(asked[:4], 0), asked[:4])
    wrong = parser(draw_scenes_wrongly(asked[:4], 0).roll(1, 0), asked[:4])
    assert (right, wrong) == ([1.0] * 4, [0.0] * 4)
    assert parser(torch.zeros(1, 3, 32, 32), ["a dog on a mat"]) == [None]
    assert parser(torch.zeros(0, 3, 32, 32), []) == []
    made = synthesize(
        {"t": draw_scenes_wrongly}, [*asked[:3], "a dog on a mat", asked[3]], tmp_path / "store",
        filters=("readable", "parser"), progress=False,
    )  # fmt: skip
    assert made.dropped == {"readable": {"t": 0}, "parser": {"t": 1}}
    _, kept, records = read_store(tmp_path / "store")
    assert dict(zip(kept, (record["scores"]["parser"] for record in records), strict=True)) == {
        "a red three": 1.0, "two fives": 1.0, "a seven above a two": 1.0, "a dog on a mat": -1.0
    }  # fmt: skip
    version = json.loads((tmp_path / "store/manifest.json").read_text())["plan"]["filters"]["parser"]["version"]
    assert version.startswith("scenes@")


def test_different_pictures_of_one_caption_are_no_duplicates() -> None:
    from stillroom.data.scenes.pictures import scene_set

    images, captions = scene_set(300, 0, "train")
    scaled = images.float().div(127.5).sub(1.0)
    rule = Dedup()
    marks = list(rule.marks(torch.cat([scaled, scaled[:50]]), [caption.text for caption in captions] + [""] * 50))
    scores = rule.scores(marks, 4.0)
    assert min(scores[:300]) >= 4
    assert max(scores[300:]) == 0


def test_sparse_pictures_of_other_things_are_no_duplicates() -> None:
    """On flat ground few bits of the hash are set: it alone cannot tell one white shape from another."""
    images = torch.full((2, 3, 32, 32), -0.6)
    images[0, :, 4:16, 20:23] = images[0, :, 4:7, 20:30] = 0.9
    images[1, :, 4:16, 20:23] = images[1, :, 13:16, 20:30] = 0.9
    assert (difference_hash(images)[0] ^ difference_hash(images)[1]).bit_count() < 16
    rule = Dedup()
    assert rule.scores(list(rule.marks(images, ["", ""])), 16.0) == [64.0, 64.0]
    faint = (images[:1] + 0.02 * torch.randn(1, 3, 32, 32)).clamp(-1, 1)
    assert rule.scores(list(rule.marks(torch.cat([images[:1], faint]), ["", ""])), 16.0)[1] < 16


# --- a model as a teacher ---------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from stillroom.tasks.text_images.model import TextImageGenerator
    from tiny_text_images import FLOW, sd3, tiny_space

    folder = tmp_path_factory.mktemp("model") / "tiny-sd3"
    torch.manual_seed(0)
    TextImageGenerator(sd3(), FLOW, tiny_space()).save(folder)
    return folder


WORDS = ["a red three", "a blue seven", "the three of a seven"]


def test_a_model_folder_is_a_teacher(tmp_path: Path, model: Path) -> None:
    from stillroom.tasks.text_images.model import TextImageGenerator

    synthesize({"sd3": model}, WORDS, tmp_path / "store", batch=2, progress=False)
    images, _, records = read_store(tmp_path / "store")
    generator = TextImageGenerator.load(model)
    assert json.loads(records[0]["sampler"]) == generator.sampler.to_dict()
    for image, record in zip(images, records, strict=True):
        drawn = generator.sample([record["caption"]], seed=[record["draw_seed"]])
        levels = ((drawn + 1) * 127.5).round().int()
        assert (levels[0] - image.int()).abs().max() <= 1  # drawn alone or in a batch: rounding apart, the same
    made = synthesize({"sd3": generator}, WORDS, tmp_path / "store", batch=2, progress=False)
    assert made.drawn == 0  # the same weights in memory are the same teacher


def test_guidance_and_steps_are_part_of_the_plan(tmp_path: Path, model: Path) -> None:
    settings = {"guidance": 5.0, "steps": 2}
    synthesize({"sd3": model}, WORDS, tmp_path / "store", settings=settings, progress=False)
    sampler = json.loads(read_store(tmp_path / "store").records[0]["sampler"])
    assert (sampler["guidance"], sampler["steps"]) == (5.0, 2)
    with pytest.raises(UserError, match=r"another plan: teachers\.sd3\.settings\.guidance is 5.0 there and 2.0 here"):
        synthesize({"sd3": model}, WORDS, tmp_path / "store", progress=False)
    with pytest.raises(UserError, match="has no setting 'guidnce'"):
        synthesize({"sd3": model}, WORDS, tmp_path / "other", settings={"guidnce": 1.0}, progress=False)


def test_a_plan_is_named_by_its_hash(model: Path) -> None:
    names = [
        plan_hash({"sd3": model}, WORDS),
        plan_hash({"sd3": model}, WORDS, seeds=(1,)),
        plan_hash({"sd3": model}, WORDS, settings={"guidance": 5.0}),
        plan_hash({"sd3": model}, WORDS[:2]),
        plan_hash({"other": model}, WORDS),
        plan_hash({"sd3": model}, WORDS, filters=("readable=3",)),
    ]
    assert len(set(names)) == len(names)
    assert names[0] == plan_hash({"sd3": model}, iter(WORDS))
    assert len(names[0]) == 16


# --- the command line -------------------------------------------------------------------------------------------------
@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: Path) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    shutil.copytree(model, tmp_path / "tiny")
    pairs(tmp_path / "images", ["a red three", "a seven"])
    (tmp_path / "captions.txt").write_text("a red three\na blue seven\na red three\n")
    return tmp_path


def test_the_command(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["synthesize", "--teachers", "tiny", "more=tiny", "--captions", "captions.txt", "--out", "out/store"]
    command += ["--route", "all", "--seeds", "0", "3", "--filters", "readable", "dedup=2", "--steps", "2"]
    assert cli.main(command) == 0
    shown = capsys.readouterr()
    assert "synthesize 8/8" in shown.err
    assert "8 images drawn" in shown.out
    assert "1 repeated captions were left out" in shown.out
    assert [cell.strip() for cell in shown.out.splitlines()[-3].split("│")[1:3]] == ["all", "8"]
    _, captions, records = read_store(place / "out/store")
    assert {(record["teacher"], record["seed"]) for record in records} <= {
        (t, s) for t in ("tiny", "more") for s in (0, 3)
    }
    assert set(captions) == {"a red three", "a blue seven"}
    assert cli.main(command) == 0
    assert "finished already" in capsys.readouterr().out
    assert cli.main(["synthesize", "--teachers", "images", "--out", "pairs", "--filters"]) == 0
    assert read_store(place / "pairs").captions == ["a red three", "a seven"]


def test_an_interrupted_command_says_how_to_carry_on(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["synthesize", "--teachers", "tiny", "--captions", "captions.txt", "--out", "store", "--batch", "1"]
    from stillroom.synthesis.teachers import ModelTeacher

    real = ModelTeacher.sample_each

    def pressed(self: ModelTeacher, captions: list[str], seeds: list[int]) -> Tensor:
        signal.raise_signal(signal.SIGINT)
        return real(self, captions, seeds)

    with monkeypatch.context() as patch:
        patch.setattr(ModelTeacher, "sample_each", pressed)
        assert cli.main(command) == 130
    assert "interrupted; carry on with --resume, store keeps its finished shards" in capsys.readouterr().err
    assert cli.main(command) == 2
    assert "store holds an unfinished store of this plan; carry on with --resume" in capsys.readouterr().err
    assert cli.main([*command, "--resume"]) == 0
    assert len(read_store(place / "store").captions) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--captions captions.txt --out store", "no teachers were named"),
        ("--teachers tiny --captions captions.txt", "no folder for the store was named; give --out DIR"),
        ("--teachers tiny --out store", "no captions were given"),
        ("--teachers tiny sub/tiny --captions captions.txt --out store", "two teachers have one name"),
        ("--teachers scenes-sd4 --captions captions.txt --out store", "no teacher 'scenes-sd4'"),
        ("--teachers empty --captions captions.txt --out store", "empty holds no images with captions"),
        ("--teachers broken --captions captions.txt --out store", "diffusion_pytorch_model.safetensors cannot be read"),
        ("--teachers tiny --captions nothing.txt --out store", "nothing.txt holds no captions"),
        ("--teachers tiny --captions nowhere.txt --out store", "there is no file of captions nowhere.txt"),
        ("--teachers tiny --captions gap.txt --out store", "gap.txt:2: the caption is empty"),
        ("--teachers tiny --captions long.txt --out store", "long.txt:1: the caption has 10,000 characters"),
        ("--teachers tiny --captions wordy.txt --out store", "wordy.txt:2: the caption"),
        ("--teachers tiny --captions unknown.txt --out store", "unknown.txt:2: the caption 'a purple three' has words"),
        ("--teachers tiny --captions scenes:0 --out store", "captions 'scenes:0' are no number of captions"),
        ("--teachers tiny --captions captions.txt --out captions.txt", "captions.txt is a file"),
        ("--teachers tiny --captions captions.txt --out images", "images is not empty and holds no store"),
        ("--teachers tiny --captions captions.txt --out captions.txt/store", "cannot write to /"),
        ("--teachers tiny --captions captions.txt --out store --guidance nan", "setting guidance is nan"),
        ("--teachers tiny --captions captions.txt --out store --filters parsr", "unknown filter 'parsr' (did you mean"),
        ("--teachers tiny --captions captions.txt --out store --route two", "--route"),
        (
            "--teachers tiny --captions captions.txt --out store --seeds -1",
            "seeds must be whole numbers from 0, got -1",
        ),
        ("--teachers tiny --captions captions.txt --out store --steps 0", "setting steps is 0"),
        ("--teachers tiny --captions captions.txt --out store --shard-size 0", "the shard size must be at least 1"),
        ("--teachers tiny --captions captions.txt --out store --batch 0", "the batch must be at least 1"),
        ("--teachers images --captions captions.txt --out store", "captions.txt:2: no teacher has an image of"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    place: Path, capsys: pytest.CaptureFixture[str], arguments: str, message: str
) -> None:
    for name, text in {
        "nothing": "", "gap": "a seven\n\na three\n", "long": "x" * 10_000, "unknown": "a three\na purple three\n",
        "wordy": "a seven\n" + "a red three of " * 4,
    }.items():  # fmt: skip
        (place / f"{name}.txt").write_text(text)
    (place / "empty").mkdir()
    shutil.copytree(place / "tiny", place / "broken")
    weights = place / "broken/transformer/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    before = contents(place)
    assert cli.main(["synthesize", *arguments.split()]) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert shown.startswith("stillroom: ")
    assert len(shown.splitlines()) == 1
    assert contents(place) == before
    assert not (place / "store").exists()
