"""The embedded data set: scikit-learn's handwritten digits, 1,797 real 8 x 8 images in 10 classes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

HELD_OUT = 297


@dataclass(frozen=True)
class ImageSet:
    """Images float32 [n, c, H, W] in [-1, 1] and their labels int64 [n]."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def image_shape(self):
        return tuple(self.images.shape[1:])

    @property
    def num_classes(self):
        return int(self.labels.max()) + 1

    def batch(self, step: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
        """The batch of that step: epochs are permutations of their own, run through without a gap.

        A function of its arguments alone, so that a resumed run sees what an uninterrupted one sees.
        """
        first = step * size
        places = range(first, first + size)
        epochs = {epoch: self._permutation(epoch, seed) for epoch in {p // len(self) for p in places}}
        index = torch.stack([epochs[p // len(self)][p % len(self)] for p in places])
        return self.images[index], self.labels[index]

    def _permutation(self, epoch: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(step_seed(seed, epoch, "epoch"))
        return torch.randperm(len(self), generator=generator)


def step_seed(seed: int, index: int, purpose: str) -> int:
    """A seed of its own for each (run seed, step or epoch, purpose).

    Hashed to 32 bits, since PyTorch's CPU generator reads no more of a seed.
    """
    entropy = [seed, index, *purpose.encode()]
    return int(np.random.SeedSequence(entropy).generate_state(1)[0])


def digits() -> tuple[ImageSet, ImageSet]:
    """(1,500 training, 297 held-out) digits, split by class with a fixed seed, scaled to [-1, 1]."""
    data = load_digits()
    images = torch.from_numpy(data.images).float()[:, None] / 8 - 1
    labels = torch.from_numpy(data.target).long()
    split = train_test_split(
        torch.arange(len(labels)).numpy(), test_size=HELD_OUT, random_state=0, stratify=data.target
    )
    train, held_out = (ImageSet(images[index], labels[index]) for index in map(torch.from_numpy, split))
    return train, held_out


class Loader:
    def __init__(self, data, batch_size, *, seed, rank=0, world=1, workers=0, first_step=0):
        self.__dict__.update(locals())

    def __iter__(self):
        step, n = self.first_step, self.batch_size // self.world
        while True:
            x, y = self.data.batch(step, self.batch_size, self.seed)
            yield x[self.rank * n : (self.rank + 1) * n], y[self.rank * n : (self.rank + 1) * n]
            step += 1
