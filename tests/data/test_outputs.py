"""Stored outputs of a teacher: what is kept of the logits, views by number, checksums, resuming; and that training from
the store is training with the teacher."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from given import given as by_name
from stillroom.augment.images import VIEW, Augmentation, numbered_views
from stillroom.data.outputs import Views, lengthen, read_outputs, shorten, stored_outputs, write_outputs
from stillroom.data.source import ArrayData
from stillroom.draws import Draws
from stillroom.engine.config import EngineConfig
from stillroom.engine.trainer import Trainer
from stillroom.errors import UserError
from stillroom.method import Method, Stage
from stillroom.methods.classifier.dho import DHO
from stillroom.methods.classifier.meal_v2 import MEALV2

C, N = 5, 24
VIEWS = Views(Augmentation(shift=1, flip=0.5), 3, seed=7)


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, C)).eval()


def data(n: int = N) -> ArrayData:
    generator = torch.Generator().manual_seed(0)
    whole = ArrayData(torch.randn(n, 1, 4, 4, generator=generator), {"label": torch.arange(n) % C})
    whole.parts["heldout"] = whole.take(torch.arange(10))
    return whole


def teacher(images: Tensor) -> dict[str, Tensor]:
    return {"logits": network()(images), "features": images.flatten(1)[:, :4]}


def written(folder: Path, **settings: Any) -> Path:
    write_outputs(folder, teacher, data(), VIEWS, **{"name": "t", "shard": 20, **settings})
    return folder


# --- logits -----------------------------------------------------------------------------------------------------------
def test_all_logits_in_single_precision_come_back_bit_by_bit() -> None:
    z = 30 * torch.randn(6, 2, C, generator=torch.Generator().manual_seed(0))
    assert torch.equal(lengthen(shorten(z, 0, "float32"), C), z)
    assert torch.equal(lengthen(shorten(z, 99, "float32"), C), z)


@pytest.mark.parametrize("precision", ["float16", "float32"])
def test_what_is_left_out_keeps_its_mass(precision: Any) -> None:
    z = 40 + 3 * torch.randn(50, 30, generator=torch.Generator().manual_seed(0))
    back = lengthen(shorten(z, 4, precision), 30)
    p, q = z.softmax(-1), back.softmax(-1)
    top = z.topk(4, -1).indices
    tolerance = 1e-5 if precision == "float32" else 2e-3
    torch.testing.assert_close(q.gather(1, top), p.gather(1, top), atol=tolerance, rtol=0)
    torch.testing.assert_close(back.logsumexp(-1), z.logsumexp(-1), atol=2 * tolerance, rtol=1e-5)
    others = torch.ones_like(q, dtype=torch.bool).scatter(1, top, False)
    left = q[others].view(50, 26)
    torch.testing.assert_close(left, left[:, :1].expand_as(left))
    assert shorten(z, 4, precision)["index"].dtype == torch.int16


# --- views ------------------------------------------------------------------------------------------------------------
def test_the_numbers_of_a_view_follow_from_its_key() -> None:
    ids, views = torch.arange(4000) % 1000, torch.arange(4000) // 1000
    u = numbered_views(ids, views, 1)
    assert u.shape == (4000, VIEW)
    assert float(u.min()) >= 0
    assert float(u.max()) < 1
    order = torch.randperm(4000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(numbered_views(ids[order], views[order], 1), u[order])
    assert not torch.equal(numbered_views(ids, views, 2), u)
    assert len(torch.unique(u[:, 0])) > 3980  # 24 bits: a few may meet
    torch.testing.assert_close(u.mean(0), torch.full((VIEW,), 0.5), atol=0.02, rtol=0)
    torch.testing.assert_close(u.var(0), torch.full((VIEW,), 1 / 12), atol=0.01, rtol=0)
    correlations = torch.corrcoef(torch.cat([u.T, u.T[:, torch.arange(4000).roll(1)]]))
    assert float((correlations - torch.eye(2 * VIEW)).abs().max()) < 0.08


# --- the store --------------------------------------------------------------------------------------------------------
def test_outputs_are_found_by_image_and_view(tmp_path: Path) -> None:
    read, store = data(), read_outputs(written(tmp_path, precision="float32"))
    ids, numbers = torch.tensor([23, 0, 7, 7]), torch.tensor([2, 0, 1, 2])
    found = store.read(ids, numbers)
    expected = teacher(VIEWS.of(read.images(ids), ids, numbers))
    torch.testing.assert_close(found["logits"], expected["logits"])
    torch.testing.assert_close(found["features"], expected["features"])
    with pytest.raises(UserError, match="all images and views"):
        store.read(torch.tensor([24]), torch.tensor([0]))
    with pytest.raises(UserError, match="all images and views"):
        store.read(torch.tensor([0]), torch.tensor([3]))
    index = json.loads((tmp_path / "outputs.json").read_text())
    assert [entry["count"] for entry in index["shards"].values()] == [20, 20, 20, 12]
    assert {path.suffix for path in tmp_path.iterdir()} == {".safetensors", ".json"}


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    written(tmp_path)
    path = tmp_path / "outputs-00001.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    with pytest.raises(UserError, match=r"outputs-00001\.safetensors does not match its checksum"):
        read_outputs(tmp_path)
    path.unlink()
    with pytest.raises(UserError, match=r"outputs-00001\.safetensors is missing"):
        read_outputs(tmp_path)
    (tmp_path / "outputs.json").write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        read_outputs(tmp_path)
    with pytest.raises(UserError, match="holds no stored outputs"):
        read_outputs(tmp_path / "nowhere")


def test_writing_goes_on_where_it_was_cut_off(tmp_path: Path) -> None:
    calls = 0

    def dying(images: Tensor) -> dict[str, Tensor]:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return teacher(images)

    with pytest.raises(KeyboardInterrupt):
        write_outputs(tmp_path / "cut", dying, data(), VIEWS, name="t", shard=20)
    assert len(list((tmp_path / "cut").glob("*.safetensors"))) == 2
    with pytest.raises(UserError, match="unfinished"):
        read_outputs(tmp_path / "cut")
    with pytest.raises(UserError, match="another teacher"):
        write_outputs(tmp_path / "cut", teacher, data(), VIEWS, name="other", shard=20)
    (tmp_path / "cut" / "outputs-00000.safetensors").write_bytes(b"cut off")
    asked: list[int] = []

    def counting(images: Tensor) -> dict[str, Tensor]:
        asked.append(len(images))
        return teacher(images)

    write_outputs(tmp_path / "cut", counting, data(), VIEWS, name="t", shard=20)
    assert asked == [20, 20, 12]  # shard 1 was whole
    written(tmp_path / "straight")
    for name in ("outputs.json", *(f"outputs-{i:05d}.safetensors" for i in range(4))):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()


def test_a_store_of_something_else_is_refused(tmp_path: Path) -> None:
    written(tmp_path)
    stored_outputs(tmp_path, teacher, data(), VIEWS, name="t")
    for given, what in (
        ((data(), VIEWS, "other"), "teacher"),
        ((data(20), VIEWS, "t"), "data"),
        ((data(), VIEWS._replace(count=2), "t"), "augmentation"),
    ):
        with pytest.raises(UserError, match=f"another {what}"):
            stored_outputs(tmp_path, teacher, *given[:2], name=given[2])
    with pytest.raises(UserError, match="another keep"):
        stored_outputs(tmp_path, teacher, data(), VIEWS, name="t", keep=2)


# --- training ---------------------------------------------------------------------------------------------------------
def trained(method: Method, *teachers: nn.Module) -> tuple[dict[str, Tensor], Method]:
    torch.manual_seed(5)
    method.build_from(by_name((network(9), *teachers)))
    run = Trainer(method, data(), EngineConfig(steps=10, batch=6, log_every=5, check_freezing=True), show=False)
    run.fit()
    return run.export_role().state_dict(), method


def meal(**options: Any) -> MEALV2:
    given = {"init_share": 0.0, "shift": 1, "flip": 0.5, "views": 3, **options}
    return MEALV2(MEALV2.Options(**given))


def dho(**options: Any) -> DHO:
    return DHO(DHO.Options(**{"labelled": 1, "shift": 1, "crop": 0.7, "views": 3, "conflict_every": 0, **options}))


@pytest.mark.parametrize(
    ("make", "teachers", "more"),
    [
        (meal, 2, {}),
        (meal, 2, {"ensemble": "random"}),
        (meal, 1, {"judged": "probabilities", "gt_weight": 0.3}),
        (dho, 1, {}),
        (dho, 1, {"heads": "one"}),
    ],
)
def test_training_from_the_store_is_training_live(tmp_path: Path, make: Any, teachers: int, more: Any) -> None:
    """With all logits in float32 bit by bit, whatever order they were stored in; else nearly."""
    given = [network(seed) for seed in range(1, teachers + 1)]
    live, _ = trained(make(**more), *given)
    for folder in (tmp_path / "all", tmp_path / "all"):  # written, then read
        stored, method = trained(make(stored=str(folder), stored_precision="float32", **more), *given)
        assert all(torch.equal(value, live[name]) for name, value in stored.items())
        assert not any(name.startswith("teacher") for name, _ in method.named_parameters())
    near, _ = trained(make(stored=str(tmp_path / "half"), **more), *given)
    few, _ = trained(make(stored=str(tmp_path / "few"), stored_keep=2, **more), *given)

    def distance(other: dict[str, Tensor]) -> float:
        return max(float((other[name].float() - value.float()).abs().max()) for name, value in live.items())

    assert 0 < distance(near) < 0.01
    assert distance(few) > distance(near)


def test_views_that_are_numbered_are_the_same_each_time() -> None:
    method = dho(views=1)
    method.build(network(9), network(1))
    run = Trainer(method, data(), EngineConfig(steps=8, batch=18, log_every=4), show=False)
    seen: dict[int, Tensor] = {}
    streams = method.streams

    def watched(batch: Any) -> Any:
        images, *rest = streams(batch)
        for image, key in zip(images, rest[0].tolist(), strict=True):
            assert torch.equal(seen.setdefault(key, image), image)
        return images, *rest

    method.streams = watched  # type: ignore[method-assign]
    run.fit()
    assert len(seen) == N


def test_options_that_cannot_be_stored_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"options\.views"):
        trained(dho(stored=str(tmp_path), views=0), network(1))
    with pytest.raises(UserError, match=r"options\.views"):
        trained(meal(stored=str(tmp_path), views=0), network(1))
    with pytest.raises(UserError, match="teachers that are given"):
        trained(meal(stored=str(tmp_path)))


def test_a_mixed_batch_has_the_mixture_of_its_stored_targets(tmp_path: Path) -> None:
    method, read = (
        meal(stored=str(tmp_path), stored_precision="float32", cutmix=1.0, discriminator=0.0, shift=0),
        data(),
    )
    method.build(network(9), [network(1), network(2)])
    method.prepare(read)
    method.draw, method.stage = Draws(torch.Generator().manual_seed(0), slice(0, 6), 6), Stage("distil")
    seen: list[Tensor] = []
    method.student.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    term = method.eval().distil(batch := read.batch(0, 0, 6))["soft"]
    method.draw = Draws(torch.Generator().manual_seed(0), slice(0, 6), 6)
    views, key = method.viewed(batch)
    target, _ = method.taught(views, key)
    share = (seen[0] != views).float().mean((1, 2, 3))
    assert 0 < float(share.max()) < 1
    mixed = (1 - share)[:, None] * target + share[:, None] * target.roll(1, 0)
    torch.testing.assert_close(term, -(mixed * method.student(seen[0]).log_softmax(-1)).sum(-1).mean())
