"""Show a ledger as Markdown tables and pictures. Every measured figure in README comes from here."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from pmf.atomic_files import write_atomically
from pmf.benchmarks.ledger import RESULTS, ROOT, Key, key, records_of
from pmf.benchmarks.network_cases import PLAIN
from pmf.benchmarks.op_cases import VALUE_ALONE
from pmf.benchmarks.step_cases import BUDGETS_GB, JOINT
from pmf.errors import extra, require
from pmf.timing import Record

BUSY = 0.9
"""A step whose kernels fill at least this share of its time is bound by the GPU."""


def find_ledger(given: Path | None) -> Path:
    """The file given, or the only one in benchmarks/results. Raises `InputError` if there is none, or several."""
    found = [given] if given is not None else sorted(RESULTS.glob("*.jsonl"))
    require(bool(found), "ledger: benchmarks/results holds none yet; measure first, or name a file")
    require(len(found) == 1, f"ledger: name one of {', '.join(file.name for file in found)}")
    require(found[0].is_file(), f"ledger: no such file: {found[0]}")
    return found[0]


def read_ledger(file: Path) -> list[Record]:
    """The latest record of each key, in the order of their first; a skipped one does not replace a figure.

    Raises `InputError` if the file holds no figures.
    """
    latest: dict[Key, Record] = {}
    for record in records_of(file):
        if record.get("suite") != "tests" and (record["status"] != "skipped" or key(record) not in latest):
            latest[key(record)] = record
    require(any(r["status"] == "measured" for r in latest.values()), f"ledger: {file} holds no figures")
    return list(latest.values())


def measured(records: Iterable[Record], suite: str) -> list[Record]:
    """The figures of a suite."""
    return [r for r in records if r["suite"] == suite and r["status"] == "measured"]


def markdown(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    columns = list(columns)
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def number(value: float | None, form: str, unit: float = 1) -> str:
    """Format a figure in a unit; "-" if there is none."""
    return "-" if value is None else format(value / unit, form)


def ratio(mine: float | None, theirs: float | None) -> float | None:
    """mine / theirs; None unless both exist."""
    return mine / theirs if mine and theirs else None


def bound(record: Record) -> str:
    """Whether the GPU or the host, which launches the kernels, limits a step."""
    share = ratio(record.get("busy_us"), record["median_us"])
    return "-" if share is None else f"{'GPU' if share >= BUSY else 'host'}, busy {min(share, 1.0):.0%}"


def whole_table(records: list[Record]) -> str:
    """Steps and samplers. "host ms" is the time to enqueue a run; "bound by" is from a profile's kernel times."""
    floors = {r["case"]: r["peak_bytes"] for r in records if r["provider"] == "flow matching"}
    rows = [
        {
            "": r["case"],
            "provider": r["provider"],
            "ms": number(r["median_us"], ".4g", 1e3),
            "quartiles": " to ".join(number(us, ".4g", 1e3) for us in r["quartiles_us"]),
            "images/s": number(r["batch"] / r["median_us"] * 1e6, ".4g"),
            "of bf16 product": number(r["of_product_rate"], ".1%"),
            "host ms": number(r.get("host_us"), ".4g", 1e3),
            "bound by": bound(r),
            "launches": number(r.get("launches"), ".0f"),
            "peak GB": number(r["peak_bytes"], ".2f", 1e9),
            "of flow matching's": number(ratio(r["peak_bytes"], floors.get(r["case"])), ".2f"),
            "of counted": number(ratio(r["peak_bytes"], r.get("counted_bytes")), ".2f"),
            "reserved GB": number(r.get("reserved_bytes"), ".2f", 1e9),
        }
        for r in records
    ]
    return markdown(rows[0], (row.values() for row in rows))


def network_table(records: list[Record]) -> str:
    """MeanFlow steps of networks; "held" is alive between forward and backward. Ratios in brackets."""
    known = {(r["case"], r["provider"]): r for r in records}

    def cell(record: Record, field: str, unit: float, base: str) -> str:
        of = ratio(record[field], known.get((record["case"], base), {}).get(field))
        return f"{number(record[field], '.4g', unit)} ({number(of, '.2f')})"

    columns = ["", "provider", "ms (of joint jvp's)", "peak MB (of plain forward's)", "held MB (of plain forward's)"]
    fields = ("median_us", 1e3, JOINT), ("peak_bytes", 1e6, PLAIN), ("held_bytes", 1e6, PLAIN)
    return markdown(columns, ([r["case"], r["provider"], *(cell(r, *f) for f in fields)] for r in records))


def op_table(records: list[Record]) -> str:
    """A row per case, a column per provider: time, and the larger of its two fractions of a ceiling."""
    providers = list(dict.fromkeys(r["provider"] for r in records))
    alone = {r["case"]: r["median_us"] for r in records if r["provider"] == VALUE_ALONE}
    cells: dict[str, dict[str, str]] = {}
    for r in records:
        times = ratio(r["median_us"], alone.get(r["case"]))
        beside = "" if times is None else f", {times:.2f} x the value"
        share = max(r["of_copy_bandwidth"], r["of_product_rate"])
        cells.setdefault(r["case"], {})[r["provider"]] = f"{r['median_us']:.4g} µs, {share:.0%}{beside}"
    rows = [[case, *(row.get(provider, "-") for provider in providers)] for case, row in cells.items()]
    return markdown(["op", *providers], rows)


def memory_table(records: list[Record]) -> str:
    """Largest batches: computed, with the measured ones in brackets."""
    cells: dict[tuple[str, ...], dict[int, str]] = {}
    for r in records:
        found = "" if r["measured_batch"] is None else f" [{r['measured_batch']}]"
        row = (r["size"].removeprefix("pMF-"), r["step"], r["impl"], f"{r['bytes_per_image'] / 1e6:.0f}")
        cells.setdefault(row, {})[r["budget_gb"]] = f"{r['computed_batch']}{found}"
    rows = [[*row, *(batches.get(gb, "-") for gb in BUDGETS_GB)] for row, batches in cells.items()]
    return markdown(["size", "step", "ops", "MB per image", *(f"{gb} GB" for gb in BUDGETS_GB)], rows)


def origin(file: Path, records: list[Record]) -> str:
    """The provenance of a ledger's figures."""
    last, path = records[-1], file.resolve()
    name = path.relative_to(ROOT) if path.is_relative_to(ROOT) else file
    rates = last["copy_bytes_per_s"] / 1e9, last["product_operations_per_s"] / 1e12
    backends = ", ".join(dict.fromkeys(r["attention"] for r in records if "attention" in r))
    origins = [f"attention's value by {backends}"] if backends else []
    origins += dict.fromkeys(f"PyTorch {r['torch']}, Triton {r['triton']}" for r in records)
    commits = ", ".join(dict.fromkeys(f"{r['commit'][:10]}{' (changed)' if r['dirty'] else ''}" for r in records))
    limits = f"copy {rates[0]:.0f} GB/s, bf16 product {rates[1]:.4g} TFLOP/s"
    return f"From `{name}`: {last['gpu']}, in the latest run {limits}; {'; '.join([*origins, f'commit {commits}'])}.\n"


def tables(file: Path) -> str:
    """The ledger's provenance, all of its tables, and what could not be measured."""
    records = read_ledger(file)
    kinds = {"steps": whole_table, "sampling": whole_table, "networks": network_table}
    kinds |= {"ops": op_table, "memory": memory_table}
    parts = [table(found) for suite, table in kinds.items() if (found := measured(records, suite))]
    known = {r["case"] for r in records if r["status"] == "measured"}
    missing = [r for r in records if r["status"] != "measured" and (r["provider"] or r["case"] not in known)]
    if missing:
        rows = ([r["case"], r["provider"] or "all", r["status"], r["error"].replace("|", "\\|")] for r in missing)
        parts.append(markdown(["", "provider", "", "why"], rows))
    return "\n".join([origin(file, records), *parts])


def summary(records: list[Record]) -> str:
    """The last lines of a measurement: steps of networks, largest batches, and what no time was left for."""
    networks, largest = measured(records, "networks"), measured(records, "memory")
    late = [f"{r['case']}: {r['provider'] or 'all'}" for r in records if r["status"] == "skipped"]
    tables = (network_table(networks) if networks else "") + (memory_table(largest) if largest else "")
    return tables + (f"no time was left for {'; '.join(late)}\n" if late else "")


def line(record: Record) -> str:
    """One line for a new record."""
    start = f"{record['case']:48}{record['provider'] or '':48}"
    if record["status"] != "measured":
        return f"{start}{record['status']}: {record['error']}"
    if record["suite"] == "memory":
        return f"{start}{record['computed_batch']} computed, {record['measured_batch'] or 'none'} measured"
    share = max(record["of_copy_bandwidth"], record["of_product_rate"])
    rate = f"{share:8.1%}" if share else ""
    peak = f"{record['peak_bytes'] / 1e9:8.2f} GB" if record["peak_bytes"] else ""
    held = f"{record['held_bytes'] / 1e9:8.2f} GB held" if "held_bytes" in record else ""
    host = f"  host {record['host_us'] / 1e3:.1f} ms" if "host_us" in record else ""
    return f"{start}{record['median_us']:12.1f} us{rate}{peak}{held}{host}"


def report(ledger: Path | None = None) -> None:
    """Print a ledger's figures as Markdown tables that name the file.

    Args:
        ledger: The file (default: the only one in benchmarks/results).
    """
    print(tables(find_ledger(ledger)))


def plot(ledger: Path | None = None, out: Path = RESULTS) -> None:
    """Draw time and peak memory of the steps, the ops' share of copy bandwidth, and the largest batches.

    Args:
        ledger: The file (default: the only one in benchmarks/results).
        out: Folder of the pictures.
    """
    file = find_ledger(ledger)
    records = read_ledger(file)
    kinds: dict[str, tuple[str, str, Callable[[Record], float | None]]] = {
        "step-time": ("steps", "ms per image", lambda r: r["median_us"] / 1e3 / r["batch"]),
        "step-memory": ("steps", "GB at the peak of a step", lambda r: ratio(r["peak_bytes"], 1e9)),
        "ops": ("ops", "of the copy bandwidth", lambda r: None if r["operations"] else r["of_copy_bandwidth"]),
        "largest-batch": ("memory", "images, computed", lambda r: r["computed_batch"]),
    }
    for name, (suite, unit, value) in kinds.items():
        found = {f"{r['case']}: {r['provider']}": value(r) for r in measured(records, suite)}
        if bars := {label: height for label, height in found.items() if height is not None}:
            picture = out / f"{file.stem}-{name}.png"
            write_bars(bars, f"{unit}, {records[-1]['gpu']}", picture)
            print(picture)


def write_bars(bars: dict[str, float], unit: str, file: Path) -> None:
    """Write horizontal bars with their values as a PNG."""
    with extra("train", "out: a plot needs"):
        from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.2 + 0.2 * len(bars)), layout="constrained")
    axes = figure.add_subplot(xlabel=unit)
    axes.bar_label(axes.barh(list(bars), list(bars.values())), fmt="%.3g", fontsize=7)
    axes.tick_params("y", labelsize=7)
    axes.invert_yaxis()
    axes.margins(x=0.1, y=0.01)
    write_atomically(file, lambda temporary: figure.savefig(temporary, dpi=150, format="png"))
