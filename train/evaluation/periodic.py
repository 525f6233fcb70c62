"""Evaluations during training: every `eval_every` steps, measure the run's weights as `pmf eval` does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pmf
from pmf.errors import InputError, require
from pmf.sharded import whole
from pmf.train.config import RunConfig
from pmf.train.distributed import World
from pmf.train.evaluation.measurement import Measurement, demo_score, image_count, measure
from pmf.train.evaluation.results import Results, digest, network_digest
from pmf.train.evaluation.spaces import SpacesMeasurement
from pmf.train.run_directory import EVALUATION_FOLDER
from pmf.train.stop_signals import never, stop_together

SEED = 0  # of the first image, as in `pmf eval`
REPORTED = ("fid", "inception_score", "precision", "recall", "frechet_distance", "accuracy")
"""The numbers that go into metrics.jsonl."""


class PeriodicEvaluation:
    """Measures the weights that `config.evaluation` names, sampled in one step with the run's guidance.

    With statistics of several feature spaces, in each: a post-training is to be watched where it is not trained.
    All weights are loaded, in place, into one network with one sampler. Each result is a line of eval/results.jsonl
    with a key for what was measured, so nothing is measured twice; unfinished features are kept beside it. The random
    state is left unchanged.
    Errors: `InputError` on an unusable reference, extractor or network.
    """

    def __init__(self, config: RunConfig, world: World, directory: Path) -> None:
        self.config, self.world, self.directory, self.settings = config, world, directory, config.evaluation
        self.sampling = {"steps": 1, **asdict(config.sampling)}
        self.results = Results(directory / EVALUATION_FOLDER)
        demo = self.settings.reference is None
        self.dtype = torch.float32 if demo else config.dtype_on(world.device, self.settings.precision)
        self.spaces: SpacesMeasurement | None = None
        self.measurements: list[Measurement] = []
        with _random_state_kept(world.device), self._named_as_options():
            if not demo:  # refuse an unusable reference before networks are made
                count = image_count(self.settings, config.model, "model.in_channels")
                self._open_reference(directory / EVALUATION_FOLDER)
            self.network = pmf.create_model(
                config.model, impl=config.impl, aux_head=False, device=world.device, dtype=self.dtype
            )
            if demo:
                self.score = demo_score(config.model, config.data, world)
            else:
                self.sampler = pmf.Sampler(self.network, min(self.settings.batch_size, count), **self.sampling)

    def due(self, step: int) -> bool:
        """Whether the weights after this step are to be measured."""
        return step > 0 and (step % self.config.eval_every == 0 or step == self.config.steps)

    def prepare(self, stopping: Callable[[], bool] = never) -> None:
        """Compute the reference statistics if the reference is a folder of images. Every process must call.

        Errors: `Stopped`, as in `measure`.
        """
        with _random_state_kept(self.world.device), self._named_as_options():
            for measurement in self.measurements:
                measurement.check_size(self.config.model.image_size, stopping)
                count = image_count(self.settings, self.config.model, "model")
                measurement.warn(count, self.config.model.image_size)

    def measure(
        self, step: int, weights: Mapping[str, dict[str, Tensor]], stopping: Callable[[], bool] = never
    ) -> dict[str, float]:
        """Return the reported numbers of the chosen weights: {"fid/ema_500": ...}. Every process must call.

        In several spaces: {"frechet_distance/dinov2/ema_500": ...}, with held-out images also "fdr/dinov2/ema_500".

        Errors: `Stopped`, in every process, before the next batch once `stopping` holds in one. Nothing is lost: the
        same call later continues with the next features.
        """
        found: dict[str, float] = {}
        with _random_state_kept(self.world.device):
            for name in self.settings.weights or (self.config.sampling_weights,):
                stop_together(self.world, stopping)
                tensors = whole(weights[name], keep=self.world.main or bool(self.measurements))
                self.network.load_state_dict(tensors, strict=False)  # it has no v head
                lines = self._lines({"source": str(self.directory), "weights": name, "step": step}, stopping)
                self.world.main_first(partial(self._record, lines))
                found |= {f"{key}/{name}": value for key, value in self._numbers(lines).items()}
        return found

    def _numbers(self, lines: list[dict[str, Any]]) -> dict[str, float]:
        """What is reported of the results, by metric, or by metric and space."""
        found: dict[str, float] = {}
        for line in lines:
            space = f"/{line['network']}" if "network" in line else ""
            found |= {f"{key}{space}": line[key] for key in REPORTED if line.get(key) is not None}
        ratios = self.spaces.fdr(lines) if self.spaces is not None else {}
        return found | {f"fdr/{space}": ratio for space, ratio in ratios.items()}

    @contextmanager
    def _named_as_options(self) -> Iterator[None]:
        """Let errors name options as a training's command line does: a post-training has a reference of its own too."""
        try:
            yield
        except InputError as error:
            if str(error).partition(":")[0] in {field.name for field in fields(self.settings)}:
                raise InputError(f"evaluation.{error}") from error
            raise

    def _open_reference(self, out: Path) -> None:
        assert self.settings.reference is not None
        if self.world.main_first(lambda: self.settings.of_spaces):
            self.spaces = SpacesMeasurement(self.settings, out, self.world)
            self.measurements = list(self.spaces)
        else:
            for name in ("networks", "held_out"):  # a resumed run may have stored them, with another reference
                given = self.settings.reference.exists() and getattr(self.settings, name)
                require(not given, f"evaluation.{name}: expected none with a reference of one space, got {given}")
            self.measurements = [Measurement(self.settings, out, self.world)]
        for measurement in self.measurements:
            if measurement.known:
                measurement.check_size(self.config.model.image_size)

    def _lines(self, head: dict[str, Any], stopping: Callable[[], bool]) -> list[dict[str, Any]]:
        """The results for the weights that the network holds."""
        if not self.measurements:
            return [self.world.main_first(lambda: self._demo_line(head | self.sampling))]
        dtype = str(self.dtype).removeprefix("torch.")
        return measure(
            self.measurements,
            self.network,
            lambda labels, seeds: self.sampler(labels, seeds=seeds),
            head,
            self.sampling,
            seed=SEED,
            dtype=dtype,
            stopping=stopping,
        )

    def _demo_line(self, head: dict[str, Any]) -> dict[str, Any]:
        """The result for digits and photographs, in the main process only."""
        key = digest(network_digest(self.network), self.sampling, SEED)
        line = self.results.find(key)
        if line is None:
            line = {**head, **self.score(self.network, seed=SEED, **self.sampling), "key": key}
            self.results.append(line)
        return line | head

    def _record(self, lines: list[dict[str, Any]]) -> None:
        """Add a line for these weights and step if a result was found under those of equal weights."""
        for line in lines:
            if self.results.find(line["key"], weights=line["weights"], step=line["step"]) is None:
                self.results.append(line)


@contextmanager
def _random_state_kept(device: torch.device) -> Iterator[None]:
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield
