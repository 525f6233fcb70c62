"""What an input is and declares, checked before memory, disk or time is taken for it."""

from __future__ import annotations

from pathlib import Path

from pmf.errors import check_path, reading, require

FLOOR = 2**30
"""Bytes that any input may declare."""
RATIO = 100
"""Beyond that: declared bytes per byte of the input. Weights and features hardly compress."""


def check_declared(what: str, declared: int, stored: int) -> None:
    """Raise `InputError` if an input of `stored` bytes declares implausibly many bytes of content."""
    good = declared <= max(FLOOR, RATIO * stored)
    require(good, lambda: f"{what} declares {declared / 1e9:.3g} GB of content, but holds {stored:,} bytes")


def check_is_file(argument: str, path: str | Path) -> None:
    """Raise `InputError` for a pipe or a device, which may never end, and unless a path can be looked up."""
    check_path(argument, path)
    with reading(argument, path):
        require(not is_endless(Path(path)), lambda: f"{argument}: {path} is a pipe or a device, expected a file")


def is_endless(path: Path) -> bool:
    """Whether a path is a pipe or a device. What is not there, or is a folder, opening it will tell."""
    return path.exists() and not path.is_file() and not path.is_dir()
