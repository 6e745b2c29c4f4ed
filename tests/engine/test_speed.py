"""What makes steps cheaper: batches ahead, frozen networks in bfloat16, TF32, layouts. None of it changes what is
learnt beyond rounding."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stillroom.data.source import ArrayData
from stillroom.draws import mix
from stillroom.engine.ahead import Ahead
from stillroom.engine.config import EngineConfig
from stillroom.engine.precision import fast_products
from stillroom.engine.trainer import Trainer
from stillroom.errors import UserError
from stillroom.method import Method, get_method
from tiny_denoisers import dit_teacher
from workers.toy import trainer, weights


def images() -> ArrayData:
    pixels = torch.rand(24, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return ArrayData(pixels, {"label": torch.arange(24) % 4})


def sim(**lora: Any) -> Method:
    method = get_method("sim")(lora=lora)
    method.build(dit_teacher())
    return method


def run(method: Method, **engine: Any) -> Trainer:
    made = Trainer(method, images(), EngineConfig(steps=3, batch=4, device="cpu", **engine), show=False)
    made.fit()
    return made


# --- batches ahead ----------------------------------------------------------------------------------------------------
def test_batches_are_made_one_step_ahead_in_order_and_in_a_thread() -> None:
    made: list[tuple[str, int, bool]] = []

    def make(reading: Any, step: int) -> list[Any]:
        made.append((reading, step, threading.current_thread() is threading.main_thread()))
        return [(reading, step)]

    ahead = Ahead(make)
    assert [ahead.take("a", step, step < 2) for step in range(3)] == [[("a", 0)], [("a", 1)], [("a", 2)]]
    assert ahead.take("b", 3, True) == [("b", 3)]  # another stage
    assert ahead.take("c", 4, False) == [("c", 4)]  # what was made for b is thrown away
    assert [entry[:2] for entry in made] == [("a", 0), ("a", 1), ("a", 2), ("b", 3), ("b", 4), ("c", 4)]
    assert not any(main for *_, main in made)


def test_a_failure_while_a_batch_is_made_is_told_in_the_step_that_reads_it() -> None:
    def make(reading: Any, step: int) -> list[Any]:
        if step == 1:
            raise UserError("a picture is damaged", cure="replace it")
        return [step]

    ahead = Ahead(make)
    assert ahead.take(None, 0, True) == [0]
    with pytest.raises(UserError, match="damaged"):
        ahead.take(None, 1, True)


def test_a_run_with_batches_ahead_learns_the_same() -> None:
    plain, early = trainer(), trainer()
    early.ahead = Ahead(early.made)
    for made in (plain, early):
        made.fit()
    ours, theirs = weights(plain), weights(early)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


# --- frozen networks in bfloat16 --------------------------------------------------------------------------------------
def test_a_frozen_network_takes_half_the_memory_and_says_what_autocast_says() -> None:
    made = run(sim(), frozen="bf16")
    teacher: Any = made.method.teacher
    kinds = {type(part).__name__: part.weight.dtype for part in teacher.modules() if isinstance(part, nn.Linear)}
    assert set(kinds.values()) == {torch.bfloat16}
    assert all(p.dtype == torch.float32 for role in ("student", "fake") for p in made.method.role(role).parameters())
    x, t, cond = torch.randn(4, 1, 8, 8), torch.full((4,), 0.5), {"label": torch.arange(4)}
    plain: Any = dit_teacher().eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = plain(x, t, cond).value
    with torch.no_grad():
        answer = teacher(x, t, cond).value
    assert answer.dtype == torch.float32
    assert torch.equal(answer, expected.float())
    assert not torch.is_autocast_enabled("cpu")


def test_under_bf16_precision_it_changes_nothing_at_all() -> None:
    plain, halved = (run(sim(), precision="bf16", frozen=frozen) for frozen in ("fp32", "bf16"))
    theirs = dict(halved.method.student.named_parameters())  # type: ignore[union-attr]
    assert all(torch.equal(p, theirs[name]) for name, p in plain.method.student.named_parameters())  # type: ignore[union-attr]


def test_weights_that_are_shared_with_trained_ones_are_not_halved() -> None:
    with pytest.raises(UserError, match=r"'sim' has no network that is frozen for good"):
        run(sim(student={"rank": 2}, fake={"rank": 2}), frozen="bf16")
    with pytest.raises(UserError, match=r"engine.parallel=fsdp cannot spread"):
        EngineConfig(frozen="bf16", parallel="fsdp")


# --- products and layouts ---------------------------------------------------------------------------------------------
def test_tf32_is_a_setting_of_the_process() -> None:
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        for on, name in ((True, "high"), (False, "highest")):
            fast_products(on)
            assert torch.get_float32_matmul_precision() == name
            assert torch.backends.cudnn.allow_tf32 == on
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def test_filters_with_their_channels_last_learn_the_same_up_to_rounding() -> None:
    def student(**engine: Any) -> dict[str, Tensor]:
        optim = {"all": {"name": "sgd", "lr": 0.01, "betas": (0.9, 0.0)}}
        return dict(run(copy.deepcopy(sim()), optim=optim, **engine).method.student.named_parameters())  # type: ignore[union-attr]

    plain, last = student(), student(channels_last=True)
    for name, p in plain.items():
        torch.testing.assert_close(last[name], p, atol=1e-4, rtol=1e-3)
    filters = [p for p in last.values() if p.ndim == 4]
    assert filters
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in filters)


def test_a_turn_seeds_torch_s_own_generator_as_manual_seed_does() -> None:
    made = trainer()
    made.seed(made.method, 3, 0, 0)
    found = torch.rand(4)
    torch.manual_seed(mix("torch", made.config.seed, 3, 0, 0, 0))
    assert torch.equal(found, torch.rand(4))
