"""Students as exported files against eager: largest error and latency of each format, on one thread.

    python benchmarks/export_latency.py

A one-step generator (the fashion teacher's network asked once, which is what a student of it costs), the network of a
shipped text-to-image teacher, an image classifier trained here in half a minute, with its quantised twin, and an
untrained text encoder, for speed alone.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import Row, record

import stillroom
from stillroom.data.source import load_data
from stillroom.data.texts import NAMED
from stillroom.diffusion.sampling import FewStepSampler
from stillroom.exports import export_model
from stillroom.exports.formats import FORMATS
from stillroom.folders.image_networks import make_classifier
from stillroom.folders.text_networks import load_tokenizer, make_encoder
from stillroom.tasks.class_images.model import ImageGenerator
from stillroom.tasks.classify.model import ImageClassifier
from stillroom.tasks.classify_text.model import TextClassifier

STEPS, BATCH = 300, 128


def classifier() -> ImageClassifier:
    """A ``resnet-small`` that has seen Fashion-MNIST for a few steps."""
    data = load_data("fashion", "train")
    torch.manual_seed(0)
    network: Any = make_classifier("resnet-small", 1, len(data.classes)).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
    for step in range(STEPS):
        batch = data.batch(0, step, BATCH)
        loss = F.cross_entropy(network(batch["x"]).logits, batch["cond"]["label"])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return ImageClassifier(network, data.classes)


def main() -> None:
    torch.set_num_threads(1)
    fashion: Any = stillroom.load("fashion")
    tokenizer = load_tokenizer(NAMED["glosses"])
    torch.manual_seed(0)
    texts = TextClassifier(make_encoder("bert-4x128", len(tokenizer), 45), tokenizer, [str(i) for i in range(45)], 64)
    models: dict[str, tuple[Any, dict[str, Any]]] = {
        "fashion, one step": (
            ImageGenerator(fashion.denoiser, FewStepSampler((0.8,)), fashion.classes), {"whole": True}
        ),
        "scenes-sd3, network": (stillroom.load("scenes-sd3"), {}),
        "lightgen": (stillroom.load("lightgen"), {}),
        "resnet-small, classifier": (classifier(), {"data": "fashion", "int8": True}),
        "bert-4x128, texts of 12 tokens": (texts, {}),
    }  # fmt: skip
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as place:
        for number, (name, (model, wishes)) in enumerate(models.items()):
            for to in FORMATS:
                asked = {**wishes, "int8": wishes.get("int8", False) and to == "onnx"}
                made = export_model(model, to, Path(place) / f"{number}-{to}", **asked)
                for file, found in made.facts["files"].items():
                    if wishes.get("whole") and not file.startswith("generator"):
                        continue  # the network is inside
                    part = f", {Path(file).stem}" if len(made.facts["files"]) > 2 else ""
                    rows.append(row_of(name + part, f"{to}, int8" if ".int8" in file else to, found))
                    print(rows[-1], flush=True)
    record(
        "Export",
        "Models as exported files against eager: ratios are eager's median time over the file's, call by call in turns."
        " The int8 file is onnxruntime's dynamic quantisation; its accuracy on Fashion-MNIST's test images stands"
        " beside that of the file it was made from. The text encoder is untrained.",
        "python benchmarks/export_latency.py",
        rows,
    )


def row_of(model: str, to: str, found: dict[str, Any]) -> Row:
    row: Row = {"model": model, "format": to, "MB": found["bytes"] / 1e6}
    row["max abs error"] = f"{found['parity']['max_abs_error']:.1e}"
    for timed in found["latency"]:
        row[f"eager, batch {timed['batch']}, ms"] = timed["eager_ms"]
        row[f"ratio, batch {timed['batch']}"] = timed["ratio"]
    if scores := found.get("scores"):
        row[f"accuracy, N={scores['n']}"] = scores["accuracy"]
    return row


if __name__ == "__main__":
    main()
