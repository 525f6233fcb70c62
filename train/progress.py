"""Reports during training: metrics.jsonl, a progress bar, and TensorBoard if it is installed."""

from __future__ import annotations

import json
import math
from pathlib import Path

from tqdm import tqdm

from pmf.train.run_directory import METRICS_FILE


class Progress:
    """The main process's reports. `metrics` are the records of the first `done` steps; new ones are appended."""

    def __init__(self, directory: Path, metrics: list[dict], done: int, steps: int) -> None:
        self.metrics = metrics
        self.log = open(directory / METRICS_FILE, "a")  # noqa: SIM115 (closed on exit)
        self.bar = tqdm(total=steps, initial=done, desc="training", unit="step")
        self.writer = _tensorboard(directory, done)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        self.log.close()
        self.bar.close()
        if self.writer is not None:
            self.writer.close()

    def add(self, record: dict[str, float]) -> None:
        """Record a step."""
        self._write(record)
        shown = dict(loss_u=f"{record['loss_u']:.3f}", images_per_s=f"{record['images_per_second']:.0f}")
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update()

    def note(self, step: int, values: dict[str, float]) -> None:
        """Print values measured after a step, and record them unless they are the last record already."""
        record = {"step": step, **values}
        if _finite(record) not in self.metrics[-1:]:
            self._write(record)
        self.bar.write(f"step {step}: " + ", ".join(f"{name} {value:.4g}" for name, value in values.items()))

    def _write(self, record: dict[str, float]) -> None:
        """Append a line to the metrics, with null for values that are not finite."""
        finite = _finite(record)
        self.metrics.append(finite)
        self.log.write(json.dumps(finite) + "\n")
        self.log.flush()
        if self.writer is not None:
            for name, value in record.items():
                self.writer.add_scalar(name, value, record["step"])


def _finite(record: dict[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in record.items()}


def _tensorboard(directory: Path, done: int):
    """TensorBoard's writer, or None without it; it hides records of steps after `done`, which were not saved."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(directory / "tensorboard", purge_step=done + 1)
