"""Images from captions by a denoiser: teacher and student are text-to-image denoisers of one kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from stillroom.cache import cache_folder
from stillroom.data.prompt_sources import Texts
from stillroom.data.store import MANIFEST
from stillroom.diffusion.denoiser import Denoiser
from stillroom.errors import UserError
from stillroom.folders.denoisers import network_folder
from stillroom.networks.text_image_space import TextImageSpace
from stillroom.parsing import read_json
from stillroom.recipe import Recipe
from stillroom.task import NOTHING, find_model_class, model_home, say, task
from stillroom.tasks.pipelines.data import PromptedData, encode_prompts
from stillroom.tasks.text_images.data import CaptionedData, store_data
from stillroom.tasks.text_images.model import TextImageGenerator
from stillroom.tasks.text_images.task import SYNTHETIC, TextImages, no_store


@task("text-denoisers")
class TextDenoisers(TextImages):
    """One text-to-image denoiser, sampled by caption, where a method asks for a denoiser. Data: stored images with
    captions. The student begins as another denoiser of the same space, or as a copy of the teacher."""

    serves = ("class-images",)
    sketched = False  # whether nothing but shapes is known

    @classmethod
    def takes(cls, teacher: Any) -> bool:
        """A text-to-image model of ours, or its folder, whose network is a denoiser."""
        if isinstance(teacher, TextImageGenerator):
            return isinstance(teacher.network, Denoiser)
        if not isinstance(teacher, str) or not teacher:
            return False
        try:
            folder = model_home(teacher)
            if find_model_class(folder) is not TextImageGenerator:
                return False
            return read_json(network_folder(folder) / "config.json").get("_class_name") != "MAR"
        except UserError:  # said by whoever reads it
            return False

    def load(self, recipe: Recipe, given: Mapping[str, Any] = NOTHING) -> None:
        super().load(recipe, given)
        self._known()

    def sketch(self, recipe: Recipe, given: Mapping[str, Any] = NOTHING) -> None:
        super().sketch(recipe, given)
        self.sketched = True
        self._known()

    def _data(self, recipe: Recipe) -> CaptionedData:
        folder = SYNTHETIC if recipe.data == "scenes" else Path(recipe.data).expanduser()
        if not (folder / MANIFEST).is_file():
            raise no_store(recipe.data, "make them with `stillroom synthesize`")
        return store_data(folder, space=self.space, cache=cache_folder() / "stores", report=say)

    @property
    def teacher(self) -> TextImageGenerator:
        return next(iter(self.sources.values()))

    def _known(self) -> None:
        """Raises UserError for a student of other latents; the data tell the conditions that the network reads."""
        network = self.teacher.network
        assert isinstance(network, Denoiser)
        if self.start is not None and tuple(getattr(self.start, "shape", ())) != tuple(network.shape):
            raise UserError("the student works on other latents than the teacher", cure="give a denoiser of its kind")
        self.data = with_texts(self.data, tuple(network.null))

    def given(self) -> Mapping[str, Any]:
        network = self.teacher.network
        begins = network if self.start is None else self.start
        return {
            "teacher": network, "teachers": [network], "student": begins, "classes": [],
            "decode": self.space.codec.pictures, "autoencoder": self.space.codec.network,
            "prompts": self.prompts,
        }  # fmt: skip

    def prompts(self, texts: Sequence[str]) -> PromptedData:
        """Captions beside those of the data, as the network reads them: texts, or files of them."""
        if self.sketched:
            shown = {f"text/{name}": value[:1] for name, value in self.data.text.items()}
            return PromptedData([shown], [""], {name: value[0] for name, value in self.data.text.items()}, "one text")
        return encoded_texts(texts, self.space, self.teacher.network)

    def student(self, network: nn.Module, sampler: Any) -> TextImageGenerator:
        return TextImageGenerator(network, sampler, self.space)


class _Words:
    """What turns captions into what a denoiser of a space reads."""

    def __init__(self, space: TextImageSpace, names: Sequence[str]) -> None:
        self.space, self.names, self.size = space, tuple(names), tuple(space.size)

    def conditions(self, prompts: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        for text in prompts:
            self.space.text.check(text)
        found = self.space.text.encode([*prompts, ""])
        every = {name: found[name] for name in self.names}
        return {k: v[:-1] for k, v in every.items()}, {k: v[-1] for k, v in every.items()}

    def latents(self, images: Tensor) -> Tensor:
        return self.space.codec.encode(images)


def encoded_texts(texts: Sequence[str], space: TextImageSpace, network: Any) -> PromptedData:
    """Captions, or files of them, as a denoiser of this space reads them."""
    return encode_prompts(Texts(texts), _Words(space, tuple(network.null)), report=say)


def with_texts(data: CaptionedData, names: tuple[str, ...]) -> CaptionedData:
    """The data with those of their texts' features alone that a network reads."""
    data.text = {name: value for name, value in data.text.items() if name in names}
    for part in data.parts.values():
        with_texts(part, names)
    return data
