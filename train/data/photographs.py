"""The embedded colour set: crops of ten photographs that ship with scikit-learn and scikit-image."""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from pmf.errors import InputError, require
from pmf.train.data.embedded import ImageSet

# Class name -> (package, file in it).
PHOTOGRAPHS = {
    "astronaut": ("skimage", "data/astronaut.png"),
    "cat": ("skimage", "data/chelsea.png"),
    "coffee": ("skimage", "data/coffee.png"),
    "flower": ("sklearn", "datasets/images/flower.jpg"),
    "galaxies": ("skimage", "data/hubble_deep_field.jpg"),
    "motorcycle": ("skimage", "data/motorcycle_left.png"),
    "pagoda": ("sklearn", "datasets/images/china.jpg"),
    "retina": ("skimage", "data/retina.jpg"),
    "rocket": ("skimage", "data/rocket.jpg"),
    "tissue": ("skimage", "data/ihc.png"),
}
SHARES = (0.7, 0.8, 0.9)
PLACES = 15
HELD_OUT_EVERY = 5


def photographs(size: int = 32) -> tuple[ImageSet, ImageSet]:
    """(5,400 training, 1,350 held-out) square crops uint8 [n, 3, size, size]; the class is the photograph.

    A crop's side is 0.7, 0.8 or 0.9 of the photograph's short side, and it lies at one of 15 x 15 even places
    in it. Every fifth place along each diagonal is held out, another one for each side. Crops overlap: the
    held-out ones are other views of the same ten photographs. Nothing is random and nothing is downloaded.
    Errors: `InputError` where scikit-image is missing, or a photograph in its files.
    """
    require(8 <= size <= 64, f"size: expected 8 to 64 pixels, got {size}")
    return _photographs(size)


@lru_cache(maxsize=2)
def _photographs(size: int) -> tuple[ImageSet, ImageSet]:
    crops = [crop for label, file in enumerate(map(_file, PHOTOGRAPHS)) for crop in _crops(file, label, size)]
    parts = ([c for c in crops if c[2] == held_out] for held_out in (False, True))
    train, held_out = (
        ImageSet(torch.stack([c[0] for c in part]), torch.tensor([c[1] for c in part]), tuple(PHOTOGRAPHS))
        for part in parts
    )
    return train, held_out


def _file(name: str) -> Path:
    package, inside = PHOTOGRAPHS[name]
    spec = find_spec(package)  # the files are read as they lie: scikit-image's own functions may download
    if spec is None:
        raise InputError("data: photographs need scikit-image, pip install 'pixel-meanflow[data]'")
    file = Path(str(spec.origin)).parent / inside
    require(file.is_file(), f"data: the installed {package} lacks {inside}, expected scikit-image 0.20 or later")
    return file


def _crops(file: Path, label: int, size: int):
    """(crop, label, whether held out) of one photograph, in a fixed order."""
    with Image.open(file) as opened:
        photograph = opened.convert("RGB")
    # No crop needs more than twice its pixels, and shrinking once is cheaper than from every crop.
    scale = 2 * size / (min(SHARES) * min(photograph.size))
    if scale < 1:
        width, height = (round(scale * side) for side in photograph.size)
        photograph = photograph.resize((width, height), Image.Resampling.LANCZOS)
    for (kind, share), row, column in product(enumerate(SHARES), range(PLACES), range(PLACES)):
        side = share * min(photograph.size)
        left, top = ((n - side) * place / (PLACES - 1) for n, place in zip(photograph.size, (column, row), strict=True))
        crop = photograph.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
        held_out = (row + column + 2 * kind) % HELD_OUT_EVERY == 0
        yield torch.from_numpy(np.array(crop)).permute(2, 0, 1).contiguous(), label, held_out
