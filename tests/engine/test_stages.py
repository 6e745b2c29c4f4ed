"""Stages: each has its own turns, data and schedule, and tells the method when it begins."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stillroom.data.source import ArrayData
from stillroom.engine.config import EngineConfig
from stillroom.engine.player import learning_rate_factor
from stillroom.engine.trainer import Trainer
from stillroom.errors import UserError
from stillroom.method import Method, Stage, frozen, turn
from workers.toy import SETTINGS, Points, Stop, Toy, stop_after, weights


class Shifted(Points):
    """Other data: the same points, moved."""

    def batch(self, seed: int, step: int, size: int, rows: slice) -> dict[str, Tensor]:
        return {"x": super().batch(seed, step, size, rows)["x"] + 5.0}


class Parted(Points):
    parts = {"later": Shifted()}


class TwoStages(Toy):
    """The second stage pulls the student back to a copy that it took of it at the start, and to a drawn target."""

    plan = (Stage("first", ("generator", "follow"), share=1), Stage("second", ("hold",), share=2, data="later"))

    def build(self) -> None:
        super().build()
        self.reference = copy.deepcopy(self.student)
        self.entered: list[tuple[str, bool]] = []
        self.seen: list[tuple[int, float]] = []

    def stages(self) -> tuple[Stage, ...]:
        return self.plan

    def enter(self, stage: Stage, data: Any, resumed: bool) -> None:
        self.entered.append((stage.name, resumed))
        if stage.name == "second":
            if not resumed:
                self.reference.load_state_dict(self.student.state_dict())
            with torch.no_grad():
                self.target = self.reference(self.draw.normal(self.draw.local, 3, 6))

    @turn(trains="student")
    def hold(self, batch: Any) -> dict[str, Tensor]:
        self.seen.append((self.step, batch["x"].mean().item()))
        x = self.student(batch["x"])
        return {"hold": (x - self.reference(batch["x"])).square().mean() + (x - self.target).square().mean()}


def made(folder: Path | None = None, resume: bool = False, data: Any = None, **settings: Any) -> Trainer:
    method = TwoStages()
    method.build()
    config = EngineConfig(**{**SETTINGS, "ema": [], "export": "student", **settings})
    return Trainer(method, data or Parted(), config, folder, resume, show=False)


def test_a_stage_reads_its_own_part_of_the_data_and_is_announced_once() -> None:
    run = made()
    run.fit()
    assert run.method.entered == [("first", False), ("second", False)]
    assert [step for step, _ in run.method.seen] == list(range(4, 12))
    assert all(mean > 4 for _, mean in run.method.seen)


def test_a_stage_whose_part_is_missing_is_refused_before_anything_runs() -> None:
    with pytest.raises(UserError, match=r"stage 'second' .* reads the data's part 'later'"):
        made(data=Points())


@pytest.mark.parametrize("step", [3, 4, 6, 9])
def test_a_run_resumed_inside_a_stage_is_the_straight_run(tmp_path: Path, step: int) -> None:
    straight = made()
    straight.fit()
    cut = made(tmp_path)
    cut.callbacks.append(stop_after(step))
    with pytest.raises(Stop):
        cut.fit()
    again = made(tmp_path, resume=True)
    again.fit()
    mine, theirs = weights(again), weights(straight)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    # checkpoints are made every fourth step, and the second stage begins at step 4: only from step 8 on is it resumed
    assert ("second", True) in again.method.entered or step < 8


def test_a_stage_with_a_schedule_of_its_own_warms_up_anew() -> None:
    class Own(TwoStages):
        plan = (Stage("first", ("generator",)), Stage("second", ("hold",), data="later", lr=0.5, own_schedule=True))

    method = Own()
    method.build()
    config = EngineConfig(**{**SETTINGS, "ema": [], "export": "student"})
    run = Trainer(method, Parted(), config, show=False)
    factors = [run.learning_rate_factor(step) for step in range(12)]
    assert factors[:6] == [learning_rate_factor(step, 12, 3, "cosine") for step in range(6)]
    assert factors[6:] == [0.5 * learning_rate_factor(step, 6, 3, "cosine") for step in range(6)]


# --- several streams --------------------------------------------------------------------------------------------------
def arrays(n: int = 8) -> ArrayData:
    rows = ArrayData(torch.arange(n).float()[:, None])
    rows.parts |= {"one": ArrayData(rows.array + 100), "two": ArrayData(rows.array + 200)}
    return rows


class Reads(Method):
    """Notes what it is given."""

    plan: tuple[Stage, ...] = (Stage("both", data=("one", "two")),)

    def build(self) -> None:
        self.student = nn.Linear(1, 1)
        self.seen: list[Any] = []

    def stages(self) -> tuple[Stage, ...]:
        return self.plan

    @turn(trains="student")
    def read(self, batch: Any) -> dict[str, Tensor]:
        self.seen.append(batch)
        return {"zero": self.student.weight.sum() * 0}


Reads.slug = "reads"


def reads(cls: type[Reads], folder: Path | None = None, resume: bool = False, **settings: Any) -> Trainer:
    method = cls()
    method.build()
    config = EngineConfig(**{"steps": 6, "batch": 4, "checkpoint_every": 2, "device": "cpu", **settings})
    return Trainer(method, arrays(), config, folder, resume, show=False)


def test_a_stage_may_read_several_parts_at_once_each_in_an_order_of_its_own() -> None:
    run = reads(Reads)
    run.fit()
    one, two = ([batch[name]["x"].flatten().tolist() for batch in run.method.seen] for name in ("one", "two"))
    assert sorted(one[0] + one[1]) == list(range(100, 108))
    assert sorted(two[0] + two[1]) == list(range(200, 208))
    assert [x + 100 for x in one[0] + one[1]] != two[0] + two[1]
    split = reads(Reads, accumulate=2)
    split.fit()
    rows = [batch["two"]["x"].flatten().tolist() for batch in split.method.seen]
    assert [a + b for a, b in zip(rows[::2], rows[1::2], strict=True)] == two


# --- data that a method makes -----------------------------------------------------------------------------------------
class Makes(Reads):
    """Its second stage reads what it drew when that began, which it can draw only once."""

    plan = (Stage("first"), Stage("second", share=2, kind="own"))
    drawn = 0

    def enter(self, stage: Stage, data: Any, resumed: bool) -> dict[str, Tensor] | None:
        if stage.kind != "own" or resumed:
            return None
        type(self).drawn += 1
        return {"made": data.array + 1000 * type(self).drawn, "x": -data.array}


def test_a_stage_reads_what_the_method_made_for_it_beside_its_own_rows() -> None:
    Makes.drawn = 0
    run = reads(Makes)
    run.fit()
    assert all("made" not in batch for batch in run.method.seen[:2])
    for batch in run.method.seen[2:]:
        assert torch.equal(batch["made"] - 1000, -batch["x"])  # the same rows; a name of the data's own is replaced
        assert torch.equal(batch["x"].flatten(), -batch["index"].float())


def test_the_run_folder_keeps_it_for_a_resumed_run(tmp_path: Path) -> None:
    Makes.drawn = 0
    cut = reads(Makes, tmp_path)
    cut.callbacks.append(stop_after(5))
    with pytest.raises(Stop):
        cut.fit()
    again = reads(Makes, tmp_path, resume=True)
    again.fit()
    assert Makes.drawn == 1
    assert all(torch.equal(batch["made"] - 1000, -batch["x"]) for batch in again.method.seen)


def test_a_resumed_run_whose_stage_data_are_gone_says_so(tmp_path: Path) -> None:
    cut = reads(Makes, tmp_path)
    cut.callbacks.append(stop_after(5))
    with pytest.raises(Stop):
        cut.fit()
    (tmp_path / "stages" / "1.safetensors").unlink()
    again = reads(Makes, tmp_path, resume=True)
    with pytest.raises(UserError, match=r"1\.safetensors does not hold what the stage was reading"):
        again.fit()


# --- no steps ---------------------------------------------------------------------------------------------------------
class Fitted(Method):
    """Least squares: no gradient, no turn."""

    def build(self) -> None:
        self.student = nn.Linear(1, 1)
        self.fits = 0

    def fit(self, data: Any) -> None:
        self.fits += 1
        with torch.no_grad():
            x = torch.cat([data.array, torch.ones_like(data.array)], 1)
            slope, offset = torch.linalg.lstsq(x, 3 * data.array + 2).solution.flatten()
            self.student.weight.fill_(slope)
            self.student.bias.fill_(offset)


Fitted.slug = "fitted"


def fitted(folder: Path | None = None, resume: bool = False, steps: int = 0) -> Trainer:
    method = Fitted()
    method.build()
    return Trainer(method, arrays(), EngineConfig(steps=steps, batch=4, device="cpu"), folder, resume, show=False)


def test_a_method_without_gradients_fits_its_data_once(tmp_path: Path) -> None:
    run = fitted(tmp_path)
    run.fit()
    found: Any = run.export_role()
    assert (float(found.weight), float(found.bias)) == pytest.approx((3.0, 2.0), abs=1e-4)
    again = fitted(tmp_path, resume=True)
    again.fit()
    assert (run.method.fits, again.method.fits) == (1, 0)
    assert torch.equal(again.export_role().weight, found.weight)  # type: ignore[arg-type]


def test_steps_without_turns_are_refused() -> None:
    with pytest.raises(UserError, match="'fitted' has no turns"):
        fitted(steps=3)


def test_no_steps_leave_a_student_as_it_was_built() -> None:
    run = reads(Reads, steps=0)
    before = run.method.student.weight.clone()
    run.fit()
    assert torch.equal(run.export_role().weight, before)  # type: ignore[arg-type]
    assert run.history == []


def test_parameters_made_after_the_optimizers_are_refused() -> None:
    class Late(Reads):
        plan = (Stage("first"), Stage("second"))

        def enter(self, stage: Stage, data: Any, resumed: bool) -> None:
            if stage.name == "second":
                self.extra = nn.Linear(1, 1)

    with pytest.raises(UserError, match=r"'reads' has made 'extra\.weight' after its optimizers"):
        reads(Late).fit()


# --- turns that an option switches off --------------------------------------------------------------------------------
class Chosen(Reads):
    @dataclass
    class Options:
        rounds: int = 1
        names: tuple[str, ...] = ()

        @property
        def odd(self) -> bool:
            return self.rounds % 2 == 1

    options: Options
    plan = (Stage("all"),)
    untaught = True

    def build(self, taught: bool = False) -> None:
        super().build()
        self.head = None if self.options.rounds == 3 else nn.Linear(1, 1)
        self.untaught = not taught

    @turn(trains=("student", "head"), when=("rounds", "odd"))
    def first(self, batch: Any) -> dict[str, Tensor]: ...

    @turn(trains="student", when=("names", "untaught"))
    def second(self, batch: Any) -> dict[str, Tensor]: ...


def test_a_turn_whose_option_is_off_does_not_exist() -> None:
    def named(taught: bool = False, **options: Any) -> tuple[list[str], list[str]]:
        method = Chosen(Chosen.Options(**options))
        method.build(taught)
        return [t.name for t in Chosen.turns_for(method.options)], [t.name for t in method.turns()]

    assert named() == (["read", "first"], ["read", "first"])
    assert named(rounds=0) == named(rounds=2) == (["read"], ["read"])
    assert named(rounds=2, names=("a",)) == (["read", "second"], ["read", "second"])
    assert named(taught=True, rounds=2, names=("a",)) == (["read", "second"], ["read"])  # known once there are networks


def test_a_network_that_is_none_is_not_trained() -> None:
    method = Chosen(Chosen.Options(rounds=3))
    method.build()
    assert method.turns()[-1].trains == ("student",)


# --- what build is given ----------------------------------------------------------------------------------------------
def test_build_gets_what_it_names() -> None:
    class Asks(Reads):
        def build(self, student: Any, teacher: Any = None, classes: Any = ("x",)) -> None:
            self.got = student, teacher, classes

    class All(Reads):
        def build(self, teachers: Any, space: Any) -> None: ...

    method = Asks()
    method.build_from({"student": 1, "teachers": [2], "teacher": 2, "other": 3})
    assert method.got == (1, 2, ("x",))
    with pytest.raises(UserError, match="reads learns from one teacher, 2 were given"):
        method.build_from({"student": 1, "teachers": [2, 3]})
    with pytest.raises(UserError, match="wants a student, which is not there; given: teachers"):
        method.build_from({"teachers": []})
    with pytest.raises(UserError, match="reads has no teacher"):
        All().build_from({"space": 1})


def test_teachers_are_the_frozen_networks_and_those_that_turns_train_are_known() -> None:
    class Taught(Reads):
        def build(self) -> None:
            super().build()
            self.master, self.own = frozen(nn.Linear(1, 1)), nn.ModuleList([nn.Linear(1, 1)])

        @turn(trains="own")
        def teach(self, batch: Any) -> dict[str, Tensor]: ...

    class Named(Taught):
        def teachers(self) -> dict[str, nn.Module]:
            return {"given": self.master, "made": self.own[0]}

    method, named = Taught(), Named()
    method.build()
    named.build()
    assert method.teachers() == {"master": method.master}
    assert method.trained_teachers() == {}
    assert named.trained_teachers() == {"made": named.own[0]}


# --- means over what batches hold unequally many of -------------------------------------------------------------------
class Counts(Reads):
    """The mean of the numbers that count, of which rows have unequally many."""

    plan = (Stage("all"),)

    def counts(self, batch: Any) -> dict[str, Tensor]:
        return {"positive": (batch["x"] > 0).sum()}

    @turn(trains="student")
    def read(self, batch: Any) -> dict[str, Tensor]:
        x, count = batch["x"], (batch["x"] > 0).sum().clamp(min=1)
        mean = torch.where(x > 0, self.student.weight * x, 0 * x).sum() / count
        return {"rows": x.mean() * self.student.weight.mean(), "positive": self.over("positive", mean)}


def test_means_are_weighed_by_what_they_count_over_micro_batches() -> None:
    def trained(accumulate: int) -> tuple[list[float], Tensor]:
        torch.manual_seed(0)
        method = Counts()
        method.build()
        data = ArrayData(torch.randn(8, 5, generator=torch.Generator().manual_seed(1)).abs())
        data.array[:5] *= -1  # some micro-batches have nothing that counts
        optim = {"all": {"name": "sgd", "lr": 0.1, "betas": (0.9, 0.0)}}
        config = EngineConfig(steps=3, batch=8, accumulate=accumulate, optim=optim, log_every=1, device="cpu")
        run = Trainer(method, data, config, show=False)
        run.fit()
        return [row["loss/read/positive"] for row in run.history], run.method.student.weight.detach()  # type: ignore

    once = trained(1)
    for parts in (2, 4, 8):
        losses, weight = trained(parts)
        assert losses == pytest.approx(once[0], rel=1e-6)
        torch.testing.assert_close(weight, once[1])
