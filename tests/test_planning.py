"""Plans: bytes and operations by hand, every method's plan beside what its trainer takes, several processes, advice."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_leaves

import stillroom as sr
import tiny
import tiny_pipelines
import tiny_text
from given import maker
from stillroom import cli, planning
from stillroom.data.source import ArrayData
from stillroom.diffusion.derivatives import jvp
from stillroom.engine import rehearsal
from stillroom.engine.config import EngineConfig
from stillroom.engine.counting import KnownCalls, storage_bytes
from stillroom.engine.rehearsal import Rehearsal, TurnCost
from stillroom.engine.trainer import Trainer
from stillroom.errors import UserError
from stillroom.folders.denoisers import load_denoiser
from stillroom.folders.image_networks import make_classifier
from stillroom.method import Batch, Method, Terms, turn
from stillroom.networks.mae import make_encoder
from stillroom.planning import bytes_of, plan
from stillroom.recipe import Recipe
from stillroom.surgery import skeleton
from stillroom.surgery.skeleton import emptied, weights_unread

CLASSES = ["a", "b", "c"]


def rehearsed(make: Callable[[], Method], data: Any, world: int = 1, **engine: Any) -> list[TurnCost]:
    """``make``: a method with its networks, which lie as they are until they are emptied."""
    config = EngineConfig(**{"steps": 8, "batch": 8, **engine})
    with weights_unread() as mode:
        method = emptied(make(), mode)
        assert isinstance(method, Method)
        return Rehearsal(method, data, config, world, mode).turn_costs()


# --- by hand ----------------------------------------------------------------------------------------------------------
class Regression(Method):
    """Two layers, 4 -> 8 -> 3, and one that is never trained."""

    slug = "regression"

    @dataclass
    class Options:
        again: int = 2

    def build(self, *teachers: Any) -> None:
        self.student = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        self.spare = nn.Linear(10, 10, bias=False)

    @turn(trains="student", every="again")
    def fit(self, batch: Batch) -> Terms:
        return {"error": self.student(batch["x"]).square().mean()}


def regression() -> Method:
    method = Regression()
    method.build()
    return method


POINTS = ArrayData(torch.randn(64, 4))


def test_bytes_and_operations_of_two_layers_by_hand() -> None:
    (cost,) = rehearsed(regression, POINTS, batch=5)
    weights = 4 * 8 + 8 + 8 * 3 + 3
    assert (cost.trained, cost.frozen, cost.every) == (weights, 100, 2)
    assert cost.weights == 4 * (weights + 100)
    assert cost.gradients == 4 * weights
    assert cost.optimizer == 4 * (2 * weights + 4)  # two moments, and the step count of each of four tensors
    assert cost.averages == 0
    # forward 2 B (4 * 8 + 8 * 3); backward the same for the weights, and 8 * 3 again for the hidden layer
    assert cost.flops == 2 * 5 * (4 * 8 + 8 * 3) * 2 + 2 * 5 * 8 * 3


def test_activations_of_a_wide_layer_by_hand() -> None:
    """One layer, 16 -> 1 without bias, on B = 1000 rows."""

    class Wide(Regression):
        def build(self, *teachers: Any) -> None:
            self.student = nn.Linear(16, 1, bias=False)

    def make() -> Method:
        method = Wide()
        method.build()
        return method

    (cost,) = rehearsed(make, ArrayData(torch.randn(64, 16)), batch=1000)
    rows, column = 4 * 1000 * 16 + 2 * 8 * 1000, 4 * 1000  # with the rows' ids and numbers
    # the most is alive in the backward pass of the square: y, the gradient of the mean over all rows, y ** 1, 2 y ** 1,
    # and the product of both; and two numbers, the loss and its own gradient
    assert cost.activations == rows + 5 * column + 2 * 4


def test_averages_and_sgd_are_what_the_engine_keeps() -> None:
    settings: dict[str, Any] = {"ema": [{"of": "student", "decay": 0.9}], "optim": {"all": {"name": "sgd"}}}
    (cost,) = rehearsed(regression, POINTS, **settings)
    assert (cost.averages, cost.optimizer) == (cost.gradients, cost.gradients)  # a copy; one moment


# --- beside what is measured ------------------------------------------------------------------------------------------
class Measured(Trainer):
    """The most memory of each turn of each stage, by torch's own profiler."""

    def measure(self) -> dict[tuple[str, str], int]:
        peaks: dict[tuple[str, str], int] = {}
        for span in self.spans:
            self.method.stage = span.stage
            self.enter(span, resumed=False)
            cycle = math.lcm(*(player.period for player in self.players.values()))
            for step in (0, cycle):
                self.step = self.method.step = span.start + step
                batches = [self.to_device(span.data.batch(0, self.step, self.config.batch, r)) for r in self.rows]
                shared: list[dict[str, Any]] = [{} for _ in batches]
                for player in self.players.values():
                    if span.stage.turns is None or player.turn.name in span.stage.turns:
                        states = [s for p in self.players.values() for s in p.optimizer.state.values()]
                        there = [*self.method.parameters(), *self.method.buffers()]
                        there += [x for x in tree_leaves([states, batches, shared]) if isinstance(x, Tensor)]
                        before = storage_bytes(there)
                        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
                            self.take_turn(player, batches, shared)
                        key = (span.stage.name, player.turn.name)
                        peaks[key] = max(peaks.get(key, 0), before + _highest(seen))
        return peaks


def _highest(seen: Any) -> int:
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def images(side: int = 8) -> ArrayData:
    labels = torch.arange(60) % 3
    data = ArrayData(torch.randint(0, 256, (60, 1, side, side), dtype=torch.uint8), {"label": labels}, CLASSES)
    data.parts["heldout"] = data.take(torch.arange(30))
    return data


def denoisers(tmp: Path) -> tuple[Any, ...]:
    return (load_denoiser(tiny.make_teacher(tmp / "teacher")),)


def classifiers(tmp: Path) -> tuple[Any, ...]:
    return tuple(make_classifier("resnet-small", 1, 3) for _ in range(2))


def encoders(count: int) -> Callable[[Path], tuple[Any, ...]]:
    return lambda tmp: tuple(make_encoder(name, 1, 12) for name in ("mae-nano", "mae-mini", "mae-mini")[:count])


def texts(tmp: Path) -> tuple[Any, ...]:
    return (tiny_text.encoder(2, 8), tiny_text.encoder(4, 12, seed=1))


SEGMENTS = {
    "segments": (2, 1), "grids": (8, 4), "mse": (1.0, 1.0), "adversarial": (0.0, 1.0), "one_step_share": 1.0,
    "feedback_share": 1.0, "reward_steps": 2, "feedback_rank": 2,
}  # fmt: skip
WORLDS: dict[str, tuple[Callable[[Path], tuple[Any, ...]], Callable[[], Any], dict[str, Any]]] = {
    "dmd2": (denoisers, images, {"critic_turns": 2}),
    "swiftbrush": (denoisers, images, {"rank": 2, "targets": ("to_q", "to_v")}),
    "hyper-sd": (denoisers, images, SEGMENTS),
    "decoupled-dmd": (denoisers, images, {"critic_turns": 2, "student_steps": 2}),
    "flash-dmd": (
        denoisers,
        images,
        {"critic_turns": 2, "student_steps": 2, "split": 0.6, "rl_share": 0.5, "reward_steps": 2},
    ),
    "sim": (denoisers, images, {}),
    "sid-lsg": (denoisers, images, {}),
    "uni-instruct": (denoisers, images, {}),
    "meal-v2": (lambda tmp: classifiers(tmp)[:1], images, {}),
    "gt-self-distill": (lambda tmp: classifiers(tmp)[:1], images, {"rounds": 2}),
    "dho": (classifiers, images, {"labelled": 2}),
    "dmae": (encoders(2), lambda: images(12), {"mask_ratio": 0.5}),
}


@pytest.mark.parametrize("slug", WORLDS)
def test_a_plan_is_within_15_per_cent_of_what_is_taken(tmp_path: Path, slug: str) -> None:
    networks, data, options = WORLDS[slug]
    make = maker(slug, options, networks(tmp_path))
    real = Measured(make(), data(), EngineConfig(steps=60, batch=8, device="cpu"), show=False).measure()
    costs = rehearsed(make, data())
    assert {(stage, cost.turn) for cost in costs for stage in cost.stages} == set(real)
    for cost in costs:
        assert cost.total == pytest.approx(max(real[stage, cost.turn] for stage in cost.stages), rel=0.15)
        assert cost.flops > 0


SHORT = {  # where calls repeat: steps of a sampler, guidance, adapters, micro-batches, stages
    "dmd2": ({"critic_turns": 2, "student_steps": 3, "guidance": 2.0}, {"accumulate": 4, "precision": "bf16"}),
    "sid-lsg": ({"student_steps": 2}, {"offload": True, "activation_checkpointing": True}),
    "swiftbrush": (WORLDS["swiftbrush"][2], {"ema": [{"of": "student", "decay": 0.9}]}),
    "hyper-sd": (SEGMENTS, {}),
    "meal-v2": ({}, {"accumulate": 2}),
    "dmae": (WORLDS["dmae"][2], {"activation_checkpointing": False}),
}


@pytest.mark.parametrize("slug", SHORT)
def test_calls_that_are_alike_cost_what_going_through_each_gives(
    tmp_path: Path, slug: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    networks, data, _ = WORLDS[slug]
    options, engine = SHORT[slug]
    make = maker(slug, options, networks(tmp_path))
    found = rehearsed(make, data(), **engine)
    monkeypatch.setattr(skeleton, "repeated", lambda function, args, kwargs: function(*args, **kwargs))
    monkeypatch.setattr(KnownCalls, "_key", lambda *_: None)
    assert found == rehearsed(make, data(), **engine)


def test_a_derivative_along_a_direction_is_planned_through_norms() -> None:
    """Whose rules ask torch for tensors on the device "meta", where it says that fake ones lie."""

    class Sloped(Regression):
        def build(self, *teachers: Any) -> None:
            self.student = nn.Sequential(
                nn.Linear(4, 8), nn.LayerNorm(8), nn.GroupNorm(2, 8), nn.SiLU(), nn.Linear(8, 3)
            )

        @turn(trains="student")
        def fit(self, batch: Batch) -> Terms:
            value, slope = jvp(self.student, (batch["x"],), (torch.ones_like(batch["x"]),))
            return {"error": (self.student(batch["x"]) - value - slope).square().mean()}

    def make() -> Method:
        method = Sloped()
        method.build()
        return method

    (cost,) = rehearsed(make, POINTS)
    assert cost.flops > 3 * 2 * 8 * (4 * 8 + 8 * 3)  # more than the passes without a derivative take


# --- several processes ------------------------------------------------------------------------------------------------
def test_fsdp_shards_all_that_stays_and_ddp_fills_a_bucket() -> None:
    (alone,), (ddp,) = rehearsed(regression, POINTS), rehearsed(regression, POINTS, world=2)
    (two,) = rehearsed(regression, POINTS, world=2, parallel="fsdp")
    (eight,) = rehearsed(regression, POINTS, world=8, parallel="fsdp")
    assert ddp.exchange == ddp.gradients == alone.gradients
    assert ddp.weights == alone.weights
    # the first dimensions 8, 8, 3, 3 and 10 in two parts: 4, 4, 2, 2, 5; in eight: 1, 1, 1, 1, 2
    assert two.weights == 4 * (4 * 4 + 4 + 2 * 8 + 2 + 5 * 10)
    assert eight.weights == 4 * (1 * 4 + 1 + 1 * 8 + 1 + 2 * 10)
    assert eight.optimizer == 4 * (2 * (4 + 1 + 8 + 1) + 4)
    assert alone.flops == 2 * two.flops == 8 * eight.flops


def test_a_batch_that_does_not_split_is_refused() -> None:
    with pytest.raises(UserError, match=r"engine.batch=8 does not split over 3 processes"):
        rehearsed(regression, POINTS, world=3)


def test_micro_batches_take_less() -> None:
    wide = ArrayData(torch.randn(64, 4))
    (whole,), (parts,) = rehearsed(regression, wide, batch=512), rehearsed(regression, wide, batch=512, accumulate=8)
    assert parts.activations < whole.activations
    assert parts.flops == whole.flops


def test_micro_batches_that_are_not_gone_through_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    class Kept(Regression):
        @turn(trains="student")
        def first(self, batch: Batch) -> Terms:
            self.shared["made"] = self.student(batch["x"])
            return {"error": self.shared["made"].square().mean()}

        @turn(trains="student")
        def second(self, batch: Batch) -> Terms:
            return {"error": (self.student(batch["x"]) - self.shared["made"].detach()).square().mean()}

    def make() -> Method:
        method = Kept()
        method.build()
        return method

    wide = ArrayData(torch.randn(64, 4))
    found = rehearsed(make, wide, batch=512, accumulate=16)
    monkeypatch.setattr(rehearsal, "LIKE", 16)
    assert found == rehearsed(make, wide, batch=512, accumulate=16)


def test_a_turn_that_needs_values_of_its_networks_is_refused() -> None:
    class Curious(Regression):
        @turn(trains="student")
        def fit(self, batch: Batch) -> Terms:
            error = self.student(batch["x"]).square().mean()
            return {"error": error if float(error) > 1 else 2 * error}

    def make() -> Method:
        method = Curious()
        method.build()
        return method

    with pytest.raises(UserError, match="depends on its networks' values"):
        rehearsed(make, POINTS)


# --- recipes ----------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    root = tmp_path_factory.mktemp("plan")
    teacher = tiny.make_teacher(root / "teacher")
    return str(teacher), str(tiny.make_data(root / "data"))


def recipe(folders: tuple[str, str], *changes: str) -> Recipe:
    return Recipe.load("sim", changes, teacher=folders[0], data=folders[1])


def test_a_plan_reads_no_weights(folders: tuple[str, str], tmp_path: Path) -> None:
    import shutil

    bare = shutil.copytree(folders[0], tmp_path / "bare")
    for file in bare.rglob("*.safetensors"):
        file.unlink()
    changes = ("engine.batch=4",)
    there, here = (plan(recipe((str(f), folders[1]), *changes)) for f in (folders[0], bare))
    assert [turn.total for turn in there.turns] == [turn.total for turn in here.turns]
    with pytest.raises(UserError, match="are missing"):
        load_denoiser(bare)


def test_what_is_advised_fits(folders: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = ("recompute", "shard")  # each plan takes seconds
    few = tuple(proposal for proposal in planning._PROPOSALS if proposal[0].startswith(wanted))
    monkeypatch.setattr(planning, "_PROPOSALS", few)
    monkeypatch.setattr(planning, "PROCESSES", (2,))
    start = plan(recipe(folders, "engine.batch=32"))
    limit = round(0.55 * start.total)
    found = plan(recipe(folders, "engine.batch=32"), memory=limit)
    assert found.fits is False
    assert found.advice is not None
    assert found.advice.fits
    changed = [argument for argument in found.advice.together if not argument.startswith("--")]
    worlds = [int(a.partition("=")[2]) for a in found.advice.together if a.startswith("--world")]
    applied = plan(recipe(folders, "engine.batch=32", *changed), world=max([1, *worlds]), memory=limit)
    assert applied.fits
    assert applied.total == found.advice.total
    for change in found.advice.changes:
        assert change.saving == start.total - change.total > 0


def test_the_command_prints_bytes_as_json(folders: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", "sim", "--teacher", folders[0], "--data", folders[1], "engine.batch=4"]
    assert cli.main([*arguments, "--json", "--memory", "1GB"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["fits"] is True
    most = max(phase["device"] for phase in told["phases"])
    assert told["total"] == max(most, *(turn["total"] for turn in told["turns"]))
    assert [phase["name"] for phase in told["phases"]] == ["load", "train", "save", "draw"]
    assert cli.main(arguments) == 0
    assert "generator" in capsys.readouterr().out
    same = sr.plan("sim", teacher=folders[0], data=folders[1], overrides=["engine.batch=4"])
    assert same.total == told["total"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--teacher", "nowhere"], "nowhere"),
        (["--memory", "lots"], "is no size"),
        (["--world", "0"], "--world must be at least 1"),
        (["engine.batch=x"], "engine.batch"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "sim", *arguments]) == 2
    message = capsys.readouterr().err
    assert said in message
    assert len(message.splitlines()) == 1


def test_sizes_are_read_as_they_are_written() -> None:
    assert [bytes_of(text) for text in ("24GB", "80GiB", "1.5 MB", 7)] == [24 * 10**9, 80 * 2**30, 1_500_000, 7]


@pytest.mark.parametrize("family", ["sd3", "lumina2", "cogview4"])
def test_a_pipeline_is_planned_from_its_configs(tmp_path: Path, family: str) -> None:
    folder = tiny_pipelines.save_pipeline(family, tmp_path / family)
    for file in folder.rglob("*.safetensors"):
        file.unlink()
    made = tiny_pipelines.make_pipeline(family)
    changes = ["engine.batch=2", "options.t_init=1.0"]
    side = tiny_pipelines.WIDER.get(family, 16)
    found = plan(Recipe.load("sim", changes, teacher=f"{folder}@{side}", data="prompts.txt"))
    count = sum(p.numel() for p in made.transformer.parameters())
    assert {(turn.trained, turn.frozen) for turn in found.turns} == {(count, 2 * count)}


def test_a_run_without_steps_has_nothing_to_plan() -> None:
    with pytest.raises(UserError, match=r"engine\.steps is 0: there is no training to plan"):
        plan(Recipe.load("dmd2", ["engine.steps=0"]))


def test_the_whole_run_counts_what_lies_beside_the_networks(tmp_path: Path) -> None:
    """Text encoder and autoencoder count in every phase; at the end teacher and student share a network with adapters,
    of which saving holds the changed weights once more."""
    folder = tiny_pipelines.save_pipeline("sd", tmp_path / "sd")
    made = tiny_pipelines.make_pipeline("sd")
    changes = ["engine.batch=2", "engine.device=cpu", "options.t_init=1.0", "options.gan_weight=0"]
    adapters = ["lora.student={rank: 2}", "lora.fake={rank: 2}"]
    found = plan(Recipe.load("dmd2", [*changes, *adapters], teacher=f"{folder}@16", data="prompts.txt"))
    phases = {phase.name: phase for phase in found.phases}
    parts = storage_bytes(t for part in (made.text_encoder, made.vae) for t in (*part.parameters(), *part.buffers()))
    assert all(parts <= phase.beside < 1.3 * parts for phase in found.phases)
    network = storage_bytes(made.unet.parameters())
    adapted = sum(p.nbytes for name, p in made.unet.named_parameters() if name.endswith(("to_q.weight", "to_v.weight")))
    assert phases["train"].device == max(turn.total for turn in found.turns)
    assert network < phases["load"].device < 1.3 * network
    assert phases["load"].device + 0.9 * adapted <= phases["save"].device <= phases["load"].device + 1.5 * adapted
    assert phases["draw"].device > phases["load"].device
    assert found.total == found.process == max(phase.process for phase in found.phases)
    plain = plan(Recipe.load("dmd2", changes, teacher=f"{folder}@16", data="prompts.txt"))
    ends = {phase.name: phase.device for phase in plain.phases}
    assert 3 * network <= ends["load"] < 3.3 * network  # teacher, student, fake score
    assert 2 * network <= ends["save"] < 2.3 * network  # teacher and student


@pytest.mark.slow
def test_a_plan_of_a_whole_run_is_within_15_per_cent_of_its_process() -> None:
    """A pipeline of 0.3 GB: the most memory that a process has taken from reading its teacher to its report."""
    program = Path(__file__).parents[1] / "benchmarks" / "whole_run.py"
    said = subprocess.run([sys.executable, str(program)], check=True, stdout=subprocess.PIPE, text=True).stdout
    error = float(re.findall(r"error (-?[0-9.]+)%", said)[0])
    assert abs(error) <= 15
