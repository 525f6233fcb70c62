"""`python -m pmf.benchmarks SUITE`: measure; `report` and `plot` show what a ledger holds.

Figures of a GPU enter benchmarks/results behind a green test.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import tyro

from pmf.benchmarks import plots, tables
from pmf.benchmarks.measuring import run
from pmf.benchmarks.plan import Options
from pmf.errors import InputError


def ops(options: Options) -> None:
    """Measure each op at the shapes of a block."""
    run("ops", options)


def steps(options: Options) -> None:
    """Measure forward and backward of training steps, no optimizer."""
    run("steps", options)


def sampling(options: Options) -> None:
    """Measure one-step sampling."""
    run("sampling", options)


def memory(options: Options) -> None:
    """Find the largest batch: counted anywhere, measured on a GPU."""
    run("memory", options)


def gpu(options: Options) -> None:
    """Measure everything, the most important first, as benchmarks/plan.py lists it."""
    run("gpu", options)


def main(arguments: list[str] | None = None) -> None:
    """Measure, report or plot. Bad input is one line on stderr and exit status 2."""
    every: tuple[Callable[..., None], ...] = (ops, steps, sampling, memory, gpu, tables.report, plots.plot)
    commands = {command.__name__: command for command in every}
    try:
        tyro.extras.subcommand_cli_from_dict(
            commands, prog="python -m pmf.benchmarks", args=arguments, config=(tyro.conf.OmitArgPrefixes,)
        )
    except InputError as error:
        print(f"pmf.benchmarks: {error}", file=sys.stderr)
        sys.exit(2)
