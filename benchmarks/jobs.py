"""What is measured in one process of its own: so that a crash, a hang or a full memory costs that alone.

A step's providers get a process each, since they would not fit into memory together; the rivals of an op
share one and are timed in turns. Processes are forked from a server that has imported PyTorch and never
touches the GPU. A job that outlives its time is killed.
"""

from __future__ import annotations

import contextlib
import gc
import math
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection

import torch

from pmf.benchmarks.cases import Case, Run, long_attention_cases, op_cases
from pmf.benchmarks.ledger import OUT_OF_MEMORY, Key, Record, provenance
from pmf.benchmarks.memory import memory_case, memory_rows
from pmf.benchmarks.order import LONG_ATTENTION
from pmf.benchmarks.steps import counted_bytes, sampling_case, step_case, step_name, step_providers
from pmf.benchmarks.timing import Ready, ceilings, host_us, measure, profiled, warm_up

TIMING_SHARE = 0.1
"""Share of a job's time that its timed runs may take; the rest is for building, compiling and warming up."""
PROFILE_ROWS = 25
"""Kernels that a record names; the whole table stands in a file of its own."""


@dataclass(frozen=True)
class Settings:
    """What every job needs to know."""

    device: str
    repeats: int
    profile: str
    """Whole steps and samplers of this name also tell their kernels."""
    providers: tuple[str, ...] = ()
    """Only these; none: all."""


@dataclass(frozen=True)
class Job:
    """Cases of one preset, and one provider of them or all in turns."""

    suite: str
    """ceilings, steps, sampling, ops or memory."""
    size: str = ""
    batch: int = 0
    cases: tuple[str, ...] = ()
    """Their names; none for ceilings and memory."""
    provider: str | None = None
    """This alone; None: all, in turns."""
    held: frozenset[Key] = frozenset()
    """What an earlier part measured: left out."""

    @property
    def names(self) -> tuple[str, ...]:
        """What its records are filed under."""
        return self.cases or (memory_case(self.size),)


def suite_cases(suite: str, size: str, batch: int) -> list[Case]:
    """The cases of a preset in one suite."""
    if suite == "ops":
        return long_attention_cases() if size == LONG_ATTENTION else op_cases((size,), batch)
    return [{"steps": step_case, "sampling": sampling_case}[suite](size, batch)]


def first_line(error: BaseException) -> str:
    """Type and first line of an error."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


def failed(reason: str, **where: object) -> Record:
    """A record of what could not be measured, and why."""
    return {**where, "status": "failed", "error": reason}


def run_job(job: Job, settings: Settings, seconds: float) -> Iterator[Record]:
    """The job's records as they come; a last one says why where it did not come to its end."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pmf.benchmarks.jobs"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(job, settings, seconds, sender), daemon=False)
    deadline = time.monotonic() + seconds
    process.start()
    sender.close()
    try:
        while receiver.poll(max(0.0, deadline - time.monotonic())):
            try:
                yield receiver.recv()
            except EOFError:
                process.join()
                if process.exitcode != 0:
                    yield failed(f"the process ended with code {process.exitcode}", provider=job.provider)
                return
        yield failed(f"did not finish in {seconds:.0f} s", provider=job.provider)
    finally:
        _end(process)


def _end(process) -> None:
    """Kill the process and what it started (compilers have workers)."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join()


def _work(job: Job, settings: Settings, seconds: float, sender: Connection) -> None:
    """In the job's process: send its records."""
    os.setpgrp()
    device = torch.device(settings.device)
    try:
        if device.type == "cuda":
            torch.cuda.set_stream(torch.cuda.Stream(device))  # CUDA graphs cannot be captured on the default one
        for record in _records(job, settings, device, seconds):
            sender.send(record)
    except Exception as error:
        sender.send(failed(first_line(error), provider=job.provider))


def _records(job: Job, settings: Settings, device: torch.device, seconds: float) -> Iterator[Record]:
    if job.suite == "ceilings":
        yield {**provenance(device), **ceilings(device)}
    elif job.suite == "memory":
        for row in memory_rows(job.size, device, job.held):
            yield {"case": job.names[0], "status": "measured", **row}
    elif job.suite == "steps":
        yield from _step_records(job, settings, device, TIMING_SHARE * seconds)
    else:
        timing = TIMING_SHARE * seconds / len(job.cases)
        for case in suite_cases(job.suite, job.size, job.batch):
            if case.name in job.cases:
                torch.compiler.reset()  # else what earlier cases compiled counts against the compiler's limit
                wanted = settings.providers if job.provider is None else (job.provider,)
                known = {n: prepare for n, prepare in case.providers(device).items() if not wanted or n in wanted}
                providers = {
                    n: prepare for n, prepare in known.items() if (case.name, n, job.batch, None) not in job.held
                }
                yield from case_records(case.name, providers, device, settings, timing, job.suite != "ops")


def _step_records(job: Job, settings: Settings, device: torch.device, seconds: float) -> Iterator[Record]:
    """A step whose batch does not fit into memory is recorded as such and measured at half of it."""
    batch, full = job.batch, True
    while full and batch > 0 and (step_name(job.size, batch), job.provider, batch, None) not in job.held:
        prepare = step_providers(job.size, batch, device)[job.provider]
        name = step_name(job.size, batch)
        (record,) = case_records(name, {job.provider: prepare}, device, settings, seconds, whole=True)
        if record.get("peak_bytes") is not None:
            record |= _tried(counted_bytes, job.size, batch, job.provider, device)
        yield {**record, "batch": batch}
        full = str(record.get("error", "")).startswith(OUT_OF_MEMORY)
        batch //= 2
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def case_records(
    name: str, providers: dict, device: torch.device, settings: Settings, seconds: float = math.inf, whole: bool = False
) -> Iterator[Record]:
    """One record per provider of a case: its measurement, or why there is none. Others go on.

    `whole`: a whole step or sampler, timed as a script runs it, not as a CUDA graph, with what the host takes,
    and profiled where the settings ask for it.
    """
    ready: dict[str, Ready] = {}
    for provider, prepare in providers.items():
        try:
            ready[provider] = warm_up(prepare(), device)
        except Exception as error:
            yield failed(first_line(error), case=name, provider=provider)
    if not ready:
        return
    for provider, m in measure(ready, device, settings.repeats, seconds, capture=not whole).items():
        record = {"case": name, "provider": provider, "status": "measured", **asdict(m)}
        if whole:
            asked = provider == settings.profile
            record |= _tried(_host_and_device, ready[provider].run, device, settings, asked)
        yield record


def _host_and_device(run: Run, device: torch.device, settings: Settings, asked: bool) -> Record:
    """What the host takes to enqueue a run, what its kernels take, and how many there are; its profile where asked."""
    found: Record = {"host_us": host_us(run, device, min(settings.repeats, 5)), "busy_us": None, "launches": None}
    on_gpu = device.type == "cuda"
    if on_gpu or asked:
        profile = profiled(run, device)
        if on_gpu:
            found |= {"busy_us": profile.busy_us, "launches": profile.launches}
        if asked:
            kernels = profile.kernels[:PROFILE_ROWS]
            found["profile"] = [(name[:120], took / profile.busy_us, calls) for name, took, calls in kernels]
            found["table"] = profile.table()
    return found


def _tried(measure: Callable[..., Record], *arguments) -> Record:
    """What stands beside a figure; where it fails, why: the figure is kept."""
    try:
        return measure(*arguments)
    except Exception as error:
        return {"note": first_line(error)}
