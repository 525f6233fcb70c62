"""Files that are written whole or not at all."""

from __future__ import annotations

from pmf.checkpoint import write_atomically

__all__ = ["write_atomically"]
