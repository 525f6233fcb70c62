"""The memory of a run against that of a card: what a process holds, and the largest device batches of the presets."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import replace

import torch

import pmf
from pmf import dispatch
from pmf.config import PUBLISHED
from pmf.counting import row_operations
from pmf.memory import TrainingMemory, training_memory
from pmf.model import CHECKPOINTING, Checkpointing
from pmf.train.config import RunConfig

HEADROOM = 0.9
"""Share of the available memory that the counted memory may fill; the rest is for the buffers inside of operators."""
DRAWS = 1024
"""Rows whose draws stand for a step's, to count operations."""


def counted_memory(
    config: RunConfig, checkpointing: Checkpointing, impl: str, device_type: str, dtype: torch.dtype, *, away: bool
) -> TrainingMemory:
    """The memory of a process that shards nothing; `away`: the averages are on another device."""
    averages = 0 if away else len(config.ema_half_lives)
    return training_memory(
        config.model, checkpointing, impl, loss=config.loss, device=device_type, dtype=dtype, ema_copies=averages,
        stream=config.stream,
    )  # fmt: skip


def shared(memory: TrainingMemory, sharding: str, processes: int, local: int) -> TrainingMemory:
    """The memory of one of `processes` processes, `local` of them on each machine."""
    parts = {"ddp": 1, "zero1": processes, "fsdp": processes, "hybrid": local}
    return memory.sharded(parts[sharding], weights=sharding != "zero1")


def card_table(config: RunConfig, gigabytes: float, processes: int) -> Iterator[str]:
    """Lines of a table: the largest device batch of each published model on such a card, and its operations.

    The options that count are sharding, precision, stream and the averages; perceptual networks are not counted.
    """
    dtype = torch.float32 if config.precision == "float32" else torch.bfloat16
    where = "on the card" if config.ema_device == "auto" else "on the host"
    with _kernels_countable():
        impl = "triton" if dispatch.checked_impl(config.impl) == "auto" else dispatch.checked_impl(config.impl)
        yield (
            f"largest device batches on a card of {gigabytes:g} GB, filled to {HEADROOM:.0%} (perceptual networks not "
            f"counted)\n{impl} kernels, {str(dtype).removeprefix('torch.')}, stream {config.stream}, "
            f"{len(config.ema_half_lives)} averages {where}, {processes} x {config.sharding}\n"
        )
        yield _line("checkpointing", *(f"{kind} (operations)" for kind in CHECKPOINTING))
        for name, settings in PUBLISHED.items():
            preset = replace(config, model=settings.network, loss=settings.loss)
            yield _line(name, *_cells(preset, impl, dtype, HEADROOM * gigabytes * 1e9, processes))


def _cells(config: RunConfig, impl: str, dtype: torch.dtype, budget: float, processes: int) -> Iterator[str]:
    """The largest device batch under each checkpointing, and the operations of a step over those under none."""
    draws = pmf.sample_draws(DRAWS, (1, 1, 1), config.loss, torch.Generator().manual_seed(0))
    plain = row_operations(config.model).lean(draws)
    place = "cuda" if torch.cuda.is_available() else "cpu"
    for kind in CHECKPOINTING:
        whole = counted_memory(config, kind, impl, place, dtype, away=config.ema_device == "cpu")
        memory = shared(whole, config.sharding, processes, processes)
        cost = row_operations(config.model, kind).lean(draws) / plain
        yield f"{memory.largest_batch(budget):,} ({cost:.2f})"


def _line(first: str, *others: str) -> str:
    return f"{first:14}" + "".join(f"{other:>20}" for other in others)


@contextlib.contextmanager
def _kernels_countable() -> Iterator[None]:
    """Let kernels be counted without a GPU, as Triton's interpreter would run them; counting runs none."""
    before = os.environ.get("TRITON_INTERPRET")
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
    try:
        yield
    finally:
        os.environ.pop("TRITON_INTERPRET", None)
        if before is not None:
            os.environ["TRITON_INTERPRET"] = before
