"""`pmf doctor`: this machine, its data and a run's configuration, in one report with what to change."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import importlib.util
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
from pmf.train.diagnosis import (
    HEADROOM,
    data_advice,
    duration,
    gigabytes,
    memory_advice,
    precision_advice,
    worker_advice,
)
from pmf.train.distributed import World, pick_device
from pmf.train.loop import Trainer, check_data, device_batch_of, in_bfloat16
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

    def line(self, name: str, text: str, change: str | None = None) -> None:
        """A finding, and what to change about it; None: nothing."""
        print(f"{' ' if change is None else '!'} {name:13}{text}", flush=True)
        if change is not None:
            self.changes.append(change)

    @contextlib.contextmanager
    def examining(self, name: str) -> Iterator[None]:
        """What fails in here becomes a finding: all that goes wrong now would go wrong in the run."""
        try:
            yield
        except Exception as error:
            text = (str(error).strip() or type(error).__name__).splitlines()[0].removeprefix(f"{name}: ")
            if not isinstance(error, (InputError, OSError)):
                text = f"{type(error).__name__}: {text}"
            self.line(name, text, f"{name}: {text}")


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
    names = ("triton", "flash-attn", "flash-attn-4")
    versions = [("python", platform.python_version()), ("torch", torch.__version__), ("CUDA", torch.version.cuda)]
    versions += [(name, _version(name)) for name in names]
    print(
        f"pixel-meanflow {pmf.__version__}: " + ", ".join(f"{name} {version or 'none'}" for name, version in versions)
    )
    report.title("machine")
    gpus = "; ".join(f"{n} x {gpu}" for gpu, n in Counter(map(_gpu, _gpus())).items())
    unseen = not gpus and torch.version.cuda is None and torch.version.hip is None and shutil.which("nvidia-smi")
    blind = f"torch: {torch.__version__} is built without CUDA, which this machine seems to have: install another build"
    report.line("GPU", gpus or "none", blind if unseen else None)
    report.line("CPU", f"{_cores()} cores, {gigabytes(_free(torch.device('cpu')))} of memory free")
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
        rows = device_batch_of(config, World(device, size=processes))
        times = config.batch_size // (rows * processes)
        each = f"{processes} process{'es' * (processes > 1)} x {rows} images" + f" x {times} times" * (times > 1)
        report.line("batch", f"{each} = {config.batch_size:,} a step" + f", {config.sharding}" * (processes > 1))
    runs, fits, needed = _ops(report, config, device), None, None
    _perceptual(report, config)
    if runs:
        with report.examining("memory"):
            fits = _memory(report, config, device, processes, local, rows)
    if fits is not None:
        with report.examining("step"):
            needed = _step(report, config, device, processes, rows, fits)
    with report.examining("data"):
        _data(report, config, device, rows, needed, local)


def _ops(report: Report, config: RunConfig, device: torch.device) -> bool:
    """Which kernels and which attention run, and in which precision; whether they can run."""
    model, half = config.model, in_bfloat16(config, device)
    limits = {
        "norm_modulate_dual": dispatch.width_limit(torch.empty(0, model.hidden_size)),
        "residual_norm_modulate_dual": dispatch.width_limit(torch.empty(0, model.hidden_size)),
        "attention_dual": dispatch.attention_limit(torch.empty(0, model.head_dim)),
        "patch_embed_dual": dispatch.patch_limit(model.patch_size, model.bottleneck),
    }
    chosen: dict[tuple[str, str], list[str]] = {}
    with report.examining("kernels"):
        for op in dispatch.KERNEL_MODULES:
            choice = dispatch.decide(op, config.impl, device.type, limits.get(op))
            chosen.setdefault(choice, []).append(op.removesuffix("_dual"))
    for (choice, reason), ops in chosen.items():
        which = "" if len(chosen) == 1 else f" for {', '.join(ops)}"
        slow = device.type == "cuda" and choice == "reference"
        change = f"kernels: {', '.join(ops)}: the reference is slower: {_remedy(reason)}" if slow else None
        report.line("kernels", f"{choice}{which}: {reason}", change)
    if any(choice == "triton" and "attention" in ops for (choice, _), ops in chosen.items()):
        backend, reason = dispatch.attention_backend(device, torch.bfloat16 if half else torch.float32, model.head_dim)
        report.line("attention", f"{backend}: {reason}; the tangent's: triton")
    elif chosen:
        report.line("attention", "reference: softmax over all scores, kept for backward")
    with report.examining("products"):
        able = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
        report.line("products", "bfloat16" if half else "float32", precision_advice(half, able, device.type))
    return bool(chosen)


def _remedy(reason: str) -> str:
    if "not installed" in reason:
        return "triton is absent: pip install triton"
    return "set --impl auto" if reason == "requested" else reason


def _perceptual(report: Report, config: RunConfig) -> None:
    """The perceptual networks, and whether their packages are there."""
    if config.perceptual.enabled:
        absent = [name for name in ("lpips", "torchvision", "transformers") if importlib.util.find_spec(name) is None]
        change = f"perceptual: {', '.join(absent)} absent: pip install 'pixel-meanflow[perceptual]'" if absent else None
        report.line("perceptual", f"LPIPS {config.perceptual.lpips}, ConvNeXt {config.perceptual.convnext}", change)


def _memory(report: Report, config: DoctorConfig, device: torch.device, processes: int, local: int, rows: int) -> bool:
    """The memory of one process against what is free; whether one process alone, without sharding, fits too."""
    free = _free(device) // (1 if device.type == "cuda" else local)
    shards = {"ddp": 1, "fsdp": processes, "hybrid": local}[config.sharding]

    @functools.cache
    def whole(checkpointing: str) -> TrainingMemory:
        dtype = torch.bfloat16 if in_bfloat16(config, device) else torch.float32
        options = dict(device=device.type, dtype=dtype, ema_copies=len(config.ema_half_lives))
        return training_memory(config.model, checkpointing, dispatch.checked_impl(config.impl), **options)

    memory = whole(config.checkpointing).sharded(shards)
    parts = f"{gigabytes(memory.fixed)} + {rows} x {gigabytes(memory.per_row)}"
    beside = ", without the perceptual networks" if config.perceptual.enabled else ""
    total, there = gigabytes(memory.expected(rows)), gigabytes(free)
    advice = memory_advice(config, processes, rows, free, lambda way: whole(way).sharded(shards))
    report.line("memory", f"{total} expected ({parts}{beside}), {there} free", advice)
    return whole(config.checkpointing).expected(rows) <= HEADROOM * free


def _step(
    report: Report, config: DoctorConfig, device: torch.device, processes: int, rows: int, fits: bool
) -> float | None:
    """Images per second that a process trains on, measured; None where it is not."""
    draws = pmf.sample_draws(rows, (1, 1, 1), config.loss, torch.Generator().manual_seed(config.seed))
    work = row_operations(config.model).lean(draws)
    cost = f"{work / 1e12:,.3g} TFLOP for {rows} images"
    if device.type != "cuda" and work > CPU_OPERATIONS:
        assumed = (
            f"a GPU at {ASSUMED_OPERATIONS / 1e12:.0f} TFLOP/s takes {rows / work * ASSUMED_OPERATIONS:,.0f} images/s"
        )
        advice = f"device: a step takes {cost}: train on a GPU"
        report.line("step", f"{cost}, not measured on a CPU; {assumed}", advice)
        return None
    if not fits:
        report.line("step", f"{cost}, not measured: a single process has no room for it here")
        return None
    try:
        seconds, peak = _timed(config, device, rows)
    except torch.OutOfMemoryError:
        smaller = "--checkpointing block" if config.checkpointing == "none" else f"--device-batch {rows // 2}"
        report.line("step", f"{cost}, out of memory", f"memory: a step of {rows} images ran out of it: set {smaller}")
        return None
    rate = rows / seconds
    kept = f", {gigabytes(peak)} at its peak" if peak else ""
    whole = duration(config.steps * config.batch_size / (rate * processes))
    report.line("step", f"{seconds:.3g} s for {rows} images{kept}: takes {rate:,.0f} images/s a process")
    report.line("whole run", f"{config.steps:,} steps, about {whole}")
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


def _data(
    report: Report, config: DoctorConfig, device: torch.device, rows: int, needed: float | None, local: int
) -> None:
    """Images per second that the data deliver to one process, against what its steps take."""
    size = config.model.image_size
    if config.data not in ("digits", "photographs") and not Path(config.data).exists():
        advice = f"`pmf data prepare folder:PICTURES --out {config.data} --size {size}`, or set --data"
        report.line("data", f"{config.data} is not there", f"data: {config.data} is not there: {advice}")
        return
    data = open_data(config.data, size)
    check_data(data, config)
    served = _served(data, config, device, rows)
    advice = worker_advice(config.workers, local, _cores())
    if needed is not None:
        advice = data_advice(served, needed, config.workers, max(1, _cores() // local)) or advice
    what = f"{config.data}: {len(data):,} images of {data.num_classes} classes"
    report.line("data", f"{what}; {served:,.0f} images/s with {config.workers} workers", advice)


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
