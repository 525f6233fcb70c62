"""Presets, and the configuration of a run from the command line.

The presets are the two demos and the six published models with their published settings (arXiv 2601.22158).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from pmf.config import DIGITS, PUBLISHED, Guidance, ModelSettings
from pmf.errors import require
from pmf.optim import OptimizerConfig
from pmf.train.config import PerceptualConfig, PosttrainConfig, RunConfig, load_run_config
from pmf.train.options import RUN_NEEDS, Need, parse, refuse_changed, refuse_ignored, refuse_repeated

Config = TypeVar("Config", bound=RunConfig)
IMAGENET_IMAGES = 1_281_167
EPOCHS = 320
BATCH = 1024


def _published(name: str, settings: ModelSettings) -> RunConfig:
    """ImageNet, batch 1024, 320 epochs, constant learning rate 1e-3, perceptual losses on.

    Device batches have 128 images (L and H: 64, to fit beside the larger network in 80 GB) on any number of GPUs, and
    each has its own draws: any number of GPUs computes the same run. H is sharded.
    """
    return RunConfig(
        out=Path("runs") / name.replace("/", "-"),
        data=f"data/imagenet{settings.network.image_size}",
        workers=8,
        steps=EPOCHS * IMAGENET_IMAGES // BATCH,
        batch_size=BATCH,
        device_batch=128 if name.startswith("pMF-B") else 64,
        sharding="fsdp" if name.startswith("pMF-H") else "ddp",
        perceptual=PerceptualConfig(enabled=True),
        sampling_weights=f"ema_{settings.ema_half_life:g}",
        save_every=2500,
        sample_every=10_000,
        model=settings.network,
        loss=settings.loss,
        optimizer=OptimizerConfig(),
        sampling=settings.guidance,
    )


# Loss and optimizer are those of digits, chosen for runs of minutes.
PHOTOGRAPHS = RunConfig(
    out=Path("runs/photographs"),
    data="photographs",
    steps=1400,
    batch_size=32,
    model=replace(DIGITS.network, image_size=32, patch_size=8, hidden_size=128, in_channels=3, bottleneck=96),
    sampling=Guidance(omega=1.0),
)

PRESETS: dict[str, RunConfig] = {
    "digits": RunConfig(),
    "photographs": PHOTOGRAPHS,
    **{name: _published(name, settings) for name, settings in PUBLISHED.items()},
}


def run_preset(name: str) -> RunConfig:
    """Return the preset of that name. Errors: `InputError` on an unknown name."""
    require(name in PRESETS, f"preset: expected one of {', '.join(PRESETS)}, got {name!r}")
    return PRESETS[name]


@dataclass(frozen=True)
class Start:
    """What a command starts from, its first argument, unless it resumes a run."""

    word: str
    """The argument's name in messages."""
    expected: str
    """What it may be, in words."""
    configuration: Callable[[str, str | None], RunConfig]
    """(argument, --init-weights) -> the defaults of all options."""
    example: str
    """What the defaults belong to that help shows where there is no start."""
    of_example: Callable[[], RunConfig]
    """Those defaults."""


PRESET = Start(
    word="preset",
    expected=f"one of {', '.join(PRESETS)}",
    configuration=lambda name, weights: run_preset(name),
    example="digits",
    of_example=RunConfig,
)


def configured(
    arguments: list[str],
    command: str,
    kind: type[Config],
    default: str | None = None,
    start: Start = PRESET,
    needs: tuple[Need, ...] = (),
) -> Config:
    """Parse `[START] [--resume DIRECTORY] [options]` into a configuration; without a start, that named `default`.

    The start, or the stored configuration of the resumed run, supplies the defaults of all options. `needs`: those of
    the command beside a run's. Errors: `InputError` on both, on an option that would be ignored, and on one given
    twice.
    """
    first = None
    if arguments and not arguments[0].startswith("-"):
        first, arguments = arguments[0], arguments[1:]
    refuse_repeated(kind, arguments)
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--resume", type=Path, nargs="?")  # without a value the parser of all options will refuse it
    finder.add_argument("--init-weights", "--init_weights", nargs="?")
    found = finder.parse_known_args(arguments)[0]
    resumed = found.resume
    require(
        first is None or resumed is None,
        f"{start.word}: expected none beside --resume, which takes the configuration of {resumed}, got {first!r}",
    )
    given = first
    first = first or (default if resumed is None else None)
    helped = "--help" in arguments or "-h" in arguments
    needed = first is not None or resumed is not None or helped
    require(needed, f"{start.word}: expected {start.expected}, or --resume DIRECTORY")
    if resumed is None:
        stored = start.of_example() if first is None else start.configuration(first, found.init_weights)
    else:
        stored = load_run_config(resumed)
        ours = isinstance(stored, PosttrainConfig) == issubclass(kind, PosttrainConfig)
        trained = "pmf posttrain" if isinstance(stored, PosttrainConfig) else "pmf train"
        require(ours, f"resume: {resumed} is a run of `{trained}`, expected `{trained} --resume {resumed}`")
    stored = kind(**vars(stored))
    note = None
    if helped and given is None and resumed is None:
        shown = f"`pmf {command} {start.word.upper()} --help` shows those of {start.word.upper()}, {start.expected}"
        note = f"The defaults below are those of {start.example}; {shown}."
    config = parse(kind, f"pmf {command} {given or start.word.upper()}", arguments, stored, note)
    if resumed is not None:
        refuse_changed(config, stored)
    refuse_ignored(config, stored, (*RUN_NEEDS, *needs))
    require(
        resumed is None or config.out in (stored.out, resumed),
        f"out: expected none beside --resume, which continues in {resumed}, got {config.out}",
    )
    return config
