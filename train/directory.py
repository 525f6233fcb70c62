"""A run's directory: what is in it, whose it is, and the metrics so far."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

from pmf.atomic_files import write_atomically
from pmf.errors import InputError, require
from pmf.train.checkpoints import FOLDER
from pmf.train.config import CONFIG_FILE, RunConfig, load_run_config, to_json

METRICS_FILE = "metrics.jsonl"
SAMPLES_FILE = "samples.png"
CURVE_FILE = "loss.png"


def clear(directory: Path, overwrite: bool) -> None:
    """Make room for a new run: in an empty or new directory; or where a run may go, since it is to be
    overwritten or has saved nothing yet.

    Errors: `InputError` otherwise; nothing that is no part of a run is ever removed.
    """
    if not directory.is_dir():
        return
    for torn in directory.glob(f".{CONFIG_FILE}.*"):  # killed while a run stored its configuration
        torn.unlink()
    if not any(directory.iterdir()):
        return
    require(_is_run(directory), f"out: {directory} is not empty and holds no run, expected another --out")
    saved = any((directory / FOLDER).glob("step-*"))
    require(
        overwrite or not saved,
        f"out: {directory} already holds a run, expected --resume {directory}, --overwrite or another --out",
    )
    for path in _run_files(directory):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def write_config(directory: Path, config: RunConfig) -> None:
    """Store the configuration."""
    write_atomically(directory / CONFIG_FILE, lambda temporary: temporary.write_text(to_json(config)))


def metrics_until(directory: Path, step: int) -> list[dict]:
    """The metrics up to this step; those of steps that were not saved are dropped from the file."""
    file = directory / METRICS_FILE
    lines = file.read_text().splitlines() if file.exists() else []
    kept = list(itertools.takewhile(lambda r: r.get("step", step + 1) <= step, map(_record, lines)))
    text = "".join(json.dumps(record) + "\n" for record in kept)
    write_atomically(file, lambda temporary: temporary.write_text(text))
    return kept


def _record(line: str) -> dict:
    """A line of the metrics; {} where it is torn."""
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return {}


def _is_run(directory: Path) -> bool:
    try:
        load_run_config(directory)
        return True
    except InputError:
        return False


def _run_files(directory: Path) -> list[Path]:
    """What a run writes, but for its configuration: by that a directory is known, until the next one replaces it."""
    names = (METRICS_FILE, SAMPLES_FILE, CURVE_FILE, "model.safetensors")
    patterns = (
        *names,
        FOLDER,
        "ema_*.safetensors",
        "eval/results.jsonl",
        "eval/.*",
        "tensorboard/events.*",
        *(f".{name}.*" for name in names),
        ".ema_*",
    )
    return [path for pattern in patterns for path in directory.glob(pattern)]
