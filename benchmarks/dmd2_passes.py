"""What dmd2's student learns when its discriminator takes fewer passes, at equal updates.

    python benchmarks/dmd2_passes.py [WORD ...]

With words given, only settings whose name holds one of them are trained; the rows of the others stay as recorded.

The arms differ in ``gan_network`` and ``gan_pass`` alone: the paper's form (the fake score's features, by passes of
their own), the fake score's with generated samples judged in the pass of their scores, and the frozen teacher's, with
passes of their own and with the scores'. Seeds are none of those that proofs are judged by. On points the student is
trained with the GAN beside distribution matching and by the GAN alone, where the discriminator is all that it has.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from typing import Any

import torch
from common import OUT, Row, record

from stillroom.bench import benches
from stillroom.proofs.base import Arm
from stillroom.proofs.dmd2 import DMD2, POINTS
from stillroom.proofs.runner import run_arm

SEEDS = (100, 101, 102)
FORMS: dict[str, dict[str, Any]] = {
    "fake score, own passes (the paper's)": {},
    "fake score, shared pass": {"gan_pass": "shared"},
    "teacher, own passes": {"gan_network": "teacher"},
    "teacher, shared pass (FastGen's)": {"gan_network": "teacher", "gan_pass": "shared"},
}
GAN = {"gan_weight": 0.1, "critic_gan_weight": 0.1}
SHORT = POINTS.with_("points", engine={"steps": 400})
SETTINGS: dict[str, tuple[str, Arm, tuple[str, ...]]] = {
    "ring, with GAN": ("ring", SHORT.with_("points", options=GAN), ("ced",)),
    "ring, by the GAN alone": (
        "ring",
        SHORT.with_("gan", options={"distribution_matching": 0.0, "gan_weight": 1.0, "critic_gan_weight": 1.0}),
        ("ced",),
    ),
    "fashion, the shipped recipe for a quarter of its steps": (
        "fashion",
        DMD2.with_("quarter", engine={"steps": DMD2.engine["steps"] // 4}),
        ("fd", "coverage"),
    ),
}


def measure(setting: str, form: str) -> Row:
    name, arm, scores = SETTINGS[setting]
    found: list[dict[str, Any]] = []
    for seed in SEEDS:
        found.append(run_arm(arm.with_(arm.name, options=FORMS[form]), benches()[name](seed)))
    row: Row = {"setting": setting, "discriminator reads": form}
    for score in scores:
        values = [float(run["scores"][score]) for run in found]
        row |= {f"{score}, mean": statistics.mean(values), f"{score}, seeds": ", ".join(f"{v:.4g}" for v in values)}
    row |= {"training, s": statistics.mean(run["cost"].get("seconds", 0.0) for run in found)}
    print(row, flush=True)
    return row


def main(words: Sequence[str]) -> None:
    torch.set_num_threads(1)
    file = OUT / "dmd2_passes.json"
    recorded: list[Row] = json.loads(file.read_text())["rows"] if file.is_file() else []
    rows: list[Row] = []
    for setting in SETTINGS:
        if words and not any(word in setting for word in words):
            rows += [row for row in recorded if row["setting"] == setting]
        else:
            rows += [measure(setting, form) for form in FORMS]
    record(
        "DMD2's discriminator by fewer passes",
        f"Quality of dmd2's student by what its discriminator reads, at equal updates and {len(SEEDS)} seeds "
        "(distances: lower is better).",
        "python benchmarks/dmd2_passes.py",
        rows,
    )


if __name__ == "__main__":
    main(sys.argv[1:])
