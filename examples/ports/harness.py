"""What the ports share and do not change: digits, times, training, sampling."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from sklearn.datasets import load_digits
from torch import Tensor, nn

from pmf.images import save_grid

Errors = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""Maps a network, images and classes to the loss of each image."""


@dataclass(frozen=True)
class Options:
    """What to train."""

    steps: int = 1000
    """Training steps."""
    batch: int = 64
    """Images in a step."""
    out: Path = Path("meanflow.png")
    """The picture of one-step samples, a column per class."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Where to train."""


def draw_times(samples: int) -> tuple[Tensor, Tensor]:
    """t and r: two logit-normal draws, t the larger one; r = t for the first half of the samples."""
    t, r = torch.randn(2, samples).sub(0.4).sigmoid().sort(0, descending=True).values
    return t, torch.where(torch.arange(samples) < samples // 2, t, r)


def drawn(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(t, r, z, v) of images x: times, z = (1 - t) x + t e with noise e, and v = e - x."""
    (t, r), e = draw_times(len(x)), torch.randn(x.shape)
    t, r, e = t.to(x), r.to(x), e.to(x)
    at = t[:, None, None, None]
    return t, r, (1 - at) * x + at * e, e - x


def adaptive(errors: Tensor) -> Tensor:
    """The loss: errors weighted by their stopped inverses."""
    return (errors / (errors.detach() + 1e-3)).mean()


def digits(device: str) -> tuple[Tensor, Tensor]:
    """1,797 images [n, 1, 8, 8] in [-1, 1] and their classes."""
    data = load_digits()
    images, labels = torch.tensor(data.images, dtype=torch.float32), torch.tensor(data.target)
    return (images[:, None] / 8 - 1).to(device), labels.to(device)


def train(network: nn.Module, errors_of: Errors, options: Options) -> None:
    """Train on digits; print the mean squared error ten times."""
    images, labels = digits(options.device)
    optimizer = torch.optim.Adam(network.parameters(), betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=options.steps)
    for step in range(options.steps):
        picked = torch.randint(len(images), (options.batch,))
        errors = errors_of(network, images[picked], labels[picked])
        adaptive(errors).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if (step + 1) % max(1, options.steps // 10) == 0:
            print(f"step {step + 1}: mean squared error {errors.mean():.3f}", flush=True)


@torch.no_grad()
def sample(network: nn.Module, labels: Tensor, e: Tensor) -> Tensor:
    """One step from noise at t = 1 to images at r = 0: x = e - u(e, 1, 0, y)."""
    one = torch.ones(len(e)).to(e)
    return e - network(e, one, 0 * one, labels)


def main(make: Callable[[], nn.Module], errors_of: Errors) -> None:
    """Train and draw a grid of samples, with options from the command line."""
    options = tyro.cli(Options, description="MeanFlow (arXiv 2505.13447) on handwritten digits.")
    torch.manual_seed(0)
    network = make().to(options.device)
    train(network, errors_of, options)
    labels = torch.arange(10, device=options.device).repeat(8)
    images = sample(network, labels, torch.randn(80, 1, 8, 8).to(options.device))
    save_grid(options.out, images, columns=10)
    print(f"wrote {options.out}")
