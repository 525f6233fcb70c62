"""A ledger's figures as pictures."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from pmf.atomic_files import write_atomically
from pmf.benchmarks.ledger import RESULTS
from pmf.benchmarks.tables import find_ledger, measured, read_ledger

Bar = tuple[str, str, float | None]
"""Group, provider and value; None is left out."""


def write_bars(file: Path, bars: list[Bar], unit: str, title: str) -> list[Path]:
    """Write horizontal bars with their values, a colour for each provider; the file, if there is anything to draw."""
    from matplotlib.figure import Figure

    found = [bar for bar in bars if bar[2] is not None]
    if not found:
        return []
    colours = {provider: f"C{i}" for i, provider in enumerate(dict.fromkeys(provider for _, provider, _ in found))}
    figure = Figure(figsize=(9, 1.2 + 0.2 * len(found)), layout="constrained")
    axes = figure.add_subplot(xlabel=unit, title=title)
    labels = [f"{group}: {provider}" for group, provider, _ in found]
    colour = [colours[provider] for _, provider, _ in found]
    axes.bar_label(axes.barh(labels, [value for *_, value in found], color=colour), fmt="%.3g", fontsize=7)
    axes.tick_params("y", labelsize=7)
    axes.invert_yaxis()
    axes.margins(x=0.1, y=0.01)
    write_atomically(file, partial(figure.savefig, dpi=150, format="png"))
    return [file]


def draw(file: Path, out: Path) -> list[Path]:
    """Write a PNG per kind of figure that the ledger holds; their paths."""
    records = read_ledger(file)
    gpu, steps, ops, memory = records[-1]["gpu"], *(measured(records, suite) for suite in ("steps", "ops", "memory"))
    times: list[Bar] = [(r["case"], r["provider"], r["median_us"] / 1e3 / r["batch"]) for r in steps]
    peaks: list[Bar] = [(r["case"], r["provider"], r["peak_bytes"] and r["peak_bytes"] / 1e9) for r in steps]
    shares: list[Bar] = [(r["case"], r["provider"], r["of_copy_bandwidth"]) for r in ops if not r["operations"]]
    kinds = ["computed" if r["measured_batch"] is None else "measured" for r in memory]
    largest: list[Bar] = [
        (f"{r['size']}, {r['budget_gb']} GB", f"{r['step']}, {kind}", r[f"{kind}_batch"])
        for r, kind in zip(memory, kinds, strict=True)
    ]
    pictures = {
        "step-time": (times, "ms per image", f"Forward and backward of a step, {gpu}"),
        "step-memory": (peaks, "GB above what rests", f"Peak memory of a training step, {gpu}"),
        "ops": (shares, "of the copy bandwidth", f"Memory-bound ops, {gpu}"),
        "largest-batch": (largest, "images", f"Largest batch, {gpu}"),
    }
    return [path for name, bars in pictures.items() for path in write_bars(out / f"{file.stem}-{name}.png", *bars)]


def plot(ledger: Path | None = None, out: Path = RESULTS) -> None:
    """Draw time and peak memory of the steps, the ops' share of their ceiling, and the largest batches.

    Args:
        ledger: The file (default: the only one in benchmarks/results).
        out: Folder of the pictures.
    """
    for path in draw(find_ledger(ledger), out):
        print(path)
