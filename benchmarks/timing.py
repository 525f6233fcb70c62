"""Timing: cold L2, rivals interleaved, medians with spread, against ceilings of the same run."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

Run = Callable[[], object]
FEWEST = 3
"""Repeats that a median and its quartiles need at the least."""


@dataclass(frozen=True)
class Ready:
    """A provider after its warm-up: compilers and kernels are ready."""

    run: Run
    seconds: float
    """What its last warm-up run took."""
    peak_bytes: int | None
    """Peak of the allocator above what was there before; None without a GPU."""
    peak_from: str = "a warm run"
    """What that peak is of, for a run that counts its own."""
    reserved_bytes: int | None = None
    """What PyTorch's allocator holds after the run, pools of CUDA graphs with it; None without a GPU."""


@dataclass(frozen=True)
class Measurement:
    """Times of one provider of one case."""

    median_us: float
    """Median time, in microseconds."""
    quartiles_us: tuple[float, float]
    """First and third quartile."""
    repeats: int
    """Timed runs."""
    captured: bool
    """Replayed as a CUDA graph."""
    peak_bytes: int | None
    """This and the next two as in `Ready`."""
    peak_from: str
    reserved_bytes: int | None


def warm_up(run: Run, device: torch.device) -> Ready:
    """Run three times; the last tells time and peak memory. A run with `peak_bytes()` counts its own."""
    on_gpu = device.type == "cuda"
    for _ in range(2):
        run()
    if on_gpu:
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
    began = time.perf_counter()
    run()
    peak = reserved = None
    if on_gpu:
        torch.cuda.synchronize(device)
        peak, reserved = torch.cuda.max_memory_allocated(device) - before, torch.cuda.memory_reserved(device)
    seconds = time.perf_counter() - began
    own = getattr(run, "peak_bytes", None)
    if own is None:
        return Ready(run, seconds, peak, reserved_bytes=reserved)
    return Ready(run, seconds, own(), getattr(run, "peak_from", "its own count"), reserved)


def measure(
    providers: dict[str, Ready],
    device: torch.device,
    repeats: int = 30,
    seconds: float = math.inf,
    capture: bool = True,
) -> dict[str, Measurement]:
    """Time every provider `repeats` times, in turns; fewer times where all would not fit into `seconds`.

    On CUDA, L2 is overwritten before each run; with `capture` each is a CUDA graph where it can be, so
    that Python's launch cost does not count.
    """
    once = sum(ready.seconds for ready in providers.values())
    repeats = max(FEWEST, min(repeats, int(min(seconds / once, repeats)))) if once > 0 else repeats
    if device.type != "cuda":
        samples = _cpu_samples({name: ready.run for name, ready in providers.items()}, repeats)
        return {name: _summary(samples[name], False, ready) for name, ready in providers.items()}
    runs = {name: _captured(ready.run) if capture else (ready.run, False) for name, ready in providers.items()}
    samples = _cuda_samples({name: run for name, (run, _) in runs.items()}, device, repeats)
    return {name: _summary(samples[name], runs[name][1], ready) for name, ready in providers.items()}


def _cpu_samples(providers: dict[str, Run], repeats: int) -> dict[str, list[float]]:
    samples: dict[str, list[float]] = {name: [] for name in providers}
    for _ in range(repeats):
        for name, run in providers.items():
            began = time.perf_counter()
            run()
            samples[name].append(1e6 * (time.perf_counter() - began))
    return samples


def _cuda_samples(providers: dict[str, Run], device: torch.device, repeats: int) -> dict[str, list[float]]:
    l2 = torch.cuda.get_device_properties(device).L2_cache_size
    flush = torch.empty(4 * l2, dtype=torch.int8, device=device)
    events: dict[str, list] = {name: [] for name in providers}
    for _ in range(repeats):
        for name, run in providers.items():
            flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            events[name].append((start, end))
    torch.cuda.synchronize(device)
    return {name: [1e3 * start.elapsed_time(end) for start, end in pairs] for name, pairs in events.items()}


def _captured(run: Run) -> tuple[Run, bool]:
    """The run as a CUDA graph, and True; itself, and False, where it cannot be captured.

    Captured on the current stream, no default one: backward runs where forward was recorded, and a capture that
    fails leaves its stream as the current one.
    """
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph, stream=stream):
            run()
    except RuntimeError:
        torch.cuda.synchronize()
        return run, False
    return graph.replay, True


def _summary(samples: list[float], captured: bool, ready: Ready) -> Measurement:
    first, median, third = statistics.quantiles(samples, n=4)
    memory = (ready.peak_bytes, ready.peak_from, ready.reserved_bytes)
    return Measurement(median, (first, third), len(samples), captured, *memory)


def ceilings(device: torch.device) -> dict[str, float]:
    """This machine's own limits: copy bandwidth in bytes/s, bfloat16 product in operations/s."""
    on_gpu = device.type == "cuda"
    size, n = (2**30, 8192) if on_gpu else (2**24, 512)
    source = torch.empty(size, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16)
    runs = {"copy": lambda: target.copy_(source), "product": lambda: a @ a}
    # Not as CUDA graphs: a graph copies by a copy engine, at two thirds of what kernels reach on an H200.
    times = measure({name: warm_up(run, device) for name, run in runs.items()}, device, capture=False)
    return {
        "copy_bytes_per_s": 2 * size / times["copy"].median_us * 1e6,
        "product_operations_per_s": 2 * n**3 / times["product"].median_us * 1e6,
    }


def host_us(run: Run, device: torch.device, repeats: int = 5) -> float:
    """What the host takes to enqueue a run, median in microseconds: it starts on an idle device and does not wait."""
    samples = []
    for _ in range(repeats):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        run()
        samples.append(1e6 * (time.perf_counter() - began))
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return statistics.median(samples)


@dataclass(frozen=True)
class Profile:
    """What one run spends its time in: CUDA kernels and copies, or operators on the CPU."""

    kernels: list[tuple[str, float, int]]
    """Name, microseconds in all, calls; the largest first."""
    span_us: float
    """From the first start to the last end; the profiler itself slows the host."""

    @property
    def launches(self) -> int:
        """Kernels and copies that ran."""
        return sum(calls for _, _, calls in self.kernels)

    @property
    def busy_us(self) -> float:
        """Sum of their times."""
        return sum(took for _, took, _ in self.kernels)

    def table(self, top: int | None = None) -> str:
        """Aligned columns: microseconds, share, calls, name; the first `top`, or all."""
        gaps = max(self.span_us - self.busy_us, 0.0)
        head = f"{self.launches} launches, busy {self.busy_us:.0f} us of {self.span_us:.0f} us, gaps {gaps:.0f} us"
        rows = (f"{took:11.1f} {took / self.busy_us:7.2%} {n:6}  {name}" for name, took, n in self.kernels[:top])
        return "\n".join([head, f"{'us':>11} {'share':>7} {'calls':>6}  name", *rows]) + "\n"


def profiled(run: Run, device: torch.device) -> Profile:
    """Profile one run."""
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiler:
        run()
        if on_gpu:
            torch.cuda.synchronize(device)
    if on_gpu:
        return profile_of(profiler.events())
    events = [event for event in profiler.events() if event.device_type == DeviceType.CPU]
    return _profile([(event.name, float(event.self_cpu_time_total), event.time_range) for event in events])


def profile_of(events) -> Profile:
    """The kernels among a profiler's events; ours by the operator that launched them, for their names are alike."""
    ran = [(event.name, event.time_range) for event in events if event.device_type == DeviceType.CUDA]
    ours: dict[tuple[str, float], list[str]] = {}
    for event in events:
        if event.device_type == DeviceType.CPU and event.name.startswith("pmf::"):
            for kernel in event.kernels:
                ours.setdefault((kernel.name, float(kernel.duration)), []).append(f"{kernel.name} of {event.name}")
    named = []
    for name, times in ran:
        took = float(times.elapsed_us())
        operators = ours.get((name, took))
        named.append((operators.pop() if operators else name, took, times))
    return _profile(named)


def _profile(ran: list) -> Profile:
    """From names, microseconds and time ranges."""
    spent: dict[str, tuple[float, int]] = {}
    for name, took, _ in ran:
        total, calls = spent.get(name, (0.0, 0))
        spent[name] = (total + took, calls + 1)
    kernels = sorted(((name, took, calls) for name, (took, calls) in spent.items()), key=lambda entry: -entry[1])
    span = max(times.end for *_, times in ran) - min(times.start for *_, times in ran) if ran else 0.0
    return Profile(kernels, float(span))
