"""Where pictures come from: class folders, Hugging Face data sets, WebDataset shards, read in a fixed order."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol
from urllib.parse import parse_qsl

from PIL import Image

from pmf.errors import InputError, require

log = logging.getLogger(__name__)

FORMS = "folder:PATH, hf:NAME or hf:PATH (with ?split=train&image=image&label=label), wds:PATTERN"
WDS_IMAGES = ("jpg", "jpeg", "png", "webp", "bmp", "ppm")


class Sample(NamedTuple):
    """One picture of a source, still encoded. None stands for what the source lacks."""

    key: str
    data: bytes | None
    label: int | None


class Source(Protocol):
    """Labelled pictures in a fixed order."""

    @property
    def classes(self) -> tuple[str, ...] | None:
        """The classes' names, where the source knows them."""
        ...

    @property
    def fingerprint(self) -> str:
        """Changes when the source no longer lists the same pictures."""
        ...

    def samples(self, start: int = 0) -> Iterator[Sample]:
        """The pictures from position `start` on."""
        ...


def open_source(spec: str) -> Source:
    """The source that a line names.

    - ``folder:PATH``: one directory per class, pictures anywhere below; labels follow the sorted names.
    - ``hf:NAME``: a Hugging Face data set from the hub, or PATH of Parquet or Arrow files or of what
      `save_to_disk` wrote; options after ``?``: split, image, label (columns), config, streaming=1.
    - ``wds:PATTERN``: WebDataset tar shards, braces expanded; entries jpg, png, ... with cls, or json with "label".

    Errors: `InputError` for an unknown form, a missing package, or a source that cannot be opened.
    """
    kind, _, rest = spec.partition(":")
    require(kind in ("folder", "hf", "wds") and rest != "", f"source: expected {FORMS}; got {spec!r}")
    if kind == "folder":
        return Folder(Path(rest))
    return _hugging_face(rest) if kind == "hf" else Shards(rest)


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


class Folder:
    """One directory per class; the label is the place of its name among the sorted names."""

    def __init__(self, path: Path) -> None:
        require(path.is_dir(), f"source: {path} is no directory")
        self.path = path
        self.classes = tuple(sorted(entry.name for entry in path.iterdir() if entry.is_dir()))
        require(len(self.classes) > 0, f"source: {path} holds no class directories")
        known = Image.registered_extensions()
        found = [(name, label) for label, part in enumerate(self.classes) for name in _files(path, part)]
        self.files = [(name, label) for name, label in found if Path(name).suffix.lower() in known]
        others = [name for name, _ in found if Path(name).suffix.lower() not in known]
        if others:
            log.warning("%s: %d files are no pictures by name and left out, %s first", path, len(others), others[0])
        require(len(self.files) > 0, f"source: {path} holds no pictures in its class directories")
        self.fingerprint = _digest(*(name for name, _ in self.files))

    def samples(self, start: int = 0) -> Iterator[Sample]:
        """The pictures in order of class and path."""
        for name, label in self.files[start:]:
            try:
                yield Sample(name, (self.path / name).read_bytes(), label)
            except OSError as error:
                log.warning("%s: %s", self.path / name, error.strerror)
                yield Sample(name, None, label)


def _files(root: Path, part: str) -> list[str]:
    """All files below root/part, as sorted paths relative to root."""
    walk = os.walk(root / part, followlinks=True)
    return sorted(Path(place, name).relative_to(root).as_posix() for place, _, names in walk for name in names)


@dataclass(frozen=True)
class HuggingFace:
    """A `datasets` data set (or its streaming kind) whose picture column gives undecoded bytes."""

    data: Any
    image: str
    label: str
    classes: tuple[str, ...] | None
    fingerprint: str

    def samples(self, start: int = 0) -> Iterator[Sample]:
        """The rows in order."""
        rows = self.data.skip(start) if start else self.data
        for position, row in enumerate(rows, start):
            image = row[self.image] or {}
            named = image.get("path")
            key = f"row {position}" + (f" ({named})" if named else "")
            data = image.get("bytes")
            yield Sample(key, _fetch(named) if data is None and named else data, row[self.label])


def _fetch(path: str) -> bytes | None:
    """The bytes of a local or remote file that a row only names; None where it cannot be read."""
    import fsspec  # comes with datasets

    try:
        with fsspec.open(path) as file:
            return file.read()
    except OSError as error:
        log.warning("%s: %s", path, error)
        return None


def _hugging_face(spec: str) -> HuggingFace:
    name, _, query = spec.partition("?")
    options = dict(split="train", image="image", label="label", config="", streaming="") | dict(parse_qsl(query))
    known = {"split", "image", "label", "config", "streaming"}
    require(set(options) == known, f"source: hf options are {', '.join(sorted(known))}; got {query!r}")
    try:
        import datasets
    except ImportError:
        raise InputError("source: hf needs pip install 'pixel-meanflow[data]'") from None
    try:
        data = _load(name, options)
    except Exception as error:  # the package raises whatever its readers raise
        raise InputError(f"source: cannot open {name}: {str(error).strip().splitlines()[0]}") from error
    features = data.features or {}
    for column in (options["image"], options["label"]):
        require(column in features, f"source: {name} has no column {column!r}, its columns are {sorted(features)}")
    label = features[options["label"]]
    classes = tuple(label.names) if isinstance(label, datasets.ClassLabel) else None
    data = data.cast_column(options["image"], datasets.Image(decode=False))
    rows = "" if options["streaming"] or not hasattr(data, "num_rows") else str(data.num_rows)
    return HuggingFace(data, options["image"], options["label"], classes, _digest(spec, rows, str(features)))


def _load(name: str, options: dict[str, str]) -> Any:
    """What `datasets` opens: local files are streamed, since they lie where they can be read."""
    import datasets

    path = Path(name)
    if path.is_dir() and any((path / mark).exists() for mark in ("state.json", "dataset_dict.json")):
        data = datasets.load_from_disk(name)
        return data[options["split"]] if isinstance(data, datasets.DatasetDict) else data
    files = sorted(map(str, path.rglob("*.*"))) if path.is_dir() else [name]
    for kind in ("parquet", "arrow"):
        chosen = [file for file in files if file.endswith(f".{kind}")]
        if path.exists() and chosen:
            return datasets.load_dataset(kind, data_files=chosen, split="train", streaming=True)
    require(not path.exists(), f"source: {name} holds neither Parquet nor Arrow files")
    config = options["config"] or None
    return datasets.load_dataset(name, config, split=options["split"], streaming=bool(options["streaming"]))


class Shards:
    """WebDataset tar shards in the order of their expanded names."""

    classes: tuple[str, ...] | None = None

    def __init__(self, pattern: str) -> None:
        try:
            import braceexpand
            import webdataset  # noqa: F401
        except ImportError:
            raise InputError("source: wds needs pip install 'pixel-meanflow[data]'") from None
        self.urls = list(braceexpand.braceexpand(pattern))
        for url in self.urls:
            local = "://" not in url and not url.startswith("pipe:")
            require(not local or Path(url).is_file(), f"source: there is no shard {url}")
        self.fingerprint = _digest(*self.urls)

    def samples(self, start: int = 0) -> Iterator[Sample]:
        """The entries in order; what lies before `start` is read past."""
        import webdataset

        rows = webdataset.WebDataset(self.urls, shardshuffle=False, empty_check=False)
        try:
            for row in itertools.islice(rows, start, None):
                data = next((row[kind] for kind in WDS_IMAGES if kind in row), None)
                yield Sample(row["__key__"], data, _label(row))
        except Exception as error:
            raise InputError(f"source: cannot read the shards: {str(error).strip().splitlines()[0]}") from error


def _label(row: dict) -> int | None:
    """The label of a WebDataset entry: its cls, or "label" in its json; None where there is none."""
    try:
        return int(row["cls"]) if "cls" in row else int(json.loads(row["json"])["label"])
    except (KeyError, ValueError, TypeError):
        return None
