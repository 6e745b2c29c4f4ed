"""Training of the benches' own teachers, by the same engine that distils: ``stillroom teach fashion``."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from stillroom.bench import Bench, benches
from stillroom.bench.base import read_card
from stillroom.diffusion.denoiser import Denoiser
from stillroom.diffusion.process import process_from_dict
from stillroom.diffusion.sampling import FewStepSampler, ODESampler, Sampler
from stillroom.diffusion.times import TimeLaw
from stillroom.engine.config import EngineConfig
from stillroom.engine.trainer import Trainer
from stillroom.errors import UserError, nearest
from stillroom.evaluation.cost import macs
from stillroom.folders.denoisers import OWN_NETWORKS
from stillroom.folders.diffusers_networks import denoiser_from_diffusers, make_network, scheduler_config
from stillroom.losses.score import FakeLoss, fake_score_loss
from stillroom.method import Batch, Method, Optim, Terms, turn
from stillroom.parsing import parse_yaml, read_yaml
from stillroom.surgery.modules import parameter_count
from stillroom.tasks.class_images.model import ImageGenerator

if TYPE_CHECKING:
    from stillroom.bench.classes import ClassBench


def teach(
    name: str,
    out: str | Path | None = None,
    overrides: Sequence[str] = (),
    run_dir: str | Path | None = None,
    resume: bool = False,
) -> dict[str, Any]:
    """Train what a bench teaches by this name: a teacher, whose samplers are scored, or a part of one. Writes the
    folder ``out`` (default: the bench's own) with its card ``card.json``, and returns the card. ``run_dir`` keeps
    checkpoints; ``resume`` continues from them. Raises UserError for an unknown name."""
    bench, (place, runs) = teacher_bench(name)(), (Path(p) if p else None for p in (out, run_dir))
    return bench.teach(name, place, overrides, runs, resume)


def teacher_bench(name: str) -> type[Bench]:
    """The bench that teaches by this name. Raises UserError for an unknown one, naming the nearest."""
    known = {taught: cls for cls in benches().values() for taught in cls.teaches}
    if name not in known:
        raise UserError(f"no teacher recipe {name!r}{nearest(name, known)}", cure=f"known: {', '.join(sorted(known))}")
    return known[name]


def recipe_file(name: str) -> Path:
    """The teacher recipe of this name, in the room of its bench."""
    return teacher_bench(name).folder() / f"{name}.yaml"


class Denoising(Method):
    """Plain diffusion training: the network under ``student`` learns to denoise real data, with label dropout."""

    slug, wing = "denoising", "bench"

    @dataclass
    class Options:
        times: TimeLaw = TimeLaw("logit-normal")
        loss: FakeLoss = "v"
        label_drop: float = 0.1

    options: Options

    def build(self, student: Denoiser) -> None:
        self.student = student

    @turn(trains="student", optim=Optim(lr=1e-3))
    def denoise(self, batch: Batch) -> Terms:
        x0, process = batch["x"], self.student.process
        t, eps = self.options.times.sample(self.draw, process).to(x0), self.draw.normal_like(x0)
        drop = self.draw.uniform(len(x0)).to(x0.device) < self.options.label_drop
        given = {name: batch["cond"][name] for name in self.student.null}
        prediction = self.student(process.add_noise(x0, eps, t), t, self.student.without(given, drop))
        return {self.options.loss: fake_score_loss(prediction, x0, eps, self.options.loss)}


def override(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """``values``, a shipped recipe's, with ``section.key=value`` set. Raises UserError for a way that does not lead
    through what is there."""
    for text in overrides:
        path, equals, value = text.partition("=")
        *way, leaf = path.split(".")
        inner: Any = values
        for key in way:
            inner = inner.get(key) if isinstance(inner, dict) else None
        if not equals or not value or not way or not isinstance(inner, dict):
            section = "engine" if "engine" in values else "codec.engine"
            raise UserError(f"override {text!r} is not understood", cure=f"write {section}.steps=100 or the like")
        inner[leaf] = parse_yaml(value, f"override {path}")
    return values


@dataclass
class TeacherRecipe:
    """Everything that determines a bench teacher."""

    data: str
    network: str
    config: dict[str, Any]
    process: dict[str, Any]
    prediction: Literal["x0", "eps", "v"]
    options: dict[str, Any]
    engine: dict[str, Any]
    evaluate: dict[str, Any]
    images: int = 0  # rendered for the training, where the bench has no data set of its own
    start: str = ""  # a shipped teacher whose weights the network begins with, deeper by blocks that add nothing yet
    captions: dict[str, int] = field(default_factory=dict)  # category -> how often, where the bench draws captions

    @classmethod
    def load(cls, name: str, overrides: Sequence[str] = ()) -> TeacherRecipe:
        """The shipped recipe ``name`` with ``engine.key=value`` overrides."""
        values = override(read_yaml(recipe_file(name)), overrides)
        if isinstance(times := values["options"].get("times"), dict):
            values["options"]["times"] = TimeLaw(**times)
        return cls(**values)

    def denoiser(self) -> Denoiser:
        """The untrained network, initialised from the engine's seed."""
        torch.manual_seed(self.engine.get("seed", 0))
        process = process_from_dict(self.process)
        if self.network in OWN_NETWORKS:
            network = OWN_NETWORKS[self.network](**self.config)
            null = {"label": self.config["classes"]}
            return Denoiser(network, process, self.prediction, null=null, shape=(self.config["dim"],))
        return denoiser_from_diffusers(
            make_network(self.network, self.config),
            scheduler_config(process, self.prediction),
            prediction=self.prediction,
            process=process,
        )


def teach_classes(
    bench: ClassBench,
    name: str,
    folder: Path,
    overrides: Sequence[str] = (),
    run_dir: Path | None = None,
    resume: bool = False,
) -> dict[str, Any]:
    """Train a bench's class-conditional teacher on its data, into ``folder``, and score its samplers."""
    recipe = TeacherRecipe.load(name, overrides)
    method = Denoising(Denoising.Options(**recipe.options))
    method.build(recipe.denoiser())
    config = EngineConfig(**recipe.engine)
    started = time.perf_counter()
    trainer = Trainer(method, bench.train, config, run_dir, resume=resume)
    trainer.fit()
    seconds = time.perf_counter() - started
    denoiser = trainer.export_role()
    assert isinstance(denoiser, Denoiser)
    # Saved before the long scoring, so that an interruption there loses nothing.
    ImageGenerator(denoiser, ODESampler(), bench.train.classes).save(folder)
    cost = {"train_seconds": round(seconds), "steps": config.steps, "batch": config.batch}
    return score_teacher(folder, recipe, bench, cost)


def score_teacher(
    folder: Path, recipe: TeacherRecipe, bench: ClassBench, cost: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Score every sampler of the recipe's ``evaluate`` section at N samples, make the best the folder's own sampler,
    and write ``card.json``. One- and few-step rows are there to be beaten."""
    n, seed = recipe.evaluate["n"], recipe.evaluate.get("seed", 1234)
    teacher, labels = ImageGenerator.load(folder), bench.labels(n)
    samplers = [
        ODESampler(**entry) if entry["steps"] > 1 else FewStepSampler((1.0,), guidance=entry["guidance"])
        for entry in recipe.evaluate["samplers"]
    ]
    rows, best = score_samplers(
        teacher, samplers, recipe.evaluate["metric"], lambda: teacher.sample(labels, seed=seed),
        lambda samples: bench.judge(samples, labels),
    )  # fmt: skip
    example = (torch.zeros(1, *teacher.denoiser.shape), torch.ones(1), {"label": torch.zeros(1, dtype=torch.long)})
    card = {
        "data": bench.train.origin,
        "recipe": dataclasses.asdict(recipe),
        "cost": cost or read_card(folder).get("cost", {}),
        "parameters": parameter_count(teacher.denoiser.network),
        "macs": macs(lambda: teacher.denoiser(*example)),
        "n": n,
        "floor": bench.floor_of(n),
        "samplers": rows,
        "best": best,
    }
    teacher.classes = list(bench.train.classes)
    teacher.save(folder)
    (folder / "card.json").write_text(json.dumps(card, indent=2, default=float) + "\n")
    return card


def score_samplers(
    teacher: Any,
    samplers: Sequence[Sampler],
    metric: str,
    sample: Callable[[], Tensor],
    judge: Callable[[Tensor], dict[str, Any]],
    higher: bool = False,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The card's ``samplers`` and ``best``: what ``judge`` says of what ``sample`` draws by each. The best by
    ``metric`` of those that solve the equation in many steps stays the teacher's own."""
    rows: list[dict[str, Any]] = []
    best: tuple[float, Sampler] | None = None
    for sampler in samplers:
        teacher.sampler, began = sampler, time.perf_counter()
        samples = sample()
        seconds = round(time.perf_counter() - began, 1)
        scores = judge(samples)
        rows.append({"sampler": sampler.to_dict(), "nfe": sampler.nfe, "seconds": seconds, "scores": scores})
        value = scores[metric]
        if isinstance(sampler, ODESampler) and (best is None or (value > best[0] if higher else value < best[0])):
            best = (value, sampler)
        print(f"{sampler.to_dict()} nfe {sampler.nfe} {metric} {value:.4f}", flush=True)
    assert best is not None
    teacher.sampler = best[1]
    return rows, {"sampler": best[1].to_dict(), metric: best[0]}
