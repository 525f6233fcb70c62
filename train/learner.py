"""The training step and its state: the network, its averages and its optimizers."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

import pmf
from pmf.draws import step_seed
from pmf.errors import InputError, require
from pmf.fine_tuning import copy_weights
from pmf.jax_states import find_train_state
from pmf.optim import Averages, build_optimizers, learning_rate
from pmf.optim.authors_state import check_fits, fill_run
from pmf.parallel import LossModule, synchronise_gradients, wrap
from pmf.perceptual import PerceptualLoss
from pmf.sharded import REPLICATED, full, give, local
from pmf.train.config import RunConfig
from pmf.train.distributed import CommonError, World
from pmf.train.snapshots import Snapshots


class Learner:
    """Everything that changes from step to step. Each process of a run holds one.

    Draws are functions of (seed, step), so the whole state is the weights, averages, optimizers and step counts.
    A new learner starts from config.init; one with config.resume is filled by `load`.
    """

    def __init__(self, config: RunConfig, world: World) -> None:
        self.config, self.world = config, world
        self.device_batch = config.device_batch_on(world.size)
        self.dtype = config.dtype_on(world.device)
        torch.manual_seed(config.seed)
        self.model = pmf.create_model(
            config.model,
            impl=config.impl,
            checkpointing=config.checkpointing,
            stream=config.stream,
            aux_head=config.both_heads,
            device=world.device,
        )
        pmf.generate(self.model, [0], **asdict(config.sampling))  # fail now if exports could not sample
        self.perceptual = _perceptual(config, world.device, self.dtype)
        init = config.init if config.resume is None else None
        if init is not None and not config.init_state:
            self._start_from_weights(init, config.init_weights)
        elif config.captured:
            self._share_weights()  # as DDP does
        if config.compiled:
            self.model.compile_blocks()
        self.captured = self._captured_step() if config.captured else None
        self.wrapped = wrap(self._module(), world.mesh if self.captured is None else None, config.sharding)
        self.optimizers = build_optimizers(self.model, config.optimizer, world.mesh, world.shard_over)
        self.emas = Averages(
            self.model,
            config.ema_half_lives,
            every=config.ema_every,
            device=None if config.ema_device == "auto" else config.ema_device,
            shard_over=world.shard_over,
        )
        self.step = self.skipped = 0
        self.intact = True
        """Whether the state is that of `step`, not half of an update."""
        if init is not None and config.init_state:
            self.step = self._continue_authors_run(init)

    def _module(self) -> LossModule:
        """What a step calls, to be wrapped."""
        return LossModule(self.model, self.config.loss)

    def _start_from_weights(self, init: str, weights: str | None) -> None:
        """Copy these weights; the main process reads them and sends them to the others."""

        def read() -> list[str]:
            try:
                return copy_weights(self.model, init, weights)
            except InputError as error:
                raise InputError(f"init: {str(error).removeprefix('source: ')}") from error

        self.world.say(*self.world.main_first(read))
        self._share_weights()

    def _share_weights(self) -> None:
        """Send the main process's weights to the others."""
        for p in self.model.parameters():
            give(p, p)

    def _captured_step(self) -> pmf.CapturedStep:
        """The step as CUDA graphs, which cannot contain what DDP and FSDP do."""
        message = f"captured: expected sharding {' or '.join(REPLICATED)}, got {self.config.sharding}"
        require(self.world.replicated, message)
        return pmf.CapturedStep(self.model, self.config.loss, scale=self.device_batch / self.config.batch_size)

    def _continue_authors_run(self, init: str) -> int:
        """Take over the authors' training state in `init`, which the main process reads; return its step."""
        config, parts, state = self.config, (self.model, self.emas, self.optimizers), None

        def read() -> tuple[int, int]:
            nonlocal state
            state = find_train_state(init, config.init_weights)
            message = f"steps: init is at step {state.step}, expected at least that, got {config.steps}"
            require(state.step <= config.steps, message)
            check_fits(state, *parts)
            return state.step, state.count

        step, count = self.world.main_first(read)
        fill_run(state, count, *parts)
        self.world.say(f"continuing from step {step} of {init}")
        return step

    def fix_bucket_order(self) -> None:
        """Run a dummy backward: DDP fixes its bucket order in its first one, and a resumed run must use the same order.

        Call it before the first step of a new or resumed run.
        """
        if self.world.mesh is not None and self.world.replicated and self.captured is None:
            x = torch.zeros(1, *self.config.model.image_shape, device=self.world.device)
            self._loss(x, torch.zeros(1, dtype=torch.int64, device=self.world.device), 0)[0].backward()
            self.model.zero_grad()

    # One step.

    def train_step(self, x: Tensor, y: Tensor, stop: bool = False) -> dict[str, float]:
        """Take one step on this process's images: draws, loss, gradients, Muon and Adam, averages.

        Return the values to report, equal on every process; among them "stop", positive if any process asked for it:
        then the step changes nothing. Loss and gradient norm are read once, between backward and update; if any value
        is not finite, the step changes neither weights nor optimizers and counts as skipped.
        """
        terms = self._gradients(x, y)
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        terms["gradient_norm"] = full(norm)
        terms["stop"] = torch.tensor(float(stop), device=self.world.device)
        record = dict(zip(terms, self.world.mean(torch.stack([*terms.values()]).float()).tolist(), strict=True))
        if record["stop"] == 0:
            self.intact = False
            if all(map(math.isfinite, record.values())):
                if self.config.optimizer.clip_norm:
                    torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), self.config.optimizer.clip_norm, norm)
                self._update(record)
                self.skipped = 0
            else:
                self._skip(record)
            self.step += 1
            self.intact = True
        for part in self.optimizers.values():
            part.zero_grad()
        return record

    def _gradients(self, x: Tensor, y: Tensor, weight: float = 1.0) -> dict[str, Tensor]:
        """Accumulate gradients of the mean loss over this process's images by device batches; return the mean terms.

        The loss counts by `weight`.
        """
        batches = list(zip(x.split(self.device_batch), y.split(self.device_batch), strict=True))
        totals: dict[str, Tensor] = {}
        for i, (images, labels) in enumerate(batches):
            number = self.world.rank * len(batches) + i
            synchronise_gradients(self.wrapped, wanted=i == len(batches) - 1)
            loss, terms = self._loss(images, labels, number)
            if loss.requires_grad:  # else the captured step has run backward already
                (weight * loss / len(batches)).backward()
            for name, value in ({"loss": loss.detach()} | terms).items():
                totals[name] = totals.get(name, 0) + value / len(batches)
        if self.captured is not None and self.world.size > 1:
            self.captured.all_reduce_gradients()
        return totals

    def _loss(self, x: Tensor, y: Tensor, number: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and terms of device batch `number` of the step, counted over all processes."""
        config, device = self.config, self.world.device

        def seed(purpose: str) -> int:
            return step_seed(config.seed, self.step, f"{purpose} {number}")

        generator = torch.Generator().manual_seed(seed("draws"))
        draws = pmf.sample_draws(len(x), config.model.image_shape, config.loss, generator, device)
        perceptual = None if self.perceptual is None else self.perceptual.for_step(seed("crops"))
        with self._autocast():
            if self.captured is not None:
                out = self.captured(x, y, draws, perceptual)
                return out.loss, out.terms
            return self.wrapped(x, y, draws, perceptual)

    def _autocast(self) -> torch.autocast:
        # Under FSDP it must not cache casts: those of a pass without gradients belong to weights that are freed then.
        low, kept = self.dtype == torch.bfloat16, self.world.replicated
        return torch.autocast(self.world.device.type, torch.bfloat16, low, cache_enabled=kept)

    def _update(self, record: dict[str, float]) -> None:
        config = self.config
        record["learning_rate"] = learning_rate(config.optimizer, self.step, config.steps)
        self.emas.before_step()
        for part in self.optimizers.values():
            for group in part.param_groups:
                group["lr"] = record["learning_rate"]
            part.step()
        self.emas.update(self.model, config.batch_size, (self.step + 1) * config.batch_size)

    def _skip(self, record: dict[str, float]) -> None:
        """Count a non-finite step. Errors: `CommonError` on more than max_skipped of them in a row."""
        self.skipped += 1
        if self.skipped > self.config.max_skipped:
            bad = ", ".join(name for name, value in record.items() if not math.isfinite(value))
            raise CommonError(
                f"loss: not finite at step {self.step + 1} and {self.skipped - 1} before it ({bad}"
                f"{_first_bad_gradient(self.model)}), expected a lower learning rate or clip_norm; the last checkpoint "
                f"in {self.config.resume or self.config.out} is untouched"
            )

    # Saving and resuming.

    def fault(self, state: dict[str, Any]) -> str | None:
        """Why the state, which `state` returned, is not worth saving; None if it is. Every process must call.

        A network that skips steps may have weights from which none can be taken, and would replace better ones.
        """
        if self.skipped or not self.intact:
            return f"the last {self.skipped} steps were skipped" if self.skipped else "an update was interrupted"
        bad = next((name for name, t in _tensors(state) if not bool(torch.isfinite(local(t)).all())), None)
        first = next(filter(None, self.world.gather(bad)), None)
        return first and f"{first} is not finite"

    def state(self) -> dict[str, Any]:
        """Everything that later steps depend on. Its tensors are the run's own, not copies."""
        return {
            "step": self.step,
            "skipped": self.skipped,
            "model": self.model.state_dict(),
            "emas": {name: ema.state_dict() for name, ema in self.emas.items()},
            "ema_pending": {name: dict(ema.pending) for name, ema in self.emas.items()},
            "optimizers": {name: self._optimizer_state(part) for name, part in self.optimizers.items()},
        }

    def _optimizer_state(self, part: torch.optim.Optimizer) -> dict[str, Any]:
        """An optimizer's state. Before the first update PyTorch creates it by a dummy step, which must not count."""
        created = not part.state
        state = get_optimizer_state_dict(self.model, part)
        for values in part.state.values() if created else ():
            values["step"].zero_()
        return state

    def load(self, snapshots: Snapshots) -> None:
        """Resume from the latest snapshot, with the optimizer settings of the configuration."""
        latest, last, directory = snapshots.newest(), self.config.steps, self.config.resume
        require(latest <= last, f"steps: {directory} is already at step {latest}, expected at least that, got {last}")
        state, known = self.state(), snapshots.names(latest)
        settings = {name: copy.deepcopy(part["param_groups"]) for name, part in state["optimizers"].items()}
        muon = state["optimizers"].get("muon", {"state": {}})["state"]
        # Snapshots of earlier versions lack Muon's step count: do not load it, use the run's step.
        counted = any(name.startswith("optimizers.muon.state.") and name.endswith(".step") for name in known)
        uncounted = [] if counted else [*muon.values()]
        for values in uncounted:
            del values["step"]
        if uncounted:
            note = "this checkpoint is from a version in which Muon counted no steps"
            self.world.say(f"resume: {note}; its count starts at {latest}")
        if not any(name.startswith("ema_pending.") for name in known):  # of a version that updated them in every step
            del state["ema_pending"]
        snapshots.load(latest, state)
        self.step, self.skipped = state["step"], state["skipped"]
        swapped = f"resume: the checkpoint of step {latest} in {directory} holds step {self.step!r}, expected {latest}"
        require(self.step == latest, swapped)
        self._check_loaded(state)
        for name, pending in state.get("ema_pending", {}).items():
            self.emas[name].pending = pending
        for values in uncounted:
            values["step"] = torch.tensor(self.step, dtype=torch.float32)
        for name, part in self.optimizers.items():
            stored = {**state["optimizers"][name], "param_groups": settings[name]}
            set_optimizer_state_dict(self.model, part, stored)

    def _check_loaded(self, state: dict[str, Any]) -> None:
        """Raise `InputError` if a loaded state does not belong to this run. A training run takes any that fits."""


def _perceptual(config: RunConfig, device: torch.device, dtype: torch.dtype) -> PerceptualLoss | None:
    """Load the perceptual networks of the configuration, except those of weight zero."""
    if not config.perceptual.enabled:
        return None
    return PerceptualLoss.load(
        lpips=config.perceptual.lpips if config.loss.lpips_weight else None,
        convnext=config.perceptual.convnext if config.loss.convnext_weight else None,
        device=device,
        dtype=dtype,
    )


def _tensors(state: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """All tensors in nested dicts, with their names."""
    if isinstance(state, Tensor):
        yield name, state
    for key, value in state.items() if isinstance(state, dict) else ():
        yield from _tensors(value, f"{name}.{key}".lstrip("."))


def _first_bad_gradient(model: pmf.PMFDiT) -> str:
    """The first parameter whose gradient is not finite, as a part of a message."""
    for name, p in model.named_parameters():
        if p.grad is not None and not bool(torch.isfinite(full(p.grad)).all()):
            return f"; the gradient of {name}"
    return ""
