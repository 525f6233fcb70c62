"""Data sets in memory, and the embedded digits: 1,797 real 8 x 8 images in 10 classes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

HELD_OUT = 297


@dataclass(frozen=True)
class ImageSet:
    """Images [n, c, H, W], float32 in [-1, 1] or uint8, their labels int64 [n], and the classes' names."""

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    @property
    def num_classes(self) -> int:
        """One more than the largest label."""
        return int(self.labels.max()) + 1

    def read(self, index: int) -> tuple[Tensor, int]:
        """(image, label)."""
        return self.images[index], int(self.labels[index])


def digits() -> tuple[ImageSet, ImageSet]:
    """(1,500 training, 297 held-out) digits, split by class with a fixed seed, scaled to [-1, 1]."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    images = torch.from_numpy(data.images).float()[:, None] / 8 - 1
    labels = torch.from_numpy(data.target).long()
    split = train_test_split(
        torch.arange(len(labels)).numpy(), test_size=HELD_OUT, random_state=0, stratify=data.target
    )
    train, held_out = (ImageSet(images[index], labels[index]) for index in map(torch.from_numpy, split))
    return train, held_out
