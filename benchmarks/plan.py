"""What is measured, the most important first: time ends a measurement somewhere."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch

from pmf.benchmarks.step_cases import group_of
from pmf.benchmarks.worker import LONG_ATTENTION, Job
from pmf.config import MODELS
from pmf.errors import require


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


class Part(NamedTuple):
    """A suite of one preset; of a step's providers those of one group (`group_of`)."""

    suite: str
    size: str
    batch: int = 128
    group: str = ""


COARSE = B16, L16, H16 = "pMF-B/16", "pMF-L/16", "pMF-H/16"
FINE = ("pMF-B/32", "pMF-L/32", "pMF-H/32")
EVERYTHING = (
    *(Part("steps", B16, 64, "eager"), Part("steps", B16, 128, "eager"), Part("ops", B16), Part("sampling", B16)),
    *(Part("steps", B16, 128, "backends"), Part("steps", B16, 64, "compiled")),
    *(Part("steps", L16, 64, "eager"), Part("steps", H16, 64, "eager")),
    *(Part("ops", H16), Part("ops", LONG_ATTENTION, 1), Part("memory", B16, 0), Part("steps", B16, 128, "compiled")),
    *(Part("sampling", H16), Part("memory", H16, 0), Part("ops", L16), Part("sampling", L16), Part("memory", L16, 0)),
    *(Part("steps", L16, 64, "compiled"), Part("steps", H16, 64, "compiled")),
    # An op has the same shapes at 32 pixels a patch, but for the two that touch images.
    *(Part("steps", size, 64, "eager") for size in FINE),
    *(Part("sampling", size) for size in FINE),
    *(Part("memory", size, 0) for size in FINE),
)
"""What `gpu` measures."""


def parts_of(suite: str, sizes: tuple[str, ...], batch: int | None) -> list[Part]:
    """What a command asks for: a suite, or everything ("gpu": of a preset that is named, what it is of B/16)."""
    usual = sizes or (*COARSE, *((LONG_ATTENTION,) if suite == "ops" else FINE))
    parts = [Part(suite, size, 0 if suite == "memory" else 128) for size in usual]
    if suite == "gpu":
        named = [Part(p.suite, size, p.batch, p.group) for size in sizes for p in EVERYTHING if p.size == B16]
        parts = named or list(EVERYTHING)
    return list(dict.fromkeys(Part(p.suite, p.size, batch or p.batch, p.group) for p in parts))


def jobs_of(suite: str, options: Options) -> list[Job]:
    """Steps and samplers: a job per provider. Ops: a job per op. Largest batches: one job.

    Errors: `InputError` on an unknown preset or provider, and on a pattern that fits no case.
    """
    jobs: list[Job] = []
    known: set[str] = set()
    for part in parts_of(suite, options.sizes, options.batch):
        there = part.size in MODELS or part.size == LONG_ATTENTION
        require(there, f"sizes: unknown preset {part.size!r}, expected one of {', '.join(MODELS)}")
        whole = Job(*part[:3], (), options.device, options.repeats, options.profile)
        groups: dict[str, list[tuple[str, str]]] = {}
        for case in whole.cases().values():
            if options.only in case.name:
                known |= case.providers.keys()
                for name in case.providers:
                    if name in (options.providers or case.providers) and part.group in ("", group_of(name)):
                        together = {"ops": case.name.split()[0], "memory": ""}.get(part.suite, name)
                        groups.setdefault(together, []).append((case.name, name))
        jobs += [replace(whole, pairs=tuple(pairs)) for pairs in groups.values()]
    require(bool(known), f"only: {options.only!r} fits no case")
    unknown = sorted(set(options.providers) - known)
    require(not unknown, f"providers: expected some of {sorted(known)}, got {next(iter(unknown), '')!r}")
    return jobs
