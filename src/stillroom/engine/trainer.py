"""The training loop: steps made of turns, one optimizer per turn, randomness a pure function of (seed, step, turn)."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from stillroom.draws import Draws, mix
from stillroom.engine import precision, state
from stillroom.engine.checkpoint import Checkpoints
from stillroom.engine.config import EngineConfig
from stillroom.engine.distributed import DataParallel, Sharded, World, local, shard, statistics
from stillroom.engine.ema import EMA, EMARule
from stillroom.engine.export import Outline
from stillroom.engine.interrupt import Interrupted, StopRequest
from stillroom.engine.offload import place
from stillroom.engine.player import Player, resolve_optim
from stillroom.engine.progress import Progress
from stillroom.engine.stages import Beside, Span, StageData, lay_out
from stillroom.engine.track import TRACKERS, Tracker
from stillroom.errors import TrainingDiverged, UserError
from stillroom.files import held, write, writing
from stillroom.method import Batch, Method, Stage, nearest


class Data(Protocol):
    """Where batches come from: a pure function of (seed, step), of which a process asks for its own ``rows``. Data with
    ``parts`` (name -> data of the same kind) serves stages that read one of them."""

    def batch(self, seed: int, step: int, size: int, rows: slice) -> Batch: ...


class Trainer:
    """Trains a built method on ``data``.

    ``run_dir`` receives ``metrics.jsonl`` and ``checkpoints/``; without one nothing is written. ``resume`` continues
    from the newest good checkpoint, to the very weights that an uninterrupted run would have reached. ``callbacks`` are
    called as ``callback(trainer, steps_done)`` after every step, on every process. ``track``: trackers by name, fed by
    the first process with the rows of ``metrics.jsonl``.

    Raises ``UserError`` on settings that do not fit the method, a run folder in use or already holding a run, and a
    full disk; ``TrainingDiverged``; ``Interrupted``.
    """

    def __init__(
        self,
        method: Method,
        data: Data,
        config: EngineConfig,
        run_dir: Path | str | None = None,
        resume: bool = False,
        *,
        callbacks: Sequence[Callable[[Trainer, int], None]] = (),
        recipe_hash: str = "",
        show: bool = True,
        track: Sequence[str] = (),
    ) -> None:
        self.method, self.data, self.config, self.resume = method, data, config, resume
        self.run_dir = Path(run_dir) if run_dir is not None else None
        self.callbacks = list(callbacks)
        self.recipe_hash, self.show, self.track = recipe_hash, show, list(track)
        self.trackers: list[Tracker] = []
        self.world = World.join(config.device)
        self.step = 0  # steps done
        self.seconds = 0.0  # training time, earlier parts of a resumed run included
        self.history: list[dict[str, Any]] = []  # the rows of metrics.jsonl
        self._sums: dict[str, list[float]] = {}  # loss terms since the last row: [sum, count]
        self._gauges: dict[str, float] = {}  # newest gradient norms and health numbers of a resumed run
        self._saved: int | None = None
        self._stop = StopRequest()
        self._focused: Player | None = None
        self._entered: Span | None = None  # the stage that the method has been told of
        self._reading: Any = data  # what it reads
        self._made: list[int] = []  # the numbers of the stages whose data the method has made a part of
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
        self._rows = [slice((first + k) * size, (first + k + 1) * size) for k in range(c.accumulate)]

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
        self._sharded = self.world.size > 1 and c.parallel == "fsdp"
        self.offload = place(m, self.world.device, c.offload)
        self._generator = torch.Generator(device=self.world.device)
        self._seed(m, -1, -1, 0)
        m.eval()
        m.prepare(self.data)
        m.requires_grad_(False)
        self.offload = self.offload and self.offload.again(m)  # there may be other networks now
        self.world.spread([*m.parameters(), *m.buffers()])
        self._outline = Outline(m, self._exported_role()) if self._sharded else None
        if c.activation_checkpointing:
            precision.checkpoint_activations(m)
        if c.precision == "bf16":
            precision.return_float32(m)
        if c.compile:
            for _, role in m.named_children():
                if isinstance(network := getattr(role, "network", None), nn.Module):
                    network.compile()
        if self._sharded:
            shard(m, self.world, self.offload.handed_over(m) if self.offload else ())

    def _make_players(self) -> None:
        m, c = self.method, self.config
        turns = {turn.name: turn for turn in m.turns()}
        for key in c.optim:
            if key != "all" and key not in turns:
                raise UserError(
                    f"engine.optim names the turn {key!r}{nearest(key, turns)}, which {m.slug!r} does not have",
                    cure="its turns: " + ", ".join(turns),
                )
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
            player.reference = self._reference(player)
            player.modes = self._modes_of(player)
            player.statistics = [buffer for role in player.roles for buffer in statistics(m.role(role))]
        self._everything: dict[str, Tensor] = dict(m.named_parameters()) | dict(m.named_buffers())
        for player in self.players.values():
            self._focus(player)
            if self._sharded:
                player.runner = Sharded(m, player.turn)
            elif self.world.size > 1:
                player.runner = DataParallel(m, player.turn, player.trained)

    def _reference(self, player: Player) -> float:
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

    # --- the loop -------------------------------------------------------------------------------------------------
    def fit(self) -> None:
        """Train to the last step. Call once."""
        with ExitStack() as stack:
            if self.run_dir is not None:
                self._open_run(stack)
            self._began = time.monotonic() - self.seconds
            self.progress = Progress(self.config.steps, self.step, self.method.slug, self.show and self.world.first)
            stack.callback(self.progress.close)
            stack.enter_context(self._stop.listening())
            if self._saved is None:
                self._fit_method()
            while self.step < self.config.steps:
                self._one_step()
            self._save()

    def _fit_method(self) -> None:
        m = self.method
        if type(m).fit is Method.fit:
            return
        self._focused = None
        self._seed(m, -2, -1, 0)
        m.eval()
        m.requires_grad_(False)
        m.fit(self.data)
        self.world.spread([*m.parameters(), *m.buffers()])
        self._check_parameters()

    def _one_step(self) -> None:
        c, m, step = self.config, self.method, self.step
        span = self._span_at(step)
        stage, start = span.stage, span.start
        m.step, m.progress, m.stage = step, step / c.steps, stage
        if span is not self._entered:
            self._enter(span, resumed=step > start)
        batches = [self._to_device(self._reading.batch(c.seed, step, c.batch, rows)) for rows in self._rows]
        shared: list[dict[str, Any]] = [{} for _ in batches]
        losses: dict[str, Tensor] = {}
        for player in self.players.values():
            if (stage.turns is None or player.turn.name in stage.turns) and (step - start) % player.period == 0:
                losses |= self._take_turn(player, batches, shared)
        m.shared = {}
        self.step = step + 1
        stop = self._check(losses, step)
        logging = self.step % c.log_every == 0 or self.step in (1, c.steps)
        if logging:
            self._log(stage)
        self.progress.update(self.step, self._shown() if logging else None)
        if self.step % c.checkpoint_every == 0 or self.step == c.steps:
            self._save()
        for callback in self.callbacks:
            callback(self, self.step)
        if stop and self.step < c.steps:
            self._save()
            raise Interrupted(
                f"stopped after step {self.step}" + (", which is saved" if self.run_dir is not None else "")
            )

    def _span_at(self, step: int) -> Span:
        return next(span for span in self.spans if step < span.end)

    def _enter(self, span: Span, resumed: bool) -> None:
        """Let the method prepare a stage. Its draws follow from the stage alone, so a resumed run makes the same."""
        self._entered = span
        self._focused = None  # the method may put its networks into other modes
        self._seed(self.method, -1, -2 - self.spans.index(span), 0)
        self.method.eval()
        self.method.requires_grad_(False)
        if span.stage.fresh_optimizer and not resumed:
            for player in self.players.values():
                player.optimizer.state.clear()
        made = self.method.enter(span.stage, span.data, resumed)
        if not resumed and not self._sharded:  # what it drew may depend on the process, new weights must not
            self.world.spread([*self.method.parameters(), *self.method.buffers()])
        self._check_parameters()
        self._reading = self._stage_data(span, made, resumed)

    def _stage_data(self, span: Span, made: Mapping[str, Tensor] | None, resumed: bool) -> Any:
        """The data that the stage reads, with what the method has made for it."""
        number = self.spans.index(span)
        if resumed:
            made = self._kept().read(number) if number in self._made else None
        elif made is not None:
            self.world.spread(made.values())
            made = {name: column.detach().cpu() for name, column in made.items()}
            self._made.append(number)
            if self.run_dir is not None and self.world.first:
                self._kept().keep(number, made)
        return span.data if made is None else Beside(span.data, made)

    def _kept(self) -> StageData:
        assert self.run_dir is not None
        return StageData(self.run_dir / "stages")

    def _check_parameters(self) -> None:
        """Raises UserError for parameters that the optimizers do not know of."""
        for name, p in self.method.named_parameters():
            if id(p) not in self._known:
                raise UserError(
                    f"{self.method.slug!r} has made {name!r} after its optimizers, which know nothing of it",
                    cure="make them in build() or prepare()",
                )

    def _take_turn(self, player: Player, batches: list[Batch], shared: list[dict[str, Any]]) -> dict[str, Tensor]:
        c, m, step = self.config, self.method, self.step
        self._focus(player)
        before = self._snapshot(player) if c.check_freezing else None
        count = len(batches)
        losses: dict[str, Tensor] = {}
        notes: dict[str, Tensor] = {}
        weights = self._shares(player, batches, shared)
        for k, batch in enumerate(batches):
            m.shared, m.notes, m.weights = shared[k], {}, weights[k]
            self._seed(m, step, player.index, k)
            with player.runner.gradients(last=k == count - 1):
                with torch.autocast(self.world.device.type, torch.bfloat16, enabled=c.precision == "bf16"):
                    terms = player.runner.call(batch)
                values = [value.float() for value in terms.values()]
                total = values[0] if len(values) == 1 else torch.stack(values).sum()
                (total if count == 1 else total / count).backward()
            for name, value in zip(terms, values, strict=True):
                key = f"{player.turn.name}/{name}"
                losses[key] = losses[key] + value.detach() / count if k else value.detach() / count
            for name, value in m.notes.items():
                notes[name] = notes.get(name, 0.0) + value / count
        player.notes = notes
        player.update(self._learning_rate_factor(step), want_norm=self._next_row(step) <= step + player.period)
        self.world.spread(player.statistics)
        for average in self.averages.values():
            if any(m.role(name) is m.role(average.rule.of) for name in player.roles):
                average.update(c.batch)
        if before is not None:
            self._compare(player, before)
        return losses

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
            self._seed(m, self.step, player.index, k)
            counted.append(m.counts(batch))
        names = list(counted[0])
        own = torch.stack([torch.stack([c[name].double() for name in names]) for c in counted])
        mean = self.world.mean(own.mean(0))
        return [dict(zip(names, row / mean.clamp(min=1 / parts), strict=True)) for row in own]

    def _learning_rate_factor(self, step: int) -> float:
        return self._span_at(step).learning_rate_factor(step, self.config)

    def _next_row(self, step: int) -> int:
        """Steps done when the next row of metrics is written, seen from inside ``step``."""
        if step == 0:
            return 1
        return min((step // self.config.log_every + 1) * self.config.log_every, self.config.steps)

    def _seed(self, m: Method, step: int, turn: int, micro: int) -> None:
        """Every random number of a turn follows from (seed, step, turn), whatever ran before."""
        c, w = self.config, self.world
        rows = self._rows[micro]
        if c.draws == "global":
            self._generator.manual_seed(mix(c.seed, step, turn))
            m.draw = Draws(self._generator, rows, c.batch)
        else:
            self._generator.manual_seed(mix(c.seed, step, turn, w.rank, micro))
            size = rows.stop - rows.start
            m.draw = Draws(self._generator, slice(0, size), size)
        # dropout inside networks draws from torch's own generator
        torch.manual_seed(mix("torch", c.seed, step, turn, w.rank, micro))

    def _to_device(self, batch: Any) -> Any:
        if isinstance(batch, Mapping):
            return {key: self._to_device(value) for key, value in batch.items()}
        return batch.to(self.world.device, non_blocking=True) if isinstance(batch, Tensor) else batch

    def _focus(self, player: Player) -> None:
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
                module.training = mode
        self._focused = player

    # --- watching -------------------------------------------------------------------------------------------------
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

    def _check(self, losses: Mapping[str, Tensor], step: int) -> bool:
        """Stop on NaN, inf and divergence; True if some process was asked to stop. One transfer for all terms of the
        step, so that all processes decide alike."""
        asked = torch.tensor(float(self._stop.asked), device=self.world.device)
        *values, stop = self.world.mean(torch.stack([*losses.values(), asked])).tolist()
        for name, value in zip(losses, values, strict=True):
            if not abs(value) <= self.config.loss_limit:
                turn, term = name.split("/", 1)
                what = "is " + ("NaN" if math.isnan(value) else f"{value:.3g}")
                if math.isfinite(value):
                    what += f", beyond engine.loss_limit={self.config.loss_limit:.3g}"
                self._diverged(f"turn {turn!r}, term {term!r} {what}", step)
            entry = self._sums.setdefault(name, [0.0, 0])
            entry[0] += value
            entry[1] += 1
        return stop > 0

    def _check_weights(self) -> None:
        for name, player in self.players.items():
            rms = player.weight_rms()
            limit = self.config.growth_limit * max(1.0, player.reference)
            if not math.isfinite(rms):
                self._diverged(f"turn {name!r} has made its weights NaN or infinite", self.step - 1)
            if rms > limit:
                self._diverged(
                    f"the weights of turn {name!r} have grown to RMS {rms:.3g} (limit {limit:.3g})", self.step - 1
                )

    def _diverged(self, what: str, step: int) -> None:
        kept = f"; the checkpoint of step {self._saved} is intact" if self._saved is not None else ""
        raise TrainingDiverged(
            f"training diverged at step {step}: {what}{kept}",
            cure="lower the learning rate, clip the gradients (engine.optim.all.clip_norm=1), or warm up longer",
        )

    def _log(self, stage: Stage) -> None:
        self._check_weights()
        self.seconds = time.monotonic() - self._began
        row: dict[str, Any] = {"step": self.step, "images": self.step * self.config.batch}
        row |= {"seconds": round(self.seconds, 3), "stage": stage.name}
        row |= {f"loss/{name}": total / count for name, (total, count) in self._sums.items()}
        factor = self._learning_rate_factor(self.step - 1)
        row |= {f"lr/{name}": player.optim.lr * factor for name, player in self.players.items()}
        row |= self._read_gauges()
        self._sums = {}
        self.history.append(row)
        if self.run_dir is not None and self.world.first:
            path = self.run_dir / "metrics.jsonl"
            with writing(path), path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        for tracker in self.trackers:
            tracker.write(row)

    def _read_gauges(self) -> dict[str, float]:
        """The newest gradient norm of every turn and the newest health numbers, averaged over the processes."""
        new: dict[str, Tensor] = {}
        for name, player in self.players.items():
            if player.norm is not None:
                new[f"grad_norm/{name}"] = player.norm
            new |= {f"health/{key}": value.float().mean() for key, value in player.notes.items()}
        if new:
            self._gauges |= zip(new, self.world.mean(torch.stack(list(new.values()))).tolist(), strict=True)
        return self._gauges

    def _shown(self) -> dict[str, float]:
        return {key[5:]: value for key, value in self.history[-1].items() if key.startswith("loss/")}

    # --- the run folder -------------------------------------------------------------------------------------------
    def _open_run(self, stack: ExitStack) -> None:
        assert self.run_dir is not None
        if self.world.first:
            stack.enter_context(held(self.run_dir))
        self.checkpoints = Checkpoints(self.run_dir / "checkpoints", self.config.keep, self.world)
        if self.resume:
            if (manifest := self.checkpoints.newest()) is not None:
                self._restore(manifest)
        elif self.world.share(bool(self.checkpoints.steps())):
            raise UserError(
                f"the run folder {self.run_dir} already holds a run", cure="--resume it, or choose another folder"
            )
        self._rewind_metrics()
        for name in self.track if self.world.first else ():
            self.trackers.append(TRACKERS[name](self.run_dir, self.history))
            stack.callback(self.trackers[-1].close)

    def _rewind_metrics(self) -> None:
        """Drop rows later than the checkpoint, which the resumed run will write anew."""
        assert self.run_dir is not None
        path = self.run_dir / "metrics.jsonl"
        if not self.world.first or not path.exists():
            return
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue  # a line that the crash cut short
            if row["step"] <= self.step:
                self.history.append(row)
        write(path, "".join(json.dumps(row) + "\n" for row in self.history))

    def _files(self) -> dict[str, dict[str, Tensor]]:
        return state.files(self._state, self.players, self.averages)

    def _save(self) -> None:
        if self.run_dir is None or self._saved == self.step:
            return
        self._check_weights()
        metrics = self.run_dir / "metrics.jsonl"
        if self.world.first and metrics.exists():
            with metrics.open("a") as file:
                os.fsync(file.fileno())
        info = {
            "method": self.method.slug,
            "recipe_hash": self.recipe_hash,
            "config": self.config.trajectory(),
            "config_hash": self.config.fingerprint(),
            "world_size": self.world.size,
            "seconds": time.monotonic() - self._began,
            "sums": self._sums,
            "gauges": self._read_gauges(),
            "averages": {name: average.updates for name, average in self.averages.items()},
            "references": {name: player.reference for name, player in self.players.items()},
            "made": self._made,
        }
        self.checkpoints.save(self.step, self._files(), info, self._sharded)
        self._saved = self.step

    def _restore(self, manifest: Mapping[str, Any]) -> None:
        mine = self._files()
        where = self.checkpoints.path(manifest["step"])
        state.check_fits(where, manifest, self.method, self.config, self.recipe_hash, mine)
        targets = {name: tensor for group in mine.values() for name, tensor in group.items()}
        for name, (dtype, shape) in manifest["tensors"].items():
            if name.startswith("optimizer/"):
                targets[name] = state.optimizer_slot(self.players, name, getattr(torch, dtype), shape)
        self.checkpoints.read(manifest, targets)
        self.step = self._saved = manifest["step"]
        self.seconds, self._sums = manifest["seconds"], {key: list(value) for key, value in manifest["sums"].items()}
        self._gauges, self._made = dict(manifest["gauges"]), list(manifest.get("made", ()))
        for name, average in self.averages.items():
            average.updates = manifest["averages"][name]
        for name, player in self.players.items():
            player.reference = manifest["references"][name]
        self.checkpoints.forget_after(self.step)

    # --- the result -----------------------------------------------------------------------------------------------
    def export_role(self) -> nn.Module:
        """A copy of the role that ``config.export`` names, in eval mode; for an EMA, its role with averaged weights.

        Collective for a sharded method: every process calls it and gets the whole network.
        """
        average = self.averages.get(self.config.export)
        values = dict(self.method.named_parameters()) | (average.values if average else {})
        role = self._exported_role()
        return (self._outline or Outline(self.method, role)).filled(values, role).to(self.world.device)

    def _exported_role(self) -> nn.Module:
        of = {ema.get("name", "ema"): ema.get("of", "student") for ema in self.config.ema}
        return self.method.role(of.get(self.config.export, self.config.export))
