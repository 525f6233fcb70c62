"""`pmf doctor`: before a long run, whether this machine can do it, how long it takes, and what to change."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import itertools
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch

import pmf
from pmf import dispatch
from pmf.counting import row_operations
from pmf.errors import first_line, require
from pmf.memory import TrainingMemory, training_memory
from pmf.train.config import RunConfig
from pmf.train.data import Loader, open_data
from pmf.train.distributed import World, pick_device
from pmf.train.learner import Learner
from pmf.train.loop import check_data
from pmf.train.presets import configured

HEADROOM = 0.9
"""Share of the memory that the counted memory may fill; the rest is for temporary buffers."""
PATIENCE = 20
"""Without workers, reading may take a twentieth of a step: the step waits for it."""
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
"""Cores that this process may use."""
CPU_OPERATIONS = 1e11
"""Operations of the largest step that is timed on a CPU, where it takes seconds."""


@dataclass(frozen=True)
class DoctorConfig(RunConfig):
    """Examine this machine and a run before it starts; nothing is written. Exit status 1: something must change."""

    processes: int | None = None
    """Processes of the run (default: those of torchrun where it started this, else one per GPU)."""
    seconds: float = 5.0
    """How long to read data for."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.processes is None or self.processes > 0, f"processes: expected >= 1, got {self.processes}")
        require(self.seconds > 0, f"seconds: expected a positive number, got {self.seconds}")


def command(arguments: list[str]) -> None:
    """Report on the run that `[PRESET] [--resume DIRECTORY] [options]` describe; exit status 1 where it has advice."""
    config = configured(arguments, "doctor", DoctorConfig, default="digits")
    if int(os.environ.get("RANK", 0)) > 0:
        return
    doctor = Doctor(config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the report says it, once
        doctor.examine()
    print("\nwhat to change", *(doctor.changes or ["nothing"]), sep="\n  ")
    if doctor.changes:
        sys.exit(1)


class Doctor:
    """Prints findings about a run as they come, and collects what to change."""

    def __init__(self, config: DoctorConfig) -> None:
        self.config, self.device = config, torch.device("cpu")
        self.changes: list[str] = []

    def line(self, name: str, text: str, change: str | None = None) -> None:
        """A finding, and what to change about it, if anything."""
        print(f"{'!' if change else ' '} {name:11}{text}", flush=True)
        self.changes += [f"{name}: {change}"] if change else []

    @contextlib.contextmanager
    def examining(self, name: str) -> Iterator[None]:
        """An error inside becomes a finding: the run would fail the same way."""
        try:
            yield
        except Exception as error:
            text = first_line(error).removeprefix(f"{name}: ")
            self.line(name, text, text)

    def examine(self) -> None:
        """Versions and GPUs, then what computes the run, whether it fits, and whether the data keep up."""
        config, rate = self.config, None
        packages = ", ".join(f"{name} {_version(name)}" for name in ("torch", "triton", "flash-attn", "flash-attn-4"))
        print(f"pixel-meanflow {pmf.__version__}: {packages}, CUDA {torch.version.cuda or 'none'}")
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        self.line("GPUs", "; ".join(map(torch.cuda.get_device_name, range(gpus))) or "none")
        with self.examining("device"):
            self.device = pick_device(config.device)
        usable = gpus if self.device.type == "cuda" else 0
        self.processes = config.processes or int(os.environ.get("WORLD_SIZE", 0)) or usable or 1
        self.local = int(os.environ.get("LOCAL_WORLD_SIZE", 0)) or min(self.processes, usable or self.processes)
        self.rows = config.device_batch or config.batch_size
        with self.examining("batch_size"):
            self.rows = config.device_batch_on(self.processes)
        shared = f"{self.processes} x {self.rows} images at a time, {config.batch_size:,} a step, {config.sharding}"
        self.line("run", f"{config.resume or config.out} on {self.device}: {shared}")
        with self.examining("kernels"):
            self.kernels()
            with self.examining("memory"):
                fits = self.memory()
                with self.examining("step"):
                    rate = self.step(fits)
        with self.examining("data"):
            self.data(rate)

    def kernels(self) -> None:
        """What computes the run. Errors: `InputError` where it cannot run."""
        config, dtype = self.config, self.config.dtype_on(self.device)
        choice, reason = dispatch.decide("attention_dual", config.impl, self.device.type)
        attention = choice
        if choice == "triton":
            attention = dispatch.attention_backend(self.device, dtype, config.model.head_dim)[0]
        slow = self.device.type == "cuda" and choice == "reference"
        change = f"the reference is slow ({reason}): install triton, or set --impl auto" if slow else None
        self.line("kernels", f"{choice}: {reason}; attention {attention}; products {dtype}", change)

    def memory(self) -> bool:
        """The counted memory of a process against what it can have; whether one process alone can try a step."""
        config, on_gpu = self.config, self.device.type == "cuda"
        main_memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        there = torch.cuda.mem_get_info(self.device)[0] if on_gpu else main_memory // self.local
        budget, shards = HEADROOM * there, {"ddp": 1, "fsdp": self.processes, "hybrid": self.local}
        whole = counted_memory(config, config.checkpointing, self.device)
        expected = whole.sharded(shards[config.sharding]).expected(self.rows)
        change = memory_change(config, shards, self.rows, budget, partial(counted_memory, config, device=self.device))
        beside = " beside the perceptual networks" if config.perceptual.enabled else ""
        self.line("memory", f"{expected / 1e9:.2f} GB expected{beside}, {there / 1e9:.2f} GB there", change)
        return whole.expected(self.rows) <= budget

    def step(self, fits: bool) -> float | None:
        """Images per second that a process trains on, measured; None where it is not."""
        config, rows = self.config, self.rows
        draws = pmf.sample_draws(rows, (1, 1, 1), config.loss, torch.Generator().manual_seed(config.seed))
        work = row_operations(config.model).lean(draws)
        too_large = self.device.type == "cpu" and work > CPU_OPERATIONS
        if too_large or not fits:
            why, change = ("not timed on a CPU", "train on a GPU") if too_large else ("no room to time it here", None)
            self.line("step", f"{work / 1e12:,.3g} TFLOP for {rows} images, {why}", change)
            return None
        rate = rows / step_seconds(config, self.device, rows)
        hours = config.steps * config.batch_size / (rate * self.processes) / 3600
        self.line("step", f"{rows / rate:.3g} s for {rows} images: {rate:,.0f} images/s a process")
        self.line("whole run", f"{config.steps:,} steps, about {hours:,.1f} hours")
        return rate

    def data(self, needed: float | None) -> None:
        """Images per second that the data deliver to one process, against what its steps need."""
        config = self.config
        data = open_data(config.data, config.model.image_size)
        check_data(data, config)
        loader = Loader(data, self.rows, seed=config.seed, workers=config.workers, device=self.device)
        served = images_per_second(loader, config.workers, config.seconds)
        change = None if needed is None else data_change(served, needed, config.workers, CORES // self.local)
        what = f"{config.data}: {len(data):,} images of {data.num_classes} classes"
        self.line("data", f"{what}; {served:,.0f} images/s with {config.workers} workers", change)


@functools.cache
def counted_memory(config: RunConfig, checkpointing: Literal["none", "block"], device: torch.device) -> TrainingMemory:
    """The memory of a process that shards nothing."""
    impl, averages = dispatch.checked_impl(config.impl), len(config.ema_half_lives)
    dtype = config.dtype_on(device)
    return training_memory(config.model, checkpointing, impl, device=device.type, dtype=dtype, ema_copies=averages)


def memory_change(
    config: RunConfig, shards: dict[str, int], rows: int, budget: float, count: Callable[[str], TrainingMemory]
) -> str | None:
    """The least change of flags with which a step fits into so many bytes per process; None if it fits as it is.

    `shards`: processes that share the state, by sharding; `count`: `counted_memory` by checkpointing.
    """
    processes = shards["fsdp"]
    smaller = [2**power for power in range((rows - 1).bit_length() - 1, 0, -1)]  # half are flow-matching rows: >= 2
    sizes = [rows, *(size for size in smaller if config.batch_size % (size * processes) == 0)]
    shardings = dict.fromkeys((config.sharding, "fsdp" if processes > 1 else config.sharding))
    for sharding, size, checkpointing in itertools.product(shardings, sizes, (config.checkpointing, "block")):
        if count(checkpointing).sharded(shards[sharding]).expected(size) <= budget:
            flags = [f"--sharding {sharding}"] if sharding != config.sharding else []
            flags += [f"--checkpointing {checkpointing}"] if checkpointing != config.checkpointing else []
            flags += [f"--device-batch {size}"] if size != rows else []
            return f"set {' '.join(flags)}" if flags else None
    return "more GPUs with --sharding fsdp, larger ones, or a smaller network"


def step_seconds(config: RunConfig, device: torch.device, rows: int) -> float:
    """Seconds of a step of one device batch, update included, after two to warm up."""
    learner = Learner(replace(config, resume=None, init=None, batch_size=rows, device_batch=rows), World(device))
    x = torch.zeros(rows, *config.model.image_shape, device=device)
    y = torch.zeros(rows, dtype=torch.int64, device=device)
    taken = []
    for _ in range(5):
        began = time.perf_counter()
        learner.train_step(x, y)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - began)
    return sum(taken[2:]) / len(taken[2:])


def images_per_second(loader: Loader, workers: int, seconds: float) -> float:
    """What a loader delivers while nothing else runs. Closes it."""
    with contextlib.closing(loader):
        for _ in range(max(1, workers)):  # the first batches wait for the workers to start
            next(loader)
        images, began = 0, time.perf_counter()
        while time.perf_counter() - began < seconds:
            images += len(next(loader)[1])
        return images / (time.perf_counter() - began)


def data_change(served: float, needed: float, workers: int, cores: int) -> str | None:
    """What to change so that data keep up with a step, in images per second of a process; None if they do.

    `cores`: those of each process.
    """
    if served >= (needed if workers else PATIENCE * needed):
        return None
    wanted = min(max(1, math.ceil(1.2 * needed / (served / max(workers, 1)))), cores)
    faster = "a faster disk, more cores, or `pmf data prepare --encoding npy`, which needs no decoding"
    return f"the step takes {needed:,.0f} images/s: {f'set --workers {wanted}' if wanted > workers else faster}"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"
