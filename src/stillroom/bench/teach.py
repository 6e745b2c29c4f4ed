"""Training of the benches' own teachers, by the same engine that distils: ``stillroom teach fashion``."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

from stillroom.bench.fashion import FashionBench
from stillroom.bench.mixture2d import PairBench, RingBench
from stillroom.diffusion.denoiser import Denoiser
from stillroom.diffusion.process import expand, process_from_dict
from stillroom.diffusion.sampling import FewStepSampler, ODESampler
from stillroom.diffusion.times import TimeLaw
from stillroom.engine.config import EngineConfig
from stillroom.engine.trainer import Trainer
from stillroom.errors import UserError, nearest
from stillroom.evaluation.cost import macs, parameters
from stillroom.folders.denoisers import OWN_NETWORKS
from stillroom.folders.diffusers_networks import denoiser_from_diffusers, make_network, scheduler_config
from stillroom.losses.score import FakeLoss, fake_score_loss
from stillroom.method import Batch, Method, Optim, Terms, turn
from stillroom.tasks.class_images.model import ImageGenerator

POINTS: dict[str, type[RingBench | PairBench]] = {"ring": RingBench, "pair": PairBench}
TEACHERS = Path(__file__).parent / "teachers"


class Denoising(Method):
    """Plain diffusion training: the network under ``student`` learns to denoise real data, with label dropout."""

    slug, wing = "denoising", "bench"

    @dataclass
    class Options:
        times: TimeLaw = TimeLaw("logit-normal")
        loss: FakeLoss = "v"
        label_drop: float = 0.1

    options: Options

    def build(self, *teachers: Denoiser) -> None:
        (self.student,) = teachers

    @turn(trains="student", optim=Optim(lr=1e-3))
    def denoise(self, batch: Batch) -> Terms:
        x0, process = batch["image"], self.student.process
        t, eps = self.options.times.sample(self.draw, process).to(x0), self.draw.normal_like(x0)
        drop = self.draw.uniform(len(x0)).to(x0.device) < self.options.label_drop
        given = {name: batch["cond"][name] for name in self.student.null}
        null = self.student.null_cond(given)
        cond = {k: torch.where(expand(drop, v), null[k], v) for k, v in given.items()}
        prediction = self.student(process.add_noise(x0, eps, t), t, cond)
        return {self.options.loss: fake_score_loss(prediction, x0, eps, self.options.loss)}


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
    images: int = 0  # rendered for the training, where the world has no data set of its own

    @classmethod
    def load(cls, name: str, overrides: Sequence[str] = ()) -> TeacherRecipe:
        """The shipped recipe ``name`` with ``engine.key=value`` overrides."""
        known = {path.stem: path for path in TEACHERS.glob("*.yaml")}
        if name not in known:
            raise UserError(f"no teacher recipe {name!r}{nearest(name, known)}", cure=f"known: {', '.join(known)}")
        values = yaml.safe_load(known[name].read_text())
        for override in overrides:
            key, _, value = override.partition("=")
            section, _, leaf = key.partition(".")
            if section not in ("engine", "options", "config") or not leaf or not value:
                raise UserError(f"override {override!r} is not understood", cure="write engine.steps=100 or the like")
            values[section][leaf] = yaml.safe_load(value)
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


def teach(
    name: str,
    out: str | Path | None = None,
    overrides: Sequence[str] = (),
    run_dir: str | Path | None = None,
    resume: bool = False,
) -> dict[str, Any]:
    """Train a bench teacher and score its samplers. Writes the teacher folder ``out`` (default: the bench's own) with
    its card ``card.json``, and returns the card. ``run_dir`` keeps checkpoints; ``resume`` continues from them."""
    if name == "scenes-parser":
        from stillroom.bench.scenes import PARSER_DIR, teach_parser

        return dataclasses.asdict(teach_parser(Path(out) if out else PARSER_DIR, print).card)
    if name.startswith("scenes-"):
        from stillroom.bench import teach_scenes

        if name == "scenes-space":
            return teach_scenes.teach_space(out, overrides, run_dir, resume)
        return teach_scenes.teach_scenes(name, out, overrides, run_dir, resume)
    recipe = TeacherRecipe.load(name, overrides)
    bench = POINTS[recipe.data]() if recipe.data in POINTS else FashionBench(recipe.data)
    method = Denoising(Denoising.Options(**recipe.options))
    method.build(recipe.denoiser())
    config = EngineConfig(**recipe.engine)
    started = time.perf_counter()
    trainer = Trainer(method, bench.train, config, Path(run_dir) if run_dir else None, resume=resume)
    trainer.fit()
    seconds = time.perf_counter() - started
    denoiser = trainer.export_role()
    assert isinstance(denoiser, Denoiser)
    folder = Path(out) if out else bench.teacher_dir
    # Saved before the long scoring, so that an interruption there loses nothing.
    ImageGenerator(denoiser, ODESampler(), bench.train.classes).save(folder)
    cost = {"train_seconds": round(seconds), "steps": config.steps, "batch": config.batch}
    return score_teacher(folder, recipe, bench, cost)


def score_teacher(
    folder: Path, recipe: TeacherRecipe, bench: FashionBench | RingBench | PairBench, cost: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Score every sampler of the recipe's ``evaluate`` section at N samples, make the best the folder's own sampler,
    and write ``card.json``. One- and few-step rows are there to be beaten."""
    n, seed, metric = recipe.evaluate["n"], recipe.evaluate.get("seed", 1234), recipe.evaluate["metric"]
    rows = []
    teacher = ImageGenerator.load(folder)
    labels = bench.labels(n)
    best: tuple[float, ODESampler] | None = None
    for entry in recipe.evaluate["samplers"]:
        sampler = ODESampler(**entry) if entry["steps"] > 1 else FewStepSampler((1.0,), guidance=entry["guidance"])
        teacher.sampler = sampler
        scores = bench.score(teacher.sample(labels, seed=seed), labels)
        rows.append({"sampler": sampler.to_dict(), "nfe": sampler.nfe, "scores": scores})
        distance = scores[metric]
        if isinstance(sampler, ODESampler) and (best is None or distance < best[0]):
            best = (distance, sampler)
        print(f"{sampler.to_dict()} nfe {sampler.nfe} {metric} {distance:.4f}", flush=True)
    assert best is not None
    network = teacher.denoiser.network
    example = (torch.zeros(1, *teacher.denoiser.shape), torch.ones(1), {"label": torch.zeros(1, dtype=torch.long)})
    card = {
        "data": bench.train.origin,
        "recipe": dataclasses.asdict(recipe),
        "cost": (cost or read_cost(folder)),
        "parameters": parameters(network),
        "macs": macs(lambda: teacher.denoiser(*example)),
        "n": n,
        "floor": bench.floor(n),
        "samplers": rows,
        "best": {"sampler": best[1].to_dict(), metric: best[0]},
    }
    ImageGenerator(teacher.denoiser, best[1], bench.train.classes).save(folder)
    (folder / "card.json").write_text(json.dumps(card, indent=2, default=float) + "\n")
    return card


def read_cost(folder: Path) -> dict[str, Any]:
    card = folder / "card.json"
    return json.loads(card.read_text())["cost"] if card.exists() else {}
