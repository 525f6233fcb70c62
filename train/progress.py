"""Reports during training: metrics.jsonl, a progress bar, and TensorBoard if it is installed. None can stop a run."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

from tqdm import tqdm

from pmf.train.run_directory import METRICS_FILE
from pmf.train.terminal import decoration

log = logging.getLogger(__name__)


class Progress:
    """The main process's reports. `last` is the last record of the first `done` steps; new ones are appended.

    `shown` is the value of a step that the bar shows.

    Lines that cannot be written, on a full disk, are kept and written with later ones.
    """

    def __init__(self, directory: Path, last: dict[str, Any] | None, done: int, steps: int, shown: str) -> None:
        self.last, self.shown = last, shown
        self.file, self.unwritten, self.warned = directory / METRICS_FILE, b"", False
        self.bar = tqdm(total=steps, initial=done, desc="training", unit="step")
        self.writer = None
        with decoration("TensorBoard"):
            self.writer = _tensorboard(directory, done)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        self._append(b"")
        self.bar.close()
        if self.writer is not None:
            with decoration("TensorBoard"):
                self.writer.close()

    def add(self, record: dict[str, float]) -> None:
        """Record a step."""
        self._write(record)
        shown = {self.shown: f"{record[self.shown]:.3f}", "images_per_s": f"{record['images_per_second']:.0f}"}
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update()

    def note(self, step: int, values: dict[str, float]) -> None:
        """Print values measured after a step, and record them unless they are the last record already."""
        record = {"step": step, **values}
        if _finite(record) != self.last:
            self._write(record)
        self.bar.write(f"step {step}: " + ", ".join(f"{name} {value:.4g}" for name, value in values.items()))

    def _write(self, record: dict[str, float]) -> None:
        """Append a line to the metrics, with null for values that are not finite."""
        self.last = _finite(record)
        self._append(json.dumps(self.last).encode() + b"\n")
        writer, self.writer = self.writer, None
        if writer is not None:
            with decoration("TensorBoard"):
                for name, value in record.items():
                    writer.add_scalar(name, value, record["step"])
                self.writer = writer

    def _append(self, line: bytes) -> None:
        """Append what is unwritten and this line, all that the disk takes."""
        self.unwritten += line
        try:
            with open(self.file, "ab", buffering=0) as file:
                while self.unwritten:
                    self.unwritten = self.unwritten[file.write(self.unwritten) :]
        except OSError as error:
            if not self.warned:
                log.warning("%s cannot be written (%s): its lines are kept in memory", self.file, error.strerror)
            self.warned = True


def _finite(record: dict[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in record.items()}


def _tensorboard(directory: Path, done: int):
    """TensorBoard's writer, or None without it; it hides records of steps after `done`, which were not saved."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(directory / "tensorboard", purge_step=done + 1)
