"""A number for quality: the Fréchet distance in pixel space, and whether samples show their digit."""

from __future__ import annotations

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

import pmf
from pmf.train.data import digits

PER_CLASS = 50


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """|mu_a - mu_b|^2 + tr(A + B - 2 (A B)^(1/2)) of two sets of images, flattened; float64.

    mu and A, B are means and (unbiased) covariances over the images: FID in pixel space.
    """
    a, b = (x.flatten(1).double().cpu().numpy() for x in (a, b))
    difference = a.mean(0) - b.mean(0)
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    values, vectors = np.linalg.eigh(cov_a)
    root_a = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    # A B has the eigenvalues of the symmetric A^(1/2) B A^(1/2), which stays exact when A is singular.
    root_trace = np.sqrt(np.linalg.eigvalsh(root_a @ cov_b @ root_a).clip(0)).sum()
    return float(difference @ difference + np.trace(cov_a + cov_b) - 2 * root_trace)


def evaluate_digits(
    model, *, steps: int = 1, omega: float, t_min: float, t_max: float, seed: int = 0
) -> dict[str, float]:
    """Fréchet distance and accuracy of 500 samples, 50 per class.

    The distance is to the 297 held-out real digits (images in [-1, 1], 64 dimensions). The accuracy is
    that of a logistic regression, trained on the 1,500 real training digits, in naming the samples'
    classes. For scale: real training digits are at 0.46, the ten class means at 7.2, noise at 62.
    """
    train, held_out = digits()
    labels = torch.arange(10).repeat_interleave(PER_CLASS)
    seeds = range(seed * len(labels), (seed + 1) * len(labels))
    samples = pmf.generate(
        model, labels, seeds=seeds, steps=steps, omega=omega, t_min=t_min, t_max=t_max, batch_size=500
    ).cpu()
    judge = LogisticRegression(max_iter=2000).fit(train.images.flatten(1).numpy(), train.labels.numpy())
    named = judge.predict(samples.flatten(1).numpy())
    return {
        "frechet_distance": frechet_distance(samples, held_out.images),
        "accuracy": float((named == labels.numpy()).mean()),
    }
