"""What a network costs: parameters, multiply-accumulates, latency, peak memory, and network evaluations per sample."""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stillroom.diffusion.denoiser import Denoiser
from stillroom.diffusion.routed import RoutedDenoiser
from stillroom.errors import UserError
from stillroom.folders.diffusers_networks import some_conditions
from stillroom.surgery.skeleton import Answered, emptied, unshared, weights_unread


def macs(function: Callable[[], Any]) -> int:
    """Multiply-accumulates of one call, counted by torch's operator counter (matrix products, convolutions, attention),
    which reports two floating-point operations for each."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    # the counter does not know the CPU's fused attention; as plain matrix products it counts everywhere alike
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops() // 2


def forward_flops(denoiser: Denoiser) -> int:
    """Floating-point operations of one evaluation for one sample, without guidance, as torch counts them: on tensors
    without values, so that it takes no memory and nearly no time. Where the network's values would be needed, two for
    each weight. Of several experts, those of the costliest."""
    if isinstance(denoiser, RoutedDenoiser):
        return max(forward_flops(one) for one in denoiser.experts.values())
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    one = some_conditions(denoiser)
    try:
        with torch.random.fork_rng(), torch.no_grad(), weights_unread() as mode:
            copied = emptied(unshared(denoiser), mode)
            with mode, Answered(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
                given = {name: torch.empty((1, *value.shape), dtype=value.dtype) for name, value in one.items()}
                copied(torch.empty(1, *denoiser.shape), torch.full((1,), 0.5), given)
            return counter.get_total_flops()
    except Exception:  # of foreign networks anything may come; all that is lost is a better guess
        return 2 * sum(p.numel() for p in denoiser.parameters())


def median_ms(function: Callable[[], Any], seconds: float = 1.0, most: int = 30) -> tuple[float, int]:
    """Wall-clock milliseconds of one call, and of how many calls they are the median: after a first one as many as
    ``seconds`` hold, at least one."""
    taken: list[float] = []
    with torch.no_grad():
        began = time.perf_counter()
        _timed(lambda _: function(), 1)
        while not taken or (len(taken) < most and time.perf_counter() - began < seconds):
            taken.append(_timed(lambda _: function(), 1))
    return 1000 * statistics.median(taken), len(taken)


@dataclass(frozen=True)
class Latency:
    """Wall-clock milliseconds per call of a whole batch."""

    batch: int
    median_ms: float
    p95_ms: float
    runs: int
    threads: int

    def __str__(self) -> str:
        return (
            f"batch {self.batch}: median {self.median_ms:.2f} ms, p95 {self.p95_ms:.2f} ms "
            f"({self.runs} runs, {self.threads} thread{'s' if self.threads > 1 else ''})"
        )


def latency(
    function: Callable[[int], Any], batches: tuple[int, ...] = (1, 32), runs: int = 30, warm_up: int = 5
) -> list[Latency]:
    """Time ``function(batch)`` per batch size: median and 95th percentile of ``runs`` >= 30 calls after ``warm_up``.

    torch's thread count is stated in the result; set it before with ``torch.set_num_threads``.
    """
    if runs < 30:
        raise ValueError(f"a 95th percentile needs at least 30 runs, got {runs}")
    results = []
    for batch in batches:
        with torch.no_grad():
            for _ in range(warm_up):
                function(batch)
            seconds = torch.tensor([_timed(function, batch) for _ in range(runs)], dtype=torch.float64)
        median, p95 = (1000 * torch.quantile(seconds, torch.tensor([0.5, 0.95], dtype=torch.float64))).tolist()
        results.append(Latency(batch, median, p95, runs, torch.get_num_threads()))
    return results


def _timed(function: Callable[[int], Any], batch: int) -> float:
    began = time.perf_counter()
    function(batch)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


@dataclass(frozen=True)
class PeakMemory:
    """Resident memory of a process of its own, in MiB: ``before`` the call (interpreter, imports) and at the peak."""

    before: float
    peak: float

    @property
    def added(self) -> float:
        return self.peak - self.before


def peak_memory(function: Callable[..., Any], *arguments: Any) -> PeakMemory:
    """Run ``function(*arguments)`` in a fresh process and read that process's own high-water mark (Linux ``VmHWM``).

    A fresh process, because inside a running one the mark holds everything that ran before, freed memory stays with the
    allocator, and ``ru_maxrss`` of a child inherits its parent's size. ``function`` must be importable by name (no
    lambda); its arguments must pickle.
    """
    context = multiprocessing.get_context("spawn")
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(sending, function, arguments))
    process.start()
    sending.close()
    try:
        answer = receiving.recv()
    except EOFError:
        answer = None
    process.join()
    if answer is None:
        raise RuntimeError(f"the measured process ended with exit code {process.exitcode}")
    if isinstance(answer, str):
        raise RuntimeError(f"the measured function failed: {answer}")
    return PeakMemory(*answer)


def _measure(sending: Any, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    try:
        before = _status("VmRSS")
        function(*arguments)
        sending.send((before, _status("VmHWM")))
    except BaseException as problem:  # the parent must hear of every end, also of SystemExit
        sending.send(f"{type(problem).__name__}: {problem}")


def _status(field: str) -> float:
    try:
        with open("/proc/self/status") as file:
            line = next(line for line in file if line.startswith(field + ":"))
    except (OSError, StopIteration):
        raise UserError("peak memory is read from /proc, which this system lacks", cure="measure it on Linux") from None
    return int(line.split()[1]) / 1024


@dataclass
class Evaluations:
    """Forward passes seen: ``calls``, and ``rows`` summed over their batches."""

    calls: int = 0
    rows: int = 0

    def per_sample(self, samples: int) -> float:
        """Network evaluations per finished sample (NFE). Guidance counts as two, whether made in one call or in two."""
        return self.rows / samples


@contextmanager
def count_evaluations(network: nn.Module) -> Iterator[Evaluations]:
    """Count the forward passes of ``network`` inside the ``with``: ``with count_evaluations(net) as seen: ...``."""
    seen = Evaluations()

    def note(module: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
        first = next(v for v in (*positional, *named.values()) if isinstance(v, Tensor))
        seen.calls += 1
        seen.rows += len(first)

    handle = network.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()
