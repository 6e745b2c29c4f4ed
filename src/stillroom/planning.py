"""What a recipe takes before it is trained: memory and operations of each turn, and what to change where it is too
much."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from stillroom.data.blank import by_sizes
from stillroom.engine.counting import Counted, storage_bytes
from stillroom.engine.rehearsal import Rehearsal, TurnCost
from stillroom.errors import UserError
from stillroom.method import get_method
from stillroom.pictures import PictureGenerator
from stillroom.recipe import Recipe
from stillroom.surgery.lora import LoraDenoiser
from stillroom.surgery.skeleton import NEED_VALUES, Answered, emptied, tensors_in, unshared, weights_unread
from stillroom.task import NOTHING, Task, make_task
from stillroom.training import build_method

if TYPE_CHECKING:
    from rich.table import Table

UNITS = {"": 1, "B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
PROCESSES = (2, 4, 8)
"""How many are tried."""
LORA_RANK = 16


@dataclass(frozen=True)
class Change:
    """Something to change: ``arguments`` of the command line. ``total``: the most memory of a turn with this change
    alone, in bytes; ``saving``: what that is less than before."""

    title: str
    arguments: tuple[str, ...]
    total: int
    saving: int


@dataclass(frozen=True)
class Advice:
    """``changes``, in order of what helps, each by itself. ``together``: arguments that, all at once, bring the memory
    down to ``total``, which ``fits`` or is the least that was found."""

    changes: list[Change]
    together: tuple[str, ...]
    total: int
    fits: bool


@dataclass(frozen=True)
class Phase:
    """A part of a run, in bytes. device: what the device holds at most. beside: what lies in host memory all the while:
    the parts of a model that no turn asks (text encoders, autoencoders), and the data. On the CPU a process takes the
    sum of both, besides the interpreter and its libraries."""

    name: str
    device: int
    beside: int

    @property
    def process(self) -> int:
        return self.device + self.beside


@dataclass(frozen=True)
class Plan:
    """Costs of every turn on one of ``world`` processes. flops: of a mean step of all turns of a stage, forward and
    backward, on one process: the most of all stages. phases: the whole run, where it is one process: load, train, save,
    draw. memory: of the device, in bytes (0: not said)."""

    recipe: Recipe
    world: int
    turns: list[TurnCost]
    flops: int
    phases: list[Phase] = field(default_factory=list)
    memory: int = 0
    advice: Advice | None = None

    @property
    def total(self) -> int:
        """The most memory of any turn or phase, in bytes: on the device, and of the process where that is the CPU."""
        whole = [phase.process if self.recipe.engine.device == "cpu" else phase.device for phase in self.phases]
        return max(*(turn.total for turn in self.turns), 0, *whole)

    @property
    def process(self) -> int:
        """The most memory that a process takes whose device is the CPU, besides the interpreter and its libraries."""
        return max((phase.process for phase in self.phases), default=self.total)

    @property
    def host(self) -> int:
        """Bytes of the weights that ``engine.offload`` keeps in host memory."""
        return max(turn.host for turn in self.turns)

    @property
    def fits(self) -> bool | None:
        """Whether the device's memory holds that; None where it was not said."""
        return self.total <= self.memory if self.memory else None

    def to_dict(self) -> dict[str, Any]:
        """Plain values: bytes, and floating-point operations."""
        engine = self.recipe.engine
        return {
            "method": self.recipe.method,
            "teacher": self.recipe.teacher,
            "recipe_hash": self.recipe.hash(),
            "batch": engine.batch,
            "accumulate": engine.accumulate,
            "precision": engine.precision,
            "activation_checkpointing": engine.activation_checkpointing,
            "offload": engine.offload,
            "world": self.world,
            "parallel": engine.parallel if self.world > 1 else None,
            "total": self.total,
            "host": self.host,
            "flops_per_step": self.flops,
            "memory": self.memory or None,
            "fits": self.fits,
            "process": self.process,
            "phases": [dataclasses.asdict(phase) | {"process": phase.process} for phase in self.phases],
            "turns": [dataclasses.asdict(turn) for turn in self.turns],
            "advice": dataclasses.asdict(self.advice) if self.advice else None,
        }


def plan(
    recipe: Recipe,
    *,
    world: int = 1,
    memory: int | str = 0,
    report: Callable[[str], None] = lambda line: None,
    given: Mapping[str, Any] = NOTHING,
) -> Plan:
    """Memory and operations of every turn of a recipe, found by going through the training on tensors without values.

    world: processes, of one device each. memory: of a device, in bytes or as text ("24GB", "80GiB"); where a turn needs
    more, the plan has advice, for which it is made again with each change. report: is told what is being tried.
    given: ``teacher``, ``student``, ``data``: objects to use instead of those that the recipe names; they stay as they
    are. Raises UserError where a run of the recipe would, and for methods that cannot be gone through so.
    """
    size = bytes_of(memory)
    if world < 1:
        raise UserError(f"--world must be at least 1, got {world}", cure="the number of processes")
    if not recipe.engine.steps:
        raise UserError("engine.steps is 0: there is no training to plan", cure="give the steps of the run")
    if recipe.options.get("stored") and not get_method(recipe.method).blank_stores:
        raise UserError(
            "a plan does not ask the teacher, whose answers options.stored keeps", cure="plan with options.stored="
        )
    found = _rehearsed(recipe, world, given)
    found = dataclasses.replace(found, memory=size)
    if found.fits is False:
        found = dataclasses.replace(found, advice=_advise(found, report, given))
    return found


def bytes_of(text: int | str) -> int:
    """``24GB`` is 24e9 bytes, ``24GiB`` 24 * 2^30. Raises UserError for what is no size."""
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z]*)\s*", str(text))
    if not found or found[2].upper() not in UNITS:
        raise UserError(f"--memory {text!r} is no size", cure="for example 24GB or 80GiB")
    return int(float(found[1]) * UNITS[found[2].upper()])


def _rehearsed(recipe: Recipe, world: int, objects: Mapping[str, Any]) -> Plan:
    recipe = copy.deepcopy(recipe)
    kind = get_method(recipe.method).task
    with (
        recipe.place(),
        torch.random.fork_rng(devices=[]),
        weights_unread() as mode,
        by_sizes(recipe, objects, kind) as (known, objects),
    ):
        task = make_task(kind, objects.get("teacher", known.teacher))
        task.check_kinds(known, objects)
        task.sketch(known, {who: thing if who == "data" else unshared(thing) for who, thing in objects.items()})
        given = task.given()
        for network in tree_leaves(dict(given)):
            if isinstance(network, nn.Module):
                emptied(network, mode)
        method = build_method(recipe, lambda: given, task.check)
        emptied(method, mode)
        rehearsal = Rehearsal(method, task.data, recipe.engine, world, mode)
        turns = rehearsal.turn_costs()
        phases = _phases(recipe, task, rehearsal, turns) if world == 1 else []
    stages = {stage for turn in turns for stage in turn.stages}
    flops = max(sum(turn.flops / turn.every for turn in turns if stage in turn.stages) for stage in stages)
    return Plan(recipe, world, turns, round(flops), phases)


def _phases(recipe: Recipe, task: Task, rehearsal: Rehearsal, turns: Sequence[TurnCost]) -> list[Phase]:
    """Load, train, save and draw, of a training that has been gone through. At the end only the student and its
    teachers are left; where they share their weights, these count once."""
    method = rehearsal.method
    mine = [*method.parameters(), *method.buffers()]
    known = {id(tensor.untyped_storage()) for tensor in mine}
    others = [tensor for tensor in tensors_in([task, task.data]) if id(tensor.untyped_storage()) not in known]
    beside = storage_bytes(others)
    weights = storage_bytes(mine)
    role = rehearsal.export_role(share=True)
    student = task.student(role, method.sampler())
    merged = storage_bytes(_merged(role)) if isinstance(role, LoraDenoiser) else 0
    left = storage_bytes([*role.parameters(), *role.buffers(), *tensors_in(list(method.teachers().values()))])
    draws = isinstance(student, PictureGenerator) and (recipe.evaluate.samples or recipe.evaluate.n)
    drawn = _drawn(student, rehearsal) if draws else 0
    train = max(turn.total for turn in turns)
    return [
        Phase("load", weights, beside),
        Phase("train", train, beside),
        Phase("save", left + merged, beside),
        Phase("draw", left + drawn, beside),
    ]


def _merged(role: LoraDenoiser) -> list[Tensor]:
    """The weights that an adapter changes."""
    shared = {id(p) for p in role.network.parameters()}
    return [p for p in role.merged(share=True).network.parameters() if id(p) not in shared]


def _drawn(student: PictureGenerator, rehearsal: Rehearsal) -> int:
    """The most bytes that a batch of drawings takes on top of the weights. What cannot be gone through without values
    counts as nothing."""
    most = 0
    for act in student.drawing():
        counted = Counted()
        with contextlib.suppress(*NEED_VALUES), rehearsal.mode, torch.no_grad(), Answered():
            for tensor in tensors_in(student):
                counted.see(tensor)
            counted.restart()
            there = counted.alive
            with counted:
                act()
            most = max(most, counted.peak - there)
    return most


# --- what to change ---------------------------------------------------------------------------------------------------
@dataclass
class _Try:
    """A recipe on so many processes, with the arguments that make it of the one at the start."""

    recipe: Recipe
    world: int
    given: Mapping[str, Any]
    arguments: tuple[str, ...] = field(default=())

    def changed(self, argument: str, world: int = 0) -> _Try:
        key = argument.partition("=")[0]
        kept = tuple(a for a in self.arguments if a.partition("=")[0] != key)
        arguments = (*kept, argument)
        if world:
            arguments = (*(a for a in arguments if not a.startswith("--world")), f"--world={world}")
        return _Try(self.recipe.changed(argument), world or self.world, self.given, arguments)


def _advise(start: Plan, report: Callable[[str], None], given: Mapping[str, Any]) -> Advice:
    """Each change by itself; then one after the other, until it fits."""
    size, first = start.memory, _Try(start.recipe, start.world, given)
    changes: list[Change] = []
    now, best, at = first, start.total, start.total <= size
    for title, propose, worth in _PROPOSALS:
        report(f"trying: {title}")
        alone = _least(propose, first, start.total, size, worth)
        if alone is not None:
            changes.append(Change(title, alone[0].arguments, alone[1], start.total - alone[1]))
        if at:
            continue
        upon = alone if now is first else _least(propose, now, best, size, worth)
        if upon is not None:
            now, best = upon
            at = best <= size
    return Advice(changes, now.arguments, best, at)


def _least(
    propose: Callable[[_Try], list[_Try]], now: _Try, total: int, size: int, worth: float
) -> tuple[_Try, int] | None:
    """Of proposals from mild to strong the mildest that fits, else the strongest; None where that saves nothing, or
    less than the part ``worth`` of what there is."""
    tries = propose(now)
    found: tuple[_Try, int] | None = None
    while tries and found is None:  # a method or its networks may not be run so: then the next weaker one
        last = tries.pop()
        if (cost := _total(last)) is not None:
            found = (last, cost)
    if found is None or found[1] >= total or total - found[1] < worth * total:
        return None
    low = 0
    while found[1] <= size and low < len(tries):
        middle = (low + len(tries)) // 2
        cost = _total(tries[middle])
        if cost is not None and cost <= size:
            found, tries = (tries[middle], cost), tries[:middle]
        else:
            low = middle + 1
    return found


def _total(tried: _Try) -> int | None:
    try:
        return _rehearsed(tried.recipe, tried.world, tried.given).total
    except (UserError, ValueError):  # ValueError: batch norm's, of a micro-batch of one row
        return None


def _lora(now: _Try) -> list[_Try]:
    """Copies of the teacher that the method may turn into adapters: one, then both."""
    trained = now.recipe.trained()
    roles = [role for role in ("fake", "student") if role in trained and role not in now.recipe.lora]
    wanted = [f"lora.{role}={{rank: {LORA_RANK}}}" for role in roles]
    tries = [now.changed(argument) for argument in wanted]
    return [*tries, tries[0].changed(wanted[1])] if len(tries) > 1 else tries


def _checkpointing(now: _Try) -> list[_Try]:
    on = now.recipe.engine.activation_checkpointing
    return [] if on else [now.changed("engine.activation_checkpointing=true")]


def _smaller_batch(now: _Try) -> list[_Try]:
    """More and smaller micro-batches of the same global batch."""
    engine = now.recipe.engine
    parts = engine.batch // now.world
    counts = [count for count in range(engine.accumulate + 1, parts + 1) if parts % count == 0]
    return [now.changed(f"engine.accumulate={count}") for count in counts]


def _sharding(now: _Try) -> list[_Try]:
    if now.world > 1:
        tries = [] if now.recipe.engine.parallel == "fsdp" else [now.changed("engine.parallel=fsdp")]
    else:
        tries = [now.changed("engine.parallel=fsdp", world=count) for count in PROCESSES]
    if now.recipe.engine.offload:  # which may not go together (adapters)
        tries = [*(tried.changed("engine.offload=false") for tried in tries), *tries]
    return tries


def _half_precision(now: _Try) -> list[_Try]:
    return [] if now.recipe.engine.precision == "bf16" else [now.changed("engine.precision=bf16")]


def _offload(now: _Try) -> list[_Try]:
    return [] if now.recipe.engine.offload else [now.changed("engine.offload=true")]


def _eight_bit(now: _Try) -> list[_Try]:
    name = now.recipe.engine.optim.get("all", {}).get("name")
    return [] if name == "adamw8bit" else [now.changed("engine.optim.all.name=adamw8bit")]


def _no_averages(now: _Try) -> list[_Try]:
    return [now.changed("engine.export=student").changed("engine.ema=[]")] if now.recipe.engine.ema else []


_PROPOSALS: tuple[tuple[str, Callable[[_Try], list[_Try]], float], ...] = (
    ("train adapters on the teacher's weights (LoRA)", _lora, 0.0),
    ("recompute activations in the backward pass", _checkpointing, 0.0),
    ("smaller micro-batches, the batch is the same", _smaller_batch, 0.0),
    ("keep frozen weights in host memory", _offload, 0.25),
    ("keep the optimizer's moments in a byte each (bitsandbytes)", _eight_bit, 0.0),
    ("shard the networks over several devices (FSDP)", _sharding, 0.0),
    ("compute in bf16", _half_precision, 0.0),
    ("keep no averaged weights", _no_averages, 0.0),
)
"""Title, what to try, and the part of the memory that it must save to be worth its price."""


# --- on the screen ----------------------------------------------------------------------------------------------------
def size_text(number: float) -> str:
    """Bytes in words: 1.23 GB."""
    return _scaled(number, ("B", "kB", "MB", "GB", "TB"))


def count_text(number: float) -> str:
    """A count in words: 1.23 G."""
    return _scaled(number, ("", "k", "M", "G", "T", "P", "E"))


def _scaled(number: float, units: Sequence[str]) -> str:
    place = 0
    while abs(number) >= 999.5 and place < len(units) - 1:
        number, place = number / 1000, place + 1
    return f"{number:.3g} {units[place]}".strip()


def turns_table(found: Plan) -> Table:
    """A row for each turn."""
    from rich.table import Table

    several = found.world > 1
    names = ["stage", "turn", "trained", "frozen", "weights", "gradients", "optimizer", "averages", "activations"]
    names += ["exchange"] * several + ["total", "FLOPs"]
    table = Table(*names, header_style="bold", title=_headline(found))
    for turn in found.turns:
        sizes = [turn.weights, turn.gradients, turn.optimizer, turn.averages, turn.activations]
        sizes += [turn.exchange] * several + [turn.total]
        stages = turn.stages[0] if len(turn.stages) == 1 else f"{turn.stages[0]} .. {turn.stages[-1]}"
        name = turn.turn if turn.every == 1 else f"{turn.turn} (every {turn.every})"
        counts = [count_text(turn.trained), count_text(turn.frozen)]
        table.add_row(stages, name, *counts, *map(size_text, sizes), count_text(turn.flops))
    return table


def _headline(found: Plan) -> str:
    engine = found.recipe.engine
    words = [found.recipe.method, f"batch {engine.batch}", engine.precision]
    if engine.accumulate > 1:
        words.append(f"{engine.accumulate} micro-batches")
    if engine.activation_checkpointing:
        words.append("activation checkpointing")
    if engine.offload:
        words.append("offload")
    if found.world > 1:
        words.append(f"one of {found.world} processes, {engine.parallel}")
    return ", ".join(words)


def verdict(found: Plan) -> list[str]:
    """Lines below the table: the highest turn, whether it fits, and what to change."""
    lines = [f"peak {size_text(found.total)}; {count_text(found.flops)}FLOP per step and process"]
    if found.phases:
        told = (f"{phase.name} {size_text(phase.process)}" for phase in found.phases)
        lines.append(f"the whole run in one process on the CPU, libraries apart: {', '.join(told)}")
    if found.host:
        lines.append(f"host memory: {size_text(found.host)} of frozen weights per process")
    if not found.memory:
        return lines
    free = found.memory - found.total
    if free >= 0:
        return [*lines, f"fits into {size_text(found.memory)}, {size_text(free)} left"]
    lines.append(f"does not fit into {size_text(found.memory)}: {size_text(-free)} too much")
    assert found.advice is not None
    for change in found.advice.changes:
        lines.append(
            f"  {change.title}: {' '.join(map(shown, change.arguments))}"
            f"  -> {size_text(change.total)} (saves {size_text(change.saving)})"
        )
    together = " ".join(map(shown, found.advice.together))
    if found.advice.fits:
        lines.append(f"fits with {together}: {size_text(found.advice.total)}")
    elif together:
        lines.append(f"does not fit with all of it either ({together}): {size_text(found.advice.total)}")
    else:
        lines.append("nothing that is known here takes less")
    return lines


def shown(argument: str) -> str:
    """As it is typed in a shell."""
    return f"'{argument}'" if " " in argument or "[" in argument else argument
