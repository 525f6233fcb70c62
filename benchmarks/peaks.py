"""Count the live tensors of a whole training step, from forward to update, on any machine."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from unittest.mock import patch

import torch

from pmf import create_model
from pmf.benchmarks.figures import markdown
from pmf.benchmarks.step_cases import counted_on, step_draws
from pmf.config import LOSSES, MODELS
from pmf.counting import LiveBytes, live_bytes
from pmf.errors import require
from pmf.memory import EMA_COPIES, Precision, allocated, forward_and_backward, meta_plan
from pmf.model import Checkpointing, Stream
from pmf.optim import Averages, OptimizerConfig, build_optimizers
from pmf.private import FakeTensor, FakeTensorMode


@dataclass(frozen=True)
class Saving:
    """What a run does to need less memory."""

    checkpointing: Checkpointing = "none"
    averages: int = EMA_COPIES
    """How many averages are on the device."""
    stream: Stream = "float32"

    def __str__(self) -> str:
        away = "" if self.averages else ", averages on the host"
        return f"checkpointing {self.checkpointing}{away}, {self.stream} stream"


SAVINGS = (
    Saving(),
    Saving("light"),
    Saving("light", averages=0),
    Saving("light", averages=0, stream="bfloat16"),
    Saving("block"),
    Saving("block", averages=0, stream="bfloat16"),
)


def step_bytes(size: str, batch: int, saving: Saving) -> LiveBytes:
    """Bytes of a process that trains: at the peak of a whole step, images included, and between steps, with gradients.

    Counted in bfloat16 autocast on fake CPU tensors. Matrices of Muon's update are float32 there, and bfloat16 on a
    GPU. What an operator allocates and frees inside is not counted.
    """
    impl, loss, precision = counted_on("lean", torch.device("cpu")), LOSSES[size], Precision("cpu")
    planned = meta_plan(MODELS[size], step_draws(size, batch), loss)

    def train() -> object:
        model = create_model(
            size, impl=impl, checkpointing=saving.checkpointing, stream=saving.stream, device=precision.device
        )
        optimizers = build_optimizers(model, OptimizerConfig())
        averages = Averages(model, range(1, 1 + saving.averages))
        for step in (1, 2):
            forward_and_backward(model, allocated(planned, precision.device), loss, precision)
            for part in optimizers.values():
                part.step()
            averages.update(model, batch, step * batch)
            for part in optimizers.values():
                part.zero_grad()
        for p in model.parameters():
            p.grad = torch.empty_like(p)
        gc.collect()
        return model, optimizers, averages

    # The optimizers read the number of their step, which no fake tensor knows.
    with FakeTensorMode(), patch.object(FakeTensor, "item", lambda number: 1.0):
        return live_bytes(train)


def peaks(size: str = "pMF-B/16", batch: int = 128) -> None:
    """Count the memory of whole training steps, forward to update, on fake tensors: any machine will do.

    Args:
        size: Preset of the network.
        batch: Device batch.
    """
    require(size in LOSSES, f"size: expected one of {', '.join(LOSSES)}, got {size!r}")
    require(batch > 0, f"batch: expected a positive number, got {batch}")
    rows = []
    for saving in SAVINGS:
        found = step_bytes(size, batch, saving)
        rows.append([str(saving), f"{found.peak / 1e9:.1f}", f"{found.end / 1e9:.1f}"])
    print(markdown([f"{size}, batch {batch}, GB", "peak", "between steps, with gradients"], rows))
