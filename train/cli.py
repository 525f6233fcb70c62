"""The command line: `pmf COMMAND ...`, or `python -m pmf.train COMMAND ...`."""

from __future__ import annotations

import importlib
import importlib.util
import io
import sys
from collections.abc import Iterable

from pmf.errors import InputError, extra

COMMANDS = {
    "train": ("pmf.train.loop", "train a preset or resume a run; start it with torchrun for several GPUs"),
    "data": ("pmf.train.data.prepare", "prepare ImageNet or your own pictures for training"),
    "sample": ("pmf.train.sample", "draw a PNG grid of images from a checkpoint"),
    "eval": ("pmf.train.evaluation.command", "measure a checkpoint: FID, Inception score, precision and recall"),
    "doctor": ("pmf.train.doctor", "check a run before it starts: kernels, memory, speed, data, and what to change"),
}
"""Command name -> (module whose `command(arguments)` runs, help line)."""

PACKAGES = ("PIL", "matplotlib", "sklearn", "tqdm", "tyro")
"""Those of the extra `train`."""


def _find_packages() -> None:
    """Look for all of them at the start: without matplotlib a run would fail at its end, at the loss curve."""
    with extra("train", "the command line needs"):
        for name in PACKAGES:
            if importlib.util.find_spec(name) is None:
                raise ModuleNotFoundError(f"No module named {name!r}")


def _usage(presets: Iterable[str]) -> str:
    lines = "\n".join(f"  {name:8}{text}" for name, (_, text) in COMMANDS.items())
    return (
        f"usage: pmf COMMAND [options]\n\n{lines}\n\n`pmf COMMAND --help` explains every option. Presets to train: "
        f"{', '.join(presets)};\n`pmf digits` is short for `pmf train digits`."
    )


def main(arguments: list[str] | None = None) -> None:
    """Run one command. Bad input ends with one line on standard error and exit status 2."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # paths need not be UTF-8
    try:
        _find_packages()
        _run(sys.argv[1:] if arguments is None else arguments)
    except (InputError, OSError) as error:
        print(f"pmf: {error}", file=sys.stderr)
        sys.exit(2)


def _run(arguments: list[str]) -> None:
    from pmf.train.presets import PRESETS  # imports tyro

    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage(PRESETS))
        return
    if arguments[0] in PRESETS:
        arguments = ["train", *arguments]
    name, *rest = arguments
    if name not in COMMANDS:
        sys.exit(f"pmf: unknown command {name!r}, expected one of {', '.join(COMMANDS)}")
    importlib.import_module(COMMANDS[name][0]).command(rest)
