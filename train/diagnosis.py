"""What to change about a run: pure functions of what was counted and measured, for `pmf doctor`."""

from __future__ import annotations

import math
from collections.abc import Callable

from pmf.memory import TrainingMemory
from pmf.train.config import RunConfig

HEADROOM = 0.9
"""Share of the free memory that what is counted may fill; the rest is for buffers that come and go."""
PATIENCE = 20
"""Without workers a step waits for its images: they may take a twentieth of its time."""


def memory_advice(
    config: RunConfig, processes: int, rows: int, free: int, count: Callable[[str], TrainingMemory]
) -> str | None:
    """What to change so that `rows` images at a time fit into `free` bytes of each process's device; None: nothing.

    `count`: the memory of one process under a checkpointing, sharded as configured.
    """
    budget = HEADROOM * free
    memory = count(config.checkpointing)
    if memory.expected(rows) <= budget:
        return None
    ways = []
    if config.checkpointing == "none" and count("block").expected(rows) <= budget:
        ways.append("--checkpointing block")
    fitting = largest_device_batch(config.batch_size, processes, min(rows, memory.largest_batch(budget)))
    if fitting:
        ways.append(f"--device-batch {fitting}")
    if not ways and config.sharding == "ddp" and processes > 1:
        whole = count("block").sharded(processes)
        fitting = largest_device_batch(config.batch_size, processes, min(rows, whole.largest_batch(budget)))
        if fitting:
            ways.append(f"--sharding fsdp --checkpointing block --device-batch {fitting}")
    change = f"set {' or '.join(ways)}" if ways else "more GPUs with --sharding fsdp, larger ones, or a smaller network"
    return f"memory: {gigabytes(memory.expected(rows))} expected, {gigabytes(free)} free: {change}"


def largest_device_batch(batch_size: int, processes: int, rows: int) -> int:
    """The largest power of two up to `rows` into which every process's share of a batch divides; 0: none."""
    sizes = (2**power for power in reversed(range(max(rows, 0).bit_length())))
    return next((size for size in sizes if size <= rows and batch_size % (size * processes) == 0), 0)


def data_advice(served: float, needed: float, workers: int, cores: int) -> str | None:
    """What to change so that data keep up with a step, in images per second of one process; None: nothing.

    `cores`: those that each process may use.
    """
    if served >= (needed if workers else PATIENCE * needed):
        return None
    found = f"data: {served:,.0f} images/s with {workers} workers, the step takes {needed:,.0f}"
    wanted = max(1, math.ceil(1.2 * needed / (served / max(workers, 1))))
    if wanted <= cores:
        return f"{found}: set --workers {wanted}"
    if workers < cores:
        return f"{found}: set --workers {cores}, all cores of this process, which may not do: a faster disk, more cores"
    return f"{found}: a faster disk, more cores, or `pmf data prepare --encoding npy`, which needs no decoding"


def worker_advice(workers: int, local: int, cores: int) -> str | None:
    """What to change where the processes of this machine start more workers than it has cores; None: nothing."""
    if workers * local <= cores or workers <= 1:
        return None
    total = f"{local} x {workers} workers" if local > 1 else f"{workers} workers"
    return f"workers: {total} on {cores} cores: set --workers {max(1, cores // local)}"


def gigabytes(size: float) -> str:
    """Bytes in units of 10^9 or 10^6."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"
