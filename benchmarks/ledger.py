"""The ledger of figures: one JSON line per measurement in `benchmarks/results/<gpu>.jsonl`."""

from __future__ import annotations

import json
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def _git(*arguments: str) -> str:
    result = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
    return result.stdout.strip() if result.returncode == 0 else "unknown"


def provenance(device: torch.device) -> dict[str, object]:
    """Where and with what a figure was measured: machine, commit, dirty flag, versions."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "absent"
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "gpu": gpu,
        "commit": _git("rev-parse", "HEAD"),
        "dirty": _git("status", "--porcelain", "--", ".", ":!benchmarks/results") != "",
        "torch": torch.__version__,
        "triton": triton_version,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
    }


def append(record: dict[str, object], directory: Path = RESULTS) -> Path:
    """Add one line to the ledger of the GPU that the record names, at once: an interrupted run keeps it."""
    name = str(record["gpu"]).lower().replace(" ", "-").removeprefix("nvidia-")
    file = directory / f"{name}.jsonl"
    directory.mkdir(parents=True, exist_ok=True)
    with open(file, "a") as ledger:
        ledger.write(json.dumps(record) + "\n")
    return file
