"""What people look at while a run trains: the weights for sampling, one-step samples, the loss curve."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path

from torch import Tensor

import pmf
from pmf.sharded import whole
from pmf.train.config import RunConfig
from pmf.train.distributed import World
from pmf.train.images import save_grid, save_loss_curve
from pmf.train.run_directory import CURVE_FILE, SAMPLES_FILE
from pmf.weights import save_model

PICTURE_ROWS = 8


class Exporter:
    """Writes into the directory of a run. Samples are drawn by `network` if given, else by a new one."""

    def __init__(self, config: RunConfig, world: World, directory: Path, network: pmf.PMFDiT | None) -> None:
        self.config, self.world, self.directory, self.network = config, world, directory, network

    def export(self, step: int, weights: Mapping[str, dict[str, Tensor]], metrics: list[dict]) -> None:
        """All weights by name, samples of at most ten classes, the curve of all metrics. Every process must call."""
        for name, tensors in weights.items():
            gathered = whole(tensors, keep=self.world.main)
            self.world.main_first(partial(self._weights, step, name, gathered))
        self.world.main_first(partial(self._curve, metrics))

    def _weights(self, step: int, name: str, tensors: dict[str, Tensor]) -> None:
        save_model(self.directory / f"{name}.safetensors", self.config.model, tensors, step=step)
        if name == self.config.sampling_weights:
            self._samples(tensors)

    def _samples(self, tensors: dict[str, Tensor]) -> None:
        config = self.config
        network = self.network or pmf.create_model(
            config.model, impl=config.impl, aux_head=False, device=self.world.device
        )
        network.load_state_dict(tensors, strict=False)  # the sampling network has no v head
        columns = min(10, config.model.num_classes)
        images = pmf.generate(network, list(range(columns)) * PICTURE_ROWS, **asdict(config.sampling))
        save_grid(self.directory / SAMPLES_FILE, images, columns=columns)

    def _curve(self, metrics: list[dict]) -> None:
        kept = [record for record in metrics if record.get("loss") is not None]
        if kept:  # none where every step was skipped, or metrics.jsonl is lost
            terms = {name: [record[name] for record in kept] for name in ("loss_u", "loss_v")}
            save_loss_curve(self.directory / CURVE_FILE, [record["step"] for record in kept], terms)
