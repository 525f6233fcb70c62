"""A whole measurement within a time budget: what comes first, what it may take, what becomes of each figure."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from pmf.benchmarks.cases import VALUE_ALONE, Case
from pmf.benchmarks.gate import Verdict, run_tests
from pmf.benchmarks.jobs import Job, Record, Settings, failed, run_job, suite_cases
from pmf.benchmarks.ledger import Earlier, Key, append, digest, key, ledger_file
from pmf.benchmarks.memory import memory_keys, memory_table
from pmf.benchmarks.order import LONG_ATTENTION, Part
from pmf.benchmarks.steps import group_of, step_case
from pmf.config import MODELS
from pmf.errors import require

LARGEST_SHARE = 1 / 6
"""Of the time that is left, what one job may take: a slow compiler leaves time to what comes after it."""
LARGEST_SHARE_AGAIN = 1 / 2
"""The same for a job that an earlier part could not end; it comes after all others."""
TEST_SHARE = 1 / 3
"""Of the whole time, what the tests before it may take."""
LEAST_SECONDS = 5.0
"""Jobs do not begin with less time left."""
Check = Callable[[list[str], float], dict[str, Verdict]]


class Budget:
    """The time a measurement may take, from now on."""

    def __init__(self, minutes: float) -> None:
        require(minutes > 0, f"minutes: expected a positive time, got {minutes:g}")
        self.end = time.monotonic() + 60 * minutes

    def left(self) -> float:
        """Seconds."""
        return self.end - time.monotonic()

    def largest_job(self, share: float = LARGEST_SHARE) -> float:
        """Seconds that the next job may take: never more than are left."""
        return min(self.left(), max(30.0, share * self.left()))


@dataclass(frozen=True)
class Plan:
    """The jobs, most important first, and the cases they are made of."""

    jobs: list[Job]
    cases: dict[str, Case]
    device: torch.device

    @classmethod
    def of(cls, parts: list[Part], device: torch.device, only: str = "") -> Plan:
        """From what is asked for, with what a type of device can run; touches none.

        Errors: `InputError` on an unknown preset or a pattern that fits no case.
        """
        jobs: list[Job] = []
        cases: dict[str, Case] = {}
        for part in parts:
            known = part.size in MODELS or part.size == LONG_ATTENTION
            require(known, f"sizes: unknown preset {part.size!r}, expected one of {', '.join(MODELS)}")
            found = [] if part.suite == "memory" else suite_cases(part.suite, part.size, part.batch)
            found = [case for case in found if only in case.name]
            cases |= {case.name: case for case in found}
            jobs += [job for job in _jobs(part, found, device) if any(only in name for name in job.names)]
        require(bool(jobs), f"only: {only!r} fits no case")
        return cls(jobs, cases, device)

    def providers(self) -> set[str]:
        """The names of everything that the cases compare."""
        return {name for case in self.cases.values() for name in case.providers(self.device)}


def _jobs(part: Part, cases: list[Case], device: torch.device) -> Iterator[Job]:
    """Steps and samplers: a job per provider. Ops: a job per op. Largest batches: one job."""
    if part.suite == "memory":
        yield Job(part.suite, part.size)
    elif part.suite == "ops":
        groups: dict[str, list[str]] = {}
        for case in cases:
            groups.setdefault(case.name.split()[0], []).append(case.name)
        yield from (Job(part.suite, part.size, part.batch, tuple(names)) for names in groups.values())
    else:
        for case in cases:
            for name in case.providers(device):
                if part.group in ("", group_of(name)):
                    yield Job(part.suite, part.size, part.batch, (case.name,), name)


class Measurement:
    """One part: its origin, its ceilings, what the ledger held before it, and its records so far."""

    def __init__(self, plan: Plan, settings: Settings, budget: Budget, directory: Path | None) -> None:
        self.plan, self.settings, self.budget, self.directory = plan, settings, budget, directory
        self.origin: Record = {}
        self.earlier = Earlier()
        self.records: list[Record] = []

    def run(self, check: Check = run_tests) -> None:
        """Every job that fits into the time; each figure enters the ledger at once. Others are named."""
        self._begin()
        on_gpu = self.settings.device.startswith("cuda")
        jobs = self._jobs()
        failing = self.gate(sorted({test for job in jobs for test in self._tests(job)}), check) if on_gpu else {}
        for job in jobs:
            again = bool(self.earlier.tried & self._keys(job))
            broken = self._tests(job) & failing.keys()
            if broken:
                self._add(job, failed(failing[min(broken)], provider=job.provider))
            elif self.budget.left() < LEAST_SECONDS:
                self._add(job, {"status": "skipped", "error": "no time was left", "provider": job.provider})
            else:
                share = LARGEST_SHARE_AGAIN if again else LARGEST_SHARE
                for record in run_job(job, self.settings, self.budget.largest_job(share)):
                    self._add(job, record)
        self._end()

    def _end(self) -> None:
        """Print the table of largest batches, and what no time was left for."""
        memory = [r for r in self.records if r["suite"] == "memory" and r["status"] == "measured"]
        if memory:
            print(memory_table(memory))
        late: dict[str, list[str]] = {}
        for record in self.records:
            if record["status"] == "skipped":
                late.setdefault(record["case"], []).append(record["provider"] or "all")
        if late:
            print("no time was left for " + "; ".join(f"{case}: {', '.join(names)}" for case, names in late.items()))

    def _begin(self) -> None:
        """Measure the ceilings of this part, and read what earlier ones left."""
        (self.origin,) = run_job(Job("ceilings"), self.settings, self.budget.largest_job())
        require(self.origin.get("status") != "failed", f"device: {self.origin.get('error')}")
        print(f"{self.origin['gpu']}: copy {self.origin['copy_bytes_per_s'] / 1e9:.0f} GB/s, ", end="")
        print(f"bf16 product {self.origin['product_operations_per_s'] / 1e12:.1f} TFLOP/s", flush=True)
        if self.directory is not None:
            self.earlier = Earlier(ledger_file(self.origin["gpu"], self.directory), self.origin)

    def _tests(self, job: Job) -> set[str]:
        """The test files that stand before a job."""
        return {test for name in job.cases for test in self.plan.cases[name].tests(job.provider)}

    def _keys(self, job: Job) -> set[Key]:
        """What a job is to measure, as the ledger names it; empty where none of its providers is asked for."""
        if job.suite == "memory":
            return memory_keys(job.size)
        wanted, keys = self.settings.providers, set()
        for case in job.cases:
            every = self.plan.cases[case].providers(self.plan.device)
            known = every if job.provider is None else (job.provider,)
            keys |= {(case, name, job.batch, None) for name in known if not wanted or name in wanted}
        return keys

    def _jobs(self) -> list[Job]:
        """What is left to do: first what was never tried, in order of importance, then what failed before."""
        held = self.earlier.held
        asked = [(job, keys) for job in self.plan.jobs if (keys := self._keys(job))]
        left = [(job, keys - held) for job, keys in asked if keys - held]
        if len(left) < len(asked):
            print(f"{len(asked) - len(left)} of {len(asked)} jobs were measured before", flush=True)
        left.sort(key=lambda pair: bool(pair[1] & self.earlier.tried))
        return [replace(job, held=frozenset(held)) for job, _ in left]

    def gate(self, tests: list[str], check: Check) -> dict[str, str]:
        """Test file -> why no figure may be recorded behind it.

        A verdict on these very sources and tests, on this card, is not asked for twice.
        """
        origin = digest("tests")
        known = {test: v for test, v in self.earlier.verdicts(origin).items() if test in tests}
        new = [test for test in tests if test not in known]
        found = check(new, TEST_SHARE * self.budget.left()) if new else {}
        for test, verdict in found.items():
            print(verdict.error or f"{test} passes", file=sys.stderr)
            status = "passed" if verdict.error is None else "failed"
            record = {"suite": "tests", "case": test, "provider": None, "status": status, **asdict(verdict)}
            if self.directory is not None:
                append({**self.origin, **record, "tests": origin}, self.directory)
        errors = {**known, **{test: verdict.error for test, verdict in found.items()}}
        return {test: error for test, error in errors.items() if error is not None}

    def _add(self, job: Job, record: Record) -> None:
        """Complete a record, show it, append it to the ledger."""
        if "case" not in record:  # the whole job: every case of which nothing is known
            known = {r["case"] for r in self.records} | {case for case, *_ in job.held}
            for name in [name for name in job.names if name not in known] or job.names[-1:]:
                self._add(job, {**record, "case": name})
            return
        record = {"suite": job.suite, "size": job.size, "batch": job.batch, **record}
        table = record.pop("table", None)
        if record["status"] == "measured" and job.suite != "memory":
            record |= self._shares(record)
        self.records.append(record)
        skipped = record["status"] == "skipped"
        if not skipped:
            print(_line(record), flush=True)
        if self.directory is not None and not (skipped and key(record) in self.earlier.known):
            file = append({**self.origin, **record}, self.directory)
            if table is not None:
                write_profile(file, record, table)

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
            return {**shares, "of_value_alone": self._of_value_alone(record)}
        peaks = {r["provider"]: r.get("peak_bytes") for r in self._same_case(record)}
        peak, least = record["peak_bytes"], peaks.get("flow matching")
        relative = peak / least if peak and least else None
        counted = record.get("counted_bytes")
        ratio = {"peak_of_counted": peak / counted} if counted else {}
        return {**shares, **ratio, "images_per_s": record["batch"] / seconds, "peak_of_flow_matching": relative}

    def _same_case(self, record: Record) -> list[Record]:
        """What is known of the record's case, from earlier parts and from this one; the latest last."""
        return [r for r in (*self.earlier.records, *self.records, record) if r["case"] == record["case"]]

    def _of_value_alone(self, record: Record) -> float | None:
        """Time of value and tangent over that of the value, where that is timed beside them."""
        alone = [r["median_us"] for r in self._same_case(record) if r["provider"] == VALUE_ALONE and "median_us" in r]
        return record["median_us"] / alone[-1] if alone else None

    def _case(self, record: Record) -> Case:
        """The case of a record; a step that had to take a smaller batch has one of its own."""
        name = str(record["case"])
        if name not in self.plan.cases:
            self.plan.cases[name] = step_case(record["size"], record["batch"])
        return self.plan.cases[name]


def write_profile(ledger: Path, record: Record, table: str) -> Path:
    """The whole profile of a step beside its ledger, `<gpu>-profile-<case>-<provider>.txt`."""
    name = re.sub(r"[^A-Za-z0-9]+", "-", f"{record['case']} {record['provider']}")
    file = ledger.with_name(f"{ledger.stem}-profile-{name}.txt")
    file.write_text(f"{record['case']}, {record['provider']}: median {record['median_us']:.0f} us\n{table}")
    return file


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
    host = f"  host {record['host_us'] / 1e3:.1f} ms" if "host_us" in record else ""
    value = f"{ratio:6.2f} x the value" if (ratio := record.get("of_value_alone")) else ""
    return f"{start}{record['median_us']:12.1f} us{share:8.1%}{peak}{host}{value}"
