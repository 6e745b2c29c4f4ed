"""The training loop on a small two-turn method: who moves when, by how much, and what stops a run."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stillroom.draws import Draws
from stillroom.engine import precision
from stillroom.engine.config import EngineConfig
from stillroom.engine.distributed import World
from stillroom.engine.ema import EMA, EMARule
from stillroom.engine.interrupt import Interrupted
from stillroom.engine.player import clip_norm, learning_rate_factor
from stillroom.engine.progress import Progress
from stillroom.engine.trainer import Trainer
from stillroom.errors import TrainingDiverged, UserError
from stillroom.files import held
from stillroom.method import Method, Optim, Stage, turn
from workers.toy import Net, Points, Role, Stop, Toy, stop_after, trainer, weights


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def fit(*args: Any, **settings: Any) -> Trainer:
    run = trainer(*args, **settings)
    run.fit()
    return run


class Line(Method):
    """One weight at 1, loss ``slope * weight``: every update can be worked out by hand."""

    slug = "line"

    @dataclass
    class Options:
        slope: float = 1.0
        every: int = 1

    def build(self) -> None:
        self.student = nn.Linear(1, 1, bias=False)
        nn.init.ones_(self.student.weight)

    @turn(trains="student", every="every", optim=Optim(lr=0.1, name="sgd", betas=(0.0, 0.0)))
    def move(self, batch: Any) -> dict[str, Tensor]:
        return {"height": self.options.slope * self.student.weight.sum()}


def line(steps: int, slope: float = 1.0, every: int = 1, method: type[Line] = Line, **settings: Any) -> list[float]:
    """The weight after each step."""
    made = method(method.Options(slope, every))
    made.build()
    path: list[float] = []

    def record(run: Trainer, _: int) -> None:
        path.append(run.method.get_parameter("student.weight").item())

    config = EngineConfig(**{"steps": steps, "batch": 4, "device": "cpu", "check_freezing": True, **settings})
    run = Trainer(made, Points(), config, callbacks=[record], show=False)
    run.fit()
    return path


# --- turns ------------------------------------------------------------------------------------------------------------
def test_a_turn_runs_at_multiples_of_its_period_and_turns_share_a_step_in_order() -> None:
    seen = []

    class Watched(Toy):
        @turn(trains="student", every="period")
        def generator(self, batch: Any) -> dict[str, Tensor]:
            seen.append(("generator", self.step))
            return super().generator(batch)

        @turn(trains="critic")
        def follow(self, batch: Any) -> dict[str, Tensor]:
            seen.append(("follow", self.step, "x" in self.shared))
            assert self.training_modes() == (False, True)
            return super().follow(batch)

        def training_modes(self) -> tuple[bool, bool]:
            return self.student.training, self.critic.training

    method = Watched(Watched.Options(period=2))
    method.build()
    Trainer(method, Points(), EngineConfig(steps=3, batch=4, device="cpu"), show=False).fit()
    assert seen == [("generator", 0), ("follow", 0, True), ("follow", 1, False), ("generator", 2), ("follow", 2, True)]


def test_stages_take_their_shares_and_only_their_turns() -> None:
    seen = []

    class Staged(Toy):
        def stages(self) -> tuple[Stage, ...]:
            return Stage("warm", ("follow",), share=1), Stage("both", share=3)

        def note(self, name: str, value: Tensor) -> None:
            seen.append((self.step, self.stage.name))

    method = Staged(Staged.Options(period=1))
    method.build()
    Trainer(method, Points(), EngineConfig(steps=8, batch=4, device="cpu"), show=False).fit()
    assert seen == [(step, "both") for step in range(2, 8)]


def test_a_turn_that_moves_what_it_does_not_train_is_an_error_that_names_it() -> None:
    class Cheat(Toy):
        @turn(trains="critic")
        def follow(self, batch: Any) -> dict[str, Tensor]:
            self.student.network.out.bias.data.add_(1e-3)  # unseen by autograd and by version counters
            return super().follow(batch)

    method = Cheat()
    method.build()
    with pytest.raises(RuntimeError, match=r"turn 'follow' changed 'student\.network\.out\.bias'"):
        Trainer(method, Points(), EngineConfig(steps=2, batch=4, device="cpu", check_freezing=True), show=False).fit()


def test_a_turn_that_trains_nothing_is_refused() -> None:
    class Empty(Toy):
        @turn(trains="nothing")
        def follow(self, batch: Any) -> dict[str, Tensor]:
            return {}

    method = Empty()
    method.build()
    method.nothing = nn.Identity()
    with pytest.raises(UserError, match="turn 'follow' has no parameters to train"):
        Trainer(method, Points(), EngineConfig(device="cpu"), show=False)


# --- updates ----------------------------------------------------------------------------------------------------------
def test_learning_rate_warms_up_then_follows_its_schedule() -> None:
    assert [learning_rate_factor(s, 10, 4, "constant") for s in (0, 1, 3, 4, 9)] == [0.25, 0.5, 1, 1, 1]
    assert learning_rate_factor(4, 10, 4, "linear") == 1
    assert learning_rate_factor(7, 10, 4, "linear") == pytest.approx(0.5)
    assert learning_rate_factor(7, 10, 4, "cosine") == pytest.approx(0.5)
    assert learning_rate_factor(9, 10, 4, "cosine") == pytest.approx(0.5 * (1 + math.cos(5 / 6 * math.pi)))


def test_warmed_up_sgd_takes_the_steps_worked_out_by_hand() -> None:
    assert line(4, warmup=2) == pytest.approx([1 - 0.05, 1 - 0.15, 1 - 0.25, 1 - 0.35])


def test_recipe_overrides_the_optimizer_per_turn_and_for_all() -> None:
    assert line(1, optim={"all": {"lr": 0.2}}) == pytest.approx([0.8])
    assert line(1, optim={"all": {"lr": 0.2}, "move": {"lr": 0.5}}) == pytest.approx([0.5])


def test_a_turn_rests_after_its_share_of_the_steps() -> None:
    moving = [0.9, 0.8, 0.7]
    assert line(5, optim={"move": {"until": 0.6}}) == pytest.approx([*moving, 0.7, 0.7])
    assert line(5, every=2, optim={"move": {"until": 0.6}}) == pytest.approx([0.9, 0.9, 0.8, 0.8, 0.8])
    assert line(3, optim={"all": {"until": 1.0}}) == pytest.approx(moving)
    assert line(2, optim={"all": {"until": 0.0}}) == [1.0, 1.0]


def test_clipping_and_sanitising_bound_the_update() -> None:
    assert line(1, slope=100.0, optim={"all": {"clip_norm": 2.0}}) == pytest.approx([0.8])
    assert line(1, slope=0.5, optim={"all": {"clip_norm": 2.0}}) == pytest.approx([0.95])
    assert line(1, slope=-100.0, optim={"all": {"clip_value": 3.0}}) == pytest.approx([1.3])


def test_non_finite_gradients_are_sanitised_where_the_recipe_asks_for_it() -> None:
    class Infinite(Line):
        @turn(trains="student", optim=Optim(lr=0.1, name="sgd", betas=(0.0, 0.0), nan_to_num=5.0))
        def move(self, batch: Any) -> dict[str, Tensor]:
            return {"root": (self.student.weight - 1.0).clamp(min=0).sqrt().sum() + self.student.weight.sum()}

    assert all(math.isfinite(w) for w in line(1, method=Infinite))
    with pytest.raises(TrainingDiverged, match="weights NaN"):
        line(1, method=Infinite, optim={"move": {"nan_to_num": 0.0}})


def test_clip_norm_is_the_norm_of_all_gradients_together() -> None:
    gradients = [torch.tensor([3.0, 0.0]), torch.tensor([[4.0]])]
    parameters = [nn.Parameter(torch.zeros_like(gradient)) for gradient in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    assert float(clip_norm(parameters, 0.0)) == pytest.approx(5.0)
    assert float(clip_norm(parameters, 1.0)) == pytest.approx(5.0)
    assert torch.cat([g.flatten() for g in gradients]).norm() == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_every_optimizer_trains(name: str) -> None:
    assert line(3, optim={"all": {"name": name, "weight_decay": 0.1}})[-1] < 0.8


def test_accumulated_micro_batches_equal_the_batch() -> None:
    whole, parts = weights(fit()), weights(fit(accumulate=4))
    for name, value in whole.items():
        if value.is_floating_point():
            torch.testing.assert_close(parts[name], value, atol=1e-6, rtol=0)


def test_per_rank_draws_are_another_stream_of_the_same_law() -> None:
    assert not same(weights(fit()), weights(fit(draws="per-rank")))


def test_a_number_that_some_micro_batches_note_is_their_mean() -> None:
    class Noting(Line):
        slug = "noting"

        @turn(trains="student", optim=Optim(lr=0.1))
        def move(self, batch: Any) -> dict[str, Tensor]:
            first = self.draw.rows.start
            self.note("all", torch.tensor(float(first)))
            if first:
                self.note("some", torch.tensor(float(first)))
            return super().move(batch)

    made = Noting(Noting.Options())
    made.build()
    run = Trainer(made, Points(), EngineConfig(steps=1, batch=12, accumulate=3, device="cpu"), show=False)
    run.fit()
    assert run.history[-1]["health/all"] == pytest.approx((0 + 4 + 8) / 3)
    assert run.history[-1]["health/some"] == pytest.approx((4 + 8) / 2)


def test_whole_numbers_of_rows_are_uniform_and_sliced_from_the_batch() -> None:
    whole = Draws(torch.Generator().manual_seed(1), slice(0, 6000), 6000).integers(3)
    part = Draws(torch.Generator().manual_seed(1), slice(2000, 2500), 6000).integers(3)
    assert torch.equal(part, whole[2000:2500])
    assert whole.bincount().tolist() == pytest.approx([2000] * 3, rel=0.1)


def test_per_rank_draws_share_whole_numbers_between_micro_batches_and_processes_and_nothing_else() -> None:
    run = trainer(accumulate=2, draws="per-rank")
    found = []
    for rank in (0, 1):
        run.world = World(rank, 2, run.world.device)
        for micro in (0, 1):
            run.seed(run.method, 5, 0, micro)
            draw = run.method.draw
            first = draw.index(2**30)  # before and after draws of rows
            found.append((first, draw.normal(4, 2), draw.seed(), draw.index(2**30), draw.uniform(4, 2)))
    whole = {(row[0], row[3]) for row in found}
    assert len(whole) == 1
    assert len(set(next(iter(whole)))) == 2
    assert len({row[2] for row in found}) == 4
    for place in (1, 4):
        assert len({tuple(row[place].flatten().tolist()) for row in found}) == 4


def test_same_seed_same_weights_other_seed_others() -> None:
    first = weights(fit(options={"dropout": 0.3}))
    torch.manual_seed(99)
    assert same(first, weights(fit(options={"dropout": 0.3})))
    assert not same(first, weights(fit(options={"dropout": 0.3}, seed=4)))


# --- averages ---------------------------------------------------------------------------------------------------------
def test_ema_with_a_half_life_forgets_half_in_that_many_images() -> None:
    weight = nn.Parameter(torch.zeros(3))
    average = EMA(EMARule(half_life=64.0, ramp=0.0), {"w": weight})
    weight.data.fill_(1.0)
    for updates in range(1, 33):
        average.update(batch=4)
        assert float(average.values["w"][0]) == pytest.approx(1 - 0.5 ** (4 * updates / 64.0), abs=1e-6)


def test_ramp_shortens_the_half_life_of_a_young_ema() -> None:
    rule = EMARule(half_life=100.0, ramp=0.1)
    assert rule.decay_at(images_seen=50, batch=5) == pytest.approx(0.5 ** (5 / 5.0))
    assert rule.decay_at(images_seen=10_000, batch=5) == pytest.approx(0.5 ** (5 / 100.0))


def test_ema_is_updated_with_its_role_and_exported_on_request() -> None:
    averages = [
        {"name": "slow", "decay": 0.9},
        {"name": "fast", "decay": 0.0},
        {"name": "other", "of": "critic", "decay": 0.5},
    ]
    run = fit(ema=averages, export="slow", options={"period": 3})
    assert {name: average.updates for name, average in run.averages.items()} == {"slow": 4, "fast": 4, "other": 12}
    assert all(torch.equal(v, run.method.get_parameter(n)) for n, v in run.averages["fast"].values.items())
    exported = run.export_role()
    assert not any(p.requires_grad for p in exported.parameters())
    assert not exported.training
    assert torch.equal(exported.network.out.weight, run.averages["slow"].values["student.network.out.weight"])
    assert not torch.equal(exported.network.out.weight, run.method.student.network.out.weight)
    shared = run.export_role(share=True)
    assert all(torch.equal(p, q) for p, q in zip(shared.parameters(), exported.parameters(), strict=True))
    assert shared.network.out.weight.data_ptr() == run.averages["slow"].values["student.network.out.weight"].data_ptr()
    assert exported.network.out.weight.data_ptr() != shared.network.out.weight.data_ptr()


# --- precision, memory, compilation -----------------------------------------------------------------------------------
def test_bf16_networks_hand_out_fp32_and_weights_stay_fp32() -> None:
    seen: set[torch.dtype] = set()

    class Watched(Toy):
        @turn(trains="critic")
        def follow(self, batch: Any) -> dict[str, Tensor]:
            seen.add(self.student(batch["x"]).dtype)
            return super().follow(batch)

    method = Watched()
    method.build()
    run = Trainer(method, Points(), EngineConfig(steps=2, batch=4, device="cpu", precision="bf16"), show=False)
    inside: set[torch.dtype] = set()
    method.student.network.blocks[0].register_forward_hook(lambda *a: inside.add(a[1][0].dtype))
    method.student.network.blocks[0].mlp.register_forward_hook(lambda *a: inside.add(a[2].dtype))
    run.fit()
    assert seen == {torch.float32}
    assert torch.bfloat16 in inside
    assert all(p.dtype == torch.float32 for p in method.parameters())
    assert not run.export_role().network._forward_hooks


class Saving(Net):
    """A network with the switch that diffusers models have."""

    def enable_gradient_checkpointing(self, function: Any) -> None:
        self.function, self.calls_saved = function, 0

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = self.function(block, x) if torch.is_grad_enabled() and hasattr(self, "function") else block(x)
        return self.out(x)


def test_activation_checkpointing_changes_memory_not_gradients() -> None:
    class Thrifty(Toy):
        def build(self) -> None:
            super().build()
            self.student, self.critic = Role(Saving(0.2)), Role(Saving(0.2))

    def run(on: bool) -> tuple[dict[str, Tensor], list[int]]:
        torch.manual_seed(0)
        method = Thrifty()
        method.build()
        config = EngineConfig(steps=4, batch=4, device="cpu", activation_checkpointing=on)
        made = Trainer(method, Points(), config, show=False)
        passes = [0]
        method.student.network.blocks[0].register_forward_pre_hook(lambda *_: passes.__setitem__(0, passes[0] + 1))
        made.fit()
        return weights(made), passes

    (plain, once), (thrifty, twice) = run(False), run(True)
    assert twice > once
    assert same(plain, thrifty)


def test_a_roles_own_checkpoint_function_is_used_whatever_the_order_of_roles() -> None:
    class Mine(Role):
        def checkpoint_function(self, block: Any, *args: Any) -> Any:
            return "mine"

    method, network = Toy(), Saving()
    method.build()
    method.student, method.critic = Mine(network), Role(network)
    precision.checkpoint_activations(method)
    assert network.function(None) == "mine"


def test_activation_checkpointing_without_a_network_that_can_is_refused() -> None:
    with pytest.raises(UserError, match="no network of this method supports it"):
        line(1, activation_checkpointing=True)


# --- what stops a run -------------------------------------------------------------------------------------------------
class Failing(Toy):
    """Its critic's loss turns into ``value`` at step 6."""

    value = math.nan

    @turn(trains="critic", optim=Optim(lr=1e-3))
    def follow(self, batch: Any) -> dict[str, Tensor]:
        terms = super().follow(batch)
        return {"denoise": terms["denoise"] + self.value} if self.step == 6 else terms


@pytest.mark.parametrize(
    ("value", "says"), [(math.nan, "is NaN"), (math.inf, "is inf"), (1e12, "beyond engine.loss_limit")]
)
def test_a_bad_loss_stops_the_run_and_leaves_the_last_good_checkpoint(tmp_path: Path, value: float, says: str) -> None:
    class Bad(Failing):
        pass

    Bad.value = value
    method = Bad()
    method.build()
    run = Trainer(
        method, Points(), EngineConfig(steps=9, batch=4, device="cpu", checkpoint_every=3), tmp_path, show=False
    )
    with pytest.raises(TrainingDiverged) as caught:
        run.fit()
    for part in ("step 6", "turn 'follow'", "term 'denoise'", says, "checkpoint of step 6 is intact"):
        assert part in str(caught.value)
    assert run.checkpoints.manifest(6)["step"] == 6


def test_weights_that_grow_without_bound_stop_the_run() -> None:
    with pytest.raises(TrainingDiverged, match="weights of turn 'move' have grown"):
        line(50, slope=-1000.0, growth_limit=10.0, log_every=1)


def test_first_signal_saves_and_raises_interrupted(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    run.callbacks.append(lambda _, step: os.kill(os.getpid(), signal.SIGTERM) if step == 5 else None)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted):
        run.fit()
    assert signal.getsignal(signal.SIGTERM) is before
    assert run.checkpoints.steps()[-1] == 6
    assert same(weights(fit(tmp_path, resume=True)), weights(fit()))


def test_roles_that_share_a_network_move_their_own_parameters_only(tmp_path: Path) -> None:
    run, fresh = fit(tmp_path, options={"shared": True}), trainer(options={"shared": True})
    moved = {n for n, p in run.method.named_parameters() if not torch.equal(p, fresh.method.get_parameter(n))}
    assert moved == {f"teacher.network.adapters.{role}.{kind}" for role in "sc" for kind in ("weight", "bias")}
    stored = {name for name in run.checkpoints.manifest(12)["tensors"] if name.startswith("weights/")}
    assert stored == {f"weights/{name}" for name in moved}


def test_progress_without_a_terminal_is_plain_lines_with_the_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(total=4, title="toy", every=0.0)
    progress.update(2, {"critic/denoise": 0.123456})
    progress.close()
    assert re.fullmatch(r"toy 2/4  0:00:00 gone, 0:00:00 left  critic/denoise 0.1235\n", capsys.readouterr().err)


# --- the run folder ---------------------------------------------------------------------------------------------------
def test_metrics_have_a_row_per_interval_with_every_turn_in_it(tmp_path: Path) -> None:
    fit(tmp_path, log_every=5, options={"period": 4})
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 5, 10, 12]
    for row in rows:
        assert row["images"] == 8 * row["step"]
        assert {"seconds", "stage", "grad_norm/generator", "grad_norm/follow", "health/std"} <= row.keys()
        assert {"lr/generator", "lr/follow", "loss/follow/denoise"} <= row.keys()
    assert "loss/generator/match" in rows[2]


def test_a_run_folder_in_use_is_refused(tmp_path: Path) -> None:
    code = "import sys; from stillroom.files import held; from pathlib import Path\n"
    code += "with held(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    holder = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="in use by another process"):
            fit(tmp_path)
    finally:
        holder.communicate("")
    fit(tmp_path)


def test_one_process_may_hold_its_run_folder_several_times(tmp_path: Path) -> None:
    with held(tmp_path):
        fit(tmp_path)


def test_a_folder_that_holds_a_run_is_only_resumed(tmp_path: Path) -> None:
    fit(tmp_path)
    with pytest.raises(UserError, match="already holds a run"):
        fit(tmp_path)
    again = fit(tmp_path, resume=True)
    assert again.step == 12


# --- settings ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"steps": -3}, "'engine.steps' must be a whole number, at least 0"),
        ({"steps": True}, "'engine.steps' must be a whole number, at least 0"),
        ({"batch": 2.5}, "'engine.batch' must be a whole number, at least 1, got 2.5"),
        ({"warmup": -1}, "'engine.warmup' must be a whole number, at least 0"),
        ({"precision": "fp8"}, "'engine.precision' must be one of fp32, bf16, got 'fp8'"),
        ({"schedule": "cosin"}, r"'engine.schedule' must be one of .*did you mean 'cosine'"),
        ({"accumulate": 3}, "does not split"),
        ({"device": "warp"}, "engine.device is 'warp'"),
        ({"export": "studnet"}, r"engine.export names 'studnet' \(did you mean 'student'\?\)"),
        ({"ema": [{"decay": 0.9, "half_life": 5}]}, "exactly one of decay and half_life"),
        ({"ema": [{"decay": 1.0}]}, r"'engine.ema\[0\].decay' must be .*at least 0 and below 1, got 1.0"),
        ({"ema": [{"decay": 0.9, "of": "studnt"}]}, r"did you mean 'student'"),
        ({"ema": [{"decay": 0.9, "halflife": 3}]}, "did you mean 'engine.ema.0..half_life'"),
        ({"ema": [{"decay": 0.9}, {"decay": 0.99}]}, "'ema' is taken"),
        ({"optim": {"genrator": {"lr": 1.0}}}, "did you mean 'engine.optim.generator'"),
        ({"optim": {"generator": {"learning_rate": 1.0}}}, "unknown recipe key 'engine.optim.generator.learning_rate'"),
        ({"optim": {"all": {"name": "adamx"}}}, r"did you mean 'adam"),
    ],
)
def test_settings_that_make_no_sense_are_refused_with_the_key_named(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        trainer(**settings)


def test_a_period_of_zero_is_refused() -> None:
    with pytest.raises(UserError, match="turn 'generator' would run every 0 steps"):
        trainer(options={"period": 0})


def test_config_survives_a_round_trip_through_plain_data() -> None:
    config = EngineConfig(steps=5, optim={"all": {"lr": 1e-3, "betas": [0.0, 0.9]}}, ema=[{"decay": 0.9}])
    assert EngineConfig(**json.loads(json.dumps(config.to_dict()))) == config


def test_stop_leaves_a_run_that_resumes(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    run.callbacks.append(stop_after(7))
    with pytest.raises(Stop):
        run.fit()
    assert same(weights(fit(tmp_path, resume=True)), weights(fit()))
