"""The command line: `pmf digits`, `pmf sample`, `pmf eval` (or `python -m pmf.train ...`)."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from pmf.errors import InputError, require
from pmf.train.config import RunConfig, load_run_config

COMMANDS = {
    "digits": "train pMF on scikit-learn's handwritten digits",
    "sample": "draw a PNG grid of images from a checkpoint",
    "eval": "measure a digits checkpoint: Fréchet distance and accuracy",
}


@dataclass(frozen=True)
class SampleConfig:
    """Draw images from a checkpoint into one PNG grid."""

    source: tyro.conf.Positional[str]
    """Run directory, checkpoint file or Hugging Face hub id."""
    out: Path = Path("samples.png")
    """The PNG to write."""
    labels: tuple[int, ...] = ()
    """Class of each column (default: the first ten)."""
    rows: int = 8
    """Rows of the grid, each from noise of its own."""
    steps: int = 1
    """Network evaluations per image."""
    omega: float | None = None
    """Guidance scale (default: the setting of the run or of the published preset)."""
    t_min: float | None = None
    """Start of the guidance interval (default as for omega)."""
    t_max: float | None = None
    """End of the guidance interval (default as for omega)."""
    seed: int = 0
    """Seed of the first image; image i has seed + i."""
    weights: str | None = None
    """Which weights of a run: model, ema_500, ... (default: the run's choice)."""
    batch_size: int = 64
    """Images at a time."""
    device: str = "auto"
    """Device: auto, cpu, cuda, ..."""


@dataclass(frozen=True)
class EvalConfig:
    """Measure a digits checkpoint with 500 samples, 50 per class."""

    source: tyro.conf.Positional[str]
    """Run directory or checkpoint file."""
    steps: tuple[int, ...] = (1, 2)
    """Numbers of network evaluations per image to measure."""
    omega: float | None = None
    """Guidance scale (default: the run's)."""
    t_min: float | None = None
    """Start of the guidance interval (default: the run's)."""
    t_max: float | None = None
    """End of the guidance interval (default: the run's)."""
    seed: int = 0
    """Which 500 noises: sample i has seed 500 seed + i."""
    weights: str | None = None
    """Which weights of a run: model, ema_500, ... (default: the run's choice)."""
    device: str = "auto"
    """Device: auto, cpu, cuda, ..."""


def _sampling(config: SampleConfig | EvalConfig) -> dict[str, float]:
    """omega, t_min and t_max: from the flags, else from the run's configuration where `source` is a run."""
    run = load_run_config(Path(config.source)).sampling if (Path(config.source) / "config.json").is_file() else None
    given = {name: getattr(config, name) for name in ("omega", "t_min", "t_max")}
    return {name: getattr(run, name, None) if value is None else value for name, value in given.items()}


def _load(config: SampleConfig | EvalConfig):
    from pmf import PMFDiT
    from pmf.train.distributed import pick_device

    return PMFDiT.from_pretrained(
        config.source, weights=config.weights, aux_head=False, device=pick_device(config.device)
    )


def digits(arguments: list[str]) -> None:
    """Train on digits; with --resume, the stored configuration supplies the defaults."""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--resume", type=Path)
    resumed = finder.parse_known_args(arguments)[0].resume
    stored = RunConfig() if resumed is None else load_run_config(resumed)
    config = tyro.cli(RunConfig, prog="pmf digits", args=arguments, default=stored)
    require(
        resumed is None or config.out == stored.out,
        f"out: expected none beside --resume, which continues in {resumed}, got {config.out}",
    )
    from pmf.train import data
    from pmf.train.loop import Trainer

    trainer = Trainer(config, data.digits()[0])
    trainer.run()
    print(f"run: {trainer.directory} (samples.png, loss.png, metrics.jsonl)")


def sample(arguments: list[str]) -> None:
    """Write a grid: one column per label, `rows` images each."""
    config = tyro.cli(SampleConfig, prog="pmf sample", args=arguments)
    require(config.rows > 0, f"rows: expected a positive number, got {config.rows}")
    from pmf import generate
    from pmf.train.images import save_grid

    model = _load(config)
    labels = config.labels or tuple(range(min(10, model.config.num_classes)))
    images = generate(
        model,
        list(labels) * config.rows,
        seeds=range(config.seed, config.seed + len(labels) * config.rows),
        steps=config.steps,
        batch_size=config.batch_size,
        progress=True,
        **_sampling(config),
    )
    save_grid(config.out, images, columns=len(labels))
    print(f"wrote {config.out}: columns {' '.join(map(str, labels))}")


def evaluate(arguments: list[str]) -> None:
    """Print one JSON line per number of steps."""
    config = tyro.cli(EvalConfig, prog="pmf eval", args=arguments)
    from pmf.train.evaluate import evaluate_digits

    model = _load(config)
    for steps in config.steps:
        result = evaluate_digits(model, steps=steps, seed=config.seed, **_sampling(config))
        print(json.dumps({"steps": steps, **{name: round(value, 4) for name, value in result.items()}}))


def main(arguments: list[str] | None = None) -> None:
    """Run one command. Bad input ends with one line on standard error and exit status 2."""
    arguments = sys.argv[1:] if arguments is None else arguments
    commands = {"digits": digits, "sample": sample, "eval": evaluate}
    usage = "\n".join(f"  {name:8}{text}" for name, text in COMMANDS.items())
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"usage: pmf COMMAND [options]\n\n{usage}\n\n`pmf COMMAND --help` explains every option.")
        return
    if arguments[0] not in commands:
        sys.exit(f"pmf: unknown command {arguments[0]!r}, expected one of {', '.join(commands)}")
    try:
        commands[arguments[0]](arguments[1:])
    except (InputError, OSError) as error:
        print(f"pmf: {error}", file=sys.stderr)
        sys.exit(2)
