"""Hugging Face data sets as sources of pictures: on the hub, in local Parquet and Arrow files, from `save_to_disk`."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote_plus

from pmf.errors import InputError, first_line, printable, require
from pmf.pictures import walk
from pmf.sizes import check_is_file
from pmf.train.data.samples import Sample, Source, digest, listed

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

log = logging.getLogger(__name__)

OPTIONS = dict(config="", image="image", label="label", split="train", streaming="")
SUFFIXES = (".parquet", ".arrow")
STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"


def open_hugging_face(spec: str) -> Source:
    """Open NAME or PATH with options, see `open_source`. An option that would have no effect is refused."""
    from datasets import Dataset, Image

    name, _, query = spec.partition("?")
    given = _given(query)
    options = OPTIONS | given
    files = _local_files(Path(name))
    try:
        data = _load(name, options, given, files)
        features, image, label = data.features or {}, options["image"], options["label"]
    except InputError:
        raise
    except Exception as error:  # the package raises whatever its readers raise
        raise InputError(f"source: cannot open {name}: {first_line(error)}") from error
    for column in (image, label):
        require(column in features, f"source: {name} has no column {column!r}, its columns are {sorted(features)}")
    names = _classes(features[label], label)
    rows = len(data) if isinstance(data, Dataset) else ""
    versions = sorted(getattr(data.info, "download_checksums", None) or ())  # the hub's addresses hold the commit
    named = digest((spec, rows, features, *versions, *((str(file), listed(str(file))) for file in files)))
    return Source(partial(row_samples, data.cast_column(image, Image(decode=False)), image, label), named, names)


def _given(query: str) -> dict[str, str]:
    """The options that are written out. Errors: `InputError` for unknown, double and empty ones."""
    given: dict[str, str] = {}
    for part in query.split("&") if query else ():
        name, _, value = part.partition("=")
        known = name in OPTIONS and value != ""
        require(known, f"source: hf options are {', '.join(OPTIONS)}; got {query!r}")
        require(name not in given, f"source: the hf option {name} is given twice: {query!r}")
        given[name] = unquote_plus(value)
    require(
        given.get("streaming", "1") == "1", lambda: f"source: streaming: expected 1, got {given.get('streaming')!r}"
    )
    return given


def _classes(feature: Any, column: str) -> tuple[str, ...]:
    """The names of a column's classes, if it has any. Errors: `InputError` if it does not hold integers."""
    from datasets import ClassLabel, Value

    if isinstance(feature, ClassLabel):
        return tuple(feature.names)
    whole = isinstance(feature, Value) and feature.dtype.startswith(("int", "uint"))
    kind = feature.dtype if isinstance(feature, Value) else type(feature).__name__
    require(whole, f"source: column {column!r} holds {kind}, expected integers or ClassLabel")
    return ()


def row_samples(data: Dataset | IterableDataset, image: str, label: str, start: int) -> Iterator[Sample]:
    """Yield the rows of a data set from `start` on; its pictures are undecoded: bytes, or a path or URL to them."""
    for position, row in enumerate(data.skip(start), start):
        picture = row[image] or {}
        path = picture.get("path")
        key = f"row {position}" + (f" ({printable(path)})" if path else "")
        yield Sample(key, picture.get("bytes") or path, row[label])


def _local_files(path: Path) -> list[Path]:
    """The data files of a local data set. Errors: `InputError` names those that are cut or of another kind."""
    check_is_file("source", path)
    if path.is_file():
        require(
            path.suffix in SUFFIXES, f"source: {path}: expected a file {' or '.join(SUFFIXES)}, or a folder of them"
        )
        files = [path]
    else:
        files = [Path(entry.path) for entry in walk(path)] if path.is_dir() else []
    for file in files:
        if file.suffix in SUFFIXES:
            require(_is_whole(file), f"source: {printable(file)} is cut: it has no end; download or write it again")
    return sorted(files)


def _is_whole(file: Path) -> bool:
    """Whether a Parquet file, an Arrow file or a stream of Arrow ends as it must."""
    with open(file, "rb") as opened:
        start = opened.read(6)
        opened.seek(max(0, file.stat().st_size - 8))
        end = opened.read()
    if file.suffix == ".parquet":
        return start[:4] in (b"PAR1", b"PARE") and end.endswith(start[:4])
    return end.endswith(b"ARROW1") if start == b"ARROW1" else end == STREAM_END


def _load(name: str, options: dict[str, str], given: dict[str, str], files: list[Path]) -> Dataset | IterableDataset:
    """Load the data set of that name. Local files are streamed: `datasets` would copy them into its cache."""
    from datasets import load_dataset

    path, split = Path(name), options["split"]
    if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
        return _load_saved(name, split, given)
    if path.is_file():
        _refuse(given, ("config", "streaming"), f"{name} is one file")
        words = re.split("[^a-z]+", path.stem.lower())
        _refuse({} if split in words else given, ("split",), f"{name} is one file, whose name does not say its split")
        return load_dataset(path.suffix[1:], data_files=name, split="train", streaming=True)
    if path.is_dir():
        _check_names(path, files, options["config"] or None)
    streaming = path.is_dir() or bool(options["streaming"])
    return load_dataset(name, options["config"] or None, split=split, streaming=streaming)


def _load_saved(name: str, split: str, given: dict[str, str]) -> Dataset:
    from datasets import DatasetDict, load_from_disk

    _refuse(given, ("config", "streaming"), f"{name} was written by save_to_disk")
    saved = load_from_disk(name)
    if isinstance(saved, DatasetDict):
        require(split in saved, f"source: {name} has no split {split!r}, its splits are {sorted(map(str, saved))}")
        return saved[split]
    _refuse(
        {} if str(saved.split) == split else given, ("split",), f"{name} holds one data set, of split {saved.split}"
    )
    return saved


def _refuse(given: dict[str, str], names: tuple[str, ...], why: str) -> None:
    useless = [name for name in names if name in given]
    require(not useless, f"source: {why}: expected no option {', '.join(useless)}")


def _check_names(path: Path, files: list[Path], config: str | None) -> None:
    """Raise `InputError` if `datasets` would take files for one split whose names speak of several.

    Warn of files that it would leave out: beside train.parquet it takes only names that speak of a split.
    """
    from datasets import load_dataset_builder

    splits = load_dataset_builder(str(path), config).config.data_files or {}
    taken = {os.path.realpath(file) for part in splits.values() for file in part}
    left = [file for file in files if file.suffix in SUFFIXES and os.path.realpath(file) not in taken]
    if left:
        log.warning("%s: %d files belong to no split, first %s", printable(path), len(left), printable(left[0]))
    names = [file.relative_to(path).as_posix().lower() for file in files if file.suffix in SUFFIXES]
    training = [name for name in names if "train" in name]
    others = [name for name in names if name not in training and re.search("test|val|eval", name)]
    if training and others:
        one = (
            f"source: {path}: {training[0]} and {others[0]} would be one split; call them train-*, test-*, validation-*"
        )
        require(len(splits) > 1, one)
