"""Results of evaluations: lines of results.jsonl, looked up by a key for what was measured."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pmf
from pmf.errors import InputError
from pmf.features import Extractor
from pmf.train.run_directory import json_lines
from pmf.weights import weights_digest


class Results:
    """The results in a directory."""

    def __init__(self, directory: Path) -> None:
        self.file = directory / "results.jsonl"

    def find(self, key: str, **values: object) -> dict[str, Any] | None:
        """The last line with this key and these values; None if there is none."""
        wanted = {"key": key, **values}
        lines = json_lines(self.file)
        found = [line for line in lines if all(line.get(name) == value for name, value in wanted.items())]
        return found[-1] if found else None

    def append(self, line: dict[str, Any]) -> None:
        """Append a line in one write, so that other writers' lines stay whole, and flush it to the disk.

        Errors: `InputError` when it cannot be written.
        """
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with open(self.file, "ab+") as file:
                file.seek(max(0, file.tell() - 1))
                torn = file.read() not in (b"", b"\n")  # by a crash: start a new line
                file.write(b"\n" * torn + json.dumps(line).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise InputError(f"out: cannot write {self.file}: {error.strerror}") from error


def digest(*parts: object) -> str:
    """Digest of these values' repr, 32 hexadecimal digits."""
    return hashlib.sha256("\n".join(map(repr, parts)).encode()).hexdigest()[:32]


def network_digest(network: pmf.PMFDiT) -> str:
    """Digest of a network: its configuration and its weights."""
    return digest(asdict(network.config), weights_digest(network))


def extractor_digest(extractor: Extractor) -> str:
    """Digest of an extractor: the space of its features, else its weights and its resize."""
    space = getattr(extractor, "space", None)
    return digest(space) if space else digest(weights_digest(extractor), extractor.resize)
