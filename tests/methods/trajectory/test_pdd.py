"""PDD: where the path is known by hand, what it reads, what it trains, how its student is run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gaussians import KINDS, PROCESSES, draws, exact, play
from small_methods import MADE, batch, check_that_it_also_draws_in, check_that_it_trains_alone, made
from stillroom.data.source import ArrayData
from stillroom.diffusion.denoiser import Denoiser
from stillroom.diffusion.process import RectifiedFlow
from stillroom.diffusion.sampling import FlowMapSampler
from stillroom.engine.config import EngineConfig
from stillroom.engine.trainer import Trainer
from stillroom.errors import UserError
from stillroom.methods.trajectory.pdd import PDD
from stillroom.planning import plan
from stillroom.recipe import Recipe
from stillroom.tasks.class_images.model import ImageGenerator
from tiny_denoisers import point_teacher
from workers.toy import fitted

SMALL = {"heads": 4, "shortest": 1, "longest": 4}
STD = 0.5


def built(name: str = "point", **options: Any) -> PDD:
    return made(PDD, name, **{**SMALL, **options})


class Still(nn.Module):
    """Says 0 of everything, through a last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(2, 2, bias=False)
        nn.init.zeros_(self.out.weight)

    def forward(self, x: Tensor, time: Tensor, cond: Any) -> Tensor:
        return self.out(x)


def slope(u: float) -> float:
    """``v(x, u) = slope x`` for data N(0, STD^2)."""
    return (u - (1 - u) * STD**2) / (u**2 + (1 - u) ** 2 * STD**2)


def by_hand(steps: int, solver: str) -> tuple[list[float], float]:
    """What each head must say of the noise that a path of ``steps`` begins with, and where the path ends, over it."""
    at, heads = 1.0, []
    for k in range(steps):
        u, h = 1 - k / steps, -1 / steps
        rate = slope(u) if solver == "euler" else slope(u + h / 2) * (1 + h / 2 * slope(u))
        heads.append(rate * at)
        at *= 1 + h * rate
    return heads, at


def knowing(solver: str) -> PDD:
    """With a Gaussian teacher, and heads that say what they must of noise."""
    method = PDD(PDD.Options(heads=4, shortest=4, longest=4, solver=solver))  # type: ignore[arg-type]
    flow = RectifiedFlow()
    method.build(exact(flow, stds=(STD,)).eval(), Denoiser(Still(), flow, "v", shape=(2,)))
    heads, _ = by_hand(4, solver)
    with torch.no_grad():
        for weight, said in zip(method.heads.weight, heads, strict=True):
            weight.copy_(said * torch.eye(2))
    return method


@pytest.mark.parametrize("solver", ["midpoint", "euler"])
def test_heads_that_say_the_teacher_s_steps_have_no_loss_and_one_step_of_them_is_all_of_its_path(solver: str) -> None:
    method = knowing(solver)
    assert float(play(method, "regress", batch((2,), 64))["heads"].detach()) < 1e-10
    noise = torch.randn(5, 2)
    _, end = by_hand(4, solver)
    torch.testing.assert_close(method.sampler().sample(method.student, noise), end * noise, rtol=1e-4, atol=1e-5)
    assert abs(by_hand(400, solver)[1] - STD) < 2e-3  # many steps end in the data


def test_the_loss_of_one_wrong_head_is_its_error_where_it_is_asked() -> None:
    """The last head leads nowhere, so that its error stays its own: a quarter of ``0.3^2 |x|^2``."""
    method = knowing("midpoint")
    with torch.no_grad():
        method.heads.weight[3] += 0.3 * torch.eye(2)
    own = {"x": torch.empty(4096, 2), "cond": {}}
    assert float(play(method, "regress", own)["heads"].detach()) == pytest.approx(0.3**2 / 4, rel=0.1)


def test_a_wrong_head_is_seen_by_those_after_it_at_the_state_that_it_leads_to() -> None:
    method, x = knowing("midpoint"), torch.randn(3, 2)
    with torch.no_grad():
        method.heads.weight[0] += 0.4 * torch.eye(2)
    n, k = torch.zeros(3, dtype=torch.long), torch.full((3,), 2)
    heads, _ = by_hand(4, "midpoint")
    there = x - (heads[0] + 0.4 + heads[1]) / 4 * x
    torch.testing.assert_close(method.decode(x, n, k, {}), there, rtol=1e-4, atol=1e-5)
    rate = slope(0.5 - 0.125) * (1 - 0.125 * slope(0.5))
    torch.testing.assert_close(method.target(there, k, {}), rate * there, rtol=1e-4, atol=1e-5)


def test_its_own_states_are_where_its_longest_steps_lead_and_no_image_is_read() -> None:
    method = built(longest=2, shortest=1, steps=2)
    nn.init.normal_(method.heads.weight, std=0.3)
    cond, n = {"label": torch.arange(4)}, torch.arange(4)
    method.draw = draws(4)
    x = method.states(n, {"cond": cond})
    noise = draws(4).normal(4, 2)
    sample = FlowMapSampler((1.0, 0.5), to="next")
    assert torch.equal(x[0], noise[0])
    for row, times in ((2, (0, 2)), (3, (0, 2, 3))):
        at = noise
        for a, b in zip(times, times[1:], strict=False):
            where = (torch.full((4,), a), torch.full((4,), b))
            at = at + (where[0] - where[1])[:, None] / 4 * method.velocity(at, where[0], where, cond)
        torch.testing.assert_close(x[row], at[row], rtol=1e-4, atol=1e-5)
    assert method.sampler() == sample
    own = batch((2,))
    del own["x"]
    play(method, "regress", own)


@pytest.mark.parametrize("process", list(PROCESSES))
@pytest.mark.parametrize("steps", [1, 2])
def test_steps_of_the_sampler_are_decoded_steps(process: str, steps: int) -> None:
    """Of every process, at states read as a flow's: ``x / (alpha + sigma)``."""
    kind: Any = KINDS[process]
    method = PDD(PDD.Options(**SMALL, steps=steps))
    method.build(Denoiser(point_teacher().network, PROCESSES[process], kind, null={"label": 4}, shape=(2,)).eval())
    nn.init.normal_(method.heads.weight, std=0.3)
    noise, cond = torch.randn(3, 2), {"label": torch.arange(3)}
    x, ends = method.heads.flow[0] * noise, [torch.full((3,), k) for k in range(0, 5, 4 // steps)]
    for n, k in zip(ends, ends[1:], strict=False):
        x = method.decode(x, n, k, cond)
    torch.testing.assert_close(method.sampler().sample(method.student, noise, cond), x, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize("how", [{}, {"begin": "data", "guidance": 2.0, "solver": "euler"}])
def test_it_trains_its_own_networks_alone_and_is_kept(name: str, how: dict[str, Any], tmp_path: Path) -> None:
    method = built(name, **how)
    check_that_it_trains_alone(method, "regress", tmp_path)
    if name == "point":
        return
    model = ImageGenerator(method.student, method.sampler())
    model.save(tmp_path / "student")
    again = ImageGenerator.load(tmp_path / "student")
    assert torch.equal(again.sample([0, 1], seed=1), model.sample([0, 1], seed=1))


def trained(folder: Path, stop: int = 0, resume: bool = False) -> PDD:
    method = built()
    data = ArrayData(torch.zeros(16, 2), {"label": torch.arange(16) % 4})
    config = EngineConfig(steps=4, batch=8, checkpoint_every=2, optim={"all": {"lr": 1e-2}})
    trainer = Trainer(method, data, config, folder, resume)
    fitted(trainer, stop)
    return method


def test_an_interrupted_run_ends_in_the_same_weights(tmp_path: Path) -> None:
    straight = trained(tmp_path / "a")
    trained(tmp_path / "b", stop=3)
    again = trained(tmp_path / "b", resume=True)
    assert bool(straight.heads.weight.any())
    for (name, p), q in zip(straight.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_numbers_of_steps_that_its_heads_do_not_make_are_refused() -> None:
    assert [built(steps=steps).sampler().nfe for steps in (1, 2, 4)] == [1, 2, 4]
    with pytest.raises(UserError, match="4 heads do not make 3 steps"):
        built(steps=3)
    with pytest.raises(UserError, match="4 heads do not make 1 steps of 1 to 2"):
        built(longest=2)
    with pytest.raises(UserError, match="4 heads do not make 1 steps of 3 to 4"):
        built(shortest=3)
    with pytest.raises(UserError, match="leave lora away"):
        PDD(PDD.Options(), lora={"student": {"rank": 2}}).build(point_teacher())


def test_its_recipe_is_planned() -> None:
    assert [turn.turn for turn in plan(Recipe.load("pdd")).turns] == ["regress"]


def test_a_report_shows_its_other_numbers_of_steps_too() -> None:
    check_that_it_also_draws_in(built(), 2, 4)
    check_that_it_also_draws_in(built(longest=2, steps=2), 4)
