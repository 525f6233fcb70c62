"""Where pictures come from: class folders, Hugging Face data sets, WebDataset shards, read in a fixed order."""

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

from pmf.errors import InputError, first_line, require

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

log = logging.getLogger(__name__)

FORMS = "folder:PATH, hf:NAME or hf:PATH (with ?split=train&image=image&label=label), wds:PATTERN"
HF_OPTIONS = dict(config="", image="image", label="label", split="train", streaming="")
WDS_PICTURES = ("jpg", "jpeg", "png", "webp", "bmp", "ppm", "npy")


class Sample(NamedTuple):
    """One picture of a source, still encoded. None stands for what the source lacks."""

    key: str
    picture: bytes | Path | str | None
    """Its bytes, or the file or URL that holds them."""
    label: int | None

    def read(self) -> bytes:
        """The picture's bytes. Errors: `InputError` where there are none, and whatever reading raises."""
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
    """Changes when the source no longer lists the same pictures."""
    classes: tuple[str, ...] = ()
    """The classes' names; empty if the source does not know them."""

    def samples(self, start: int = 0) -> Iterator[Sample]:
        """The pictures from position `start` on. Errors: `InputError` where reading fails."""
        try:
            yield from self.read_from(start)
        except Exception as error:  # packages raise whatever their readers raise
            raise InputError(f"source: cannot be read to its end: {first_line(error)}") from error


def open_source(spec: str) -> Source:
    """The source that a line names.

    - ``folder:PATH``: one directory per class, pictures anywhere below; labels follow the sorted names.
    - ``hf:NAME``: a Hugging Face data set from the hub, or PATH of Parquet or Arrow files or of what
      `save_to_disk` wrote; options after ``?``: split, image, label (columns), config, streaming=1.
    - ``wds:PATTERN``: WebDataset tar shards, braces expanded; entries jpg, png, ... with cls, or json with "label".

    Errors: `InputError` for an unknown form, a missing package, or a source that cannot be opened.
    """
    kind, _, rest = spec.partition(":")
    forms = {"folder": _folder, "hf": _hugging_face, "wds": _web_dataset}
    require(kind in forms and rest != "", f"source: expected {FORMS}; got {spec!r}")
    try:
        return forms[kind](rest)
    except ImportError as error:
        raise InputError(f"source: {kind} needs pip install 'pixel-meanflow[data]': {first_line(error)}") from None


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _folder(path: str) -> Source:
    """One directory per class.

    (`imagefolder` of datasets takes a class called train for a split and drops the other classes; where directories
    differ in depth, it drops all labels.)
    """
    root = Path(path)
    require(root.is_dir(), f"source: {root} is no directory")
    classes = tuple(sorted(entry.name for entry in root.iterdir() if entry.is_dir()))
    require(len(classes) > 0, f"source: {root} holds no class directories")
    found = [(name, label) for label, part in enumerate(classes) for name in _files(root, part)]
    known = Image.registered_extensions()
    pictures = [(name, label) for name, label in found if Path(name).suffix.lower() in known]
    others = [name for name, _ in found if Path(name).suffix.lower() not in known]
    if others:
        log.warning("%s: %d files are no pictures by name and left out, %s first", root, len(others), others[0])
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
    """The rows from `start` on of a data set whose pictures are undecoded: their bytes, or where these lie."""
    for position, row in enumerate(data.skip(start), start):
        picture = row[image] or {}
        path = picture.get("path")
        key = f"row {position}" + (f" ({path})" if path else "")
        yield Sample(key, picture.get("bytes") or path, row[label])


def _load(name: str, options: dict[str, str]) -> Dataset | IterableDataset:
    """The data set by that name. Local files are streamed, or `datasets` would copy them into its cache."""
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
    """Read by webdataset: `datasets` takes the columns of the first entries for all, so that jpg beside png is lost."""
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

    # Tar shards that earlier versions prepared have their classes' names beside them.
    beside = [file.with_name("dataset.json") for file in local[:1]]
    names = [json.loads(file.read_text())["classes"] for file in beside if file.is_file()]
    return Source(read_from, _digest(*urls), tuple(*names))


def _label(row: dict[str, Any]) -> int | None:
    """The label of a WebDataset entry: its cls, or "label" in its json; None where there is none."""
    try:
        return int(row["cls"]) if "cls" in row else int(json.loads(row["json"])["label"])
    except (KeyError, ValueError, TypeError):
        return None
