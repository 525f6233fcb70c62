"""Sources of pictures: class folders, Hugging Face data sets and WebDataset shards, each read in a fixed order."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import parse_qsl

import fsspec
from PIL import Image

from pmf.errors import InputError, extra, first_line, require

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

log = logging.getLogger(__name__)

FORMS = "folder:PATH, hf:NAME or hf:PATH (with ?split=train&image=image&label=label), wds:PATTERN"
HF_OPTIONS = dict(config="", image="image", label="label", split="train", streaming="")
WDS_PICTURES = ("jpg", "jpeg", "png", "webp", "bmp", "ppm", "npy")


class Sample(NamedTuple):
    """One picture of a source, still encoded. Values that the source lacks are None."""

    key: str
    picture: bytes | Path | str | None
    """Its bytes, or the file or URL that holds them."""
    label: int | None

    def read(self) -> bytes:
        """Return the picture's bytes. Errors: `InputError` if there are none, and whatever reading raises."""
        data = self.picture
        if isinstance(data, Path):
            data = data.read_bytes()
        elif isinstance(data, str):
            with fsspec.open(data) as file:
                data = bytes(file.read())
        if not data:
            raise InputError("it has no bytes")
        return data


@dataclass(frozen=True)
class Source:
    """Labelled pictures in a fixed order."""

    read_from: Callable[[int], Iterator[Sample]]
    fingerprint: str
    """Digest of the file names (folder), row count and columns (hf) or URLs (wds): tells a changed source."""
    classes: tuple[str, ...] = ()
    """Class names; empty if the source does not name its classes."""

    def samples(self, start: int = 0) -> Iterator[Sample]:
        """Yield the pictures from position `start` on. Errors: `InputError` if reading fails."""
        try:
            yield from self.read_from(start)
        except Exception as error:  # packages raise whatever their readers raise
            raise InputError(f"source: cannot be read to its end: {first_line(error)}") from error


def open_source(spec: str) -> Source:
    """Open the source that `spec` names.

    - ``folder:PATH``: one directory per class, pictures anywhere below; labels follow the sorted names.
    - ``hf:NAME`` or ``hf:PATH``: a Hugging Face data set on the hub, in Parquet or Arrow files, or written by
      `save_to_disk`; options after ``?``: split, image, label (columns), config, streaming=1.
    - ``wds:PATTERN``: WebDataset tar shards, braces expanded; entries jpg, png, ... with cls, or json with "label".

    Errors: `InputError` for an unknown form, a missing package, or a source that cannot be opened.
    """
    kind, _, rest = spec.partition(":")
    forms = {"folder": _folder, "hf": _hugging_face, "wds": _web_dataset}
    require(kind in forms and rest != "", f"source: expected {FORMS}; got {spec!r}")
    with extra("data", f"source: {kind} needs"):
        return forms[kind](rest)


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _folder(path: str) -> Source:
    """Open a folder with one directory per class.

    `imagefolder` of datasets will not do: it takes a class called train for a split and drops the other classes, and
    it drops all labels where directories differ in depth.
    """
    root = Path(path)
    require(root.is_dir(), f"source: {root} is not a directory")
    classes = tuple(sorted(entry.name for entry in root.iterdir() if entry.is_dir()))
    require(len(classes) > 0, f"source: {root} holds no class directories")
    found = [(name, label) for label, part in enumerate(classes) for name in _files(root, part)]
    known = Image.registered_extensions()
    pictures = [(name, label) for name, label in found if Path(name).suffix.lower() in known]
    others = [name for name, _ in found if Path(name).suffix.lower() not in known]
    if others:
        log.warning("%s: left out %d files that do not have names of pictures, first %s", root, len(others), others[0])
    require(len(pictures) > 0, f"source: {root} holds no pictures in its class directories")

    def read_from(start: int) -> Iterator[Sample]:
        return (Sample(name, root / name, label) for name, label in pictures[start:])

    return Source(read_from, _digest(*(name for name, _ in pictures)), classes)


def _files(root: Path, part: str) -> list[str]:
    """All files below root/part, as sorted paths relative to root."""
    walk = os.walk(root / part, followlinks=True)
    return sorted(Path(place, name).relative_to(root).as_posix() for place, _, names in walk for name in names)


def _hugging_face(spec: str) -> Source:
    from datasets import ClassLabel, Dataset, Image

    name, _, query = spec.partition("?")
    options = HF_OPTIONS | dict(parse_qsl(query))
    require(options.keys() == HF_OPTIONS.keys(), f"source: hf options are {', '.join(HF_OPTIONS)}; got {query!r}")
    try:
        data = _load(name, options)
    except Exception as error:  # the package raises whatever its readers raise
        raise InputError(f"source: cannot open {name}: {first_line(error)}") from error
    features, image, label = data.features or {}, options["image"], options["label"]
    for column in (image, label):
        require(column in features, f"source: {name} has no column {column!r}, its columns are {sorted(features)}")
    names = features[label].names if isinstance(features[label], ClassLabel) else ()
    rows = len(data) if isinstance(data, Dataset) else ""
    undecoded = data.cast_column(image, Image(decode=False))
    return Source(partial(row_samples, undecoded, image, label), _digest(spec, f"{rows}", f"{features}"), tuple(names))


def row_samples(data: Dataset | IterableDataset, image: str, label: str, start: int) -> Iterator[Sample]:
    """Yield the rows of a data set from `start` on; its pictures are undecoded: bytes, or a path or URL to them."""
    for position, row in enumerate(data.skip(start), start):
        picture = row[image] or {}
        path = picture.get("path")
        key = f"row {position}" + (f" ({path})" if path else "")
        yield Sample(key, picture.get("bytes") or path, row[label])


def _load(name: str, options: dict[str, str]) -> Dataset | IterableDataset:
    """Load the data set of that name. Local files are streamed: `datasets` would copy them into its cache."""
    from datasets import DatasetDict, load_dataset, load_from_disk

    path, split = Path(name), options["split"]
    if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
        saved = load_from_disk(name)
        return saved[split] if isinstance(saved, DatasetDict) else saved
    if path.is_file():
        return load_dataset(path.suffix[1:], data_files=name, split=split, streaming=True)
    streaming = path.is_dir() or bool(options["streaming"])
    return load_dataset(name, options["config"] or None, split=split, streaming=streaming)


def _web_dataset(pattern: str) -> Source:
    """Open tar shards by webdataset: `datasets` takes the first entries' columns for all, and loses jpg beside png."""
    import braceexpand
    import webdataset

    urls = list(braceexpand.braceexpand(pattern))
    local = [Path(url) for url in urls if "://" not in url and not url.startswith("pipe:")]
    for file in local:
        require(file.is_file(), f"source: there is no shard {file}")

    def read_from(start: int) -> Iterator[Sample]:
        rows = webdataset.WebDataset(urls, shardshuffle=False, empty_check=False)
        for row in itertools.islice(rows, start, None):
            picture = next((row[kind] for kind in WDS_PICTURES if kind in row), None)
            yield Sample(row["__key__"], picture, _label(row))

    # Earlier versions prepared tar shards and wrote the class names to dataset.json beside them.
    beside = [file.with_name("dataset.json") for file in local[:1]]
    names = [json.loads(file.read_text())["classes"] for file in beside if file.is_file()]
    return Source(read_from, _digest(*urls), tuple(*names))


def _label(row: dict[str, Any]) -> int | None:
    """The label of a WebDataset entry: its cls, or "label" in its json; None if it has neither."""
    try:
        return int(row["cls"]) if "cls" in row else int(json.loads(row["json"])["label"])
    except (KeyError, ValueError, TypeError):
        return None
