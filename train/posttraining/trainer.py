"""The run of a post-training: a training run whose gradients are those of the Fréchet loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from pmf.data import TrainingData
from pmf.draws import step_seed
from pmf.errors import require
from pmf.feature_networks import FeatureNetwork
from pmf.frechet import FrechetLoss, MovingAverage, Population, Queue
from pmf.metrics import Statistics
from pmf.parallel import GeneratorModule, LossModule, synchronise_gradients
from pmf.post_training import FrechetStep, Latents
from pmf.train.config import PosttrainConfig
from pmf.train.distributed import World
from pmf.train.evaluation.results import digest
from pmf.train.loop import Batches, Trainer
from pmf.train.stop_signals import Stopped, StopRequest, stop_together

LARGEST_WINDOW = 1 / 20
"""Of a run, beyond which the population grows stale: it then describes a generator that is no more."""


class PosttrainTrainer(Trainer):
    """A post-training run.

    The latents of a step are functions of (seed, step), and the populations are part of the state, so it resumes as a
    training run does. `data` are real images for the anchor, else None.
    """

    config: PosttrainConfig

    def __init__(
        self,
        config: PosttrainConfig,
        world: World,
        networks: Mapping[str, FeatureNetwork],
        references: Mapping[str, Statistics],
        *,
        held_out: Mapping[str, float] | None = None,
        data: TrainingData | None = None,
    ) -> None:
        weights = dict(zip(networks, config.feature_weights, strict=False))
        self.frechet = FrechetLoss(references, _population_of(config), weights=weights).to(world.device)
        self.networks, self.held_out = networks, held_out or {}
        self.references = _digests(config, networks, references)
        self.curves = tuple(f"fd/{name}" for name in networks)
        super().__init__(config, data, world)
        self.frechet_step = FrechetStep(self._images, networks, self.frechet, label_weight=config.label_weight)
        self.entering: dict[str, Tensor] = {}
        """The features of the step that is being taken."""
        self.filling = False
        """Whether the populations are being filled: until they are full there is nothing to save."""
        if config.window > LARGEST_WINDOW * config.steps:
            text = f"{config.population}: a window of {config.window:.3g} steps is more than a twentieth of the run"
            world.warn(f"{text}, {config.steps} steps: the population grows stale")
        if config.optimizer.warmup_steps >= config.steps:
            text = f"all {config.steps} steps warm up, expected fewer than these"
            world.warn(f"optimizer.warmup_steps: {text}, got {config.optimizer.warmup_steps}")

    def _module(self) -> LossModule:
        return GeneratorModule(self.model, self.config.loss, self.config.sampling)

    def fix_bucket_order(self) -> None:
        """Run a dummy backward, see `Learner.fix_bucket_order`: of the pass that reduces gradients."""
        if self.config.anchor:
            super().fix_bucket_order()
        elif self.world.mesh is not None and self.world.replicated:
            latents = self._latents(0, 1, "dummy")
            self.wrapped(latents.noise, latents.labels).sum().backward()
            self.model.zero_grad()

    # Before the first step.

    def _prepare(self, stop: StopRequest) -> bool:
        """Fill the populations with images of the generator as it is; return whether that was stopped."""
        stop.told = False  # it would say that the run saves
        try:
            if self.step == 0:
                self._fill(stop)
        except Stopped:
            return True
        finally:
            stop.told = self.world.main
        return super()._prepare(stop)

    def _fill(self, stop: StopRequest) -> None:
        wanted = self.config.fill if self.config.population == "average" else self.config.queue
        rounds = -(-wanted // self.config.batch_size)
        filled = min(population.seen for population in self.frechet.populations.values())
        if filled:  # it is resumed from before the first step
            return
        self.filling = True
        bar = tqdm(total=rounds * self.config.batch_size, desc="population", unit="image", disable=not self.world.main)
        with bar:
            for number in range(rounds):
                stop_together(self.world, stop.is_requested)
                parts = [self.frechet_step.features(latents) for latents in self._batches(f"population {number}")]
                mine = {name: torch.cat([part[name] for part in parts]) for name in self.networks}
                self.frechet.fill(self.frechet.gathered(mine))
                bar.update(self.config.batch_size)
        self.filling = False

    # One step.

    def _batches(self, purpose: str) -> list[Latents]:
        """The latents of this process's device batches, which are numbered over all processes."""
        count = self.config.batch_size // self.world.size // self.device_batch
        first = self.world.rank * count
        return [self._latents(i, self.device_batch, purpose) for i in range(first, first + count)]

    def _latents(self, number: int, rows: int, purpose: str) -> Latents:
        seed = step_seed(self.config.seed, self.step, f"{purpose} {number}")
        network = self.config.model
        return Latents.drawn(rows, network.image_shape, network.num_classes, seed, self.world.device)

    def _images(self, noise: Tensor, labels: Tensor) -> Tensor:
        with self._autocast():
            return self.wrapped(noise, labels)

    def _gradients(self, x: Tensor, y: Tensor, weight: float = 1.0) -> dict[str, Tensor]:
        """Gradients of the Fréchet loss and of the anchor, if there is one, on these images."""
        anchor = self.config.anchor

        def synchronise(last: bool) -> None:
            synchronise_gradients(self.wrapped, wanted=last and not anchor)

        out = self.frechet_step(self._batches("images"), synchronise)
        self.entering = out.features
        terms = out.terms | {f"fdr/{k}": out.terms[f"fd/{k}"] / value for k, value in self.held_out.items()}
        if anchor:
            more = super()._gradients(x, y, anchor)
            terms["loss"] = terms["loss"] + anchor * more.pop("loss")
            terms |= more
        return terms

    def _update(self, record: dict[str, float]) -> None:
        super()._update(record)
        self.frechet.add(self.entering)

    def _loader(self) -> Batches:
        return super()._loader() if self.config.anchor else _NoImages(self.world.device)

    # Saving and resuming.

    def state(self) -> dict[str, Any]:
        """Everything that later steps depend on, and which references they match."""
        return super().state() | {"populations": self.frechet.state_dict(), "references": dict(self.references)}

    def _say_saved(self, event: str) -> None:
        if not self.filling:
            super()._say_saved(event)
            return
        why = "its population was still being filled; run the same command again"
        self.world.say(f"{event}; the run is not saved: {why}")

    def _check_loaded(self, state: dict[str, Any]) -> None:
        """Raise `InputError` if the references have changed since the run began."""
        changed = [name for name, value in self.references.items() if state["references"].get(name) != value]
        where = self.config.resume
        require(not changed, f"reference: the statistics of {', '.join(changed)} are not those that {where} began with")


def _digests(
    config: PosttrainConfig, networks: Mapping[str, FeatureNetwork], references: Mapping[str, Statistics]
) -> dict[str, str]:
    """What identifies the references. Those made at the start round differently on another number of threads."""
    if config.reference is None:
        return {name: digest(config.data, network.space) for name, network in networks.items()}
    return {name: digest(r.mu.tobytes(), r.sigma.tobytes()) for name, r in references.items()}


def _population_of(config: PosttrainConfig):
    def population(width: int) -> Population:
        if config.population == "queue":
            return Queue(width, config.queue)
        return MovingAverage(width, config.decay_in_effect)

    return population


class _NoImages:
    """The batches of a run that needs none."""

    def __init__(self, device: torch.device) -> None:
        self.none = torch.empty(0, device=device)

    def __next__(self) -> tuple[Tensor, Tensor]:
        return self.none, self.none

    def close(self) -> None:
        """Nothing is open."""
