"""`python -m pmf.benchmarks SUITE`: measure; `plot` and `report` show what a ledger holds."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro

from pmf.benchmarks import plots, report
from pmf.benchmarks.jobs import Settings
from pmf.benchmarks.ledger import RESULTS
from pmf.benchmarks.order import parts_of
from pmf.benchmarks.suite import Budget, Measurement, Plan
from pmf.errors import InputError, require

READERS = {"plot": plots.command, "report": report.command}


@dataclass(frozen=True)
class Options:
    """Measure pMF against its rivals; figures of a GPU enter benchmarks/results behind a green test.

    `plot` and `report` in place of the suite draw and print what a ledger holds; each has its own --help.
    """

    suite: tyro.conf.Positional[Literal["ops", "steps", "sampling", "memory", "gpu"]]
    """ops: each op at the shapes of a block. steps: forward and backward of training steps, no optimizer.
    sampling: one-step sampling. memory: the largest batch. gpu: all of them, the most important first, as
    benchmarks/order.py lists them."""
    sizes: tuple[str, ...] = ()
    """Presets whose shapes are measured (default: all published; for ops those of 16 pixels a patch)."""
    batch: int | None = None
    """Images in a batch (default: 128; in gpu, the steps of the larger networks 64)."""
    only: str = ""
    """Measure only cases whose name contains this."""
    providers: tuple[str, ...] = ()
    """Measure only these of what is compared (default: all)."""
    repeats: int = 30
    """Runs of each provider, fewer where time is short; the median is reported."""
    minutes: float = 19.0
    """The whole measurement ends within this, start-up aside; what no longer fits is named. Called again, it goes on
    where it ended: what the ledger holds of this very code on this card is not measured twice."""
    profile: str = "lean"
    """Steps and samplers of this name also record their kernels, the whole table in a file beside the ledger."""
    record: Path | None = None
    """Folder of the ledger (default: benchmarks/results on a GPU; without one, nothing is recorded)."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Device to measure on."""


def measure(options: Options) -> None:
    """Run the plan within its time, and say what became of it."""
    budget = Budget(options.minutes)
    on_gpu = torch.device(options.device).type == "cuda"
    directory = options.record or (RESULTS if on_gpu else None)
    settings = Settings(options.device, options.repeats, options.profile, options.providers)
    parts = parts_of(options.suite, options.sizes, options.batch)
    plan = Plan.of(parts, torch.device(options.device), options.only)
    known = sorted(plan.providers())
    unknown = sorted(set(options.providers) - set(known))
    require(not unknown, f"providers: expected some of {known}, got {next(iter(unknown), '')!r}")
    Measurement(plan, settings, budget, directory).run()
    if directory is None:
        print("no GPU: nothing was recorded")


def main(arguments: list[str] | None = None) -> None:
    """Measure, plot or report. Bad input is one line on stderr and exit status 2."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        if arguments and arguments[0] in READERS:
            READERS[arguments[0]](arguments[1:])
        else:
            measure(tyro.cli(Options, prog="python -m pmf.benchmarks", args=arguments))
    except InputError as error:
        print(f"pmf.benchmarks: {error}", file=sys.stderr)
        sys.exit(2)
