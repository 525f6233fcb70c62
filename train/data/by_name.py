"""Open training data by name: a data set of the demos, or prepared shards."""

from __future__ import annotations

from pathlib import Path

from pmf.data.training_data import TrainingData
from pmf.errors import InputError, reading, require


def open_data(spec: str, image_size: int) -> TrainingData:
    """Open "digits", "photographs", or a directory that `pmf data prepare` filled.

    Errors: `InputError` if the images are not `image_size` pixels wide, or if the pictures are not prepared; it then
    names the command that prepares them.
    """
    if spec == "digits":
        from pmf.train.demo import digits

        require(image_size == 8, f"data: digits have 8 pixels a side, expected model.image_size 8, got {image_size}")
        return digits()[0]
    if spec == "photographs":
        from pmf.train.demo import photographs

        return photographs(image_size)[0]
    require(spec != "", "data: expected digits, photographs or a prepared directory, got ''")
    path, raw = Path(spec), spec if spec.startswith(("folder:", "hf:", "wds:")) else None
    with reading("data", path):
        if raw is None and path.is_dir() and not any(path.glob("shard-*.*")):
            raw = f"folder:{spec}"
    if raw is not None:
        advice = f"pmf data prepare '{raw}' --out DIRECTORY --size {image_size}"
        raise InputError(f"data: {spec} is not prepared; run `{advice}` and give that directory")
    require(path.is_dir(), f"data: expected digits, photographs or a prepared directory, got {spec}")
    from pmf.data.shards import PreparedShards  # needs the extra `data`

    data = PreparedShards(path)
    size = data.settings.size
    require(size == image_size, f"data: {spec} was prepared at {size} pixels, the network has {image_size}")
    return data
