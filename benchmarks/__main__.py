"""`python -m pmf.benchmarks SUITE` measures; `report` and `plot` show a ledger; `peaks`, `posttrain` count steps.

Figures from a GPU are recorded in benchmarks/results, and only where the tests of the measured code pass.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

from pmf.benchmarks.figures import plot, report
from pmf.benchmarks.measuring import run
from pmf.benchmarks.peaks import peaks
from pmf.benchmarks.plan import Options
from pmf.benchmarks.posttrain import posttrain
from pmf.errors import InputError, extra

SUITES = {
    "ops": "Measure each op at the shapes of a block.",
    "steps": "Measure forward and backward of training steps, without the optimizer.",
    "sampling": "Measure one-step sampling.",
    "networks": "Measure MeanFlow steps of networks that are not pMF: pmf.jvp beside torch.func.jvp.",
    "memory": "Find the largest batch: computed on any machine, also measured on a GPU.",
    "gpu": "Measure everything, most important first, in the order of benchmarks/plan.py.",
}


def command(suite: str) -> Callable[..., None]:
    """Return the subcommand that measures a suite."""

    def measure(options: Options) -> None:
        run(suite, options)

    measure.__doc__ = SUITES[suite]
    return measure


def main(arguments: list[str] | None = None) -> None:
    """Measure, report, plot or count. Bad input is one line on stderr and exit status 2."""
    commands: dict[str, Callable[..., None]] = {
        **{suite: command(suite) for suite in SUITES},
        "report": report,
        "plot": plot,
        "peaks": peaks,
        "posttrain": posttrain,
    }
    try:
        with extra("train", "the command line needs"):
            import tyro
        tyro.extras.subcommand_cli_from_dict(
            commands, prog="python -m pmf.benchmarks", args=arguments, config=(tyro.conf.OmitArgPrefixes,)
        )
    except InputError as error:
        print(f"pmf.benchmarks: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
