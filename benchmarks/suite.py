"""A whole measurement within a time budget: what comes first, what it may take, what becomes of each figure."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from pmf.benchmarks.cases import Case
from pmf.benchmarks.jobs import LONG_ATTENTION, Job, Record, Settings, failed, run_job, suite_cases
from pmf.benchmarks.ledger import ROOT, append
from pmf.benchmarks.memory import memory_table
from pmf.benchmarks.steps import step_case
from pmf.config import MODELS
from pmf.errors import require

SUITES = ("steps", "sampling", "ops", "memory")
BATCHES = {"steps": 128, "sampling": 128, "ops": 64, "memory": 0}
LARGEST_SHARE = 1 / 6
"""Of the time that is left, what one job may take: a slow compiler leaves time to what comes after it."""
TEST_SHARE = 1 / 3
"""Of the whole time, what the tests before it may take."""
LEAST_SECONDS = 5.0
"""Jobs do not begin with less time left."""


class Budget:
    """The time a measurement may take, from now on."""

    def __init__(self, minutes: float) -> None:
        require(minutes > 0, f"minutes: expected a positive time, got {minutes:g}")
        self.end = time.monotonic() + 60 * minutes

    def left(self) -> float:
        """Seconds."""
        return self.end - time.monotonic()

    def largest_job(self) -> float:
        """Seconds that the next job may take: never more than are left."""
        return min(self.left(), max(30.0, LARGEST_SHARE * self.left()))


@dataclass(frozen=True)
class Plan:
    """The jobs, most important first, and the cases they are made of."""

    jobs: list[Job]
    cases: dict[str, Case]

    @classmethod
    def of(cls, parts: list[tuple[str, str]], batch: int | None, only: str) -> Plan:
        """From pairs of suite and preset. Errors: `InputError` on an unknown preset or a pattern that fits no case."""
        jobs: list[Job] = []
        cases: dict[str, Case] = {}
        for suite, size in parts:
            known = size in MODELS or size == LONG_ATTENTION
            require(known, f"sizes: unknown preset {size!r}, expected one of {', '.join(MODELS)}")
            rows = batch or BATCHES[suite]
            found = [] if suite == "memory" else suite_cases(suite, size, rows)
            found = [case for case in found if only in case.name]
            cases |= {case.name: case for case in found}
            jobs += _jobs(suite, size, rows, found, only)
        require(bool(jobs), f"only: {only!r} fits no case")
        return cls(jobs, cases)

    def providers(self) -> set[str]:
        """The names of everything that the cases compare."""
        return {name for case in self.cases.values() for name in case.providers(torch.device("meta"))}

    def tests(self) -> list[str]:
        """The test files that must pass before a figure is recorded."""
        return sorted({case.test for case in self.cases.values()})


def _jobs(suite: str, size: str, batch: int, cases: list[Case], only: str) -> Iterator[Job]:
    """Steps and samplers: a job per provider. Ops: a job per op."""
    if suite == "memory":
        job = Job(suite, size)
        if only in job.names[0]:
            yield job
    elif suite == "ops":
        groups: dict[str, list[str]] = {}
        for case in cases:
            groups.setdefault(case.name.split()[0], []).append(case.name)
        yield from (Job(suite, size, batch, tuple(names)) for names in groups.values())
    else:
        for case in cases:
            yield from (Job(suite, size, batch, (case.name,), name) for name in case.providers(torch.device("meta")))


def failing_tests(tests: list[str], seconds: float) -> dict[str, str]:
    """The test files that are not green on this machine, and why; all run at once, in at most `seconds`."""
    end = time.monotonic() + seconds
    command = [sys.executable, "-m", "pytest", "-q", "-x"]
    quiet = dict(cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    running = {test: subprocess.Popen([*command, str(ROOT / "tests" / test)], **quiet) for test in tests}
    failing = {}
    for test, process in running.items():
        try:
            code = process.wait(max(0.0, end - time.monotonic()))
            if code != 0:
                failing[test] = f"{test} fails"
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            failing[test] = f"{test} did not finish in {seconds:.0f} s"
        print(f"{failing.get(test, f'{test} passes')}", file=sys.stderr)
    return failing


class Measurement:
    """One run: its origin, its ceilings, and the records so far."""

    def __init__(self, plan: Plan, settings: Settings, budget: Budget, directory: Path | None) -> None:
        self.plan, self.settings, self.budget, self.directory = plan, settings, budget, directory
        self.origin: Record = {}
        self.records: list[Record] = []

    def run(self, check: Callable[[list[str], float], dict[str, str]] = failing_tests) -> None:
        """Every job that fits into the time; each figure enters the ledger at once. Others are named."""
        on_gpu = self.settings.device.startswith("cuda")
        failing = check(self.plan.tests(), TEST_SHARE * self.budget.left()) if on_gpu else {}
        (self.origin,) = run_job(Job("ceilings"), self.settings, self.budget.largest_job())
        require(self.origin.get("status") != "failed", f"device: {self.origin.get('error')}")
        print(f"{self.origin['gpu']}: copy {self.origin['copy_bytes_per_s'] / 1e9:.0f} GB/s, ", end="")
        print(f"bf16 product {self.origin['product_operations_per_s'] / 1e12:.1f} TFLOP/s", flush=True)
        wanted = self.settings.providers
        for job in self.plan.jobs:
            if wanted and job.provider is not None and job.provider not in wanted:
                continue
            broken = {self.plan.cases[name].test for name in job.cases} & failing.keys()
            if broken:
                self._add(job, failed(failing[min(broken)], provider=job.provider))
            elif self.budget.left() < LEAST_SECONDS:
                self._add(job, {"status": "skipped", "error": "no time was left", "provider": job.provider})
            else:
                for record in run_job(job, self.settings, self.budget.largest_job()):
                    self._add(job, record)
        memory = [r for r in self.records if r["suite"] == "memory" and r["status"] == "measured"]
        if memory:
            print(memory_table(memory))

    def _add(self, job: Job, record: Record) -> None:
        """Complete a record, show it, append it to the ledger."""
        if "case" not in record:  # the whole job: every case of which nothing is known
            known = {r["case"] for r in self.records}
            for name in [name for name in job.names if name not in known] or job.names[-1:]:
                self._add(job, {**record, "case": name})
            return
        record = {"suite": job.suite, "size": job.size, "batch": job.batch, **record}
        if record["status"] == "measured" and job.suite != "memory":
            record |= self._shares(record)
        self.records.append(record)
        print(_line(record), flush=True)
        if self.directory is not None:
            append({**self.origin, **record}, self.directory)

    def _shares(self, record: Record) -> Record:
        """Fractions of the ceilings, images per second, and peak memory beside flow matching's."""
        case, seconds = self._case(record), float(record["median_us"]) / 1e6
        operations = case.other_operations.get(record["provider"], case.operations)
        shares = {
            "bytes": case.bytes,
            "operations": operations,
            "of_copy_bandwidth": case.bytes / seconds / self.origin["copy_bytes_per_s"],
            "of_product_rate": operations / seconds / self.origin["product_operations_per_s"],
        }
        if record["suite"] == "ops":
            return shares
        same = [r for r in (*self.records, record) if r["case"] == record["case"]]
        peaks = {r["provider"]: r.get("peak_bytes") for r in same}
        peak, least = record["peak_bytes"], peaks.get("flow matching")
        relative = peak / least if peak and least else None
        return {**shares, "images_per_s": record["batch"] / seconds, "peak_of_flow_matching": relative}

    def _case(self, record: Record) -> Case:
        """The case of a record; a step that had to take a smaller batch has one of its own."""
        name = str(record["case"])
        if name not in self.plan.cases:
            self.plan.cases[name] = step_case(record["size"], record["batch"])
        return self.plan.cases[name]


def _line(record: Record) -> str:
    """A record as it is shown while the suite runs."""
    start = f"{record['case']:32}{record['provider'] or '':48}"
    if record["status"] != "measured":
        return f"{start}{record['status']}: {record['error']}"
    if record["suite"] == "memory":
        found = "" if record["measured_batch"] is None else f" [{record['measured_batch']}]"
        return f"{start}{record['budget_gb']} GB: {record['computed_batch']}{found}"
    share = max(record["of_copy_bandwidth"], record["of_product_rate"])
    peak = "" if record["peak_bytes"] is None else f"{record['peak_bytes'] / 1e9:8.2f} GB"
    return f"{start}{record['median_us']:12.1f} us{share:8.1%}{peak}"
