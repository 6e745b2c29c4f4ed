"""Captions that leave a colour open, and a negative text that forbids one: what a student makes of both."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from stillroom.bench import bench
from stillroom.bench.base import Bench, given_things, only
from stillroom.bench.scenes.bench import PARSER_DIR
from stillroom.data.scenes.captions import COLOURS, DIGIT_WORDS, parse_caption
from stillroom.data.scenes.pictures import scene_set
from stillroom.data.store import read_store
from stillroom.diffusion.denoiser import Denoiser
from stillroom.diffusion.sampling import Sampler, SteeredSampler
from stillroom.errors import UserError
from stillroom.evaluation import metrics
from stillroom.evaluation.scene_parser import SceneParser, load_parser
from stillroom.evaluation.scores import Score
from stillroom.folders.shipped import ASSETS
from stillroom.networks.text_image_space import TextImageSpace
from stillroom.surgery.lora import LoraDenoiser
from stillroom.tasks.pipelines.data import PromptedData
from stillroom.tasks.text_denoisers.task import encoded_texts
from stillroom.tasks.text_images.data import CaptionedData, encode_images
from stillroom.tasks.text_images.model import TextImageGenerator

TEACHER = "scenes-pixart"
KINDS = ("single", "colours")
"""Of captions that are learnt: one digit, and one digit of a colour."""
EACH = 10
"""Pictures of each digit and colour that are scored."""


@bench("scenes-negatives")
class ScenesNegativesBench(Bench):
    """``a photo of a three`` leaves the colour open; each of six colours in turn is what must not be shown. 600
    pictures are drawn from the same noises three times: without a negative text, away from the colour, and away from
    the one after it, each as hard as the sampler says (``negative_scale``). Where the sampler has no such scale and
    guides, the negative text stands in the place of no caption.

    The teacher is ``scenes-pixart``, which has cross-attention; captions are those of the shipped store that ask for a
    single digit.
    """

    task = "text-denoisers"
    scores = (
        Score("unwanted", "Share of pictures with the colour that must not be shown", "lower"),
        Score("removed", "Share of such pictures that went, of those without a negative text"),
        Score("digit", "Share of pictures with the digit that was asked for, alone"),
        Score("clean", "Share with that digit, and not of that colour"),
        Score("unwanted_other", "Share of pictures with the colour, away from another one", worst=math.nan),
        Score("digit_plain", "Share of pictures with the digit, without a negative text"),
    )

    @classmethod
    def serves(cls, task: str, source: str, data: Any) -> bool:
        return False

    # --- what a proof asks ----------------------------------------------------------------------------------------
    @cached_property
    def space(self) -> TextImageSpace:
        return TextImageSpace.load(ASSETS / "scenes-space")

    @cached_property
    def parser(self) -> SceneParser:
        return load_parser(PARSER_DIR)

    def network(self, **wanted: Any) -> Denoiser:
        """The teacher."""
        only("teacher", wanted)
        network = TextImageGenerator.load(ASSETS / TEACHER).network
        assert isinstance(network, Denoiser)
        return network

    def given(self, **wanted: Any) -> Mapping[str, Any]:
        only("teacher", wanted)
        teacher = self.network()

        def prompts(texts: Sequence[str]) -> PromptedData:
            return encoded_texts(texts, self.space, teacher)

        return given_things([teacher], classes=[], prompts=prompts, decode=self.space.codec.pictures)

    def data(self, **wanted: Any) -> CaptionedData:
        only("set of data", wanted)
        store = read_store(ASSETS / "scenes-synthetic")
        rows = [i for i, text in enumerate(store.captions) if parse_caption(text).category in KINDS]
        texts = [store.captions[i] for i in rows]
        found = encode_images(store.images[torch.tensor(rows)], texts, self.space, name=self.name)
        found.text = {name: value for name, value in found.text.items() if name in self.network().null}
        return found

    def mislead(self, method: Any, data: CaptionedData) -> CaptionedData:
        """The teacher answers each row of a batch for the caption of the next one."""
        for teacher in method.teachers().values():
            exchange(teacher)
        return data

    def model(self, network: nn.Module, sampler: Sampler) -> TextImageGenerator:
        plain = network.merged() if isinstance(network, LoraDenoiser) else network
        return TextImageGenerator(plain, sampler, self.space)

    def draw(self, model: TextImageGenerator, n: int) -> Tensor:
        return model.sample(["a photo of a three"] * n)

    def score(self, model: TextImageGenerator, seed: int) -> dict[str, Any]:
        asked = [(digit, colour) for colour in range(len(COLOURS)) for digit in range(10) for _ in range(EACH)]
        captions = [f"a photo of {named(d)}" for d, _ in asked]
        seeds = [(10_000 + seed) * len(asked) + i for i in range(len(asked))]

        def drawn(away: Callable[[int], int | None]) -> list[Any]:
            """What is seen in the pictures, colour by colour; away: the colour that is the negative text."""
            parts, each = [], 10 * EACH
            for colour in range(len(COLOURS)):
                rows, other = slice(colour * each, (colour + 1) * each), away(colour)
                one = model if other is None else against(model, COLOURS[other])
                parts.append(one.sample(captions[rows], seed=seeds[rows]))
            return self.parser.read(metrics.to_uint8(torch.cat(parts))).scenes()

        def share(what: Callable[[Any, int, int], bool], found: list[Any]) -> float:
            return sum(what(scene, *one) for scene, one in zip(found, asked, strict=True)) / len(asked)

        def shows(scene: Any, digit: int, colour: int) -> bool:
            return any(thing.colour == colour for thing in scene.things)

        def right(scene: Any, digit: int, colour: int) -> bool:
            return len(scene.things) == 1 and scene.things[0].digit == digit

        plain = drawn(lambda colour: None)
        free = getattr(model.sampler, "negative_scale", None) == 0  # which draws the same again
        away = plain if free else drawn(lambda colour: colour)
        other = plain if free else drawn(lambda colour: (colour + 1) % len(COLOURS))
        before, after = share(shows, plain), share(shows, away)
        return {
            "unwanted": after,
            "removed": 1 - after / max(before, 1 / len(asked)),
            "digit": share(right, away),
            "clean": share(lambda *one: right(*one) and not shows(*one), away),
            "unwanted_other": share(shows, other),
            "digit_plain": share(right, plain),
        }

    def floor(self) -> dict[str, Any]:
        """Real pictures of single digits in held-out handwriting, whose colours are even."""
        texts = [f"a photo of {named(digit)}" for digit in range(10)]
        asked = [parse_caption(text) for text in texts for _ in range(60)]
        images, _ = scene_set(len(asked), 0, "test", asked)
        scenes = self.parser.read(images).scenes()
        right = [
            len(s.things) == 1 and s.things[0].digit == c.wants[0].digit for s, c in zip(scenes, asked, strict=True)
        ]
        shown = [any(thing.colour == i % len(COLOURS) for thing in s.things) for i, s in enumerate(scenes)]
        return {"unwanted_other": sum(shown) / len(shown), "digit_plain": sum(right) / len(right)}


def named(digit: int) -> str:
    return f"{'an' if DIGIT_WORDS[digit] == 'eight' else 'a'} {DIGIT_WORDS[digit]}"


def against(model: TextImageGenerator, negative: str) -> TextImageGenerator:
    """A model that draws away from a text: inside its attention, where its sampler has a scale for that or does not
    guide, else by guidance from that text."""
    if isinstance(model.sampler, SteeredSampler) or getattr(model.sampler, "guidance", 1.0) == 1.0:
        return model.away(negative)
    network = model.network
    assert isinstance(network, Denoiser)
    null = {name: value[0] for name, value in model.said(negative).items()}
    other = Denoiser(
        network.network, network.process, network.prediction, null=null, shape=network.shape, call=network.call,
        guide=network.guide,
    )  # fmt: skip
    return TextImageGenerator(other, model.sampler, model.space)


def exchange(teacher: Denoiser) -> None:
    """From now on ``teacher`` answers each row for the caption of the one after it, and for no caption as ever."""
    if not teacher.null:
        raise UserError("this teacher has no unconditional value", cure="give one that has")
    ask = teacher.call

    def call(network: nn.Module, x: Tensor, time: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        none = torch.stack([(value == teacher.null[k].to(value)).flatten(1).all(1) for k, value in cond.items()]).all(0)
        rows = torch.arange(len(x))
        told = (~none).nonzero().flatten()
        rows[told] = told.roll(-1)
        return ask(network, x, time, {name: value[rows] for name, value in cond.items()})

    teacher.call = call
