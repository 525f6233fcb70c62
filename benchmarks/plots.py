"""A ledger's figures as pictures."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path

from pmf.benchmarks.ledger import RESULTS
from pmf.benchmarks.tables import find_ledger, measured, read_ledger
from pmf.checkpoint import write_atomically

Bar = tuple[str, str, float | None]
"""Group, series and value; None is left out."""


def bars(found: Iterable[Bar], unit: str, title: str, line: float | None = None):
    """Grouped horizontal bars with their values, and a vertical line."""
    from matplotlib.figure import Figure

    groups: dict[str, dict[str, float]] = {}
    for group, name, value in found:
        if value is not None:
            groups.setdefault(group, {})[name] = value
    series = dict.fromkeys(name for values in groups.values() for name in values)
    if not series:
        return None
    height = 0.8 / len(series)
    figure = Figure(figsize=(9, 1.2 + 0.22 * len(groups) * max(2, len(series))), layout="constrained")
    axes = figure.add_subplot(xlabel=unit, title=title)
    for i, name in enumerate(series):
        places = {j + i * height: values[name] for j, values in enumerate(groups.values()) if name in values}
        axes.bar_label(axes.barh(list(places), list(places.values()), height, label=name), fmt="%.3g", fontsize=7)
    axes.set_yticks([j + (0.8 - height) / 2 for j in range(len(groups))], list(groups), fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.1)
    if line is not None:
        axes.axvline(line, color="black", linewidth=0.8)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    return figure


def draw(file: Path, out: Path) -> list[Path]:
    """Write a PNG per kind of figure that the ledger holds; their paths."""
    records = read_ledger(file)
    gpu, steps, ops, memory = records[-1]["gpu"], *(measured(records, suite) for suite in ("steps", "ops", "memory"))
    times = [(r["case"], r["provider"], r["median_us"] / 1e3 / r["batch"]) for r in steps]
    peaks = [(r["case"], r["provider"], r["peak_bytes"] and r["peak_bytes"] / 1e9) for r in steps]
    shares = [(r["case"], r["provider"], r["of_copy_bandwidth"]) for r in ops if not r["operations"]]
    batches = [
        (f"{r['size']}, {r['budget_gb']} GB", f"{r['step']}, {kind}", r[f"{kind}_batch"])
        for r in memory
        for kind in ("measured" if r["measured_batch"] is not None else "computed",)
    ]
    pictures = {
        "step-time": bars(times, "ms per image", f"Forward and backward of a step, {gpu}"),
        "step-memory": bars(peaks, "GB above what rests", f"Peak memory of a training step, {gpu}"),
        "ops": bars(shares, "of the copy bandwidth", f"Memory-bound ops, {gpu}", 1.0),
        "largest-batch": bars(batches, "images", f"Largest batch, {gpu}"),
    }
    found = {out / f"{file.stem}-{name}.png": figure for name, figure in pictures.items() if figure is not None}
    for path, figure in found.items():
        write_atomically(path, partial(figure.savefig, dpi=150, format="png"))
    return list(found)


def plot(ledger: Path | None = None, out: Path = RESULTS) -> None:
    """Draw time and peak memory of the steps, the ops' share of their ceiling, and the largest batches.

    Args:
        ledger: The file (default: the only one in benchmarks/results).
        out: Folder of the pictures.
    """
    for path in draw(find_ledger(ledger), out):
        print(path)
