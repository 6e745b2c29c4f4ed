"""Weights in host memory: the same numbers, and never more than one block of them on the device."""

from __future__ import annotations

import copy
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import tiny
from given import given as by_name
from stillroom import planning
from stillroom.data.source import ArrayData
from stillroom.engine.config import EngineConfig
from stillroom.engine.counting import Counted, storage_bytes
from stillroom.engine.distributed import host_units
from stillroom.engine.offload import Offload, untrained
from stillroom.engine.rehearsal import Rehearsal
from stillroom.engine.trainer import Trainer
from stillroom.errors import UserError
from stillroom.folders.denoisers import load_denoiser
from stillroom.folders.image_networks import make_classifier
from stillroom.method import Batch, Method, Terms, get_method, turn
from stillroom.recipe import Recipe
from stillroom.surgery.skeleton import emptied, weights_unread
from workers.toy import Toy, stop_after, trainer, weights

ADAPTERS = {"student": {"rank": 2}, "fake": {"rank": 2}}


def images() -> ArrayData:
    pixels = torch.randint(0, 256, (60, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return ArrayData(pixels, {"label": torch.arange(60) % 3}, ["a", "b", "c"])


@pytest.fixture(scope="module")
def denoiser(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_denoiser(tiny.make_teacher(tmp_path_factory.mktemp("offload") / "teacher"))


def score(denoiser: Any, slug: str = "sid-lsg", lora: Any = None) -> Method:
    cls = get_method(slug)
    method = cls(cls.Options(), copy.deepcopy(lora))
    torch.manual_seed(0)
    method.build(copy.deepcopy(denoiser))
    return method


def ensemble() -> Method:
    cls = get_method("meal-v2")
    method = cls(cls.Options())
    torch.manual_seed(0)
    method.build_from(by_name([make_classifier("resnet-small", 1, 3) for _ in range(3)]))
    return method


def run(method: Method, **engine: Any) -> Trainer:
    made = Trainer(method, images(), EngineConfig(steps=3, batch=8, device="cpu", **engine), show=False)
    made.fit()
    return made


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    differ = [name for name in a if not torch.equal(a[name], b[name])]
    assert not differ


# --- the same numbers -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("lora", "engine"),
    [
        (None, {}),
        (None, {"activation_checkpointing": True}),
        (None, {"precision": "bf16", "accumulate": 2}),
        (ADAPTERS, {}),
        (ADAPTERS, {"activation_checkpointing": True, "precision": "bf16"}),
    ],
)
def test_a_score_method_learns_the_same_bit_for_bit(denoiser: Any, lora: Any, engine: dict[str, Any]) -> None:
    """The student's gradient passes through the frozen teacher."""
    plain, away = run(score(denoiser, lora=lora), **engine), run(score(denoiser, lora=lora), offload=True, **engine)
    assert away.offload is not None
    assert away.offload.held
    same(plain.method.state_dict(), away.method.state_dict())
    same(plain.export_role().state_dict(), away.export_role().state_dict())


def test_a_classifier_learns_the_same_bit_for_bit() -> None:
    plain, away = run(ensemble()), run(ensemble(), offload=True)
    assert away.offload is not None
    assert len(away.offload.held) == sum(p.ndim > 0 for p in untrained(away.method))
    same(plain.method.state_dict(), away.method.state_dict())


def test_a_resumed_run_may_switch_it_on_or_off(tmp_path: Path) -> None:
    straight = trainer(offload=True)
    straight.fit()
    for first in (True, False):
        broken = trainer(tmp_path / str(first), offload=first)
        broken.callbacks.append(stop_after(7))
        with pytest.raises(Exception, match=r"^$"):
            broken.fit()
        resumed = trainer(tmp_path / str(first), resume=True, offload=not first)
        resumed.fit()
        same(weights(straight), weights(resumed))


def test_what_leaves_the_engine_carries_no_trace(denoiser: Any) -> None:
    student = run(score(denoiser, lora=ADAPTERS), offload=True, precision="bf16").export_role()
    for part in student.modules():
        assert not part._forward_hooks
        assert not part._forward_pre_hooks
        assert not hasattr(part, "runs_on")


# --- what is on the device --------------------------------------------------------------------------------------------
class Watch(TorchDispatchMode):
    """Bytes of the copies of ``held`` weights that are alive, and operations that take a held weight itself."""

    def __init__(self, held: list[nn.Parameter]) -> None:
        super().__init__()
        self.held = {id(p.untyped_storage()) for p in held}
        self.alive = self.most = self.copied = 0
        self.refs: dict[int, Any] = {}
        self.misused: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        given = [x for x in tree_leaves([args, kwargs]) if isinstance(x, Tensor)]
        if any(id(x.untyped_storage()) in self.held for x in given):
            if func is torch.ops.aten._to_copy.default:
                self.follow(made)
            else:
                self.misused.add(str(func))
        elif func is torch.ops.aten._to_copy.default and id(given[0].untyped_storage()) in self.refs:
            self.follow(made)  # rounded
        return made

    def follow(self, copy: Tensor) -> None:
        storage = copy.untyped_storage()
        key, size = id(storage), storage.nbytes()

        def freed(_: Any) -> None:
            del self.refs[key]
            self.alive -= size

        self.refs[key] = weakref.ref(storage, freed)
        self.alive += size
        self.copied += size
        self.most = max(self.most, self.alive)


def one_block(offload: Offload, method: Method, recomputed: bool) -> int:
    """Bytes of the held weights of the largest part that is brought at a time; of whole blocks where they are
    recomputed."""
    wanted = {id(p) for p in offload.held}
    parts: list[nn.Module] = list(offload.scopes)
    if recomputed:
        parts += method.role("teacher").network.transformer_blocks  # type: ignore[operator]
    return max(storage_bytes(p for p in part.parameters() if id(p) in wanted) for part in parts)


@pytest.mark.parametrize(
    ("kind", "engine"),
    [
        ("score", {}),
        ("score", {"activation_checkpointing": True}),
        ("score", {"precision": "bf16"}),
        ("adapters", {"activation_checkpointing": True}),
        ("adapters", {"precision": "bf16"}),
        ("classifier", {}),
    ],
    ids=str,
)
def test_at_most_one_block_is_on_the_device_and_nothing_else_is_touched(
    denoiser: Any, kind: str, engine: dict[str, Any]
) -> None:
    method = ensemble() if kind == "classifier" else score(denoiser, lora=ADAPTERS if kind == "adapters" else None)
    config = EngineConfig(steps=2, batch=8, device="cpu", offload=True, **engine)
    made = Trainer(method, images(), config, show=False)
    assert made.offload is not None
    held = made.offload.held
    with Watch(held) as seen:
        made.fit()
    assert not seen.misused  # on a GPU such an operation would meet tensors of two devices
    assert seen.alive == 0
    limit = one_block(made.offload, method, bool(engine.get("activation_checkpointing")))
    everything = storage_bytes(held)
    rounded = 1.5 if "precision" in engine else 1  # the copy of one weight and its rounded one
    assert seen.most <= limit * rounded
    assert limit < everything / 2
    assert seen.copied >= everything


def test_a_block_asked_from_outside_brings_its_weights(denoiser: Any) -> None:
    """diffusers' DiT asks its first block's embedding again; a block that fails leaves nothing behind."""
    method = score(denoiser)
    offload = Offload(method, torch.device("cpu"))
    offload.start(method)
    network: Any = method.role("teacher").network
    block = network.transformer_blocks[0]
    with Watch(offload.held) as seen:
        block.norm1.emb(torch.zeros(2), torch.zeros(2, dtype=torch.long), hidden_dtype=torch.float32)
        with pytest.raises(RuntimeError):
            block.norm1.linear(torch.zeros(1, 1))
    assert seen.copied > 0
    assert seen.alive == 0
    assert not seen.misused
    assert not offload._running
    assert torch._C._autograd._top_saved_tensors_default_hooks(False) is None


# --- plans ------------------------------------------------------------------------------------------------------------
def test_a_plan_counts_what_is_taken(denoiser: Any) -> None:
    real = Trainer(score(denoiser), images(), EngineConfig(steps=3, batch=8, device="cpu", offload=True), show=False)
    assert real.offload is not None
    plain, away = (rehearsed(denoiser, offload=value) for value in (False, True))
    held = storage_bytes(real.offload.held)
    for before, after in zip(plain, away, strict=True):
        assert (before.host, after.host) == (0, held)
        assert after.weights == before.weights - held
        assert before.total - held <= after.total < before.total
    real.fit()  # the optimizers have their state now
    counted, here = Counted(), {id(p) for p in real.offload.held}
    counted.overlook(real.offload.held)
    states = [state for player in real.players.values() for state in player.optimizer.state.values()]
    for tensor in [*real.method.parameters(), *real.method.buffers(), *tree_leaves(states)]:
        if isinstance(tensor, Tensor) and id(tensor) not in here:
            counted.see(tensor)
    real.step = 2
    data, shared = [images().batch(0, 2, 8, slice(0, 8))], [{}]
    for cost in away:
        counted.restart()
        with counted:
            real.take_turn(real.players[cost.turn], data, shared)
        assert cost.total == pytest.approx(counted.peak, rel=0.02)


def rehearsed(denoiser: Any, world: int = 1, **engine: Any) -> Any:
    with weights_unread() as mode:
        method = emptied(score(denoiser), mode)
        assert isinstance(method, Method)
        return Rehearsal(method, images(), EngineConfig(steps=8, batch=8, **engine), world, mode).turn_costs()


def test_under_fsdp_each_process_holds_its_shards(denoiser: Any) -> None:
    plain, away = (rehearsed(denoiser, 2, parallel="fsdp", offload=value) for value in (False, True))
    for before, after in zip(plain, away, strict=True):
        assert before.weights == after.weights + after.host
        assert after.host > 0.3 * before.weights
        assert after.total < before.total


def test_it_is_advised_where_frozen_weights_dominate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, data = tiny.make_teacher(tmp_path / "teacher"), tiny.make_data(tmp_path / "data")
    mine = tuple(entry for entry in planning._PROPOSALS if entry[0] == "keep frozen weights in host memory")
    assert mine
    monkeypatch.setattr(planning, "_PROPOSALS", mine)
    advised = []
    for adapters in (["lora.student={rank: 1}", "lora.fake={rank: 1}"], []):
        wanted = ["engine.batch=1", "evaluate.samples=0", "evaluate.n=0", *adapters]  # nothing is drawn
        recipe = Recipe.load("sim", wanted, teacher=str(teacher), data=str(data))
        advice = planning.plan(recipe, memory=1000).advice
        assert advice is not None
        advised.append(advice.together)
    assert advised == [("engine.offload=true",), ()]


def test_it_is_no_part_of_a_recipes_hash() -> None:
    """A run may be resumed with it or without it."""
    assert Recipe.load("sim").hash() == Recipe.load("sim", ["engine.offload=true"]).hash()


# --- what is refused --------------------------------------------------------------------------------------------------
class Alone(Method):
    slug = "alone"

    def build(self, *teachers: Any) -> None:
        self.student = nn.Linear(2, 2)

    @turn(trains="student")
    def fit(self, batch: Batch) -> Terms:
        return {"size": self.student(batch["x"]).square().mean()}


def test_what_cannot_work_is_one_line(denoiser: Any) -> None:
    with pytest.raises(UserError, match=r"engine.offload moves weights behind the back of engine.compile"):
        EngineConfig(offload=True, compile=True)
    alone = Alone()
    alone.build()
    with pytest.raises(UserError, match="every weight of this method is trained"):
        run(alone, offload=True)
    shared = Toy(Toy.Options(shared=True))
    shared.build()
    with pytest.raises(UserError, match=r"cannot part frozen weights from the trained ones.*engine.parallel=fsdp"):
        host_units(shared, untrained(shared))
    adapted = score(denoiser, lora=ADAPTERS)
    with pytest.raises(UserError, match=r"LoRA roles on one base"):
        host_units(adapted, untrained(adapted))
