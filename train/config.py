"""The whole configuration of a run: every value has a flag on the command line."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import get_type_hints

from pmf.config import LOSSES, MODELS, LossConfig, ModelConfig
from pmf.errors import InputError, require
from pmf.train.optim import OptimizerConfig

CONFIG_FILE = "config.json"


@dataclass(frozen=True)
class SamplingConfig:
    """How samples are drawn for grids and for evaluation."""

    omega: float = 1.1
    """Guidance scale, at least 1."""
    t_min: float = 0.0
    """Start of the guidance interval."""
    t_max: float = 1.0
    """End of the guidance interval."""


@dataclass(frozen=True)
class RunConfig:
    """A training run."""

    out: Path = Path("runs/digits")
    """Directory of the run: configuration, metrics, checkpoints, pictures."""
    resume: Path | None = None
    """Continue the run in this directory exactly where it was saved; flags given beside it override it."""
    overwrite: bool = False
    """Replace a run that is already in `out`."""
    steps: int = 1600
    """Training steps."""
    batch_size: int = 64
    """Images per step."""
    seed: int = 0
    """Seed of initialisation, data order and draws."""
    device: str = "auto"
    """Device to train on: auto (cuda where there is one, else cpu), cpu, cuda, cuda:1, ..."""
    impl: str = "auto"
    """Implementation of the ops: auto, triton or reference."""
    ema_half_lives: tuple[float, ...] = (500.0, 1000.0, 2000.0)
    """Half-lives of the EMA copies, in thousands of images."""
    sampling_weights: str = "ema_500"
    """Weights that sampling and evaluation use: model, or ema_ and a half-life."""
    save_every: int = 500
    """Steps between checkpoints (the last step always saves)."""
    sample_every: int = 500
    """Steps between sample grids and loss curves (the last step always draws them)."""
    model: ModelConfig = field(default_factory=lambda: MODELS["pMF-digits"])
    """The network."""
    loss: LossConfig = field(default_factory=lambda: LOSSES["pMF-digits"])
    """The loss."""
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(learning_rate=4e-3, decay_share=1.0))
    """The optimizer."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """The sampler."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "save_every", "sample_every"):
            require(getattr(self, name) > 0, f"{name}: expected a positive number, got {getattr(self, name)}")
        known = ("model", *(f"ema_{k:g}" for k in self.ema_half_lives))
        require(
            self.sampling_weights in known,
            f"sampling_weights: expected one of {', '.join(known)}, got {self.sampling_weights!r}",
        )


def to_json(config: RunConfig) -> str:
    """The configuration as JSON, to the last value."""
    return json.dumps(asdict(config), indent=2, default=str)


def load_run_config(directory: Path) -> RunConfig:
    """The configuration of the run in `directory`. Errors: no run there, or an unreadable file."""
    file = directory / CONFIG_FILE
    require(file.is_file(), f"resume: {directory} holds no run, expected a directory with {CONFIG_FILE}")
    try:
        return _build(RunConfig, json.loads(file.read_text()))
    except (json.JSONDecodeError, TypeError, KeyError) as error:
        raise InputError(f"resume: {file} is not a readable run configuration: {error}") from error


def _build(kind: type, values: dict):
    """A dataclass from its JSON."""
    hints = get_type_hints(kind)
    return kind(**{f.name: _value(hints[f.name], values[f.name]) for f in fields(kind) if f.name in values})


def _value(hint, value):
    if is_dataclass(hint):
        return _build(hint, value)
    if isinstance(value, list):
        return tuple(value)
    return Path(value) if value is not None and "Path" in str(hint) else value
