"""A number for the colour run: whether samples show their photograph, and how far they are from real crops."""

from __future__ import annotations

from functools import lru_cache

import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

import pmf
from pmf.errors import require
from pmf.metrics import Statistics, frechet_distance
from pmf.train.data import photographs, to_float

PER_CLASS = 50


def areas(images: Tensor) -> Tensor:
    """Images uint8, or float32 in [-1, 1], [n, 3, H, W] -> float32 [n, 192]: the colours of 8 x 8 areas."""
    return adaptive_avg_pool2d(to_float(images), 8).flatten(1).cpu()


def structure(images: Tensor) -> Tensor:
    """Images as above -> float32 [n, 256]: the greys of 16 x 16 areas, at mean 0 and variance 1 in every image."""
    grey = adaptive_avg_pool2d(to_float(images).mean(1), 16).flatten(1).cpu()
    centred = grey - grey.mean(1, keepdim=True)
    return centred / centred.std(1, keepdim=True).clamp(min=1e-3)


@lru_cache(maxsize=2)
def photograph_judge(size: int) -> LogisticRegression:
    """A logistic regression on the `structure` of real training crops that names their photographs.

    Colour, brightness and contrast are kept from it, or patches of the right colour would do.
    """
    train, _ = photographs(size)
    return LogisticRegression(C=0.01, max_iter=500).fit(structure(train.images).numpy(), train.labels.numpy())


def evaluate_photographs(
    model, *, steps: int = 1, omega: float, t_min: float, t_max: float, seed: int = 0
) -> dict[str, float]:
    """Accuracy and Fréchet distance of 500 samples, 50 per photograph.

    The accuracy is that of `photograph_judge` in naming the samples' photographs (it names 99.9 % of the held-out
    real crops). The distance is to those 1,350 held-out crops, in the 192 colours of `areas`. For scale at 32 px:
    500 real training crops are at 0.27, the ten class means at 5.2, noise at 51.
    """
    size, classes = model.config.image_size, model.config.num_classes
    fits = model.config.in_channels == 3 and classes == 10
    require(fits, f"source: expected a network for colour images of 10 classes, got {classes} classes")
    labels = torch.arange(classes).repeat_interleave(PER_CLASS)
    seeds = range(seed * len(labels), (seed + 1) * len(labels))
    samples = pmf.generate(
        model, labels, seeds=seeds, steps=steps, omega=omega, t_min=t_min, t_max=t_max, batch_size=100
    )
    named = photograph_judge(size).predict(structure(samples).numpy())
    both = (Statistics.of(areas(images)) for images in (samples, photographs(size)[1].images))
    return {"frechet_distance": frechet_distance(*both), "accuracy": float((named == labels.numpy()).mean())}
