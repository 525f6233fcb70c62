"""A ledger's figures as Markdown: README's tables come from here, and their figures from nowhere else."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from pmf.benchmarks.largest_batch import BUDGETS_GB
from pmf.benchmarks.ledger import RESULTS, ROOT, Record, key
from pmf.benchmarks.op_cases import VALUE_ALONE
from pmf.errors import require

BUSY = 0.9
"""From this share of a step's time on, its kernels are what it waits for."""


def find_ledger(given: Path | None) -> Path:
    """The file given, or the only one in benchmarks/results. Errors: `InputError` where there is none, or several."""
    found = [given] if given is not None else sorted(RESULTS.glob("*.jsonl"))
    require(bool(found), "ledger: benchmarks/results holds none yet; measure first, or name a file")
    require(len(found) == 1, f"ledger: name one of {', '.join(file.name for file in found)}")
    require(found[0].is_file(), f"ledger: no such file: {found[0]}")
    return found[0]


def read_ledger(file: Path) -> list[Record]:
    """The latest record of each case, provider and batch, in the order of their first.

    What a later run had no time for keeps its figure. Errors: `InputError` on a file that holds no figures.
    """
    latest: dict[tuple, Record] = {}
    for number, line in enumerate(file.read_text().splitlines(), 1):
        try:
            record = json.loads(line)
            if record.get("suite") != "tests" and (record["status"] != "skipped" or key(record) not in latest):
                latest[key(record)] = record
        except (ValueError, KeyError, TypeError):
            require(False, f"ledger: line {number} of {file} is no record")
    require(any(r["status"] == "measured" for r in latest.values()), f"ledger: {file} holds no figures")
    return list(latest.values())


def measured(records: Iterable[Record], *suites: str) -> list[Record]:
    """The figures of some suites."""
    return [r for r in records if r["suite"] in suites and r["status"] == "measured"]


def markdown(columns: list[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _ratio(record: Record, field: str, other: Record | None, other_field: str = "") -> float | None:
    """Of two figures; None where there is none of either."""
    mine, theirs = record.get(field), (other or {}).get(other_field or field)
    return mine / theirs if mine and theirs else None


def _bound(record: Record) -> str:
    """What a step waits for: the GPU where its kernels fill most of the time, else the host that launches them."""
    share = _ratio(record, "busy_us", record, "median_us")
    return "-" if share is None else f"{'GPU' if share >= BUSY else 'host'}, busy {min(share, 1.0):.0%}"


def whole_table(records: list[Record]) -> str:
    """Steps and samplers. Host: what enqueueing takes; the GPU's share of the time: of kernels, from a profile."""
    columns = ["", "provider", "ms", "quartiles", "images/s", "of bf16 product", "host ms", "bound by", "launches"]
    columns += ["peak GB", "of flow matching's", "of counted", "reserved GB"]
    floors = {r["case"]: r for r in records if r["provider"] == "flow matching"}
    rows = [
        [
            *(r["case"], r["provider"], f"{r['median_us'] / 1e3:.4g}"),
            " to ".join(f"{us / 1e3:.4g}" for us in r["quartiles_us"]),
            *(f"{r['batch'] / r['median_us'] * 1e6:.4g}", f"{r['of_product_rate']:.1%}"),
            *(_number(r["host_us"] / 1e3 if "host_us" in r else None, ".4g"), _bound(r)),
            *(_number(r.get("launches"), "d"), _number(r["peak_bytes"] and r["peak_bytes"] / 1e9, ".2f")),
            _number(_ratio(r, "peak_bytes", floors.get(r["case"])), ".2f"),
            _number(_ratio(r, "peak_bytes", r, "counted_bytes"), ".2f"),
            _number(r.get("reserved_bytes") and r["reserved_bytes"] / 1e9, ".2f"),
        ]
        for r in records
    ]
    return markdown(columns, rows)


def op_table(records: list[Record]) -> str:
    """A row per case, a column per provider: time, and the larger of both fractions of a ceiling."""
    providers = list(dict.fromkeys(r["provider"] for r in records))
    alone = {r["case"]: r for r in records if r["provider"] == VALUE_ALONE}
    cells: dict[str, dict[str, str]] = {}
    for r in records:
        ratio = _ratio(r, "median_us", alone.get(r["case"]))
        beside = "" if ratio is None else f", {ratio:.2f} x the value"
        share = max(r["of_copy_bandwidth"], r["of_product_rate"])
        cells.setdefault(r["case"], {})[r["provider"]] = f"{r['median_us']:.4g} µs, {share:.0%}{beside}"
    rows = [[case, *(row.get(provider, "-") for provider in providers)] for case, row in cells.items()]
    return markdown(["op", *providers], rows)


def memory_table(records: list[Record]) -> str:
    """Largest batches: computed, and measured in brackets."""
    cells: dict[tuple, dict[int, str]] = {}
    for r in records:
        found = "" if r["measured_batch"] is None else f" [{r['measured_batch']}]"
        row = (r["size"].removeprefix("pMF-"), r["step"], r["impl"], f"{r['bytes_per_image'] / 1e6:.0f}")
        cells.setdefault(row, {})[r["budget_gb"]] = f"{r['computed_batch']}{found}"
    rows = [[*row, *(batches.get(gb, "-") for gb in BUDGETS_GB)] for row, batches in cells.items()]
    return markdown(["size", "step", "ops", "MB per image", *(f"{gb} GB" for gb in BUDGETS_GB)], rows)


def tables(file: Path) -> str:
    """Every table of the ledger, where its figures come from, and what could not be measured."""
    records = read_ledger(file)
    last, name = records[-1], file.resolve().relative_to(ROOT) if file.resolve().is_relative_to(ROOT) else file
    commits = dict.fromkeys(f"{r['commit'][:10]}{' (changed)' if r['dirty'] else ''}" for r in records)
    versions = dict.fromkeys(f"PyTorch {r['torch']}, Triton {r['triton']}" for r in records)
    backends = dict.fromkeys(r["attention"] for r in records if "attention" in r)
    attention = f"attention's value by {', '.join(backends)}; " if backends else ""
    limits = f"in the latest run copy {last['copy_bytes_per_s'] / 1e9:.0f} GB/s, "
    limits += f"bf16 product {last['product_operations_per_s'] / 1e12:.4g} TFLOP/s"
    origin = f"{attention}{'; '.join(versions)}; commit {', '.join(commits)}"
    parts = [f"From `{name}`: {last['gpu']}, {limits}; {origin}.\n"]
    kinds = (("steps", whole_table), ("sampling", whole_table), ("ops", op_table), ("memory", memory_table))
    parts += [table(found) for suite, table in kinds if (found := measured(records, suite))]
    measured_cases = {r["case"] for r in records if r["status"] == "measured"}
    missing = [r for r in records if r["status"] != "measured" and (r["provider"] or r["case"] not in measured_cases)]
    if missing:
        rows = ([r["case"], r["provider"] or "all", r["status"], r["error"].replace("|", "\\|")] for r in missing)
        parts.append(markdown(["", "provider", "", "why"], rows))
    return "\n".join(parts)


def summary(records: list[Record]) -> str:
    """What the end of a measurement prints: largest batches, and what no time was left for."""
    largest = measured(records, "memory")
    late = [f"{r['case']}: {r['provider'] or 'all'}" for r in records if r["status"] == "skipped"]
    return (memory_table(largest) if largest else "") + (f"no time was left for {'; '.join(late)}\n" if late else "")


def line(record: Record) -> str:
    """A record as it is shown while it comes."""
    start = f"{record['case']:48}{record['provider'] or '':48}"
    if record["status"] != "measured":
        return f"{start}{record['status']}: {record['error']}"
    if record["suite"] == "memory":
        return f"{start}{record['computed_batch']} computed, {record['measured_batch'] or 'none'} measured"
    share = max(record["of_copy_bandwidth"], record["of_product_rate"])
    peak = f"{record['peak_bytes'] / 1e9:8.2f} GB" if record["peak_bytes"] else ""
    host = f"  host {record['host_us'] / 1e3:.1f} ms" if "host_us" in record else ""
    return f"{start}{record['median_us']:12.1f} us{share:8.1%}{peak}{host}"


def report(ledger: Path | None = None) -> None:
    """Print a ledger's figures as Markdown tables that name the file.

    Args:
        ledger: The file (default: the only one in benchmarks/results).
    """
    print(tables(find_ledger(ledger)))
