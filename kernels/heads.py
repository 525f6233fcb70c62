"""Queries, keys and values [B, S, H, D], and their strides, by name."""

from __future__ import annotations

from typing import Any, NamedTuple


class Steps(NamedTuple):
    """Strides between the samples, tokens and heads of one tensor."""

    sample: int
    token: int
    head: int


class Heads(NamedTuple):
    """Queries, keys and values, their tangents or gradients, or the `Steps` of each; in kernels, pointers."""

    q: Any
    k: Any
    v: Any
