"""Timing: cold L2, rivals interleaved, medians with spread, against ceilings of the same run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

Run = Callable[[], object]


@dataclass(frozen=True)
class Measurement:
    """Times of one provider of one case."""

    median_us: float
    """Median time, in microseconds."""
    quartiles_us: tuple[float, float]
    """First and third quartile."""
    peak_bytes: int | None
    """Peak of the allocator above what was there before; None without a GPU."""


def measure(providers: dict[str, Run], device: torch.device, repeats: int = 30) -> dict[str, Measurement]:
    """Time every provider `repeats` times, in turns, after a warm-up of two.

    On CUDA each is captured as a graph where it can be, so that Python's launch cost does not count, and L2
    is overwritten before each run.
    """
    if device.type != "cuda":
        samples = {name: [] for name in providers}
        for i in range(2 + repeats):
            for name, run in providers.items():
                began = time.perf_counter()
                run()
                if i >= 2:
                    samples[name].append(1e6 * (time.perf_counter() - began))
        return {name: _summary(values, None) for name, values in samples.items()}
    peaks = {name: _peak_bytes(run) for name, run in providers.items()}
    samples = _cuda_samples({name: _captured(run) for name, run in providers.items()}, device, repeats)
    return {name: _summary(values, peaks[name]) for name, values in samples.items()}


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


def _peak_bytes(run: Run) -> int:
    """Warm up on the way: compilers and kernels are ready after two runs."""
    for _ in range(2):
        run()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _captured(run: Run) -> Run:
    """The run as a CUDA graph; itself where it cannot be captured."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            run()
    except RuntimeError:
        torch.cuda.synchronize()
        return run
    return graph.replay


def _summary(samples: list[float], peak_bytes: int | None) -> Measurement:
    first, median, third = statistics.quantiles(samples, n=4)
    return Measurement(median, (first, third), peak_bytes)


def ceilings(device: torch.device) -> dict[str, float]:
    """This machine's own limits: copy bandwidth in bytes/s, bfloat16 product in operations/s."""
    on_gpu = device.type == "cuda"
    size, n = (2**30, 8192) if on_gpu else (2**24, 512)
    source = torch.empty(size, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16)
    times = measure({"copy": lambda: target.copy_(source), "product": lambda: a @ a}, device)
    return {
        "copy_bytes_per_s": 2 * size / times["copy"].median_us * 1e6,
        "product_operations_per_s": 2 * n**3 / times["product"].median_us * 1e6,
    }
