"""What to measure, most important first, because time may run out."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch

from pmf.benchmarks.cases import Case
from pmf.benchmarks.ledger import Key
from pmf.benchmarks.network_cases import FULL_SIZE, NETWORKS, network_case
from pmf.benchmarks.op_cases import long_attention_cases, op_cases
from pmf.benchmarks.step_cases import group_of, largest_batch_case, sampling_case, step_case
from pmf.config import MODELS
from pmf.errors import InputError, first_line, require
from pmf.fields import check_fields

LONG_ATTENTION = "attention beyond pMF"
"""Used in place of a preset: attention at other lengths."""


@dataclass(frozen=True)
class Options:
    """What to measure, and for how long."""

    sizes: tuple[str, ...] = ()
    """Presets whose shapes are measured (default: all published ones; for ops, those with patches of 16); for networks,
    of DiT-B/4, UNet, DiT small and UNet small (default: the first two)."""
    batch: int | None = None
    """Batch size (default: 128; `gpu` also measures steps at 64)."""
    only: str = ""
    """Measure only cases whose name contains this."""
    providers: tuple[str, ...] = ()
    """Measure only these providers (default: all)."""
    repeats: int = 30
    """Runs of each provider, fewer if time is short; the median is reported."""
    minutes: float = 19.0
    """Time limit of the whole measurement, start-up excluded; cases that no longer fit are listed. A second call
    resumes: figures that the ledger holds for the same code on the same card are not measured again."""
    profile: str = "lean"
    """The provider of steps and samplers to profile; the full table is written beside the ledger."""
    record: Path | None = None
    """Folder of the ledger (default: benchmarks/results on a GPU; on a CPU, nothing is recorded)."""
    device: str = field(default_factory=lambda: "cuda" if torch.cuda.is_available() else "cpu")
    """Device to measure on."""

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("batch", "repeats"):
            got = getattr(self, name)
            require(got is None or got > 0, f"{name}: expected a positive number, got {got}")
        try:
            torch.device(self.device)  # whether it is there, a process of its own finds out
        except RuntimeError as error:
            raise InputError(f"device: cannot use {self.device!r}: {first_line(error)}") from None


@dataclass(frozen=True)
class Job:
    """The work of one process: pairs of case and provider, all from one suite and preset."""

    options: Options
    suite: str
    size: str
    batch: int = 128
    group: str = ""
    """Restricts the step of pMF or a network to one group of providers; see `group_of`."""
    pairs: tuple[tuple[str, str], ...] = ()

    def keys(self) -> set[Key]:
        """The ledger keys of its records."""
        return {(case, provider, self.batch) for case, provider in self.pairs}

    def cases(self) -> dict[str, Case]:
        """Every case of the suite and preset, by name. Does not touch the device."""
        device = torch.device(self.options.device)
        if self.suite == "ops":
            found = op_cases(self.size, self.batch, device) if self.size in MODELS else long_attention_cases(device)
        else:
            makers = {"steps": step_case, "sampling": sampling_case, "memory": largest_batch_case}
            makers["networks"] = network_case
            found = [makers[self.suite](self.size, self.batch, device)]
        return {case.name: case for case in found}

    def tests(self) -> set[str]:
        """The test files that must pass first."""
        cases = self.cases()
        return {test for case, provider in self.pairs for test in cases[case].tests_of(provider)}


COARSE = B16, L16, H16 = "pMF-B/16", "pMF-L/16", "pMF-H/16"
FINE = ("pMF-B/32", "pMF-L/32", "pMF-H/32")


def everything(options: Options) -> list[Job]:
    """The parts of the suite `gpu`."""
    job = partial(Job, options)
    return [
        *(job("steps", B16, 64, "eager"), job("steps", B16, 128, "eager"), job("ops", B16), job("sampling", B16)),
        *(job("networks", size, 64, "eager") for size in FULL_SIZE),
        *(job("steps", B16, 128, "backends"), job("steps", B16, 64, "compiled")),
        *(job("networks", size, 64, "compiled") for size in FULL_SIZE),
        *(job("steps", L16, 64, "eager"), job("steps", H16, 64, "eager")),
        *(job("ops", H16), job("ops", LONG_ATTENTION, 1), job("memory", B16, 0), job("steps", B16, 128, "compiled")),
        *(job("sampling", H16), job("memory", H16, 0), job("ops", L16), job("sampling", L16), job("memory", L16, 0)),
        *(job("steps", L16, 64, "compiled"), job("steps", H16, 64, "compiled")),
        # Patches of 32 are left out of ops: only the two ops that touch images have other shapes there.
        *(job("steps", size, 64, "eager") for size in FINE),
        *(job("sampling", size) for size in FINE),
        *(job("memory", size, 0) for size in FINE),
    ]


def parts_of(suite: str, options: Options) -> list[Job]:
    """The parts of a suite. For `gpu`, a preset named in `sizes` gets the parts that B/16 has."""
    if suite != "gpu":
        pmf_sizes = (*COARSE, *((LONG_ATTENTION,) if suite == "ops" else FINE))
        usual = options.sizes or (FULL_SIZE if suite == "networks" else pmf_sizes)
        parts = [Job(options, suite, size, 0 if suite == "memory" else 128) for size in usual]
    else:
        parts = everything(options)
        if options.sizes:
            parts = [replace(part, size=size) for size in options.sizes for part in parts if part.size == B16]
    return list(dict.fromkeys(replace(part, batch=options.batch or part.batch) for part in parts))


def jobs_of(suite: str, options: Options) -> list[Job]:
    """Split a suite into jobs: one per provider of a pMF step or sampler, one per op, one for all largest batches.

    A network's providers share a process, so that they run in turn, but for compiled ones: where torch.func.jvp does
    not compile, PyTorch leaves forward mode on.

    Raises `InputError` for an unknown preset or provider, and for a pattern that matches no case.
    """
    jobs: list[Job] = []
    known: set[str] = set()
    for part in parts_of(suite, options):
        known_sizes = NETWORKS if part.suite == "networks" else MODELS
        there = part.size in (*known_sizes, *((LONG_ATTENTION,) if part.suite == "ops" else ()))
        require(there, f"sizes: unknown preset {part.size!r}, expected one of {', '.join(known_sizes)}")
        processes: dict[str, list[tuple[str, str]]] = {}
        chosen = [case for case in part.cases().values() if options.only in case.name]
        for case, name in [(c, provider) for c in chosen for provider in c.providers]:
            known.add(name)
            if name in (options.providers or case.providers) and part.group in ("", group_of(name)):
                together = {"ops": case.name.split()[0], "memory": ""}
                if group_of(name) == "eager":
                    together["networks"] = ""
                process = together.get(part.suite, name)
                processes.setdefault(process, []).append((case.name, name))
        jobs += [replace(part, pairs=tuple(pairs)) for pairs in processes.values()]
    require(bool(known), f"only: {options.only!r} matches no case")
    unknown = sorted(set(options.providers) - known)
    require(not unknown, f"providers: expected some of {sorted(known)}, got {next(iter(unknown), '')!r}")
    return jobs
