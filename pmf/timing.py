"""Compare the time of functions fairly: run in turn on a cold L2; medians, quartiles, peak memory, machine ceilings.

    for record in measure({"mine": lambda: my_step, "pmf": lambda: pmf_step}, torch.device("cuda")):
        print(record)

`triton.testing` is not a substitute: `do_bench` times one function after the other, so clock speeds drift between them,
and `do_bench_cudagraph` leaves L2 warm.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import profile

from pmf.counting import live_bytes
from pmf.errors import checked_device, first_line, require
from pmf.fields import check_values

Run = Callable[[], Any]
Providers = Mapping[str, Callable[[], Run]]
"""Name -> a function that puts the inputs on the device and returns the function to time."""
Record = dict[str, Any]
FEWEST = 3
"""Minimum number of repeats for a median and quartiles."""
PROFILE_ROWS = 25
"""Operators listed in a record's profile; its `table` has all of them."""


def failed(error: Exception | str) -> Record:
    """A record of a failed measurement, with the reason."""
    reason = error if isinstance(error, str) else f"{type(error).__name__}: {first_line(error)[:300]}"
    return {"status": "failed", "error": reason}


def measure(
    providers: Providers,
    device: torch.device,
    repeats: int = 30,
    seconds: float = math.inf,
    *,
    graphs: bool = True,
    detailed: bool = False,
    live: bool = False,
    replaying: Collection[str] = (),
) -> Iterator[Record]:
    """Yield a record per provider: all are timed `repeats` times in turn, or fewer times to stay within `seconds`.

    On CUDA, L2 is overwritten before each run. With `graphs`, a run is replayed as a CUDA graph if it can be captured,
    so that Python's launch cost does not count; the current stream must then not be the default one. `detailed` adds
    `details`. `live` counts the peak of tensors on the CPU too, which compiled runs do not allow. `replaying` names
    providers that replay their own graphs; see `warm_up`. A provider that fails does not affect others: its record has
    the status "failed" and an `error`. The other records have `median_us`, `quartiles_us`, `repeats`, `captured`
    (whether a graph was timed), and the memory fields of `warm_up`.
    """
    runs: dict[str, Run] = {}
    records: dict[str, Record] = {}
    once = 0.0
    for name, prepare in providers.items():
        try:
            run = prepare()
            memory, took = warm_up(run, device, name in replaying, live)
            replay = graph_of(run) if graphs and device.type == "cuda" else None
            runs[name], once = replay or run, once + took
            records[name] = {"provider": name, "status": "measured", **memory, "captured": replay is not None}
        except Exception as error:
            yield {"provider": name, **failed(error)}
    repeats = max(FEWEST, int(min(repeats, seconds / max(once, 1e-9))))
    clock = _cuda_clock(device) if device.type == "cuda" else _cpu_clock
    ends: dict[str, list[Callable[[], float]]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            ends[name].append(clock(run))
    synchronize(device)
    for name, run in runs.items():
        first, median, third = statistics.quantiles((end() for end in ends[name]), n=4)
        record = {**records[name], "median_us": median, "quartiles_us": (first, third), "repeats": repeats}
        try:
            yield {**record, **(details(run, device, min(repeats, 5)) if detailed else {})}
        except Exception as error:
            yield {**record, "note": failed(error)["error"]}


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has finished its work; a no-op on other devices."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def warm_up(run: Run, device: torch.device, replays: bool = False, live: bool = False) -> tuple[Record, float]:
    """Run three times; return the memory used (None without a GPU) and the seconds of the last run.

    peak_bytes: the allocator's peak in the last run above what was allocated before it; in the first run if the run
    `replays` a graph, since a replay allocates nothing. A run with a method `peak_bytes` reports its own peak. On the
    CPU, if `live`, `pmf.counting.live_bytes` counts it in a fourth run.
    reserved_bytes: all memory that the allocator holds, including pools of graphs.
    held_bytes: only if the run has a method of this name, which reports it.
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
    peak, source = (peaks[0], "warm-up and capture") if replays else (peaks[-1], "a warm run")
    if hasattr(run, "peak_bytes"):
        peak, source = run.peak_bytes(), "its own count"
    elif live and not on_gpu:
        peak, source = live_bytes(run).peak, "live tensors"
    reserved = torch.cuda.memory_reserved(device) if on_gpu else None
    held = {"held_bytes": run.held_bytes()} if hasattr(run, "held_bytes") else {}
    return {"peak_bytes": peak, "peak_from": source, "reserved_bytes": reserved, **held}, seconds


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


def graph_of(run: Run) -> Run | None:
    """A function that replays the run as a CUDA graph, or None if the run cannot be captured.

    Captures on the current stream, which must not be the default one: backward runs on the stream that forward was
    recorded on, and a failed capture leaves its own stream current.
    """
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph, stream=stream):
            run()
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return graph.replay


def ceilings(device: torch.device) -> dict[str, float]:
    """This machine's own limits: copy bandwidth in bytes/s (read and written), bfloat16 product in operations/s."""
    size, n = (2**30, 8192) if device.type == "cuda" else (2**24, 512)
    source = torch.empty(size, dtype=torch.int8, device=device)
    target, a = torch.empty_like(source), torch.randn(n, n, device=device, dtype=torch.bfloat16)
    runs: Providers = {"copy": lambda: lambda: target.copy_(source), "product": lambda: lambda: a @ a}
    # Not as CUDA graphs: a graph copies with a copy engine, at two thirds of what kernels reach on an H200.
    copy, product = (record["median_us"] / 1e6 for record in measure(runs, device, graphs=False))
    return {"copy_bytes_per_s": 2 * size / copy, "product_operations_per_s": 2 * n**3 / product}


def details(run: Run, device: torch.device, repeats: int = 5) -> Record:
    """Host time of a whole step, and the time of its kernels and operators.

    host_us: median time to enqueue a run on an idle device, without waiting for it. busy_us, launches: totals over all
    kernels, None on the CPU. profile: operators, sorted by time spent in their launches. table: kernels and operators.
    """
    host = []
    for _ in range(repeats):
        synchronize(device)
        host.append(_cpu_clock(run)())
    synchronize(device)
    with profile() as profiler:
        run()
        synchronize(device)
    rows, on_gpu = profiler.key_averages(), device.type == "cuda"
    spent = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    kernels = [row for row in rows if row.device_type == DeviceType.CUDA and not row.is_user_annotation]
    operators = [(row.key[:120], getattr(row, spent), row.count) for row in rows if row.device_type == DeviceType.CPU]
    total = max(sum(took for _, took, _ in operators), 1e-9)
    operators.sort(key=lambda operator: -operator[1])
    return {
        "host_us": statistics.median(host),
        "busy_us": sum(row.self_device_time_total for row in kernels) if on_gpu else None,
        "launches": sum(row.count for row in kernels) if on_gpu else None,
        "profile": [(name, took / total, count) for name, took, count in operators[:PROFILE_ROWS]],
        "table": rows.table(sort_by=spent, row_limit=-1, max_name_column_width=100),
    }


def comparison(runs: Mapping[str, Run], device: torch.device | str, repeats: int = 5) -> str:
    """Time and peak memory of each run as a table in Markdown; ratios are to the first run.

    The times are medians of interleaved runs; memory is what a run allocates, at its peak: on a GPU by the allocator,
    on the CPU by `pmf.counting.live_bytes`. A run that fails has its error in the table.
    """
    check_values(Mapping, runs=runs)
    require(len(runs) > 0, "runs: expected at least one, got none")
    place = checked_device(device)
    providers = {name: (lambda run=run: run) for name, run in runs.items()}
    records = {r["provider"]: r for r in measure(providers, place, repeats, graphs=False, live=True)}
    first = records[next(iter(runs))]

    def cell(record: Record, key: str, unit: float) -> str:
        ratio = f" ({record[key] / first[key]:.2f})" if first.get(key) else ""
        return f"{record[key] / unit:.4g}{ratio}"

    lines = ["| | ms | peak MB |", "|---|---|---|"]
    for name, record in ((name, records[name]) for name in runs):
        figures = ("median_us", 1e3), ("peak_bytes", 1e6)
        cells = [record["error"], ""] if "error" in record else [cell(record, *figure) for figure in figures]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)
