"""Text to image: captioned scenes of handwritten digits, a judge that reads them, one protocol for scores.

The protocol. N captions, fixed by a seed, the categories in turn; a generator draws one picture for each. *SceneEval*:
the share of pictures in which the frozen parser finds exactly what the caption asks for and nothing else; by category,
and overall as the mean of the categories, as GenEval counts (arXiv:2310.11513). It is never called
GenEval: other objects, another judge, a stricter rule. The ceiling is the SceneEval of real pictures of the same
captions in handwriting the parser was not trained on; what it lacks to 1 are the parser's own mistakes.

Distances compare the pictures, as uint8, in the parser's features, with real pictures of the same captions in held-out
handwriting (at least 5,000). The floor is the same score of N real pictures in training handwriting. N is part of every
distance's name. N = 1,200 is the standard: 200 captions of each of six categories.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stillroom.bench import bench
from stillroom.bench.base import NO_FOLDERS, Bench, card_rows, given_things, only, read_card, shown, table
from stillroom.bench.captioned import mismatched
from stillroom.bench.scenes.judge import scene_eval
from stillroom.cache import cache_folder, code_of, kept
from stillroom.data.scenes import pictures
from stillroom.data.scenes.captions import (
    CATEGORIES,
    Caption,
    all_captions,
    categories,
    distinct_captions,
    mirror_breaks,
    parse_caption,
    satisfied,
    seeded,
    spoken,
)
from stillroom.data.scenes.pictures import SHAPE, scene_set
from stillroom.data.store import read_store
from stillroom.diffusion.denoiser import Cond, Denoiser
from stillroom.diffusion.sampling import Sampler
from stillroom.errors import UserError
from stillroom.evaluation import metrics
from stillroom.evaluation.scene_parser import Reading, SceneParser, load_parser
from stillroom.evaluation.scores import Score, named
from stillroom.files import locked
from stillroom.folders.shipped import ASSETS
from stillroom.networks.text_image_space import TextImageSpace
from stillroom.synthesis import synthesize
from stillroom.task import say
from stillroom.tasks.text_denoisers.task import with_texts
from stillroom.tasks.text_images.data import CaptionedData, encode_images
from stillroom.tasks.text_images.model import TextImageGenerator

STANDARD_N = 1_200
REFERENCE = 5_000
"""Real pictures, at least, that distances compare with."""
SUBSETS = 50
"""Random subsets for the kernel distance."""
LEAST = 6
"""Pictures that distances need: one more than the neighbours of precision and its kin."""
PARSER_DIR = ASSETS / "scenes-parser"
TEACHERS = ("scenes-sd3-large", "scenes-sd3", "scenes-pixart")
STORED = TEACHERS[:2]
"""Those that drew the shipped store."""
PAIRS_SEED = 77
"""Of the real scenes that preferences are learnt from."""


@bench("scenes")
class ScenesBench(Bench):
    """Captions and 32x32 scenes of up to four handwritten digits, with a judge that reads them. Students learn from
    what two of the shipped teachers drew.

    A proof scores 600 captions of the training grammar; ``heldout`` is the SceneEval at as many whose combinations no
    training caption names, ``sides`` the share of captions with "left" or "right" that are obeyed. Parser and
    statistics load when first asked for; ``report`` is told what takes long.
    """

    task = "text-images"
    scores = (
        Score(
            "sceneeval", "SceneEval", label="SceneEval", alarm=0.6,
            advice="more steps or more distinct captions first; then a higher guidance scale",
        ),
        *(Score(f"sceneeval_{category}", f"SceneEval {category}") for category in CATEGORIES),
        Score("sides", "SceneEval of captions with sides"),
        Score("heldout", "SceneEval of held-out captions"),
        Score(
            "fd", "FD", "lower", label="Fréchet distance", alarm=3.0,
            advice="more steps first; then the learning rates",
        ),
        Score("kid", "KID", "lower"),
        Score("precision", "Precision"),
        Score("recall", "Recall"),
        Score("density", "Density"),
        Score("coverage", "Coverage", alarm=0.6, advice="a lower guidance scale, or a GAN term on real images"),
    )  # fmt: skip
    teaches = (*TEACHERS, "scenes-space", "scenes-parser")
    n = 600

    def __init__(self, seed: int = 0, report: Callable[[str], None] = say) -> None:
        super().__init__(seed)
        self.report = report

    @classmethod
    def serves(cls, task: str, source: str, data: Any) -> bool:
        """Captions of the scenes' grammar, whatever the data are called."""
        return task in (cls.task, "text-denoisers", "pipelines") and spoken(data.captions)

    # --- what a proof asks --------------------------------------------------------------------------------------------
    @cached_property
    def space(self) -> TextImageSpace:
        return TextImageSpace.load(ASSETS / "scenes-space")

    def given(self, student: str = "", **wanted: Any) -> Mapping[str, Any]:
        """student: a shipped model that the student goes on from."""
        only("teacher", wanted)
        begun = TextImageGenerator.load(ASSETS / student).network if student else None
        return {"space": self.space, "student": begun}

    def network(self, teacher: str = TEACHERS[0]) -> nn.Module:
        return TextImageGenerator.load(ASSETS / teacher).network

    def data(
        self,
        images: int = 2000,
        captions: int = 0,
        teachers: Sequence[str] = STORED,
        pairs: int = 0,
        kinds: Sequence[str] = (),
    ) -> CaptionedData:
        """``images`` images of the shipped store, by these teachers, each of another caption; with ``captions`` so few
        of them, each drawn ``images / captions`` times. ``pairs``: real scenes with captions, the part "pairs", of all
        categories or of ``kinds`` alone."""
        folder = self._few_captions(captions, images // captions) if captions else ASSETS / "scenes-synthetic"
        store = read_store(folder)
        rows = [i for i, record in enumerate(store.records) if record["teacher"] in teachers][:images]
        if len(rows) < images:
            raise UserError(f"{folder} has {len(rows)} images by {', '.join(teachers)}", cure=f"ask for {len(rows)}")
        texts = [store.captions[i] for i in rows]
        found = encode_images(store.images[torch.tensor(rows)], texts, self.space, name=self.name)
        if pairs:
            wanted = self.captions(pairs * len(CATEGORIES), PAIRS_SEED) if kinds else None
            of_kinds = wanted and [caption for caption in wanted if caption.category in kinds][:pairs]
            real, asked = scene_set(pairs, PAIRS_SEED, "train", of_kinds)
            found.parts["pairs"] = encode_images(real, [caption.text for caption in asked], self.space)
        return found

    def _few_captions(self, captions: int, each: int) -> Path:
        """Several drawings of each of the first distinct captions, made once and kept in the cache."""
        texts = [caption.text for caption in distinct_captions(captions)]
        name = f"{captions}-captions-{each}-each-{code_of(synthesize, TextImageGenerator)[:8]}"
        folder = cache_folder() / "scenes" / name
        with locked(folder.with_suffix(".lock")):  # another worker may be at it
            teachers = {name: str(ASSETS / name) for name in STORED}
            synthesize(teachers, texts, folder, seeds=range(each), route="round-robin", resume=True, progress=False)
        return folder

    def mislead(self, method: Any, data: CaptionedData) -> CaptionedData:
        return mismatched(data)

    def model(self, network: nn.Module, sampler: Sampler) -> TextImageGenerator:
        return TextImageGenerator(network, sampler, self.space)

    def draw(self, model: TextImageGenerator, n: int) -> Tensor:
        return model.sample(["a red three and a blue seven"] * n)

    def score(self, model: TextImageGenerator, seed: int) -> dict[str, Any]:
        def drawn(split: str) -> tuple[Tensor, list[Caption]]:
            asked = self.captions(self.n, split=split)
            return model.sample([caption.text for caption in asked], seed=10_000 + seed), asked

        images, asked = drawn("train")
        scores = {k: v for k, v in self.judge(images, asked).items() if isinstance(v, int | float)}
        sided = [i for i, caption in enumerate(asked) if mirror_breaks(caption)]
        sides = self.judge(images[sided], [asked[i] for i in sided], distances=False)["sceneeval"]
        heldout = self.judge(*drawn("heldout"), distances=False)["sceneeval"]
        return scores | {"sides": sides, "heldout": heldout}

    def floor(self) -> dict[str, Any]:
        return {key: value for key, value in self.floor_of(self.n).items() if key != "reference"}

    # --- what a run asks ----------------------------------------------------------------------------------------------
    def compare(
        self, everyone: Mapping[str, Any], n: int, seed: int, folders: Mapping[str, Path] = NO_FOLDERS
    ) -> dict[str, Any]:
        """Empty where a model draws pictures of another size."""
        if any(tuple(model.size) != SHAPE[1:] for model in everyone.values()):
            return {}
        n, found, earlier = max(n, LEAST), {}, []
        captions = self.captions(n)
        for who, model in everyone.items():
            found[who] = self._on_card(folders[who], model.sampler, n) if who in folders else {}
            if found[who]:
                earlier.append(who)
                continue
            say(f"scoring {n:,} samples of {who}")
            found[who] = self.judge(model.sample([caption.text for caption in captions], seed=seed), captions)
        found["floor"] = self.floor_of(n)
        about = {key: found["floor"][key] for key in ("n", "extractor", "reference")}
        return shown(self.called(n), found, **about, earlier=earlier)

    def try_out(self, model: TextImageGenerator) -> None:
        """A picture is drawn and read."""
        if tuple(model.size) == SHAPE[1:]:
            self.parser.read(metrics.to_uint8(model.sample(["a photo of a seven"])))

    def _on_card(self, folder: Path, sampler: Sampler, n: int) -> dict[str, Any]:
        """A teacher's scores from the card in its folder, where they are those of this sampler, parser and N; else
        nothing."""
        for row in read_card(folder).get("samplers", ()):
            known = row["scores"]
            if row["sampler"] == sampler.to_dict() and known["n"] == n and known["extractor"] == self.parser.name:
                return dict(known)
        return {}

    @cached_property
    def parser(self) -> SceneParser:
        """The shipped parser (see :func:`~stillroom.bench.scenes.teach.teach_parser`)."""
        return load_parser(PARSER_DIR)

    def verdicts(self, wish: str, images: Tensor) -> list[bool | None] | None:
        """Of pictures of the scenes' size, for captions of their grammar; punctuation is not read."""
        if tuple(images.shape[1:]) != SHAPE:
            return None
        try:
            wanted = parse_caption(re.sub(r"[.,;:!?]", " ", wish))
        except UserError:
            return None
        return [satisfied(wanted, scene) for scene in self.parser.read(metrics.to_uint8(images)).scenes()]

    # --- protocol -----------------------------------------------------------------------------------------------------
    def captions(self, n: int = STANDARD_N, seed: int = 0, split: str = "train") -> list[Caption]:
        """``n`` captions, the categories of ``split`` in turn, so that any leading part is balanced as well. Inside a
        category captions are drawn without return, until all have come."""
        decks = []
        for category in categories(split):
            pool = all_captions(category, split)
            draws = seeded(f"bench captions {category} {split} {seed}")
            rounds = [torch.randperm(len(pool), generator=draws) for _ in range(n // len(pool) + 1)]
            decks.append([pool[i] for i in torch.cat(rounds).tolist()])
        return [decks[i % len(decks)][i // len(decks)] for i in range(n)]

    def judge(
        self, images: Tensor, captions: Sequence[Caption | str], n: int | None = None, distances: bool = True
    ) -> dict[str, Any]:
        """All scores of ``images [N, 3, 32, 32]``, float in [-1, 1] or uint8, drawn for ``captions``.

        ``n``: only the first n. The result holds ``sceneeval`` and ``sceneeval_<category>``; ``fd``; ``kid`` and
        ``kid_sd`` (over subsets); ``precision``, ``recall``, ``density``, ``coverage`` (k = 5, equal numbers of real
        and generated); ``n``, ``extractor`` (the parser's name), ``reference``. ``distances=False`` leaves out all but
        SceneEval, for a quick look.
        """
        n = len(images) if n is None else n
        if n > len(images) or len(captions) < n:
            raise ValueError(f"scores at N={n} need {n} images and captions, got {len(images)} and {len(captions)}")
        if n < 1 or (distances and n < LEAST):
            raise UserError(f"{n} images are too few to score", cure=f"score {LEAST} or more")
        asked = [parse_caption(c) if isinstance(c, str) else c for c in captions[:n]]
        reading = self.parser.read(metrics.to_uint8(images[:n].cpu()))
        found: dict[str, Any] = scene_eval(asked, reading)
        if distances:
            found |= self._compared(reading.features, self._reference(asked).features)
        return found | self.about(n, distances)

    def floor_of(self, n: int = STANDARD_N, seed: int = 0, split: str = "train") -> dict[str, Any]:
        """What a perfect generator gets for :meth:`captions` ``(n, seed, split)``: the distances of real pictures in
        training handwriting, and the SceneEval of real pictures in held-out handwriting (the ceiling: of training
        handwriting the parser would know each digit)."""
        asked = self.captions(n, seed, split)

        def measure() -> dict[str, Tensor]:
            self.report(f"measuring the floor of the scenes bench at N={n:,} (once)")
            reference = self._reference(asked)
            ceiling = scene_eval(asked, Reading(reference.digits[:n], reference.colours[:n], reference.features[:n]))
            real, _ = scene_set(n, seed + 1, "train", asked)
            found = ceiling | self._compared(self.parser(real), reference.features)
            return {key: torch.tensor(value, dtype=torch.float64) for key, value in found.items()}

        stored = self._once("floor", measure, asked)
        return {**{key: float(value) for key, value in stored.items()}, **self.about(n)}

    def about(self, n: int, distances: bool = True) -> dict[str, Any]:
        """What scores at N are measured with."""
        found = {"n": n, "extractor": self.parser.name}
        if distances:
            found["reference"] = f"{self._references(n):,} real scenes of the same captions in held-out handwriting"
        return found

    def called(self, n: int, split: str = "") -> tuple[Score, ...]:
        """The scores as they are called at N: the parser and N belong to the number. ``split``: the captions' where it
        is not ``train``."""
        at = f"{self.parser.name}, N={n}" + (f", {split}" if split else "")
        return named(self.scores, {score.key: f"{score.name}-{at}" for score in self.scores})

    # --- distances ----------------------------------------------------------------------------------------------------
    def _compared(self, features: Tensor, reference: Tensor) -> dict[str, float]:
        kid, kid_sd = metrics.kid(features, reference, subsets=SUBSETS)
        return {
            "fd": metrics.frechet_distance(features, reference),
            "kid": kid,
            "kid_sd": kid_sd,
            **metrics.precision_recall_density_coverage(reference[: len(features)], features),
        }

    @staticmethod
    def _references(n: int) -> int:
        """As many real pictures of every caption as give at least :data:`REFERENCE`."""
        return n * -(-REFERENCE // n)

    def _reference(self, captions: Sequence[Caption]) -> Reading:
        """The parser's reading of real pictures of ``captions`` in held-out handwriting, each caption as often as the
        others, in turn; from the cache where it has it."""

        def measure() -> dict[str, Tensor]:
            real, _ = scene_set(self._references(len(captions)), 0, "test", captions)
            reading = self.parser.read(real)
            return {"digits": reading.digits, "colours": reading.colours, "features": reading.features}

        return Reading(**self._once("reference", measure, captions))

    def _once(self, what: str, make: Callable[[], dict[str, Tensor]], captions: Sequence[Caption]) -> dict[str, Tensor]:
        parts = [self.parser.card.data_hash, self.parser.card.sha256, *(caption.text for caption in captions)]
        return kept(f"scenes/{what}", make, code=[scene_eval, pictures, metrics, SceneParser], parts=parts)

    # --- in words -----------------------------------------------------------------------------------------------------
    def card(self, n: int = STANDARD_N, more: Mapping[str, Mapping[str, Any]] | None = None) -> str:
        """What the bench is made of, the protocol, floor and ceiling at ``n``, a row for each sampler of the shipped
        models, and for each of ``more`` (name -> what :meth:`judge` gave)."""
        card = self.parser.card
        rows: dict[str, Mapping[str, Any]] = {"real images (ceiling and floor)": self.floor_of(n)}
        for name in (*TEACHERS, "lightgen"):
            rows |= card_rows(name, read_card(ASSETS / name))
        rows |= more or {}
        columns = {"sceneeval": "SceneEval"} | {f"sceneeval_{category}": category for category in CATEGORIES}
        columns |= {"fd": "FD", "kid": "KID", "precision": "precision", "recall": "recall"}
        columns |= {"density": "density", "coverage": "coverage"}
        lines = [
            "# Bench: scenes",
            "",
            f"- Pictures: {SHAPE[1]}x{SHAPE[2]} RGB, up to four digits in six colours; {card.origin}",
            f"- Captions: {sum(len(all_captions(category)) for category in CATEGORIES):,} in training, "
            f"{sum(len(all_captions(category, 'heldout')) for category in CATEGORIES):,} of held-out combinations; "
            f"categories: {', '.join(CATEGORIES)}",
            f"- Parser: {self.parser.name}, {card.features} features; on {card.test_scenes:,} scenes in held-out "
            f"handwriting {card.digit_accuracy:.2%} of digits, {card.colour_accuracy:.2%} of colours and "
            f"{card.scene_accuracy:.2%} of whole scenes right ({card.steps:,} steps, seed {card.seed}, "
            f"{card.seconds:.0f} s)",
            "- Protocol: N captions, the categories in turn, one picture each; SceneEval is strict (exactly what is "
            "asked for and nothing else), overall the mean of the categories; distances against at least "
            f"{REFERENCE:,} real pictures of the same captions in held-out handwriting; kernel distance over "
            f"{SUBSETS} subsets of at most 1,000; k = 5 neighbours",
            "",
        ]
        return "\n".join([*lines, *table(rows, columns)]) + "\n"

    def teach(
        self,
        name: str,
        out: Path | None = None,
        overrides: Sequence[str] = (),
        run_dir: Path | None = None,
        resume: bool = False,
    ) -> dict[str, Any]:
        from stillroom.bench.scenes import teach

        if name == "scenes-parser":
            return dataclasses.asdict(teach.teach_parser(out or PARSER_DIR, self.report).card)
        if name == "scenes-space":
            return teach.teach_space(self, out, overrides, run_dir, resume)
        return teach.teach_scenes(self, name, out, overrides, run_dir, resume)


@bench("scenes-many")
class ManyScenesBench(ScenesBench):
    """The scenes bench at N = 2,400, 400 captions of each category, for students that differ by a few points."""

    n, teaches = 2_400, ()

    @classmethod
    def serves(cls, task: str, source: str, data: Any) -> bool:
        """Runs are scored as :class:`ScenesBench` does."""
        return False


@bench("scenes-steps")
class StepScenesBench(ScenesBench):
    """The scenes bench for students in few steps: a shipped denoiser, which needs guidance, is asked by caption and
    taught from. Of the shipped store's pictures a student may read 2,000."""

    task, teaches = "text-denoisers", ()
    scores = (
        *ScenesBench.scores,
        Score("sharpness", "Laplacian energy, over that of real pictures", worst=math.nan),
        Score("contrast", "Standard deviation of pixels, over that of real pictures", worst=math.nan),
    )

    def judge(
        self, images: Tensor, captions: Sequence[Caption | str], n: int | None = None, distances: bool = True
    ) -> dict[str, Any]:
        found = super().judge(images, captions, n, distances)
        return found | self._texture(images[:n], captions[:n]) if distances else found

    def floor(self) -> dict[str, Any]:
        asked = self.captions(self.n)
        real, _ = scene_set(self.n, 1, "train", asked)
        return super().floor() | self._texture(real, asked)

    def _texture(self, images: Tensor, captions: Sequence[Caption | str]) -> dict[str, float]:
        """Against as many real pictures of the same captions in held-out handwriting."""
        asked = [parse_caption(caption) if isinstance(caption, str) else caption for caption in captions]
        real, _ = scene_set(len(asked), 0, "test", asked)
        mine, theirs = (texture(metrics.to_uint8(some)) for some in (images.cpu(), real))
        return {name: mine[name] / theirs[name] for name in mine}

    def network(self, teacher: str = TEACHERS[1]) -> Denoiser:
        found = super().network(teacher)
        assert isinstance(found, Denoiser)
        return found

    def given(self, **wanted: Any) -> Mapping[str, Any]:
        only("teacher", wanted)
        codec = self.space.codec
        return given_things([self.network()], decode=codec.pictures, autoencoder=codec.network, classes=[])

    def data(self, **wanted: Any) -> CaptionedData:
        return with_texts(super().data(**wanted), tuple(self.network().null))

    def mislead(self, method: Any, data: CaptionedData) -> CaptionedData:
        for teacher in method.teachers().values():
            mix_up(teacher)
        return data

    @classmethod
    def serves(cls, task: str, source: str, data: Any) -> bool:
        """Runs are scored as :class:`ScenesBench` does."""
        return False


def texture(images: Tensor) -> dict[str, float]:
    """Of uint8 pictures ``[N, C, H, W]``, in grey levels: ``sharpness``, the mean square of their Laplacian (a pixel
    against its four neighbours), and ``contrast``, the standard deviation over all of them."""
    x = images.float()
    inner = x[..., 1:-1, 1:-1]
    around = x[..., :-2, 1:-1] + x[..., 2:, 1:-1] + x[..., 1:-1, :-2] + x[..., 1:-1, 2:]
    return {"sharpness": float((around - 4 * inner).square().mean()), "contrast": float(x.std())}


def mix_up(teacher: Denoiser) -> None:
    """From now on ``teacher`` answers for the caption of the next row of its batch. Rows without one stay as they
    are."""
    ask = teacher.call

    def call(network: nn.Module, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        null = teacher.null_cond(cond)
        same = [(value == null[name]).flatten(1).all(1) for name, value in cond.items()]
        rows = torch.arange(len(x), device=x.device)
        asked = (~torch.stack(same).all(0)).nonzero()[:, 0]
        rows[asked] = asked.roll(-1)
        return ask(network, x, time, {name: value[rows] for name, value in cond.items()})

    teacher.call = call
