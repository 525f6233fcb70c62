"""`python -m pmf.benchmarks report`: README's tables, from a ledger; the figures come from nowhere else."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import tyro

from pmf.benchmarks.ledger import RESULTS, ROOT, Record, key
from pmf.benchmarks.memory import BUDGETS_GB
from pmf.errors import require

BUSY = 0.9
"""From this share of a step's time on, its kernels are what it waits for."""


@dataclass(frozen=True)
class Options:
    """Print a ledger's figures as Markdown tables that name the file."""

    ledger: Path | None = None
    """The file (default: the only one in benchmarks/results)."""


def find_ledger(given: Path | None) -> Path:
    """The file given, or the only one in benchmarks/results. Errors: `InputError` where there is none, or several."""
    found = [given] if given is not None else sorted(RESULTS.glob("*.jsonl"))
    require(bool(found), "ledger: benchmarks/results holds none yet; measure first, or name a file")
    require(len(found) == 1, f"ledger: name one of {', '.join(file.name for file in found)}")
    require(found[0].is_file(), f"ledger: no such file: {found[0]}")
    return found[0]


def read_ledger(file: Path) -> list[Record]:
    """The latest record of each (case, provider, memory budget), in the order of their first.

    What a later run had no time for keeps its figure.
    Errors: `InputError` on a file that is no ledger, or holds no figures.
    """
    latest: dict[tuple, Record] = {}
    for number, line in enumerate(file.read_text().splitlines(), 1):
        try:
            record = json.loads(line)
            if record.get("suite") == "tests":
                continue
            if record["status"] != "skipped" or key(record) not in latest:
                latest[key(record)] = record
        except (ValueError, KeyError, TypeError):
            require(False, f"ledger: line {number} of {file} is no record")
    records = list(latest.values())
    require(any(r["status"] == "measured" for r in records), f"ledger: {file} holds no figures")
    return records


def measured(records: list[Record], suite: str) -> list[Record]:
    """The figures of a suite."""
    return [r for r in records if r["suite"] == suite and r["status"] == "measured"]


def markdown(columns: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _gigabytes(size: int | None) -> str:
    return _number(None if size is None else size / 1e9, ".2f")


def _bound(record: Record) -> str:
    """What a step waits for: the GPU where its kernels fill most of the time, else the host that launches them."""
    busy = record.get("busy_us")
    if not busy:
        return "-"
    share = busy / record["median_us"]
    return f"{'GPU' if share >= BUSY else 'host'}, busy {min(share, 1.0):.0%}"


def _whole(records: list[Record]) -> str:
    """Steps or samplers. Host: what enqueueing takes; the GPU's share of the time: of kernels, from a profile."""
    columns = ["", "provider", "ms", "quartiles", "images/s", "of bf16 product", "host ms", "bound by", "launches"]
    columns += ["peak GB", "of flow matching's", "of counted", "reserved GB"]
    rows = []
    for r in records:
        quartiles = " to ".join(f"{us / 1e3:.4g}" for us in r["quartiles_us"])
        times = [f"{r['median_us'] / 1e3:.4g}", quartiles, f"{r['images_per_s']:.4g}", f"{r['of_product_rate']:.1%}"]
        host = [_number(r["host_us"] / 1e3 if "host_us" in r else None, ".4g"), _bound(r)]
        host += [_number(r.get("launches"), "d")]
        shares = [_number(r.get(name), ".2f") for name in ("peak_of_flow_matching", "peak_of_counted")]
        memory = [_gigabytes(r["peak_bytes"]), *shares, _gigabytes(r.get("reserved_bytes"))]
        rows.append([r["case"], r["provider"], *times, *host, *memory])
    return markdown(columns, rows)


def _ops(records: list[Record]) -> str:
    """A row per case, a column per provider: time, and the larger of both fractions of a ceiling."""
    providers = list(dict.fromkeys(r["provider"] for r in records))
    cells: dict[str, dict[str, str]] = {}
    for r in records:
        share = max(r["of_copy_bandwidth"], r["of_product_rate"])
        ratio = f", {r['of_value_alone']:.2f} x the value" if r.get("of_value_alone") else ""
        cells.setdefault(r["case"], {})[r["provider"]] = f"{r['median_us']:.4g} µs, {share:.0%}{ratio}"
    rows = [[case, *(row.get(provider, "-") for provider in providers)] for case, row in cells.items()]
    return markdown(["op", *providers], rows)


def _memory(records: list[Record]) -> str:
    """Largest batches: computed, and measured in brackets."""
    cells: dict[tuple, dict[int, str]] = {}
    for r in records:
        found = "" if r["measured_batch"] is None else f" [{r['measured_batch']}]"
        key = (r["case"].removeprefix("largest batch "), r["provider"], r["impl"], f"{r['bytes_per_image'] / 1e6:.0f}")
        cells.setdefault(key, {})[r["budget_gb"]] = f"{r['computed_batch']}{found}"
    rows = [[*key, *(row.get(gb, "-") for gb in BUDGETS_GB)] for key, row in cells.items()]
    return markdown(["size", "step", "ops", "MB per image", *(f"{gb} GB" for gb in BUDGETS_GB)], rows)


def _origin(file: Path, records: list[Record]) -> str:
    """Which file, machine, versions and commits the figures come from."""
    last = records[-1]
    commits = dict.fromkeys(f"{r['commit'][:10]}{' (changed)' if r['dirty'] else ''}" for r in records)
    name = file.resolve().relative_to(ROOT) if file.resolve().is_relative_to(ROOT) else file
    ceilings = f"in the latest run copy {last['copy_bytes_per_s'] / 1e9:.0f} GB/s, "
    ceilings += f"bf16 product {last['product_operations_per_s'] / 1e12:.4g} TFLOP/s"
    versions = "; ".join(dict.fromkeys(f"PyTorch {r['torch']}, Triton {r['triton']}" for r in records))
    backends = ", ".join(dict.fromkeys(r["attention"] for r in records if "attention" in r))
    attention = f"attention's value by {backends}; " if backends else ""
    return f"From `{name}`: {last['gpu']}, {ceilings}; {attention}{versions}; commit {', '.join(commits)}.\n"


def report(file: Path) -> str:
    """Every table of the ledger, and what could not be measured."""
    records = read_ledger(file)
    tables = {"steps": _whole, "sampling": _whole, "ops": _ops, "memory": _memory}
    parts = [_origin(file, records)]
    parts += [table(found) for suite, table in tables.items() if (found := measured(records, suite))]
    missing = [r for r in records if r["status"] != "measured"]
    if missing:
        rows = [[r["case"], r["provider"] or "all", r["status"], r["error"].replace("|", "\\|")] for r in missing]
        parts.append(markdown(["", "provider", "", "why"], rows))
    return "\n".join(parts)


def command(arguments: list[str]) -> None:
    """Print the tables."""
    options = tyro.cli(Options, prog="python -m pmf.benchmarks report", args=arguments)
    print(report(find_ledger(options.ledger)))
