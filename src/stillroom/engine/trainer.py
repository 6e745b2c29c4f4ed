"""A training: steps to the end, watched, with a run folder that can be resumed from."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stillroom.checks import all_hold, settled
from stillroom.engine import state
from stillroom.engine.checkpoint import Checkpoints
from stillroom.engine.config import EngineConfig
from stillroom.engine.interrupt import Interrupted, StopRequest
from stillroom.engine.progress import Progress
from stillroom.engine.stages import StageData
from stillroom.engine.stepper import Data, Stepper
from stillroom.engine.track import TRACKERS, Tracker
from stillroom.errors import TrainingDiverged, UserError
from stillroom.files import held, write, writing
from stillroom.method import Method


class Trainer(Stepper):
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
        self.run_dir, self.resume = Path(run_dir) if run_dir is not None else None, resume
        self.callbacks = list(callbacks)
        self.recipe_hash, self.show, self.track = recipe_hash, show, list(track)
        self.trackers: list[Tracker] = []
        self.seconds = 0.0  # training time, earlier parts of a resumed run included
        self.history: list[dict[str, Any]] = []  # the rows of metrics.jsonl
        self._sums: dict[str, list[float]] = {}  # loss terms since the last row: [sum, count]
        self._gauges: dict[str, float] = {}  # newest gradient norms and health numbers of a resumed run
        self._saved: int | None = None
        self._stop = StopRequest()
        super().__init__(method, data, config, stage_data=StageData(self.run_dir / "stages") if self.run_dir else None)

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
                self.fit_method()
            while self.step < self.config.steps:
                self._one_step()
            self._save()

    def _one_step(self) -> None:
        c = self.config
        stop = self._check(self.take_step())
        logging = self.step % c.log_every == 0 or self.step in (1, c.steps)
        if logging:
            self._log()
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

    # --- watching -------------------------------------------------------------------------------------------------
    def _check(self, losses: Mapping[str, Tensor]) -> bool:
        """Stop on NaN, inf and divergence; True if some process was asked to stop. One transfer for all terms of the
        step, so that all processes decide alike."""
        # numbers on the host go to the device by a fill, which waits for nothing
        asked = torch.full((), float(self._stop.asked), device=self.world.device)
        holds = all_hold(self.checks)
        broken = torch.zeros_like(asked) if holds is None else (~holds).to(asked)
        *values, stop, broken = self.world.mean(torch.stack([*losses.values(), asked, broken])).tolist()
        if broken:
            settled(self.checks)
            self._diverged("a value is undefined on another process")
        for name, value in zip(losses, values, strict=True):
            if not abs(value) <= self.config.loss_limit:
                turn, term = name.split("/", 1)
                what = "is " + ("NaN" if math.isnan(value) else f"{value:.3g}")
                if math.isfinite(value):
                    what += f", beyond engine.loss_limit={self.config.loss_limit:.3g}"
                self._diverged(f"turn {turn!r}, term {term!r} {what}")
            entry = self._sums.setdefault(name, [0.0, 0])
            entry[0] += value
            entry[1] += 1
        return stop > 0

    def _check_weights(self) -> None:
        for name, player in self.players.items():
            rms = player.weight_rms()
            limit = self.config.growth_limit * max(1.0, player.reference)
            if not math.isfinite(rms):
                self._diverged(f"turn {name!r} has made its weights NaN or infinite")
            if rms > limit:
                self._diverged(f"the weights of turn {name!r} have grown to RMS {rms:.3g} (limit {limit:.3g})")

    def _diverged(self, what: str) -> None:
        kept = f"; the checkpoint of step {self._saved} is intact" if self._saved is not None else ""
        raise TrainingDiverged(
            f"training diverged at step {self.step - 1}: {what}{kept}",
            cure="lower the learning rate, clip the gradients (engine.optim.all.clip_norm=1), or warm up longer",
        )

    def _log(self) -> None:
        self._check_weights()
        self.seconds = time.monotonic() - self._began
        row: dict[str, Any] = {"step": self.step, "images": self.step * self.config.batch}
        row |= {"seconds": round(self.seconds, 3), "stage": self.span_at(self.step - 1).stage.name}
        row |= {f"loss/{name}": total / count for name, (total, count) in self._sums.items()}
        factor = self.learning_rate_factor(self.step - 1)
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
            **self.facts(),
        }
        self.checkpoints.save(self.step, self.tensors(), info, self.sharded)
        self._saved = self.step

    def _restore(self, manifest: Mapping[str, Any]) -> None:
        where = self.checkpoints.path(manifest["step"])
        state.check_fits(where, manifest, self.method, self.config, self.recipe_hash, self.tensors())
        self.checkpoints.read(manifest, self.targets(manifest["tensors"]))
        self.go_on(manifest["step"], manifest)
        self.seconds, self._sums = manifest["seconds"], {key: list(value) for key, value in manifest["sums"].items()}
        self._gauges, self._saved = dict(manifest["gauges"]), self.step
        self.checkpoints.forget_after(self.step)
