"""Run work in its own process, so that a crash, a hang or an exhausted memory costs only that work."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import torch

from pmf.benchmarks.ledger import provenance
from pmf.benchmarks.plan import Job
from pmf.benchmarks.step_cases import CHECKPOINTED, counted_memory
from pmf.timing import Record, ceilings, failed, measure

Work = Callable[..., Iterable[Record]]
TIMING_SHARE = 0.1
"""Share of a job's time for its timed runs; the rest is for building, compiling and warming up."""


def isolated(work: Work, seconds: float, *arguments: Any) -> Iterator[Record]:
    """Yield the records of `work(*arguments)` as they arrive; if it crashes or times out, a last record says why.

    The process is forked from a server that has imported PyTorch and never touches the GPU, so it starts at once.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    receiver, sender = context.Pipe(duplex=False)
    process: Any = context.Process(target=_send, args=(work, arguments, sender), daemon=False)
    deadline = time.monotonic() + seconds
    process.start()
    sender.close()
    try:
        while receiver.poll(max(0.0, deadline - time.monotonic())):
            yield receiver.recv()
        yield failed(f"did not finish in {seconds:.0f} s")
    except EOFError:
        process.join()
        if process.exitcode != 0:
            yield failed(f"the process ended with code {process.exitcode}")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # with its children: compilers start workers
        process.kill()
        process.join()


def _send(work: Work, arguments: tuple, sender: Connection) -> None:
    os.setpgrp()
    try:
        for record in work(*arguments):
            sender.send(record)
    except Exception as error:
        sender.send(failed(error))


def origin_records(device: str) -> Iterator[Record]:
    """Yield one record: the machine and software of this run, and the machine's ceilings."""
    yield {**provenance(torch.device(device)), **ceilings(torch.device(device))}


def job_records(job: Job, seconds: float) -> Iterator[Record]:
    """Measure a job: one record per pair."""
    device, cases = torch.device(job.options.device), job.cases()
    if device.type == "cuda":
        torch.cuda.set_stream(torch.cuda.Stream(device))  # the default stream cannot be captured
    names = dict.fromkeys(case for case, _ in job.pairs)
    for name in names:
        torch.compiler.reset()  # or earlier cases count against the recompile limit
        providers = {provider: cases[name].providers[provider] for case, provider in job.pairs if case == name}
        if job.suite == "memory":
            yield from ({"case": name, "provider": p, **prepare()()} for p, prepare in providers.items())
            continue
        share, suite = TIMING_SHARE * seconds / len(names), job.suite
        options = {"graphs": suite == "ops", "detailed": suite in ("steps", "sampling"), "live": suite == "networks"}
        replaying = [provider for provider in providers if "captured" in provider]
        for record in measure(providers, device, job.options.repeats, share, replaying=replaying, **options):
            yield {"case": name, **finished(record, job, device)}


def finished(record: Record, job: Job, device: torch.device) -> Record:
    """Drop a profile that was not asked for; add the counted bytes to compare the peak with."""
    if record["provider"] != job.options.profile:
        record = {field: value for field, value in record.items() if field not in ("profile", "table")}
    if job.suite == "steps" and record["provider"] in CHECKPOINTED and record.get("peak_bytes"):
        try:
            memory = counted_memory(job.size, record["provider"], device)
            record["counted_bytes"] = memory.copies + job.batch * memory.per_row
        except Exception as error:
            record["note"] = failed(error)["error"]
    return record
