"""`pmf sample`: a PNG grid of images from a checkpoint."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import tyro
from torch import Tensor

import pmf
from pmf.atomic_files import require_writable
from pmf.config import published_guidance
from pmf.errors import require
from pmf.fields import check_fields
from pmf.images import check_png_name, save_grid
from pmf.sampling import seeds_from
from pmf.train.config import find_run_around, require_at_least
from pmf.train.distributed import pick_device
from pmf.train.options import parse

MAX_IMAGES = 100_000
"""Of a grid, which is held in memory."""


@dataclass(frozen=True)
class SampleConfig:
    """Draw images from a checkpoint into one PNG grid."""

    source: tyro.conf.Positional[str]
    """Run directory, checkpoint file or Hugging Face hub id."""
    out: Path = Path("samples.png")
    """The PNG to write."""
    labels: tuple[int, ...] = ()
    """Class of each column (default: the first ten). The number of classes stands for none of them."""
    rows: int = 8
    """Rows of the grid; every image has its own noise."""
    steps: int = 1
    """Network evaluations per image."""
    omega: float | None = None
    """Guidance scale (default: that of the run or of the published preset)."""
    t_min: float | None = None
    """Start of the guidance interval (default: as for omega)."""
    t_max: float | None = None
    """End of the guidance interval (default: as for omega)."""
    guidance: str | None = None
    """A published setting, by name, instead of omega, t_min and t_max: pMF-B/16, pMF-B/16-torch, ..."""
    seed: int = 0
    """Seed of the first image; image i has seed + i."""
    weights: str | None = None
    """Weights of a run: model, ema_500, ... (default: the run's sampling_weights)."""
    batch_size: int = 64
    """Images per batch."""
    device: str = "auto"
    """Device: auto, cpu, cuda, ..."""

    prefix: ClassVar[str] = ""

    def __post_init__(self) -> None:
        check_fields(self)
        require_at_least(self, 1, "rows", "steps", "batch_size")
        images = self.rows * (len(self.labels) or 10)
        check_png_name("out", self.out)
        require(images <= MAX_IMAGES, f"rows: expected at most {MAX_IMAGES} images in a grid, got {images}")


def _guidance(config: SampleConfig) -> dict[str, Any]:
    """omega, t_min and t_max: by name, from the flags, else from the run's configuration where `source` is a run."""
    given = {name: getattr(config, name) for name in ("omega", "t_min", "t_max")}
    if config.guidance is not None:
        alone = all(value is None for value in given.values())
        require(alone, f"guidance: expected no omega, t_min or t_max beside it, got {given}")
        return asdict(published_guidance(config.guidance))
    run = find_run_around(config.source)
    defaults = asdict(run.sampling) if run else {}
    return {name: defaults.get(name) if value is None else value for name, value in given.items()}


def finite(images: Tensor, weights: str | Path | None) -> Tensor:
    """The images that a network with these weights gave. Errors: `InputError` if they are not finite."""
    require(bool(images.isfinite().all()), lambda: f"weights: {weights} give images that are not finite")
    return images


def command(arguments: list[str]) -> None:
    """Write a grid: one column per label, `rows` images each."""
    config = parse(SampleConfig, "pmf sample", arguments)
    require_writable(config.out, "out")
    device = pick_device(config.device)
    model = pmf.PMFDiT.from_pretrained(config.source, weights=config.weights, aux_head=False, device=device)
    labels = config.labels or tuple(range(min(10, model.config.num_classes)))
    seeds = seeds_from(config.seed, len(labels) * config.rows)
    images = pmf.generate(
        model,
        list(labels) * config.rows,
        seeds=seeds,
        steps=config.steps,
        batch_size=config.batch_size,
        progress=True,
        **_guidance(config),
    )
    save_grid(config.out, finite(images, config.weights or config.source), columns=len(labels))
    print(f"wrote {config.out}: columns {' '.join(map(str, labels))}")
