"""`pmf train`: the training loop with data, snapshots, metrics, pictures and evaluations. Runs resume bit for bit."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace

from torch import Tensor

from pmf.data import Loader, TrainingData
from pmf.errors import InputError, require
from pmf.train import run_directory
from pmf.train.config import RunConfig
from pmf.train.data.by_name import open_data
from pmf.train.distributed import World, join, leave
from pmf.train.evaluation.periodic import PeriodicEvaluation
from pmf.train.export import export_curve, export_weights
from pmf.train.learner import Learner
from pmf.train.presets import configured
from pmf.train.progress import Progress
from pmf.train.snapshots import Snapshots
from pmf.train.stop_signals import StopRequest


class Trainer(Learner):
    """A run: a learner with data and a directory. Every process holds one; all write snapshots, the main one the rest.

    The order of the data is a function of (seed, step), so the learner's state is the state of the run.
    """

    def __init__(self, config: RunConfig, data: TrainingData, world: World | None = None) -> None:
        check_data(data, config)
        super().__init__(config, world or join(config.device, config.sharding))
        self.data = data
        self.directory = config.resume or config.out
        self.snapshots = Snapshots(self.directory, self.world, config.keep_checkpoints)
        if config.resume is not None:
            self.load(self.snapshots)
        self.evaluation = PeriodicEvaluation(config, self.world, self.directory) if config.eval_every else None
        self.metrics = self.world.main_first(self._open_directory)
        self.fix_bucket_order()

    def _open_directory(self) -> list[dict]:
        if self.config.resume is None:
            run_directory.make_room(self.directory, self.config.overwrite)
        stored = replace(self.config, out=self.directory, resume=None, overwrite=False)
        run_directory.write_config(self.directory, stored)
        return run_directory.metrics_until(self.directory, self.step)

    def run(self) -> None:
        """Train to the last step. Ctrl-C, SIGTERM and SIGUSR1 save and stop; a full disk stops without saving."""
        if self.evaluation is not None:
            self.evaluation.prepare()
        if self.step == self.config.steps:  # it stopped while exporting the last step
            self._export()
        batches, main = self._loader(), self.world.main
        reports = Progress(self.directory, self.metrics, self.step, self.config.steps) if main else nullcontext()
        stopped = False
        with StopRequest() as stop, self._pending_snapshot_kept(), reports as progress:
            self._evaluate_when_due(progress)  # the run may have stopped during this step's evaluation
            while self.step < self.config.steps and not stopped:
                began = time.perf_counter()
                record = self.train_step(*next(batches), stop.requested)
                stopped = record.pop("stop") > 0
                if progress is not None:
                    speed = self.config.batch_size / (time.perf_counter() - began)
                    progress.add({"step": self.step, **record, "images_per_second": speed})
                self._save_when_due(stopped)
                if not stopped:
                    self._evaluate_when_due(progress)
        if stopped:
            self.world.say(f"stopped at step {self.step}; continue with --resume {self.directory}")

    def _loader(self) -> Loader:
        return Loader(
            self.data,
            self.config.batch_size,
            seed=self.config.seed,
            rank=self.world.rank,
            world=self.world.size,
            workers=self.config.workers,
            first_step=self.step,
            flip=self.config.flip,
            device=self.world.device,
            max_corrupt=self.config.max_corrupt,
        )

    @contextmanager
    def _pending_snapshot_kept(self) -> Iterator[None]:
        """When a step fails, finish writing the pending snapshot: every process has copied its part."""
        try:
            yield
        except Exception:
            with suppress(InputError):  # the first failure is the one to report
                self.snapshots.publish(wait=True)
            raise

    def _save_when_due(self, stopped: bool) -> None:
        last = stopped or self.step == self.config.steps
        evaluated = self.evaluation is not None and self.evaluation.due(self.step)
        if last or evaluated or self.step % self.config.save_every == 0:
            self.snapshots.save(self.step, self.state())
        self.snapshots.publish(wait=last or evaluated)  # a step must be resumable before it is measured
        if last or self.step % self.config.sample_every == 0:
            self._export()

    def _export(self) -> None:
        network = None if self.evaluation is None else self.evaluation.network
        export_weights(self.directory, self.step, self._weights(), self.config, self.world, network)
        self.world.main_first(lambda: export_curve(self.directory, self.metrics))

    def _evaluate_when_due(self, progress: Progress | None) -> None:
        if self.evaluation is not None and self.evaluation.due(self.step):
            values = self.evaluation.measure(self.step, self._weights())
            if progress is not None:
                progress.note(self.step, values)

    def _weights(self) -> dict[str, dict[str, Tensor]]:
        """The weights and their averages by name: the run's own tensors, whole or in shards."""
        return {"model": self.model.state_dict(), **{name: ema.state_dict() for name, ema in self.emas.items()}}


def check_data(data: TrainingData, config: RunConfig) -> None:
    """Raise `InputError` if the network does not fit the images and their classes."""
    shape, wanted = tuple(data.image_shape), config.model.image_shape
    require(shape == wanted, f"model: expected a network for images of shape {list(shape)}, got {list(wanted)}")
    got, classes = config.model.num_classes, data.num_classes
    require(got >= classes, f"model.num_classes: expected at least {classes} for these images, got {got}")


def command(arguments: list[str]) -> None:
    """Train a preset, `pmf train PRESET [options]`, or resume a run, `pmf train --resume DIRECTORY [options]`."""
    config = configured(arguments, "train", RunConfig)
    world = join(config.device, config.sharding)
    trainer = Trainer(config, open_data(config.data, config.model.image_size), world)
    trainer.run()
    world.say(f"run: {trainer.directory} (samples.png, loss.png, metrics.jsonl)")
    leave(world)
