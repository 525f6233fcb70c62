"""FID and its kin of images against a reference: each set is measured once, and is a line of a file."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch

from pmf.errors import InputError, require
from pmf.metrics import Resize, Statistics, frechet_distance, inception_score, precision_recall
from pmf.train.features import (
    Chunks,
    Extractor,
    Ranks,
    Source,
    digest,
    extractor_digest,
    file_digest,
    folder_identity,
    folder_statistics,
    pictures,
)

SPLITS = 10  # of the Inception score
RESULTS_FILE = "results.jsonl"


class Results:
    """The lines of results.jsonl in a directory. A line that a crash tore is passed over."""

    def __init__(self, directory: Path) -> None:
        self.file = directory / RESULTS_FILE

    def find(self, key: str, **named: object) -> dict | None:
        """The line of that key, named so, the last one; None where there is none."""
        found = None
        for text in self.file.read_text().splitlines() if self.file.is_file() else ():
            with suppress(ValueError, KeyError, TypeError):
                line = json.loads(text)
                if line["key"] == key and named.items() <= line.items():
                    found = line
        return found

    def append(self, line: dict) -> None:
        """One write behind what others may be writing, on a line of its own, down to the disk."""
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with open(self.file, "ab+") as file:
                file.seek(max(0, file.tell() - 1))
                torn = file.read() not in (b"", b"\n")
                file.write(b"\n" * torn + json.dumps(line).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise InputError(f"out: cannot write {self.file}: {error.strerror}") from error


class Measurement:
    """What generated images are held against: a reference, an extractor, and the resize that both agree in.

    The resize is the one asked for, else that of the reference's statistics, else (for a folder) tf1;
    `extractor_of(resize)` makes the extractor. Results, and what is unfinished, lie in `out`.
    Errors: `InputError` on a reference that is not there, cannot be read or has another number of features.
    """

    def __init__(
        self,
        path: Path,
        extractor_of: Callable[[Resize], Extractor],
        out: Path,
        ranks: Ranks,
        device: torch.device,
        *,
        resize: Resize | None = None,
        batch_size: int,
        chunk: int,
    ) -> None:
        self.path, self.out, self.ranks, self.device = path, out, ranks, device
        self.batch_size, self.chunk = batch_size, chunk
        self.results = Results(out)
        self._files = pictures(path) if path.is_dir() else []
        given = None if self._files else Statistics.load(path)
        self.resize: Resize = resize or (given and given.resize) or "tf1"
        self.extractor = extractor_of(self.resize)
        self._extractor_digest = extractor_digest(self.extractor)
        self._reference: tuple[Statistics, str] | None = None
        if given is not None:
            self._take(given, path)

    def _take(self, statistics: Statistics, file: Path) -> None:
        width = self.extractor(torch.zeros(1, 3, 32, 32, dtype=torch.uint8, device=self.device))[0].shape[1]
        got = len(statistics.mu)
        require(got == width, f"reference: expected statistics of {width} features, got {got}")
        self._reference = replace(statistics, resize=self.resize), file_digest(file)

    def reference(self) -> tuple[Statistics, str]:
        """The reference and a name for its content; the statistics of a folder are made once and kept in `out`."""
        if self._reference is None:
            file = self.out / f"reference-{folder_identity(self._files, self.extractor)}.npz"
            if not self.ranks.agree(file.is_file()):
                options = dict(batch_size=self.batch_size, chunk=self.chunk, keep=True)
                folder_statistics(self._files, file, self.extractor, self.ranks, **options)
            self._take(Statistics.load(file), file)
        assert self._reference is not None
        return self._reference

    def key(self, *images: object) -> str:
        """A name for what is measured: what the images depend on, the extractor, its resize and the reference."""
        return digest(*images, self._extractor_digest, self.reference()[1])

    def measure(
        self, key: str, count: int, source: Source, head: dict, kept: Callable[[range], bool] = lambda span: True
    ) -> dict:
        """The line of `count` images: read where it is written, else computed, `head` first; the same in all processes.

        Images that are not `kept` are made again. Interrupted, it continues when called again.
        """
        line = self.ranks.agree(self.results.find(key))
        chunks = Chunks(self.out / f".{key}-{self.chunk}", count, self.chunk)
        if line is None or not self.ranks.agree(kept(range(count))):
            chunks.compute(source, self.extractor, self.ranks, batch_size=self.batch_size, finished=kept)
        if line is None and self.ranks.rank == 0:
            line = {**head, "reference": str(self.path), "resize": self.resize, **self._metrics(chunks), "key": key}
            self.results.append(line)
        if self.ranks.rank == 0:
            chunks.remove()
        return self.ranks.agree(line)

    def _metrics(self, chunks: Chunks) -> dict[str, float | None]:
        """All four; precision and recall are None where the reference has no features."""
        reference, _ = self.reference()
        generated = replace(chunks.statistics(keep=True), resize=self.resize)
        score, deviation = inception_score(torch.cat(list(chunks.read("logits"))), splits=SPLITS)
        precision = recall = None
        if generated.features is not None and reference.features is not None:
            both = (torch.from_numpy(x).to(self.device) for x in (generated.features, reference.features))
            precision, recall = precision_recall(*both)
        return {
            "fid": frechet_distance(generated, reference),
            "inception_score": score,
            "inception_score_std": deviation,
            "precision": precision,
            "recall": recall,
        }


def check_count(count: int) -> None:
    """Enough images for every split of the Inception score."""
    require(count >= SPLITS, f"per_class: expected at least {SPLITS} images in all, got {count}")
