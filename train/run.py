"""`pmf train`: a run, from its preset or from where it was."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TypeVar

import tyro

from pmf.errors import require
from pmf.train.config import RunConfig, load_run_config
from pmf.train.presets import PRESETS, run_preset

Config = TypeVar("Config", bound=RunConfig)


def configured(arguments: list[str], command: str, kind: type[Config], preset: str | None = None) -> Config:
    """The configuration that `[PRESET] [--resume DIRECTORY] [options]` says; `preset`: the one where none is named.

    The preset, or the stored configuration, supplies the defaults of all options.
    """
    if arguments and not arguments[0].startswith("-"):
        preset, arguments = arguments[0], arguments[1:]
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--resume", type=Path)
    resumed = finder.parse_known_args(arguments)[0].resume
    require(
        preset is not None or resumed is not None or "--help" in arguments or "-h" in arguments,
        f"preset: expected one of {', '.join(PRESETS)}, or --resume DIRECTORY",
    )
    stored = run_preset(preset or "digits") if resumed is None else load_run_config(resumed)
    config = tyro.cli(kind, prog=f"pmf {command} {preset or 'PRESET'}", args=arguments, default=kind(**vars(stored)))
    require(
        resumed is None or config.out == stored.out,
        f"out: expected none beside --resume, which continues in {resumed}, got {config.out}",
    )
    return config


def command(arguments: list[str]) -> None:
    """Train a preset, `pmf train PRESET [options]`, or continue a run, `pmf train --resume DIRECTORY [options]`."""
    config = configured(arguments, "train", RunConfig)
    from pmf.train.data import open_data
    from pmf.train.distributed import join, leave
    from pmf.train.loop import Trainer

    world = join(config.device, config.sharding)
    trainer = Trainer(config, open_data(config.data, config.model.image_size), world)
    trainer.run()
    if world.main:
        print(f"run: {trainer.directory} (samples.png, loss.png, metrics.jsonl)")
    leave(world)
