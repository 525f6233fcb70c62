"""A run's directory: its files, configuration and metrics."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pmf.atomic_files import torn_files, write_atomically
from pmf.data import TrainingData
from pmf.errors import InputError, require
from pmf.train.config import CONFIG_FILE, RunConfig, load_run_config, to_json
from pmf.train.directory_lock import LOCK_FILE
from pmf.train.snapshots import FOLDER, remove, steps_in

log = logging.getLogger(__name__)
METRICS_FILE = "metrics.jsonl"
DATA_FILE = "data.json"
SAMPLES_FILE = "samples.png"
CURVE_FILE = "loss.png"
EVALUATION_FOLDER = "eval"
FILES = METRICS_FILE, DATA_FILE, SAMPLES_FILE, CURVE_FILE, "model.safetensors", "ema_*.safetensors"
"""What a run writes beside its configuration, checkpoints and evaluations."""


def make_room(directory: Path, overwrite: bool) -> None:
    """Clear a directory for a new run; only files of a run are ever removed.

    It may be missing or empty, or hold a run without checkpoints or, with `overwrite`, any run. Errors: `InputError`
    otherwise.
    """
    if not directory.is_dir():
        return
    for torn in torn_files(directory, CONFIG_FILE):  # left by a run killed while it stored its configuration
        torn.unlink()
    if not any(entry.name != LOCK_FILE for entry in directory.iterdir()):
        return
    require(_is_run(directory), f"out: {directory} is not empty and holds no run, expected another --out")
    saved = bool(steps_in(directory / FOLDER))
    require(
        overwrite or not saved,
        f"out: {directory} already holds a run, expected --resume {directory}, --overwrite or another --out",
    )
    for path in _run_files(directory):
        remove(path)


def written(directory: Path) -> list[str]:
    """What there is to look at in a run's directory."""
    return [name for name in (SAMPLES_FILE, CURVE_FILE, METRICS_FILE) if (directory / name).exists()]


def is_there(directory: Path) -> bool:
    """Whether a run has begun in a directory, and it has not been removed or renamed since."""
    return (directory / CONFIG_FILE).is_file()


def write_config(directory: Path, config: RunConfig) -> None:
    """Store the configuration."""
    write_atomically(directory / CONFIG_FILE, lambda temporary: temporary.write_text(to_json(config)))


def write_data_identity(directory: Path, spec: str, data: TrainingData) -> None:
    """Store what identifies a run's data."""
    text = json.dumps(_identity(spec, data)) + "\n"
    write_atomically(directory / DATA_FILE, lambda temporary: temporary.write_text(text))


def check_data_identity(directory: Path, spec: str, data: TrainingData) -> None:
    """Raise `InputError` if a run's data has changed under the same name. Other data may be chosen by name.

    Where the run's directory no longer tells what its data was, that is a warning.
    """
    now, before = _identity(spec, data), next(json_lines(directory / DATA_FILE), {})
    if "data" not in before:
        lost = "resume: %s is missing or damaged, so it is not checked that %s holds the same pictures as before"
        log.warning(lost, directory / DATA_FILE, spec)
    if before.get("data") == spec:
        known = {name: value for name, value in now.items() if value is not None and before.get(name) is not None}
        changed = [name for name, value in known.items() if value != before[name]]
        told = ", ".join(f"{name} {before[name]} then, {now[name]} now" for name in changed)
        require(
            not changed,
            f"data: {spec} is not what {directory} was trained on ({told}): expected the same pictures; to go on with "
            "others, give their directory another name and choose it by --data",
        )


def _identity(spec: str, data: TrainingData) -> dict[str, Any]:
    """The number of images and classes of the data, and its fingerprint if it has one."""
    fingerprint = getattr(data, "fingerprint", None)
    return {"data": spec, "images": len(data), "classes": data.num_classes, "fingerprint": fingerprint}


def metrics(directory: Path) -> Iterator[dict[str, Any]]:
    """The records of a run's steps and evaluations, in order."""
    return (record for record in json_lines(directory / METRICS_FILE) if isinstance(record.get("step"), int))


def keep_metrics_until(directory: Path, step: int) -> dict[str, Any] | None:
    """Remove the metrics of steps after `step`, which were not saved, from the file; return the last one kept."""
    last = None

    def copy(temporary: Path) -> None:
        nonlocal last
        with open(temporary, "w") as file:
            for last in (record for record in metrics(directory) if record["step"] <= step):
                file.write(json.dumps(last) + "\n")

    write_atomically(directory / METRICS_FILE, copy)
    return last


def json_lines(file: Path) -> Iterator[dict[str, Any]]:
    """The objects in a file of JSON lines, none if it does not exist; other lines, such as torn ones, are skipped."""
    if not file.is_file():
        return
    with open(file, "rb") as lines:
        for line in lines:
            record = None
            with contextlib.suppress(ValueError, RecursionError):  # not JSON, not UTF-8
                record = json.loads(line)
            if isinstance(record, dict):
                yield record


def _is_run(directory: Path) -> bool:
    try:
        load_run_config(directory)
        return True
    except InputError:
        return False


def _run_files(directory: Path) -> list[Path]:
    """The files a run writes, except config.json: it marks the directory as a run's until the next run replaces it."""
    patterns = [FOLDER, "tensorboard/events.*", f"{EVALUATION_FOLDER}/results.jsonl", f"{EVALUATION_FOLDER}/.*", *FILES]
    return [*_left(directory), *(path for pattern in patterns for path in directory.glob(pattern))]


def _left(directory: Path) -> list[Path]:
    """Temporary files of processes that were killed while they wrote to a run's directory."""
    return [path for name in (CONFIG_FILE, *FILES) for path in torn_files(directory, name)]


def remove_left(directory: Path) -> None:
    """Remove temporary files of a run that was killed."""
    for path in _left(directory):
        path.unlink(missing_ok=True)
