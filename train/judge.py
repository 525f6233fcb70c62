"""A number for the colour run: whether samples show their photograph, and how far they are from real crops."""

from __future__ import annotations

from functools import lru_cache

import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

import pmf
from pmf.errors import require
from pmf.train.data import photographs, to_float
from pmf.train.evaluate import frechet_distance

PER_CLASS = 50
SIDE = 8


def features(images: Tensor) -> Tensor:
    """Images uint8, or float32 in [-1, 1], [n, 3, H, W] -> float32 [n, 192]: means over an 8 x 8 grid of areas."""
    return adaptive_avg_pool2d(to_float(images), SIDE).flatten(1).cpu()


@lru_cache(maxsize=2)
def photograph_judge(size: int) -> LogisticRegression:
    """A logistic regression on the features of real training crops that names their photographs."""
    train, _ = photographs(size)
    return LogisticRegression(max_iter=500).fit(features(train.images).numpy(), train.labels.numpy())


def evaluate_photographs(
    model, *, steps: int = 1, omega: float, t_min: float, t_max: float, seed: int = 0
) -> dict[str, float]:
    """Accuracy and Fréchet distance of 500 samples, 50 per photograph.

    The accuracy is that of `photograph_judge` in naming the samples' photographs (it names 100 % of the held-out
    real crops). The distance is to those 1,350 held-out crops, in the 192 features of `features`. For scale: real
    training crops are at 0.03 (500 of them at 0.3), the ten class means at 9.7, noise at 50.
    """
    size, classes = model.config.image_size, model.config.num_classes
    fits = model.config.in_channels == 3 and classes == 10
    require(fits, f"source: expected a network for colour images of 10 classes, got {classes} classes")
    labels = torch.arange(classes).repeat_interleave(PER_CLASS)
    seeds = range(seed * len(labels), (seed + 1) * len(labels))
    samples = pmf.generate(
        model, labels, seeds=seeds, steps=steps, omega=omega, t_min=t_min, t_max=t_max, batch_size=100
    )
    found = features(samples)
    named = photograph_judge(size).predict(found.numpy())
    return {
        "accuracy": float((named == labels.numpy()).mean()),
        "frechet_distance": frechet_distance(found, features(photographs(size)[1].images)),
    }
