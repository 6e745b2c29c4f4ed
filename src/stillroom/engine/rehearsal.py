"""A training gone through without numbers: the trainer's own turns on fake tensors, watched by a counter of bytes and
of floating-point operations."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from stillroom.draws import Draws
from stillroom.engine.config import EngineConfig
from stillroom.engine.counting import Counted, KnownCalls, storage_bytes, tensors_in
from stillroom.engine.distributed import bucketed, host_units, owned
from stillroom.engine.eight_bit import first_states
from stillroom.engine.offload import untrained
from stillroom.engine.player import Player
from stillroom.engine.precision import networks
from stillroom.engine.stages import Span
from stillroom.engine.stepper import Data, Stepper
from stillroom.errors import UserError
from stillroom.method import Method
from stillroom.surgery.skeleton import NEED_VALUES, Answered

LARGEST_CYCLE = 64
"""Steps after which a rehearsal stops looking for other combinations of turns."""
LIKE = 2
"""Micro-batches of a step that are gone through. Further ones are like the last of these."""
PLACES = (0.5, 0.0, 1 - 2**-24)
"""Where whole-number draws fall in their range: in the middle, at its start, at its end."""


class PlacedDraws(Draws):
    """Draws whose whole numbers all fall at one place of their range, since fake tensors have no values. ``asked``: the
    turn drew such a number."""

    place_in_range, asked = 0.5, False
    mode: Any = nullcontext()

    def normal(self, *shape: int) -> Tensor:
        with self.mode:
            return torch.empty(self._global(shape))[self.rows]

    uniform = normal

    def index(self, high: int) -> int:
        type(self).asked |= high > 1
        return min(int(high * type(self).place_in_range), high - 1)


@dataclass
class TurnCost:
    """What one turn takes on one process, in bytes, and the floating-point operations of one update, forward and
    backward, as torch counts them (two for each multiply-accumulate).

    weights: all networks, whether they are trained or not, buffers too. host: those of them that ``engine.offload``
    keeps in host memory; they count nowhere else. optimizer, averages: of all turns so far.
    activations: the most that tensors other than these and the gradients held at once: what the backward pass needs,
    what is computed on the way, the batch, and what the method keeps. total: the highest sum at one moment; the parts
    need not peak together. exchange: what several processes take for their exchange.
    """

    stages: list[str]
    turn: str
    every: int
    trained: int
    frozen: int
    weights: int
    gradients: int
    optimizer: int
    averages: int
    activations: int
    total: int
    flops: int
    exchange: int = 0
    host: int = 0

    def same(self, other: TurnCost) -> bool:
        return dataclasses.replace(self, stages=[]) == dataclasses.replace(other, stages=[])


@dataclass
class _Seen:
    """The highest figures of a turn, and its operations by the number of steps that took so many."""

    peak: int = 0
    other: int = 0
    flops: Counter = field(default_factory=Counter)
    passed: set[int] = field(default_factory=set)  # units that the backward pass comes by
    first: set[int] = field(default_factory=set)  # those of them whose input asks for no gradient


@dataclass
class _Whole:
    """Bytes that a process under FSDP has whole in a turn's backward pass: of the largest block (two are there: the
    next one is fetched while the last one is used) and of its gradients (as they are, and as they are sent); of what
    lies outside the blocks of a network; of the units that are kept to the end, with their gradients."""

    block: int = 0
    block_gradients: int = 0
    root: int = 0
    root_gradients: int = 0
    kept: int = 0


class Rehearsal(Stepper):
    """Goes once through each stage of a method whose tensors are fake, as the first of ``world`` processes.

    ``mode``: that of the fake tensors. Raises UserError for settings that do not fit, and for what cannot be known so.
    """

    def __init__(self, method: Method, data: Data, config: EngineConfig, world: int, mode: Any) -> None:
        parts = config.accumulate * world
        if config.batch % parts:
            raise UserError(
                f"engine.batch={config.batch} does not split over {world} processes x {config.accumulate} "
                "micro-batches",
                cure=f"choose a multiple of {parts}",
            )
        # the first of N processes sees the first of N times as many micro-batches
        alone = dataclasses.replace(config, accumulate=parts, device="cpu", compile=False, check_freezing=False)
        self.counted, self.mode, self.processes = Counted(), mode, world
        super().__init__(method, data, alone)
        self.host = self.offload.held if self.offload else []
        self.counted.overlook(self.host)
        if config.draws == "per-rank":
            raise UserError("a plan knows engine.draws=global only", cure="leave engine.draws at its default")
        self.rows = self.rows[: min(config.accumulate, LIKE)]
        self.unseen = config.accumulate - len(self.rows)
        self._before = 0  # operations of a turn before its last micro-batch
        self._now = _Seen()
        if world > 1 and config.parallel == "fsdp":
            for unit, _ in owned(method):
                unit.register_forward_hook(self._passes, with_kwargs=True)

    def _passes(self, unit: Any, args: Any, kwargs: Any, made: Any) -> None:
        if _asks(made):
            self._now.passed.add(id(unit))
            if not _asks((args, kwargs)):
                self._now.first.add(id(unit))

    def seed(self, m: Method, step: int, turn: int, micro: int) -> None:
        m.draw = PlacedDraws(self._generator, self.rows[micro], self.config.batch)
        m.draw.mode = self.mode
        self._before = self.counted.flops

    def reference(self, player: Player) -> float:
        return 0.0  # fake weights have no size

    def turn_costs(self) -> list[TurnCost]:
        """Every turn of every stage, in order; stages in which a turn costs the same share an entry."""
        found: list[TurnCost] = []
        for span in self.spans:
            for cost in self._stage_costs(span):
                if twin := next((other for other in found if other.same(cost)), None):
                    twin.stages += cost.stages
                else:
                    found.append(cost)
        return found

    def _stage_costs(self, span: Span) -> list[TurnCost]:
        m, stage = self.method, span.stage
        m.step, m.progress, m.stage = span.start, span.start / self.config.steps, stage
        self._try(functools.partial(self._enter_stage, span))
        players = [p for p in self.players.values() if stage.turns is None or p.turn.name in stage.turns]
        with self.mode, Answered():
            for player in players:
                _begin(player)
        for tensor in self._resident():
            self.counted.see(tensor)
        cycle = min(math.lcm(*(player.period for player in players)), LARGEST_CYCLE)
        due = Counter(
            tuple(player.turn.name for player in players if step % player.period == 0) for step in range(cycle)
        )
        del due[()]
        seen = {player.turn.name: _Seen() for player in players}
        batches = [self.reading.batch(0, span.start, self.config.batch, rows) for rows in self.rows]
        with self._known_calls():
            for names, times in due.items():
                for place in PLACES:
                    PlacedDraws.place_in_range, PlacedDraws.asked = place, False
                    step = ([self.players[name] for name in names], batches, seen, times * (place == PLACES[0]))
                    self._try(functools.partial(self._step, *step))
                    if not PlacedDraws.asked:
                        break
        return [self._cost(player, seen[player.turn.name], span) for player in players]

    @contextmanager
    def _known_calls(self) -> Iterator[None]:
        """Inside, networks are asked by way of :class:`KnownCalls`."""
        asked = [network for network in networks(self.method) if "forward" not in vars(network)]
        for network in asked:
            network.forward = KnownCalls(network, self.counted)
        try:
            yield
        finally:
            for network in asked:
                del network.forward

    def _try(self, act: Callable[[Any], None]) -> None:
        """``act(mode)`` with all tensors fake; where values are needed that are no network's, with those that are made
        on the way as they are. Raises UserError for a method that asks for more."""
        try:
            act(self.mode)
        except NEED_VALUES:
            try:
                act(nullcontext())
            except NEED_VALUES as problem:
                raise UserError(
                    f"{self.method.slug!r} cannot be planned: what it does depends on its networks' values ({problem})",
                    cure="run a few steps and measure them",
                ) from None

    def _enter_stage(self, span: Span, mode: Any) -> None:
        """What a method draws for a stage (preferences) is asked for its shape alone."""
        method: Any = self.method
        sampler = method.sampler
        method.sampler = lambda: sampler().shortest()
        try:
            with mode, self.counted:
                self.enter(span, resumed=False)
        finally:
            del method.sampler

    def _step(
        self, players: list[Player], batches: list[Any], seen: Mapping[str, _Seen], times: int, mode: Any
    ) -> None:
        """One step of these turns. ``times``: how many steps of a cycle are like it."""
        with mode, self.counted:
            shown = [self._faked(batch) for batch in batches]
            shared: list[dict[str, Any]] = [{} for _ in shown]
            batch = _bytes_in(shown[-1])
            for player in players:
                self.focus(player)
                hooks = [p.register_post_accumulate_grad_hook(self.counted.is_gradient) for p in player.trained]
                self.counted.restart()
                self._now = seen[player.turn.name]
                self.take_turn(player, shown, shared)
                for hook in hooks:
                    hook.remove()
                entry, flops = self._now, self.counted.flops
                flops += self.unseen * (flops - self._before)
                # of each other micro-batch there are the rows, and what its turns leave for the step's later ones
                hidden = self.unseen * (batch + _bytes_in(shared[-1]))
                entry.peak = max(entry.peak, self.counted.peak + hidden)
                entry.other = max(entry.other, self.counted.other + hidden)
                entry.flops[flops] += times
                player.norm, player.notes = None, {}
        self.method.shared, self.method.notes = {}, {}

    def _faked(self, batch: Any) -> Any:
        if isinstance(batch, Mapping):
            made = type(batch)() if isinstance(batch, dict) else {}
            made.update({key: self._faked(value) for key, value in batch.items()})
            return made
        if not isinstance(batch, Tensor):
            return batch
        with self.mode:
            return torch.empty(batch.shape, dtype=batch.dtype)

    def _resident(self) -> list[Tensor]:
        return [*self._weights(), *self._moments(), *(v for a in self.averages.values() for v in a.values.values())]

    def _weights(self) -> list[Tensor]:
        """Those on the device."""
        away = {id(p) for p in self.host}
        return [p for p in (*self.method.parameters(), *self.method.buffers()) if id(p) not in away]

    def _moments(self) -> list[Tensor]:
        states = [state for player in self.players.values() for state in player.optimizer.state.values()]
        return [value for state in states for value in state.values() if isinstance(value, Tensor)]

    def _cost(self, player: Player, seen: _Seen, span: Span) -> TurnCost:
        everything = sum(p.numel() for p in self.method.parameters())
        trained = sum(p.numel() for p in player.trained)
        resident = storage_bytes(self._resident())
        runs = max(1, seen.flops.total())
        cost = TurnCost(
            stages=[span.stage.name],
            turn=player.turn.name,
            every=player.period,
            trained=trained,
            frozen=everything - trained,
            weights=storage_bytes(self._weights()),
            gradients=storage_bytes(player.trained),
            optimizer=storage_bytes(self._moments()),
            averages=storage_bytes(v for a in self.averages.values() for v in a.values.values()),
            activations=seen.other - resident,
            total=seen.peak,
            flops=round(sum(flops * times for flops, times in seen.flops.items()) / runs),
            host=storage_bytes(self.host),
        )
        if self.processes > 1 and self.config.parallel == "ddp":  # a bucket is filled while its gradients are there
            cost.exchange = max(sum(p.nbytes for p in bucket) for bucket in bucketed(player.trained))
            cost.total += cost.exchange
        elif self.processes > 1:
            self._shard(cost, player, seen)
        return cost

    def _shard(self, cost: TurnCost, player: Player, seen: _Seen) -> None:
        """The same under FSDP: networks, gradients, moments and averages by shards, and on top what is whole at one
        time (:class:`_Whole`). A unit whose input asks for no gradient (an embedding of times or labels) is kept whole,
        and its gradients too, until the backward pass is over: beside the activations where these are made again for
        each block, after them where they were all saved."""
        apart = cost.total - cost.weights - cost.optimizer - cost.averages
        alive = min(max(0, apart - cost.activations), cost.gradients)  # of the gradients, at the peak
        shards = sum(map(self._shard_bytes, player.trained))
        cost.activations, alive = apart - alive, round(alive * shards / cost.gradients)
        frozen = untrained(self.method) if self.config.offload else ()
        cost.host = sum(self._shard_bytes(p) for _, own in host_units(self.method, frozen) for p in own)
        cost.weights = sum(map(self._shard_bytes, self.method.parameters())) - cost.host
        cost.weights += storage_bytes(self.method.buffers())
        cost.optimizer = sum(map(self._shard_bytes, self._moments()))
        cost.averages = sum(self._shard_bytes(v) for a in self.averages.values() for v in a.values.values())
        whole = self._whole(player, seen)
        cost.gradients, cost.exchange = shards, whole.root + 2 * whole.block + 2 * whole.block_gradients
        if self.config.activation_checkpointing:
            cost.exchange += whole.kept
        last = shards + whole.root + 2 * whole.root_gradients + whole.kept
        cost.total = cost.weights + cost.optimizer + cost.averages
        cost.total += max(cost.activations + alive + cost.exchange, last)

    def _shard_bytes(self, tensor: Tensor) -> int:
        """Of the first process, which has the largest part of the first dimension."""
        if tensor.ndim == 0:
            return tensor.nbytes
        return math.ceil(tensor.shape[0] / self.processes) * (tensor.nbytes // tensor.shape[0])

    def _whole(self, player: Player, seen: _Seen) -> _Whole:
        mine = {id(p) for p in player.trained}
        roots = {id(unit) for unit in (*self.method.children(), *networks(self.method), self.method)}
        found = _Whole()
        for unit, own in owned(self.method):
            size, gradients = sum(p.nbytes for p in own), sum(p.nbytes for p in own if id(p) in mine)
            if id(unit) not in seen.passed and not gradients:
                continue  # the backward pass does not come by
            if id(unit) in roots:
                found.root, found.root_gradients = max(found.root, size), max(found.root_gradients, gradients)
            else:
                found.block, found.block_gradients = max(found.block, size), max(found.block_gradients, gradients)
                found.kept += (size + gradients) * (id(unit) in seen.first)
        return found


def _bytes_in(tree: Any) -> int:
    return storage_bytes(tensors_in(tree))


def _asks(tree: Any) -> bool:
    """Whether a tensor asks for a gradient."""
    return any(tensor.requires_grad for tensor in tensors_in(tree))


def _begin(player: Player) -> None:
    """Let a turn's optimizer make its state, as its first step would."""
    if player.optim.name == "adamw8bit":  # bitsandbytes has no kernels for tensors without values
        player.optimizer.state.update(first_states(player.trained))
    elif any(p not in player.optimizer.state for p in player.trained):
        for p in player.trained:
            p.grad = torch.zeros_like(p)
        player.optimizer.step()
        player.optimizer.zero_grad(set_to_none=True)
