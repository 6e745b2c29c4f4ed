"""Image classifiers as transformers keeps them: one network and the names of its classes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from stillroom.data.source import load_data
from stillroom.diffusion.sampling import Sampler, sampler_from_dict
from stillroom.engine.progress import Parts
from stillroom.errors import UserError
from stillroom.folders.denoisers import SIDE_FILE
from stillroom.folders.image_networks import architecture, channels_of
from stillroom.folders.pretrained import CONFIG, WEIGHTS, pretrained
from stillroom.folders.processors import PROCESSOR, Pixels, save_processor
from stillroom.folders.transformers_layout import auto_config
from stillroom.folders.weights import save_pretrained
from stillroom.networks.dual_head import restore, two_heads
from stillroom.networks.prompt_classifier import is_text_image_model
from stillroom.networks.recognition import ForwardPass
from stillroom.parsing import read_json
from stillroom.surgery.modules import device_of
from stillroom.task import FileJudge, Model, Part

LARGEST_BATCH = 2**23
"""Values of the images that are looked at in one batch, at most."""


class ImageClassifier(Model):
    """A network that recognises images; what ``stillroom.load`` returns for one.

    classes: names in the order of the outputs. Images are float32 ``[N, C, H, W]`` in [-1, 1]. sampler: how the network
    is asked; of one with two heads, with the mixture of their probabilities.
    """

    noun = "an image classifier"
    does, usage = "recognises images, it draws none", "stillroom.load(DIR).classify(images)"
    int8 = True

    def __init__(self, network: nn.Module, classes: Sequence[str] = (), sampler: Sampler | None = None) -> None:
        self.network, self.classes, self.sampler = network.eval(), list(classes), sampler or ForwardPass()

    def probabilities(self, images: Tensor, batch: int = 0) -> Tensor:
        """``[N, classes]`` float32, on the CPU. batch: images at once; 0: 250, fewer large ones. Raises UserError for
        images of another number of channels."""
        channels = channels_of(self.network)
        if images.ndim != 4 or images.shape[1] not in channels:
            raise UserError(
                f"images of shape {tuple(images.shape)} do not fit this classifier",
                cure=f"give [N, {' or '.join(map(str, channels))}, H, W]",
            )
        device = device_of(self.network)
        sample: Any = self.sampler.sample
        batch = batch or at_once(images)
        shown = (images[start : start + batch].to(device) for start in Parts(max(len(images), 1), batch))
        return torch.cat([sample(self.network, part).float().softmax(-1).cpu() for part in shown])

    def classify(self, images: Tensor, batch: int = 0) -> list[str]:
        """The name of the most probable class of each image."""
        return [self.classes[i] for i in self.probabilities(images, batch).argmax(-1).tolist()]

    # --- other runtimes -------------------------------------------------------------------------------------------
    def parts(self, whole: bool = False, size: tuple[int, int] | None = None) -> dict[str, Part]:
        from stillroom.tasks.classify import export

        return export.parts(self, whole, size)

    def export_facts(self) -> dict[str, Any]:
        return {"classes": self.classes} if self.classes else {}

    def test_data(self, name: str) -> Any:
        test = load_data(name, "test")
        return test.by_names(self.classes, "the model's classes") if self.classes and test.classes else test

    def judge(self, data: str, test: Any) -> FileJudge:
        from stillroom.tasks.classify import export

        return export.judge(test)

    # --- folders --------------------------------------------------------------------------------------------------
    def save(self, folder: str | Path, **extra: Any) -> None:
        """Write the folder as ``save_pretrained`` does, the processor's settings too; ``extra`` entries go into
        ``stillroom.json`` beside it."""
        network: Any = self.network
        side = {"sampler": self.sampler.to_dict(), "classes": self.classes, **extra}
        outputs = list(self.classes)
        if heads := two_heads(network):
            outputs += [f"{name} (teacher's head)" for name in self.classes]
            side["heads"] = {"align": heads.align, "zeta": heads.zeta}
        network.config.id2label = dict(enumerate(outputs))
        network.config.label2id = {name: i for i, name in enumerate(outputs)}
        save_pretrained(network, folder)
        save_processor(network, Path(folder), channels_of(network)[0])
        (Path(folder) / SIDE_FILE).write_text(json.dumps(side, indent=2) + "\n")

    @classmethod
    def holds(cls, folder: Path) -> bool:
        """A model of transformers for image classification, or one of texts and images that is asked about classes."""
        return "ForImageClassification" in architecture(folder) or is_text_image_model(folder)

    @classmethod
    def load(cls, folder: str | Path) -> ImageClassifier:
        """Read a folder of transformers with a model for image classification, weights in safetensors only. Size, mean
        and deviation of its images come from its ``preprocessor_config.json``: the network is given images in [-1, 1]
        all the same.

        Raises UserError for a missing, incomplete or damaged folder.
        """
        from transformers import AutoModelForImageClassification

        folder = Path(folder)
        if not (folder / CONFIG).is_file():
            raise UserError(f"{folder} holds no classifier", cure=f"it needs {CONFIG} and {WEIGHTS}")
        if is_text_image_model(folder):
            raise UserError(
                f"{folder} holds a text-image model, which knows no classes of its own",
                cure="name it as the teacher of a classifier: --student resnet-small --teacher FOLDER",
            )
        config = auto_config(folder)
        if type(config) not in AutoModelForImageClassification._model_mapping:
            raise UserError(
                f"{folder / CONFIG} describes no image classifier, but a {type(config).__name__}",
                cure="give an AutoModelForImageClassification of transformers",
            )
        network = pretrained(AutoModelForImageClassification, folder)
        side = read_json(folder / SIDE_FILE) if (folder / SIDE_FILE).is_file() else {}
        classes = side.get("classes") or [str(name) for _, name in sorted(config.id2label.items())]
        if "heads" in side:
            restore(network, side["heads"])
        if (folder / PROCESSOR).is_file():
            Pixels.read(folder, channels_of(network)[0]).attach(network)
        return cls(network, classes, sampler_from_dict(side["sampler"]) if "sampler" in side else None)


def at_once(images: Tensor) -> int:
    """Images ``[N, C, H, W]`` that are looked at in one batch: 250, fewer where they are large."""
    return max(1, min(250, LARGEST_BATCH // max(images[0].numel(), 1))) if len(images) else 1


class Mixed(nn.Module):
    """A network with two heads as one of a single head: images to the logarithm of the mixed probabilities."""

    def __init__(self, classifier: ImageClassifier) -> None:
        super().__init__()
        self.whole, self.sampler = classifier.network, classifier.sampler
        self.channels = channels_of(classifier.network)
        self.config = SimpleNamespace(num_labels=len(classifier.classes), num_channels=self.channels[0])

    def forward(self, images: Tensor) -> Tensor:
        sample: Any = self.sampler.sample
        return sample(self.whole, images)


def asked(classifier: ImageClassifier) -> nn.Module:
    """The classifier as a network with one output for each class."""
    return Mixed(classifier) if two_heads(classifier.network) else classifier.network
