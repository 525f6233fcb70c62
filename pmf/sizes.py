"""Sizes that an input declares, checked before memory or disk is taken for them."""

from __future__ import annotations

from pmf.errors import require

FLOOR = 2**30
"""Bytes that any input may declare."""
RATIO = 100
"""Beyond that: declared bytes per byte of the input. Weights and features hardly compress."""


def check_declared(what: str, declared: int, stored: int) -> None:
    """Raise `InputError` if an input of `stored` bytes declares implausibly many bytes of content."""
    good = declared <= max(FLOOR, RATIO * stored)
    require(good, lambda: f"{what} declares {declared / 1e9:.3g} GB of content, but holds {stored:,} bytes")
