"""What is measured, the most important first: time ends a measurement somewhere."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch

from pmf.benchmarks.cases import Case
from pmf.benchmarks.ledger import Key
from pmf.benchmarks.op_cases import long_attention_cases, op_cases
from pmf.benchmarks.step_cases import group_of, largest_batch_case, sampling_case, step_case
from pmf.config import MODELS
from pmf.errors import require

LONG_ATTENTION = "attention beyond pMF"
"""Stands for a preset: attention at other lengths."""


@dataclass(frozen=True)
class Options:
    """What to measure, and for how long."""

    sizes: tuple[str, ...] = ()
    """Presets whose shapes are measured (default: all published; for ops those of 16 pixels a patch)."""
    batch: int | None = None
    """Images in a batch (default: 128; in gpu, steps 64 too)."""
    only: str = ""
    """Measure only cases whose name contains this."""
    providers: tuple[str, ...] = ()
    """Measure only these of what is compared (default: all)."""
    repeats: int = 30
    """Runs of each provider, fewer where time is short; the median is reported."""
    minutes: float = 19.0
    """The whole measurement ends within this, start-up aside; what no longer fits is named. Called again, it goes on
    where it ended: what the ledger holds of this very code on this card is not measured twice."""
    profile: str = "lean"
    """Steps and samplers of this name are profiled too, the whole table in a file beside the ledger."""
    record: Path | None = None
    """Folder of the ledger (default: benchmarks/results on a GPU; without one, nothing is recorded)."""
    device: str = field(default_factory=lambda: "cuda" if torch.cuda.is_available() else "cpu")
    """Device to measure on."""


@dataclass(frozen=True)
class Job:
    """What one process measures: pairs of case and provider, of one suite and preset."""

    options: Options
    suite: str
    size: str
    batch: int = 128
    group: str = ""
    """Of a step's providers those of one group (`group_of`)."""
    pairs: tuple[tuple[str, str], ...] = ()

    def keys(self) -> set[Key]:
        """Its records, as the ledger names them."""
        return {(case, provider, self.batch) for case, provider in self.pairs}

    def cases(self) -> dict[str, Case]:
        """All cases of the suite and preset, by name; the device is not touched."""
        device = torch.device(self.options.device)
        if self.suite == "ops":
            found = op_cases(self.size, self.batch, device) if self.size in MODELS else long_attention_cases(device)
        else:
            make = {"steps": step_case, "sampling": sampling_case, "memory": largest_batch_case}[self.suite]
            found = [make(self.size, self.batch, device)]
        return {case.name: case for case in found}

    def tests(self) -> set[str]:
        """The test files that stand before it."""
        cases = self.cases()
        return {test for case, provider in self.pairs for test in cases[case].tests_of(provider)}


COARSE = B16, L16, H16 = "pMF-B/16", "pMF-L/16", "pMF-H/16"
FINE = ("pMF-B/32", "pMF-L/32", "pMF-H/32")


def everything(options: Options) -> list[Job]:
    """What `gpu` measures."""
    job = partial(Job, options)
    return [
        *(job("steps", B16, 64, "eager"), job("steps", B16, 128, "eager"), job("ops", B16), job("sampling", B16)),
        *(job("steps", B16, 128, "backends"), job("steps", B16, 64, "compiled")),
        *(job("steps", L16, 64, "eager"), job("steps", H16, 64, "eager")),
        *(job("ops", H16), job("ops", LONG_ATTENTION, 1), job("memory", B16, 0), job("steps", B16, 128, "compiled")),
        *(job("sampling", H16), job("memory", H16, 0), job("ops", L16), job("sampling", L16), job("memory", L16, 0)),
        *(job("steps", L16, 64, "compiled"), job("steps", H16, 64, "compiled")),
        # An op has the same shapes at 32 pixels a patch, but for the two that touch images.
        *(job("steps", size, 64, "eager") for size in FINE),
        *(job("sampling", size) for size in FINE),
        *(job("memory", size, 0) for size in FINE),
    ]


def parts_of(suite: str, options: Options) -> list[Job]:
    """What a command asks for: a suite, or everything ("gpu": of a preset that is named, what it is of B/16)."""
    if suite != "gpu":
        usual = options.sizes or (*COARSE, *((LONG_ATTENTION,) if suite == "ops" else FINE))
        parts = [Job(options, suite, size, 0 if suite == "memory" else 128) for size in usual]
    else:
        parts = everything(options)
        if options.sizes:
            parts = [replace(part, size=size) for size in options.sizes for part in parts if part.size == B16]
    return list(dict.fromkeys(replace(part, batch=options.batch or part.batch) for part in parts))


def jobs_of(suite: str, options: Options) -> list[Job]:
    """Steps and samplers: a job per provider. Ops: a job per op. Largest batches: one job.

    Errors: `InputError` on an unknown preset or provider, and on a pattern that fits no case.
    """
    jobs: list[Job] = []
    known: set[str] = set()
    for part in parts_of(suite, options):
        there = part.size in (*MODELS, LONG_ATTENTION)
        require(there, f"sizes: unknown preset {part.size!r}, expected one of {', '.join(MODELS)}")
        processes: dict[str, list[tuple[str, str]]] = {}
        chosen = [case for case in part.cases().values() if options.only in case.name]
        for case, name in [(c, provider) for c in chosen for provider in c.providers]:
            known.add(name)
            if name in (options.providers or case.providers) and part.group in ("", group_of(name)):
                process = {"ops": case.name.split()[0], "memory": ""}.get(part.suite, name)
                processes.setdefault(process, []).append((case.name, name))
        jobs += [replace(part, pairs=tuple(pairs)) for pairs in processes.values()]
    require(bool(known), f"only: {options.only!r} fits no case")
    unknown = sorted(set(options.providers) - known)
    require(not unknown, f"providers: expected some of {sorted(known)}, got {next(iter(unknown), '')!r}")
    return jobs
