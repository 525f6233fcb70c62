"""The ledger of figures: one JSON line per measurement in `benchmarks/results/<gpu>.jsonl`.

A line holds suite, size, batch, case, provider, status (measured, failed or skipped; passed for tests), error, the
figures, and their provenance.
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

from pmf.atomic_files import write_atomically
from pmf.dispatch import attention_backend
from pmf.timing import Record

Key = tuple[str, str | None, int | None]
"""Case, provider and batch."""
ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
MEASURED = ("pmf", "kernels", "benchmarks")
"""The folders whose code affects a figure."""
UNMEASURED = {"__main__.py", "figures.py", "plan.py"}
"""Files of the benchmarks that only choose or show figures."""
OUT_OF_MEMORY = ("OutOfMemoryError", "XlaRuntimeError: RESOURCE_EXHAUSTED", "JaxRuntimeError: RESOURCE_EXHAUSTED")
"""How the errors of PyTorch's and JAX's allocators begin."""


def commit() -> tuple[str, bool]:
    """The commit, and whether the measured files differ from it; ("unknown", True) outside a repository.

    On a machine without the repository, set PMF_COMMIT to the output of `git describe --always --abbrev=40 --dirty`.
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
    """Hash the Python files of these folders, to tell whether two trees measure, or test, the same code."""
    found = hashlib.sha256()
    for folder in folders:
        for file in sorted((ROOT / folder).rglob("*.py")):
            if folder != "benchmarks" or file.name not in UNMEASURED:
                found.update(str(file.relative_to(ROOT)).encode() + b"\0" + file.read_bytes() + b"\0")
    return found.hexdigest()[:16]


def provenance(device: torch.device) -> Record:
    """Machine, commit, dirty flag, hash of the sources, versions, and the default backend of attention's value."""
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
    """The records of a file, in order; none if the file does not exist. A truncated line is skipped."""
    for line in file.read_text().splitlines() if file.is_file() else ():
        with contextlib.suppress(ValueError):
            if {"case", "status"} <= (record := json.loads(line)).keys():
                yield record


def key(record: Record) -> Key:
    """The key of a record."""
    return record["case"], record["provider"], record.get("batch")


def out_of_memory(record: Record) -> bool:
    """Whether a record failed for want of memory."""
    return str(record.get("error", "")).startswith(OUT_OF_MEMORY)


class Ledger:
    """The records of the same code on the same machine, from earlier runs and from this one."""

    def __init__(self, origin: Record, directory: Path | None = None) -> None:
        """`origin`: provenance and ceilings of this run. `directory`: the file's folder; None writes nothing."""
        self.origin = origin
        name = f"{str(origin['gpu']).lower().replace(' ', '-').removeprefix('nvidia-')}.jsonl"
        self.file = None if directory is None else directory / name
        same = ("gpu", "sources", "torch", "triton")
        every = records_of(self.file) if self.file is not None else ()
        self.earlier = [r for r in every if all(r.get(name) == origin[name] for name in same)]
        self.records: list[Record] = []

    def settled(self) -> set[Key]:
        """Keys that need no other try: measured, or out of memory."""
        return {key(r) for r in (*self.earlier, *self.records) if r["status"] == "measured" or out_of_memory(r)}

    def tried(self) -> set[Key]:
        """Keys that failed in an earlier run and are worth another try."""
        return {key(r) for r in self.earlier if r["status"] == "failed"} - self.settled()

    def add(self, record: Record) -> None:
        """Keep a record and write it at once, so that an interrupted run loses nothing; `table` gets its own file.

        A skipped record is not written if the file already holds one with its key.
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
            text = f"{record['case']}, {record['provider']}: median {record['median_us']:.0f} us\n{table}"
            write_atomically(profile, lambda temporary: temporary.write_text(text))
