"""The training loop: steps, averages, checkpoints, metrics, pictures; resumed bit for bit."""

from __future__ import annotations

import json
import shutil
import signal
import time
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import pmf
from pmf.checkpoint import save_model, write_atomically
from pmf.errors import InputError, require
from pmf.train.config import CONFIG_FILE, RunConfig, to_json
from pmf.train.data import ImageSet, step_seed
from pmf.train.images import save_grid, save_loss_curve
from pmf.train.optim import EMA, build_optimizers, learning_rate

STATE_FILE = "state.pt"
METRICS_FILE = "metrics.jsonl"
PICTURE_ROWS = 8


def pick_device(name: str) -> torch.device:
    """ "auto" is cuda where there is one, else cpu. Errors: a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device: cannot use {name!r}: {str(error).splitlines()[0]}") from None


class Trainer:
    """One run: what changes from step to step, and its directory.

    Data order and draws are functions of (seed, step), so the state of a run is its weights, averages,
    optimizers and step count.
    """

    def __init__(self, config: RunConfig, data: ImageSet) -> None:
        self.config, self.data = config, data
        self.device = pick_device(config.device)
        torch.manual_seed(config.seed)
        self.model = pmf.create_model(config.model, impl=config.impl, device=self.device)
        self.optimizers = build_optimizers(self.model, config.optimizer)
        self.emas = {f"ema_{k:g}": EMA(self.model, k) for k in config.ema_half_lives}
        self.step = 0
        self.directory = config.resume or config.out
        if config.resume is not None:
            self._load_state()
        else:
            self._open_directory()
        self.metrics = self._metrics_so_far()
        self.writer = _tensorboard(self.directory)

    def _open_directory(self) -> None:
        """A fresh directory with the configuration in it."""
        taken = (self.directory / CONFIG_FILE).exists()
        require(
            self.config.overwrite or not taken,
            f"out: {self.directory} already holds a run, expected --resume {self.directory}, --overwrite "
            "or another --out",
        )
        if taken:
            shutil.rmtree(self.directory)
        text = to_json(self.config)
        write_atomically(self.directory / CONFIG_FILE, lambda temporary: temporary.write_text(text))

    def _load_state(self) -> None:
        file = self.directory / STATE_FILE
        require(file.is_file(), f"resume: {self.directory} has no {STATE_FILE}, nothing was saved there yet")
        try:
            state = torch.load(file, map_location=self.device, weights_only=True)
            self.model.load_state_dict(state["model"])
            for group in ("optimizers", "emas"):
                for name, part in getattr(self, group).items():
                    part.load_state_dict(state[group][name])
            self.step = state["step"]
        except Exception as error:
            reason = str(error).strip().splitlines()[0]
            raise InputError(f"resume: cannot continue from {file}: {reason}") from error

    def _metrics_so_far(self) -> list[dict]:
        """The metrics up to this step; those of steps that were not saved are dropped from the file."""
        file = self.directory / METRICS_FILE
        lines = file.read_text().splitlines() if file.exists() else []
        kept = [record for record in map(json.loads, lines[: self.step]) if record["step"] <= self.step]
        text = "".join(json.dumps(record) + "\n" for record in kept)
        write_atomically(file, lambda temporary: temporary.write_text(text))
        return kept

    def save(self) -> None:
        """Write everything that resuming needs, then the weights for sampling; each file whole or not."""
        state = {
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizers": {name: part.state_dict() for name, part in self.optimizers.items()},
            "emas": {name: part.state_dict() for name, part in self.emas.items()},
        }
        write_atomically(self.directory / STATE_FILE, lambda temporary: torch.save(state, temporary))
        weights = {"model": state["model"], **state["emas"]}
        for name, tensors in weights.items():
            path = self.directory / f"{name}.safetensors"
            save_model(path, self.config.model, tensors, step=self.step)

    def train_step(self) -> dict[str, Tensor]:
        """One step: draws, loss, gradients, Muon and Adam, averages. Returns what to report."""
        config, optimizer = self.config, self.config.optimizer
        x, y = self.data.batch(self.step, config.batch_size, config.seed)
        generator = torch.Generator().manual_seed(step_seed(config.seed, self.step, "draws"))
        draws = pmf.sample_draws(config.batch_size, config.model.image_shape, config.loss, generator, self.device)
        out = pmf.pmf_loss(self.model, x.to(self.device), y.to(self.device), draws, config.loss)
        out.loss.backward()
        limit = optimizer.clip_norm or torch.inf
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        rate = learning_rate(optimizer, self.step, config.steps)
        for part in self.optimizers.values():
            for group in part.param_groups:
                group["lr"] = rate
            part.step()
            part.zero_grad()
        for ema in self.emas.values():
            ema.update(self.model, config.batch_size, self.step * config.batch_size)
        self.step += 1
        return {"loss": out.loss.detach(), **out.terms, "gradient_norm": norm, "learning_rate": rate}

    def run(self) -> None:
        """Train to the last step. Ctrl-C (or SIGTERM) saves and stops; a non-finite loss is an error."""
        stop = _StopRequest()
        images = self.config.batch_size
        bar = tqdm(total=self.config.steps, initial=self.step, desc="training", unit="step")
        with stop, bar, open(self.directory / METRICS_FILE, "a") as log:
            while self.step < self.config.steps and not stop.requested:
                began = time.perf_counter()
                record = {name: float(value) for name, value in self.train_step().items()}
                record = {
                    "step": self.step,
                    **record,
                    "images_per_second": images / (time.perf_counter() - began),
                }
                require(
                    all(map(_finite, record.values())),
                    f"loss: not finite at step {self.step}, expected a lower learning rate or clip_norm; the "
                    f"last checkpoint in {self.directory} is untouched",
                )
                self._report(record, log)
                bar.set_postfix(
                    loss_u=f"{record['loss_u']:.3f}",
                    images_per_s=f"{record['images_per_second']:.0f}",
                    refresh=False,
                )
                bar.update()
                self._save_when_due(stop.requested)
        if stop.requested:
            print(f"stopped at step {self.step}; continue with --resume {self.directory}")

    def _report(self, record: dict, log) -> None:
        self.metrics.append(record)
        log.write(json.dumps(record) + "\n")
        log.flush()
        if self.writer is not None:
            for name, value in record.items():
                self.writer.add_scalar(name, value, self.step)

    def _save_when_due(self, stopping: bool) -> None:
        last = stopping or self.step == self.config.steps
        if last or self.step % self.config.save_every == 0:
            self.save()
        if last or self.step % self.config.sample_every == 0:
            self.draw_pictures()

    def draw_pictures(self) -> None:
        """samples.png, one column per class (at most ten), from the sampling weights; loss.png."""
        columns = min(10, self.config.model.num_classes)
        labels = list(range(columns)) * PICTURE_ROWS
        sampling = self.config.sampling
        images = pmf.generate(
            self.sampling_model(), labels, omega=sampling.omega, t_min=sampling.t_min, t_max=sampling.t_max
        )
        save_grid(self.directory / "samples.png", images, columns=columns)
        steps = [record["step"] for record in self.metrics]
        terms = {name: [record[name] for record in self.metrics] for name in ("loss_u", "loss_v")}
        save_loss_curve(self.directory / "loss.png", steps, terms)

    def sampling_model(self) -> pmf.PMFDiT:
        """A network with the weights that the configuration names for sampling."""
        if self.config.sampling_weights == "model":
            return self.model
        model = pmf.create_model(self.config.model, impl=self.config.impl, device=self.device)
        model.load_state_dict(self.emas[self.config.sampling_weights].state_dict())
        return model


def _finite(value: float) -> bool:
    return value == value and abs(value) != float("inf")


def _tensorboard(directory: Path):
    """A TensorBoard writer where the package is installed, else None."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(directory / "tensorboard")


class _StopRequest:
    """Turns Ctrl-C and SIGTERM into a request that the loop honours after the step; a second one kills."""

    def __enter__(self) -> None:
        self.requested = False
        self._before = {s: signal.signal(s, self._request) for s in (signal.SIGINT, signal.SIGTERM)}

    def _request(self, number: int, frame) -> None:
        self.requested = True
        signal.signal(number, self._before[number])

    def __exit__(self, *exception) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
