"""Carrying out a plan: shard by shard, on any number of processes, interrupted any number of times.

While a store is being made it has a folder ``.synthesis`` with the plan and a note of each finished shard; the
manifest, written last, makes it a store. What a shard holds is a function of the plan alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stillroom.data.captioned_folders import Captions
from stillroom.data.store import (
    FORMAT,
    MANIFEST,
    UNFINISHED,
    encode_json,
    encode_png,
    read_manifest,
    read_shard,
    shard_name,
    write_shard,
)
from stillroom.engine.distributed import World
from stillroom.engine.interrupt import Interrupted, StopRequest
from stillroom.engine.progress import Progress
from stillroom.errors import UserError
from stillroom.evaluation.filters import NOT_JUDGED, Filter
from stillroom.files import digest, held, write, writing
from stillroom.synthesis.plan import Router, SynthesisPlan, make_plan
from stillroom.synthesis.teachers import Teacher, as_teachers

if TYPE_CHECKING:
    from rich.table import Table

PLAN = "plan.json"
DROPPED = "dropped.jsonl"
CARD = "README.md"


@dataclass(frozen=True)
class Synthesis:
    """What a synthesis has made.

    planned, kept: images, of each teacher. dropped: images by filter and teacher. repeated: mentions of a caption that
    were left out as repetitions. drawn: images drawn by this call, on all processes, in ``seconds``.
    """

    folder: Path
    planned: dict[str, int]
    kept: dict[str, int]
    dropped: dict[str, dict[str, int]]
    repeated: int
    drawn: int
    seconds: float

    @property
    def headline(self) -> str:
        """How many images there are, and how fast they were drawn."""
        speed = f"{self.drawn:,} images drawn, {self.drawn / max(self.seconds, 1e-9):.1f} a second"
        kept, planned = sum(self.kept.values()), sum(self.planned.values())
        left_out = f"; {self.repeated:,} repeated captions were left out" if self.repeated else ""
        return f"{self.folder}: {speed if self.drawn else 'finished already'}; {kept:,} of {planned:,} kept{left_out}"

    def table(self) -> Table:
        """Kept and dropped images of each teacher."""
        from rich.table import Table

        table = Table(
            "teacher", "planned", *(f"dropped by {name}" for name in self.dropped), "kept", header_style="bold"
        )
        for column in table.columns[1:]:
            column.justify = "right"
        for name, planned in self.planned.items():
            dropped = (f"{teachers[name]:,}" for teachers in self.dropped.values())
            table.add_row(name, f"{planned:,}", *dropped, f"{self.kept[name]:,}")
        if len(self.planned) > 1:
            table.add_section()
            totals = (f"{sum(teachers.values()):,}" for teachers in self.dropped.values())
            table.add_row("all", f"{sum(self.planned.values()):,}", *totals, f"{sum(self.kept.values()):,}")
        return table


def synthesize(
    teachers: Mapping[str, Any],
    captions: str | Path | Captions | Iterable[str] | None,
    out: str | Path,
    *,
    seeds: Sequence[int] = (0,),
    route: str | Router = "one",
    repeats: str | None = None,
    filters: Iterable[str | Filter] | Mapping[str, float] = ("readable",),
    shard_size: int = 1000,
    batch: int = 64,
    size: int = 0,
    settings: Mapping[str, Any] | None = None,
    resume: bool = False,
    world: World | None = None,
    progress: bool = True,
    report: Callable[[str], None] | None = None,
) -> Synthesis:
    """Let teachers draw captions into the store ``out``. Under torchrun every process calls this: shard s is made by
    the process of rank ``s % world size``, and the result is that of one process, byte for byte.

    teachers: name -> a model's folder, a run, or a shipped model by name; a finished model that draws captions; a
    folder of images with captions (or a ``FolderTeacher``); a folder with a diffusers pipeline; or anything that
    :class:`Teacher` takes.
    captions: what :func:`~stillroom.data.captioned_folders.read_captions` reads or has read, or texts; None: those of
    the folders.
    seeds: each caption is drawn once per seed. What is drawn depends on seed, caption and teacher.
    route: ``one`` teacher for each caption, by the caption's hash; ``round-robin``, the teachers in turn; ``all`` of
    them; or a function ``(caption, names) -> name``.
    repeats: a caption that comes again is left out (``drop``: no caption, teacher and seed come twice) or drawn with
    further seeds (``redraw``). By default ``redraw`` for ``scenes:N``, else ``drop``.
    filters: see :func:`~stillroom.evaluation.filters.make_filters`.
    shard_size: images per shard, the most that an interruption can cost. batch: images drawn at once; both are part of
    the plan.
    size: crop and resize images of another size to ``size`` squared; 0 takes them as they are, all of one size.
    settings: sampler settings for every model, e.g. ``{"guidance": 3.0, "steps": 25}``.
    resume: carry on what was interrupted, or start. A finished store of the same plan is left as it is in any case.
    report: is told in a line what was made.

    Raises UserError before anything is written if teachers, captions, filters and folder do not fit together, and
    later when images cannot be stored or none passes the filters; Interrupted on Ctrl-C or SIGTERM.
    """
    world = world or World.join("auto")
    known = as_teachers(teachers, size, settings or {}, world.device)
    for teacher in known.values():
        if report is not None and world.first and teacher.folder is not None and teacher.folder.left_out:
            report(f"images of {teacher.folder.folder}{teacher.folder.left_out}")
    plan = make_plan(
        known, captions, seeds=seeds, route=route, repeats=repeats, filters=filters, shard_size=shard_size, batch=batch,
        size=size,
    )  # fmt: skip
    return carry_out(plan, Path(out), resume, world, progress, report or (lambda line: None))


def plan_hash(
    teachers: Mapping[str, Any],
    captions: str | Path | Captions | Iterable[str] | None,
    *,
    size: int = 0,
    settings: Mapping[str, Any] | None = None,
    **plan: Any,
) -> str:
    """Sixteen hex digits that name what :func:`synthesize` would make of the same arguments."""
    return make_plan(as_teachers(teachers, size, settings or {}), captions, size=size, **plan).hash[:16]


def carry_out(
    plan: SynthesisPlan, out: Path, resume: bool, world: World, progress: bool, report: Callable[[str], None]
) -> Synthesis:
    """Make the store of ``plan`` in ``out``; collective."""
    with contextlib.ExitStack() as holding:
        finished = _agreed(world, lambda: _begin(plan, out, resume, holding))
        drawn, began = 0, time.perf_counter()
        if not finished:
            drawn = sum(world.gather(_make_shards(plan, out, world, progress)))  # also a barrier: all shards are there
        seconds = time.perf_counter() - began
        _agreed(world, lambda: shutil.rmtree(out / UNFINISHED, ignore_errors=True) if finished else _finish(plan, out))
    made = _summary(plan, out, drawn, seconds)
    if world.first:
        report(made.headline)
    return made


def _agreed(world: World, check: Callable[[], Any]) -> Any:
    """What the first process finds, on every process; its UserError is raised on all of them."""
    problem: list[str] | None = None
    value = None
    if world.first:
        try:
            value = check()
        except UserError as error:
            problem = [error.message, error.cure]
    problem, value = world.share([problem, value])
    if problem is not None:
        raise UserError(*problem)
    return value


# --- the folder -------------------------------------------------------------------------------------------------------
def _begin(plan: SynthesisPlan, out: Path, resume: bool, holding: contextlib.ExitStack) -> bool:
    """Whether the store is finished already; else take hold of its folder. Raises UserError where it cannot be made."""
    with writing(out):
        return _started(plan, out, resume, holding)


def _started(plan: SynthesisPlan, out: Path, resume: bool, holding: contextlib.ExitStack) -> bool:
    work = out / UNFINISHED
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file", cure="choose another folder")
    if (out / MANIFEST).is_file():
        _same_plan(out, read_manifest(out)["plan"], plan)
        return True
    if (work / PLAN).is_file():
        try:
            stored = json.loads((work / PLAN).read_bytes())
        except ValueError:
            raise UserError(f"{work / PLAN} is damaged", cure=f"delete {out} and start again") from None
        _same_plan(out, stored, plan)
        if not resume:
            raise UserError(f"{out} holds an unfinished store of this plan", cure="carry on with --resume")
    elif out.is_dir() and any(path != work for path in out.iterdir()):
        raise UserError(f"{out} is not empty and holds no store", cure="choose another folder")
    parent = next(parent for parent in (out, *out.absolute().parents) if parent.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"cannot write to {parent}", cure="choose a folder of your own")
    holding.enter_context(held(work))
    for left_over in work.glob("*.tmp"):
        left_over.unlink()
    write(work / PLAN, encode_json(plan.settings))
    return False


def _same_plan(out: Path, stored: Mapping[str, Any], plan: SynthesisPlan) -> None:
    """Raises UserError naming the first setting in which a store's plan differs."""
    here, there = _flat(plan.settings), _flat(stored)
    for key in sorted(here.keys() | there.keys(), key=lambda key: (key.startswith(("items", "captions")), key)):
        if here.get(key) != there.get(key):
            raise UserError(
                f"{out} holds a store of another plan: {key} is {there.get(key, 'not set')} there and "
                f"{here.get(key, 'not set')} here",
                cure="choose another folder, or the settings of that store",
            )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


# --- shards -----------------------------------------------------------------------------------------------------------
def _note_path(out: Path, number: int) -> Path:
    return out / UNFINISHED / f"{shard_name(number)}.json"


def _note(out: Path, number: int) -> dict[str, Any] | None:
    """The note of a finished shard that is still what was written; else None."""
    try:
        note = json.loads(_note_path(out, number).read_bytes())
        return note if digest(out / shard_name(number)) == note["entry"]["sha256"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _make_shards(plan: SynthesisPlan, out: Path, world: World, progress: bool) -> int:
    """Make those of this process's shards that are not there yet; how many images were drawn."""
    mine = range(world.rank, plan.shards, world.size)
    todo = [number for number in mine if _note(out, number) is None]
    total = sum(len(plan.shard(number)) for number in mine)
    done = total - sum(len(plan.shard(number)) for number in todo)
    bar = Progress(total, done, "synthesize", show=progress and world.first)
    drawn, kept, stop = 0, 0, StopRequest()
    try:
        with stop.listening():
            for number in todo:
                samples: dict[int, tuple[str, bytes, bytes]] = {}
                note: dict[str, Any] = {"dropped": [], "marks": {}, "size": None}
                for teacher, items in plan.batches(number):
                    samples |= _draw(plan, teacher, items, note)
                    drawn += len(items)
                    bar.update(done + drawn, {"kept": (kept + len(samples)) / drawn})
                    if stop.asked:
                        raise Interrupted(f"interrupted; carry on with --resume, {out} keeps its finished shards")
                kept += len(samples)
                _write(out, number, [samples[key] for key in sorted(samples)], note)
    finally:
        bar.close()
    return drawn


def _write(out: Path, number: int, samples: Iterable[tuple[str, bytes, bytes]], note: dict[str, Any]) -> None:
    note["entry"] = write_shard(out / shard_name(number), samples, out / UNFINISHED / f"{shard_name(number)}.tmp")
    write(_note_path(out, number), encode_json(note))


def _draw(
    plan: SynthesisPlan, teacher: Teacher, items: list, note: dict[str, Any]
) -> dict[int, tuple[str, bytes, bytes]]:
    """Draw a batch and filter it: item number -> (key, PNG, record) of what is kept; ``note`` takes the rest."""
    captions = [item.caption for item in items]
    with torch.no_grad():
        drawn = teacher.draw(captions, [item.seed for item in items])
    size = list(drawn.images.shape[2:])
    if note["size"] not in (None, size):
        raise UserError(
            f"teacher {teacher.name!r} draws {size[1]}x{size[0]}, another one {note['size'][1]}x{note['size'][0]}",
            cure="give a size: the images are then cropped and resized to it",
        )
    note["size"] = size
    pixels = ((drawn.images.nan_to_num().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    finite = drawn.images.flatten(1).isfinite().all(1)
    scores: list[dict[str, float]] = [{} for _ in items]
    alive = list(range(len(items)))
    for one in plan.filters:
        if one.name != "readable":
            _refuse_unreadable(teacher, items, finite, alive)
        seen = drawn.images if one.name == "readable" else pixels.float().div(127.5).sub(1.0)
        chosen, texts = seen[alive], [captions[row] for row in alive]
        if one.across:
            marks = note["marks"].setdefault(one.name, {})
            marks |= {
                str(items[row].number): mark for row, mark in zip(alive, one.rule.marks(chosen, texts), strict=True)
            }
            continue
        passed = []
        for row, score in zip(alive, one(chosen, texts) if alive else [], strict=True):
            scores[row][one.name] = NOT_JUDGED if score is None else score
            if one.keeps(score):
                passed.append(row)
            else:
                note["dropped"].append([items[row].number, one.name, score])
        alive = passed
    _refuse_unreadable(teacher, items, finite, alive)
    sampler = json.dumps(teacher.settings, sort_keys=True) if teacher.settings else ""
    kept = {}
    for row in alive:
        item = items[row]
        record: dict[str, Any] = {
            "caption": item.caption,
            "teacher": teacher.name,
            "weights": teacher.fingerprint[:16],
            "seed": item.seed,
            "draw_seed": drawn.seeds[row],
            "draw_row": drawn.rows[row],
            "sampler": sampler,
            "source": teacher.source(item.caption, item.seed),
        }
        if scores[row]:
            record["scores"] = scores[row]
        kept[item.number] = (f"{item.number:09d}", encode_png(pixels[row]), encode_json(record))
    return kept


def _refuse_unreadable(teacher: Teacher, items: list, finite: Tensor, alive: list[int]) -> None:
    for row in alive:
        if not bool(finite[row]):
            caption, seed = items[row].caption, items[row].seed
            what = f"the file {teacher.source(caption, seed)}" if teacher.folder else "an image with NaN or infinity"
            raise UserError(
                f"teacher {teacher.name!r} gave {what} for {caption!r} (seed {seed}), which is no readable image",
                cure="add the filter 'readable', which drops such images",
            )


# --- the end ----------------------------------------------------------------------------------------------------------
def _finish(plan: SynthesisPlan, out: Path) -> None:
    """Compare samples across shards, drop what repeats, write card and manifest. Runs on the first process; may be cut
    off anywhere and run again."""
    notes = []
    for number in range(plan.shards):
        note = _note(out, number)
        if note is None:
            raise UserError(f"{out / shard_name(number)} has changed under our hands", cure="carry on with --resume")
        notes.append(note)
    sizes = {tuple(note["size"]) for note in notes}
    if len(sizes) > 1:
        raise UserError(
            f"the teachers draw images of several sizes: {', '.join(f'{w}x{h}' for h, w in sorted(sizes))}",
            cure="start again with a size: the images are then cropped and resized to it",
        )
    gone = _compare(plan, notes)
    dropped = [row for note in notes for row in note["dropped"]] + [[*key, score] for key, score in gone.items()]
    numbers = {number for number, _ in gone}
    for number, note in enumerate(notes):
        here = numbers & {item.number for item in plan.shard(number)}
        if here and not note.get("compared"):
            _drop(out, number, note, here)
    kept = Counter(item.teacher for item in plan.items)
    for number, *_ in dropped:
        kept[plan.items[number].teacher] -= 1
    if not sum(kept.values()):
        counts = Counter(name for _, name, _ in dropped)
        raise UserError(
            f"no image is left for {out}: {', '.join(f'{name} dropped {n:,}' for name, n in counts.items())}",
            cure="look at the teachers and thresholds, then start again in another folder",
        )
    manifest = _manifest(plan, notes, kept, dropped)
    write(out / DROPPED, b"".join(_dropped_line(plan, *row) for row in sorted(dropped)), out / UNFINISHED / "d.tmp")
    write(out / CARD, _card(plan, manifest), out / UNFINISHED / "c.tmp")
    for number, note in enumerate(notes):
        if not note["entry"]["count"]:
            (out / shard_name(number)).unlink()
    write(out / MANIFEST, json.dumps(manifest, indent=1) + "\n", out / UNFINISHED / "m.tmp")
    shutil.rmtree(out / UNFINISHED)


def _compare(plan: SynthesisPlan, notes: Sequence[Mapping[str, Any]]) -> dict[tuple[int, str], float]:
    """``(item number, filter) -> score`` of what the filters that compare samples drop. Each sees what the ones before
    it have kept."""
    gone: dict[tuple[int, str], float] = {}
    for one in plan.filters:
        if not one.across:
            continue
        lost = {number for note in notes for number, *_ in note["dropped"]} | {number for number, _ in gone}
        marks = {int(key): mark for note in notes for key, mark in note["marks"].get(one.name, {}).items()}
        numbers = sorted(marks.keys() - lost)
        scores = one.rule.scores([marks[number] for number in numbers], one.threshold)
        gone |= {
            (number, one.name): score for number, score in zip(numbers, scores, strict=True) if not one.keeps(score)
        }
    return gone


def _drop(out: Path, number: int, note: dict[str, Any], gone: set[int]) -> None:
    """Write a shard anew without some of its samples."""

    def rest() -> Iterator[tuple[str, bytes, bytes]]:
        with (out / shard_name(number)).open("rb") as file:
            yield from (sample for sample in read_shard(file) if int(sample[0]) not in gone)

    note["compared"] = True
    _write(out, number, rest(), note)


def _manifest(
    plan: SynthesisPlan, notes: Sequence[Mapping[str, Any]], kept: Mapping[str, int], dropped: Sequence[Sequence[Any]]
) -> dict[str, Any]:
    planned = Counter(item.teacher for item in plan.items)
    by_filter: dict[str, dict[str, int]] = {one.name: dict.fromkeys(plan.teachers, 0) for one in plan.filters}
    for number, name, _ in dropped:
        by_filter[name][plan.items[number].teacher] += 1
    shards = {
        shard_name(number): {key: note["entry"][key] for key in ("sha256", "bytes", "count")}
        for number, note in enumerate(notes)
        if note["entry"]["count"]
    }
    return {
        "format": FORMAT,
        "plan": plan.settings,
        "plan_hash": plan.hash,
        "size": notes[0]["size"],
        "count": sum(kept.values()),
        "planned": {name: planned[name] for name in plan.teachers},
        "kept": {name: kept[name] for name in plan.teachers},
        "dropped": by_filter,
        "repeated": plan.repeated,
        "shards": shards,
    }


def _dropped_line(plan: SynthesisPlan, number: int, name: str, score: float) -> bytes:
    item = plan.items[number]
    line = {"number": number, "caption": item.caption, "teacher": item.teacher, "seed": item.seed}
    return encode_json(line | {"filter": name, "score": score}) + b"\n"


def _summary(plan: SynthesisPlan, out: Path, drawn: int, seconds: float) -> Synthesis:
    manifest = read_manifest(out)
    return Synthesis(
        out, manifest["planned"], manifest["kept"], manifest["dropped"], manifest["repeated"], drawn, seconds
    )


def _card(plan: SynthesisPlan, manifest: Mapping[str, Any]) -> str:
    """The store's README.md: what is in it and how to read it; its head tells Hugging Face where the samples lie."""
    height, width = manifest["size"]
    planned, kept = manifest["planned"], manifest["kept"]
    rows = [
        f"| {name} | `{teacher.fingerprint[:16]}` | {planned[name]:,} | {kept[name]:,} |"
        for name, teacher in plan.teachers.items()
    ]
    filters = [
        f"- `{one.name}` (at least {one.threshold:g}): {sum(manifest['dropped'][one.name].values()):,} dropped"
        for one in plan.filters
    ]
    return "\n".join([
        "---", "task_categories:", "- text-to-image", "tags:", "- synthetic", "- stillroom", "configs:",
        "- config_name: default", "  data_files:", "  - split: train", '    path: "shard-*.tar"', "---", "",
        "# Synthetic images with captions", "",
        f"{manifest['count']:,} images of {width}x{height}, drawn by:", "",
        "| teacher | weights | planned | kept |", "| --- | --- | ---: | ---: |", *rows, "",
        f"{plan.settings['captions']['count']:,} captions, seeds {' '.join(map(str, plan.settings['seeds']))}, "
        f"route `{plan.settings['route']}`. Plan `{plan.hash[:16]}`.", "",
        "Filters:" if filters else "No filters.", "", *filters, "",
        "Each sample is a PNG and a JSON record: caption, teacher, hash of its weights, seed, the seed and the batch",
        "row that it was drawn from, sampler, source file, scores.",
        f"`{DROPPED}` lists what the filters dropped.", "",
        "```python",
        "from stillroom.data.store import read_store", "",
        "images, captions, records = read_store(FOLDER)", "",
        "from datasets import load_dataset", "",
        'rows = load_dataset(FOLDER, split="train")', "",
        "import webdataset", "",
        'stream = webdataset.WebDataset(SHARDS, shardshuffle=False).decode("pil")', "```", "",
    ])  # fmt: skip
