"""tools/gpu_check.py: the published sizes, its parts on tiny networks, and parts that fail, die or take too long."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def gpu() -> Iterator[Any]:
    sys.path.insert(0, str(ROOT / "tools"))
    yield importlib.import_module("gpu_check")
    sys.path.remove(str(ROOT / "tools"))


@pytest.mark.parametrize(
    ("size", "parameters"), [("sd15", 859_520_964), ("sdxl", 2_567_463_684), ("sd3", 2_028_328_000)]
)
def test_networks_have_their_published_sizes(gpu: Any, size: str, parameters: int) -> None:
    with torch.device("meta"):
        network = gpu.denoiser(gpu.SIZES[size], dry=False).network
    assert sum(p.numel() for p in network.parameters()) == parameters


def test_every_way_is_tried_on_every_network(gpu: Any) -> None:
    wanted = {(size, method, how) for size in gpu.SIZES for method in gpu.OPTIONS for how in gpu.HOW}
    assert {(part.size, part.method, part.how) for part in gpu.parts()} == wanted
    assert len({part.name for part in gpu.parts()}) == len(wanted)


@pytest.mark.parametrize("name", ["sd3 dmd2 fp32", "sd3 swiftbrush fsdp"])
def test_a_part_in_small(gpu: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "FEWEST", 1)
    part = next(part for part in gpu.parts() if part.name == name)
    found = gpu.measure(part, dry=True)
    assert found["images/s"] > 0
    assert ("bare images/s" in found) == (part.how in gpu.BARE)
    assert not torch.distributed.is_initialized()


@pytest.mark.slow
def test_a_plan_in_small(gpu: Any) -> None:
    bf16, host = (gpu.Part("sd3", "dmd2", how, 1.0) for how in ("bf16", "offload"))
    assert 0 < gpu.planned(host, dry=True) < gpu.planned(bf16, dry=True)


STUB = """
import sys, time
for name in sys.stdin:
    name = name.strip()
    print("warnings of a library", flush=True)
    if "dies" in name: sys.exit(3)
    if "hangs" in name: time.sleep(60)
    print('@{"error": "OutOfMemoryError: no memory"}' if "full" in name else
          '@{"images/s": 4.0, "bare images/s": 5.0, "peak GB": 1.0}', flush=True)
"""


def test_a_part_that_fails_hinders_no_other(gpu: Any, tmp_path: Path) -> None:
    worker = gpu.Worker(dry=True)
    (tmp_path / "stub.py").write_text(STUB)
    worker.command = [sys.executable, str(tmp_path / "stub.py")]
    bares: dict[str, float] = {}

    def row(how: str, plan: Any = 10**9) -> dict[str, Any]:
        return gpu.one(gpu.Part("sd15", "dmd2", how, 1.0), plan, 8 * 10**9, worker, 20.0, bares)

    try:
        assert row("dies")["outcome"] == "the process ended with 3"
        fine = row("bf16")
        assert (fine["outcome"], fine["images/s"], fine["of the bare loop"], fine["planned GB"]) == (
            "ok",
            4.0,
            0.8,
            1.0,
        )
        assert row("full")["outcome"] == "OutOfMemoryError: no memory"
        assert row("fsdp")["of the bare loop"] == 0.8
        assert row("offload", 9 * 10**9)["outcome"] == "skipped: the device has 8 GB"
        assert row("offload", "no plan in time")["outcome"] == "ok, but its plan failed: no plan in time"
        assert "longer than 0 s" in worker.ask("hangs", 0.3)["error"]
        assert row("bf16")["outcome"] == "ok"
    finally:
        worker.stop()


def test_without_a_device_it_says_so(gpu: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert gpu.main(["--out", str(tmp_path / "gpu.json")]) == 1
    assert "--dry" in capsys.readouterr().out
    assert not (tmp_path / "gpu.json").exists()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_whole_in_small(gpu: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its processes, plans and table; what a part is about is tested above."""
    out = tmp_path / "gpu.json"
    assert gpu.main(["--dry", "--only", "sd3 dmd2", "--minutes", "10", "--out", str(out)]) == 0, capsys.readouterr().out
    rows = {row["part"]: row for row in json.loads(out.read_text())["rows"]}
    assert set(rows) == {f"sd3 dmd2 {how}" for how in gpu.HOW}
    assert all(row["outcome"] == "ok" and row["planned GB"] > 0 for row in rows.values())
