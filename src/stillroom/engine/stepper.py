"""The steps of a method: made of turns, one optimizer per turn, randomness a pure function of (seed, step, turn)."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from stillroom.checks import Waiting, waiting
from stillroom.draws import Draws, mix
from stillroom.engine import precision, state
from stillroom.engine.ahead import Ahead, pinned
from stillroom.engine.config import EMARule, EngineConfig
from stillroom.engine.distributed import DataParallel, Sharded, World, finished, local, shard, statistics
from stillroom.engine.ema import EMA, Follower
from stillroom.engine.export import Outline
from stillroom.engine.offload import place
from stillroom.engine.player import Player, resolve_optim
from stillroom.engine.stages import Beside, Span, StageData, lay_out
from stillroom.errors import UserError, nearest
from stillroom.method import Batch, Method, Parted, Terms


class Data(Protocol):
    """Where batches come from: a pure function of (seed, step), of which a process asks for its own ``rows``. Data with
    ``parts`` (name -> data of the same kind) serves stages that read one of them."""

    def batch(self, seed: int, step: int, size: int, rows: slice) -> Batch: ...


class Stepper:
    """Takes the steps of a built method on ``data``, one by one, and writes nothing.

    ``stage_data``: where what the method makes for its stages is kept, so that a resumed run reads it again.

    Raises ``UserError`` on settings that do not fit the method.
    """

    def __init__(
        self, method: Method, data: Data, config: EngineConfig, *, stage_data: StageData | None = None
    ) -> None:
        self.method, self.data, self.config, self.stage_data = method, data, config, stage_data
        self.world = World.join(config.device)
        self.step = 0  # steps done
        self.reading: Any = data  # what the stage reads
        self.checks: Waiting = []  # of the last step's values, not looked at yet
        self._parted = False  # some term of a step has waited for a backward pass of its own
        self._focused: Player | None = None
        self._entered: Span | None = None  # the stage that the method has been told of
        self._made: list[int] = []  # the numbers of the stages whose data the method has made a part of
        on_cuda = self.world.device.type == "cuda"
        self.ahead = Ahead(lambda *at: pinned(self.made(*at))) if on_cuda and config.prefetch else None
        if on_cuda:
            precision.fast_products(config.tf32)
        self._split_batch()
        self._check_names()
        self._prepare_method()
        self._make_players()
        self._make_averages()

    # --- construction ---------------------------------------------------------------------------------------------
    def _split_batch(self) -> None:
        c, w = self.config, self.world
        parts = w.size * c.accumulate
        if c.batch % parts:
            raise UserError(
                f"engine.batch={c.batch} does not split over {w.size} processes x {c.accumulate} micro-batches",
                cure=f"choose a multiple of {parts}",
            )
        size, first = c.batch // parts, w.rank * c.accumulate
        self.rows = [slice((first + k) * size, (first + k + 1) * size) for k in range(c.accumulate)]

    def _check_names(self) -> None:
        networks = [name for name, _ in self.method.named_children()]
        for ema in self.config.ema:
            if (of := ema.get("of", "student")) not in networks:
                raise UserError(
                    f"an EMA averages {of!r}{nearest(of, networks)}, which {self.method.slug!r} does not own",
                    cure="its networks: " + ", ".join(networks),
                )
        known = [*(ema.get("name", "ema") for ema in self.config.ema), *networks]
        if (export := self.config.export) not in known:
            raise UserError(
                f"engine.export names {export!r}{nearest(export, known)}", cure="choose one of: " + ", ".join(known)
            )

    def _prepare_method(self) -> None:
        m, c = self.method, self.config
        self.sharded = self.world.size > 1 and c.parallel == "fsdp"
        if c.frozen == "bf16":
            precision.halve_frozen(m, self.world.device)
        if c.channels_last:
            precision.filters_last(m)
        self.offload = place(m, self.world.device, c.offload)
        # integers that the host goes by are drawn on the host: it would have to wait for a device
        self._generator, self._shared = torch.Generator(device=self.world.device), torch.Generator()
        self.seed(m, -1, -1, 0)
        m.eval()
        m.prepare(self.data)
        m.requires_grad_(False)
        self.offload = self.offload and self.offload.again(m)  # there may be other networks now
        self.world.spread([*m.parameters(), *m.buffers()])
        self._outline = Outline(m, self.exported()) if self.sharded else None
        if c.activation_checkpointing:
            precision.checkpoint_activations(m)
        if c.precision == "bf16":
            precision.return_float32(m)
        if c.compile:
            precision.compile_networks(m)
        if self.sharded:
            shard(m, self.world, self.offload.handed_over(m) if self.offload else ())

    def _make_players(self) -> None:
        m, c = self.method, self.config
        turns = {turn.name: turn for turn in m.turns()}
        c.check_turns(list(m.declared_turns()))
        if c.steps and not turns:
            raise UserError(f"{m.slug!r} has no turns: its steps would do nothing", cure="set engine.steps to 0")
        self.spans = lay_out(m.stages(), c.steps, self.data, m.slug)
        names = {id(p): name for name, p in m.named_parameters()}
        self._known = set(names)
        self.players = {
            turn.name: Player(m, turn, index, resolve_optim(turn, c.optim), names)
            for index, turn in enumerate(turns.values())
        }
        self._state = state.changeable(m, self.players)
        for player in self.players.values():
            player.reference = self.reference(player)
            player.modes = self._modes_of(player)
            player.statistics = [buffer for role in player.roles for buffer in statistics(m.role(role))]
        self._everything: dict[str, Tensor] = dict(m.named_parameters()) | dict(m.named_buffers())
        for player in self.players.values():
            self.focus(player)
            if self.sharded:
                player.runner = Sharded(m, player.turn)
            elif self.world.size > 1:
                player.runner = DataParallel(m, player.turn, player.trained, self.world.size)

    def reference(self, player: Player) -> float:
        return player.weight_rms()

    def _modes_of(self, player: Player) -> dict[nn.Module, bool]:
        """The modes that the modules themselves choose when the turn's roles are told to train."""
        self.method.eval()
        for name in player.roles:
            self.method.role(name).train()
        for module in self.method.modules():
            if getattr(module, "is_frozen", False):
                module.training = False
        return {module: module.training for module in self.method.modules()}

    def _make_averages(self) -> None:
        self.averages: dict[str, EMA] = {}
        names = {id(p): name for name, p in self.method.named_parameters()}
        for settings in self.config.ema:
            rule = EMARule(**settings)
            parameters = {names[id(p)]: p for p in self.method.trained_parameters(rule.of).values()}
            self.averages[rule.name] = EMA(rule, parameters)
        self.followers = {
            name: Follower(
                target,
                self.method.trained_parameters(name).values(),
                self.method.trained_parameters(target.of).values(),
            )
            for name, target in self.method.followers().items()
        }

    # --- a step ---------------------------------------------------------------------------------------------------
    def fit_method(self) -> None:
        """What the method does without steps (:meth:`~stillroom.method.Method.fit`), before the first one."""
        m = self.method
        if type(m).fit is Method.fit:
            return
        self._focused = None
        self.seed(m, -2, -1, 0)
        m.eval()
        m.requires_grad_(False)
        m.fit(self.data)
        self.world.spread([*m.parameters(), *m.buffers()])
        self._check_parameters()

    def take_step(self) -> dict[str, Tensor]:
        """The turns of the next step; the terms of their losses by ``turn/term``, of this process."""
        c, m, step = self.config, self.method, self.step
        span = self.span_at(step)
        m.step, m.progress, m.stage = step, step / c.steps, span.stage
        if span is not self._entered:
            self.enter(span, resumed=step > span.start)
        made = self.ahead.take(self.reading, step, step + 1 < span.end) if self.ahead else self.made(self.reading, step)
        batches = [self.to_device(batch) for batch in made]
        shared: list[dict[str, Any]] = [{} for _ in batches]
        losses: dict[str, Tensor] = {}
        with waiting() as self.checks:
            for player in self.players.values():
                chosen = span.stage.turns is None or player.turn.name in span.stage.turns
                chosen = chosen and step < round(player.optim.until * c.steps)
                if chosen and (step - span.start) % player.period == 0:
                    losses |= self.take_turn(player, batches, shared)
        m.shared = {}
        if c.backward_per_term and not self._parted:
            raise UserError(
                f"engine.backward_per_term parts nothing here: no term of {m.slug!r} has passes of its own",
                cure="set it to false, and engine.accumulate higher where memory is short",
            )
        self.step = step + 1
        return losses

    def made(self, reading: Any, step: int) -> list[Batch]:
        """The micro-batches of a step, on the host."""
        return [reading.batch(self.config.seed, step, self.config.batch, rows) for rows in self.rows]

    def span_at(self, step: int) -> Span:
        return next(span for span in self.spans if step < span.end)

    def enter(self, span: Span, resumed: bool) -> None:
        """Let the method prepare a stage. Its draws follow from the stage alone, so a resumed run makes the same."""
        self._entered = span
        self._focused = None  # the method may put its networks into other modes
        self.seed(self.method, -1, -2 - self.spans.index(span), 0)
        self.method.eval()
        self.method.requires_grad_(False)
        if span.stage.fresh_optimizer and not resumed:
            for player in self.players.values():
                player.optimizer.state.clear()
        made = self.method.enter(span.stage, span.data, resumed)
        if not resumed and not self.sharded:  # what it drew may depend on the process, new weights must not
            self.world.spread([*self.method.parameters(), *self.method.buffers()])
        self._check_parameters()
        self.reading = self._stage_data(span, made, resumed)

    def _stage_data(self, span: Span, made: Mapping[str, Tensor] | None, resumed: bool) -> Any:
        """The data that the stage reads, with what the method has made for it."""
        number = self.spans.index(span)
        if resumed:
            made = self.stage_data.read(number) if self.stage_data and number in self._made else None
        elif made is not None:
            self.world.spread(made.values())
            made = {name: column.detach().cpu() for name, column in made.items()}
            self._made.append(number)
            if self.stage_data and self.world.first:
                self.stage_data.keep(number, made)
        return span.data if made is None else Beside(span.data, made)

    def _check_parameters(self) -> None:
        """Raises UserError for parameters that the optimizers do not know of."""
        for name, p in self.method.named_parameters():
            if id(p) not in self._known:
                raise UserError(
                    f"{self.method.slug!r} has made {name!r} after its optimizers, which know nothing of it",
                    cure="make them in build() or prepare()",
                )

    def take_turn(self, player: Player, batches: list[Batch], shared: list[dict[str, Any]]) -> dict[str, Tensor]:
        c, m, step = self.config, self.method, self.step
        self.focus(player)
        before = self._snapshot(player) if c.check_freezing else None
        count = len(batches)
        losses: dict[str, Tensor] = {}
        notes: dict[str, Tensor] = {}
        times: dict[str, int] = {}  # micro-batches that noted it
        weights = self._shares(player, batches, shared)
        for k, batch in enumerate(batches):
            m.shared, m.notes, m.weights = shared[k], {}, weights[k]
            self.seed(m, step, player.index, k)
            last = k == count - 1
            player.runner.begin(last)
            with self._autocast():
                terms = player.runner.call(batch)
                if not c.backward_per_term:  # within one context, which rounds each weight once
                    terms = finished(terms)
            parts = self._parts(terms)
            for part in parts:
                with self._autocast():
                    made = finished(part)
                values = [value.float() for value in made.values()]
                total = values[0] if len(values) == 1 else torch.stack(values).sum()
                with player.runner.averaging() if last and part is parts[-1] else nullcontext():
                    (total if count == 1 else total / count).backward()
                for name, value in zip(made, values, strict=True):
                    key = f"{player.turn.name}/{name}"
                    losses[key] = losses[key] + value.detach() / count if key in losses else value.detach() / count
            for name, value in m.notes.items():
                notes[name] = notes.get(name, 0.0) + value / count
                times[name] = times.get(name, 0) + 1
        player.notes = {
            name: value if times[name] == count else value * (count / times[name]) for name, value in notes.items()
        }
        player.update(self.learning_rate_factor(step), want_norm=self._next_row(step) <= step + player.period)
        self.world.spread(player.statistics)
        for average in self.averages.values():
            if any(m.role(name) is m.role(average.rule.of) for name in player.roles):
                average.update(c.batch)
        if before is not None:
            self._compare(player, before)
        for follower in self.followers.values():
            if any(m.role(name) is m.role(follower.target.of) for name in player.roles):
                follower.update()
        return losses

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.world.device.type, torch.bfloat16, enabled=self.config.precision == "bf16")

    def _parts(self, terms: Terms) -> list[Terms]:
        """What is minimised by one backward pass each: all terms together or, under ``config.backward_per_term``, what
        is there, and after it each of those that wait."""
        if not self.config.backward_per_term:
            return [terms]
        there: dict[str, Tensor] = {}
        waiting: list[Terms] = []
        for name, term in terms.items():
            if isinstance(term, Parted):
                there[name] = term.now
                waiting.append({name: term.later})
            elif callable(term):
                waiting.append({name: term})
            else:
                there[name] = term
        self._parted = self._parted or bool(waiting)
        return [there, *waiting] if there else waiting

    def _shares(
        self, player: Player, batches: list[Batch], shared: list[dict[str, Any]]
    ) -> Sequence[Mapping[str, Tensor]]:
        """For each micro-batch what its means are to be multiplied by so that the mean of these over micro-batches and
        processes is the mean over all that is counted. To be known before the first backward pass."""
        m, parts = self.method, len(batches) * self.world.size
        if parts == 1 or type(m).counts is Method.counts:
            return [{} for _ in batches]
        counted = []
        for k, batch in enumerate(batches):
            m.shared = shared[k]
            self.seed(m, self.step, player.index, k)
            counted.append(m.counts(batch))
        if not (names := list(counted[0])):
            return [{} for _ in batches]
        own = torch.stack([torch.stack([c[name].double() for name in names]) for c in counted])
        mean = self.world.mean(own.mean(0))
        return [dict(zip(names, row / mean.clamp(min=1 / parts), strict=True)) for row in own]

    def learning_rate_factor(self, step: int) -> float:
        return self.span_at(step).learning_rate_factor(step, self.config)

    def _next_row(self, step: int) -> int:
        """Steps done when the next row of metrics is written, seen from inside ``step``."""
        if step == 0:
            return 1
        return min((step // self.config.log_every + 1) * self.config.log_every, self.config.steps)

    def seed(self, m: Method, step: int, turn: int, micro: int) -> None:
        """Every random number of a turn follows from (seed, step, turn), whatever ran before."""
        c, w = self.config, self.world
        rows = self.rows[micro]
        if c.draws == "global":
            self._generator.manual_seed(mix(c.seed, step, turn))
            m.draw = Draws(self._generator, rows, c.batch, self._choices(step, turn))
        else:
            self._generator.manual_seed(mix(c.seed, step, turn, w.rank, micro))
            size = rows.stop - rows.start
            m.draw = Draws(self._generator, slice(0, size), size, self._choices(step, turn))
        # Dropout inside networks draws from torch's own generators. Not torch.manual_seed, which notes the whole call
        # stack for devices that are not there.
        own = mix("torch", c.seed, step, turn, w.rank, micro)
        torch.default_generator.manual_seed(own)
        if w.device.type == "cuda":
            torch.cuda.manual_seed(own)

    def _choices(self, step: int, turn: int) -> torch.Generator | None:
        """What draws the integers that all processes share; None: the turn's own generator."""
        if self.config.draws == "global" and self.world.device.type == "cpu":
            return None
        self._shared.manual_seed(mix("shared", self.config.seed, step, turn))
        return self._shared

    def to_device(self, batch: Any) -> Any:
        if isinstance(batch, Mapping):
            found = copy.copy(batch) if isinstance(batch, dict) else {}  # one without pictures says so
            found.update((key, self.to_device(value)) for key, value in batch.items())
            return found
        return batch.to(self.world.device, non_blocking=True) if isinstance(batch, Tensor) else batch

    def focus(self, player: Player) -> None:
        """Freeze everything but what the turn trains; a change of turn touches only what differs."""
        if player is self._focused:
            return
        mine = {id(p) for p in player.trained}
        previous = self._focused.trained if self._focused else []
        for p in previous:
            if id(p) not in mine:
                p.requires_grad_(False)
        for p in player.trained:
            p.requires_grad_(True)
        for module, mode in player.modes.items():
            if module.training is not mode:
                object.__setattr__(module, "training", mode)  # a module's own way is slow, and these are hundreds
        self._focused = player

    # --- what a turn may not touch --------------------------------------------------------------------------------
    def _snapshot(self, player: Player) -> dict[str, Tensor]:
        mine = {id(p) for p in player.trained}
        mine |= {id(buffer) for role in player.roles for buffer in self.method.role(role).buffers()}
        # a method's own buffers are its running statistics, not a network
        mine |= {id(buffer) for buffer in self.method.buffers(recurse=False)}
        return {name: local(t.detach()).clone() for name, t in self._everything.items() if id(t) not in mine}

    def _compare(self, player: Player, before: Mapping[str, Tensor]) -> None:
        for name, old in before.items():
            new = local(self._everything[name].detach())
            if not torch.equal(old, new) and not torch.equal(old.nan_to_num(), new.nan_to_num()):
                raise RuntimeError(
                    f"turn {player.turn.name!r} changed {name!r}, which it does not train (step {self.step})"
                )

    # --- what a checkpoint holds ----------------------------------------------------------------------------------
    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """``{file stem: {name: tensor}}`` of all that the steps have changed."""
        return state.files(self._state, self.players, self.averages)

    def facts(self) -> dict[str, Any]:
        """What else the next step depends on, as JSON can hold it."""
        return {
            "averages": {name: average.updates for name, average in self.averages.items()},
            "followers": {name: follower.updates for name, follower in self.followers.items()},
            "references": {name: player.reference for name, player in self.players.items()},
            "made": self._made,
        }

    def targets(self, stored: Mapping[str, tuple[str, list[int]]]) -> dict[str, Tensor]:
        """Where the ``stored`` tensors (name -> type and shape) of a checkpoint go, optimizers' states too."""
        found = {name: tensor for group in self.tensors().values() for name, tensor in group.items()}
        for name, (dtype, shape) in stored.items():
            if name.startswith("optimizer/"):
                found[name] = state.optimizer_slot(self.players, name, getattr(torch, dtype), shape)
        return found

    def go_on(self, step: int, facts: Mapping[str, Any]) -> None:
        """Continue after ``step``, from the tensors that have been read and the :meth:`facts` of then."""
        self.step, self._made = step, list(facts.get("made", ()))
        for name, average in self.averages.items():
            average.updates = facts["averages"][name]
        for name, follower in self.followers.items():
            follower.after(facts["followers"][name])
        for name, player in self.players.items():
            player.reference = facts["references"][name]

    # --- the result -----------------------------------------------------------------------------------------------
    def export_role(self, share: bool = False) -> nn.Module:
        """A copy of the role that ``config.export`` names, in eval mode; for an EMA, its role with averaged weights.
        share: its weights are the role's own tensors, which takes no memory; for when no step follows, or to look at.

        Collective for a sharded method: every process calls it and gets the whole network.
        """
        average = self.averages.get(self.config.export)
        values = dict(self.method.named_parameters()) | (average.values if average else {})
        role = self.exported()
        outline = self._outline or Outline(self.method, role)
        return outline.filled(values, role, share).to(self.world.device)

    def exported(self) -> nn.Module:
        """The role that becomes the student."""
        of = {ema.get("name", "ema"): ema.get("of", "student") for ema in self.config.ema}
        return self.method.role(of.get(self.config.export, self.config.export))
