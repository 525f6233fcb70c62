"""Training data by name."""

from __future__ import annotations

from pathlib import Path

from pmf.errors import InputError, require
from pmf.train.data.embedded import digits
from pmf.train.data.interface import TrainingData
from pmf.train.data.photographs import photographs
from pmf.train.data.shards import MANIFEST, PreparedShards


def open_data(spec: str, image_size: int) -> TrainingData:
    """The training data that a line names: "digits", "photographs", or a directory of prepared shards.

    Errors: `InputError` where images have another size than `image_size`, and for sources that must be prepared
    first, with the command that does so.
    """
    if spec == "digits":
        require(image_size == 8, f"data: digits have 8 pixels a side, expected model.image_size 8, got {image_size}")
        return digits()[0]
    if spec == "photographs":
        return photographs(image_size)[0]
    raw = spec if spec.startswith(("folder:", "hf:", "wds:")) else None
    if raw is None and Path(spec).is_dir() and not (Path(spec) / MANIFEST).exists():
        raw = f"folder:{spec}"
    if raw is not None:
        advice = f"pmf data prepare '{raw}' --out DIRECTORY --size {image_size}"
        raise InputError(f"data: {spec} is not prepared; run `{advice}` and give that directory")
    require(Path(spec).is_dir(), f"data: expected digits, photographs or a prepared directory, got {spec}")
    data = PreparedShards(spec)
    size = data.manifest.size
    require(size == image_size, f"data: {spec} was prepared at {size} pixels, the network has {image_size}")
    return data
