import pytest
import torch

from pmf.train.data import digits
from pmf.train.evaluate import evaluate_digits, frechet_distance
from tests.networks import random_model


def test_frechet_distance_of_shifted_and_scaled_gaussians():
    torch.manual_seed(0)
    x = torch.randn(2000, 3, dtype=torch.float64)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(x, x + 2) == pytest.approx(12, rel=1e-9)
    spread = x.var(0).sum().item()
    assert frechet_distance(x, 3 * (x - x.mean(0)) + x.mean(0)) == pytest.approx(4 * spread, rel=1e-9)


def test_frechet_distance_bears_singular_covariances():
    x = torch.randn(100, 4, dtype=torch.float64)
    x[:, 3] = -1
    y = x.clone()
    y[:, 3] = 1
    assert frechet_distance(x, y) == pytest.approx(4, rel=1e-6)


def test_the_scale_of_the_digits_numbers():
    train, held_out = digits()
    means = torch.stack([train.images[train.labels == c].mean(0) for c in range(10)])
    noise = torch.randn(500, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert frechet_distance(train.images, held_out.images) == pytest.approx(0.46, abs=0.01)
    assert frechet_distance(means.repeat_interleave(50, 0), held_out.images) == pytest.approx(7.2, abs=0.1)
    assert frechet_distance(noise, held_out.images) == pytest.approx(62, abs=1)


class Copier(torch.nn.Module):
    """Answers every label with a real training digit of that class: the best a generator can do."""

    def __init__(self):
        super().__init__()
        self.template = random_model()
        self.config = self.template.config.__class__(image_size=8, patch_size=8, in_channels=1, num_classes=10)
        self.T_CLIP = 0.05

    def predict_dual(self, z, h, omega, t_min, t_max, y, *, heads):
        train, _ = digits()
        places = [(train.labels == c).nonzero()[:, 0] for c in range(10)]
        chosen = [places[c][i % len(places[c])] for i, c in enumerate(y.tolist())]
        from pmf.dual import Dual

        return {"u": Dual(train.images[torch.stack(chosen)].flatten(2))}

    def to_images(self, tokens):
        return tokens.unflatten(-1, (8, 8))


def test_real_digits_are_close_and_named_rightly():
    result = evaluate_digits(Copier(), omega=1.0, t_min=0.0, t_max=1.0)
    assert result["frechet_distance"] < 0.9
    assert result["accuracy"] > 0.99
