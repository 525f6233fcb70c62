"""The images of the demos, from installed packages: handwritten digits, and crops of ten photographs."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pmf.data.training_data import ImageSet
from pmf.errors import InputError, require
from pmf.pictures import read_file, read_picture

# Class name -> (package, file in it, position of the square with the subject: 0 is left or top, 1 right or bottom).
PHOTOGRAPHS = {
    "astronaut": ("skimage", "data/astronaut.png", 0.5),
    "cat": ("skimage", "data/chelsea.png", 0.3),
    "coffee": ("skimage", "data/coffee.png", 0.5),
    "flower": ("sklearn", "datasets/images/flower.jpg", 0.45),
    "galaxies": ("skimage", "data/hubble_deep_field.jpg", 0.5),
    "motorcycle": ("skimage", "data/motorcycle_left.png", 0.6),
    "pagoda": ("sklearn", "datasets/images/china.jpg", 0.1),
    "retina": ("skimage", "data/retina.jpg", 0.5),
    "rocket": ("skimage", "data/rocket.jpg", 0.5),
    "tissue": ("skimage", "data/ihc.png", 0.5),
}
SHARES = (0.75, 0.85, 0.95)
PLACES = 15
HELD_OUT_EVERY = 5
HELD_OUT_DIGITS = 297


def digits() -> tuple[ImageSet, ImageSet]:
    """(1,500 training, 297 held-out) digits float32 [n, 1, 8, 8] in [-1, 1], split by class with a fixed seed."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    images = torch.from_numpy(data.images).float()[:, None] / 8 - 1
    labels = torch.from_numpy(data.target).long()
    numbers = torch.arange(len(labels)).numpy()
    split = train_test_split(numbers, test_size=HELD_OUT_DIGITS, random_state=0, stratify=data.target)
    train, held_out = (ImageSet(images[index], labels[index]) for index in map(torch.from_numpy, split))
    return train, held_out


@lru_cache(maxsize=2)
def photographs(size: int = 32) -> tuple[ImageSet, ImageSet]:
    """(5,400 training, 1,350 held-out) square crops uint8 [n, 3, size, size]; the class is the photograph.

    Crops are taken inside the square that shows a photograph's subject: their side is 0.75, 0.85 or 0.95 of the
    square's, at 15 x 15 evenly spaced places. Every fifth place along a row or column is held out, a different fifth
    for each side. Crops overlap: held-out ones are other views of the same photographs. Nothing is random or
    downloaded.
    Errors: `InputError` if scikit-image, or one of the photographs, is missing.
    """
    require(8 <= size <= 64, f"size: expected 8 to 64 pixels, got {size}")
    crops = [crop for label, name in enumerate(PHOTOGRAPHS) for crop in _crops(name, label, size)]
    parts = ([c for c in crops if c[2] == held_out] for held_out in (False, True))
    train, held_out = (
        ImageSet(torch.stack([c[0] for c in part]), torch.tensor([c[1] for c in part]), tuple(PHOTOGRAPHS))
        for part in parts
    )
    return train, held_out


def _file(name: str) -> Path:
    package, inside, _ = PHOTOGRAPHS[name]
    spec = find_spec(package)  # read the files directly: scikit-image's own functions may download
    if spec is None:
        raise InputError("data: photographs need scikit-image, pip install 'pixel-meanflow[data]'")
    file = Path(str(spec.origin)).parent / inside
    require(file.is_file(), f"data: the installed {package} lacks {inside}, expected scikit-image 0.20 or later")
    return file


def _square(name: str) -> Image.Image:
    """The square that shows the subject, as large as the photograph allows."""
    photograph = read_picture(read_file(_file(name)))
    side = min(photograph.size)
    left, top = (round((length - side) * PHOTOGRAPHS[name][2]) for length in photograph.size)
    return photograph.crop((left, top, left + side, top + side))


def _crops(name: str, label: int, size: int) -> Iterator[tuple[Tensor, int, bool]]:
    """(crop, label, whether held out) of one photograph, in a fixed order."""
    square = _square(name)
    # No crop needs more than twice its output pixels: shrink the square once rather than every crop from full size.
    whole = min(square.width, round(2 * size / min(SHARES)))
    square = square.resize((whole, whole), Image.Resampling.LANCZOS)
    for (kind, share), row, column in product(enumerate(SHARES), range(PLACES), range(PLACES)):
        side = share * whole
        left, top = ((whole - side) * place / (PLACES - 1) for place in (column, row))
        crop = square.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
        held_out = (row + column + 2 * kind) % HELD_OUT_EVERY == 0
        yield torch.from_numpy(np.array(crop)).permute(2, 0, 1).contiguous(), label, held_out
