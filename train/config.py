"""The whole configuration of a run: every value has a flag on the command line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, get_type_hints

import torch

from pmf.config import DIGITS, Guidance, LossConfig, ModelConfig
from pmf.errors import InputError, require
from pmf.metrics import NAMES, Resize
from pmf.model import CHECKPOINTING
from pmf.optim import OptimizerConfig
from pmf.train.distributed import SHARDINGS

CONFIG_FILE = "config.json"
PRECISIONS = ("auto", "bfloat16", "float32")
DIGITS_OPTIMIZER = OptimizerConfig(learning_rate=4e-3, decay_share=1.0)
Config = TypeVar("Config")


def require_at_least(config: Any, least: Literal[0, 1], *names: str) -> None:
    """Errors: `InputError` on the first of these values of a configuration that is less."""
    for name in names:
        value, expected = getattr(config, name), "a positive number" if least else "a number >= 0"
        require(value >= least, f"{config.prefix}{name}: expected {expected}, got {value}")


def require_choice(config: Any, name: str, choices: Sequence[str | None]) -> None:
    """Errors: `InputError` unless that value of a configuration is one of the choices."""
    value, listed = getattr(config, name), ", ".join(map(str, choices))
    require(value in choices, f"{config.prefix}{name}: expected one of {listed}, got {value!r}")


@dataclass(frozen=True)
class PerceptualConfig:
    """The perceptual losses; their weights in the loss are loss.lpips_weight and loss.convnext_weight."""

    enabled: bool = False
    """Add LPIPS and ConvNeXt distances to the loss (needs the perceptual extra)."""
    lpips: str = "hub"
    """The VGG-16 of LPIPS: hub (torchvision downloads it), a state dict, or random (for trying things out)."""
    convnext: str = "hub"
    """ConvNeXt-V2: hub (its base size), a hub id, a local directory, or random (for trying things out)."""


@dataclass(frozen=True)
class ExtractionConfig:
    """How features of images are computed, for evaluations and for the statistics of a reference."""

    resize: Resize | None = None
    """How images are resized to Inception's 299 pixels: tf1, as published statistics mu and sigma have it, or
    half_pixel, as ref_mu and ref_sigma of pMF's JAX release do (default: as the reference's names say; tf1 for a
    folder)."""
    inception: Path | None = None
    """State dict of torch-fidelity's Inception-v3 (default: torch-fidelity downloads it)."""
    batch_size: int = 64
    """Images at a time, on each device."""
    chunk: int = 1000
    """Images between saves: what an interruption can cost."""

    prefix: ClassVar[str] = ""
    """How errors name these values."""

    def __post_init__(self) -> None:
        require_at_least(self, 1, "batch_size", "chunk")
        require_choice(self, "resize", (None, *NAMES))


@dataclass(frozen=True)
class MeasurementConfig(ExtractionConfig):
    """What is measured, and against what."""

    reference: Path | None = None
    """Folder of real images, or npz of statistics (mu and sigma, or ref_mu and ref_sigma). Precision and recall need a
    folder, or an npz that also holds features. (Default, for digits and photographs alone: numbers of their own.)"""
    weights: tuple[str, ...] = ()
    """Which weights of a run to measure: model, ema_500, ... (default: the run's sampling_weights)."""
    per_class: int = 50
    """Images per class (digits and photographs: always 50)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, 1, "per_class")


@dataclass(frozen=True)
class EvaluationConfig(MeasurementConfig):
    """What is measured while a run trains, as by `pmf eval`, sampled in one step."""

    precision: Literal["auto", "bfloat16", "float32"] = "auto"
    """Precision of the network that samples, weights and all (`pmf eval --dtype bfloat16` keeps weights in float32).
    auto: the run's."""

    prefix: ClassVar[str] = "evaluation."

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice(self, "precision", PRECISIONS)


@dataclass(frozen=True)
class RunConfig:
    """A training run."""

    out: Path = Path("runs/digits")
    """Directory of the run: configuration, metrics, checkpoints, pictures."""
    resume: Path | None = None
    """Continue the run in this directory exactly where it was saved; flags beside it override its configuration."""
    overwrite: bool = False
    """Replace the run in `out`; other files there are kept."""
    data: str = "digits"
    """What to train on: digits, photographs, or a directory made by `pmf data prepare`."""
    workers: int = 0
    """Processes that read images ahead, per training process (0: the training process itself)."""
    flip: bool = False
    """Mirror each image, left to right, with probability 1/2 (off, as published)."""
    max_corrupt: int = 100
    """Unreadable images that each process may replace, named in warnings; one more is an error."""
    init: str | None = None
    """Start from the weights of this run, checkpoint file, training state of the authors or hub id: fine-tuning."""
    init_weights: str | None = None
    """Which weights of init: a file of a directory or hub id (pMF-B-16, ema_500), a set in a training state (model,
    ema_1000), or both (pMF-B-16-full:ema_1000); default: those for sampling."""
    init_state: bool = False
    """Continue the authors' run whose full training state init names: its trained weights, three averages, moments of
    Muon and Adam, and step."""
    steps: int = 1600
    """Training steps."""
    batch_size: int = 64
    """Images per step, over all processes."""
    device_batch: int | None = None
    """Images at a time on a device. Each such batch has its own draws and flow-matching half; a step adds up their
    gradients (default: batch_size / processes, all at once)."""
    seed: int = 0
    """Seed of initialisation, data order and draws, which do not depend on the number of processes."""
    device: str = "auto"
    """Device to train on: auto (cuda if available, else cpu), cpu, cuda, cuda:1, ..."""
    sharding: Literal["ddp", "fsdp", "hybrid"] = "ddp"
    """Under torchrun: ddp copies the network to every process, fsdp shards it over all of them, hybrid shards it
    within a machine and copies it to every machine."""
    precision: Literal["auto", "bfloat16", "float32"] = "auto"
    """bfloat16: products and activations under autocast, weights in float32. auto: bfloat16 on CUDA."""
    checkpointing: Literal["none", "block"] = "none"
    """block: keep only the inputs of the blocks for backward and recompute the rest."""
    captured: bool = False
    """Run forward and backward as CUDA graphs, captured once for each size of step (in a single process)."""
    compiled: bool = False
    """Compile the blocks with torch.compile (not for sharded networks)."""
    impl: str | None = None
    """Implementation of the ops: auto, triton or reference (default: PMF_IMPL, else auto)."""
    perceptual: PerceptualConfig = PerceptualConfig()
    """The perceptual losses."""
    ema_half_lives: tuple[float, ...] = (500.0, 1000.0, 2000.0)
    """Half-lives of the EMA copies, in thousands of images."""
    sampling_weights: str = "ema_500"
    """Weights that sampling and evaluation use: model, or ema_ and a half-life."""
    save_every: int = 500
    """Steps between checkpoints (the last step always saves)."""
    keep_checkpoints: int = 2
    """Number of latest checkpoints to keep."""
    max_skipped: int = 10
    """Consecutive steps that may have a non-finite loss or gradient: they change nothing; one more stops the run."""
    sample_every: int = 500
    """Steps between exports: weights for sampling, sample grid, loss curve (the last step always exports)."""
    eval_every: int = 0
    """Steps between evaluations, each after a checkpoint (0: none; otherwise the last step is evaluated too)."""
    model: ModelConfig = DIGITS.network
    """The network."""
    loss: LossConfig = DIGITS.loss
    """The loss."""
    optimizer: OptimizerConfig = DIGITS_OPTIMIZER
    """The optimizer."""
    sampling: Guidance = DIGITS.guidance
    """The guidance of samples, for grids and for evaluation."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """What `eval_every` measures."""

    prefix: ClassVar[str] = ""

    def __post_init__(self) -> None:
        require_at_least(self, 1, "steps", "batch_size", "save_every", "sample_every", "keep_checkpoints")
        require_at_least(self, 0, "workers", "max_corrupt", "max_skipped", "eval_every", "seed")
        require_choice(self, "sharding", SHARDINGS)
        require_choice(self, "precision", PRECISIONS)
        require_choice(self, "checkpointing", CHECKPOINTING)
        whole = self.device_batch is None or (self.device_batch > 0 and self.batch_size % self.device_batch == 0)
        require(whole, f"device_batch: expected a divisor of batch_size {self.batch_size}, got {self.device_batch}")
        require(not self.compiled or self.sharding == "ddp", f"compiled: expected sharding ddp, got {self.sharding}")
        require(not self.init_state or self.init is not None, "init_state: expected a train state in init, got none")
        require(all(k > 0 for k in self.ema_half_lives), f"ema_half_lives: expected > 0, got {self.ema_half_lives}")
        known = ("model", *(f"ema_{k:g}" for k in self.ema_half_lives))
        require_choice(self, "sampling_weights", known)
        for got in self.evaluation.weights:
            require(got in known, f"evaluation.weights: expected one of {', '.join(known)}, got {got!r}")

    def device_batch_on(self, processes: int) -> int:
        """Images at a time on a device. Errors: `InputError` when the processes cannot share a step evenly."""
        size = self.device_batch or self.batch_size // processes
        require(
            size > 0 and self.batch_size % (size * processes) == 0,
            f"batch_size: expected a multiple of {processes} processes x {size} images at a time, "
            f"got {self.batch_size}",
        )
        return size

    def dtype_on(self, device: torch.device, precision: str = "auto") -> torch.dtype:
        """The dtype of products on a device, in this precision; auto: in the run's."""
        chosen = self.precision if precision == "auto" else precision
        low = chosen == "bfloat16" or (chosen == "auto" and device.type == "cuda")
        return torch.bfloat16 if low else torch.float32


def to_json(config: RunConfig) -> str:
    """The whole configuration as JSON."""
    return json.dumps(asdict(config), indent=2, default=str)


def load_run_config(directory: Path) -> RunConfig:
    """The configuration of the run in `directory`. Errors: no run there, or an unreadable file."""
    file = directory / CONFIG_FILE
    require(file.is_file(), f"resume: {directory} holds no run, expected a directory with {CONFIG_FILE}")
    try:
        return _build(RunConfig, json.loads(file.read_text()))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"resume: {file} is not a readable run configuration: {error}") from error


def find_run_config(source: str) -> RunConfig | None:
    """The configuration of the run that `source` names; None where it names something else."""
    return load_run_config(Path(source)) if (Path(source) / CONFIG_FILE).is_file() else None


def _build(kind: type[Config], values: dict[str, Any]) -> Config:
    """A dataclass from its JSON. Errors: ValueError on a value that is no field, or where none is there."""
    hints = get_type_hints(kind)
    unknown = ", ".join(sorted(set(values) - set(hints)))
    if not values or unknown:
        raise ValueError(f"expected the fields of {kind.__name__}, got {unknown or 'none'}")
    return kind(**{name: _value(hints[name], value) for name, value in values.items()})


def _value(hint: Any, value: Any) -> Any:
    if isinstance(hint, type) and is_dataclass(hint):
        return _build(hint, value)
    if isinstance(value, list):
        return tuple(value)
    return Path(value) if value is not None and "Path" in str(hint) else value
