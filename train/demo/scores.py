"""Scores of the demos: a classifier's accuracy on samples, and their Fréchet distance to held-out real images."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

import pmf
from pmf.errors import require
from pmf.images import to_float
from pmf.metrics import Statistics, frechet_distance, precision_recall
from pmf.sampling import SEEDS
from pmf.train.demo.image_sets import digits, photographs
from pmf.train.demo.networks import judge_features

CLASSES, PER_CLASS = 10, 50


def evaluate_digits(
    model: pmf.PMFDiT, *, steps: int = 1, omega: float, t_min: float, t_max: float, seed: int = 0
) -> dict[str, float]:
    """Scores of 500 samples, 50 per class, against the 297 held-out real digits.

    frechet_distance: of images in [-1, 1] (64 dimensions). accuracy: that of a logistic regression, trained on the
    1,500 real training digits, on the samples' labels. judge_distance: the Fréchet distance in the features of a
    network that no generator is trained on (`pmf.train.demo.networks`). precision and recall: of the images.
    class_spread: standard deviation within a class over that of the held-out digits.
    For scale, real training digits have 0.46, 0.996, 0.22, 0.93, 0.87 and 0.97; the frechet_distance of the ten class
    means is 7.2, of noise 62.
    """
    shape, wanted = model.config.image_shape, digits()[0].image_shape
    fits = shape == wanted and model.config.num_classes == CLASSES
    require(fits, f"source: expected a network for {list(wanted)} images of 10 classes, got {list(shape)}")
    samples = pmf.generate(
        model, _labels(), seeds=_seeds(seed), batch_size=500, steps=steps, omega=omega, t_min=t_min, t_max=t_max
    )
    return digit_scores(samples.cpu(), _labels())


def digit_scores(images: Tensor, labels: Tensor) -> dict[str, float]:
    """The scores of `evaluate_digits` of images [n, 1, 8, 8] and their labels."""
    train, held_out = digits()
    pixels, real = images.flatten(1), held_out.images.flatten(1)
    classifier = LogisticRegression(max_iter=2000).fit(train.images.flatten(1).numpy(), train.labels.numpy())
    judged = (Statistics.of(judge_features(part)) for part in (images, held_out.images))
    precision, recall = precision_recall(pixels, real)
    return {
        **_scores(pixels, real, classifier.predict(pixels.numpy()), labels),
        "judge_distance": frechet_distance(*judged),
        "precision": precision,
        "recall": recall,
        "class_spread": _class_spread(pixels, labels) / _class_spread(real, held_out.labels),
    }


def _class_spread(pixels: Tensor, labels: Tensor) -> float:
    """The mean over classes of the standard deviation within a class: the root of a pixel's mean variance."""
    return float(np.mean([pixels[labels == label].var(0).mean().sqrt() for label in labels.unique()]))


def evaluate_photographs(
    model: pmf.PMFDiT, *, steps: int = 1, omega: float, t_min: float, t_max: float, seed: int = 0
) -> dict[str, float]:
    """Fréchet distance and accuracy of 500 samples, 50 per photograph.

    The distance is to the 1,350 held-out real crops, in the 192 features of `area_colours`. The accuracy is that of
    `photograph_classifier` on the samples' labels (99.9 % on the held-out crops). For scale, at 32 px the distance of
    500 real training crops is 0.27, of the ten class means 5.2, of noise 51.
    """
    size, classes = model.config.image_size, model.config.num_classes
    fits = model.config.in_channels == 3 and classes == CLASSES
    require(fits, f"source: expected a network for colour images of 10 classes, got {classes} classes")
    samples = pmf.generate(
        model, _labels(), seeds=_seeds(seed), batch_size=100, steps=steps, omega=omega, t_min=t_min, t_max=t_max
    )
    named = photograph_classifier(size).predict(grey_structure(samples).numpy())
    return _scores(area_colours(samples), area_colours(photographs(size)[1].images), named, _labels())


def _labels() -> Tensor:
    return torch.arange(CLASSES).repeat_interleave(PER_CLASS)


def _seeds(seed: int) -> range:
    images = CLASSES * PER_CLASS
    largest = SEEDS // images - 1
    require(
        0 <= seed <= largest, f"seed: expected an integer from 0 to {largest}, for {images} images each, got {seed}"
    )
    return range(seed * images, (seed + 1) * images)


def _scores(samples: Tensor, real: Tensor, named: np.ndarray, labels: Tensor) -> dict[str, float]:
    distance = frechet_distance(Statistics.of(samples), Statistics.of(real))
    return {"frechet_distance": distance, "accuracy": float((named == labels.numpy()).mean())}


def area_colours(images: Tensor) -> Tensor:
    """Images uint8, or float32 in [-1, 1], [n, 3, H, W] -> float32 [n, 192]: mean colours on an 8 x 8 grid."""
    return adaptive_avg_pool2d(to_float(images), 8).flatten(1).cpu()


def grey_structure(images: Tensor) -> Tensor:
    """Images as above -> float32 [n, 256]: mean greys on a 16 x 16 grid, scaled to mean 0 and variance 1 per image."""
    grey = adaptive_avg_pool2d(to_float(images).mean(1), 16).flatten(1).cpu()
    centred = grey - grey.mean(1, keepdim=True)
    return centred / centred.std(1, keepdim=True).clamp(min=1e-3)


@lru_cache(maxsize=2)
def photograph_classifier(size: int) -> LogisticRegression:
    """Fit a logistic regression that names a photograph by the `grey_structure` of its training crops.

    It must not see colour, brightness or contrast: patches of the right colour would pass.
    """
    train, _ = photographs(size)
    return LogisticRegression(C=0.01, max_iter=500).fit(grey_structure(train.images).numpy(), train.labels.numpy())
