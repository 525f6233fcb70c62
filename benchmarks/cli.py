"""`python -m pmf.benchmarks SUITE`: measure ops, steps or sampling; on a GPU, record the figures."""

from __future__ import annotations

import dataclasses
import functools
import subprocess
import sys
from dataclasses import dataclass
from typing import Literal

import torch
import tyro

from pmf.benchmarks.cases import Case, op_cases
from pmf.benchmarks.ledger import ROOT, append, provenance
from pmf.benchmarks.steps import sampling_case, step_case
from pmf.benchmarks.timing import ceilings, measure
from pmf.config import MODELS
from pmf.errors import InputError, require


@dataclass(frozen=True)
class Options:
    """Measure pMF against its rivals. Without a GPU, what runs is shown and nothing is recorded."""

    suite: tyro.conf.Positional[Literal["ops", "steps", "sampling", "gpu"]]
    """ops: each op at the shapes of a block. steps: whole training steps. sampling: one-step sampling.
    gpu: all of them, one after the other."""
    sizes: tuple[str, ...] = ("pMF-B/16", "pMF-L/16", "pMF-H/16")
    """Presets whose shapes are measured."""
    batch: int | None = None
    """Images in a batch (default: 64 for ops, 128 for steps and sampling)."""
    only: str = ""
    """Measure only cases whose name contains this."""
    repeats: int = 30
    """Runs of each provider; the median is reported."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Device to measure on."""


@functools.cache
def _test_passes(test: str) -> bool:
    """Whether the test file of a case is green on this machine."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", str(ROOT / "tests" / test)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    print(f"{test}: {'passes' if result.returncode == 0 else 'FAILS'}", file=sys.stderr)
    return result.returncode == 0


def run_case(case: Case, device: torch.device, repeats: int, limits: dict[str, float]) -> list[dict[str, object]]:
    """One record per provider: time, traffic and operations as fractions of the machine's ceilings."""
    records = []
    providers = {name: prepare() for name, prepare in case.providers(device).items()}
    for name, m in measure(providers, device, repeats).items():
        seconds = m.median_us / 1e6
        records.append(
            {
                "case": case.name,
                "provider": name,
                **dataclasses.asdict(m),
                "bytes": case.bytes,
                "operations": case.operations,
                "of_copy_bandwidth": case.bytes / seconds / limits["copy_bytes_per_s"],
                "of_product_rate": case.operations / seconds / limits["product_operations_per_s"],
            }
        )
    return records


def main(arguments: list[str] | None = None) -> None:
    """Measure every chosen case; a figure enters the ledger only on a GPU and behind a green test."""
    options = tyro.cli(Options, prog="python -m pmf.benchmarks", args=arguments)
    try:
        measure_all(options)
    except InputError as error:
        print(f"pmf.benchmarks: {error}", file=sys.stderr)
        sys.exit(2)


def chosen_cases(options: Options) -> list[Case]:
    """The cases of the suite. Errors: `InputError` on an unknown preset or a pattern that fits no case."""
    for size in options.sizes:
        require(size in MODELS, f"sizes: unknown preset {size!r}, expected one of {', '.join(MODELS)}")
    suites = {
        "ops": lambda: op_cases(options.sizes, options.batch or 64),
        "steps": lambda: [step_case(size, options.batch or 128) for size in options.sizes],
        "sampling": lambda: [sampling_case(size, options.batch or 128) for size in options.sizes],
    }
    names = suites if options.suite == "gpu" else (options.suite,)
    cases = [case for name in names for case in suites[name]() if options.only in case.name]
    require(bool(cases), f"only: {options.only!r} fits no case")
    return cases


def measure_all(options: Options) -> None:
    """Measure the suite; each figure enters the ledger at once, so that an interrupted run keeps it."""
    cases = chosen_cases(options)
    device = torch.device(options.device)
    recorded = device.type == "cuda"
    limits, origin = ceilings(device), provenance(device)
    print(f"{origin['gpu']}: copy {limits['copy_bytes_per_s'] / 1e9:.0f} GB/s, ", end="")
    print(f"bf16 product {limits['product_operations_per_s'] / 1e12:.1f} TFLOP/s")
    for case in cases:
        if recorded and not _test_passes(case.test):
            continue
        for record in run_case(case, device, options.repeats, limits):
            share = max(record["of_copy_bandwidth"], record["of_product_rate"])
            print(f"{case.name:44}{record['provider']:20}{record['median_us']:12.1f} us{share:8.1%}")
            if recorded:
                append({**origin, **limits, **record})
    if not recorded:
        print("no GPU: nothing was recorded")
