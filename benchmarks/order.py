"""The order of importance: what a measurement of everything takes first. Time ends it somewhere."""

from __future__ import annotations

from dataclasses import dataclass

LONG_ATTENTION = "attention beyond pMF"
"""Stands for a preset in the job of attention at other lengths."""
BATCHES = {"steps": 128, "sampling": 128, "ops": 128, "memory": 0}
COARSE = ("pMF-B/16", "pMF-L/16", "pMF-H/16")
FINE = ("pMF-B/32", "pMF-L/32", "pMF-H/32")


@dataclass(frozen=True)
class Part:
    """A suite of one preset, or a few of its providers."""

    suite: str
    size: str
    batch: int
    group: str = ""
    """Of a step's providers these alone (`steps.group_of`): eager, compiled or backends; "": all."""


EVERYTHING = (
    Part("steps", "pMF-B/16", 64, "eager"),
    Part("steps", "pMF-B/16", 128, "eager"),
    Part("ops", "pMF-B/16", 128),
    Part("sampling", "pMF-B/16", 128),
    Part("steps", "pMF-B/16", 128, "backends"),
    Part("steps", "pMF-B/16", 64, "compiled"),
    Part("steps", "pMF-L/16", 64, "eager"),
    Part("steps", "pMF-H/16", 64, "eager"),
    Part("ops", "pMF-H/16", 128),
    Part("ops", LONG_ATTENTION, 1),
    Part("memory", "pMF-B/16", 0),
    Part("steps", "pMF-B/16", 128, "compiled"),
    Part("sampling", "pMF-H/16", 128),
    Part("memory", "pMF-H/16", 0),
    Part("ops", "pMF-L/16", 128),
    Part("sampling", "pMF-L/16", 128),
    Part("memory", "pMF-L/16", 0),
    Part("steps", "pMF-L/16", 64, "compiled"),
    Part("steps", "pMF-H/16", 64, "compiled"),
    # An op has the same shapes at 32 pixels a patch, but for the two that touch images.
    *(Part("steps", size, 64, "eager") for size in FINE),
    *(Part("sampling", size, 128) for size in FINE),
    *(Part("memory", size, 0) for size in FINE),
)
"""What `gpu` measures, most important first."""


OF_A_PRESET = (
    ("steps", "eager"),
    ("sampling", ""),
    ("ops", ""),
    ("memory", ""),
    ("steps", "backends"),
    ("steps", "compiled"),
)
"""The same of one preset: suite, and group of its providers."""


def parts_of(suite: str, sizes: tuple[str, ...], batch: int | None) -> list[Part]:
    """What a command asks for: one suite, or all ("gpu"); some presets, or all; a batch of its own, or the usual."""
    if suite == "gpu" and not sizes:
        return list(dict.fromkeys(Part(p.suite, p.size, batch or p.batch, p.group) for p in EVERYTHING))
    wanted = OF_A_PRESET if suite == "gpu" else ((suite, ""),)
    every = sizes or (*COARSE, *((LONG_ATTENTION,) if suite == "ops" else FINE))
    return [Part(suite, size, batch or BATCHES[suite], group) for size in every for suite, group in wanted]
