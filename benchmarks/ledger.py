"""The ledger of figures: one JSON line per measurement in `benchmarks/results/<gpu>.jsonl`."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path

import torch

from pmf.dispatch import attention_backend

Record = dict
ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
MEASURED = ("pmf", "kernels", "benchmarks")
"""The folders whose code a figure depends on."""
SHOWN_BY = {"report.py", "plots.py", "cli.py", "order.py", "__main__.py"}
"""Of the benchmarks, what only chooses and shows figures."""
OUT_OF_MEMORY = ("OutOfMemoryError", "XlaRuntimeError: RESOURCE_EXHAUSTED", "JaxRuntimeError: RESOURCE_EXHAUSTED")
"""How the errors of PyTorch's and JAX's allocators begin."""


def _git(*arguments: str) -> str | None:
    """What git says; None where there is no git, or no repository."""
    try:
        result = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
    except OSError:
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def commit() -> tuple[str, bool]:
    """The commit of this code, and whether the files that are measured differ from it.

    PMF_COMMIT, the output of `git describe --always --abbrev=40 --dirty`, stands in for a repository: for a machine
    that has only the files. Without either: ("unknown", True).
    """
    if given := os.environ.get("PMF_COMMIT"):
        return given.removesuffix("-dirty"), given.endswith("-dirty")
    changes = _git("status", "--porcelain", "--", *MEASURED, ":!benchmarks/results")
    return _git("rev-parse", "HEAD") or "unknown", changes != ""


def digest(*folders: str) -> str:
    """A hash of the Python files in these folders: two trees that agree in it measure, or test, the same."""
    found = hashlib.sha256()
    for folder in folders:
        for file in sorted((ROOT / folder).rglob("*.py")):
            if folder != "benchmarks" or file.name not in SHOWN_BY:
                found.update(str(file.relative_to(ROOT)).encode() + b"\0" + file.read_bytes() + b"\0")
    return found.hexdigest()[:16]


def provenance(device: torch.device) -> Record:
    """Where and with what a figure was measured: machine, commit, dirty flag, hash of the sources, versions, and the
    backend of attention's value where none is named.
    """
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "absent"
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    head, dirty = commit()
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "gpu": gpu,
        "commit": head,
        "dirty": dirty,
        "sources": digest(*MEASURED),
        "torch": torch.__version__,
        "triton": triton_version,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "attention": attention_backend(device, torch.bfloat16, 64)[0],
    }


def ledger_file(gpu: object, directory: Path = RESULTS) -> Path:
    """The ledger of a GPU."""
    return directory / f"{str(gpu).lower().replace(' ', '-').removeprefix('nvidia-')}.jsonl"


def append(record: Record, directory: Path = RESULTS) -> Path:
    """Add one line to the ledger of the GPU that the record names, at once: an interrupted run keeps it."""
    file = ledger_file(record["gpu"], directory)
    directory.mkdir(parents=True, exist_ok=True)
    with open(file, "a") as ledger:
        ledger.write(json.dumps(record) + "\n")
    return file


def records_of(file: Path) -> Iterator[Record]:
    """The records of a ledger, in order; none where there is no such file. A line that was cut off is left out."""
    for line in file.read_text().splitlines() if file.is_file() else ():
        try:
            yield json.loads(line)
        except ValueError:
            continue


Key = tuple[str, str | None, int | None, int | None]


def key(record: Record) -> Key:
    """What a record is about: case, provider, batch, and the memory budget of a largest batch."""
    return record["case"], record["provider"], record.get("batch"), record.get("budget_gb")


class Earlier:
    """What a ledger holds of this very code on this card: measured in an earlier part, it is not measured again."""

    def __init__(self, file: Path | None = None, origin: Record | None = None) -> None:
        same = ("gpu", "sources", "torch", "triton")
        every = records_of(file) if file is not None and origin is not None else ()
        self.records = [r for r in every if all(r.get(name) == origin[name] for name in same)]
        self.known = {key(r) for r in self.records}
        self.held = {key(r) for r in self.records if _settled(r)}
        self.tried = {key(r) for r in self.records if r["status"] == "failed"} - self.held

    def verdicts(self, tests: str) -> dict[str, str | None]:
        """Test file -> why it is not green, or None, as found with these tests (their `digest`)."""
        found = [r for r in self.records if r["suite"] == "tests" and r["tests"] == tests and _settled(r)]
        return {r["case"]: r["error"] for r in found}


def _settled(record: Record) -> bool:
    """Nothing is gained by trying again: a figure, a memory too small, a verdict of tests that came to an end."""
    full = str(record.get("error", "")).startswith(OUT_OF_MEMORY)
    return record["status"] == "measured" or full or (record["suite"] == "tests" and record["finished"])
