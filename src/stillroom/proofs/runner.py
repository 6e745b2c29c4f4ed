"""Running proofs: arms x seeds in worker processes, each result kept, verdicts computed from what was measured."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, get_args

import torch
from torch import Tensor, nn

from stillroom.bench import Bench, bench_class, get_bench
from stillroom.cache import kept
from stillroom.diffusion.sampling import Sampler, sampler_from_dict
from stillroom.draws import mix
from stillroom.engine.trainer import Trainer
from stillroom.errors import TrainingDiverged, UserError
from stillroom.evaluation.cost import latency
from stillroom.evaluation.scores import Score
from stillroom.files import make_folder, write
from stillroom.method import Method, get_method
from stillroom.networks.mae import learned
from stillroom.proofs import get_proofs
from stillroom.proofs.base import Arm, Claim, Level, Proof
from stillroom.recipe import Recipe
from stillroom.surgery.initial import fresh_weights
from stillroom.surgery.modules import parameter_count
from stillroom.training import build_method, train

RESULTS = Path("results")
NOT_MEASURED = "not measured"
"""The verdict on a claim whose arms were not all run."""
CONTROLS = ("bench", "shuffled", "untrained")
"""What an arm's teacher may be beside the name of another one of the bench."""


def run_arm(arm: Arm, bench: Bench, keep: bool = False) -> dict[str, Any]:
    """Train (if there is anything to train) and score one arm, at the bench's seed. keep: its weights, for other arms
    that start from them.

    A training that diverges is a result too: its scores are the worst that there are and ``diverged`` says where.
    """
    try:
        network, sampler, facts = train_arm(arm, bench)
    except TrainingDiverged as error:
        steps = int(arm.engine.get("steps", 0))
        worst = {score.key: score.lost for score in bench.scores}
        return {"scores": worst, "diverged": str(error), "cost": {"steps": steps}, "health": {}}
    if keep:
        finished_weights(arm, bench, network)
    model = bench.model(network.eval(), sampler)
    scores = bench.score(model, bench.seed)
    speed = latency(lambda _: bench.draw(model, 1), batches=(1,))[0]
    cost = {
        "seconds": facts["seconds"],
        "steps": facts["steps"],
        "nfe": sampler.nfe,
        "params": parameter_count(network),
        "latency_ms": round(speed.median_ms, 3),
    }
    return {"scores": scores, "cost": cost} | {name: facts[name] for name in ("health", "means", "last")}


def train_arm(arm: Arm, bench: Bench) -> tuple[nn.Module, Sampler, dict[str, Any]]:
    """The arm's finished network, how it is run, and ``seconds``, ``steps``, ``health`` of its training at the bench's
    seed: a run's own training (:mod:`stillroom.training`), on the bench's data.

    Raises TrainingDiverged.
    """
    seed, started = bench.seed, time.perf_counter()
    facts: dict[str, Any] = {"steps": 0, "health": {}, "means": {}, "last": {}}
    if not arm.method:
        network, sampler = bench.network(**arm.data), sampler_from_dict(dict(arm.sampler))
        return network, sampler, facts | {"seconds": round(time.perf_counter() - started, 1)}
    recipe = recipe_of(arm, bench.name, seed)
    chosen = {} if arm.teacher in CONTROLS else {"teacher": arm.teacher}
    chosen |= {"student": arm.student} if arm.student else {}
    method = build_method(recipe, lambda: bench.given(**chosen))
    if arm.teacher == "untrained":
        forget(method, seed)
    network, sampler = method.role("student"), method.sampler()
    if arm.after is not None:
        network.load_state_dict(finished_weights(arm.after, bench))
        started = time.perf_counter()  # what it starts from is another arm's cost
    steps = recipe.engine.steps
    if steps or type(method).fit is not Method.fit:  # an untouched student is not calibrated either
        data = bench.data(**arm.data)
        if arm.teacher == "shuffled":
            data = bench.mislead(method, data)
        with tempfile.TemporaryDirectory() as folder:
            network, sampler = train(Trainer(method, data, recipe.engine, Path(folder)))
            curves = Path(folder) / "metrics.jsonl"
            facts = {"steps": steps, "health": health_curves(curves), "means": health_means(curves)}
            facts["last"] = last_health(curves)
    if arm.sampler:
        sampler = sampler_from_dict(dict(arm.sampler))
    return network, sampler, facts | {"seconds": round(time.perf_counter() - started, 1)}


def recipe_of(arm: Arm, bench: str, seed: int) -> Recipe:
    """What a run would be told to train as the arm does, checked as recipes are. Its teacher and its data are the
    bench's, in place of what a recipe would name."""
    steps = int(arm.engine.get("steps", 0))
    engine = {**arm.engine, "steps": steps, "seed": seed, "checkpoint_every": max(steps, 1), "keep": 1}
    parts = {"options": dict(arm.options), "lora": {role: dict(v) for role, v in arm.lora.items()}, "engine": engine}
    return Recipe.from_dict({"method": arm.method, "teacher": bench, "data": bench, **parts})


def forget(method: Method, seed: int) -> None:
    """Give the teachers that ``method`` holds new weights, drawn as their classes draw them; fixed positions stay."""
    for place, teacher in enumerate(method.teachers().values()):
        drawn = learned(fresh_weights(teacher, mix("forget", seed, place)))
        teacher.load_state_dict({**teacher.state_dict(), **drawn})


def finished_weights(arm: Arm, bench: Bench, network: nn.Module | None = None) -> dict[str, Tensor]:
    """The weights that ``arm`` ends with, those of ``network`` where it has just ended: trained once, kept in the cache
    for the arms that start from them."""
    code, parts = [get_method(arm.method), Trainer, type(bench)], [arm.key(bench.name, bench.seed)]

    def make() -> dict[str, Tensor]:
        return (network or train_arm(arm, bench)[0]).state_dict()

    return kept(f"proofs/{bench.name}", make, code=code, parts=parts)


def health_means(path: Path) -> dict[str, float]:
    """``{"health/<name>": mean}`` over the second half of the training: a claim may compare them as it does scores."""
    return {name: fmean(values) for name, values in _second_half(path).items() if name.startswith("health/")}


def last_health(path: Path) -> dict[str, float]:
    """``{"last/<name>": value}`` of each health number as it was last taken: what a training ends with, where a mean
    would count the way there."""
    curves = _second_half(path)
    return {f"last/{name[7:]}": values[-1] for name, values in curves.items() if name.startswith("health/")}


def health_curves(path: Path) -> dict[str, list[float]]:
    """``{name: [least, greatest]}`` of each health number over the second half of the training."""
    return {name: [min(values), max(values)] for name, values in _second_half(path).items()}


def _second_half(path: Path) -> dict[str, list[float]]:
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    rows = rows[len(rows) // 2 :]
    names = sorted({key for row in rows for key in row if key.startswith(("health/", "grad_norm/"))})
    curves = {name: [row[name] for row in rows if row.get(name) is not None] for name in names}
    return {name: values for name, values in curves.items() if values}


def _work(
    arm: Arm, bench: type[Bench], method: type[Method] | None, seed: int, keep: bool, out: Path
) -> tuple[str, int, float]:
    """Run in a process of its own, to which the classes bring the modules that make bench and method known."""
    torch.set_num_threads(1)
    started = time.perf_counter()
    result = run_arm(arm, bench(seed), keep)
    result |= {"arm": arm.name, "world": bench.name, "seed": seed, "commit": commit(), "machine": machine()}
    out.parent.mkdir(parents=True, exist_ok=True)
    write(out, to_json(result))
    return arm.name, seed, time.perf_counter() - started


def arm_file(results: Path, proof: Proof, arm: Arm, seed: int) -> Path:
    """Where one measured arm lies. Equal arms of different proofs share the file through the content hash."""
    return results / "arms" / proof.bench / f"{arm.key(proof.bench, seed)}.json"


def prove(
    slugs: Sequence[str],
    seeds: Sequence[int] = (0, 1, 2),
    level: str = "all",
    jobs: int = 2,
    results: Path = RESULTS,
    report: Callable[[str], None] = print,
    arms: Iterable[str] | None = None,
) -> list[dict[str, Any]]:
    """Run what is missing of the proofs of ``slugs``, write ``results/<slug>.json``, return those results.

    level: ``mechanism``, ``image``, ``text`` or ``all``. arms: only train these arms (claims stay as they are until all
    are in).
    An arm already measured with the same settings is not run again. Raises UserError for unknown slugs.
    """
    if level not in (levels := (*get_args(Level), "all")):
        raise UserError(f"unknown level {level!r}", cure=f"choose one of: {', '.join(levels)}")
    if not seeds or len(set(seeds)) != len(seeds):
        raise UserError("a proof needs distinct seeds", cure="for example --seeds 0 1 2")
    make_folder(results)
    chosen = [p for slug in slugs for p in get_proofs(slug) if level in ("all", p.level)]
    wanted = set(arms) if arms is not None else None
    todo: dict[Path, tuple[Arm, type[Bench], type[Method] | None, int, bool]] = {}
    for proof in chosen:
        starts = [arm.after for arm in proof.arms if arm.after is not None]
        for seed in seeds:
            for arm in sorted(proof.arms, key=lambda arm: arm.after is not None):  # what they start from first
                out = arm_file(results, proof, arm, seed)
                if not out.exists() and (wanted is None or arm.name in wanted):
                    method = get_method(arm.method) if arm.method else None
                    todo.setdefault(out, (arm, bench_class(proof.bench), method, seed, arm in starts))
    if todo:
        report(f"{len(todo)} trainings to run, {jobs} at a time")
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(_work, *what, out) for out, what in todo.items()]
        for done, future in enumerate(as_completed(futures), 1):
            name, seed, seconds = future.result()
            report(f"[{done}/{len(todo)}] {name} seed {seed}: {seconds:.0f} s")
    return [write_result(slug, seeds, results) for slug in dict.fromkeys(slugs)]


def write_result(slug: str, seeds: Sequence[int], results: Path = RESULTS) -> dict[str, Any]:
    """Put together ``results/<slug>.json`` from the measured arms. A claim whose arms were not all run, at every
    seed, has the verdict ``not measured`` and names them. What arms were at some of the seeds alone stands apart, under
    ``partly``: for tables, not for verdicts."""
    claims, floors, hashes, health, notes = [], {}, [], {}, {}
    partly: dict[str, dict[str, Any]] = {}
    commits, machines = set(), set()
    for proof in get_proofs(slug):
        measured: dict[str, list[dict[str, Any]]] = {}
        some: dict[str, list[dict[str, Any]]] = {}
        for arm in proof.arms:
            files = [arm_file(results, proof, arm, seed) for seed in seeds]
            hashes += [f.stem for f in files]
            if found := [read_arm(f, bench_class(proof.bench).scores) for f in files if f.exists()]:
                (measured if len(found) == len(files) else some)[arm.name] = found
        if some and proof.level != "mechanism":
            partly[proof.bench] = {
                name: {"seeds": [run["seed"] for run in runs]}
                | {key: _summary(runs, key) for key in (score.key for score in bench_class(proof.bench).scores)}
                for name, runs in some.items()
            }
        claims += [_judge(claim, proof, measured) for claim in proof.claims]
        notes[proof.bench] = proof.note
        seen = measured | (some if proof.level != "mechanism" else {})
        if not seen:
            continue
        floors[proof.bench] = get_bench(proof.bench).floor()
        commits |= {run["commit"] for runs in seen.values() for run in runs}
        machines |= {run["machine"] for runs in seen.values() for run in runs}
        if proof.level != "mechanism" and not health and proof.arms[0].name in seen:
            health = _bands(seen[proof.arms[0].name])
    result = {
        "method": slug,
        "bench": sorted(notes),
        "commit": sorted(commits),
        "recipe_hash": sorted(hashes),
        "machine": sorted(machines),
        "seeds": list(seeds),
        "floor": floors,
        "notes": notes,
        "health": health,
        "claims": claims,
    } | ({"partly": partly} if partly else {})
    results.mkdir(parents=True, exist_ok=True)
    (results / f"{slug}.json").write_text(to_json(result))
    return result


def to_json(tree: Any) -> str:
    """Strict JSON: the scores of a diverged training, which are infinite, are written as null."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [plain(inner) for inner in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(plain(tree), indent=1, allow_nan=False) + "\n"


def read_arm(file: Path, scores: Iterable[Score]) -> dict[str, Any]:
    """A measured arm; null scores are the worst again, so that a diverged arm loses every comparison."""
    run, lost = json.loads(file.read_text()), {score.key: score.lost for score in scores}
    run["scores"] = {key: lost.get(key, math.nan) if value is None else value for key, value in run["scores"].items()}
    return run


def score(run: dict[str, Any], metric: str) -> float:
    """One score of a measured arm, the mean of a health number over the second half of its training
    (``health/<name>``) or the last one (``last/<name>``): not a number, which loses every comparison, where the arm has
    none (it was not trained, or diverged)."""
    kinds = {"health": "means", "last": "last"}
    kind = metric.split("/")[0]
    return run.get(kinds[kind], {}).get(metric, math.nan) if kind in kinds else run["scores"][metric]


def _judge(claim: Claim, proof: Proof, measured: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    unmeasured = [side for side in (claim.left, claim.right) if side and side not in measured]
    verdict = NOT_MEASURED
    if not unmeasured:
        lefts = [score(run, claim.metric) for run in measured[claim.left]]
        rights: list[float | None] = [None] * len(lefts)
        if claim.right:
            rights = [score(run, claim.metric) for run in measured[claim.right]]
        verdict = claim.verdict(lefts, rights)
    found = {
        "id": claim.id,
        "statement": claim.statement,
        "paper": claim.paper,
        "level": proof.level,
        "world": proof.bench,
        "metric": claim.metric,
        "left": claim.left,
        "right": claim.right,
        "op": claim.op,
        "margin": claim.margin,
        "verdict": verdict,
        "arms": {name: _summary(runs, claim.metric) for name, runs in measured.items()},
    }
    return found | ({"unmeasured": unmeasured} if unmeasured else {})


def _summary(runs: list[dict[str, Any]], metric: str) -> dict[str, Any]:
    values = [score(run, metric) for run in runs]
    finite = all(map(math.isfinite, values))
    keys = sorted({key for run in runs for key in run["cost"]})
    cost = {key: fmean(run["cost"][key] for run in runs if key in run["cost"]) for key in keys}
    found = {
        "values": values,
        "mean": fmean(values) if finite else None,
        "sd": stdev(values) if finite and len(values) > 1 else None,
        "cost": cost,
    }
    diverged = sum("diverged" in run for run in runs)
    return found | ({"diverged": diverged} if diverged else {})


def _bands(runs: list[dict[str, Any]]) -> dict[str, list[float]]:
    names = set.intersection(*(set(run["health"]) for run in runs))
    return {n: [min(r["health"][n][0] for r in runs), max(r["health"][n][1] for r in runs)] for n in sorted(names)}


def commit() -> str:
    try:
        out = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return out.stdout.strip()


def machine() -> str:
    """Processor, cores and library versions, in one line."""
    try:
        names = [
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ]
    except OSError:
        names = []
    cpu = names[0] if names else platform.processor() or platform.machine()
    return f"{cpu}, {os.cpu_count()} cores; Python {platform.python_version()}, torch {torch.__version__}"


def table(result: dict[str, Any]) -> list[tuple[str, str, str, str, str]]:
    """Rows ``(claim, arm, metric mean +- sd, cost, verdict)`` for the terminal."""
    rows = []
    for claim in result["claims"]:
        for side in filter(None, (claim["left"], claim["right"])):
            arm = claim["arms"].get(side)
            value, cost = value_text(arm), ""
            if arm is not None:
                cost = f"{arm['cost'].get('seconds', 0):.0f} s, {arm['cost'].get('nfe', 0):.0f} nfe"
            verdict = f"{claim['verdict']}: {claim['margin']}" if side == claim["left"] else ""
            rows.append(
                (claim["id"] if side == claim["left"] else "", side, f"{claim['metric']} {value}", cost, verdict)
            )
    return rows


def value_text(arm: Mapping[str, Any] | None) -> str:
    """An arm's mean and standard deviation over seeds. ``diverged`` where its trainings did; a dash where it has no
    such number (what only training logs, of an arm that is not trained); ``not measured`` where it was not run."""
    if arm is None:
        return NOT_MEASURED
    lost, seeds = arm.get("diverged", 0), len(arm["values"])
    told = "" if not lost else "diverged" if lost == seeds else f"diverged at {lost} of {seeds} seeds"
    if arm["mean"] is None or lost == seeds:
        return told or "–"
    return f"{arm['mean']:.4g} ± {arm['sd'] or 0:.2g}" + (f", {told}" if told else "")
