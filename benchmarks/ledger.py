"""The ledger of figures: one JSON line per measurement in `benchmarks/results/<gpu>.jsonl`.

A line holds suite, size, batch, case, provider, status (measured, failed, skipped; of tests passed), error, the
figures, and where they come from.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterator
from datetime import datetime, timezone
from functools import partial
from importlib import metadata
from pathlib import Path

import torch

from pmf.dispatch import attention_backend
from pmf.timing import Record

Key = tuple[str, str | None, int | None]
"""Case, provider and batch."""
ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
MEASURED = ("pmf", "kernels", "benchmarks")
"""The folders whose code a figure depends on."""
UNMEASURED = {"__main__.py", "figures.py", "plan.py"}
"""Of the benchmarks, what only chooses and shows figures."""
OUT_OF_MEMORY = ("OutOfMemoryError", "XlaRuntimeError: RESOURCE_EXHAUSTED", "JaxRuntimeError: RESOURCE_EXHAUSTED")
"""How the errors of PyTorch's and JAX's allocators begin."""


def commit() -> tuple[str, bool]:
    """The commit of this code, and whether the files that are measured differ from it; else ("unknown", True).

    PMF_COMMIT, the output of `git describe --always --abbrev=40 --dirty`, stands in for the repository on a machine
    that has only the files.
    """
    if given := os.environ.get("PMF_COMMIT"):
        return given.removesuffix("-dirty"), given.endswith("-dirty")
    git = partial(subprocess.run, cwd=ROOT, capture_output=True, text=True, check=True)
    try:
        head = git(["git", "rev-parse", "HEAD"]).stdout.strip()
        return head, git(["git", "status", "--porcelain", "--", *MEASURED, ":!benchmarks/results"]).stdout != ""
    except (OSError, subprocess.CalledProcessError):
        return "unknown", True


def digest(*folders: str) -> str:
    """A hash of the Python files in these folders: trees that agree in it measure, or test, the same."""
    found = hashlib.sha256()
    for folder in folders:
        for file in sorted((ROOT / folder).rglob("*.py")):
            if folder != "benchmarks" or file.name not in UNMEASURED:
                found.update(str(file.relative_to(ROOT)).encode() + b"\0" + file.read_bytes() + b"\0")
    return found.hexdigest()[:16]


def provenance(device: torch.device) -> Record:
    """Where and with what a figure is measured: machine, commit, dirty flag, hash of the sources, versions, and the
    backend of attention's value where none is named.
    """
    head, dirty = commit()
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "commit": head,
        "dirty": dirty,
        "sources": digest(*MEASURED),
        "torch": torch.__version__,
        "triton": next((found.version for found in metadata.distributions(name="triton")), "absent"),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "attention": attention_backend(device, torch.bfloat16, 64)[0],
    }


def records_of(file: Path) -> Iterator[Record]:
    """The records of a file, in order; none where there is no such file. A line that was cut off is left out."""
    for line in file.read_text().splitlines() if file.is_file() else ():
        with contextlib.suppress(ValueError):
            if {"case", "status"} <= (record := json.loads(line)).keys():
                yield record


def key(record: Record) -> Key:
    """What a record is about."""
    return record["case"], record["provider"], record.get("batch")


def out_of_memory(record: Record) -> bool:
    """Whether that is why there is no figure."""
    return str(record.get("error", "")).startswith(OUT_OF_MEMORY)


class Ledger:
    """What is known of this very code on this machine, from earlier runs and from this one."""

    def __init__(self, origin: Record, directory: Path | None = None) -> None:
        """`origin`: provenance and ceilings of this run. `directory`: where the file lies; None: nothing is written."""
        self.origin = origin
        name = f"{str(origin['gpu']).lower().replace(' ', '-').removeprefix('nvidia-')}.jsonl"
        self.file = None if directory is None else directory / name
        same = ("gpu", "sources", "torch", "triton")
        every = records_of(self.file) if self.file is not None else ()
        self.earlier = [r for r in every if all(r.get(name) == origin[name] for name in same)]
        self.records: list[Record] = []

    def settled(self) -> set[Key]:
        """What another try gains nothing on: it was measured, or the memory is too small."""
        return {key(r) for r in (*self.earlier, *self.records) if r["status"] == "measured" or out_of_memory(r)}

    def tried(self) -> set[Key]:
        """What failed in an earlier run, and may not again."""
        return {key(r) for r in self.earlier if r["status"] == "failed"} - self.settled()

    def add(self, record: Record) -> None:
        """Keep a record, and write it at once: an interrupted run loses nothing. Its `table` becomes a file of its own.

        What is skipped is not written where more is known already.
        """
        table = record.pop("table", None)
        self.records.append(record)
        if self.file is None or (record["status"] == "skipped" and key(record) in {key(r) for r in self.earlier}):
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with open(self.file, "a") as ledger:
            ledger.write(json.dumps({**self.origin, **record}) + "\n")
        if table is not None:
            name = re.sub(r"[^A-Za-z0-9]+", "-", f"{record['case']} {record['provider']}")
            profile = self.file.with_name(f"{self.file.stem}-profile-{name}.txt")
            profile.write_text(f"{record['case']}, {record['provider']}: median {record['median_us']:.0f} us\n{table}")
