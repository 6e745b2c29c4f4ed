"""Two gloo processes: what they compute is what one computes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from stillroom.engine import distributed
from stillroom.engine.distributed import DataParallel
from stillroom.errors import UserError
from workers.toy import Stop, Toy, stop_after, trainer, weights

WORKERS = Path(__file__).parents[1] / "workers"
PARTED = {"parted": True, "branched": True}
CHECKPOINTED = {"activation_checkpointing": True}


def close(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    """All weights alike; counters, which count micro-batches, aside."""
    assert a.keys() == b.keys()
    worst = max((float((a[name] - b[name]).abs().max()), name) for name in a if a[name].is_floating_point())
    assert worst[0] <= tolerance, f"{worst[1]} differs by {worst[0]:.2e}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All two-process runs of this file, in one torchrun."""
    folder = tmp_path_factory.mktemp("two")
    for name in ("one-then-ddp", "one-then-fsdp"):
        alone = trainer(folder / name)
        alone.callbacks.append(stop_after(6))
        with pytest.raises(Stop):
            alone.fit()
    scenarios: list[dict[str, Any]] = [
        {"name": "ddp"},
        {"name": "ddp-accumulated", "settings": {"accumulate": 2}},
        {"name": "branched", "options": {"branched": True}},
        {"name": "branched-accumulated", "options": {"branched": True}, "settings": {"accumulate": 2}},
        {"name": "branched-checkpointed", "options": {"branched": True}, "settings": CHECKPOINTED},
        {"name": "parted", "options": PARTED, "settings": {"backward_per_term": True}},
        {"name": "parted-accumulated", "options": PARTED, "settings": {"backward_per_term": True, "accumulate": 2}},
        {"name": "fsdp", "settings": {"parallel": "fsdp"}},
        {"name": "fsdp-accumulated", "settings": {"parallel": "fsdp", "accumulate": 2}},
        {"name": "shared-ddp", "options": {"shared": True}},
        {"name": "shared-fsdp", "options": {"shared": True}, "settings": {"parallel": "fsdp"}},
        {"name": "offload-ddp", "settings": {"offload": True}},
        {"name": "offload-fsdp", "settings": {"offload": True, "parallel": "fsdp"}},
        {"name": "shared-offload-ddp", "options": {"shared": True}, "settings": {"offload": True}},
        {"name": "", "run_dir": "ddp-run", "stop": 7},
        {"name": "ddp-resumed", "run_dir": "ddp-run", "resume": True},
        {"name": "", "run_dir": "fsdp-run", "settings": {"parallel": "fsdp"}, "stop": 7},
        {"name": "fsdp-resumed", "run_dir": "fsdp-run", "resume": True, "settings": {"parallel": "fsdp"}},
        {"name": "", "run_dir": "offload-run", "settings": {"offload": True, "parallel": "fsdp"}, "stop": 7},
        {"name": "offload-resumed", "run_dir": "offload-run", "resume": True, "settings": {"parallel": "fsdp"}},
        {"name": "", "run_dir": "fsdp-then-one", "settings": {"parallel": "fsdp"}, "stop": 7},
        {"name": "", "run_dir": "fsdp-then-ddp", "settings": {"parallel": "fsdp"}, "stop": 7},
        {"name": "fsdp-then-ddp", "run_dir": "fsdp-then-ddp", "resume": True},
        {"name": "one-then-ddp", "run_dir": "one-then-ddp", "resume": True},
        {"name": "one-then-fsdp", "run_dir": "one-then-fsdp", "resume": True, "settings": {"parallel": "fsdp"}},
    ]
    for scenario in scenarios:
        if "run_dir" in scenario:
            scenario["run_dir"] = str(folder / scenario["run_dir"])
    (folder / "scenarios.json").write_text(json.dumps(scenarios))
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node=2",
            WORKERS / "scenarios.py",
            folder,
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.fixture(scope="module")
def alone() -> dict[str, Tensor]:
    run = trainer()
    run.fit()
    return weights(run)


@pytest.mark.parametrize(
    "name", ["ddp", "ddp-accumulated", "fsdp", "fsdp-accumulated", "offload-ddp", "offload-fsdp", "offload-resumed"]
)
def test_two_processes_compute_what_one_does(folder: Path, alone: dict[str, Tensor], name: str) -> None:
    close(load_file(folder / f"{name}.safetensors"), alone)


@pytest.mark.parametrize("name", ["shared-ddp", "shared-fsdp", "shared-offload-ddp"])
def test_roles_may_share_one_network(folder: Path, name: str) -> None:
    run = trainer(options={"shared": True})
    run.fit()
    close(load_file(folder / f"{name}.safetensors"), weights(run))


@pytest.mark.parametrize("name", ["branched", "branched-accumulated", "branched-checkpointed"])
def test_what_a_step_leaves_unused_on_some_processes_or_on_all_is_as_on_one(folder: Path, name: str) -> None:
    run = trainer(options={"branched": True})
    fresh = weights(run)
    run.fit()
    alone, found = weights(run), load_file(folder / f"{name}.safetensors")
    close(found, alone)
    still = {key for key in fresh if key.startswith(("student", "critic")) and torch.equal(fresh[key], found[key])}
    assert {key.split(".")[1] for key in still} == {"never"}


@pytest.mark.parametrize("name", ["parted", "parted-accumulated"])
def test_a_backward_pass_for_each_term_is_that_of_one_process(folder: Path, name: str) -> None:
    for apart in (False, True):
        run = trainer(options=PARTED, backward_per_term=apart)
        run.fit()
        close(load_file(folder / f"{name}.safetensors"), weights(run))


class Sent:
    """In place of an all-reduce: twice what this process has, as if the other had the same."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def __call__(self, tensor: Tensor, async_op: bool) -> Sent:
        self.sizes.append(tensor.numel())
        tensor *= 2
        return self

    def wait(self) -> None: ...


@pytest.fixture
def spread(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, DataParallel, Sent]:
    """The toy's critic on the first of two processes that have the same rows."""
    sent = Sent()
    monkeypatch.setattr(distributed, "BUCKET", 800)
    monkeypatch.setattr(distributed.dist, "all_reduce", sent)
    method = Toy(Toy.Options())
    method.build()
    turn = next(turn for turn in method.turns() if turn.name == "follow")
    return method, DataParallel(method, turn, list(method.critic.parameters()), 2), sent


def test_gradients_travel_while_the_backward_pass_runs(spread: tuple[Any, DataParallel, Sent]) -> None:
    method, runner, sent = spread
    method.requires_grad_(False)
    method.critic.requires_grad_(True)
    early: list[int] = []
    net = method.critic.network
    net.position.register_hook(lambda gradient: early.append(len(sent.sizes)))
    x = torch.randn(4, 3, 6)
    expected = torch.autograd.grad(method.critic(x).square().mean(), list(method.critic.parameters()))
    early.clear()
    with runner.averaging():
        method.critic(x).square().mean().backward()
    assert len(runner.buckets) > 3
    assert early == [len(runner.buckets) - 1]  # the last one holds the first layer
    assert sum(sent.sizes) == sum(p.numel() + 1 for p in method.critic.parameters())
    for p, gradient in zip(method.critic.parameters(), expected, strict=True):
        assert torch.equal(p.grad, gradient)
        assert p.grad.stride() == gradient.stride()


def test_a_gradient_that_comes_twice_is_refused(spread: tuple[Any, DataParallel, Sent]) -> None:
    method, runner, _ = spread
    layer = method.critic.network.out

    def twice() -> None:
        with runner.averaging():
            for _ in range(2):
                layer(torch.ones(1, 6)).sum().backward()

    with pytest.raises(RuntimeError, match="twice"):
        twice()


def test_parts_of_a_turn_are_not_for_fsdp_nor_for_methods_without_them() -> None:
    with pytest.raises(UserError, match=r"engine.backward_per_term parts a turn's passes"):
        trainer(backward_per_term=True, parallel="fsdp")
    with pytest.raises(UserError, match=r"no term of 'toy' has passes of its own"):
        trainer(backward_per_term=True).fit()


def test_training_moved_every_trained_weight(alone: dict[str, Tensor]) -> None:
    fresh = weights(trainer())
    still = [name for name in alone if name.startswith(("student", "critic")) and torch.equal(alone[name], fresh[name])]
    assert not still


def test_fsdp_computes_what_ddp_does(folder: Path) -> None:
    close(load_file(folder / "fsdp.safetensors"), load_file(folder / "ddp.safetensors"))


def test_two_processes_log_what_one_does(folder: Path) -> None:
    run = trainer()
    run.fit()
    for name in ("ddp", "fsdp"):
        for mine, theirs in zip(run.history, json.loads((folder / f"{name}.json").read_text()), strict=True):
            assert mine.keys() == theirs.keys()
            for key in mine.keys() - {"seconds", "stage", "health/std"}:
                assert theirs[key] == pytest.approx(mine[key], abs=1e-5), key


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_held_weights_change_nothing(folder: Path, kind: str) -> None:
    close(load_file(folder / f"offload-{kind}.safetensors"), load_file(folder / f"{kind}.safetensors"), 0.0)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_resumed_run_equals_the_straight_run(folder: Path, kind: str) -> None:
    straight, resumed = load_file(folder / f"{kind}.safetensors"), load_file(folder / f"{kind}-resumed.safetensors")
    assert straight.keys() == resumed.keys()
    for name, value in straight.items():
        assert torch.equal(value, resumed[name]), name


@pytest.mark.parametrize("name", ["one-then-ddp", "one-then-fsdp", "fsdp-then-ddp"])
def test_resume_on_more_processes_or_another_layout(folder: Path, alone: dict[str, Tensor], name: str) -> None:
    close(load_file(folder / f"{name}.safetensors"), alone)


def test_sharded_checkpoint_resumes_on_one_process(folder: Path, alone: dict[str, Tensor]) -> None:
    run = trainer(folder / "fsdp-then-one", resume=True)
    run.fit()
    close(weights(run), alone)


def test_checkpoints_hold_no_pickle(folder: Path) -> None:
    files = [path for path in folder.glob("*/checkpoints/**/*") if path.is_file()]
    assert files
    assert {path.suffix for path in files} == {".safetensors", ".json"}
