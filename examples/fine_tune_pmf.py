"""Sample a trained pMF network, fine-tune it on other images, sample it again.

    make demo                              # trains the default weights, runs/digits
    python examples/fine_tune_pmf.py --help

By default the network of the demo, which draws light digits on black, learns their negatives. The published B/16 starts
from the hub (pip install 'pixel-meanflow[hub,data]'), on images that `pmf data prepare` has stored:

    python examples/fine_tune_pmf.py --preset pMF-B/16 --weights Lyy0725/pMF --name pMF-B-16 --data data/mine256

At the end the script prints time and memory of its training step, beside the one with a recorded `torch.func.jvp`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from sklearn.datasets import load_digits

import pmf
from pmf.data import ImageSet, Loader, TrainingData
from pmf.draws import step_seed
from pmf.fine_tuning import copy_weights
from pmf.images import save_grid
from pmf.optim import EMA, OptimizerConfig, build_optimizers
from pmf.reference.loss import pmf_loss as joint_jvp_loss
from pmf.timing import comparison


@dataclass(frozen=True)
class Options:
    """What to fine-tune, and on what."""

    weights: str = "runs/digits"
    """A run directory, a checkpoint or a hub id."""
    name: str | None = None
    """The weights' name in a run or on the hub (default: those for sampling)."""
    preset: str = "pMF-digits"
    """Network and loss of the weights."""
    data: Path | None = None
    """Prepared images (default: the negatives of scikit-learn's digits)."""
    steps: int = 300
    """Training steps."""
    batch: int = 64
    """Images in a step."""
    learning_rate: float = 1e-3
    """Learning rate of Muon and Adam."""
    out: Path = Path("fine-tuned.png")
    """The picture: a column per class, samples before fine-tuning above those after."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Where to train."""


def images(prepared: Path | None) -> TrainingData:
    """Prepared images, or scikit-learn's 1,797 digits, dark on light: [n, 1, 8, 8] in [-1, 1]."""
    if prepared is not None:
        from pmf.data.shards import PreparedShards

        return PreparedShards(prepared)
    data = load_digits()
    return ImageSet(1 - torch.tensor(data.images, dtype=torch.float32)[:, None] / 8, torch.tensor(data.target))


def draw(model: pmf.PMFDiT) -> torch.Tensor:
    """Four one-step samples of each of the first ten classes; the noise is the same in every call."""
    columns = min(10, model.config.num_classes)
    return pmf.generate(model, list(range(columns)) * 4).cpu()


def train(model: pmf.PMFDiT, data: TrainingData, options: Options) -> EMA:
    """Fine-tune by the pMF loss with the published optimizer; return an average of the weights."""
    config = pmf.LOSSES[options.preset]
    optimizers = build_optimizers(model, OptimizerConfig(options.learning_rate))
    average = EMA(model, half_life_kimg=2)
    loader = Loader(data, options.batch, seed=0, device=options.device)
    for step, (x, y) in zip(range(options.steps), loader, strict=False):
        generator = torch.Generator().manual_seed(step_seed(0, step, "draws"))
        draws = pmf.sample_draws(len(x), x.shape[1:], config, generator, device=x.device)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
            out = pmf.pmf_loss(model, x, y, draws, config)
        out.loss.backward()
        for optimizer in optimizers.values():
            optimizer.step()
        model.zero_grad()
        average.update(model, batch=len(x), images_seen=options.batch * (step + 1))
        if (step + 1) % max(1, options.steps // 10) == 0:
            print(f"step {step + 1}: mean squared error {out.terms['loss_u']:.3f}", flush=True)
    return average


def step_of(loss: Callable[..., torch.Tensor], model: pmf.PMFDiT, data: TrainingData, options: Options) -> Callable:
    """Forward and backward of one batch, always the same."""
    x, y = next(Loader(data, options.batch, seed=0, device=options.device))
    config = pmf.LOSSES[options.preset]
    draws = pmf.sample_draws(len(x), x.shape[1:], config, torch.Generator().manual_seed(0), device=x.device)

    def step() -> None:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
            value = loss(model, x, y, draws, config)
        value.backward()
        model.zero_grad()

    return step


def main(options: Options) -> None:
    """Load, sample, train, sample, compare."""
    torch.manual_seed(0)
    model = pmf.create_model(options.preset, device=options.device)
    print(*copy_weights(model, options.weights, options.name), sep="\n")
    data = images(options.data)
    before = draw(model)
    average = train(model, data, options)
    model.load_state_dict(average.average)
    save_grid(options.out, torch.cat([before, draw(model)]), columns=len(before) // 4)
    print(f"wrote {options.out}\n\nA training step at batch {options.batch}, {options.device}:\n")
    plain = pmf.create_model(options.preset, impl="reference", device=options.device)
    compared = {
        "torch.func.jvp of everything": step_of(joint_jvp_loss, plain, data, options),
        "pmf.pmf_loss": step_of(lambda *given: pmf.pmf_loss(*given).loss, model, data, options),
    }
    print(comparison(compared, torch.device(options.device)))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
