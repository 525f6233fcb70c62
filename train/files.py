"""Files that are written whole or not at all, and records in files of JSON lines."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from pmf.checkpoint import write_atomically

__all__ = ["read_json_lines", "write_atomically"]


def read_json_lines(file: Path) -> list[dict[str, Any]]:
    """The records of a file of JSON lines, none if it does not exist. Lines torn by a crash are skipped."""
    records = []
    for line in file.read_text().splitlines() if file.is_file() else ():
        with contextlib.suppress(json.JSONDecodeError):
            records.append(json.loads(line))
    return records
