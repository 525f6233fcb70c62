"""`python -m pmf.benchmarks plot`: a ledger's figures as pictures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import tyro

from pmf.atomic_files import write_atomically
from pmf.benchmarks.ledger import RESULTS
from pmf.benchmarks.report import Record, find_ledger, measured, read_ledger


@dataclass(frozen=True)
class Options:
    """Draw time and peak memory of the steps, the ops' share of their ceiling, and the largest batches."""

    ledger: Path | None = None
    """The file (default: the only one in benchmarks/results)."""
    out: Path = RESULTS
    """Folder of the pictures."""


def _bars(groups: dict[str, dict[str, float]], unit: str, title: str, line: float | None = None):
    """Grouped horizontal bars with their values: group -> series -> value."""
    from matplotlib.figure import Figure

    series = list(dict.fromkeys(name for values in groups.values() for name in values))
    height = 0.8 / len(series)
    figure = Figure(figsize=(9, 1.2 + 0.22 * len(groups) * max(2, len(series))), layout="constrained")
    axes = figure.add_subplot()
    for i, name in enumerate(series):
        places = [(j + i * height, values[name]) for j, values in enumerate(groups.values()) if name in values]
        bars = axes.barh([y for y, _ in places], [value for _, value in places], height, label=name)
        axes.bar_label(bars, fmt="%.3g", padding=2, fontsize=7)
    axes.set_yticks([j + (0.8 - height) / 2 for j in range(len(groups))], list(groups), fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set_xlabel(unit)
    axes.set_title(title)
    if line is not None:
        axes.axvline(line, color="black", linewidth=0.8)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    return figure


def _grouped(records: list[Record], value: Callable[[Record], float | None]) -> dict[str, dict[str, float]]:
    """Case -> provider -> value, where there is one."""
    groups: dict[str, dict[str, float]] = {}
    for record in records:
        number = value(record)
        if number is not None:
            groups.setdefault(record["case"], {})[record["provider"]] = number
    return groups


def _peak(record: Record) -> float | None:
    return None if record["peak_bytes"] is None else record["peak_bytes"] / 1e9


def _largest(records: list[Record]) -> list[Record]:
    """Measured where it was, else computed; the provider says which."""
    bars = []
    for r in records:
        kind = "computed" if r["measured_batch"] is None else "measured"
        series = {"provider": f"{r['provider']}, {kind}", "batch": r[f"{kind}_batch"]}
        bars.append({"case": f"{r['size']}, {r['budget_gb']} GB", **series})
    return bars


def draw(file: Path, out: Path) -> list[Path]:
    """Write a PNG per kind of figure that the ledger holds; their paths."""
    records = read_ledger(file)
    gpu = records[-1]["gpu"]
    steps, ops, memory = (measured(records, suite) for suite in ("steps", "ops", "memory"))
    copying = [r for r in ops if r["operations"] == 0]
    kinds = {
        "step-time": (
            _grouped(steps, lambda r: r["median_us"] / 1e3 / r["batch"]),
            "ms per image",
            "Forward and backward of a step",
        ),
        "step-memory": (_grouped(steps, _peak), "GB above what rests", "Peak memory of a training step"),
        "ops": (_grouped(copying, lambda r: r["of_copy_bandwidth"]), "of the copy bandwidth", "Memory-bound ops"),
        "largest-batch": (_grouped(_largest(memory), lambda r: r["batch"]), "images", "Largest batch"),
    }
    written = []
    for name, (groups, unit, title) in kinds.items():
        if groups:
            figure = _bars(groups, unit, f"{title}, {gpu}", 1.0 if name == "ops" else None)
            path = out / f"{file.stem}-{name}.png"
            write_atomically(path, lambda temporary, figure=figure: figure.savefig(temporary, dpi=150, format="png"))
            written.append(path)
    return written


def command(arguments: list[str]) -> None:
    """Draw, and name the files."""
    options = tyro.cli(Options, prog="python -m pmf.benchmarks plot", args=arguments)
    for path in draw(find_ledger(options.ledger), options.out):
        print(path)
