"""The protocol of training data: labelled images of one shape, read by index."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pmf.draws import warn_of_scale
from pmf.errors import readable, require
from pmf.fields import check_values

DTYPES = (torch.uint8, torch.float32, torch.float64)


class CorruptImageError(Exception):
    """An image that cannot be read: `key` says which, `reason` why."""

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(key, reason)
        self.key, self.reason = key, reason

    def __str__(self) -> str:
        return f"{self.key}: {self.reason}"


class TrainingData(Protocol):
    """Labelled images of one shape, read by index in any order and from any process.

    Data may also have a property `fingerprint: str`, a digest of their images, labels and classes in their order, by
    which a resumed run can notice other data.
    """

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        ...

    @property
    def num_classes(self) -> int:
        """Labels lie in [0, num_classes)."""
        ...

    def __len__(self) -> int: ...

    def read(self, index: int) -> tuple[Tensor, int]:
        """(image, label): uint8 [c, H, W], or float32 or float64 in [-1, 1]. Errors: `CorruptImageError`."""
        ...


@dataclass(frozen=True)
class ImageSet:
    """Training data in memory: images [n, c, H, W] as `TrainingData` reads them, labels int64 [n], class names.

    Errors: `InputError` on other dtypes and shapes, on images that are not finite, and on negative labels. Floating
    images of another scale are warned of.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_values(Tensor, images=self.images, labels=self.labels)
        images, labels = self.images, self.labels
        shape, good = list(images.shape), images.ndim == 4 and images.dtype in DTYPES
        wanted = "uint8, float32 or float64 [n, c, H, W]"
        require(good, lambda: f"images: expected {wanted}, got {images.dtype} {shape}")
        whole = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
        one_each = whole and list(labels.shape) == shape[:1]
        each = f"integers [{shape[0]}], one for each image"
        require(one_each, lambda: f"labels: expected {each}, got {labels.dtype} {list(labels.shape)}")
        require(not (labels < 0).any(), lambda: f"labels: expected >= 0, got {labels.min().item()}")
        if images.is_floating_point() and images.numel() > 0 and readable(images):
            require(bool(torch.isfinite(images).all()), "images: expected finite values, got NaN or infinity")
            warn_of_scale("images", images, stacklevel=4)

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
        return int(self.labels.max()) + 1 if len(self) else 0

    @property
    def fingerprint(self) -> str:
        """Digest of images, labels and class names."""
        digest = hashlib.sha256(repr((self.images.dtype, list(self.images.shape), self.classes)).encode())
        for tensor in (self.images, self.labels.long()):
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def read(self, index: int) -> tuple[Tensor, int]:
        """(image, label)."""
        return self.images[index], int(self.labels[index])
