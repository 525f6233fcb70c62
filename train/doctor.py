"""`pmf doctor` checks before a long run whether this machine can do it, how long it takes, and what to change."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace

import torch

import pmf
from pmf import dispatch
from pmf.counting import row_operations
from pmf.data import Loader
from pmf.errors import first_line, require
from pmf.feature_networks import WEIGHTS
from pmf.memory import TrainingMemory
from pmf.model import CHECKPOINTING, Checkpointing
from pmf.train.budget import HEADROOM, card_table, counted_memory, shared
from pmf.train.config import RunConfig
from pmf.train.data.by_name import open_data
from pmf.train.distributed import World, own_rank, pick_device
from pmf.train.evaluation.spaces import spaces_of
from pmf.train.learner import Learner
from pmf.train.loop import check_data
from pmf.train.options import Need
from pmf.train.presets import configured

PATIENCE = 20
"""Without workers every step waits for its images: reading must be this many times as fast as the step."""
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
"""Cores that this process may use."""
CPU_OPERATIONS = 1e11
"""Operations of the largest step to time on a CPU, where it takes seconds."""
Finding = tuple[str, str | None]
"""(what was found, what to change or None)."""


@dataclass(frozen=True)
class DoctorConfig(RunConfig):
    """Check this machine and a run before it starts. Writes nothing; exits with status 1 if something must change."""

    processes: int | None = None
    """Number of processes of the run (default: torchrun's if it started this command, else one per GPU)."""
    seconds: float = 5.0
    """Seconds to spend on reading data."""
    card: float | None = None
    """Instead of all this, print the largest device batch of each published model on a card of so many GB, under each
    checkpointing, and its operations. Sharding, processes, precision, stream, impl, ema_half_lives and ema_device
    count; other options are refused."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.processes is None or self.processes > 0, f"processes: expected >= 1, got {self.processes}")
        if self.card is not None:
            require(0 < self.card < math.inf, f"card: expected a positive number of GB, got {self.card}")
            require(self.sharding != "hybrid", "sharding: expected ddp, zero1 or fsdp with --card, got hybrid")
            counted = self.sharding == "ddp" or self.processes is not None
            require(counted, f"processes: expected a number with --card and --sharding {self.sharding}, got none")
        require(self.seconds > 0, f"seconds: expected a positive number, got {self.seconds}")


COUNTED = "card", "processes", "sharding", "precision", "stream", "impl", "ema_half_lives", "ema_device"
"""What the table of a card depends on."""
CARD_NEEDS = (
    Need(
        tuple(f"{f.name}{end}" for f in fields(DoctorConfig) if f.name not in COUNTED for end in ("", ".*")),
        "with --card",
        lambda c: c.card is None,
    ),
)


def command(arguments: list[str]) -> None:
    """Report on the run that `[PRESET] [--resume DIRECTORY] [options]` describes; exit with 1 if it has advice."""
    config = configured(arguments, "doctor", DoctorConfig, default="digits", needs=CARD_NEEDS)
    if own_rank() > 0:
        return
    if config.card is not None:
        for line in card_table(config, config.card, config.processes or 1):
            print(line, flush=True)
        return
    doctor = Doctor(config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the report names each problem once
        doctor.examine()
    print("\nwhat to change", *(doctor.changes or ["nothing"]), sep="\n  ")
    if doctor.changes:
        sys.exit(1)


class Doctor:
    """Prints findings about a run as it makes them, and collects the changes to advise."""

    def __init__(self, config: DoctorConfig) -> None:
        self.config, self.device = config, torch.device("cpu")
        self.gpus, self.processes, self.local, self.rows = 0, 1, 1, config.device_batch or config.batch_size
        self.fits, self.rate = False, 0.0
        self.changes: list[str] = []

    def examine(self) -> None:
        """Check the device, the processes, the kernels, the memory, the time of a step and the speed of the data."""
        print(f"pixel-meanflow {pmf.__version__}: torch {torch.__version__}, CUDA {torch.version.cuda or 'none'}")
        self.check("device", self.find_device)
        self.check("run", self.share)
        if self.check("kernels", self.kernels) and self.check("memory", self.memory):
            self.check("step", self.step)
        self.check("data", self.data)

    def check(self, name: str, examination: Callable[[], Finding]) -> bool:
        """Print an examination's finding, or its error (the run would fail the same way); return whether it passed."""
        try:
            (text, change), passed = examination(), True
        except Exception as error:
            text = change = first_line(error).removeprefix(f"{name}: ")
            passed = False
        print(f"{'!' if change else ' '} {name:9}{text}", flush=True)
        self.changes += [f"{name}: {change}"] if change else []
        return passed

    def find_device(self) -> Finding:
        """A process's device, and the names of all GPUs."""
        self.device = pick_device(self.config.device)
        self.gpus = torch.cuda.device_count() if self.device.type == "cuda" else 0
        return f"{self.device} {', '.join(map(torch.cuda.get_device_name, range(self.gpus)))}".rstrip(), None

    def share(self) -> Finding:
        """The number of processes that share a step, in all and on this machine, and the images of each."""
        config = self.config
        self.processes = config.processes or int(os.environ.get("WORLD_SIZE", 0)) or self.gpus or 1
        self.local = int(os.environ.get("LOCAL_WORLD_SIZE", 0)) or min(self.processes, self.gpus or self.processes)
        self.rows = config.device_batch_on(self.processes)
        images = f"{self.processes} x {self.rows} images at a time, {config.batch_size:,} a step"
        return f"{config.resume or config.out} on {self.device}: {images}, {config.sharding}", None

    def kernels(self) -> Finding:
        """The implementation of the ops and of attention, and the dtype of matrix products."""
        config, dtype = self.config, self.config.dtype_on(self.device)
        choice, reason = dispatch.decide("attention", config.impl, self.device.type, (dtype,), (config.model.head_dim,))
        attention = choice
        if choice == "triton":
            attention = dispatch.attention_backend(self.device, dtype, config.model.head_dim)[0]
        slow = self.device.type == "cuda" and choice == "reference"
        change = f"the reference is slow ({reason}): install triton, or set --impl auto" if slow else None
        return f"{choice}: {reason}; attention {attention}; products {dtype}", change

    def memory(self) -> Finding:
        """The counted memory of a process against the memory available to it."""
        config = self.config
        there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // self.local
        if self.device.type == "cuda":
            there = torch.cuda.mem_get_info(self.device)[0]
        impl, dtype = dispatch.checked_impl(config.impl), config.dtype_on(self.device)
        place = self.device.type
        away = config.ema_device != "auto" and place != config.ema_device
        counted = {kind: counted_memory(config, kind, impl, place, dtype, away=away) for kind in CHECKPOINTING}
        whole, evaluation = counted[config.checkpointing], evaluation_bytes(config, self.device)
        expected = shared(whole, config.sharding, self.processes, self.local).expected(self.rows) + evaluation
        budget = HEADROOM * there - evaluation
        self.fits = whole.expected(self.rows) <= budget
        change = memory_change(config, self.processes, self.local, self.rows, budget, counted)
        beside = " besides the perceptual networks" if config.perceptual.enabled else ""
        return f"{expected / 1e9:.2f} GB expected{beside}, {there / 1e9:.2f} GB available", change

    def step(self) -> Finding:
        """The time of a step, measured if one process can run it alone, and of the whole run."""
        config, rows = self.config, self.rows
        draws = pmf.sample_draws(rows, (1, 1, 1), config.loss, torch.Generator().manual_seed(config.seed))
        work = row_operations(config.model).lean(draws)
        if self.device.type == "cpu" and work > CPU_OPERATIONS:
            return f"{work / 1e12:,.3g} TFLOP for {rows} images, not timed on a CPU", "train on a GPU"
        if not self.fits:
            return f"{work / 1e12:,.3g} TFLOP for {rows} images, not timed: it does not fit here", None
        fresh = replace(config, resume=None, init=None, init_state=False, batch_size=rows, device_batch=rows)
        learner = Learner(fresh, World(self.device))
        x = torch.zeros(rows, *config.model.image_shape, device=self.device)
        y = torch.zeros(rows, dtype=torch.int64, device=self.device)
        seconds = seconds_of(lambda: learner.train_step(x, y))
        self.rate = rows / seconds
        hours = config.steps * config.batch_size / (self.rate * self.processes) / 3600
        whole = f"{config.steps:,} steps take about {hours:,.1f} hours"
        return f"{seconds:.3g} s for {rows} images: {self.rate:,.0f} images/s a process; {whole}", None

    def data(self) -> Finding:
        """Images per second that the data deliver to one process, against the number that its steps need."""
        config = self.config
        data = open_data(config.data, config.model.image_size)
        check_data(data, config)
        loader = Loader(data, self.rows, seed=config.seed, workers=config.workers, device=self.device)
        with contextlib.closing(loader):  # the warm-up batches wait for the workers to start
            served = self.rows / seconds_of(lambda: next(loader), max(1, config.workers), config.seconds)
        what = f"{config.data}: {len(data):,} images of {data.num_classes} classes"
        change = data_change(served, self.rate, config.workers, CORES // self.local)
        return f"{what}; {served:,.0f} images/s with {config.workers} workers", change


def evaluation_bytes(config: RunConfig, device: torch.device) -> int:
    """Bytes that evaluations while training keep: a second network, the sampler's joined weights, feature networks."""
    if not config.eval_every:
        return 0
    network = pmf.create_model(config.model, impl=config.impl, aux_head=False, device="meta")
    values, settings = sum(p.numel() for p in network.parameters()), config.evaluation
    if settings.reference is None:
        return 4 * values  # in float32
    dtype = config.dtype_on(device, settings.precision)
    networks = spaces_of(settings) if settings.of_spaces else ("inception",)
    return 2 * dtype.itemsize * values + 4 * sum(WEIGHTS[name] for name in networks)


def memory_change(
    config: RunConfig,
    processes: int,
    local: int,
    rows: int,
    budget: float,
    counted: Mapping[Checkpointing, TrainingMemory],
) -> str | None:
    """The smallest change of flags that makes a step fit into `budget` bytes per process; None if it fits already.

    `processes`: of the run, `local` of them on each machine; `counted`: checkpointing -> memory that nothing shares.
    Checkpointing that costs no operations comes first, then smaller batches and sharding.
    """
    smaller = [2**power for power in range((rows - 1).bit_length() - 1, 0, -1)]  # >= 2: half are flow-matching rows
    sizes = [rows, *(size for size in smaller if config.batch_size % (size * processes) == 0)]
    shardings = dict.fromkeys((config.sharding, *(("zero1", "fsdp") if processes > 1 else ())))
    kinds = CHECKPOINTING[CHECKPOINTING.index(config.checkpointing) :]
    for sharding, size, checkpointing in itertools.product(shardings, sizes, kinds):
        if shared(counted[checkpointing], sharding, processes, local).expected(size) <= budget:
            flags = {"sharding": sharding, "checkpointing": checkpointing, "device-batch": size}
            before = {"sharding": config.sharding, "checkpointing": config.checkpointing, "device-batch": rows}
            changes = " ".join(f"--{name} {value}" for name, value in flags.items() if value != before[name])
            return f"set {changes}" if changes else None
    return "more GPUs with --sharding fsdp, larger ones, or a smaller network"


def seconds_of(call: Callable[[], object], warm_up: int = 2, least: float = 0.0) -> float:
    """Mean seconds per call, over at least three calls and `least` seconds, after `warm_up` calls."""
    for _ in range(warm_up):
        call()
    calls, began = 0, time.perf_counter()
    while calls < 3 or time.perf_counter() - began < least:
        call()
        calls += 1
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    return (time.perf_counter() - began) / calls


def data_change(served: float, needed: float, workers: int, cores: int) -> str | None:
    """Advice if the data do not keep up with the steps, else None.

    `served`, `needed`: images per second of a process (`needed` is 0 if unknown); `cores`: cores of each process.
    """
    if served >= (needed if workers else PATIENCE * needed):
        return None
    wanted = min(max(1, math.ceil(1.2 * needed / (served / max(workers, 1)))), cores)
    faster = "a faster disk, more cores, or `pmf data prepare --encoding npy`, which needs no decoding"
    return f"the step takes {needed:,.0f} images/s: {f'set --workers {wanted}' if wanted > workers else faster}"
