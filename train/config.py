"""The whole configuration of a run: every value has a flag on the command line."""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch

from pmf.config import DIGITS, Guidance, LossConfig, ModelConfig
from pmf.data.loader import MAX_WORKERS
from pmf.errors import InputError, first_line, reading, require
from pmf.feature_networks import NETWORKS, network_name
from pmf.fields import check_fields, from_json
from pmf.metrics import Resize
from pmf.model import Checkpointing, Stream
from pmf.optim import OptimizerConfig
from pmf.pictures import is_picture
from pmf.sharded import REPLICATED, Sharding

CONFIG_FILE = "config.json"
DIGITS_OPTIMIZER = OptimizerConfig(learning_rate=4e-3, decay_share=1.0)


def require_at_least(config: Any, least: Literal[0, 1], *names: str) -> None:
    """Raise `InputError` for the first of these values of `config` that is below `least`."""
    for name in names:
        value, expected = getattr(config, name), "a positive number" if least else "a number >= 0"
        require(value >= least, f"{config.prefix}{name}: expected {expected}, got {value}")


@dataclass(frozen=True)
class PerceptualConfig:
    """The perceptual losses, weighted by loss.lpips_weight and loss.convnext_weight."""

    enabled: bool = False
    """Add LPIPS and ConvNeXt distances to the loss (needs the perceptual extra)."""
    lpips: str = "hub"
    """VGG-16 weights for LPIPS: hub (torchvision downloads them), a state dict file, or random (for trial runs)."""
    convnext: str = "hub"
    """ConvNeXt-V2 weights: hub (the base size), a hub id, a local directory, or random (for trial runs)."""

    def __post_init__(self) -> None:
        check_fields(self, "perceptual.")


@dataclass(frozen=True)
class ExtractionConfig:
    """How to compute features of images, for evaluations and for reference statistics."""

    resize: Resize | None = None
    """Resize to Inception's 299 pixels: tf1 (for statistics mu, sigma) or half_pixel (for pMF's ref_mu, ref_sigma).
    Default: by the names in the reference; tf1 for a folder."""
    inception: Path | None = None
    """State dict file of torch-fidelity's Inception-v3 (default: torch-fidelity downloads it)."""
    batch_size: int = 64
    """Images per batch on each device."""
    chunk: int = 1000
    """Images between saves of the features; an interruption costs each process at most this many."""

    prefix: ClassVar[str] = ""
    """Prefix of these values' names in error messages."""

    def __post_init__(self) -> None:
        check_fields(self, self.prefix)
        require_at_least(self, 1, "batch_size", "chunk")


@dataclass(frozen=True)
class MeasurementConfig(ExtractionConfig):
    """The weights to measure, and the reference."""

    reference: Path | None = None
    """Folder of real images, a directory that `pmf data prepare` filled, npz of statistics (mu and sigma, or ref_mu and
    ref_sigma), or directory of NAME.npz by feature network. Precision and recall need images, or statistics with
    features. Digits and photographs can do without a reference."""
    weights: tuple[str, ...] = ()
    """Weights of a run to measure: model, ema_500, ... (default: the run's sampling_weights)."""
    per_class: int = 50
    """Images per class (without a reference: always 50)."""
    networks: tuple[str, ...] = ()
    """Of a reference that holds NAME.npz by feature network: those to measure, each as NAME (published weights),
    NAME:PATH or NAME:random (default: all, with published weights)."""
    held_out: Path | None = None
    """Directory of such statistics of held-out real images: reports FDr, distances relative to theirs."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, 1, "per_class")

    @property
    def of_spaces(self) -> bool:
        """Whether the reference is a directory of statistics by feature network, NAME.npz, and not one of pictures."""
        with reading("reference", self.reference):
            if self.reference is None or not self.reference.is_dir():
                return False
            seen = [entry for entry in self.reference.iterdir() if not entry.name.startswith(".")]
            pictures = any(entry.is_dir() or is_picture(entry.name) for entry in seen)
        return not pictures and any(entry.suffix == ".npz" for entry in seen)


@dataclass(frozen=True)
class EvaluationConfig(MeasurementConfig):
    """Evaluations during training: as by `pmf eval`, of one-step samples."""

    precision: Literal["auto", "bfloat16", "float32"] = "auto"
    """Precision of the sampling network, weights included (`pmf eval --dtype bfloat16` keeps weights in float32).
    auto: the precision of the run."""

    prefix: ClassVar[str] = "evaluation."


@dataclass(frozen=True)
class RunConfig:
    """A training run."""

    out: Path = Path("runs/digits")
    """Directory of the run: configuration, metrics, checkpoints, pictures."""
    resume: Path | None = None
    """Resume the run in this directory exactly where it was saved; other flags override its stored configuration."""
    overwrite: bool = False
    """Replace the run in `out`; other files there are kept."""
    data: str = "digits"
    """Training data: digits, photographs, or a directory made by `pmf data prepare`."""
    workers: int = 0
    """Processes that read images ahead, per training process, at most 512 (0: the training process reads them)."""
    flip: bool = False
    """Mirror each image left to right with probability 1/2 (off in the published runs)."""
    max_corrupt: int = 100
    """Number of unreadable images that each process may replace, with a warning; one more is an error."""
    init: str | None = None
    """Fine-tune from these weights: a run directory, checkpoint file, training state of the authors, or hub id."""
    init_weights: str | None = None
    """Weights of init: a file of a directory or hub id (pMF-B-16, ema_500), a set in a training state (ema_1000),
    or both (pMF-B-16-full:ema_1000). Default: the weights for sampling."""
    init_state: bool = False
    """Continue the authors' run from the full training state in init:
    weights, three averages, moments of Muon and Adam, and step."""
    steps: int = 1600
    """Training steps."""
    batch_size: int = 64
    """Images per step, over all processes."""
    device_batch: int | None = None
    """Images per forward pass on a device (default: batch_size / processes, without accumulation).
    Each such batch has its own draws and flow-matching half; a step accumulates their gradients."""
    seed: int = 0
    """Seed of initialisation, data order and draws: the same on any number of processes at a given device_batch."""
    device: str = "auto"
    """Device to train on: auto (cuda if available, else cpu), cpu, cuda, cuda:1, ..."""
    sharding: Sharding = "ddp"
    """Under torchrun. ddp: every process holds everything. zero1: they share the optimizers' state and the averages.
    fsdp: they share the network too. hybrid: they share all that within each machine. A single process ignores it."""
    precision: Literal["auto", "bfloat16", "float32"] = "auto"
    """bfloat16: matrix products and activations under autocast, weights in float32.
    auto: bfloat16 on CUDA, else float32."""
    checkpointing: Checkpointing = "none"
    """What backward makes again instead of keeping it. light: norms, MLP functions, q and k, which saves a third of the
    bytes and adds no product. block: all but the inputs of the blocks, for a fifth more operations."""
    stream: Stream = "float32"
    """Residual stream of the network in training, with precision bfloat16; bfloat16 saves memory for backward."""
    captured: bool = False
    """Run forward and backward as CUDA graphs, one pair per combination of row counts (not with fsdp or hybrid)."""
    compiled: bool = False
    """Compile the blocks with torch.compile (not with fsdp or hybrid)."""
    impl: str | None = None
    """Implementation of the ops: auto, triton or reference (default: PMF_IMPL, else auto)."""
    perceptual: PerceptualConfig = PerceptualConfig()
    """The perceptual losses."""
    ema_half_lives: tuple[float, ...] = (500.0, 1000.0, 2000.0)
    """Half-lives of the EMA copies, in thousands of images."""
    ema_device: Literal["auto", "cpu"] = "auto"
    """Where the EMA copies are: auto (where the network is), or cpu: beside a GPU, a thread updates them there."""
    ema_every: int = 1
    """Steps between updates of the EMA copies, each with the product of these steps' decay factors."""
    sampling_weights: str = "ema_500"
    """Weights for sampling and evaluation: model, or ema_ and a half-life."""
    save_every: int = 500
    """Steps between checkpoints (the last step always saves)."""
    keep_checkpoints: int = 2
    """Number of checkpoints to keep, the latest ones."""
    max_skipped: int = 10
    """Number of consecutive steps that may be skipped for a non-finite loss or gradient; one more stops the run."""
    sample_every: int = 500
    """Steps between exports: weights for sampling, sample grid, loss curve (the last step always exports)."""
    eval_every: int = 0
    """Steps between evaluations; each saves a checkpoint first (0: never; otherwise the last step is evaluated too)."""
    model: ModelConfig = DIGITS.network
    """The network."""
    loss: LossConfig = DIGITS.loss
    """The loss."""
    optimizer: OptimizerConfig = DIGITS_OPTIMIZER
    """The optimizer."""
    sampling: Guidance = DIGITS.guidance
    """Guidance of samples, in grids and evaluations."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """The evaluations of `eval_every`."""

    prefix: ClassVar[str] = ""

    def __post_init__(self) -> None:
        check_fields(self)
        require_at_least(self, 1, "steps", "batch_size", "save_every", "sample_every", "keep_checkpoints", "ema_every")
        require_at_least(self, 0, "workers", "max_corrupt", "max_skipped", "eval_every", "seed")
        require(self.workers <= MAX_WORKERS, f"workers: expected at most {MAX_WORKERS}, got {self.workers}")
        whole = self.device_batch is None or (self.device_batch > 0 and self.batch_size % self.device_batch == 0)
        require(whole, f"device_batch: expected a divisor of batch_size {self.batch_size}, got {self.device_batch}")
        whole = not self.compiled or self.sharding in REPLICATED
        require(whole, f"compiled: expected sharding {' or '.join(REPLICATED)}, got {self.sharding}")
        whole = self.sharding != "zero1" or self.optimizer.name == "muon"
        require(whole, f"sharding: expected ddp, fsdp or hybrid with optimizer {self.optimizer.name}, got zero1")
        require(not self.init_state or self.init is not None, "init_state: expected a train state in init, got none")
        require(all(k > 0 for k in self.ema_half_lives), f"ema_half_lives: expected > 0, got {self.ema_half_lives}")
        known = ("model", *(f"ema_{k:g}" for k in self.ema_half_lives))
        require(len(set(known)) == len(known), f"ema_half_lives: expected different ones, got {self.ema_half_lives}")
        got = self.sampling_weights
        require(got in known, f"sampling_weights: expected one of {', '.join(known)}, got {got!r}")
        for got in self.evaluation.weights:
            require(got in known, f"evaluation.weights: expected one of {', '.join(known)}, got {got!r}")

    @property
    def both_heads(self) -> bool:
        """Whether the network has its v head."""
        return True

    @property
    def spaces(self) -> tuple[str, ...]:
        """The feature spaces whose Fréchet distance the run trains: none in MeanFlow training."""
        return ()

    def device_batch_on(self, processes: int) -> int:
        """Return the device batch on this many processes. Errors: `InputError` if they cannot share a step evenly."""
        size = self.device_batch or self.batch_size // processes
        require(
            size > 0 and self.batch_size % (size * processes) == 0,
            f"batch_size: expected a multiple of {processes} processes x {size} images at a time, "
            f"got {self.batch_size}",
        )
        return size

    def dtype_on(self, device: torch.device, precision: str = "auto") -> torch.dtype:
        """The dtype of matrix products on `device` in this precision; "auto" means the precision of the run."""
        chosen = self.precision if precision == "auto" else precision
        low = chosen == "bfloat16" or (chosen == "auto" and device.type == "cuda")
        return torch.bfloat16 if low else torch.float32


@dataclass(frozen=True)
class PosttrainConfig(RunConfig):
    """Post-training of a generator by the Fréchet distance between its images and real ones (arXiv 2604.28190).

    Images come from one step of the u head at the guidance of `sampling`. Options of the MeanFlow loss and its data
    count with --anchor alone.
    """

    features: tuple[str, ...] = ("inception", "siglip", "mae")
    """Networks whose features are matched: inception, siglip, mae, convnext, dinov2, clip, pixels, digits;
    NAME:FILE takes their weights from a file, NAME:random makes random ones (for trial runs)."""
    feature_weights: tuple[float, ...] = ()
    """Weight of each network's term, in their order (default: 1)."""
    feature_precision: Literal["bfloat16", "float32"] = "float32"
    """Precision of these networks."""
    reference: Path | None = None
    """Directory of statistics of real images, NAME.npz by `pmf eval statistics`. Digits can do without."""
    held_out: Path | None = None
    """Directory of statistics of held-out real images: distances are reported over theirs as well (FDr)."""
    population: Literal["average", "queue"] = "average"
    """How features of past images are kept: exponential averages of their moments, or the last ones."""
    decay: float | None = None
    """Decay of the averages in a step (default: a window 1 / (1 - decay) of a hundredth of the run, within 0.8 and
    0.999)."""
    queue: int = 50_000
    """Features in the queue."""
    fill: int = 50_000
    """Images that fill the averages before the first step (the queue is filled whole)."""
    label_weight: float = 0.0
    """Weight of the cross-entropy of the labels by networks with a classifier (convnext, digits): the statistics do not
    know the classes."""
    anchor: float = 0.0
    """Weight of the MeanFlow loss on real images, which keeps samples of several steps alive."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, 1, "fill")
        require_at_least(self, 0, "label_weight", "anchor")
        names = self.spaces
        require(bool(names), "features: expected at least one network, got none")
        known = *NETWORKS, "digits"
        unknown = [name for name in names if name not in known]
        require(not unknown, lambda: f"features: expected one of {', '.join(known)}, got {unknown[0]!r}")
        require(len(set(names)) == len(names), f"features: expected different networks, got {', '.join(names)}")
        fits = not self.feature_weights or len(self.feature_weights) == len(names)
        require(fits, f"feature_weights: expected {len(names)} of them, got {len(self.feature_weights)}")
        require(all(w > 0 for w in self.feature_weights), f"feature_weights: expected > 0, got {self.feature_weights}")
        require(self.decay is None or 0 <= self.decay < 1, f"decay: expected a number in [0, 1), got {self.decay}")
        fits = self.population == "average" or self.queue >= max(self.batch_size, 2)
        require(fits, f"queue: expected at least a batch, {self.batch_size} features, got {self.queue}")
        require(not self.init_state, "init_state: expected none: post-training has an optimizer of its own")
        require(not self.captured, "captured: expected none: the steps of post-training are not captured")

    @property
    def both_heads(self) -> bool:
        """Whether the network has its v head, which only the anchor trains."""
        return self.anchor > 0

    @property
    def spaces(self) -> tuple[str, ...]:
        """The names of the networks of `features`."""
        return tuple(map(network_name, self.features))

    @property
    def decay_in_effect(self) -> float:
        """The decay of the averages."""
        if self.decay is not None:
            return self.decay
        return min(0.999, max(0.8, 1 - 100 / self.steps))

    @property
    def window(self) -> float:
        """How many steps the population covers."""
        if self.population == "queue":
            return self.queue / self.batch_size
        return 1 / (1 - self.decay_in_effect)


def to_json(config: RunConfig) -> str:
    """The whole configuration as JSON."""
    return json.dumps(asdict(config), indent=2, default=str)


def load_run_config(directory: Path, name: str = "resume") -> RunConfig:
    """Load the configuration of the run in `directory`, which the argument `name` names.

    It is a `PosttrainConfig` where the run is a post-training.
    Errors: `InputError` if there is none or it is unreadable.
    """
    file = directory / CONFIG_FILE
    with reading(name, file):
        require(file.is_file(), f"{name}: {directory} holds no run, expected a directory with {CONFIG_FILE}")
    try:
        stored = json.loads(file.read_text())
        kind = PosttrainConfig if isinstance(stored, dict) and "features" in stored else RunConfig
        config = from_json(kind, stored)
        require("model" in stored, "it has no field model")  # whose defaults are another network
        return config
    except (InputError, ValueError, TypeError, RecursionError, OSError) as error:
        raise InputError(f"{name}: {file} is not a readable run configuration: {first_line(error)}") from error


def find_run_around(source: str) -> RunConfig | None:
    """Load the configuration of the run that `source` is, or is a file in; None if there is none."""
    path = Path(source)
    with reading("source", path):
        if not path.is_file():
            return find_run_config(source)
    with contextlib.suppress(InputError):  # a config.json beside the file may be anything
        return find_run_config(str(path.parent))
    return None


def find_run_config(source: str) -> RunConfig | None:
    """Load the configuration of the run in directory `source`; None if `source` is something else."""
    with reading("source", source):
        return load_run_config(Path(source), "source") if (Path(source) / CONFIG_FILE).is_file() else None
