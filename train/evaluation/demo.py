"""How networks of the embedded data sets are measured: by a classifier and a Fréchet distance of their own."""

from __future__ import annotations

from collections.abc import Callable

import torch
from sklearn.linear_model import LogisticRegression

import pmf
from pmf.config import ModelConfig
from pmf.errors import require
from pmf.metrics import Statistics, frechet_distance
from pmf.train.data import digits

PER_CLASS = 50
DIGITS_SHAPE = (1, 8, 8)


def demo_measure(model: ModelConfig) -> Callable[..., dict[str, float]]:
    """The function that measures a network of an embedded data set, chosen by image shape and ten classes.

    It takes the network, and as keywords steps, omega, t_min, t_max and seed. Errors: another network, which needs a
    reference.
    """
    if model.num_classes == 10 and model.image_shape == DIGITS_SHAPE:
        return evaluate_digits
    colour = model.num_classes == 10 and model.in_channels == 3 and model.image_size <= 64
    require(colour, "reference: expected a folder of images or an npz of statistics, got none")
    from pmf.train.judge import evaluate_photographs  # scikit-image is an extra

    return evaluate_photographs


def evaluate_digits(
    model, *, steps: int = 1, omega: float, t_min: float, t_max: float, seed: int = 0
) -> dict[str, float]:
    """Fréchet distance and accuracy of 500 samples, 50 per class; sample i has seed 500 `seed` + i.

    The distance is to the 297 held-out real digits (images in [-1, 1], 64 dimensions). The accuracy is that of a
    logistic regression, trained on the 1,500 real training digits, in recognising the samples' classes. For scale:
    real training digits are at 0.46, the ten class means at 7.2, noise at 62.
    """
    train, held_out = digits()
    shape, wanted = model.config.image_shape, tuple(train.images.shape[1:])
    fits = shape == wanted and model.config.num_classes == 10
    require(fits, f"source: expected a network for {list(wanted)} images of 10 classes, got {list(shape)}")
    labels = torch.arange(10).repeat_interleave(PER_CLASS)
    seeds = range(seed * len(labels), (seed + 1) * len(labels))
    samples = pmf.generate(
        model, labels, seeds=seeds, steps=steps, omega=omega, t_min=t_min, t_max=t_max, batch_size=500
    ).cpu()
    classifier = LogisticRegression(max_iter=2000).fit(train.images.flatten(1).numpy(), train.labels.numpy())
    named = classifier.predict(samples.flatten(1).numpy())
    both = (Statistics.of(images.flatten(1)) for images in (samples, held_out.images))
    return {"frechet_distance": frechet_distance(*both), "accuracy": float((named == labels.numpy()).mean())}
