"""`pmf doctor`: this machine, its data and a run's configuration, in one report with what to change."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import os
import platform
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import pmf
from pmf import dispatch
from pmf.counting import row_operations
from pmf.errors import InputError, require
from pmf.memory import TrainingMemory, training_memory
from pmf.train.config import RunConfig
from pmf.train.data import ImageSet, Loader, TrainingData, open_data
from pmf.train.diagnosis import HEADROOM, data_advice, gigabytes, memory_advice, worker_advice
from pmf.train.distributed import World, pick_device
from pmf.train.loop import Trainer, _check_data, _device_batch, _half
from pmf.train.run import configured

CPU_OPERATIONS = 1e11
"""Operations of the largest step that is tried on a CPU, a few seconds' work."""
ASSUMED_OPERATIONS = 400e12
"""Operations per second of the GPU that is assumed where none is there: what an H100 sustains in large products."""


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


class Report:
    """Prints findings as they come, and collects what to change."""

    def __init__(self) -> None:
        self.changes: list[str] = []

    def title(self, text: str) -> None:
        """A part of the report begins."""
        print(f"\n{text}", flush=True)

    def line(self, name: str, text: str) -> None:
        """A finding."""
        print(f"  {name:13}{text}", flush=True)

    def change(self, text: str | None) -> None:
        """Something to change, unless it is None."""
        if text is not None:
            self.changes.append(text)

    @contextlib.contextmanager
    def examining(self, name: str) -> Iterator[None]:
        """What fails in here becomes a finding: all that goes wrong now would go wrong in the run."""
        try:
            yield
        except Exception as error:
            text = (str(error).strip() or type(error).__name__).splitlines()[0]
            known = isinstance(error, (InputError, OSError))
            self.line(name, text if known else f"{type(error).__name__}: {text}")
            self.change(text if isinstance(error, InputError) else f"{name}: {text}")


def command(arguments: list[str]) -> None:
    """Print the report on `pmf doctor [PRESET] [--resume DIRECTORY] [options]`; exit status 1 where it has advice."""
    config = configured(arguments, "doctor", DoctorConfig, preset="digits")
    if int(os.environ.get("RANK", 0)) > 0:
        return
    report = Report()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the report says it, once
        device = _machine(report, config)
        _run(report, config, device)
    report.title("what to change")
    for change in report.changes or ["nothing"]:
        print(f"  {change}")
    if report.changes:
        sys.exit(1)


def _machine(report: Report, config: DoctorConfig) -> torch.device:
    """Versions, GPUs, cores; the device that the run would use."""
    names = ("triton", "flash-attn")
    versions = [("python", platform.python_version()), ("torch", torch.__version__), ("CUDA", torch.version.cuda)]
    versions += [(name, _version(name)) for name in names]
    print(
        f"pixel-meanflow {pmf.__version__}: " + ", ".join(f"{name} {version or 'none'}" for name, version in versions)
    )
    report.title("machine")
    report.line("GPU", "; ".join(f"{n} x {gpu}" for gpu, n in Counter(map(_gpu, _gpus())).items()) or "none")
    report.line("CPU", f"{_cores()} cores, {gigabytes(_free(torch.device('cpu')))} of memory free")
    if torch.version.cuda is None and torch.version.hip is None and shutil.which("nvidia-smi"):
        report.change(f"torch: {torch.__version__} is built without CUDA, but this machine has a GPU: install another")
    device = torch.device("cpu")
    with report.examining("device"):
        device = pick_device(config.device)
    return device


def _run(report: Report, config: DoctorConfig, device: torch.device) -> None:
    """The run: what computes it, whether it fits, whether its data keep up."""
    report.title(f"run {config.resume or config.out}, on {device}")
    processes = config.processes or int(os.environ.get("WORLD_SIZE", 0)) or len(_gpus(device)) or 1
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 0)) or min(processes, len(_gpus(device)) or processes)
    rows = config.device_batch or config.batch_size
    with report.examining("batch"):
        rows = _device_batch(config, World(device, size=processes))
        times = config.batch_size // (rows * processes)
        each = f"{processes} process{'es' * (processes > 1)} x {rows} images" + f" x {times} times" * (times > 1)
        report.line("batch", f"{each} = {config.batch_size} a step")
    _implementations(report, config, device)
    fits = False
    with report.examining("memory"):
        fits = _memory(report, config, device, processes, local, rows)
    served = None
    with report.examining("data"):
        served = _data(report, config, device, rows)
    with report.examining("step"):
        needed = _step(report, config, device, processes, rows, fits)
        if needed is not None and served is not None:
            report.change(data_advice(served, needed, config.workers, max(1, _cores() // local)))
    report.change(worker_advice(config.workers, local, _cores()))


def _implementations(report: Report, config: DoctorConfig, device: torch.device) -> None:
    """Which kernels and which attention run; in which precision."""
    model = config.model
    limits = {
        "norm_modulate_dual": dispatch.width_limit(torch.empty(0, model.hidden_size)),
        "residual_norm_modulate_dual": dispatch.width_limit(torch.empty(0, model.hidden_size)),
        "attention_dual": dispatch.attention_limit(torch.empty(0, model.head_dim)),
        "patch_embed_dual": dispatch.patch_limit(model.patch_size, model.bottleneck),
    }
    half = _half(config, device)
    with report.examining("ops"):
        chosen: dict[tuple[str, str], list[str]] = {}
        for op in dispatch.KERNEL_MODULES:
            choice = dispatch.decide(op, config.impl, device.type, limits.get(op))
            chosen.setdefault(choice, []).append(op.removesuffix("_dual"))
        for (choice, reason), ops in chosen.items():
            which = "" if len(chosen) == 1 else f" ({', '.join(ops)})"
            report.line("ops", f"{'Triton' if choice == 'triton' else choice}{which}: {reason}")
            if device.type == "cuda" and choice == "reference":
                report.change(f"ops: {', '.join(ops)} run on the reference, which is slower: {_remedy(reason)}")
    with report.examining("attention"):
        if dispatch.decide("attention_dual", config.impl, device.type, limits["attention_dual"])[0] == "triton":
            dtype = torch.bfloat16 if half else torch.float32
            backend, reason = dispatch.attention_backend(device.type, dtype)
            report.line("attention", f"{backend}: {reason}; its tangent: Triton")
        else:
            report.line("attention", "reference: softmax over all scores, kept for backward")
    report.line("products", "bfloat16" if half else "float32")
    if device.type == "cuda":
        able = torch.cuda.is_bf16_supported(including_emulation=False)
        if half and not able:
            report.change("precision: this GPU has no bfloat16: set --precision float32, or use a newer GPU")
        if not half and able:
            report.change("precision: products in float32 are several times slower: set --precision bfloat16")


def _remedy(reason: str) -> str:
    if "not installed" in reason:
        return "triton is absent: pip install triton"
    return "set --impl auto" if reason == "requested" else reason


def _memory(report: Report, config: DoctorConfig, device: torch.device, processes: int, local: int, rows: int) -> bool:
    """The memory of one process against what is free; whether one process alone, without sharding, fits too."""
    free = _free(device) // (1 if device.type == "cuda" else local)
    shards = {"ddp": 1, "fsdp": processes, "hybrid": local}[config.sharding]

    @functools.cache
    def whole(checkpointing: str) -> TrainingMemory:
        dtype = torch.bfloat16 if _half(config, device) else torch.float32
        options = dict(device=device.type, dtype=dtype, ema_copies=len(config.ema_half_lives))
        return training_memory(config.model, checkpointing, dispatch.checked_impl(config.impl), **options)

    memory = whole(config.checkpointing).sharded(shards)
    parts = f"{gigabytes(memory.fixed)} + {rows} x {gigabytes(memory.per_row)}"
    beside = ", without the perceptual networks" if config.perceptual.enabled else ""
    total, there = gigabytes(memory.expected(rows)), gigabytes(free)
    report.line("memory", f"{total} expected ({parts}{beside}), {there} free")
    report.change(memory_advice(config, processes, rows, free, lambda way: whole(way).sharded(shards)))
    return whole(config.checkpointing).expected(rows) <= HEADROOM * free


def _data(report: Report, config: DoctorConfig, device: torch.device, rows: int) -> float:
    """Images per second that the data can deliver to one process."""
    data = open_data(config.data, config.model.image_size)
    _check_data(data, config)
    served = _served(data, config, device, rows)
    count = f"{len(data):,} images of {data.num_classes} classes"
    report.line("data", f"{config.data}: {count}; {served:,.0f} images/s with {config.workers} workers")
    return served


def _served(data: TrainingData, config: DoctorConfig, device: torch.device, rows: int) -> float:
    options = dict(seed=config.seed, workers=config.workers, device=device, max_corrupt=config.max_corrupt)
    loader = Loader(data, rows, **options)
    try:
        for _ in range(max(1, config.workers)):  # workers start, and answer together at first
            next(loader)
        images, began = 0, time.perf_counter()
        while time.perf_counter() - began < config.seconds:
            images += len(next(loader)[1])
        return images / (time.perf_counter() - began)
    finally:
        loader.close()


def _step(
    report: Report, config: DoctorConfig, device: torch.device, processes: int, rows: int, fits: bool
) -> float | None:
    """Images per second that a process trains on, measured; None where it is not."""
    draws = pmf.sample_draws(rows, (1, 1, 1), config.loss, torch.Generator().manual_seed(config.seed))
    work = row_operations(config.model).lean(draws)
    cost = f"{work / 1e12:,.3g} TFLOP for {rows} images"
    if device.type != "cuda" and work > CPU_OPERATIONS:
        rate = rows / work * ASSUMED_OPERATIONS
        assumed = f"a GPU at {ASSUMED_OPERATIONS / 1e12:.0f} TFLOP/s would take {rate:,.0f} images/s"
        report.line("step", f"not measured on a CPU: {cost}; {assumed}")
        report.change(f"device: a step takes {cost}: train on a GPU")
        return None
    if not fits:
        report.line("step", f"not measured, it does not fit here: {cost}")
        return None
    seconds, peak = _timed(config, device, rows)
    rate = rows / seconds
    hours = config.steps * config.batch_size / (rate * processes) / 3600
    kept = f", {gigabytes(peak)} at its peak" if peak else ""
    report.line("step", f"{seconds:.3g} s for {rows} images{kept}; the process takes {rate:,.0f} images/s")
    report.line("whole run", f"{config.steps:,} steps: about {hours:,.1f} hours")
    return rate


def _timed(config: DoctorConfig, device: torch.device, rows: int) -> tuple[float, int]:
    """Seconds of a step of one device batch, update included, and its peak memory in bytes (0 on a CPU)."""
    shape = config.model.image_shape
    nothing = ImageSet(torch.zeros(1, *shape), torch.zeros(1, dtype=torch.int64))
    on_gpu = device.type == "cuda"
    with tempfile.TemporaryDirectory() as place:
        alone = replace(config, out=Path(place), resume=None, init=None, batch_size=rows, device_batch=rows)
        trainer = Trainer(alone, nothing, World(device))
        x, y = torch.rand(rows, *shape, device=device) * 2 - 1, torch.zeros(rows, dtype=torch.int64, device=device)
        taken = []
        for _ in range(5):
            began = time.perf_counter()
            trainer.train_step(x, y)
            if on_gpu:
                torch.cuda.synchronize(device)
            taken.append(time.perf_counter() - began)
        return sum(taken[2:]) / len(taken[2:]), torch.cuda.max_memory_allocated(device) if on_gpu else 0


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpus(device: torch.device | None = None) -> list[int]:
    """The GPUs here; those that a run on this device would use."""
    there = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    return list(there) if device is None or device.type == "cuda" else []


def _gpu(number: int) -> str:
    properties = torch.cuda.get_device_properties(number)
    size, capability = gigabytes(properties.total_memory), f"{properties.major}.{properties.minor}"
    return f"{properties.name}, {size}, compute capability {capability}"


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _free(device: torch.device) -> int:
    """Bytes that can be had on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")  # all there is, where no one says what is free
