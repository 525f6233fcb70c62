"""Run a whole measurement within its time limit: share out the time, run the jobs, record their figures."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch

from pmf.benchmarks import figures, gate
from pmf.benchmarks.cases import Case
from pmf.benchmarks.ledger import RESULTS, Ledger, key, out_of_memory
from pmf.benchmarks.plan import Job, Options, jobs_of
from pmf.benchmarks.processes import isolated, job_records, origin_records
from pmf.errors import require
from pmf.timing import Record, failed

TEST_SHARE = 1 / 3
"""Share of the remaining time for the tests."""
JOB_SHARE, SECOND_SHARE = 1 / 6, 1 / 2
"""The same for a job, so that a slow compiler leaves time for others, and for a job that failed in an earlier run."""
LEAST_SECONDS = 5.0
"""No job starts with less time left."""


def largest_time(left: float, share: float = JOB_SHARE) -> float:
    """Time limit of the next job, in seconds."""
    return min(left, max(30.0, share * left))


def run(suite: str, options: Options) -> None:
    """Measure every job that fits into the time, record each figure at once, and list what did not fit."""
    require(options.minutes > 0, f"minutes: expected a positive time, got {options.minutes:g}")
    deadline = time.monotonic() + 60 * options.minutes
    jobs, on_gpu = jobs_of(suite, options), torch.device(options.device).type == "cuda"
    (origin,) = isolated(origin_records, largest_time(deadline - time.monotonic()), options.device)
    require(origin.get("status") != "failed", f"device: {origin.get('error')}")
    print(f"{origin['gpu']}: copy {origin['copy_bytes_per_s'] / 1e9:.0f} GB/s, ", end="")
    print(f"bf16 product {origin['product_operations_per_s'] / 1e12:.1f} TFLOP/s", flush=True)
    ledger = Ledger(origin, options.record or (RESULTS if on_gpu else None))
    queue = deque(remaining(jobs, ledger))
    if len(queue) < len(jobs):
        print(f"{len(jobs) - len(queue)} of {len(jobs)} jobs were measured before", flush=True)
    tests = list(dict.fromkeys(test for job in queue for test in sorted(job.tests()))) if on_gpu else []
    red = gate.failing(tests, ledger, TEST_SHARE * (deadline - time.monotonic()))
    while queue:
        job = queue.popleft()
        measure_job(job, ledger, red, deadline - time.monotonic())
        if job.suite == "steps" and job.batch > 1 and out_of_memory(ledger.records[-1]):
            half = replace(job, batch=job.batch // 2)
            pairs = tuple((name, provider) for name in half.cases() for _, provider in job.pairs)
            queue.extendleft(remaining([replace(half, pairs=pairs)], ledger))
    print(figures.summary(ledger.records), end="")
    if ledger.file is None:
        print("no GPU: nothing was recorded")


def remaining(jobs: list[Job], ledger: Ledger) -> list[Job]:
    """The jobs without a figure: first those never tried, by importance, then those that failed before."""
    settled, tried = ledger.settled(), ledger.tried()
    left = [replace(job, pairs=tuple(p for p in job.pairs if (*p, job.batch) not in settled)) for job in jobs]
    return sorted((job for job in left if job.pairs), key=lambda job: bool(job.keys() & tried))


def measure_job(job: Job, ledger: Ledger, red: dict[str, str], left: float) -> None:
    """Run a job with `left` seconds remaining and record the outcome; `red` maps failing tests to the reason."""
    outcome: Iterable[Record]
    if broken := job.tests() & red.keys():
        outcome = [failed(red[min(broken)])]
    elif left < LEAST_SECONDS:
        outcome = [{"status": "skipped", "error": "no time was left"}]
    else:
        seconds = largest_time(left, SECOND_SHARE if job.keys() & ledger.tried() else JOB_SHARE)
        outcome = isolated(job_records, seconds, job, seconds)
    cases = job.cases()
    for found in outcome:
        for record in completed(found, job, ledger):
            if record["status"] == "measured" and job.suite != "memory":
                record |= shares(record, cases[record["case"]], ledger.origin)
            ledger.add(record)
            if record["status"] != "skipped":
                print(figures.line(record), flush=True)


def completed(record: Record, job: Job, ledger: Ledger) -> Iterator[Record]:
    """Add the job's fields to a record; a record that names no case is repeated for every case without one."""
    where = {"suite": job.suite, "size": job.size, "batch": job.batch}
    if "case" in record:
        yield {**where, **record}
        return
    known, providers = {key(r) for r in ledger.records}, {provider for _, provider in job.pairs}
    names = dict.fromkeys(case for case, provider in job.pairs if (case, provider, job.batch) not in known)
    for name in names or [job.pairs[-1][0]]:
        yield {**where, "case": name, "provider": min(providers) if len(providers) == 1 else None, **record}


def shares(record: Record, case: Case, origin: Record) -> Record:
    """A figure's bytes and operations, and its rates as fractions of the ceilings."""
    operations, seconds = case.operations_of(record["provider"]), record["median_us"] / 1e6
    return {
        "bytes": case.bytes,
        "operations": operations,
        "of_copy_bandwidth": case.bytes / seconds / origin["copy_bytes_per_s"],
        "of_product_rate": operations / seconds / origin["product_operations_per_s"],
    }
