"""How few steps of its diffusion head a masked generator needs: scores and time.

    python benchmarks/head_steps.py [MODEL] [--n 600] [--seeds 3]

The same captions, the same noise at the start. A number of steps keeps the score where, over all seeds, SceneEval is at
most `LOSS` below that of the stored number and the Fréchet distance at most `WORSE` above it, and every larger number
keeps it too. Both bounds were written down before the first run. Batches are timed in turns.
"""

from __future__ import annotations

import argparse
import time

import torch
from common import Row, median, record

from stillroom.bench.scenes.bench import ScenesBench
from stillroom.pictures import load_generator

STEPS = (25, 20, 16, 12, 8, 6, 4)
LOSS, WORSE = 0.01, 0.05
BATCH, ROUNDS = 60, 5


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", default="lightgen", help="a shipped student")
    parser.add_argument("--n", type=int, default=600, help="captions that scores are taken over")
    parser.add_argument("--seeds", type=int, default=3)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    model, bench = load_generator(chosen.model), ScenesBench()
    captions = bench.captions(chosen.n)
    texts = [caption.text for caption in captions]
    scores: dict[int, list[dict[str, float]]] = {steps: [] for steps in STEPS}
    for seed in range(chosen.seeds):
        for steps in STEPS:
            scores[steps].append(bench.judge(model.sample(texts, seed=seed, batch=BATCH, head_steps=steps), captions))
            print(seed, steps, scores[steps][-1]["sceneeval"], scores[steps][-1]["fd"], flush=True)

    def seconds(steps: int, rows: int) -> float:
        began = time.perf_counter()
        model.sample(texts[:rows], batch=rows, head_steps=steps)
        return time.perf_counter() - began

    taken = {rows: [[seconds(steps, rows) for steps in STEPS] for _ in range(ROUNDS)] for rows in (1, BATCH)}
    means = {
        steps: {key: sum(one[key] for one in some) / len(some) for key in ("sceneeval", "fd")}
        for steps, some in scores.items()
    }
    first, kept, rows = means[STEPS[0]], True, []
    for i, steps in enumerate(STEPS):
        mean, several = means[steps], [round(one["sceneeval"], 4) for one in scores[steps]]
        kept &= mean["sceneeval"] >= first["sceneeval"] - LOSS and mean["fd"] <= first["fd"] * (1 + WORSE)
        row: Row = {"head steps": steps, "SceneEval": mean["sceneeval"], "of each seed": ", ".join(map(str, several))}
        row |= {"FD": mean["fd"], "keeps the score": "yes" if kept else "no"}
        for batch, rounds in taken.items():
            row[f"speed-up, batch {batch}"] = median(one[0] / one[i] for one in rounds)
        rows.append(row)
    record(
        "Head steps",
        f"How few steps of its diffusion head `{chosen.model}` needs: N={chosen.n}, means over {chosen.seeds} "
        f"seeds. The score is kept where SceneEval is at most {LOSS} below that of {STEPS[0]} steps and FD at most "
        f"{WORSE:.0%} above it, bounds that were set before the run.",
        f"python benchmarks/head_steps.py {chosen.model}",
        rows,
    )


if __name__ == "__main__":
    main()
