"""What one process measures.

Each provider of a step or sampler gets a process, since they would not fit into memory together; the providers of an
op share one and are timed in turns.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from pmf.benchmarks.cases import Case, Providers, Run
from pmf.benchmarks.largest_batch import largest_batch_case
from pmf.benchmarks.ledger import Key, Record, provenance
from pmf.benchmarks.op_cases import long_attention_cases, op_cases
from pmf.benchmarks.processes import failed
from pmf.benchmarks.step_cases import COUNTED, counted_bytes, sampling_case, step_case
from pmf.benchmarks.timing import WarmRun, ceilings, host_us, measure, profiled, warm_up

LONG_ATTENTION = "attention beyond pMF"
"""Stands for a preset: attention at other lengths."""
TIMING_SHARE = 0.1
"""Share of a job's time that its timed runs may take; the rest is for building, compiling and warming up."""


@dataclass(frozen=True)
class Job:
    """Cases of one suite and preset, each with some of its providers."""

    suite: str
    size: str
    batch: int
    pairs: tuple[tuple[str, str], ...]
    """Names of case and provider."""
    device: str
    repeats: int = 30
    profile: str = ""
    """Steps and samplers of this name also record their kernels."""

    def keys(self) -> set[Key]:
        """Its records, as the ledger names them."""
        return {(case, provider, self.batch) for case, provider in self.pairs}

    def cases(self) -> dict[str, Case]:
        """All cases of the suite and preset, by name; the device is not touched."""
        device = torch.device(self.device)
        if self.suite == "ops" and self.size == LONG_ATTENTION:
            found = long_attention_cases(device)
        elif self.suite == "ops":
            found = op_cases(self.size, self.batch, device)
        else:
            make = {"steps": step_case, "sampling": sampling_case, "memory": largest_batch_case}[self.suite]
            found = [make(self.size, self.batch, device)]
        return {case.name: case for case in found}


def origin_records(device: str) -> Iterator[Record]:
    """The one record of where a run measures, and that machine's ceilings."""
    yield {**provenance(torch.device(device)), **ceilings(torch.device(device))}


def job_records(job: Job, seconds: float) -> Iterator[Record]:
    """A record per pair."""
    device, cases = torch.device(job.device), job.cases()
    if device.type == "cuda":
        torch.cuda.set_stream(torch.cuda.Stream(device))  # CUDA graphs cannot be captured on the default one
    names = dict.fromkeys(case for case, _ in job.pairs)
    for name in names:
        torch.compiler.reset()  # otherwise earlier cases count against the limit of recompilations
        providers = {provider: cases[name].providers[provider] for case, provider in job.pairs if case == name}
        records: Iterable[Record]
        if job.suite == "memory":
            records = ({"provider": p, "status": "measured", **prepare()()} for p, prepare in providers.items())
        else:
            records = timed_records(job, providers, device, TIMING_SHARE * seconds / len(names))
        yield from ({"case": name, **record} for record in records)


def timed_records(job: Job, providers: Providers, device: torch.device, seconds: float) -> Iterator[Record]:
    """The times of one case's providers. One that fails costs no other.

    Ops are timed as CUDA graphs; steps and samplers as a script runs them, with what the host takes.
    """
    warm: dict[str, WarmRun] = {}
    for provider, prepare in providers.items():
        try:
            warm[provider] = warm_up(prepare(), device, "captured" in provider)
        except Exception as error:
            yield {"provider": provider, **failed(error)}
    found = measure(warm, device, job.repeats, seconds, capture=job.suite == "ops") if warm else {}
    for provider, times in found.items():
        record = {"provider": provider, "status": "measured", **times}
        if job.suite != "ops":
            try:
                add_details(record, job, warm[provider].run, device)
            except Exception as error:
                record["note"] = failed(error)["error"]
        yield record


def add_details(record: Record, job: Job, run: Run, device: torch.device) -> None:
    """Add the host's time, the kernels' time and number, the profile if it is asked for, and the counted bytes."""
    on_gpu, asked, provider = device.type == "cuda", record["provider"] == job.profile, record["provider"]
    record |= {"host_us": host_us(run, device, min(job.repeats, 5)), "busy_us": None, "launches": None}
    if on_gpu or asked:
        profile = profiled(run, device)
        record |= {name: profile[name] for name in (profile if asked else ("busy_us", "launches"))}
    if on_gpu and job.suite == "steps" and provider in COUNTED:
        record["counted_bytes"] = counted_bytes(job.size, job.batch, provider, device)
