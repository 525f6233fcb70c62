"""An evaluation with a small extractor, for tests in this process, in one to be killed, or under torchrun."""

from __future__ import annotations

import contextlib
import sys
import time
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import pmf
from pmf.metrics import Resize
from pmf.train.distributed import World, join, leave
from pmf.train.evaluation import command
from pmf.train.evaluation.command import EvalConfig
from pmf.train.evaluation.measurement import Measurement
from pmf.train.stop_signals import Stopped
from tests.networks import random_model

COLOUR = pmf.ModelConfig(
    image_size=8, patch_size=4, hidden_size=32, depth=2, num_heads=2, aux_head_depth=1, num_classes=5, bottleneck=12
)
ALONE = World(torch.device("cpu"))
SETTINGS = dict(omega=(1.5, 3.0), interval=("0,1", "0.1,0.7"), per_class=6, chunk=8, batch_size=3, device="cpu")


class Toy(torch.nn.Module):
    """Uint8 images of any size -> 6 features, 4 logits; `calls` counts batches, each of which takes `delay` seconds.

    With the half-pixel resize its features differ.
    """

    resize: Resize = "tf1"

    def __init__(self, delay: float = 0.0) -> None:
        super().__init__()
        self.delay = delay
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("first", torch.randn(48, 6, generator=generator) / 30)
        self.register_buffer("second", torch.randn(6, 4, generator=generator))
        self.calls = 0

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features and logits."""
        assert images.dtype == torch.uint8 and images.shape[1] == 3
        self.calls += 1
        time.sleep(self.delay)
        pooled = torch.nn.functional.adaptive_avg_pool2d(images.float(), 4).flatten(1)
        features = torch.tanh((pooled - 128) @ (self.first if self.resize == "tf1" else self.first.flip(0)))
        return features, features @ self.second


def checkpoint(path: Path) -> Path:
    """Save a random network for small colour pictures."""
    model = random_model(COLOUR, dtype=torch.float32)
    pmf.save_model(path, COLOUR, model.state_dict())
    return path


def evaluate(config: EvalConfig, extractor: torch.nn.Module | None = None, world: World = ALONE) -> list[dict]:
    """Run an evaluation on the CPU and return its lines."""
    made = extractor or Toy()

    def extractor_of(resize: Resize) -> torch.nn.Module:
        made.resize = resize
        return made

    return command.evaluate(config, world, extractor_of)


if __name__ == "__main__":
    source, reference, out, delay, *stop_after = sys.argv[1:]
    world = join("cpu")
    config = EvalConfig(source=source, reference=Path(reference), out=Path(out), **SETTINGS)
    if stop_after:
        with contextlib.suppress(Stopped):
            calls = iter(range(int(stop_after[0])))
            stopping = partial(lambda calls: next(calls, None) is None, calls)
            Measurement(config, config.out, world, lambda resize: Toy()).reference(stopping)
            raise SystemExit("not stopped")
        print("stopped")
    else:
        evaluate(config, Toy(float(delay)), world)
    leave(world)
