"""What people look at while a run trains: the weights for sampling, one-step samples, the loss curve."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

import pmf
from pmf.train import directory as folder
from pmf.train.config import RunConfig
from pmf.train.distributed import World, whole
from pmf.train.images import save_grid, save_loss_curve
from pmf.weights import save_model

PICTURE_ROWS = 8


class Exporter:
    """Writes into the directory of a run. Samples are drawn by `network`, where there is one to share already."""

    def __init__(self, config: RunConfig, world: World, directory: Path, network: pmf.PMFDiT | None) -> None:
        self.config, self.world, self.directory, self.network = config, world, directory, network

    def export(self, step: int, weights: Mapping[str, dict[str, Tensor]], metrics: list[dict]) -> None:
        """All weights by name, samples of at most ten classes, the curve of all metrics. Every process must call."""
        for name, tensors in weights.items():
            gathered = whole(tensors, keep=self.world.main)
            self.world.main_first(lambda name=name, gathered=gathered: self._weights(step, name, gathered))
        self.world.main_first(lambda: self._curve(metrics))

    def _weights(self, step: int, name: str, tensors: dict[str, Tensor]) -> None:
        config = self.config
        save_model(self.directory / f"{name}.safetensors", config.model, tensors, step=step)
        if name == config.sampling_weights:
            network = self.network or pmf.create_model(
                config.model, impl=config.impl, aux_head=False, device=self.world.device
            )
            network.load_state_dict(tensors, strict=False)  # the v head stays behind
            columns = min(10, config.model.num_classes)
            images = draw(network, config, list(range(columns)) * PICTURE_ROWS)
            save_grid(self.directory / folder.SAMPLES_FILE, images, columns=columns)

    def _curve(self, metrics: list[dict]) -> None:
        kept = [record for record in metrics if record.get("loss") is not None]
        if not kept:  # every step was skipped, or the file is lost
            return
        terms = {name: [record[name] for record in kept] for name in ("loss_u", "loss_v")}
        save_loss_curve(self.directory / folder.CURVE_FILE, [record["step"] for record in kept], terms)


def draw(network: pmf.PMFDiT, config: RunConfig, labels: list[int]) -> Tensor:
    """One-step images of these classes, as the run is to be sampled."""
    sampling = config.sampling
    return pmf.generate(network, labels, omega=sampling.omega, t_min=sampling.t_min, t_max=sampling.t_max)
