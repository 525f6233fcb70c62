"""What one process measures: a provider of a step or sampler, all of an op, or the largest batches of a preset."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from pmf.benchmarks.cases import Case
from pmf.benchmarks.largest_batch import largest_batch_case
from pmf.benchmarks.ledger import Key, Record, provenance
from pmf.benchmarks.op_cases import long_attention_cases, op_cases
from pmf.benchmarks.processes import failed
from pmf.benchmarks.step_cases import COUNTED, counted_bytes, sampling_case, step_case
from pmf.benchmarks.timing import ceilings, measure

LONG_ATTENTION = "attention beyond pMF"
"""Stands for a preset: attention at other lengths."""
TIMING_SHARE = 0.1
"""Share of a job's time that its timed runs may take; the rest is for building, compiling and warming up."""


@dataclass(frozen=True)
class Job:
    """Pairs of case and provider, of one suite and preset. Providers of the name `profile` keep their profile."""

    suite: str
    size: str
    batch: int
    pairs: tuple[tuple[str, str], ...]
    device: str
    repeats: int = 30
    profile: str = ""

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
        if job.suite == "memory":
            yield from ({"case": name, "provider": p, **prepare()()} for p, prepare in providers.items())
            continue
        share, whole = TIMING_SHARE * seconds / len(names), job.suite != "ops"  # whole: timed as a script runs it
        for record in measure(providers, device, job.repeats, share, graphs=not whole, detailed=whole):
            if record["provider"] != job.profile:
                record = {field: value for field, value in record.items() if field not in ("profile", "table")}
            if job.suite == "steps" and record["provider"] in COUNTED and record.get("peak_bytes"):
                try:
                    record["counted_bytes"] = counted_bytes(job.size, job.batch, record["provider"], device)
                except Exception as error:
                    record["note"] = failed(error)["error"]
            yield {"case": name, **record}
