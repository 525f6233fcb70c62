"""The training loop: steps, averages, checkpoints, metrics, pictures; resumed bit for bit."""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

import pmf
from pmf.errors import InputError, require
from pmf.jax_states import TrainState, find_train_state
from pmf.perceptual import PerceptualLoss
from pmf.train import directory as folder
from pmf.train.checkpoints import Checkpoints
from pmf.train.config import RunConfig
from pmf.train.data import Loader, TrainingData, step_seed
from pmf.train.distributed import LossModule, World, full, gradient_synchronisation, join, wrap
from pmf.train.examiner import Examiner
from pmf.train.export import Exporter, draw
from pmf.train.initial import check_fits, go_on_from, start_from
from pmf.train.optim import EMA, build_optimizers, learning_rate
from pmf.train.report import Reporter
from pmf.train.signals import StopRequest


class Trainer:
    """One run: what changes from step to step, and its directory.

    Data order and draws are functions of (seed, step), so the state of a run is its weights, averages,
    optimizers and step count. Every process of a run holds one; the main one writes.
    """

    def __init__(self, config: RunConfig, data: TrainingData, world: World | None = None) -> None:
        self.config, self.data = config, data
        self.world = world or join(config.device, config.sharding)
        self.device_batch = device_batch_of(config, self.world)
        check_data(data, config)
        torch.manual_seed(config.seed)
        self.model = pmf.create_model(
            config.model, impl=config.impl, checkpointing=config.checkpointing, device=self.world.device
        )
        draw(self.model, config, [0])  # what cannot sample is refused before it leaves anything behind
        self.perceptual = _perceptual(config, self.world.device)
        if config.init is not None and config.resume is None and not config.init_state:
            self._start()
        if config.compiled:
            self.model.compile_blocks()
        self.wrapped = wrap(LossModule(self.model, config.loss), self.world)
        self.captured = self._captured_step() if config.captured else None
        self.optimizers = build_optimizers(self.model, config.optimizer, self.world.mesh)
        self.emas = {f"ema_{k:g}": EMA(self.model, k) for k in config.ema_half_lives}
        self.step = self.skipped = 0
        self.directory = config.resume or config.out
        self.checkpoints = Checkpoints(self.directory, self.world, config.keep_checkpoints)
        if config.resume is not None:
            self._load_state()
        elif config.init_state:
            self._go_on()
        stored = replace(config, out=self.directory, resume=None, overwrite=False)
        self.examiner = self._examiner() if config.eval_every else None
        self.metrics = self.world.main_first(lambda: self._open_directory(stored))
        self._settle()

    def _captured_step(self) -> pmf.CapturedStep:
        require(self.world.size == 1, f"captured: expected a single process, got {self.world.size}")
        return pmf.CapturedStep(self.model, self.config.loss, scale=self.device_batch / self.config.batch_size)

    def _examiner(self) -> Examiner:
        config, precision = self.config, self.config.evaluation.precision
        lowered = in_bfloat16(config, self.world.device) if precision == "auto" else precision == "bfloat16"
        return Examiner(config, self.world, self.directory, torch.bfloat16 if lowered else torch.float32)

    def _settle(self) -> None:
        """DDP orders its buckets after the first backward pass it sees. Let that be none of a step's, so that a
        resumed run adds gradients in the order of an uninterrupted one.
        """
        if self.world.sharding == "ddp":
            x = torch.zeros(1, *self.config.model.image_shape, device=self.world.device)
            self._loss(x, torch.zeros(1, dtype=torch.int64, device=self.world.device), 0)[0].backward()
            self.model.zero_grad()

    def _open_directory(self, stored: RunConfig) -> list[dict]:
        if self.config.resume is None:
            folder.clear(self.directory, self.config.overwrite)
        folder.write_config(self.directory, stored)
        return folder.metrics_until(self.directory, self.step)

    def _say(self, text: str) -> None:
        if self.world.main:
            print(text)

    # What a run starts from.

    def _start(self) -> None:
        """The main process reads the weights of another run; the others have them from it."""
        config = self.config
        for note in self.world.main_first(lambda: start_from(self.model, config.init, config.init_weights)):
            self._say(note)
        with torch.no_grad():
            for p in self.model.parameters():
                self.world.give(p, p)

    def _go_on(self) -> None:
        """A run of the authors, from the step of its train state."""
        states: list[TrainState] = []
        parts = (self.model, self.emas, self.optimizers)

        def read() -> tuple[int, int]:
            state = find_train_state(self.config.init, self.config.init_weights)
            steps = self.config.steps
            require(state.step <= steps, f"steps: init is at step {state.step}, expected at least that, got {steps}")
            check_fits(state, *parts)
            states.append(state)
            return state.step, state.count

        self.step, count = self.world.main_first(read)
        go_on_from(states[0] if states else None, count, *parts, self.world.give)
        self._say(f"goes on from step {self.step} of {self.config.init}")

    # What a run resumes from.

    def state(self) -> dict[str, object]:
        """Everything that the next steps depend on; its tensors are those of the run."""
        return {
            "step": self.step,
            "skipped": self.skipped,
            "model": self.model.state_dict(),
            "emas": {name: ema.state_dict() for name, ema in self.emas.items()},
            "optimizers": {name: self._optimizer_state(part) for name, part in self.optimizers.items()},
        }

    def _optimizer_state(self, part: torch.optim.Optimizer) -> object:
        """Before the first update PyTorch makes the state by a step that moves nothing, and must not be counted."""
        made = not part.state
        state = get_optimizer_state_dict(self.model, part)
        for values in part.state.values() if made else ():
            values["step"].zero_()
        return state

    def _load_state(self) -> None:
        steps = self.world.broadcast(self.checkpoints.steps())
        require(bool(steps), f"resume: {self.directory} has no complete checkpoint, nothing was saved there yet")
        require(
            steps[-1] <= self.config.steps,
            f"steps: {self.directory} is already at step {steps[-1]}, expected at least that, got {self.config.steps}",
        )
        state = self.state()
        settings = {name: [dict(group) for group in part.param_groups] for name, part in self.optimizers.items()}
        uncounted = self._uncounted(state, steps[-1])
        self.checkpoints.load(steps[-1], state)
        self.step, self.skipped = state["step"], state["skipped"]
        for values in uncounted:
            values["step"] = torch.tensor(self.step, dtype=torch.float32)
        for name, part in self.optimizers.items():
            set_optimizer_state_dict(self.model, part, state["optimizers"][name])
            for group, chosen in zip(part.param_groups, settings[name], strict=True):  # the configuration's settings
                group.update({key: value for key, value in chosen.items() if key != "params"})

    def _uncounted(self, state: dict, step: int) -> list[dict]:
        """Take Muon's counts of steps out of `state` where that checkpoint is older than they are; whose they were."""
        known, muon = self.checkpoints.names(step), state["optimizers"]["muon"]["state"]
        found = [values for name, values in muon.items() if f"optimizers.muon.state.{name}.step" not in known]
        for values in found:
            del values["step"]
        if found:
            self._say(f"resume: this checkpoint is of a version in which Muon counted no steps, it goes on from {step}")
        return found

    # A step.

    def train_step(self, x: Tensor, y: Tensor, stop: bool = False) -> dict[str, float]:
        """One step on this process's images: draws, loss, gradients, Muon and Adam, averages.

        Returns what to report, the same on every process. The loss and the gradient's norm are read once, between
        backward and update: where they are not finite, the step changes nothing but the count of such steps.
        """
        terms = self._gradients(x, y)
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        terms["gradient_norm"] = full(norm)
        terms["stop"] = torch.tensor(float(stop), device=self.world.device)
        record = dict(zip(terms, self.world.mean(torch.stack([*terms.values()]).float()).tolist(), strict=True))
        if all(map(math.isfinite, record.values())):
            if self.config.optimizer.clip_norm:
                torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), self.config.optimizer.clip_norm, norm)
            self._update(record)
            self.skipped = 0
        else:
            self._skip(record)
        for part in self.optimizers.values():
            part.zero_grad()
        self.step += 1
        return record

    def _gradients(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """Gradients of the mean loss over this process's images, a device batch at a time; the mean terms."""
        batches = list(zip(x.split(self.device_batch), y.split(self.device_batch), strict=True))
        totals: dict[str, Tensor] = {}
        for i, (images, labels) in enumerate(batches):
            number = self.world.rank * len(batches) + i
            with gradient_synchronisation(self.wrapped, i == len(batches) - 1):
                loss, terms = self._loss(images, labels, number)
                if loss.requires_grad:  # else the captured step has been backward already
                    (loss / len(batches)).backward()
            for name, value in ({"loss": loss.detach()} | terms).items():
                totals[name] = totals.get(name, 0) + value / len(batches)
        return totals

    def _loss(self, x: Tensor, y: Tensor, number: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and terms of the step's device batch of that number, counted over all processes."""
        config, device = self.config, self.world.device

        def seed(purpose: str) -> int:
            return step_seed(config.seed, self.step, f"{purpose} {number}")

        generator = torch.Generator().manual_seed(seed("draws"))
        draws = pmf.sample_draws(len(x), config.model.image_shape, config.loss, generator, device)
        perceptual = None if self.perceptual is None else self.perceptual.for_step(seed("crops"))
        # Autocast would keep the casts of guidance's pass, whose weights FSDP has freed and gathered anew since.
        kept = self.world.sharding in (None, "ddp")
        with torch.autocast(device.type, torch.bfloat16, in_bfloat16(config, device), cache_enabled=kept):
            if self.captured is not None:
                out = self.captured(x, y, draws, perceptual)
                return out.loss, out.terms
            return self.wrapped(x, y, draws, perceptual)

    def _update(self, record: dict[str, float]) -> None:
        config = self.config
        record["learning_rate"] = learning_rate(config.optimizer, self.step, config.steps)
        for part in self.optimizers.values():
            for group in part.param_groups:
                group["lr"] = record["learning_rate"]
            part.step()
        for ema in self.emas.values():
            ema.update(self.model, config.batch_size, (self.step + 1) * config.batch_size)

    def _skip(self, record: dict[str, float]) -> None:
        """Count a step that is not finite; past the limit, stop with what is known of it."""
        self.skipped += 1
        bad = [name for name, value in record.items() if not math.isfinite(value)]
        if self.skipped > self.config.max_skipped:
            raise InputError(
                f"loss: not finite at step {self.step + 1} and {self.skipped - 1} before it ({', '.join(bad)}"
                f"{_first_bad_gradient(self.model)}), expected a lower learning rate or clip_norm; the last checkpoint "
                f"in {self.directory} is untouched"
            )

    # The run.

    def run(self) -> None:
        """Train to the last step. Ctrl-C, SIGTERM and SIGUSR1 save and stop; so does a full disk, without saving."""
        if self.examiner is not None:
            self.examiner.prepare()
        if self.step == self.config.steps:  # stopped while it exported the last step
            self._export()
        batches = self._loader()
        stopped = False
        with StopRequest() as stop, self._published_at_last(), self._reporter() as reporter:
            self._examine(reporter)  # where the step that is resumed was not measured to the end
            while self.step < self.config.steps and not stopped:
                began = time.perf_counter()
                record = self.train_step(*next(batches), stop.requested)
                stopped = record.pop("stop") > 0
                if reporter is not None:
                    speed = self.config.batch_size / (time.perf_counter() - began)
                    reporter.add({"step": self.step, **record, "images_per_second": speed})
                self._save_when_due(stopped)
                if not stopped:
                    self._examine(reporter)
        if stopped:
            self._say(f"stopped at step {self.step}; continue with --resume {self.directory}")

    @contextlib.contextmanager
    def _published_at_last(self) -> Iterator[None]:
        """A checkpoint that was being written when a step failed is completed: every process has its copy."""
        try:
            yield
        except Exception:
            with contextlib.suppress(InputError):  # what failed first is what is told
                self.checkpoints.publish(wait=True)
            raise

    def _reporter(self) -> contextlib.AbstractContextManager[Reporter | None]:
        if not self.world.main:
            return contextlib.nullcontext()
        return Reporter(self.directory, self.metrics, self.step, self.config.steps)

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

    def _save_when_due(self, stopped: bool) -> None:
        last = stopped or self.step == self.config.steps
        examined = self.examiner is not None and self.examiner.due(self.step)
        if last or examined or self.step % self.config.save_every == 0:
            self.checkpoints.save(self.step, self.state())
        self.checkpoints.publish(wait=last or examined)  # what is measured can be resumed from, whatever happens then
        if last or self.step % self.config.sample_every == 0:
            self._export()

    def _export(self) -> None:
        network = None if self.examiner is None else self.examiner.network
        exporter = Exporter(self.config, self.world, self.directory, network)
        exporter.export(self.step, self._weights(), self.metrics)

    def _examine(self, reporter: Reporter | None) -> None:
        """Measure the weights where it is time to."""
        if self.examiner is not None and self.examiner.due(self.step):
            values = self.examiner.measure(self.step, self._weights())
            if reporter is not None:
                reporter.note(self.step, values)

    def _weights(self) -> dict[str, dict[str, Tensor]]:
        """The weights and their averages by name, each where it lives."""
        return {"model": self.model.state_dict(), **{name: ema.state_dict() for name, ema in self.emas.items()}}


def device_batch_of(config: RunConfig, world: World) -> int:
    """Images at a time on a device. Errors: `InputError` when the processes cannot share a step evenly."""
    size = config.device_batch or config.batch_size // world.size
    require(
        size > 0 and config.batch_size % (size * world.size) == 0,
        f"batch_size: expected a multiple of {world.size} processes x {size} images at a time, got {config.batch_size}",
    )
    return size


def _perceptual(config: RunConfig, device: torch.device) -> PerceptualLoss | None:
    """The perceptual networks of the configuration; terms of no weight are left out."""
    if not config.perceptual.enabled:
        return None
    return PerceptualLoss.load(
        lpips=config.perceptual.lpips if config.loss.lpips_weight else None,
        convnext=config.perceptual.convnext if config.loss.convnext_weight else None,
        device=device,
        dtype=torch.bfloat16 if in_bfloat16(config, device) else torch.float32,
    )


def in_bfloat16(config: RunConfig, device: torch.device) -> bool:
    """Whether products run in bfloat16."""
    return config.precision == "bfloat16" or (config.precision == "auto" and device.type == "cuda")


def check_data(data: TrainingData, config: RunConfig) -> None:
    """The network fits the images and their classes."""
    shape, wanted = tuple(data.image_shape), config.model.image_shape
    require(shape == wanted, f"model: expected a network for images of shape {list(shape)}, got {list(wanted)}")
    got, classes = config.model.num_classes, data.num_classes
    require(got >= classes, f"model.num_classes: expected at least {classes} for these images, got {got}")


def _first_bad_gradient(model: pmf.PMFDiT) -> str:
    """The first parameter whose gradient is not finite, as a part of a message."""
    gradients = ((name, full(p.grad)) for name, p in model.named_parameters() if p.grad is not None)
    bad = itertools.islice((name for name, g in gradients if not bool(torch.isfinite(g).all())), 1)
    return "".join(f"; the gradient of {name}" for name in bad)
