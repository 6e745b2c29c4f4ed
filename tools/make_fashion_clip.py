"""Make the shipped text-image teacher of clothes: a CLIPModel trained on images of Fashion-MNIST with captions, one in
five of which names a random class.

    python tools/make_fashion_clip.py [--steps 1500]
"""

from __future__ import annotations

import argparse
import json
import time

import torch

from stillroom.bench.digits.teachers import MISCAPTIONED, ZETA, tiny_clip, train_clip
from stillroom.bench.labels import CLASSES
from stillroom.data.source import load_data
from stillroom.folders.shipped import ASSETS
from stillroom.networks.prompt_classifier import PromptClassifier
from stillroom.surgery.modules import parameter_count

PROMPTS = ("a photo of a {}.", "a picture of a {}.")
IMAGES, SEED = 20_000, 0


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=1500)
    steps, began = parser.parse_args().steps, time.perf_counter()
    data, test = load_data("fashion", "train"), load_data("fashion", "test")
    generator = torch.Generator().manual_seed(SEED)
    rows = torch.randperm(data.n, generator=generator)[:IMAGES]
    wrong = torch.rand(IMAGES, generator=generator) < MISCAPTIONED
    told = torch.where(wrong, torch.randint(CLASSES, (IMAGES,), generator=generator), data.labels[rows])
    torch.manual_seed(SEED)
    model = PromptClassifier(*tiny_clip(data.classes, PROMPTS, 28, 4, width=48), data.classes)
    train_clip(model, data.images(rows), told, PROMPTS, SEED, steps, lr=2e-3)
    model.eval()
    with torch.no_grad():
        logits = torch.cat([model(part) for part in test.images().split(1000)])
    folder = ASSETS / "fashion-clip"
    model.save(folder)
    card = {
        "data": f"{IMAGES:,} of {data.origin}; {MISCAPTIONED:.0%} of the captions name a random class",
        "captions": list(PROMPTS),
        "zeta": ZETA,
        "steps": steps,
        "batch": 64,
        "params": parameter_count(model),
        "seconds": round(time.perf_counter() - began),
        "test_accuracy": round(float((logits.argmax(-1) == test.labels).float().mean()), 4),
    }
    (folder / "card.json").write_text(json.dumps(card, indent=2) + "\n")
    print(json.dumps(card))


if __name__ == "__main__":
    main()
