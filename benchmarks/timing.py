"""Time providers in turns on a cold L2: medians with quartiles, peak memory, and the ceilings of the same run.

`triton.testing` is no substitute: `do_bench` times one function after the other, so that clocks drift between rivals,
and `do_bench_cudagraph` leaves L2 warm.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.autograd import DeviceType
from torch.profiler import profile

from pmf.benchmarks.cases import Run
from pmf.benchmarks.ledger import Record

FEWEST = 3
"""Repeats that a median and its quartiles need."""
PROFILE_ROWS = 25
"""Operators that a record names; the whole table is a file of its own."""


@dataclass(frozen=True)
class WarmRun:
    """A provider whose kernels and graphs are compiled, with the seconds and the memory of its warm-up."""

    run: Run
    seconds: float
    memory: Record


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def warm_up(run: Run, device: torch.device, captured: bool = False) -> WarmRun:
    """Run three times; the last tells the seconds.

    peak_bytes: the allocator's peak above what was allocated before, in the last run. A replayed graph allocates
    nothing, so that of a `captured` run is of the first; a run with a method `peak_bytes` counts its own.
    reserved_bytes: what the allocator holds, pools of graphs included. Both are None without a GPU.
    """
    on_gpu, peaks, seconds = device.type == "cuda", [], 0.0
    for _ in range(3):
        synchronize(device)
        before = torch.cuda.memory_allocated(device) if on_gpu else 0
        torch.cuda.reset_peak_memory_stats(device) if on_gpu else None
        began = time.perf_counter()
        run()
        synchronize(device)
        seconds = time.perf_counter() - began
        peaks.append(torch.cuda.max_memory_allocated(device) - before if on_gpu else None)
    peak, source = (peaks[0], "warm-up and capture") if captured else (peaks[-1], "a warm run")
    if hasattr(run, "peak_bytes"):
        peak, source = run.peak_bytes(), "its own count"
    reserved = torch.cuda.memory_reserved(device) if on_gpu else None
    return WarmRun(run, seconds, {"peak_bytes": peak, "peak_from": source, "reserved_bytes": reserved})


def measure(
    providers: dict[str, WarmRun],
    device: torch.device,
    repeats: int = 30,
    seconds: float = math.inf,
    capture: bool = True,
) -> dict[str, Record]:
    """Time every provider `repeats` times, in turns; fewer times where all would not fit into `seconds`.

    On CUDA, L2 is overwritten before each run. With `capture` a run is replayed as a CUDA graph where it can be, so
    that Python's launch cost does not count.
    """
    on_gpu = device.type == "cuda"
    once = sum(warm.seconds for warm in providers.values())
    repeats = max(FEWEST, int(min(repeats, seconds / max(once, 1e-9))))
    runs = {name: _captured(warm.run) if capture and on_gpu else (warm.run, False) for name, warm in providers.items()}
    clock = _cuda_clock(device) if on_gpu else _cpu_clock
    ends: dict[str, list[Callable[[], float]]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, (run, _) in runs.items():
            ends[name].append(clock(run))
    synchronize(device)
    found = {}
    for name, (_, captured) in runs.items():
        first, median, third = statistics.quantiles((end() for end in ends[name]), n=4)
        times = {"median_us": median, "quartiles_us": (first, third), "repeats": repeats, "captured": captured}
        found[name] = {**times, **providers[name].memory}
    return found


def _cpu_clock(run: Run) -> Callable[[], float]:
    began = time.perf_counter()
    run()
    took = 1e6 * (time.perf_counter() - began)
    return lambda: took


def _cuda_clock(device: torch.device) -> Callable[[Run], Callable[[], float]]:
    flush = torch.empty(4 * torch.cuda.get_device_properties(device).L2_cache_size, dtype=torch.int8, device=device)

    def clock(run: Run) -> Callable[[], float]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        start.record()
        run()
        end.record()
        return lambda: 1e3 * start.elapsed_time(end)

    return clock


def _captured(run: Run) -> tuple[Run, bool]:
    """The run as a CUDA graph, and True; itself, and False, where it cannot be captured.

    Captured on the current stream, which must not be the default one: backward runs on the stream that forward was
    recorded on, and a failed capture leaves its own stream current.
    """
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph, stream=stream):
            run()
    except RuntimeError:
        torch.cuda.synchronize()
        return run, False
    return graph.replay, True


def ceilings(device: torch.device) -> dict[str, float]:
    """This machine's own limits: copy bandwidth in bytes/s (read and written), bfloat16 product in operations/s."""
    size, n = (2**30, 8192) if device.type == "cuda" else (2**24, 512)
    source = torch.empty(size, dtype=torch.int8, device=device)
    target, a = torch.empty_like(source), torch.randn(n, n, device=device, dtype=torch.bfloat16)
    warm = {"copy": warm_up(lambda: target.copy_(source), device), "product": warm_up(lambda: a @ a, device)}
    # Not as CUDA graphs: a graph copies with a copy engine, at two thirds of what kernels reach on an H200.
    seconds = {name: times["median_us"] / 1e6 for name, times in measure(warm, device, capture=False).items()}
    return {
        "copy_bytes_per_s": 2 * size / seconds["copy"],
        "product_operations_per_s": 2 * n**3 / seconds["product"],
    }


def host_us(run: Run, device: torch.device, repeats: int = 5) -> float:
    """Median microseconds that the host takes to enqueue a run: it starts on an idle device and does not wait."""
    samples = []
    for _ in range(repeats):
        synchronize(device)
        samples.append(_cpu_clock(run)())
    synchronize(device)
    return statistics.median(samples)


def profiled(run: Run, device: torch.device) -> Record:
    """Time and number of a run's kernels (None on the CPU), operators by the time they launched, as a table too."""
    with profile() as profiler:
        run()
        synchronize(device)
    rows, on_gpu = profiler.key_averages(), device.type == "cuda"
    time_of = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    kernels = [row for row in rows if row.device_type == DeviceType.CUDA and not row.is_user_annotation]
    operators = [(row.key[:120], getattr(row, time_of), row.count) for row in rows if row.device_type == DeviceType.CPU]
    busy = sum(row.self_device_time_total for row in kernels)
    whole = max(sum(took for _, took, _ in operators), 1e-9)
    operators.sort(key=lambda operator: -operator[1])
    return {
        "busy_us": busy if on_gpu else None,
        "launches": sum(row.count for row in kernels) if on_gpu else None,
        "profile": [(name, took / whole, count) for name, took, count in operators[:PROFILE_ROWS]],
        "table": rows.table(sort_by=time_of, row_limit=-1, max_name_column_width=100),
    }
