"""`pmf train`: a run, from its preset or from where it was."""

from __future__ import annotations

import argparse
from pathlib import Path

import tyro

from pmf.errors import require
from pmf.train.config import RunConfig, load_run_config
from pmf.train.presets import PRESETS, run_preset


def command(arguments: list[str]) -> None:
    """Train a preset, `pmf train PRESET [options]`, or continue a run, `pmf train --resume DIRECTORY [options]`.

    The preset, or the stored configuration, supplies the defaults of all options.
    """
    named = bool(arguments) and not arguments[0].startswith("-")
    preset, options = (arguments[0], arguments[1:]) if named else (None, arguments)
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--resume", type=Path)
    resumed = finder.parse_known_args(options)[0].resume
    require(
        preset is not None or resumed is not None or "--help" in options or "-h" in options,
        f"preset: expected one of {', '.join(PRESETS)}, or --resume DIRECTORY",
    )
    stored = run_preset(preset or "digits") if resumed is None else load_run_config(resumed)
    config = tyro.cli(RunConfig, prog=f"pmf train {preset or 'PRESET'}", args=options, default=stored)
    require(
        resumed is None or config.out == stored.out,
        f"out: expected none beside --resume, which continues in {resumed}, got {config.out}",
    )
    from pmf.train.data import open_data
    from pmf.train.distributed import join, leave
    from pmf.train.loop import Trainer

    world = join(config.device, config.sharding)
    trainer = Trainer(config, open_data(config.data, config.model.image_size), world)
    trainer.run()
    if world.main:
        print(f"run: {trainer.directory} (samples.png, loss.png, metrics.jsonl)")
    leave(world)
