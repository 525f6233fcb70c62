"""What a run is worth while it trains: every `eval_every` steps its weights are measured, as `pmf eval` would."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

import pmf
from pmf.errors import require
from pmf.metrics import Resize, inception
from pmf.train.config import RunConfig
from pmf.train.distributed import World, whole
from pmf.train.evaluate import own_measure
from pmf.train.features import Extractor, digest, present_ranks, weights_digest
from pmf.train.images import to_bytes
from pmf.train.measurement import Measurement, Results, check_count

FOLDER = "eval"
SEED = 0  # of the first image, as in `pmf eval`
REPORTED = ("fid", "inception_score", "precision", "recall", "frechet_distance", "accuracy")


class Examiner:
    """Measures the weights that `config.evaluation` names, sampled as the run says, in one step.

    One network, and one sampler on it, serve all weights: they are loaded in place. Every result is a line of
    eval/results.jsonl, known by what was measured, so that nothing is measured twice; what is unfinished waits
    there too. The random state is left as it was found. `dtype` is the network's.
    Errors: `InputError` on a reference, an extractor or a network with which nothing can be measured.
    """

    def __init__(self, config: RunConfig, world: World, directory: Path, dtype: torch.dtype) -> None:
        self.config, self.world, self.directory, self.settings = config, world, directory, config.evaluation
        self.sampling = {"steps": 1, **asdict(config.sampling)}
        self.dtype = torch.float32 if self.settings.reference is None else dtype
        with _random_state_kept(world.device):
            options = dict(impl=config.impl, aux_head=False, device=world.device, dtype=self.dtype)
            self.network = pmf.create_model(config.model, **options)
            if self.settings.reference is None:
                self.measurement, self.own = None, own_measure(config.model)
            else:
                self.measurement = self._measurement(self.settings.reference)
                self.sampler = pmf.Sampler(self.network, self.settings.batch_size, **self.sampling)

    def _measurement(self, reference: Path) -> Measurement:
        settings, model, device = self.settings, self.config.model, self.world.device
        check_count(settings.per_class * model.num_classes)
        channels = model.in_channels
        require(channels in (1, 3), f"model.in_channels: expected 1 or 3, to measure images, got {channels}")

        def extractor_of(resize: Resize) -> Extractor:
            return inception(settings.inception, resize=resize, device=device)

        options = dict(resize=settings.resize, batch_size=settings.batch_size, chunk=settings.chunk)
        return Measurement(reference, extractor_of, self.directory / FOLDER, present_ranks(), device, **options)

    def due(self, step: int) -> bool:
        """Whether the weights after this step are to be measured."""
        return step > 0 and (step % self.config.eval_every == 0 or step == self.config.steps)

    def prepare(self) -> None:
        """Compute the statistics of a reference that is a folder of images. Every process must call."""
        if self.measurement is not None:
            with _random_state_kept(self.world.device):
                self.measurement.reference()

    def measure(self, step: int, weights: Mapping[str, dict[str, Tensor]]) -> dict[str, float]:
        """What of these weights is to be measured: {"fid/ema_500": ...}. Every process must call."""
        found = {}
        with _random_state_kept(self.world.device):
            for name in self.settings.weights or (self.config.sampling_weights,):
                tensors = whole(weights[name], keep=self.world.main or self.measurement is not None)
                head = {"source": str(self.directory), "weights": name, "step": step, **self.sampling}
                line = self._measured(head, tensors)
                self.world.main_first(lambda head=head, line=line: self._named(head, line))
                found |= {f"{metric}/{name}": line[metric] for metric in REPORTED if line.get(metric) is not None}
        return found

    def _measured(self, head: dict, tensors: dict[str, Tensor]) -> dict:
        if self.measurement is None:
            return self.world.main_first(lambda: self._measured_alone(head, tensors))
        per_class, dtype = self.settings.per_class, str(self.dtype).removeprefix("torch.")
        key = self.measurement.key(self._load(tensors), self.sampling, per_class, SEED, dtype)
        count = per_class * self.config.model.num_classes
        head |= {"images": count, "seed": SEED, "dtype": dtype}
        return self.measurement.measure(key, count, self._images, head)

    def _measured_alone(self, head: dict, tensors: dict[str, Tensor]) -> dict:
        """Digits and photographs, by numbers of their own."""
        results = Results(self.directory / FOLDER)
        key = digest(self._load(tensors), self.sampling, SEED)
        line = results.find(key)
        if line is None:
            line = {**head, **self.own(self.network, seed=SEED, **self.sampling), "key": key}
            results.append(line)
        return line

    def _named(self, head: dict, line: dict) -> None:
        """Weights that equal others, as averages do at first, have their numbers, and a line of their own."""
        results = Results(self.directory / FOLDER)
        if results.find(line["key"], weights=head["weights"], step=head["step"]) is None:
            results.append({**line, **head})

    def _load(self, tensors: dict[str, Tensor]) -> str:
        """Let the network have these weights; a name for it."""
        self.network.load_state_dict(tensors, strict=False)  # the v head stays behind
        return digest(asdict(self.network.config), weights_digest(self.network))

    def _images(self, batch: range) -> Iterator[Tensor]:
        """Image i shows class i // per_class and has seed i."""
        images = self.sampler([i // self.settings.per_class for i in batch], seeds=[SEED + i for i in batch])
        yield to_bytes(images).expand(-1, 3, -1, -1)


@contextmanager
def _random_state_kept(device: torch.device) -> Iterator[None]:
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield
