"""`pmf train`: the training loop with data, snapshots, metrics, pictures and evaluations. Runs resume bit for bit.

Every end but SIGKILL saves: a stop signal, data that cannot be read, an error in a step.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from pmf.data import Loader, TrainingData
from pmf.data.reading import Reader
from pmf.errors import InputError, require
from pmf.train import run_directory
from pmf.train.config import RunConfig
from pmf.train.data.by_name import open_data
from pmf.train.directory_lock import locked
from pmf.train.distributed import CommonError, World, join, leave
from pmf.train.evaluation.periodic import PeriodicEvaluation
from pmf.train.export import export_curve, export_weights
from pmf.train.learner import Learner
from pmf.train.presets import configured
from pmf.train.progress import Progress
from pmf.train.run_directory import CURVE_FILE
from pmf.train.snapshots import Snapshots
from pmf.train.stop_signals import Stopped, StopRequest, StopWaiting
from pmf.train.terminal import decoration, soft_output

log = logging.getLogger(__name__)
PATIENCE = 10.0
"""Seconds in which a directory that one process has made is visible to the others."""


class Batches(Protocol):
    """What a run trains on: this process's images and labels of each step, such as a `Loader`."""

    def __next__(self) -> tuple[Tensor, Tensor]: ...
    def close(self) -> None: ...  # noqa: D102


class Trainer(Learner):
    """A run: a learner with data and a directory. Every process holds one; all write snapshots, the main one the rest.

    The order of the data is a function of (seed, step), so the learner's state is the state of the run.
    """

    curves: Sequence[str] = ("loss_u", "loss_v")
    """The values of a step that the loss curve shows; the first is beside the progress bar."""

    def __init__(self, config: RunConfig, data: TrainingData | None, world: World | None = None) -> None:
        if data is not None:
            check_data(data, config)
        super().__init__(config, world or join(config.device, config.sharding))
        self.data = data
        self.directory = config.resume or config.out
        self.snapshots = Snapshots(self.directory, self.world, config.keep_checkpoints)
        self.owed = self.unexported = False
        """Whether a snapshot, or an export, was due when the state was not worth it."""
        with ExitStack() as lock:
            if config.resume is not None:
                self._lock(lock)
                self.load(self.snapshots)
            self.evaluation = PeriodicEvaluation(config, self.world, self.directory) if config.eval_every else None
            if config.resume is None:
                self._lock(lock)
            self.last_record = self.world.main_first(self._open_directory)
            self._check_shared()
            self.fix_bucket_order()
            self.lock = lock.pop_all()

    def _lock(self, stack: ExitStack) -> None:
        """Lock the directory, for the main process, until the stack is closed at the end of `run`."""

        def enter() -> None:
            stack.enter_context(locked(self.directory, self._argument))

        self.world.main_first(enter)

    @property
    def _argument(self) -> str:
        """The argument that names the directory."""
        return "resume" if self.config.resume is not None else "out"

    def _open_directory(self) -> dict | None:
        """Make the directory that of this run, for the main process; return the last record of its metrics."""
        try:
            return self._begin_directory()
        except OSError as error:
            what = f"{error.filename or self.directory}: {error.strerror}"
            raise InputError(f"{self._argument}: cannot use {what}") from error

    def _begin_directory(self) -> dict | None:
        if self.config.resume is None:
            run_directory.make_room(self.directory, self.config.overwrite)
        elif self.data is not None:
            run_directory.check_data_identity(self.directory, self.config.data, self.data)
        run_directory.remove_left(self.directory)
        stored = replace(self.config, out=self.directory, resume=None, overwrite=False)
        run_directory.write_config(self.directory, stored)  # first: it marks the directory as a run's
        if self.data is not None:
            run_directory.write_data_identity(self.directory, self.config.data, self.data)
        self.snapshots.prepare()
        return run_directory.keep_metrics_until(self.directory, self.step)

    def _check_shared(self) -> None:
        """Raise `CommonError` unless every process sees the directory that the main one has opened."""
        deadline = time.monotonic() + PATIENCE  # network file systems may show it late
        while not (there := run_directory.is_there(self.directory)) and time.monotonic() < deadline:
            time.sleep(0.1)
        blind = [rank for rank, seen in enumerate(self.world.gather(there)) if not seen]
        if blind:
            what = f"process {blind[0]} does not see {self.directory}"
            raise CommonError(f"{self._argument}: {what}: expected a directory that all machines share")

    def _check_kept(self) -> None:
        """Raise `InputError` if the directory was removed or renamed: what is written there could not be resumed."""
        message = f"{self._argument}: {self.directory} was removed or renamed, expected it to stay while the run writes"
        require(run_directory.is_there(self.directory), message)

    def run(self) -> None:
        """Train to the last step. The stop signals save and stop; a full disk stops without saving."""
        with soft_output(), self.lock, StopRequest(self.world.main) as stop:
            stopped = self._prepare(stop)
            if self.step == self.config.steps:  # it stopped while exporting the last step
                self._export()
            if not stopped:
                with closing(self._loader()) as batches, self._saved_on_failure():
                    stopped = self._train(batches, stop)
            if stopped:
                self._say_saved(f"stopped at step {self.step}")
            else:
                self._check_saved()

    def _check_saved(self) -> None:
        """Raise `CommonError` if no step was worth saving."""
        saved = self.world.broadcast(bool(self.snapshots.steps()))
        if not saved:
            fault = self.fault(self.state())
            raise CommonError(f"steps: nothing is saved: {fault}; expected a lower learning rate or clip_norm")

    def _prepare(self, stop: StopRequest) -> bool:
        """Do what takes long before the first step; return whether that was stopped.

        That is: compute the statistics of an evaluation's reference that has none.
        """
        try:
            if self.evaluation is not None:
                self.evaluation.prepare(stop.is_requested)
            return False
        except Stopped:
            return True

    def _train(self, batches: Batches, stop: StopRequest) -> bool:
        """Train to the last step or to a stop; return whether it was a stop."""
        main = self.world.main
        steps = self.step, self.config.steps
        reports = Progress(self.directory, self.last_record, *steps, self.curves[0]) if main else nullcontext()
        with reports as progress:
            stopped = self._evaluate_when_due(progress, stop)  # the run may have stopped during this step's evaluation
            while self.step < self.config.steps and not stopped:
                began = time.perf_counter()
                record = self._step(batches, stop)
                stopped = record is None
                if record is not None and progress is not None:
                    speed = self.config.batch_size / (time.perf_counter() - began)
                    progress.add({"step": self.step, **record, "images_per_second": speed})
                self._save_when_due(stopped)
                stopped = stopped or self._evaluate_when_due(progress, stop)
        return stopped

    def _step(self, batches: Batches, stop: StopRequest) -> dict[str, float] | None:
        """Take a step on the next batch and return its record; None if any process is asked to stop.

        Errors: `CommonError` if any process has no batch. Others may be in their steps already, so that one takes part
        in a step that changes nothing.
        """
        batch = failure = None
        try:
            with stop.ends_waiting():
                batch = next(batches)
        except StopWaiting:
            pass
        except InputError as error:
            failure = error
        record = None
        if batch is not None or self.world.size > 1:
            record = self.train_step(*(batch or self._blank()), batch is None)
        if record is None or record.pop("stop") > 0:
            self.world.raise_first(failure)
            return None
        return record

    def _blank(self) -> tuple[Tensor, Tensor]:
        count, device = self.config.batch_size // self.world.size, self.world.device
        x = torch.zeros(count, *self.config.model.image_shape, device=device)
        return x, torch.zeros(count, dtype=torch.int64, device=device)

    def _loader(self) -> Batches:
        assert self.data is not None
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
    def _saved_on_failure(self) -> Iterator[None]:
        """When a step fails, save what is intact, and finish writing the pending snapshot.

        If only one process of several fails, the others cannot take part: what is pending has all their parts.
        """
        try:
            yield
        except BaseException as failure:
            with suppress(Exception):  # the first failure is the one to report
                if self.world.size == 1 or isinstance(failure, CommonError):
                    self._save()
            with suppress(Exception):
                self.snapshots.publish(wait=True)
                self._say_saved(f"failed after step {self.step}")
            raise

    def _say_saved(self, event: str) -> None:
        saved = self.snapshots.steps()
        end = f"is saved at step {saved[-1]}; continue with --resume {self.directory}" if saved else "is not saved"
        self.world.say(f"{event}; the run {end}")

    def _save(self) -> None:
        """Start saving the state, or say why it is not worth saving; it is saved then as soon as it is."""
        state = self.state()
        fault = self.fault(state)
        if fault is None:
            self.snapshots.save(self.step, state)
        elif self.world.main:
            log.warning("step %d is not saved: %s", self.step, fault)
        self.owed = self.skipped > 0

    def _save_when_due(self, stopped: bool) -> None:
        last = stopped or self.step == self.config.steps
        evaluated = self.evaluation is not None and self.evaluation.due(self.step)
        due = last or evaluated or self.step % self.config.save_every == 0
        exported = last or self.step % self.config.sample_every == 0
        if due or exported:
            self.world.main_first(self._check_kept)
        exported = exported or (self.unexported and not self.skipped)
        if due or (self.owed and not self.skipped):
            self._save()
        self.snapshots.publish(wait=last or evaluated)  # a step must be resumable before it is measured
        if exported:
            self._export()

    def _export(self) -> None:
        """Write the weights and pictures, unless they are not worth it: they would replace better ones."""
        self.world.main_first(partial(_draw_curve, self.directory, self.curves))
        fault = self.fault(self._weights())
        self.unexported = self.skipped > 0
        if fault is not None:
            if self.world.main:
                log.warning("step %d is not exported: %s", self.step, fault)
            return
        if self.world.main and self.emas and self.step < self.config.ema_every:
            late = "ema_every: averages first move in step %d; until then they are what the run started from"
            log.warning(late, self.config.ema_every)
        network = None if self.evaluation is None else self.evaluation.network
        export_weights(self.directory, self.step, self._weights(), self.config, self.world, network)

    def _evaluate_when_due(self, progress: Progress | None, stop: StopRequest) -> bool:
        """Measure the weights if they are due; return whether that was stopped."""
        if self.evaluation is not None and self.evaluation.due(self.step):
            try:
                values = self.evaluation.measure(self.step, self._weights(), stop.is_requested)
            except Stopped:
                return True
            if progress is not None:
                progress.note(self.step, values)
        return False

    def _weights(self) -> dict[str, dict[str, Tensor]]:
        """The weights and their averages by name: the run's own tensors, whole or in shards."""
        return {"model": self.model.state_dict(), **{name: ema.state_dict() for name, ema in self.emas.items()}}


def _draw_curve(directory: Path, names: Sequence[str]) -> None:
    with decoration(CURVE_FILE):
        export_curve(directory, names)


def check_data(data: TrainingData, config: RunConfig) -> None:
    """Raise `InputError` if the network does not fit the images and their classes."""
    given = Reader.of(data, config.max_corrupt)  # asks the data, which may be anyone's, for their shape and classes
    shape, wanted = given.shape, config.model.image_shape
    require(shape == wanted, f"model: expected a network for images of shape {list(shape)}, got {list(wanted)}")
    got, classes = config.model.num_classes, given.classes
    require(got >= classes, f"model.num_classes: expected at least {classes} for these images, got {got}")


def command(arguments: list[str]) -> None:
    """Train a preset, `pmf train PRESET [options]`, or resume a run, `pmf train --resume DIRECTORY [options]`."""
    config = configured(arguments, "train", RunConfig)
    world = join(config.device, config.sharding)
    trainer = Trainer(config, open_data(config.data, config.model.image_size), world)
    trainer.run()
    end(trainer)


def end(trainer: Trainer) -> None:
    """Say where the run is, and leave. A run that is stopped before there is anything to save ends with status 130."""
    world = trainer.world
    begun = trainer.step > 0 or world.broadcast(bool(trainer.snapshots.steps()))
    if begun:
        world.say(f"run: {trainer.directory} ({', '.join(run_directory.written(trainer.directory))})")
    leave(world)
    if not begun:
        sys.exit(130)
