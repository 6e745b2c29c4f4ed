"""Where shipped recipes leave their papers, or did, both forms trained alike: what each leads to.

    python benchmarks/recipe_deviations.py [WORD ...]

Three seeds that no proof uses, shorter than the proofs' own arms. With words given, only forms whose name holds one of
them are trained; the rows of the others stay as they were recorded.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from statistics import fmean, stdev
from typing import Any

from common import OUT, Row, record

from stillroom.bench import get_bench
from stillroom.proofs import get_proofs
from stillroom.proofs.base import Arm
from stillroom.proofs.image import recorded_arm
from stillroom.proofs.runner import train_arm

SEEDS = (10, 11, 12)
STEPS = 600
"""On points; on images a quarter of the recipe's."""
SCORES = {"ring": ("ced",), "pair": ("accuracy", "shift", "std_across"), "fashion": ("fd", "class_agreement")}


def uniform(low: float, high: float) -> dict[str, Any]:
    return {"law": "uniform", "low": low, "high": high}


LATE, COVERING, WHOLE = uniform(0.05, 0.98), uniform(0.02, 0.98), uniform(0.001, 1.0)
EDM = {
    "generator_times": {"law": "karras", "low": 0.0, "high": 0.8},
    "critic_times": {"law": "log-normal", "mean": -1.2, "std": 1.2},
}
QUERIES_AND_VALUES = {"rank": 64, "lora_alpha": 108.0, "targets": ["to_q", "to_v"]}


def points(method: str) -> Arm:
    """The first arm of the method's proof on points."""
    return next(proof for proof in get_proofs(method) if proof.level == "mechanism").arms[0]


def forms() -> Iterator[tuple[str, str, Arm]]:
    """Name, bench and arm of each form."""
    brush = points("swiftbrush")
    for own, other in ((1.5, 1.0), (1.5, 1.5), (1.0, 1.0)):
        arm = brush.with_("", options={"guidance": own, "fake_guidance": other})
        yield f"swiftbrush, teacher guided {own}, fake score {other}", "pair", arm
    yield "swiftbrush, fake score from 0.05", "ring", brush.with_("", options={"fake_times": LATE})
    yield "swiftbrush, fake score from 0.001", "ring", brush.with_("", options={"fake_times": WHOLE})

    gan = {"gan_weight": 0.003, "critic_gan_weight": 0.1, "critic_times": LATE}
    dmd2 = points("dmd2").with_("", options=gan)
    yield "dmd2, critic from 0.05, w_D 0.1", "ring", dmd2
    yield "dmd2, critic from 0.001, w_D 0.1", "ring", dmd2.with_("", options={"critic_times": WHOLE})
    both = {"critic_times": WHOLE, "critic_gan_weight": 0.01}
    yield "dmd2, critic from 0.001, w_D 0.01", "ring", dmd2.with_("", options=both)

    for method in ("sim", "sid-lsg", "uni-instruct"):
        for start, law in ((0.05, LATE), (0.02, COVERING)):
            yield f"{method}, critic from {start}", "ring", points(method).with_("", options={"critic_times": law})
    for method in ("sim", "uni-instruct"):
        yield f"{method}, EDM's times", "ring", points(method).with_("", options=EDM)

    brush = recorded_arm("swiftbrush")
    yield "swiftbrush, six kinds of module, rank 32", "fashion", brush
    yield "swiftbrush, queries and values, rank 64", "fashion", brush.with_("", options=QUERIES_AND_VALUES)
    yield "swiftbrush, both guided 1.5", "fashion", brush.with_("", options={"fake_guidance": 1.5})
    yield "swiftbrush, fake score from 0.001", "fashion", brush.with_("", options={"fake_times": WHOLE})

    dmd2 = recorded_arm("dmd2")
    yield "dmd2, critic from 0.05, w_D 0.1", "fashion", dmd2
    yield "dmd2, critic from 0.001, w_D 0.1", "fashion", dmd2.with_("", options={"critic_times": WHOLE})
    yield "dmd2, critic from 0.001, w_D 0.01", "fashion", dmd2.with_("", options=both)
    for method in ("sim", "sid-lsg", "uni-instruct"):
        for start, law in ((0.05, LATE), (0.02, COVERING)):
            arm = recorded_arm(method).with_("", options={"critic_times": law})
            yield f"{method}, critic from {start}", "fashion", arm


def updates(bench: str, arm: Arm) -> int:
    return arm.engine["steps"] // 4 if bench == "fashion" else STEPS


def measure(bench: str, arm: Arm) -> dict[str, list[float]]:
    """Each score, seed by seed."""
    found: dict[str, list[float]] = {name: [] for name in SCORES[bench]}
    for seed in SEEDS:
        world = get_bench(bench, seed)
        network, sampler, _ = train_arm(arm.with_("form", engine={"steps": updates(bench, arm)}), world)
        scores = world.score(world.model(network.eval(), sampler), seed)
        for name, values in found.items():
            values.append(scores[name])
    return found


def main(words: Sequence[str]) -> None:
    file = OUT / "recipe_deviations.json"
    kept = {row["form"]: row for row in json.loads(file.read_text())["rows"]} if file.is_file() else {}
    rows: dict[str, Row] = {}
    for name, bench, arm in forms():
        labels = {score: f"{name} ({bench}, {score})" for score in SCORES[bench]}
        if words and not any(word in label for word in words for label in labels.values()):
            rows |= {label: kept[label] for label in labels.values() if label in kept}
            continue
        for score, values in measure(bench, arm).items():
            rows[labels[score]] = {
                "form": labels[score],
                "updates": updates(bench, arm),
                "mean": fmean(values),
                "sd": stdev(values),
            }
            print(rows[labels[score]], flush=True)
    record(
        "Recipes beside their papers",
        f"Both forms of what a recipe changes, trained alike at seeds {SEEDS[0]} to {SEEDS[-1]}, which no proof uses",
        "python benchmarks/recipe_deviations.py",
        list(rows.values()),
    )


if __name__ == "__main__":
    main(sys.argv[1:])
