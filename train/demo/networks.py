"""Networks trained on the training digits, in seconds: one whose features a post-training matches, and one that judges.

They have different architectures, seeds and training, so that what fools one need not fool the other. Both are trained
in one thread of the CPU, so that their weights do not depend on how many there are.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from pmf.feature_networks import FeatureNetwork
from pmf.train.demo.image_sets import digits
from pmf.weights import weights_digest

CLASSES = 10
BATCH, NOISE = 100, 0.1


def _trained(make: Callable[[], nn.Sequential], seed: int, epochs: int) -> nn.Sequential:
    """A frozen classifier of the training digits: AdamW at 2e-3, noise on the pixels."""
    train, threads = digits()[0], torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.default_generator.manual_seed(seed)  # that of the CPU alone
            network = make()
            optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
            for _ in range(epochs):
                for rows in torch.randperm(len(train.images)).split(BATCH):
                    noisy = train.images[rows] + NOISE * torch.randn_like(train.images[rows])
                    optimizer.zero_grad()
                    cross_entropy(network(noisy), train.labels[rows]).backward()
                    optimizer.step()
    finally:
        torch.set_num_threads(threads)
    return network.eval().requires_grad_(False)


def _convolutions() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(1, 32, 3, padding=1), nn.GELU()),
        *(nn.Conv2d(32, 32, 3, padding=1, stride=2), nn.GELU()),
        *(nn.Conv2d(32, 64, 3, padding=1, stride=2), nn.GELU()),
        *(nn.Flatten(), nn.Linear(256, 64), nn.GELU()),
        nn.Linear(64, CLASSES),
    )


def _perceptron() -> nn.Sequential:
    hidden = (nn.Flatten(), nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 48), nn.Tanh())
    return nn.Sequential(*hidden, nn.Linear(48, CLASSES))


@lru_cache(maxsize=1)
def _matched() -> nn.Sequential:
    return _trained(_convolutions, seed=1, epochs=20)


@lru_cache(maxsize=1)
def _judge() -> nn.Sequential:
    return _trained(_perceptron, seed=7, epochs=40)


class _Trunk(nn.Module):
    """The convolutions up to their last hidden layer, and their classifier."""

    classes = CLASSES

    def __init__(self, network: nn.Sequential) -> None:
        super().__init__()
        self.hidden, self.classifier = network[:-1], network[-1]

    def forward(self, images: Tensor) -> Tensor:
        return self.hidden(images)


def digits_network(device: torch.device | str | None = None) -> FeatureNetwork:
    """The network whose features a post-training matches: digits [B, 1, 8, 8] -> [B, 64]; it has a classifier."""
    network = copy.deepcopy(_matched())
    space = f"digits {weights_digest(network)}"
    return FeatureNetwork("digits", _Trunk(network), width=64, space=space, dtype=torch.float32).to(device)


def judge_features(images: Tensor) -> Tensor:
    """Features [n, 48] of digits [n, 1, 8, 8] by the network that judges: the perceptron's last hidden layer."""
    return _judge()[:-1](images)
