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
    ways = _memory_ways(config, processes, rows, budget, count)
    change = f"set {' or '.join(ways)}" if ways else "more GPUs with --sharding fsdp, larger ones, or a smaller network"
    return f"memory: {gigabytes(memory.expected(rows))} expected, {gigabytes(free)} free: {change}"


def _memory_ways(
    config: RunConfig, processes: int, rows: int, budget: float, count: Callable[[str], TrainingMemory]
) -> list[str]:
    """The flags that make it fit, the least change first: one or the other, else both, else sharding with them."""

    def smaller(memory: TrainingMemory) -> list[str]:
        size = largest_device_batch(config.batch_size, processes, min(rows, memory.largest_batch(budget)))
        return [f"--device-batch {size}"] if size else []

    blocks = count("block")
    ways = ["--checkpointing block"] if blocks.expected(rows) <= budget else []
    ways += smaller(count(config.checkpointing))
    if not ways:
        ways = [f"--checkpointing block {way}" for way in smaller(blocks)]
    if not ways and config.sharding == "ddp" and processes > 1:
        ways = [f"--sharding fsdp --checkpointing block {way}" for way in smaller(blocks.sharded(processes))]
    return ways


def largest_device_batch(batch_size: int, processes: int, rows: int) -> int:
    """The largest power of two up to `rows` into which every process's share of a batch divides; 0: none.

    At least 2, since half of the rows of a device batch are flow-matching ones.
    """
    sizes = (2**power for power in range(rows.bit_length() - 1, 0, -1))
    return next((size for size in sizes if batch_size % (size * processes) == 0), 0)


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
        return f"{found}: set --workers {cores}, all cores of this process, and read faster"
    return f"{found}: a faster disk, more cores, or `pmf data prepare --encoding npy`, which needs no decoding"


def worker_advice(workers: int, local: int, cores: int) -> str | None:
    """What to change where the processes of this machine start more workers than it has cores; None: nothing."""
    if workers * local <= cores or workers <= 1:
        return None
    total = f"{local} x {workers} workers" if local > 1 else f"{workers} workers"
    return f"workers: {total} on {cores} cores: set --workers {max(1, cores // local)}"


def precision_advice(half: bool, able: bool, device: str) -> str | None:
    """What to change about bfloat16 products (`half`) on a device that is able to do them or not; None: nothing."""
    if half and not able:
        return "products: this GPU has no bfloat16: set --precision float32, or take a newer GPU"
    if not half and able and device == "cuda":
        return "products: float32 is several times slower than bfloat16: set --precision bfloat16"
    return None


def duration(seconds: float) -> str:
    """Seconds in minutes, hours or days."""
    size, unit = next((pair for pair in ((86400, "days"), (3600, "hours")) if seconds >= 2 * pair[0]), (60, "minutes"))
    return f"{seconds / size:,.1f} {unit}"


def gigabytes(size: float) -> str:
    """Bytes in units of 10^9 or 10^6."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.3g} MB"
