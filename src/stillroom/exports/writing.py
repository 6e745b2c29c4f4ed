"""One export: captured, written aside, opened again by its own runtime, compared, timed, and only then put in place."""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stillroom.errors import UserError, nearest
from stillroom.exports.formats import FORMATS, capture, quantize
from stillroom.files import digest, writing
from stillroom.folders.shipped import model_folder
from stillroom.recipe import Recipe
from stillroom.task import IN_MEMORY, FileJudge, Model, Part, Runner, load_model

FACTS = "export.json"
COMPARED = (1, 2, 5)
"""Batch sizes at which the exported file's answers are compared with eager's."""
TIMED = (1, 32)
TOLERANCE, ROUNDING = 1e-3, 1e-6
"""Largest error allowed, as a share of the largest output, and what is always allowed."""
ROUNDS, SECONDS, LONGEST = 31, 6.0, 60.0
"""Calls of each side per batch size; fewer where they would take longer than so many seconds; no batch is timed that
would take the longest time for one call."""


@dataclass(frozen=True)
class Exported:
    """folder: where the files lie. facts: what ``export.json`` says."""

    folder: Path
    facts: dict[str, Any]


def export_model(
    model: Any,
    to: str = "onnx",
    out: str | Path | None = None,
    *,
    int8: bool = False,
    whole: bool = False,
    data: str | None = None,
    force: bool = False,
    seconds: float = SECONDS,
) -> Exported:
    """Write a finished model as files of another runtime, with ``export.json`` beside them.

    model: a run, a model folder or a shipped model by name, or what ``stillroom.load`` returns. to: ``onnx``,
    ``openvino`` or ``torch``. out: the new folder, by default ``exports/NAME-TO``. int8: a second, quantised file of a
    classifier or encoder (onnx). whole: a second file from noise to images, of a one-step student. data: a data set
    with labels, for the scores of ``int8`` and the size of images; by default the run's. force: replace an older
    export. seconds: the most that each timing takes.

    Raises :class:`UserError`, and leaves nothing behind, for what cannot be exported, for missing packages, and where
    the written file answers otherwise than the model.
    """
    if to not in FORMATS:
        raise UserError(f"no format {to!r}{nearest(to, FORMATS)}", cure=f"choose one of: {', '.join(FORMATS)}")
    FORMATS[to].check(to)
    if int8 and to != "onnx":
        raise UserError(f"int8 is made by onnxruntime, not for {to}", cure="export with --to onnx")
    recipe, source, name = None, type(model).__name__, type(model).__name__
    if isinstance(model, str | Path):
        source, (name, recipe) = str(model), _home(model)
        model = load_model(model)
    elif not isinstance(model, Model):
        raise UserError(f"a {source} cannot be exported", cure="give a student of stillroom, or its folder")
    out = Path(out) if out is not None else Path("exports") / f"{name}-{to}"
    _check_place(out, force)
    if int8 and not model.int8:
        raise UserError("int8 is for classifiers and encoders", cure="leave --int8 out")
    data, test = _data(data, recipe, model)
    shape = getattr(test, "shape", ())  # of images
    parts = model.parts(whole, (shape[-2], shape[-1]) if shape else None)
    judge = model.judge(data, test) if int8 and data is not None else None
    facts: dict[str, Any] = {
        "source": source, "kind": type(model).__name__, "format": to, "versions": FORMATS[to].versions(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs, 1 thread used", "files": {},
    }  # fmt: skip
    facts |= model.export_facts()
    if int8:
        facts["scores_on"] = test.origin if judge else None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    except OSError as error:
        raise UserError(f"cannot write to {out.parent} ({error.strerror})", cure="choose another --out") from None
    try:
        with writing(out, full_disk_only=True):
            for stem, part in parts.items():
                facts["files"] |= _write(aside, stem, part, to, seconds, int8, judge)
            model.export_extras(aside)
            (aside / FACTS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
            aside.chmod(0o755)
            _put(aside, out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return Exported(out, json.loads(json.dumps(facts)))  # as the file says it: lists, no tuples


def _write(
    folder: Path, stem: str, part: Part, to: str, seconds: float, int8: bool, judge: FileJudge | None
) -> dict[str, Any]:
    """Write one part, and its quantised twin, and say of each file what it is and how it does."""
    form = FORMATS[to]
    path, others = folder / f"{stem}{form.suffix}", ", ".join(sorted(FORMATS.keys() - {to}))
    try:
        form.write(capture(part), path, part)
        runner = form.open(path)
    except UserError:
        raise
    except Exception as error:  # exporters raise errors of every kind
        first: BaseException = error
        while first.__cause__ is not None:
            first = first.__cause__
        said = str(first).strip().splitlines() or [""]
        raise UserError(
            f"a {part.kind} cannot be exported to {to} ({type(first).__name__}: {said[0][:200]})",
            cure=f"try another format: {others}",
        ) from error
    found = {path.name: _described(path, part, runner, seconds)}
    parity = found[path.name]["parity"]
    if parity["max_abs_error"] > TOLERANCE * parity["largest_output"] + ROUNDING:
        raise UserError(
            f"the exported {path.name} answers otherwise than the model: off by {parity['max_abs_error']:.3g}, where "
            f"the largest output is {parity['largest_output']:.3g}",
            cure=f"try another format: {others}",
        )
    if int8:
        small = folder / f"{stem}.int8{form.suffix}"
        quantize(path, small)
        found[small.name] = _described(small, part, quantised := form.open(small), seconds)
        if judge is not None:
            found[path.name]["scores"], found[small.name]["scores"] = judge(runner), judge(quantised)
    return found


def _described(path: Path, part: Part, runner: Runner, seconds: float) -> dict[str, Any]:
    beside = path.with_suffix(".bin") if path.suffix == ".xml" else path.with_name(f"{path.name}.data")  # its weights
    files = [file for file in (path, beside) if file.exists()]
    inputs = part.example(2, torch.Generator().manual_seed(0))
    outputs = part.eager(*inputs)
    return {
        "bytes": sum(file.stat().st_size for file in files),
        "sha256": {file.name: digest(file) for file in files},
        "inputs": [_port(name, value, part) for name, value in zip(part.inputs, inputs, strict=True)],
        "outputs": [_port(name, value, part) for name, value in zip(part.outputs, outputs, strict=True)],
        "parity": compare(part, runner),
        "latency": timings(part, runner, seconds),
    }


def _port(name: str, value: Tensor, part: Part) -> dict[str, Any]:
    shape: list[int | str] = ["batch", *value.shape[1:]]
    for axis, named in part.axes.get(name, {}).items():
        shape[axis] = named
    return {"name": name, "dtype": str(value.dtype).removeprefix("torch."), "shape": shape}


# --- checks -----------------------------------------------------------------------------------------------------------
def compare(part: Part, runner: Runner) -> dict[str, Any]:
    """The largest absolute difference from eager over all outputs, on random inputs of each batch size; infinite for
    NaN and for another shape."""
    error = largest = 0.0
    for batch in COMPARED:
        inputs = part.example(batch, torch.Generator().manual_seed(batch))
        for mine, theirs in zip(part.eager(*inputs), runner(*inputs), strict=True):
            difference = float((mine - theirs).abs().max()) if mine.shape == theirs.shape else math.inf
            error = max(error, math.inf if math.isnan(difference) else difference)
            largest = max(largest, float(mine.abs().max()))
    return {"batches": list(COMPARED), "max_abs_error": error, "largest_output": largest}


def timings(part: Part, runner: Runner, seconds: float = SECONDS, batches: Sequence[int] = TIMED) -> list[dict]:
    """Median milliseconds of eager and of the exported file, which take turns, on one thread; ``ratio`` is eager's time
    over the file's. A batch of which one call would take too long is left out."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    try:
        for batch in batches:
            if rows and rows[-1]["eager_ms"] / 1000 * batch / rows[-1]["batch"] > LONGEST:
                break
            inputs = part.example(batch, torch.Generator().manual_seed(batch))
            sides: list[Callable[[], Any]] = [lambda x=inputs: part.eager(*x), lambda x=inputs: runner(*x)]
            once = sum(_seconds(side) for side in sides for _ in range(2)) / 2  # warm-up as well
            rounds = max(3, min(ROUNDS, int(seconds / max(once, 1e-6))))
            taken = [[_seconds(side) for side in sides] for _ in range(rounds)]
            eager, exported = (1000 * statistics.median(side) for side in zip(*taken, strict=True))
            row = {"batch": batch, "eager_ms": eager, "exported_ms": exported, "ratio": eager / exported}
            rows.append({**row, "rounds": rounds})
    finally:
        torch.set_num_threads(threads)
    return rows


def _seconds(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


# --- what is known of a model -----------------------------------------------------------------------------------------
def _home(name: str | Path) -> tuple[str, Recipe | None]:
    """What the model is called, and the recipe of its run if it has one."""
    path = Path(str(name).rpartition("@")[0] or name) if "@" in str(name) and not Path(name).exists() else name
    folder = model_folder(path)
    run = folder.parent if folder.name == "student" else folder
    if (run / "recipe.yaml").is_file():
        return run.resolve().name, Recipe.load(run)
    return Path(path).resolve().name, None


def _data(named: str | None, recipe: Recipe | None, model: Model) -> tuple[str | None, Any]:
    """``(name, test split)`` of labelled data: those named, or the run's where they can still be read; else nothing."""
    name = named or (recipe.data if recipe is not None else IN_MEMORY)
    if name == IN_MEMORY:
        return None, None
    try:
        with recipe.place() if recipe is not None and named is None else contextlib.nullcontext():
            test = model.test_data(name)
    except UserError:
        if named is not None:
            raise
        return None, None
    return (name, test) if test is not None else (None, None)


# --- the folder -------------------------------------------------------------------------------------------------------
def _check_place(out: Path, force: bool) -> None:
    if not out.exists():
        return
    if not (out / FACTS).is_file():
        raise UserError(f"{out} is there already and is no export", cure="choose another --out")
    if not force:
        raise UserError(f"{out} is there already", cure="choose another --out, or replace it with --force")


def _put(aside: Path, out: Path) -> None:
    """Rename the finished folder into place; an older export steps aside first and is then removed."""
    if not out.exists():
        aside.rename(out)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{out.name}-old-", dir=out.parent))
    out.rename(old / out.name)
    try:
        aside.rename(out)
    except OSError:
        (old / out.name).rename(out)
        raise
    finally:
        shutil.rmtree(old)
