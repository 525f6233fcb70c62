"""A run's directory: its files, configuration and metrics."""

from __future__ import annotations

import contextlib
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

from pmf.atomic_files import write_atomically
from pmf.errors import InputError, require
from pmf.train.config import CONFIG_FILE, RunConfig, load_run_config, to_json
from pmf.train.snapshots import FOLDER

METRICS_FILE = "metrics.jsonl"
SAMPLES_FILE = "samples.png"
CURVE_FILE = "loss.png"
EVALUATION_FOLDER = "eval"


def make_room(directory: Path, overwrite: bool) -> None:
    """Clear a directory for a new run; only files of a run are ever removed.

    It may be missing or empty, or hold a run without checkpoints or, with `overwrite`, any run. Errors: `InputError`
    otherwise.
    """
    if not directory.is_dir():
        return
    for torn in directory.glob(f".{CONFIG_FILE}.*"):  # left by a run killed while it stored its configuration
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
    """Return the metrics up to `step`; remove later ones, of steps that were not saved, from the file."""
    file = directory / METRICS_FILE
    kept = list(itertools.takewhile(lambda record: record["step"] <= step, read_json_lines(file)))
    text = "".join(json.dumps(record) + "\n" for record in kept)
    write_atomically(file, lambda temporary: temporary.write_text(text))
    return kept


def read_json_lines(file: Path) -> list[dict[str, Any]]:
    """Read the records of a file of JSON lines: none if it does not exist; lines torn by a crash are skipped."""
    records = []
    for line in file.read_text().splitlines() if file.is_file() else ():
        with contextlib.suppress(json.JSONDecodeError):
            records.append(json.loads(line))
    return records


def _is_run(directory: Path) -> bool:
    try:
        load_run_config(directory)
        return True
    except InputError:
        return False


def _run_files(directory: Path) -> list[Path]:
    """The files a run writes, except config.json: it marks the directory as a run's until the next run replaces it."""
    pictures = (SAMPLES_FILE, CURVE_FILE)
    patterns = [FOLDER, "tensorboard/events.*", f"{EVALUATION_FOLDER}/results.jsonl", f"{EVALUATION_FOLDER}/.*"]
    for name in (METRICS_FILE, *pictures, "model.safetensors", "ema_*.safetensors"):
        patterns += [name, f".{name}.*"]  # and temporary files of a killed run
    return [path for pattern in patterns for path in directory.glob(pattern)]
