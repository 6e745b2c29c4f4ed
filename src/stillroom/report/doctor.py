"""What looks wrong in a run, from its log, its recipe and its scores, and what to try.

Each rule is a small function that yields findings. Thresholds are deliberately wide: a rule that fires on healthy runs
is worse than none.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median, pstdev
from typing import Any, Literal

from stillroom.report.log import read_metrics, read_recipe, read_result, series

Curve = tuple[list[int], list[float]]


@dataclass(frozen=True)
class Finding:
    """One observation, with its evidence in ``what``, and the first thing to try."""

    level: Literal["wrong", "doubtful", "well"]
    what: str
    advice: str = ""


@dataclass
class Patient:
    """All that the rules look at."""

    recipe: dict[str, Any]
    rows: list[dict[str, Any]]
    result: dict[str, Any]
    bands: dict[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def engine(self) -> dict[str, Any]:
        return self.recipe.get("engine", {})

    def curves(self, prefix: str, pattern: str = "") -> dict[str, Curve]:
        """Curves with at least eight finite points whose name matches."""
        found = {}
        for name, (steps, values) in series(self.rows, prefix).items():
            finite = [(s, v) for s, v in zip(steps, values, strict=True) if math.isfinite(v)]
            if re.search(pattern, name) and len(finite) >= 8:
                found[name] = ([s for s, _ in finite], [v for _, v in finite])
        return found


def examine(run_dir: Path) -> list[Finding]:
    """All findings on a run, the worst first. Raises UserError if the folder is no run."""
    recipe = read_recipe(run_dir)
    patient = Patient(recipe, read_metrics(run_dir), read_result(run_dir), expected_bands(str(recipe.get("method"))))
    findings = [finding for rule in RULES for finding in rule(patient)]
    findings.sort(key=lambda finding: ("wrong", "doubtful", "well").index(finding.level))
    return findings or [Finding("well", f"nothing looks wrong ({len(RULES)} rules, {len(patient.rows)} rows of log)")]


def expected_bands(method: str, results: Path = Path("results")) -> dict[str, tuple[float, float]]:
    """``{health number: (low, high)}`` as the method's proof measured them, where its result is at hand."""
    path = results / f"{method}.json"
    try:
        health = json.loads(path.read_text(encoding="utf-8")).get("health", {})
        return {name: (float(low), float(high)) for name, (low, high) in health.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _quarter(values: Sequence[float], number: int) -> list[float]:
    size = max(len(values) // 4, 1)
    return list(values[(number - 1) * size : number * size] if number < 4 else values[-size:])


def _progress(patient: Patient) -> Iterator[Finding]:
    steps = int(patient.engine.get("steps", 0))
    if patient.engine.get("steps") == 0:
        yield Finding("well", "no step was trained, as engine.steps: 0 asks for: the student is as its method made it")
        return
    if not patient.rows:
        yield Finding(
            "wrong", "there is no log yet: not one row in metrics.jsonl", "let it run, or look at what it printed"
        )
        return
    last = int(patient.rows[-1]["step"])
    log_every = int(patient.engine.get("log_every", 1))
    if not patient.result and last + log_every < steps:
        yield Finding("doubtful", f"the run is not finished: step {last} of {steps}", "stillroom run --resume RUN")
    if patient.result and steps < 300:
        yield Finding(
            "doubtful", f"only {steps} steps: students usually need some hundred to move at all", "engine.steps=2000"
        )
    warmup = int(patient.engine.get("warmup", 0))
    if warmup > steps / 2:
        yield Finding(
            "doubtful", f"the warm-up ({warmup} steps) takes over half of the run", f"engine.warmup={steps // 20}"
        )


def _not_finite(patient: Patient) -> Iterator[Finding]:
    for prefix in ("loss/", "grad_norm/", "health/"):
        for name, (steps, values) in series(patient.rows, prefix).items():
            bad = next((s for s, v in zip(steps, values, strict=True) if not math.isfinite(v)), None)
            if bad is not None:
                yield Finding(
                    "wrong",
                    f"{prefix}{name} is not a number at step {bad}",
                    "a lower learning rate for that turn (engine.optim.TURN.lr), clip_norm, or engine.precision=fp32",
                )


def _fake_score(patient: Patient) -> Iterator[Finding]:
    for name, (_, values) in patient.curves("health/", "^fake_error$").items():
        early, late = fmean(_quarter(values, 2)), fmean(_quarter(values, 4))
        if early > 0 and late > 1.5 * early:
            yield Finding(
                "wrong" if late > 3 * early else "doubtful",
                f"the fake score falls behind the student: {name} rose from {early:.3g} to {late:.3g}",
                "more critic turns per student turn (options.critic_turns), or a lower student learning rate",
            )


def _spikes(patient: Patient) -> Iterator[Finding]:
    for prefix in ("loss/", "grad_norm/"):
        for name, (steps, values) in patient.curves(prefix).items():
            typical = median(abs(v) for v in values)
            late = [(s, abs(v)) for s, v in zip(steps, values, strict=True) if s > steps[-1] // 10]
            high = [(s, v) for s, v in late if v > 30 * typical > 0]
            if high:
                step, worst = max(high, key=lambda pair: pair[1])
                yield Finding(
                    "doubtful",
                    f"{prefix}{name} jumps {len(high)} time{'s' if len(high) > 1 else ''}, "
                    f"at step {step} to {worst / typical:.0f} times its median",
                    f"engine.optim.{name.split('/')[0]}.clip_norm=1, or a lower learning rate there",
                )


def _gradient_ratio(patient: Patient) -> Iterator[Finding]:
    for name, (_, values) in patient.curves("health/", "grad.*ratio").items():
        late = median(abs(v) for v in _quarter(values, 4))
        if late > 100 or 0 < late < 0.01:
            weak, strong = ("first", "second") if late < 1 else ("second", "first")
            yield Finding(
                "doubtful",
                f"one loss term drowns the other: {name} is {late:.3g}, the {weak} term hardly counts",
                f"divide the weight of the {strong} term by about {max(late, 1 / late) / 10:.0f}",
            )


def _spread(patient: Patient) -> Iterator[Finding]:
    for name, (_, values) in patient.curves("health/", "sample_std|diversity").items():
        early, late = median(_quarter(values, 1)), median(_quarter(values, 4))
        if early > 0 and late < 0.5 * early:
            yield Finding(
                "wrong" if late < 0.2 * early else "doubtful",
                f"the samples collapse: {name} fell from {early:.3g} to {late:.3g}",
                "a lower student learning rate, more critic turns, or a lower guidance scale",
            )
        elif early > 0 and late > 2 * early:
            yield Finding(
                "wrong",
                f"the samples explode: {name} rose from {early:.3g} to {late:.3g}",
                "a lower student learning rate; check that teacher and data use one value range",
            )
        second_half = values[len(values) // 2 :]
        if late > 0 and pstdev(second_half) > 0.25 * abs(fmean(second_half)):
            yield Finding(
                "doubtful",
                f"{name} swings by {pstdev(second_half) / abs(fmean(second_half)):.0%} in the second half of training",
                "more critic turns per student turn (options.critic_turns), or export an average (engine.ema)",
            )


def _average(patient: Patient) -> Iterator[Finding]:
    steps, batch = int(patient.engine.get("steps", 1)), int(patient.engine.get("batch", 1))
    if not steps:
        return
    for ema in patient.engine.get("ema", []):
        if "decay" in ema and 0 < ema["decay"] < 1:
            half = math.log(0.5) / math.log(ema["decay"])
        elif "half_life" in ema and not ema.get("ramp"):
            half = ema["half_life"] / batch
        else:
            continue
        if half > steps / 4:
            name = ema.get("name", "ema")
            used = " and is what becomes the student" if patient.engine.get("export") == name else ""
            yield Finding(
                "wrong" if used and half > steps else "doubtful",
                f"the average {name!r} lags: its half-life is {half:.0f} of {steps} steps{used}",
                f"a shorter average (a decay of {max(0.5, 1 - 20 / steps):.3g}), or more steps",
            )


def _discriminator(patient: Patient) -> Iterator[Finding]:
    real, fake = patient.curves("health/", "^real_logit$"), patient.curves("health/", "^fake_logit$")
    if not real or not fake:
        return
    gap = fmean(_quarter(real["real_logit"][1], 4)) - fmean(_quarter(fake["fake_logit"][1], 4))
    if gap > 8:
        yield Finding(
            "doubtful",
            f"the discriminator always wins: its logits of real and generated images lie {gap:.3g} apart",
            "a lower critic GAN weight (options.critic_gan_weight): a sure discriminator teaches the student little",
        )


def _winner_drift(patient: Patient) -> Iterator[Finding]:
    for _, (_, values) in patient.curves("health/", "^winner_drift$").items():
        if (late := fmean(_quarter(values, 4))) > 0:
            yield Finding(
                "wrong" if late > 0.05 else "doubtful",
                f"preference learning damages what it should keep: the loss on the winners rose by {late:.3g}",
                "a lower learning rate or beta for that stage, or a higher anchor (options.anchor)",
            )


def _bands(patient: Patient) -> Iterator[Finding]:
    for name, (low, high) in patient.bands.items():
        curve = patient.curves("health/").get(name)
        if curve and not low <= (late := median(_quarter(curve[1], 4))) <= high:
            yield Finding(
                "doubtful",
                f"{name} ends at {late:.3g}; in this method's proof it ends between {low:.3g} and {high:.3g}",
                "compare the recipe with the shipped one",
            )


def _scores(patient: Patient) -> Iterator[Finding]:
    """The student's scores against those of its best teacher, where a score says when that is too little."""
    from stillroom.report.rows import metrics, number, teachers

    scores = patient.result.get("scores", {})
    student = scores.get("student", {})
    for score in metrics(patient.result):
        found = [scores.get(who, {}).get(score.key) for who in teachers(patient.result)]
        theirs, mine = [value for value in found if value is not None], student[score.key]
        if not theirs or mine is None:
            continue
        best = min(theirs) if score.better == "lower" else max(theirs)
        if score.alarms(mine, best):
            yield Finding(
                "doubtful",
                f"{score.says}: {score.name} {number(mine)}, its teacher {number(best)}",
                score.advice,
            )


RULES: tuple[Callable[[Patient], Iterator[Finding]], ...] = (
    _progress, _not_finite, _fake_score, _spikes, _gradient_ratio, _spread, _average, _discriminator, _winner_drift,
    _bands, _scores,
)  # fmt: skip
