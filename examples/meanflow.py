"""MeanFlow on diffusers' DiT: learn handwritten digits, then draw them in one step.

    pip install '.[train]' diffusers
    python examples/meanflow.py --help

The loss is that of arXiv 2505.13447. Its derivative comes from `pmf.jvp`, where scripts call `torch.func.jvp`; at the
end the script prints time and memory of both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import tyro
from diffusers import DiTTransformer2DModel
from diffusers.models.embeddings import TimestepEmbedding, get_timestep_embedding
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import pmf
from pmf.images import save_grid
from pmf.timing import comparison


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


class Given(nn.Module):
    """In place of a block's embedding of one timestep: the condition that the caller computed."""

    def forward(self, condition: Tensor, class_labels: None, hidden_dtype: torch.dtype) -> Tensor:
        """The condition [B, C]."""
        return condition


class DiT(nn.Module):
    """u(z, t, r, y) by diffusers' DiT, conditioned on embeddings of t, t - r and the class y."""

    def __init__(self, width: int = 128, depth: int = 4, classes: int = 10) -> None:
        super().__init__()
        sizes = {"num_attention_heads": width // 32, "attention_head_dim": 32, "num_layers": depth}
        self.dit = DiTTransformer2DModel(**sizes, in_channels=1, sample_size=8, patch_size=2)
        self.time, self.span = TimestepEmbedding(256, width), TimestepEmbedding(256, width)
        self.classes = nn.Embedding(classes, width)
        for block in self.dit.transformer_blocks:
            block.norm1.emb = Given()
            nn.init.zeros_(block.norm1.linear.weight)

    def condition(self, t: Tensor, r: Tensor, y: Tensor) -> Tensor:
        """The condition [B, C]."""
        time, span = (get_timestep_embedding(s, 256).to(s.dtype) for s in (t, t - r))
        return self.time(time) + self.span(span) + self.classes(y)

    def forward(self, z: Tensor, t: Tensor, r: Tensor, y: Tensor) -> Tensor:
        """z [B, 1, 8, 8]; t, r float [B]; y int64 [B]."""
        return self.dit(z, timestep=self.condition(t, r, y)).sample


def draw_times(samples: int) -> tuple[Tensor, Tensor]:
    """t and r: two logit-normal draws, t the larger one; r = t for the first half of the samples."""
    t, r = torch.randn(2, samples).sub(0.4).sigmoid().sort(0, descending=True).values
    return t, torch.where(torch.arange(samples) < samples // 2, t, r)


def meanflow_errors(network: nn.Module, x: Tensor, y: Tensor, jvp: Callable = pmf.jvp) -> Tensor:
    """Each image's mean squared error of V = u + (t - r) stopgrad(du/dt) against v = e - x."""
    (t, r), e = draw_times(len(x)), torch.randn(x.shape)
    t, r, e = t.to(x), r.to(x), e.to(x)
    at, span = t[:, None, None, None], (t - r)[:, None, None, None]
    z, v = (1 - at) * x + at * e, e - x
    u, du_dt = jvp(network, (z, t, r, y), (v, 1, 0, None))
    return (u + span * du_dt - v).square().flatten(1).mean(1)


def adaptive(errors: Tensor) -> Tensor:
    """The loss: errors weighted by their stopped inverses."""
    return (errors / (errors.detach() + 1e-3)).mean()


def joint_jvp(network: nn.Module, primals: tuple, tangents: tuple) -> tuple[Tensor, Tensor]:
    """What scripts do without `pmf.jvp`: PyTorch has no forward mode for flash attention, and records the tangent."""
    (z, t, r, y), v = primals, tangents[0]
    with sdpa_kernel(SDPBackend.MATH):
        along = v, torch.ones_like(t), torch.zeros_like(r)
        u, du_dt = torch.func.jvp(lambda z, t, r: network(z, t, r, y), (z, t, r), along)
    return u, du_dt.detach()


def digits(device: str) -> tuple[Tensor, Tensor]:
    """1,797 images [n, 1, 8, 8] in [-1, 1] and their classes."""
    data = load_digits()
    images, labels = torch.tensor(data.images, dtype=torch.float32), torch.tensor(data.target)
    return (images[:, None] / 8 - 1).to(device), labels.to(device)


def train(network: nn.Module, errors_of: Callable[..., Tensor], options: Options) -> None:
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


def step_of(network: nn.Module, errors_of: Callable[..., Tensor], options: Options) -> Callable[[], None]:
    """Forward and backward of one batch, always the same."""
    images, labels = (x[: options.batch] for x in digits(options.device))

    def step() -> None:
        torch.manual_seed(0)
        adaptive(errors_of(network, images, labels)).backward()
        network.zero_grad()

    return step


def run(network: nn.Module, errors_of: Callable[..., Tensor], options: Options, steps: dict[str, Callable]) -> None:
    """Train, draw a grid of samples, compare training steps."""
    train(network, errors_of, options)
    labels = torch.arange(10, device=options.device).repeat(8)
    images = sample(network, labels, torch.randn(80, 1, 8, 8).to(options.device))
    save_grid(options.out, images, columns=10)
    print(f"wrote {options.out}\n\nA training step at batch {options.batch}, {options.device}:\n")
    print(comparison(steps, torch.device(options.device)))


def main(options: Options) -> None:
    """Train by `pmf.jvp`."""
    torch.manual_seed(0)
    network = DiT().to(options.device)
    before, after = partial(meanflow_errors, jvp=joint_jvp), meanflow_errors
    compared = {"torch.func.jvp": step_of(network, before, options), "pmf.jvp": step_of(network, after, options)}
    run(network, after, options, compared)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
