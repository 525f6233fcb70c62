"""A run's exports: weights for sampling, a grid of one-step samples, the loss curve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import pmf
from pmf.atomic_files import write_atomically
from pmf.images import save_grid
from pmf.sharded import whole
from pmf.train.config import RunConfig
from pmf.train.distributed import World
from pmf.train.run_directory import CURVE_FILE, SAMPLES_FILE, metrics
from pmf.train.terminal import decoration

PICTURE_ROWS = 8


def export_weights(
    directory: Path,
    step: int,
    weights: Mapping[str, dict[str, Tensor]],
    config: RunConfig,
    world: World,
    network: pmf.PMFDiT | None,
) -> None:
    """Write each set of weights to a file of its name, and a grid of samples. Every process must call.

    `network` draws the samples (default: a new one).
    """
    for name, tensors in weights.items():
        gathered = whole(tensors, keep=world.main)
        file = directory / f"{name}.safetensors"
        world.main_first(partial(pmf.save_model, file, config.model, gathered, step=step, data=config.data))
        if name == config.sampling_weights:
            world.main_first(partial(_samples, directory / SAMPLES_FILE, gathered, config, world.device, network))


def _samples(
    file: Path, tensors: dict[str, Tensor], config: RunConfig, device: torch.device, network: pmf.PMFDiT | None
) -> None:
    """Write a grid of samples: a column for each of the first ten classes."""
    with decoration(SAMPLES_FILE):
        network = network or pmf.create_model(config.model, impl=config.impl, aux_head=False, device=device)
        network.load_state_dict(tensors, strict=False)  # the sampling network has no v head
        columns = min(10, config.model.num_classes)
        images = pmf.generate(network, list(range(columns)) * PICTURE_ROWS, **asdict(config.sampling))
        save_grid(file, images, columns=columns)


def export_curve(directory: Path, names: Sequence[str]) -> None:
    """Write the curves of these values in a run's metrics."""
    kept = [[record.get(name) for name in ("step", *names)] for record in metrics(directory)]
    kept = [values for values in kept if all(isinstance(value, (int, float)) for value in values)]
    if kept:  # none if every step was skipped or metrics.jsonl is lost
        steps, *values = map(list, zip(*kept, strict=True))
        save_loss_curve(directory / CURVE_FILE, steps, dict(zip(names, values, strict=True)))


def save_loss_curve(path: str | Path, steps: list[int], terms: dict[str, list[float]]) -> None:
    """Write a PNG with one panel per reported term, over steps: the values and their running mean."""
    from matplotlib.figure import Figure  # takes a second to import, and only this function needs it

    figure = Figure(figsize=(4.5 * len(terms), 3.2), layout="constrained")
    for axis, (name, values) in zip(np.atleast_1d(figure.subplots(1, len(terms))), terms.items(), strict=True):
        width = max(1, len(values) // 20)
        kernel = np.ones(width) / width
        axis.plot(steps, values, color="0.8", linewidth=0.6, label="step")
        axis.plot(steps[width - 1 :], np.convolve(values, kernel, "valid"), label=f"mean of {width}")
        axis.set(xlabel="step", title=name, yscale="log")
        axis.legend(frameon=False)
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))
