"""The command line: `pmf COMMAND ...`, or `python -m pmf.train COMMAND ...`."""

from __future__ import annotations

import importlib
import importlib.util
import os
import signal
import sys
import time
from collections.abc import Iterable

import torch

import pmf
from pmf.errors import InputError, extra, first_line, require
from pmf.train.distributed import CommonError, lost, own_rank
from pmf.train.terminal import logged_lines, soft_output

COMMANDS = {
    "train": ("pmf.train.loop", "train a preset or resume a run; start it with torchrun for several GPUs"),
    "posttrain": ("pmf.train.posttraining.command", "post-train a run by the Fréchet distance as the loss"),
    "data": ("pmf.train.data.prepare", "prepare ImageNet or your own pictures for training"),
    "sample": ("pmf.train.sample", "draw a PNG grid of images from a checkpoint"),
    "eval": ("pmf.train.evaluation.command", "measure a checkpoint: FID, Inception score, precision and recall"),
    "doctor": ("pmf.train.doctor", "check a run before it starts: kernels, memory, speed, data, and what to change"),
}
"""Command name -> (module whose `command(arguments)` runs, help line)."""

PATIENCE = 3.0
"""Seconds that the other processes of a run leave to the first one to report an error."""

PACKAGES = ("PIL", "matplotlib", "sklearn", "tqdm", "tyro")
"""Those of the extra `train`."""


def _find_packages() -> None:
    """Look for all of them at the start: without matplotlib a run would fail at its end, at the loss curve."""
    with extra("train", "the command line needs"):
        for name in PACKAGES:
            if importlib.util.find_spec(name) is None:
                raise ModuleNotFoundError(f"No module named {name!r}")


def _usage(presets: Iterable[str]) -> str:
    lines = "\n".join(f"  {name:10}{text}" for name, (_, text) in COMMANDS.items())
    return (
        f"usage: pmf COMMAND [options], or pmf --version\n\n{lines}\n\n`pmf COMMAND --help` explains every option. "
        f"Presets to train: {', '.join(presets)};\n`pmf digits` is short for `pmf train digits`."
    )


def main(arguments: list[str] | None = None) -> None:
    """Run one command.

    Bad input and a failing system end with one line on standard error and exit status 2, Ctrl-C with status 130.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if _is_idle(arguments):
        return
    with soft_output(), logged_lines():
        try:
            _find_packages()
            _run(arguments)
        except (InputError, OSError) as error:
            _report(error, str(error))
        except (MemoryError, RuntimeError) as error:
            if lost(error):
                _report(error, f"another process of this command ended, and this one with it ({first_line(error)})")
            if not _out_of_memory(error):
                raise
            trains = not arguments or arguments[0] not in COMMANDS or "train" in arguments[0]
            advice = "; `pmf doctor` with the same options says what fits" if trains else ""
            _report(error, f"out of memory ({first_line(error)}){advice}")
        except KeyboardInterrupt:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one would interrupt the end
            print("\npmf: interrupted", file=sys.stderr)
            sys.exit(130)


def _is_idle(arguments: list[str]) -> bool:
    """Whether torchrun started this process for something that its first process does alone."""
    other = "LOCAL_RANK" in os.environ and own_rank() > 0
    return other and (arguments[:1] in ([], ["data"], ["sample"]) or not {"-h", "--help"}.isdisjoint(arguments))


def _out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, of a GPU (which has a class of error) or of the CPU (which PyTorch reports in words)."""
    known = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return known or "can't allocate memory" in str(error) or "not enough memory" in str(error)


def _report(error: BaseException, message: str) -> None:
    """Print the line, once for all processes, and exit."""
    other = own_rank() > 0
    if other and not isinstance(error, CommonError):
        time.sleep(PATIENCE)  # if the first process fails as well, it reports, and torchrun ends this one meanwhile
    if not (other and isinstance(error, CommonError)):
        line = "\n" * other + f"pmf: {' '.join(message.split())}"  # a line of its own: not behind the first one's bar
        print(line, file=sys.stderr)
    sys.exit(2)


def _run(arguments: list[str]) -> None:
    from pmf.train.presets import PRESETS  # imports tyro

    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage(PRESETS))
        return
    if arguments[0] == "--version":
        print(f"pixel-meanflow {pmf.__version__}")
        return
    if arguments[0] in PRESETS:
        arguments = ["train", *arguments]
    name, *rest = arguments
    message = f"command: expected one of {', '.join([*COMMANDS, *PRESETS])}, got {name!r}"
    require(name in COMMANDS, message)
    importlib.import_module(COMMANDS[name][0]).command(rest)
