"""Results of evaluations: the lines of results.jsonl, each found again by the key of what was measured."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from pmf.errors import InputError
from pmf.train.run_directory import read_json_lines

RESULTS_FILE = "results.jsonl"


class Results:
    """The results in a directory."""

    def __init__(self, directory: Path) -> None:
        self.file = directory / RESULTS_FILE

    def find(self, key: str, **values: object) -> dict[str, Any] | None:
        """The last line of that key that has these values; None if there is none."""
        wanted = {"key": key, **values}
        found = [line for line in read_json_lines(self.file) if wanted.items() <= line.items()]
        return found[-1] if found else None

    def append(self, line: dict[str, Any]) -> None:
        """Append a line in one write, behind the lines of others, and flush it to the disk.

        Errors: `InputError` when it cannot be written.
        """
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with open(self.file, "ab+") as file:
                file.seek(max(0, file.tell() - 1))
                torn = file.read() not in (b"", b"\n")  # by a crash: leave it on a line of its own
                file.write(b"\n" * torn + json.dumps(line).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise InputError(f"out: cannot write {self.file}: {error.strerror}") from error
