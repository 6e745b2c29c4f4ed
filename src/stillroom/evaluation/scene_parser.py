"""The judge of the scenes world: what stands in each cell of a picture, and features for distances.

One small network, trained once on endless scenes of ``train`` digits, then frozen; scores name it by the hash of its
weights. Half of what it learns from is blurred, noisy, faded or coarsened, because a generator's pictures are: the
reading shall forgive that. Distances shall not: the features must also rebuild the picture and tell how much of each
fault it has.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stillroom.data.scenes.captions import CELLS, COLOURS, Scene, Thing, draw_scenes, sample_captions, seeded
from stillroom.data.scenes.pictures import SHAPE, render
from stillroom.data.source import load_data
from stillroom.evaluation.judges import FEATURES, Judge, load_judge, saved_hash, scaled

NOTHING = 10
"""The class of a cell without a digit."""
FAULTS = ("blur", "coarseness", "contrast", "red", "green", "blue", "grain", "blotches")
TEST_SCENES = 5_000
PARSER = "scenes parser"


@dataclass(frozen=True)
class ParserCard:
    """What is known of a trained parser; saved beside its weights.

    The accuracies are on ``test_scenes`` pictures of ``train`` captions in held-out handwriting: ``digit_accuracy``
    over the digits that are there (one overlooked or misread is wrong), ``empty_accuracy`` over the empty cells,
    ``colour_accuracy`` over the digits found, ``scene_accuracy`` over pictures read without any mistake.
    ``reconstruction``: mean squared error in [-1, 1]. ``seconds``: processor time of the training.
    """

    data: str
    data_hash: str
    digit_accuracy: float
    empty_accuracy: float
    colour_accuracy: float
    scene_accuracy: float
    reconstruction: float
    test_scenes: int
    steps: int
    batch: int
    seed: int
    seconds: float
    features: int = FEATURES
    origin: str = ""
    sha256: str = ""


class _Net(nn.Module):
    """What is frozen and shipped."""

    def __init__(self) -> None:
        super().__init__()
        sizes = ((3, 32, 5, 2), (32, 64, 3, 1), (64, 96, 3, 2), (96, 96, 3, 1))
        self.body = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(inputs, outputs, side, stride, side // 2, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
            )
            for inputs, outputs, side, stride in sizes
        )
        self.cell = nn.Sequential(nn.Linear(96 * 4 * 4, 128, bias=False), nn.BatchNorm1d(128), nn.ReLU())
        self.digit = nn.Sequential(nn.Dropout(0.3), nn.Linear(128, NOTHING + 1))
        self.colour = nn.Linear(128, len(COLOURS))
        self.pool = nn.Sequential(nn.Linear(CELLS * 128 + 288, FEATURES, bias=False), nn.BatchNorm1d(FEATURES))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Digit logits ``[B, 4, 11]``, colour logits ``[B, 4, 6]`` and features ``[B, 64]`` of images in [-1, 1]."""
        maps, means = images, []
        for layer in self.body:
            maps = layer(maps)
            means.append(maps.mean((2, 3)))
        patches = maps.unflatten(3, (2, 4)).unflatten(2, (2, 4)).permute(0, 2, 4, 1, 3, 5)
        cells = self.cell(patches.flatten(0, 2).flatten(1))
        features = self.pool(torch.cat([cells.view(len(images), -1), *means], 1))
        shape = (len(images), CELLS, -1)
        return self.digit(cells).view(shape), self.colour(cells).view(shape), features


class _Tasks(nn.Module):
    """What the features must be good for; of use in training only."""

    def __init__(self) -> None:
        super().__init__()
        self.guess = nn.Linear(FEATURES, CELLS * (NOTHING + 1))
        self.faults = nn.Linear(FEATURES, len(FAULTS))
        self.rebuild = nn.Sequential(nn.Linear(FEATURES, 256), nn.ReLU(), nn.Linear(256, math.prod(SHAPE)))


@dataclass(frozen=True)
class Reading:
    """What the parser makes of N pictures: ``digits [N, 4]`` (10 for nothing) and ``colours [N, 4]`` by cell, int64;
    ``features [N, 64]`` float64."""

    digits: Tensor
    colours: Tensor
    features: Tensor

    def scenes(self) -> list[Scene]:
        """The same as scenes (their grounds are not read)."""
        rows = zip(self.digits.tolist(), self.colours.tolist())
        return [Scene(tuple(Thing(c, d, k) for c, (d, k) in enumerate(zip(*row)) if d != NOTHING)) for row in rows]


class SceneParser(Judge[ParserCard]):
    """Frozen reader of uint8 pictures ``[N, 3, 32, 32]``: :meth:`read` says what is in them, a call gives the features
    ``[N, 64]`` float64 alone."""

    @torch.no_grad()
    def read(self, images: Tensor, batch: int = 250) -> Reading:
        parts = [self.net(scaled(part, SHAPE, PARSER)) for part in images.split(batch)]
        digits, colours, features = (torch.cat(column) for column in zip(*parts))
        return Reading(digits.argmax(2), colours.argmax(2), features.double())

    def forward(self, images: Tensor) -> Tensor:
        return self.read(images).features


# --- training ---------------------------------------------------------------------------------------------------------
def train_scene_parser(
    seed: int = 0,
    steps: int = 2600,
    batch: int = 64,
    lr: float = 3e-3,
    reconstruction_weight: float = 1.0,
    report: Callable[[str], None] = lambda line: None,
) -> SceneParser:
    """Train on endless scenes of ``train`` digits, state the accuracy on held-out digits, freeze.

    Scenes are drawn without captions: each cell holds a digit with probability 3/4, any digit in any colour, held-out
    combinations too, for a judge must know them. Digits are bent, half of the pictures worsened. AdamW, one-cycle
    learning rate; the last step is kept, not the best. The loss is the cross-entropy of each cell's digit (label
    smoothing 0.05), that of the colour of each digit, 0.3 times that of the digits as guessed from the 64 features
    alone, 5 times the mean squared error of the faults told from the features, and ``reconstruction_weight`` times that
    of the picture rebuilt from them.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        began = time.process_time()
        net, tasks = _trained(seed, steps, batch, lr, reconstruction_weight, report)
        seconds = time.process_time() - began
        return _with_card(net.eval(), tasks, steps, batch, seed, seconds, report)


def _trained(
    seed: int, steps: int, batch: int, lr: float, reconstruction_weight: float, report: Callable[[str], None]
) -> tuple[_Net, _Tasks]:
    net, tasks = _Net(), _Tasks()
    optimizer = torch.optim.AdamW([*net.parameters(), *tasks.parameters()], lr=lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=steps, pct_start=0.2)
    draws = seeded(f"scene parser {seed}")
    for step in range(steps):
        scenes = _any_scenes(batch, draws)
        images, faults = worsened(scaled(render(scenes, "train", draws, warp=0.7), SHAPE, PARSER), draws)
        images = images.contiguous(memory_format=torch.channels_last)
        digits, colours = _content(scenes)
        digit_logits, colour_logits, features = net(images)
        there = digits != NOTHING
        digit = F.cross_entropy(digit_logits.flatten(0, 1), digits.flatten(), label_smoothing=0.05)
        colour = F.cross_entropy(colour_logits[there], colours[there])
        guess = F.cross_entropy(tasks.guess(features).view_as(digit_logits).flatten(0, 1), digits.flatten())
        told = F.mse_loss(tasks.faults(features), faults)
        rebuilt = F.mse_loss(tasks.rebuild(features), images.flatten(1))
        optimizer.zero_grad(set_to_none=True)
        (digit + colour + 0.3 * guess + 5 * told + reconstruction_weight * rebuilt).backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % 100 == 0:
            report(
                f"scenes parser step {step + 1}/{steps}: digit {digit:.3f}, colour {colour:.3f}, "
                f"guess {guess:.3f}, faults {told:.3f}, reconstruction {rebuilt:.4f}"
            )
    return net, tasks


def _with_card(
    net: _Net, tasks: _Tasks, steps: int, batch: int, seed: int, seconds: float, report: Callable[[str], None]
) -> SceneParser:
    train, test = load_data("mnist", "train"), load_data("mnist", "test")
    asked = sample_captions(TEST_SCENES, seeded("scene parser test captions"))
    scenes = draw_scenes(asked, seeded("scene parser test scenes"))
    images = render(scenes, "test", seeded("scene parser test pictures"))
    digits, colours = _content(scenes)
    parser = SceneParser(
        net, ParserCard("scenes", train.fingerprint, 0, 0, 0, 0, 0, len(scenes), steps, batch, seed, 0)
    )
    reading = parser.read(images)
    with torch.no_grad():
        rebuilt = tasks.rebuild(reading.features.float())
    there, right = digits != NOTHING, reading.digits == digits
    same_colour = reading.colours == colours
    card = ParserCard(
        data="scenes",
        data_hash=train.fingerprint,
        digit_accuracy=round(float(right[there].double().mean()), 4),
        empty_accuracy=round(float(right[~there].double().mean()), 4),
        colour_accuracy=round(float(same_colour[there & (reading.digits != NOTHING)].double().mean()), 4),
        scene_accuracy=round(float((right & (same_colour | ~there)).all(1).double().mean()), 4),
        reconstruction=round(float(F.mse_loss(rebuilt, scaled(images, SHAPE, PARSER).flatten(1))), 4),
        test_scenes=len(scenes),
        steps=steps,
        batch=batch,
        seed=seed,
        seconds=round(seconds, 1),
        origin=f"scenes of {train.origin}; accuracy on scenes of {test.origin}",
        sha256=saved_hash(net),
    )
    report(
        f"scenes parser {card.data}@{card.sha256[:8]}: on {len(scenes):,} held-out scenes {card.digit_accuracy:.2%} of "
        f"digits, {card.colour_accuracy:.2%} of colours, {card.scene_accuracy:.2%} of whole scenes right"
    )
    return SceneParser(net, card)


def _any_scenes(n: int, generator: torch.Generator) -> list[Scene]:
    filled = (torch.rand(n, CELLS, generator=generator) < 0.75).tolist()
    digits = torch.randint(10, (n, CELLS), generator=generator).tolist()
    colours = torch.randint(len(COLOURS), (n, CELLS), generator=generator).tolist()
    grounds = torch.randint(2**48, (n,), generator=generator).tolist()
    cells = range(CELLS)
    return [
        Scene(tuple(Thing(c, digits[i][c], colours[i][c]) for c in cells if filled[i][c]), grounds[i]) for i in range(n)
    ]


def _content(scenes: Sequence[Scene]) -> tuple[Tensor, Tensor]:
    """Digits (10 for nothing) and colours (0 where there is nothing), int64 ``[N, 4]`` each."""
    content = torch.tensor([NOTHING, 0]).repeat(len(scenes), CELLS, 1)
    for row, scene in enumerate(scenes):
        for thing in scene.things:
            content[row, thing.cell, 0], content[row, thing.cell, 1] = thing.digit, thing.colour
    return content[..., 0], content[..., 1]


def worsened(images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images in [-1, 1], half of them as they were, the others with some of the faults of generated pictures; and how
    much of each of :data:`FAULTS` every image got, ``[N, 8]``, from 0 (none) to about 1 either way."""

    def amount(share: float, low: float, high: float, channels: int = 1) -> Tensor:
        drawn = low + (high - low) * torch.rand(n, channels, 1, 1, generator=generator)
        return torch.where((torch.rand(n, 1, 1, 1, generator=generator) < share) & faulty, drawn, 0.0)

    n = len(images)
    faulty = torch.rand(n, 1, 1, 1, generator=generator) < 0.5
    blur, coarseness = amount(0.5, 0.2, 1.0), amount(0.3, 0.2, 0.9)
    contrast, tint = amount(0.4, -1.0, 0.4), amount(0.4, -1.0, 1.0, 3)
    grain, blotches = amount(0.35, 0.1, 1.0), amount(0.35, 0.1, 1.0)
    images = torch.lerp(images, _blurred(images), blur.expand_as(images))
    coarse = F.interpolate(F.avg_pool2d(images, 2), scale_factor=2, mode="bilinear", align_corners=False)
    images = torch.lerp(images, coarse, coarseness.expand_as(images))
    images = (1 + 0.25 * contrast) * images + 0.12 * tint
    noise = torch.randn(images.shape, generator=generator)
    spots = torch.randn(*images.shape[:2], 8, 8, generator=generator)
    spots = F.interpolate(spots, size=images.shape[2:], mode="bilinear", align_corners=False)
    images = images + 0.15 * grain * noise + 0.2 * blotches * spots
    faults = torch.cat([blur, coarseness, contrast, tint, grain, blotches], 1).flatten(1)
    return images.clamp(-1, 1), faults


def _blurred(images: Tensor) -> Tensor:
    """Each 3x3 neighbourhood averaged with weights 1 2 1 both ways, the border repeated."""
    padded = F.pad(images, (1, 1, 1, 1), mode="replicate")
    rows = padded[..., :-2, :] + 2 * padded[..., 1:-1, :] + padded[..., 2:, :]
    return (rows[..., :-2] + 2 * rows[..., 1:-1] + rows[..., 2:]) / 16


# --- on disk ----------------------------------------------------------------------------------------------------------
def load_parser(folder: Path) -> SceneParser:
    """The frozen parser that was saved in ``folder``, after its SHA-256 was checked against the card."""
    card, weights = load_judge(folder, ParserCard, PARSER)
    net = _Net()
    net.load_state_dict(weights)
    return SceneParser(net, card)
