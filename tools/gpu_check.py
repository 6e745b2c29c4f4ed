"""A self-check for a machine with a CUDA device, of at most some minutes: does everything run, how fast, in how much
memory.

    python tools/gpu_check.py [--minutes 8] [--only TEXT] [--out results/benchmarks/gpu.json]
    python tools/gpu_check.py --dry --out FILE        the same code on tiny networks and the CPU

Its parts: the tests that are marked ``gpu``; then steps of two methods on networks of the sizes of Stable Diffusion
1.5, SDXL and Stable Diffusion 3 medium, made from their published configs with random weights. A part that fails or
takes too long is recorded and does not keep the next one from running; one that needs more memory than the device has
is skipped. Parts run in a process of their own, which is started anew after one that has died. Plans are made beside
them on the CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as TooLate
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
NAME = "GPU self-check"
MARGIN = 0.95
"""Of a device's memory, what a plan may ask for: the context and gaps take the rest."""
SECONDS, FEWEST, MOST = 2.0, 3, 20
"""Steps are timed for so long, but at least and at most so many."""
LR, CLIP = 1e-6, 1.0


# --- what is run ------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Size:
    """A network by its published config. shape: of a latent. text: conditions, name -> shape of one. ``tiny`` has all
    kinds of layers in small, for a try without a device."""

    title: str
    network: str
    config: Mapping[str, Any]
    tiny: Mapping[str, Any]
    flow: bool
    shape: tuple[int, int, int]
    tiny_shape: tuple[int, int, int]
    text: Mapping[str, tuple[int, ...]]
    tiny_text: Mapping[str, tuple[int, ...]]
    batch: int
    checkpointing: bool
    tapped: str
    tiny_tapped: str


_UNET = {"in_channels": 4, "out_channels": 4, "layers_per_block": 2}
_SMALL = {
    "in_channels": 4, "out_channels": 4, "layers_per_block": 1, "sample_size": 8, "block_out_channels": (8, 16),
    "norm_num_groups": 4, "cross_attention_dim": 8,
}  # fmt: skip
SIZES = {
    "sd15": Size(
        "Stable Diffusion 1.5",
        "UNet2DConditionModel",
        {
            **_UNET,
            "sample_size": 64,
            "block_out_channels": (320, 640, 1280, 1280),
            "cross_attention_dim": 768,
            "attention_head_dim": 8,
            "down_block_types": (*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"),
            "up_block_types": ("UpBlock2D", *["CrossAttnUpBlock2D"] * 3),
        },
        {
            **_SMALL,
            "attention_head_dim": 2,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        },
        False,
        (4, 64, 64),
        (4, 8, 8),
        {"encoder_hidden_states": (77, 768)},
        {"encoder_hidden_states": (5, 8)},
        4,
        False,
        "mid_block",
        "mid_block",
    ),
    "sdxl": Size(
        "Stable Diffusion XL",
        "UNet2DConditionModel",
        {
            **_UNET,
            "sample_size": 128,
            "block_out_channels": (320, 640, 1280),
            "cross_attention_dim": 2048,
            "attention_head_dim": (5, 10, 20),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        {
            **_SMALL,
            "attention_head_dim": (2, 4),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": 6 + 6 * 4,
        },
        False,
        (4, 128, 128),
        (4, 8, 8),
        {"encoder_hidden_states": (77, 2048), "text_embeds": (1280,), "time_ids": (6,)},
        {"encoder_hidden_states": (5, 8), "text_embeds": (6,), "time_ids": (6,)},
        1,
        True,
        "mid_block",
        "mid_block",
    ),
    "sd3": Size(
        "Stable Diffusion 3 medium",
        "SD3Transformer2DModel",
        {
            "sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 24,
            "attention_head_dim": 64, "num_attention_heads": 24, "joint_attention_dim": 4096,
            "caption_projection_dim": 1536, "pooled_projection_dim": 2048, "pos_embed_max_size": 192,
        },
        {
            "sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 3,
            "attention_head_dim": 4, "num_attention_heads": 2, "joint_attention_dim": 8, "caption_projection_dim": 8,
            "pooled_projection_dim": 6, "pos_embed_max_size": 8,
        },
        True,
        (16, 128, 128),
        (4, 8, 8),
        {"encoder_hidden_states": (333, 4096), "pooled_projections": (2048,)},
        {"encoder_hidden_states": (5, 8), "pooled_projections": (6,)},
        1,
        True,
        "transformer_blocks.12",
        "transformer_blocks.1",
    ),
}  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {"dmd2": {"critic_turns": 1}, "swiftbrush": {}}
HOW: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"precision": "bf16"},
    "compile": {"precision": "bf16", "compile": True},
    "offload": {"precision": "bf16", "offload": True},
    "fsdp": {"precision": "bf16", "parallel": "fsdp"},
}
"""Ways to run a step, as engine settings. fp32 multiplies in TF32. fsdp: FSDP2 over the one device."""
BARE = ("fp32", "bf16")
"""Ways that are timed beside a bare loop; the others compare with that of bf16."""


@dataclass(frozen=True)
class Part:
    """Steps of a method on a network, run one way. seconds: the part's bound."""

    size: str
    method: str
    how: str
    seconds: float

    @property
    def name(self) -> str:
        return f"{self.size} {self.method} {self.how}"

    @property
    def bare(self) -> str:
        """What its bare loop is called."""
        return f"{self.size} {self.method} {'fp32' if self.how == 'fp32' else 'bf16'}"


def parts() -> list[Part]:
    """The most telling first: what the time does not suffice for comes last."""
    ways = [
        ("sd15", ("bf16", "fp32", "offload", "fsdp"), 40.0),
        ("sdxl", ("bf16", "offload"), 75.0),
        ("sd3", ("bf16", "fsdp"), 75.0),
        ("sd15", ("compile",), 150.0),
        ("sdxl", ("fp32", "fsdp", "compile"), 90.0),
        ("sd3", ("fp32", "offload", "compile"), 90.0),
    ]
    return [Part(size, method, how, s) for size, hows, s in ways for how in hows for method in OPTIONS]


# --- one part ---------------------------------------------------------------------------------------------------------
class Batches:
    """Random latents and texts, the same at every step."""

    def __init__(self, size: Size, dry: bool, rows: int) -> None:
        import torch

        text, draws = (size.tiny_text if dry else size.text), torch.Generator().manual_seed(0)
        shape = size.tiny_shape if dry else size.shape
        self.x = torch.randn(rows, *shape, generator=draws)
        self.cond = {name: torch.randn(rows, *one, generator=draws) for name, one in text.items()}

    def batch(self, seed: int, step: int, size: int, rows: slice) -> dict[str, Any]:
        return {"x": self.x[rows], "cond": {name: value[rows] for name, value in self.cond.items()}}


def denoiser(size: Size, dry: bool) -> Any:
    import torch

    from stillroom.diffusion.denoiser import Denoiser
    from stillroom.diffusion.process import VP, RectifiedFlow
    from stillroom.folders.diffusers_networks import diffusers_call, make_network

    network = make_network(size.network, dict(size.tiny if dry else size.config))
    text = size.tiny_text if dry else size.text
    return Denoiser(
        network, RectifiedFlow(shift=3.0) if size.flow else VP(), "v" if size.flow else "eps",
        null={name: torch.zeros(shape) for name, shape in text.items()},
        shape=size.tiny_shape if dry else size.shape, call=diffusers_call,
    )  # fmt: skip


def build(part: Part, dry: bool) -> Any:
    """The method with its networks, at random weights."""
    from stillroom.method import get_method

    cls: Any = get_method(part.method)
    method = cls(cls.Options(**OPTIONS[part.method]))
    method.build_from({"teacher": denoiser(SIZES[part.size], dry)})
    return method


def rows(part: Part, dry: bool) -> int:
    return 2 if dry else SIZES[part.size].batch


def settings(part: Part, dry: bool) -> dict[str, Any]:
    """Of the engine."""
    return {
        "steps": 1000,
        "batch": rows(part, dry),
        "device": "cpu" if dry else "cuda",
        "activation_checkpointing": SIZES[part.size].checkpointing,
        **HOW[part.how],
    }


def planned(part: Part, dry: bool) -> int:
    """Bytes of the device that `stillroom plan` would say, without reading a device."""
    from stillroom.engine.config import EngineConfig
    from stillroom.engine.rehearsal import Rehearsal
    from stillroom.surgery.skeleton import emptied, making, weights_unread

    config = EngineConfig(**{**settings(part, dry), "device": "cpu", "compile": False, "parallel": "ddp"})
    with weights_unread() as mode:
        with making():
            method: Any = build(part, dry)
        method = emptied(method, mode)
        turns = Rehearsal(method, Batches(SIZES[part.size], dry, config.batch), config, 1, mode).turn_costs()
    return max(turn.total for turn in turns)


@contextlib.contextmanager
def alone(how: str, device: str) -> Iterator[None]:
    """A process group of one where FSDP2 needs it."""
    from torch import distributed as dist

    if how != "fsdp":
        yield
        return
    with tempfile.TemporaryDirectory() as folder:
        store = dist.FileStore(str(Path(folder) / "store"), 1)
        dist.init_process_group("nccl" if device == "cuda" else "gloo", store=store, rank=0, world_size=1)
        try:
            yield
        finally:
            dist.destroy_process_group()


def measure(part: Part, dry: bool) -> dict[str, float]:
    """``images/s``, ``peak GB`` (on a CUDA device) and, for the ways in :data:`BARE`, ``bare images/s``."""
    import torch

    from stillroom.engine.config import EngineConfig
    from stillroom.engine.stepper import Stepper

    class Sharding(Stepper):
        """Shards on one device too."""

        sharded = property(lambda self: self.config.parallel == "fsdp", lambda self, value: None)  # type: ignore[assignment]

    config = EngineConfig(**settings(part, dry))
    torch.manual_seed(0)
    with alone(part.how, config.device):
        with torch.device(config.device):
            method = build(part, dry)
        batches = Batches(SIZES[part.size], dry, config.batch)
        stepper = Sharding(method, batches, config)
        if not dry:
            torch.cuda.reset_peak_memory_stats()
        found = {"images/s": rate(stepper.take_step, config.batch, dry)}
        if not dry:
            found["peak GB"] = torch.cuda.max_memory_allocated() / 1e9
        del stepper
        _tidy(dry)
        if part.how in BARE:
            found["bare images/s"] = rate(bare(part, method, batches, config, dry), config.batch, dry)
    return found


def rate(step: Callable[[], Any], images: int, dry: bool) -> float:
    """Images per second, after two steps that are not timed."""
    import torch

    wait = (lambda: None) if dry else torch.cuda.synchronize
    for _ in range(2):
        step()
    wait()
    began, done = time.perf_counter(), 0
    while done < FEWEST or (done < MOST and time.perf_counter() - began < SECONDS and not dry):
        step()
        wait()
        done += 1
    return images * done / (time.perf_counter() - began)


def _tidy(dry: bool) -> None:
    import torch

    gc.collect()
    if not dry:
        torch.cuda.empty_cache()


# --- the bare loop ----------------------------------------------------------------------------------------------------
class _Reached(Exception):
    """The tapped block has answered."""


def bare(part: Part, method: Any, batches: Batches, config: Any, dry: bool) -> Callable[[], None]:
    """A step of the same passes, backward passes and optimizer steps on the same networks, written out."""
    import torch
    from torch.nn import functional as F

    device, size = torch.device(config.device), SIZES[part.size]
    data = batches.batch(0, 0, config.batch, slice(0, config.batch))
    real_x, cond = data["x"].to(device), {name: value.to(device) for name, value in data["cond"].items()}
    null = {name: torch.zeros_like(value) for name, value in cond.items()}
    twice = {name: torch.cat([cond[name], null[name]]) for name in cond}
    student, fake, real, last = method.student, method.fake, method.teacher, method.student.process.t_max
    head: Any = getattr(method, "discriminator", None)
    trained = {
        "student": list(method.trained_parameters("student").values()),
        "fake": list(method.trained_parameters("fake").values()),
    }
    if part.method == "dmd2":
        trained["fake"] += list(head.parameters())
    adam = torch.optim.AdamW if part.method == "dmd2" else torch.optim.Adam
    optimizers = {who: adam(weights, LR, fused=True) for who, weights in trained.items()}
    tapped = size.tiny_tapped if dry else size.tapped

    def focus(who: str) -> None:
        for name, weights in trained.items():
            for p in weights:
                p.requires_grad_(name == who)

    def update(who: str, loss: Any) -> None:
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained[who], CLIP)
        optimizers[who].step()
        optimizers[who].zero_grad(set_to_none=True)

    def noised(x: Any) -> tuple[Any, Any, Any]:
        u, eps = 0.02 + 0.96 * torch.rand(len(x), device=device), torch.randn_like(x)
        s = u[:, None, None, None]
        return (1 - s) * x + s * eps, last * u, eps

    def guided(denoiser: Any, x: Any, t: Any) -> Any:
        yes, no = denoiser.native(torch.cat([x, x]), torch.cat([t, t]), twice).chunk(2)
        return no + 4.5 * (yes - no)

    def logits(x: Any) -> Any:
        """The fake score's pass as far as the tapped block, and the head."""
        x_t, t, _ = noised(x)
        seen: list[Any] = []

        def reached(module: Any, args: Any, answer: Any) -> None:
            seen.append(answer[-1] if isinstance(answer, tuple) else answer)
            raise _Reached

        hook = fake.network.get_submodule(tapped).register_forward_hook(reached)
        try:
            with contextlib.suppress(_Reached):
                fake.native(x_t, t, cond)
        finally:
            hook.remove()
        tokens = seen[0].flatten(2).transpose(1, 2) if seen[0].ndim == 4 else seen[0]
        return head.head(tokens)

    def step() -> None:
        half = torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16")
        ask = guided if part.method == "swiftbrush" else lambda who, x, t: who.native(x, t, cond)
        focus("student")
        with half:
            z = torch.randn_like(real_x)
            x0 = z - student.native(z, torch.full((len(z),), last, device=device), cond)
            with torch.no_grad():
                x_t, t, _ = noised(x0)
                push = ask(fake, x_t, t) - ask(real, x_t, t)
            loss = (push * x0).mean()
            if part.method == "dmd2":
                loss = loss + F.softplus(-logits(x0)).mean()
        update("student", loss)
        focus("fake")
        x0 = x0.detach()
        with half:
            x_t, t, eps = noised(x0)
            loss = (fake.native(x_t, t, cond) - (eps - x0)).square().mean()
            if part.method == "dmd2":
                loss = loss + F.softplus(logits(x0)).mean() + F.softplus(-logits(real_x)).mean()
        update("fake", loss)

    return step


# --- the processes ----------------------------------------------------------------------------------------------------
def line_of(problem: BaseException) -> str:
    return f"{type(problem).__name__}: {' '.join(str(problem).split())[:300]}"


def work(dry: bool) -> None:
    """Measures the parts whose names come in, line by line; answers with JSON lines."""
    import torch

    torch.set_float32_matmul_precision("high")
    known = {part.name: part for part in parts()}
    for name in sys.stdin:
        try:
            answer: dict[str, Any] = measure(known[name.strip()], dry)
        except Exception as problem:
            answer = {"error": line_of(problem)}
        _tidy(dry)
        print("@" + json.dumps(answer), flush=True)


class Worker:
    """The process that measures. ``ask`` starts it where there is none."""

    def __init__(self, dry: bool) -> None:
        self.command = [sys.executable, str(Path(__file__)), "--worker", *(["--dry"] if dry else [])]
        self.process: subprocess.Popen[str] | None = None
        self.said: queue.Queue[str | None] = queue.Queue()

    def ask(self, name: str, seconds: float) -> dict[str, Any]:
        if self.process is None:
            self.said = queue.Queue()
            self.process = subprocess.Popen(
                self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
            threading.Thread(target=self._listen, args=(self.process, self.said), daemon=True).start()
            seconds += 30  # for its imports and the device's context
        assert self.process.stdin is not None
        print(name, file=self.process.stdin, flush=True)
        until = time.monotonic() + seconds
        try:
            while True:
                said = self.said.get(timeout=max(0.0, until - time.monotonic()))
                if said is None:
                    code = self.process.wait()
                    self.process = None
                    return {"error": f"the process ended with {code}"}
                if said.startswith("@"):
                    answer = json.loads(said[1:])
                    if "error" in answer and "memory" not in answer["error"]:
                        self.stop()  # a fault of the device outlives the part that met it
                    return answer
        except queue.Empty:
            self.stop()
            return {"error": f"took longer than {seconds:.0f} s"}

    @staticmethod
    def _listen(process: subprocess.Popen[str], said: queue.Queue[str | None]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            said.put(line)
        said.put(None)

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


def plan_apart(part: Part, dry: bool, seconds: float) -> int | str:
    """The plan by a process of its own: bytes, or why there are none."""
    command = [sys.executable, str(Path(__file__)), "--plan", part.name, *(["--dry"] if dry else [])]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, env=environment)
    except subprocess.TimeoutExpired:
        return f"no plan within {seconds:.0f} s"
    answer = [line[1:] for line in done.stdout.splitlines() if line.startswith("@")]
    return int(answer[0]) if answer else (done.stderr.strip().splitlines() or ["no plan"])[-1][:300]


def marked_tests(seconds: float) -> str:
    """The tests for devices: how many passed, or the last lines of what went wrong."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests/engine"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return f"took longer than {seconds:.0f} s"
    last = (done.stdout.strip().splitlines() or [done.stderr.strip()[-200:]])[-1]
    return "ok" if done.returncode == 0 else last


# --- the whole --------------------------------------------------------------------------------------------------------
def check(dry: bool, minutes: float, only: str, out: Path) -> int:
    """Run all parts, write ``out``; the number of parts that failed."""
    import torch

    if not dry and not torch.cuda.is_available():
        print("torch sees no CUDA device; --dry tries the same code on the CPU")
        return 1
    properties: Any = None if dry else torch.cuda.get_device_properties(0)
    device = "the CPU, dry" if dry else properties.name
    memory = 0 if dry else properties.total_memory
    chosen = [part for part in parts() if only in part.name]
    tests = only in "tests"
    print(f"{NAME} on {device}, torch {torch.__version__}: at most {minutes:g} minutes.")
    print(f"{len(chosen) + tests} parts, each with a bound of its own; what time does not suffice for is left out:")
    print("  " + "; ".join([*["marked tests (90 s)"] * tests, *(f"{p.name} ({p.seconds:.0f} s)" for p in chosen)]))
    until, table, bares = time.monotonic() + 60 * minutes, [], {}

    def tell(row: dict[str, Any]) -> None:
        table.append(row)
        print(f"[{60 * minutes - until + time.monotonic():4.0f} s] " + ", ".join(f"{k} {v}" for k, v in row.items()))

    worker = Worker(dry)
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 2) // 3)) as pool:
        plans: dict[str, Future[int | str]] = {}
        for part in chosen:
            key = part.name if part.how == "offload" else part.bare
            plans.setdefault(key, pool.submit(plan_apart, Part(*key.split(), part.seconds), dry, 60 * minutes))
        try:
            if tests:
                began = time.monotonic()
                said = marked_tests(min(90.0, 60 * minutes))
                tell({"part": "marked tests", "seconds": round(time.monotonic() - began, 1), "outcome": said})
            for part in chosen:
                left = until - time.monotonic()
                if left < 5:
                    tell({"part": part.name, "outcome": "skipped: no time left"})
                    continue
                try:
                    plan = plans[part.name if part.how == "offload" else part.bare].result(timeout=left)
                except TooLate:
                    plan = "no plan in time"
                tell(one(part, plan, memory, worker, min(part.seconds, left), bares))
        finally:
            worker.stop()
            pool.shutdown(wait=False, cancel_futures=True)
    write(out, device, table, dry)
    return sum(row["outcome"] != "ok" and not row["outcome"].startswith("skipped") for row in table)


def one(
    part: Part, plan: int | str, memory: int, worker: Worker, seconds: float, bares: dict[str, float]
) -> dict[str, Any]:
    """The row of a part."""
    row: dict[str, Any] = {"part": part.name}
    said = plan if isinstance(plan, str) else ""
    if isinstance(plan, int):
        row["planned GB"] = round(plan / 1e9, 3)
        if memory and plan > MARGIN * memory:
            return row | {"outcome": f"skipped: the device has {memory / 1e9:.0f} GB"}
    began = time.monotonic()
    found = worker.ask(part.name, seconds)
    row["seconds"] = round(time.monotonic() - began, 1)
    if "error" in found:
        return row | {"outcome": found["error"]}
    if "bare images/s" in found:
        bares[part.bare] = found["bare images/s"]
    row["images/s"] = round(found["images/s"], 3)
    if part.bare in bares:
        row["of the bare loop"] = round(found["images/s"] / bares[part.bare], 3)
    if "peak GB" in found:
        row["peak GB"] = round(found["peak GB"], 3)
    return row | {"outcome": f"ok, but its plan failed: {said}" if said else "ok"}


def write(out: Path, device: str, table: list[dict[str, Any]], dry: bool) -> None:
    import torch

    from stillroom.proofs.runner import commit, machine

    result = {
        "name": NAME,
        "statement": f"Steps of two methods on {device}: networks made from the configs of "
        f"{', '.join(size.title for size in SIZES.values())}, random weights; images per second, also as a multiple of "
        "a loop without the engine that does the same work; memory at its highest beside what a plan says.",
        "command": "python tools/gpu_check.py" + (" --dry" if dry else ""),
        "commit": commit(),
        "machine": f"{device}, CUDA {torch.version.cuda}; {machine()}",
        "rows": table,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dry", action="store_true", help="tiny networks on the CPU")
    parser.add_argument("--minutes", type=float, default=8.0, help="for all parts together")
    parser.add_argument("--only", default="", help="parts whose names hold this text")
    parser.add_argument("--out", type=Path, help="default: results/benchmarks/gpu.json")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--plan", default="", help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.worker:
        work(chosen.dry)
        return 0
    if chosen.plan:
        part = next(part for part in parts() if part.name == chosen.plan)
        print(f"@{planned(part, chosen.dry)}")
        return 0
    if chosen.dry and chosen.out is None:
        parser.error("--dry needs --out: what it measures is no result")
    out = chosen.out or ROOT / "results" / "benchmarks" / "gpu.json"
    return int(check(chosen.dry, chosen.minutes, chosen.only, out) > 0)


if __name__ == "__main__":
    raise SystemExit(main())
