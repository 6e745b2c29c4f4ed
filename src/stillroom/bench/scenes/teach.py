"""Training of what the scenes' text-to-image models are made of: the judge, the shared autoencoder and text encoder,
then the teachers, by the same engine that distils. ``stillroom teach scenes-parser``, ``scenes-space``, ``scenes-sd3``,
``scenes-pixart``."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stillroom.bench.teach import Denoising, TeacherRecipe, override, recipe_file, score_samplers
from stillroom.data.scenes.captions import (
    CAPTION_SPLITS,
    CATEGORIES,
    CELLS,
    COLOURS,
    DIGIT_WORDS,
    HELD_COLOURS,
    PLURALS,
    RELATIONS,
    Caption,
    Scene,
    Thing,
    all_captions,
    draw_scenes,
    sample_captions,
    seeded,
    vocabulary,
)
from stillroom.data.scenes.pictures import render, scene_set
from stillroom.data.source import ASSETS
from stillroom.diffusion.sampling import ODESampler
from stillroom.engine.config import EngineConfig
from stillroom.engine.trainer import Trainer
from stillroom.evaluation.cost import macs
from stillroom.evaluation.scene_parser import SceneParser, train_scene_parser
from stillroom.folders.denoisers import SIDE_FILE
from stillroom.method import Batch, Method, Optim, Terms, turn
from stillroom.networks.codec import LatentCodec
from stillroom.networks.text_encoder import TextEncoder
from stillroom.networks.text_image_space import TextImageSpace
from stillroom.parsing import read_json, read_yaml
from stillroom.surgery.growing import grow
from stillroom.surgery.modules import parameter_count
from stillroom.tasks.text_images.data import CaptionedData, encode_images
from stillroom.tasks.text_images.model import TextImageGenerator

if TYPE_CHECKING:
    from stillroom.bench.scenes.bench import ScenesBench

SIZES = (24, 48)
"""Sides, in pixels, of the resized scenes that an eighth of the codec's steps each are trained on: students work at
other resolutions than the scenes' own 32."""


# --- the judge --------------------------------------------------------------------------------------------------------
def teach_parser(out: str | Path, report: Callable[[str], None] = print, seed: int = 0, **training: Any) -> SceneParser:
    """Train the bench's parser anew and write it with its card to ``out``:
    ``stillroom teach scenes-parser``. ``training``: further arguments of
    :func:`~stillroom.evaluation.scene_parser.train_scene_parser`. Every score then bears another parser's name."""
    parser = train_scene_parser(seed=seed, report=report, **training)
    parser.save(Path(out))
    return parser


# --- the autoencoder --------------------------------------------------------------------------------------------------
class EndlessScenes:
    """Scenes drawn anew for every batch, addressed by (seed, step); float32 in [-1, 1]."""

    def batch(self, seed: int, step: int, size: int, rows: slice) -> Batch:
        """``{"x": [rows, 3, H, W]}``: 32 pixels wide, in every fourth step 24 and 48 by turns. A quarter of the
        scenes are what captions ask for, the others hold four digits: what there is to learn is in the digits."""
        draw = seeded(f"endless scenes {seed} {step}")
        asked = draw_scenes(sample_captions(size // 4, draw, "train"), draw)
        scenes = [*asked, *full_scenes(size - len(asked), draw)]
        images = scaled(render(scenes, "train", seeded(f"endless pictures {seed} {step}"))[rows])
        if step % 4 == 3:
            images = resized(images, SIZES[step // 4 % 2])
        return {"x": images}


def full_scenes(n: int, generator: torch.Generator) -> list[Scene]:
    """Scenes with a digit in every cell, in colours that are not held out."""
    draws = torch.rand(n, CELLS + 1, generator=generator, dtype=torch.float64).tolist()
    pairs = [(d, c) for d in range(10) for c in range(len(COLOURS)) if (d, c) not in HELD_COLOURS]
    return [
        Scene(tuple(Thing(cell, *pairs[int(row[cell] * len(pairs))]) for cell in range(CELLS)), int(row[-1] * 2**48))
        for row in draws
    ]


def resized(images: Tensor, side: int) -> Tensor:
    """Bilinear, with antialiasing."""
    return F.interpolate(images, (side, side), mode="bilinear", antialias=True)


def scaled(images: Tensor) -> Tensor:
    """uint8 to float32 in [-1, 1]."""
    return images.float().div_(127.5).sub_(1.0)


class Reconstruction(Method):
    """A variational autoencoder with a small divergence weight (arXiv 2112.10752, section 3.1, without the critic)."""

    slug, wing = "reconstruction", "bench"

    @dataclass
    class Options:
        mse_weight: float = 2.0
        kl_weight: float = 1e-6  # on the divergence per latent number, in nats

    options: Options

    def build(self, network: Any) -> None:
        self.student = network
        with torch.no_grad():  # posteriors start narrow: their noise would only delay the learning
            network.quant_conv.bias[network.config["latent_channels"] :] = -6.0

    @turn(trains="student", optim=Optim(lr=2e-3))
    def rebuild(self, batch: Batch) -> Terms:
        x = batch["x"]
        posterior = self.student.encode(x).latent_dist  # type: ignore[operator]
        z = posterior.mean + posterior.std * self.draw.normal_like(posterior.mean)
        error = self.student.decode(z).sample - x  # type: ignore[operator]
        return {
            "l1": error.abs().mean(),
            "mse": self.options.mse_weight * error.square().mean(),
            "kl": self.options.kl_weight * posterior.kl().mean() / z[0].numel(),
        }


@torch.no_grad()
def normalise(network: Any, images: Tensor) -> None:
    """Fold the latents' mean and standard deviation over ``images``, channel by channel, into the 1x1 convolutions on
    both sides of the latents, so that they come out with mean 0 and standard deviation 1: exact, and finer than the one
    number for all channels that a diffusers config can hold."""
    mean = network.encode(images).latent_dist.mean
    shift, std = mean.mean((0, 2, 3)), mean.std((0, 2, 3))
    channels = len(std)
    into, out = network.quant_conv, network.post_quant_conv
    into.bias[:channels] -= shift
    into.weight[:channels] /= std[:, None, None, None]
    into.bias[:channels] /= std
    into.bias[channels:] -= 2 * std.log()  # the log-variances
    out.bias += (out.weight[:, :, 0, 0] * shift).sum(1)
    out.weight *= std[None, :, None, None]
    network.register_to_config(scaling_factor=1.0, shift_factor=0.0)


def psnr(codec: LatentCodec, images: Tensor) -> float:
    """Peak signal-to-noise ratio, in dB, of ``images`` [-1, 1] rebuilt; over all pixels of all images."""
    return float(10 * torch.log10(4 / F.mse_loss(codec.decode(codec.encode(images)), images)))


# --- the text encoder -------------------------------------------------------------------------------------------------
def make_tokenizer(words: Sequence[str], length: int) -> Any:
    """A word-level tokenizer over ``words`` (lower case, punctuation ignored) that ends a text with ``</s>``."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ("<pad>", "</s>", "<unk>")
    vocab = {word: i for i, word in enumerate((*special, *words))}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace(Regex(r"[.,;:!?]"), " ")])  # type: ignore[assignment]
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    tokenizer.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single="$A </s>", special_tokens=[("</s>", vocab["</s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=length
    )


OF_A_THING = {"digit": 10, "colour": len(COLOURS) + 1, "relation": len(RELATIONS) + 1, "count": 4}
"""What the word of one digit can be asked, with the number of answers; the last answer to some is "none". Its relation
is that to the other digit."""
_FACING = {"left": "right", "right": "left", "above": "below", "below": "above"}


def answers(caption: Caption) -> list[int]:
    """The place of the word and the right answers to :data:`OF_A_THING`, of the first and of the second digit; of a
    caption about one digit the second repeats the first."""
    things, words = (caption.wants[0], caption.wants[-1]), caption.text.split()
    named = PLURALS if caption.category == "counting" else DIGIT_WORDS
    found = []
    for thing, relation in zip(things, (caption.relation, _FACING.get(caption.relation, "")), strict=True):
        colour = len(COLOURS) if thing.colour is None else thing.colour
        side = RELATIONS.index(relation) if relation else len(RELATIONS)
        found += [words.index(named[thing.digit]), thing.digit, colour, side, len(caption.wants) - 1]
    return found


class CaptionTokens:
    """Captions of the ``train`` split as tokens with their meanings, drawn anew for every batch."""

    def __init__(self, tokenizer: Any, length: int) -> None:
        self.tokenizer, self.length = tokenizer, length

    def batch(self, seed: int, step: int, size: int, rows: slice) -> Batch:
        return self.read(sample_captions(size, seeded(f"text {seed} {step}"), "train")[rows])

    def read(self, captions: Sequence[Caption]) -> Batch:
        tokens = self.tokenizer(
            [caption.text for caption in captions], padding="max_length", max_length=self.length, return_tensors="pt"
        )
        return {
            "tokens": tokens["input_ids"],
            "mask": tokens["attention_mask"].bool(),
            "answers": torch.tensor([answers(caption) for caption in captions]),
        }


class Reader(nn.Module):
    """A throw-away head that answers from single features, linearly: what a thing is to be from those of its own word,
    and from every feature which word it is of. Asked for a caption's mean, an encoder makes all its words alike, and
    whoever reads them cannot tell whose colour is whose."""

    def __init__(self, width: int, words: int) -> None:
        super().__init__()
        self.thing, self.word = nn.Linear(width, sum(OF_A_THING.values())), nn.Linear(width, words)

    def forward(self, features: Tensor, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
        """Question -> (logits ``[B, answers]``, truth ``[B]``); of ``word``, over all tokens of all captions."""
        mask, truth = batch["mask"], batch["answers"]
        asked = {"word": (self.word(features[mask]), batch["tokens"][mask])}
        every = torch.arange(len(features), device=features.device)
        for which in (0, 1):
            start = which * (1 + len(OF_A_THING))
            here = self.thing(features[every, truth[:, start]]).split(list(OF_A_THING.values()), 1)
            for k, (name, logits) in enumerate(zip(OF_A_THING, here, strict=True)):
                asked[f"word {which + 1}: {name}"] = (logits, truth[:, start + 1 + k])
        return asked


class CaptionReading(Method):
    """The text encoder learns features from which a linear head reads what the caption means."""

    slug, wing = "reading", "bench"

    def build(self, network: nn.Module) -> None:
        config: Any = network.config
        self.student, self.head = network, Reader(config.d_model, config.vocab_size)

    @turn(trains=("student", "head"), optim=Optim(lr=3e-3))
    def read(self, batch: Batch) -> Terms:
        asked = self.ask(batch)
        return {"reading": torch.stack([F.cross_entropy(*pair) for pair in asked.values()]).mean()}

    def ask(self, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
        features = self.student(input_ids=batch["tokens"], attention_mask=batch["mask"]).last_hidden_state
        return self.head(features, batch)

    @torch.no_grad()
    def accuracy(self, batch: Batch) -> dict[str, float]:
        """Share of right answers, by question, and ``all``: every question about a caption's things at once."""
        right = {name: logits.argmax(1) == truth for name, (logits, truth) in self.ask(batch).items()}
        right["all"] = torch.stack([values for name, values in right.items() if name != "word"]).all(0)
        return {name: round(float(values.double().mean()), 4) for name, values in right.items()}


# --- the space --------------------------------------------------------------------------------------------------------
def teach_space(
    bench: ScenesBench,
    out: str | Path | None = None,
    overrides: Sequence[str] = (),
    run_dir: str | Path | None = None,
    resume: bool = False,
) -> dict[str, Any]:
    """Train autoencoder and text encoder; write them as a :class:`TextImageSpace` folder (default: the shipped one's)
    with ``card.json``, and return the card. ``overrides``: ``codec.engine.steps=100`` or the like. ``run_dir`` keeps
    checkpoints; ``resume`` continues from them."""
    from diffusers import AutoencoderKL
    from transformers import T5Config, T5EncoderModel

    recipe = override(read_yaml(recipe_file("scenes-space")), overrides)
    length, runs = recipe["text"]["length"], Path(run_dir) if run_dir else None
    test, asked = scene_set(recipe["evaluate"]["n"], 1, "test")

    def fit(part: str, method: Method, data: Any) -> dict[str, Any]:
        config = EngineConfig(**recipe[part]["engine"])
        trainer = Trainer(method, data, config, runs / part if runs else None, resume=resume)
        trainer.fit()
        exported[part] = trainer.export_role().eval()
        return {"train_seconds": round(trainer.seconds), "steps": config.steps, "batch": config.batch}

    exported: dict[str, Any] = {}
    torch.manual_seed(recipe["codec"]["engine"]["seed"])
    rebuilding = Reconstruction(Reconstruction.Options(**recipe["codec"]["options"]))
    rebuilding.build(AutoencoderKL(**recipe["codec"]["config"]))
    cost = {"codec": fit("codec", rebuilding, EndlessScenes())}
    normalise(exported["codec"], scaled(scene_set(2000, 2, "train")[0]))

    tokenizer = make_tokenizer(vocabulary(), length)
    torch.manual_seed(recipe["text"]["engine"]["seed"])
    reading = CaptionReading()
    reading.build(T5EncoderModel(T5Config(vocab_size=len(tokenizer), **recipe["text"]["config"])))
    cost["text"] = fit("text", reading, words := CaptionTokens(tokenizer, length))
    reading.eval()

    space = TextImageSpace(
        TextEncoder(tokenizer, exported["text"], length), LatentCodec(exported["codec"]), recipe["size"]
    )
    folder = Path(out) if out else ASSETS / "scenes-space"
    space.save(folder)
    splits = {split: [c for k in CATEGORIES for c in all_captions(k, split)] for split in CAPTION_SPLITS}
    card = {
        "recipe": recipe,
        "cost": cost,
        "codec": {
            "name": space.codec.name,
            "parameters": parameter_count(space.codec),
            **judged(bench, space.codec, test, asked),
        },
        "text": {
            "name": space.text.name,
            "parameters": parameter_count(space.text),
            "accuracy": {split: reading.accuracy(words.read(captions)) for split, captions in splits.items()},
        },
    }
    (folder / "card.json").write_text(json.dumps(card, indent=2) + "\n")
    return card


def judged(bench: ScenesBench, codec: LatentCodec, images: Tensor, captions: Sequence[Caption]) -> dict[str, Any]:
    """How well ``images`` (uint8, 32 pixels wide) survive the codec: PSNR here and at other sizes, SceneEval before and
    after, moments of the latents."""
    real = scaled(images)
    latents = codec.encode(real)
    found = {f"psnr_{side}": round(psnr(codec, resized(real[:256], side)), 2) for side in SIZES}
    scores = {
        name: bench.judge(pictures, captions, distances=False)
        for name, pictures in (("real", images), ("rebuilt", codec.decode(latents)))
    }
    return {
        "n": len(images),
        "parser": bench.parser.name,
        "psnr": round(psnr(codec, real), 2),
        **found,
        "latent_mean": [round(float(value), 4) for value in latents.mean((0, 2, 3))],
        "latent_std": [round(float(value), 4) for value in latents.std((0, 2, 3))],
        "sceneeval": {
            name: {key: round(value, 4) for key, value in row.items() if key.startswith("sceneeval")}
            for name, row in scores.items()
        },
    }


# --- the teachers -----------------------------------------------------------------------------------------------------
WEIGHTS = {"single": 1, "two": 2, "counting": 2, "colours": 1, "position": 2, "attribution": 2}
"""How often a teacher's training captions are of each category: the more there is to get wrong, the more often."""


def teacher_captions(n: int, seed: int, weights: Mapping[str, int] = WEIGHTS) -> list[Caption]:
    """``n`` captions of the ``train`` split, the categories by ``weights``."""
    pools = [all_captions(category, "train") for category, weight in weights.items() for _ in range(weight)]
    draws = torch.rand(n, 2, generator=seeded(f"teacher captions {seed}"), dtype=torch.float64).tolist()
    chosen = [(pools[int(which * len(pools))], where) for which, where in draws]
    return [pool[int(where * len(pool))] for pool, where in chosen]


def teacher_data(n: int, seed: int, space: TextImageSpace, weights: Mapping[str, int] = WEIGHTS) -> CaptionedData:
    """``n`` rendered scenes of the ``train`` split with their captions, the categories by ``weights``, encoded."""
    images, captions = scene_set(n, seed, "train", teacher_captions(n, seed, weights))
    texts = [caption.text for caption in captions]
    return encode_images(images, texts, space, name="scenes", origin=f"scenes: {n:,} rendered, seed {seed}")


def teach_scenes(
    bench: ScenesBench,
    name: str,
    out: str | Path | None = None,
    overrides: Sequence[str] = (),
    run_dir: str | Path | None = None,
    resume: bool = False,
    space: str | Path | None = None,
) -> dict[str, Any]:
    """Train a teacher of scenes in ``space`` (default: the shipped one) and score its samplers. Writes the
    folder ``out`` (default: the shipped teacher's), which shares the space's parts, with ``card.json``, and returns
    the card. ``run_dir`` keeps checkpoints and the encoded data; ``resume`` continues from them."""
    recipe = TeacherRecipe.load(name, overrides)
    home = Path(space) if space else ASSETS / "scenes-space"
    shared = TextImageSpace.load(home)
    denoiser = recipe.denoiser()
    if recipe.start:
        start: Any = bench.network(recipe.start)
        grow(denoiser.network, start.network)
    else:
        start_as_identity(denoiser.network)
    denoiser.null = shared.null(denoiser.network)
    method = Denoising(Denoising.Options(**recipe.options))
    method.build(denoiser)
    config = EngineConfig(**recipe.engine)
    cache = Path(run_dir) / "latents.safetensors" if run_dir else None
    if cache and cache.exists():
        data = CaptionedData.load(cache)
    else:
        data = teacher_data(recipe.images, config.seed, shared, recipe.captions or WEIGHTS)
    if cache and not cache.exists():
        data.save(cache)
    trainer = Trainer(method, data, config, run_dir, resume=resume)
    trainer.fit()
    trained = trainer.export_role()
    folder = Path(out) if out else ASSETS / name
    folder.mkdir(parents=True, exist_ok=True)
    components = os.path.relpath(home, folder)
    # Saved before the long scoring, so that an interruption there loses nothing.
    TextImageGenerator(trained, ODESampler(), shared).save(folder, components, torch.float16)
    cost = {"train_seconds": round(trainer.seconds), "steps": config.steps, "batch": config.batch}
    return score_scenes_teacher(bench, folder, recipe, data.origin, cost)


def start_as_identity(network: Any) -> None:
    """Blocks that begin as the identity and an output that begins at zero (adaLN-Zero, arXiv 2212.09748, section 3.2),
    which diffusers leaves to whoever trains."""
    for name, module in network.named_modules():
        if type(module).__name__ == "AdaLayerNormZero" or name == "proj_out":
            for parameter in (module.linear if name != "proj_out" else module).parameters():
                nn.init.zeros_(parameter)


def score_scenes_teacher(
    bench: ScenesBench, folder: Path, recipe: TeacherRecipe, origin: str, cost: dict[str, Any]
) -> dict[str, Any]:
    """Score every sampler of the recipe's ``evaluate`` section at N samples, make the one of the highest SceneEval the
    folder's own, and write ``card.json``."""
    n, seed = recipe.evaluate["n"], recipe.evaluate.get("seed", 1234)
    teacher = TextImageGenerator.load(folder)
    captions = bench.captions(n)
    texts = [caption.text for caption in captions]
    samplers = [ODESampler(**entry) for entry in recipe.evaluate["samplers"]]
    rows, best = score_samplers(
        teacher, samplers, recipe.evaluate["metric"], lambda: teacher.sample(texts, seed=seed),
        lambda images: bench.judge(images, captions), higher=True,
    )  # fmt: skip
    network: Any = teacher.network
    cond = teacher.cond(texts[:1])
    card = {
        "data": origin,
        "space": teacher.space.name,
        "recipe": dataclasses.asdict(recipe),
        "cost": cost,
        "parameters": parameter_count(network),
        "macs": macs(lambda: network(torch.zeros(1, *network.shape), torch.ones(1), cond)),
        "n": n,
        "floor": bench.floor_of(n),
        "samplers": rows,
        "best": best,
    }
    components = read_json(folder / SIDE_FILE)["components"]
    teacher.save(folder, components, torch.float16)
    (folder / "card.json").write_text(json.dumps(card, indent=2, default=float) + "\n")
    return card
