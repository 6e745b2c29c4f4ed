"""KD: regression on stored paths, of which it reads what its own steps would visit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from gaussians import exact
from stillroom.diffusion.process import EDM
from stillroom.draws import Draws
from stillroom.engine.config import EngineConfig
from stillroom.engine.trainer import Trainer
from stillroom.errors import UserError
from stillroom.methods.trajectory.kd import KD
from stillroom.planning import plan
from stillroom.recipe import Recipe
from stillroom.tasks.class_images.model import ImageGenerator
from tiny_denoisers import dit_teacher, point_teacher


class OnlyConditions:
    """Data of which nothing but the conditions may be read."""

    class Batch(dict):
        def __getitem__(self, key: str) -> Any:
            assert key == "cond", "an image was read"
            return super().__getitem__(key)

    def batch(self, seed: int, step: int, size: int, rows: slice | None = None) -> Any:
        labels = ((torch.arange(size) + seed + step) % 4)[rows if rows is not None else slice(None)]
        return self.Batch(cond={"label": labels})


def built(**options: Any) -> KD:
    method = KD(KD.Options(**{"paths": 12, "path_steps": 6, "stored_precision": "float32", **options}))
    method.build(point_teacher().eval())
    method.prepare(OnlyConditions())
    method.draw = Draws(torch.Generator().manual_seed(0), slice(0, 64), 64)
    return method


def test_a_path_of_one_step_has_nothing_to_teach_and_longer_ones_do() -> None:
    alone, longer = (built(path_steps=steps).regress({"cond": {}})["regression"] for steps in (1, 6))
    assert float(alone) < 1e-10  # type: ignore[arg-type]
    assert float(longer) > 1e-3  # type: ignore[arg-type]


def test_the_states_are_those_that_the_student_s_steps_visit() -> None:
    method = built(steps=3, guidance=2.0)
    rows, which = torch.tensor([0, 5, 11]), torch.tensor([0, 1, 2])
    x_t, t, cond, end = method.states(rows, which)
    found = method.found
    assert found.states is not None
    assert found.times is not None
    assert torch.equal(x_t, found.states[rows, 2 * which])
    torch.testing.assert_close(t, found.times[rows, 2 * which])
    assert torch.equal(t, torch.tensor([1.0, 2 / 3, 1 / 3]))
    assert torch.equal(end, found.end[rows])
    assert torch.equal(cond["label"], found.cond["label"][rows])
    assert method.sampler().times == pytest.approx((1.0, 2 / 3, 1 / 3))
    one = built()
    x_t, t, _, _ = one.states(rows, 0 * which)
    assert torch.equal(x_t, one.found.noise[rows])
    assert bool((t == 1).all())


def test_steps_lie_on_the_path_s_own_times_where_a_grid_is_not_even() -> None:
    """Two steps of EDM's own grid would be at its first and its least time."""
    method = KD(KD.Options(paths=4, path_steps=6, steps=2, stored_precision="float32"))
    method.build(exact(EDM(), "edm", offsets=((0.0, 0.0),) * 5))
    method.prepare(OnlyConditions())
    rows, which = torch.tensor([0, 3]), torch.tensor([0, 1])
    _, t, _, _ = method.states(rows, which)
    assert method.found.times is not None
    torch.testing.assert_close(t, method.found.times[rows, 3 * which])
    assert method.sampler().times == pytest.approx((1.0, float(EDM().grid(6)[3]) / 80))


@pytest.mark.parametrize("steps", [1, 2])
def test_it_trains_on_conditions_alone_and_is_kept(steps: int, tmp_path: Path) -> None:
    method = KD(KD.Options(steps=steps, paths=8, path_steps=2, stored=str(tmp_path / "paths")))
    method.build(dit_teacher().eval())
    before = {name: p.detach().clone() for name, p in method.student.named_parameters()}
    Trainer(method, OnlyConditions(), EngineConfig(steps=2, batch=8, check_freezing=True), tmp_path / "run").fit()
    assert any(not torch.equal(p, before[name]) for name, p in method.student.named_parameters())
    model = ImageGenerator(method.student, method.sampler())
    model.save(tmp_path / "student")
    again = ImageGenerator.load(tmp_path / "student")
    assert torch.equal(again.sample([0, 1], seed=1), model.sample([0, 1], seed=1))
    assert again.sampler.nfe == steps


def test_paths_in_a_folder_are_planned_without_being_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = plan(Recipe.load("kd", ["options.stored=paths", "options.steps=2", "options.path_steps=4"]))
    assert [turn.turn for turn in found.turns] == ["regress"]
    assert not (tmp_path / "paths").exists()


def test_steps_that_do_not_lie_on_the_paths_are_refused() -> None:
    with pytest.raises(UserError, match="do not lie on paths of 6"):
        built(steps=4)
