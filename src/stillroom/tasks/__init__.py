"""What a run is about: how teachers and data are read, what the student becomes, how it is shown and scored."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from stillroom.errors import UserError
from stillroom.folders.shipped import model_folder
from stillroom.tasks.base import IN_MEMORY, Generator, Task

__all__ = ["IN_MEMORY", "Generator", "Task", "load_model", "make_task", "model_folder", "sample_rows"]


def make_task(name: str, teacher: Any = "") -> Task:
    """The task of a method, by the name that its class declares (``Method.task``). A method that asks for a denoiser
    gets that of a pipeline where the teacher is one, by its folder or as an object."""
    if name == "text-image":
        from stillroom.tasks.text_images.task import TextImages

        return TextImages()
    if name == "classify":
        from stillroom.tasks.classify.task import Classification

        return Classification()
    if name == "encode":
        from stillroom.tasks.encode.task import Encoding

        return Encoding()
    if name == "classify-text":
        from stillroom.tasks.classify_text.task import TextClassification

        return TextClassification()
    if name == "class-image" and _of_prompts(teacher):
        from stillroom.tasks.pipelines.task import PromptedImages

        return PromptedImages()
    from stillroom.tasks.class_images.task import ClassImages

    return ClassImages()


def _of_prompts(teacher: Any) -> bool:
    from stillroom.folders.pipelines import is_pipeline
    from stillroom.tasks.pipelines.model import PipelineGenerator

    if isinstance(teacher, str):
        return is_pipeline(teacher)
    return isinstance(teacher, PipelineGenerator) or hasattr(teacher, "register_modules")


def load_model(folder: Path) -> Generator:
    """The model in a folder: an encoder, a classifier of images or texts, or a generator, asked in words if it has a
    text encoder, else by class."""
    from stillroom.folders.pipelines import is_pipeline
    from stillroom.tasks.class_images.model import ImageGenerator
    from stillroom.tasks.classify.model import ImageClassifier, is_classifier
    from stillroom.tasks.classify_text.model import TextClassifier, is_text_classifier
    from stillroom.tasks.encode.model import ImageEncoder, is_encoder
    from stillroom.tasks.pipelines.model import PipelineGenerator
    from stillroom.tasks.text_images.model import TextImageGenerator, is_text_model

    if is_pipeline(folder):
        return PipelineGenerator.load(folder)
    if is_encoder(folder):
        return ImageEncoder.load(folder)
    if is_text_classifier(folder):
        return TextClassifier.load(folder)
    if is_classifier(folder):
        return ImageClassifier.load(folder)
    return TextImageGenerator.load(folder) if is_text_model(folder) else ImageGenerator.load(folder)


def sample_rows(
    generator: Any, labels: Sequence[str], captions: Sequence[str], n: int, seed: int
) -> tuple[list[str], Tensor]:
    """``n`` samples for each label or caption, by default for one of each kind: ``(names, [rows, n, C, H, W])``."""
    from stillroom.tasks.class_images.model import ImageGenerator
    from stillroom.tasks.classify.model import ImageClassifier
    from stillroom.tasks.classify_text.model import TextClassifier
    from stillroom.tasks.encode.model import ImageEncoder

    if isinstance(generator, ImageEncoder):
        raise UserError("this model describes images, it draws none", cure="stillroom.load(DIR).features(images)")
    if isinstance(generator, TextClassifier):
        raise UserError("this model sorts texts, it draws nothing", cure="stillroom.load(DIR).classify(texts)")
    if isinstance(generator, ImageClassifier):
        raise UserError("this model recognises images, it draws none", cure="stillroom.load(DIR).classify(images)")
    if isinstance(generator, ImageGenerator):
        from stillroom.tasks.class_images.task import class_rows

        if captions:
            raise UserError("this model draws classes, not captions", cure="give --labels")
        return class_rows(generator, labels, n, seed)
    from stillroom.tasks.pipelines.model import PipelineGenerator
    from stillroom.tasks.text_images.task import caption_rows

    if labels:
        raise UserError("this model draws captions, not classes", cure='give --captions "a red three"')
    if isinstance(generator, PipelineGenerator):
        from stillroom.tasks.pipelines.task import prompt_rows

        return prompt_rows(generator, list(captions), n, seed)
    return caption_rows(generator, captions, n, seed)
