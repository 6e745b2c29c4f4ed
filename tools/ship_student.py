"""Make the text-to-image student of a run a shipped model: copied beside the parts that it shares with the teachers of
the scenes world, its samplers scored, the best one made its own.

    python tools/ship_student.py runs/lightgen lightgen [--n 600] [--guidance 1 2 3 4.5] [--steps 8] [--head-steps 12]
        [--temperature 0.9]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import torch
import yaml

from stillroom.bench.scenes.bench import ScenesBench
from stillroom.diffusion.masking import MaskedSampler
from stillroom.evaluation.cost import macs
from stillroom.folders.shipped import ASSETS
from stillroom.parsing import read_json
from stillroom.pictures import load_generator
from stillroom.surgery.modules import parameter_count

SEED = 1234


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, help="a finished run")
    parser.add_argument("name", help="folder under assets/")
    parser.add_argument("--n", type=int, default=600, help="captions that SceneEval is taken over")
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, 2.0, 3.0, 4.5])
    parser.add_argument("--steps", type=int, help="passes through the network, where not as in the run")
    parser.add_argument("--head-steps", type=int, help="steps of the head, where not as in the run")
    parser.add_argument("--temperature", type=float, help="of the head's noise, where not as in the run")
    chosen = parser.parse_args()
    student: Any = load_generator(chosen.run)
    bench, own = ScenesBench(), student.sampler
    assert isinstance(own, MaskedSampler)
    asked = {"steps": chosen.steps, "head_steps": chosen.head_steps, "temperature": chosen.temperature}
    own = dataclasses.replace(own, **{key: value for key, value in asked.items() if value is not None})
    captions = bench.captions(chosen.n)
    texts, rows = [caption.text for caption in captions], []
    for guidance in chosen.guidance:
        sampler = dataclasses.replace(own, guidance=guidance)
        student.sampler = sampler
        began = time.perf_counter()
        scores = bench.judge(student.sample(texts, seed=SEED), captions)
        seconds = round(time.perf_counter() - began, 1)
        rows.append({"sampler": sampler.to_dict(), "nfe": sampler.nfe, "seconds": seconds, "scores": scores})
        print(f"guidance {guidance:g} SceneEval {scores['sceneeval']:.4f} FD {scores['fd']:.3f}", flush=True)
    best = max(rows, key=lambda row: row["scores"]["sceneeval"])
    student.sampler = dataclasses.replace(own, guidance=best["sampler"]["guidance"])
    folder, result = ASSETS / chosen.name, read_json(chosen.run / "result.json")
    folder.mkdir(exist_ok=True)
    student.save(folder, "../scenes-space", torch.float16, method="lightgen")
    recipe = yaml.safe_load((chosen.run / "recipe.yaml").read_text())
    recipe.pop("folder", None)  # where it was run, on somebody's machine
    card: dict[str, Any] = {
        "space": student.space.name,
        "recipe": recipe,
        "cost": result["cost"],
        "parameters": parameter_count(student.network),
        "macs": macs(lambda: student.sample(texts[:1])),
        "n": chosen.n,
        "floor": bench.floor_of(chosen.n),
        "samplers": rows,
        "best": {"sampler": best["sampler"], "sceneeval": best["scores"]["sceneeval"]},
    }
    (folder / "card.json").write_text(json.dumps(card, indent=2, default=float) + "\n")


if __name__ == "__main__":
    main()
