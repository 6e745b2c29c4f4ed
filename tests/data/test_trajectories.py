"""Stored paths of a guided teacher: right states, the same however they are made, nothing lost or made twice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import stillroom.data.trajectories as data_trajectories
from stillroom.data.source import ArrayData
from stillroom.data.trajectories import Paths, Pieces, Trajectories, conditions, trajectories
from stillroom.diffusion.denoiser import Denoiser
from stillroom.diffusion.process import expand
from stillroom.diffusion.sampling import ODESampler
from stillroom.errors import UserError
from tiny_denoisers import point_teacher

COND = {"label": torch.arange(4)}
PATHS = Paths(10, steps=5, low=1.0, high=4.0, precision="float32")


def made(folder: str | Path = "", paths: Paths = PATHS, batch: int = 4, shard: int = 4) -> Trajectories:
    return trajectories(folder, point_teacher().eval(), COND, paths, name="t", batch=batch, shard=shard)


def test_states_follow_from_the_answers_before_them_and_answers_are_the_teacher_s() -> None:
    found, teacher = made(), point_teacher().eval()
    assert found.states is not None
    assert found.answers is not None
    assert found.times is not None
    for k in range(5):
        x, t, cond = found.states[:, k], found.times[:, k], {"label": found.cond["label"]}
        with torch.no_grad():
            u, c = (teacher(x, t, cond, w).value for w in (0.0, 1.0))
        guided = u + found.scale[:, None] * (c - u)
        torch.testing.assert_close(found.answers[:, k], guided, rtol=1e-5, atol=1e-5)
        after = found.states[:, k + 1] if k < 4 else found.end
        s = found.times[:, k + 1] if k < 4 else torch.zeros(10)
        torch.testing.assert_close(after, x + expand(s - t, x) * guided, rtol=1e-4, atol=1e-5)
    assert torch.equal(found.states[:, 0], found.noise)
    assert torch.equal(found.cond["label"], torch.arange(10) % 4)
    assert 1 <= float(found.scale.min()) < float(found.scale.max()) <= 4


def test_a_path_without_guidance_ends_where_the_sampler_does() -> None:
    found = made(paths=Paths(6, steps=7, precision="float32", keep="ends"))
    assert found.states is None
    with torch.no_grad():
        end = ODESampler("euler", 7).sample(point_teacher().eval(), found.noise, found.cond)
    torch.testing.assert_close(found.end, end, rtol=1e-5, atol=1e-6)


def test_rows_are_states_by_number() -> None:
    found = made()
    assert found.states is not None
    row = found.read(torch.tensor([0, 7, 49]))
    assert torch.equal(row["x_t"], found.states[[0, 1, 9], [0, 2, 4]])
    assert torch.equal(row["cond"]["label"], found.cond["label"][[0, 1, 9]])
    assert found.size == 50


def test_a_store_is_what_memory_holds_and_goes_on_where_it_was_cut_short(tmp_path: Path) -> None:
    whole, asked = made(tmp_path / "a"), []
    assert all(
        torch.equal(a, b) for a, b in zip(whole.read(torch.arange(50))["x_t"], made().read(torch.arange(50))["x_t"])
    )

    class Cut(Denoiser):
        def forward(self, *args, **how):
            asked.append(len(args[0]))
            if len(asked) == 8:
                raise KeyboardInterrupt
            return super().forward(*args, **how)

    plain = point_teacher().eval()
    cut = Cut(plain.network, plain.process, plain.prediction, null=plain.null, shape=plain.shape).eval()
    with pytest.raises(KeyboardInterrupt):
        trajectories(tmp_path / "b", cut, COND, PATHS, name="t", batch=4, shard=4)
    with pytest.raises(UserError, match="stored for another paths"):
        trajectories(tmp_path / "b", plain, COND, Paths(11, steps=5), name="t", batch=4, shard=4)
    again = trajectories(tmp_path / "b", cut, COND, PATHS, name="t", batch=4, shard=4)
    assert asked == [4] * 5 + [4] * 3 + [4] * 5 + [2] * 5  # the first shard was there, the second was begun again
    assert torch.equal(again.end, whole.end)
    names = [sorted(p.name for p in (tmp_path / x).iterdir()) for x in "ab"]
    assert names[0] == names[1]
    assert json.loads((tmp_path / "b" / "trajectories.json").read_text())["about"]["teacher"] == "t"


def test_states_stay_in_their_files_and_are_read_by_row(tmp_path: Path) -> None:
    """Batches of a store in three files are those of memory bit for bit, and its states are views of the files."""
    stored, held = made(tmp_path), made()
    assert isinstance(stored.states, Pieces)
    assert isinstance(held.states, Pieces)
    assert [len(part) for part in stored.states.parts] == [4, 4, 2]
    rows = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    one, other = stored.read(rows), held.read(rows)
    for name in ("x_t", "answer", "t", "scale"):
        assert torch.equal(one[name], other[name]), name
    assert torch.equal(one["cond"]["label"], other["cond"]["label"])
    assert torch.equal(stored.states[:, 3], held.states[:, 3])
    maps = Path("/proc/self/maps")
    if maps.is_file():  # Linux
        assert str(tmp_path / "trajectories-00001.safetensors") in maps.read_text()


def test_a_damaged_shard_and_another_teacher_are_refused(tmp_path: Path) -> None:
    made(tmp_path)
    with pytest.raises(UserError, match="stored for another teacher"):
        trajectories(tmp_path, point_teacher(), COND, PATHS, name="other")
    path = tmp_path / "trajectories-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="does not match its checksum"):
        made(tmp_path)


def test_ancestral_paths_are_fresh_and_repeat() -> None:
    paths = Paths(6, steps=5, eta=1.0, precision="float32")
    first, again, straight = made(paths=paths), made(paths=paths, batch=3), made(paths=Paths(6, 5, precision="float32"))
    torch.testing.assert_close(first.end, again.end, rtol=1e-5, atol=1e-6)
    assert torch.equal(first.noise, straight.noise)
    assert not torch.allclose(first.end, straight.end, atol=1e-2)


def test_a_shard_of_many_states_holds_fewer_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_trajectories, "SHARD_BYTES", 3 * 2 * 5 * 2 * 4)  # three paths of five states and answers
    trajectories(tmp_path, point_teacher().eval(), COND, Paths(7, 5, precision="float32"), name="t")
    assert len(list(tmp_path.glob("*.safetensors"))) == 3


def test_conditions_are_read_some_rows_at_a_time_and_are_those_of_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    data = ArrayData(torch.zeros(50, 2), {"label": torch.arange(50)})
    whole = data.batch(3, 0, 40)["cond"]["label"]
    asked: list[int] = []
    read = data.batch
    monkeypatch.setattr(data, "batch", lambda *at: (asked.append(at[3].stop - at[3].start), read(*at))[1])
    monkeypatch.setattr("stillroom.data.trajectories.ROWS", 16)
    assert torch.equal(conditions(data, 3, 40)["label"], whole)
    assert asked == [16, 16, 8]
