"""Sources of pictures: class folders, Hugging Face data sets and WebDataset shards, each read in a fixed order."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pmf.errors import extra, printable, reading, require
from pmf.pictures import is_folder, is_litter, is_picture, leads_up, read_file, walk
from pmf.train.data import tars
from pmf.train.data.hugging_face import open_hugging_face
from pmf.train.data.samples import Sample, Source, digest, listed

log = logging.getLogger(__name__)

FORMS = "folder:PATH, hf:NAME or hf:PATH (with ?split=train&image=image&label=label), wds:PATTERN"


def open_source(spec: str) -> Source:
    """Open the source that `spec` names.

    - ``folder:PATH``: one directory per class, pictures anywhere below; labels follow the sorted names.
    - ``hf:NAME`` or ``hf:PATH``: a Hugging Face data set on the hub, in Parquet or Arrow files, or written by
      `save_to_disk`; options after ``?``: split, image, label (columns), config, streaming=1.
    - ``wds:PATTERN``: WebDataset tar shards, braces expanded; entries jpg, png, ... with cls, or json with "label".

    Errors: `InputError` for an unknown form, a missing package, or a source that cannot be opened.
    """
    kind, _, rest = spec.partition(":")
    forms = {"folder": _folder, "hf": open_hugging_face, "wds": _web_dataset}
    require(kind in forms and rest != "", f"source: expected {FORMS}; got {spec!r}")
    with reading("source", rest), extra("data", f"source: {kind} needs"):
        return forms[kind](rest)


def _folder(path: str) -> Source:
    """Open a folder with one directory per class.

    `imagefolder` of datasets will not do: it takes a class called train for a split and drops the other classes, and
    it drops all labels where directories differ in depth.
    """
    root = Path(path)
    require(root.is_dir(), f"source: {root} is not a directory")
    top, real = sorted(os.scandir(root), key=lambda entry: entry.name), os.path.realpath(root)
    classes = [
        e.name for e in top if is_folder(e) and not is_litter(e.name) and not leads_up(os.path.realpath(e), (real,))
    ]
    require(len(classes) > 0, f"source: {root} holds no class directories")
    found = [(name, label, entry) for label, part in enumerate(classes) for name, entry in _files(root, part)]
    pictures = [(name, label, listed(entry)) for name, label, entry in found if is_picture(name)]
    others = [name for name, _, _ in found if not is_picture(name)]
    _warn(root, others, "that do not have names of pictures")
    beside = [e.name for e in top if not is_folder(e) and is_picture(e.name) and not is_litter(e.name)]
    _warn(root, beside, "beside the class directories")
    empty = sorted({*range(len(classes))} - {label for _, label, _ in pictures})
    if empty:
        log.warning("%s: %d classes hold no pictures, first %s", root, len(empty), printable(classes[empty[0]]))
    require(len(pictures) > 0, f"source: {root} holds no pictures in its class directories")

    def read_from(start: int) -> Iterator[Sample]:
        return (Sample(printable(name), root / name, label) for name, label, _ in pictures[start:])

    return Source(read_from, digest((*classes, *pictures)), tuple(classes), root)


def _warn(root: Path, names: list[str], what: str) -> None:
    if names:
        log.warning("%s: left out %d files %s, first %s", printable(root), len(names), what, printable(names[0]))


def _files(root: Path, part: str) -> list[tuple[str, os.DirEntry]]:
    """All files below root/part but litter, by their paths relative to root, sorted."""
    above = (os.path.realpath(root), os.path.realpath(root / part))
    found = ((Path(entry.path).relative_to(root).as_posix(), entry) for entry in walk(root / part, above))
    return sorted(found, key=lambda pair: pair[0])


def _web_dataset(pattern: str) -> Source:
    """Open tar shards: `datasets` takes the first entries' columns for all, and loses jpg beside png."""
    urls = tars.expand(pattern)
    local = [Path(url) for url in urls if tars.is_local(url)]
    for file in local:
        require(file.is_file(), f"source: there is no shard {printable(file)}")

    def read_from(start: int) -> Iterator[Sample]:
        for row in tars.rows(urls, start):
            picture: Any = next((row[kind] for kind in tars.PICTURES if kind in row), None)
            yield Sample(printable(row["key"]), picture, _label(row))

    classes = _classes_beside(local[0]) if local else ()
    sizes = [listed(str(file)) for file in local]
    return Source(read_from, digest((*urls, *sizes, *classes)), classes)


def _classes_beside(shard: Path) -> tuple[str, ...]:
    """Class names from dataset.json, which earlier versions wrote beside their tar shards; none if it is another's."""
    file = shard.with_name("dataset.json")
    if not file.is_file():
        return ()
    try:
        names = json.loads(read_file(file)).get("classes", [])
        whole = isinstance(names, list) and all(isinstance(name, str) for name in names)
    except (OSError, ValueError, RecursionError, AttributeError):
        whole = False
    require(whole, f'source: {printable(file)}: expected {{"classes": [names]}}; mend it or move it away')
    return tuple(names)


def _label(row: dict[str, Any]) -> int | None:
    """The label of a WebDataset entry: its cls, or "label" in its json; None if it has no whole number there."""
    try:
        if "cls" in row:
            return int(row["cls"])
        value = json.loads(row["json"])["label"]
        return int(value) if isinstance(value, str) or value == int(value) else None
    except (KeyError, ValueError, TypeError, OverflowError, RecursionError):
        return None
