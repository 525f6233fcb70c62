"""Time, memory and changed lines of each port, against the script before.

pip install 'pixel-meanflow[train]' diffusers timm
python examples/ports/compare.py --port dit"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from difflib import ndiff
from pathlib import Path

import torch
import tyro
from harness import adaptive, digits
from torch import nn

from pmf.timing import comparison

STEPS = ("before", "jvp", "fused", "explicit")
NETWORKS = {"dit": "DiT", "vit": "ViT"}


@dataclass(frozen=True)
class Options:
    """What to compare."""

    port: str = "dit"
    """dit (diffusers) or vit (timm)."""
    batch: int = 64
    """Images in a step."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Where to run."""


def changed_lines(port: str, step: str) -> int:
    """Lines that a step of a port adds or changes in the script before; lines that it only drops do not count."""
    before, after = (
        (Path(__file__).parent / f"{port}_{name}.py").read_text().splitlines() for name in ("before", step)
    )
    return sum(line.startswith("+ ") and bool(line[2:].strip()) for line in ndiff(before, after))


def step_of(port: str, step: str, options: Options) -> Callable[[], None]:
    """Forward and backward of one batch, always the same, with the weights of the script before."""
    module = importlib.import_module(f"{port}_{step}")
    torch.manual_seed(0)
    network: nn.Module = getattr(module, NETWORKS[port])().to(options.device)
    images, labels = (x[: options.batch] for x in digits(options.device))

    def run() -> None:
        torch.manual_seed(0)
        adaptive(module.errors(network, images, labels)).backward()
        network.zero_grad()

    return run


def main(options: Options) -> None:
    """Print the table."""
    names = {step: f"{step}, {changed_lines(options.port, step)} lines" for step in STEPS}
    runs = {name: step_of(options.port, step, options) for step, name in names.items()}
    print(f"A training step of {options.port} at batch {options.batch}, {options.device}:\n")
    print(comparison(runs, torch.device(options.device)))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
