"""FID, Inception score, precision and recall of a network against a reference. No set of images is measured twice."""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pmf
from pmf.errors import InputError, require
from pmf.features import SPLITS, Chunks, Extractor, Source, quality
from pmf.images import save_png, to_bytes
from pmf.metrics import INCEPTION_FEATURES, INCEPTION_SIZE, NEIGHBOURS, Resize, Statistics, inception
from pmf.sampling import seeds_from
from pmf.train.config import MeasurementConfig
from pmf.train.distributed import World
from pmf.train.evaluation.lock import alone
from pmf.train.evaluation.reference import (
    Pictures,
    compute_together,
    open_pictures,
    pictures_digest,
    warn_of_few,
    write_folder_statistics,
)
from pmf.train.evaluation.results import Results, digest, extractor_digest, network_digest
from pmf.train.stop_signals import Stopped, never
from pmf.weights import weights_digest

Score = Callable[..., dict[str, float]]
Draw = Callable[[list[int], list[int]], Tensor]
"""(labels, seeds) -> images [n, c, H, W] in [-1, 1]."""
MakeExtractor = Callable[..., Extractor]
"""Keyword argument `resize` -> extractor."""
NO_REFERENCE = "reference: expected a folder of images or an npz of statistics, got none"
DEMOS = ("digits", "photographs")


def image_count(config: MeasurementConfig, network: pmf.ModelConfig, name: str) -> int:
    """Number of images to draw from a network. Errors: `InputError` if too few, or not of 1 or 3 channels."""
    channels, count = network.in_channels, config.per_class * network.num_classes
    require(channels in (1, 3), f"{name}: expected images of 1 or 3 channels, got {channels}")
    require(count >= SPLITS, f"per_class: expected at least {SPLITS} images in all, got {count}")
    return count


def demo_score(network: pmf.ModelConfig, data: str | None, world: World) -> Callable[..., dict[str, float]]:
    """The score of `pmf.train.demo.scores` for a network trained on `data`: digits or photographs.

    If the training data are unknown, image shape and ten classes tell, with a warning. Errors: `InputError` on any
    other network: it needs a reference.
    """
    from pmf.train.demo.scores import evaluate_digits, evaluate_photographs

    require(data in (None, *DEMOS), f"{NO_REFERENCE}; only digits and photographs do without, this is of {data}")
    score = _score_by_shape(network, evaluate_digits, evaluate_photographs)
    name = DEMOS[score is evaluate_photographs]
    require(data in (None, name), f"{NO_REFERENCE}; images of this shape are no {data}")
    if data is None:
        world.warn(f"source: its training data are unknown; scored as {name}, by the shape of its images")
    return score


def _score_by_shape(network: pmf.ModelConfig, evaluate_digits: Score, evaluate_photographs: Score) -> Score:
    if network.num_classes == 10 and network.image_shape == (1, 8, 8):
        return evaluate_digits
    colour = network.num_classes == 10 and network.in_channels == 3 and network.image_size <= 64
    require(colour, NO_REFERENCE)
    return evaluate_photographs


class Measurement:
    """Compares generated images with a reference, by an extractor and a resize common to both.

    The resize is the configured one, else that of the reference's statistics, else (for a folder) tf1. Results and
    unfinished features are kept in `out`. `make_extractor` replaces Inception, `network` is its name in results;
    `given` are the statistics that the configured reference holds, if they are loaded.
    Errors: `InputError` on a reference that is missing, unreadable or of another number of features.
    """

    def __init__(
        self,
        config: MeasurementConfig,
        out: Path,
        world: World,
        make_extractor: MakeExtractor | None = None,
        *,
        network: str | None = None,
        given: Statistics | None = None,
    ) -> None:
        self.config, self.out, self.world = config, out, world
        self.label = {} if network is None else {"network": network}
        self.results = Results(out)
        path = config.reference
        if path is None:
            raise InputError(NO_REFERENCE)
        self._pictures = open_pictures(path, "reference") if path.is_dir() else None
        if self._pictures is None and given is None:
            given = Statistics.load(path)
        _check_enough(self._pictures, given)
        self.resize: Resize = config.resize or (given and given.resize) or "tf1"
        if make_extractor is None:
            if given is not None:  # before the network is loaded, or downloaded
                _check_width(given, INCEPTION_FEATURES)
            make_extractor = partial(inception, config.inception, device=world.device)
        self.extractor = make_extractor(resize=self.resize)
        self.space: str | None = getattr(self.extractor, "space", None)
        self._warned = False
        self._extractor_digest = extractor_digest(self.extractor)
        self._reference: tuple[Statistics, str] | None = None
        if given is not None:
            self._take(given, path)

    def _take(self, statistics: Statistics, file: Path) -> None:
        space = self.space or f"inception {self.resize} {INCEPTION_SIZE} {weights_digest(self.extractor)}"
        _check_space(statistics, space, file)
        side = statistics.image_size or 32
        blank = torch.zeros(1, 3, side, side, dtype=torch.uint8, device=self.world.device)
        _check_width(statistics, self.extractor(blank)[0].shape[1])
        named = hashlib.sha256(file.read_bytes()).hexdigest()[:32]
        known = replace(statistics, resize=self.resize, space=self.space or statistics.space)
        if not self.world.main:  # which alone computes results
            known = replace(known, features=None)
        self._reference = known, named

    def reference(self, stopping: Callable[[], bool] = never) -> tuple[Statistics, str]:
        """The reference and a digest of its content. A folder's statistics are computed once and kept in `out`.

        Errors: `Stopped`, in every process, once `stopping` holds in one.
        """
        if self._reference is None and self._pictures is not None:
            file = self.out / f"reference-{pictures_digest(self._pictures, self.extractor)}.npz"
            if not self.world.broadcast(file.is_file()):
                write = partial(write_folder_statistics, keep=True, again=False, stopping=stopping)
                write(self._pictures, file, self.extractor, self.world, self.config)
            self._take(Statistics.load(file), file)
        assert self._reference is not None
        return self._reference

    @property
    def known(self) -> bool:
        """Whether the statistics of the reference are known, and need not be computed."""
        return self._reference is not None

    def key(self, *images: object) -> str:
        """A name for the result of the images that these values determine."""
        return digest(*images, self._extractor_digest, self.reference()[1])

    def result(self, chunks: Chunks, head: dict[str, Any], key: str) -> dict[str, Any]:
        """The result of the finished chunks, which is stored."""
        kind = {"resize": self.resize} if self.space is None else {"space": self.space}
        against = {"reference": str(self.config.reference), **kind}
        line = {**head, **against, **quality(chunks, self.reference()[0], self.world.device), "key": key}
        self.results.append(line)
        return line

    def check_size(self, image_size: int, stopping: Callable[[], bool] = never) -> None:
        """Raise `InputError` if the reference is known to be of images of another size."""
        got = self.reference(stopping)[0].image_size
        good = got in (None, image_size)
        require(good, f"reference: expected images of {image_size} pixels, as the samples, got {got}")

    def warn(self, count: int, image_size: int) -> None:
        """Warn, once, of sets of images that are too small or of other sizes."""
        if not self._warned:
            self._warned, statistics = True, self.reference()[0]
            warn_of_few(self.world, "per_class", count, len(statistics.mu))
            warn_of_few(self.world, "reference", statistics.count, len(statistics.mu))
            if self._pictures is not None:
                self._pictures.warn_of_sizes(self.world, image_size)


def _whole(line: dict[str, Any] | None) -> dict[str, Any] | None:
    """A stored result, unless it has lost its numbers."""
    numbers = [] if line is None else [line[name] for name in ("fid", "frechet_distance") if name in line]
    return line if numbers and all(isinstance(x, int | float) and math.isfinite(x) for x in numbers) else None


def measure(
    measurements: Sequence[Measurement],
    network: pmf.PMFDiT,
    draw: Draw,
    head: dict[str, Any],
    settings: dict[str, Any],
    *,
    seed: int,
    dtype: str,
    images: Path | None = None,
    stopping: Callable[[], bool] = never,
) -> list[dict[str, Any]]:
    """Return the results for a network's images at these settings, one a measurement: read if known, else computed.

    The images are drawn once for all measurements, which have one configuration but for the reference. Every process
    must call, and gets the same results. An interrupted call resumes when repeated. `head`: values to add to a result.
    `images`: a directory in which to keep the images as PNGs, one folder per key; missing ones are drawn again. Errors:
    `Stopped`, in every process, once `stopping` holds in one; what is computed is kept.
    """
    config, world, out = measurements[0].config, measurements[0].world, measurements[0].out
    count, side = image_count(config, network.config, "source"), network.config.image_size
    seeds_from(seed, count)
    for measurement in measurements:
        measurement.check_size(side, stopping)
        measurement.warn(count, side)
    shown = (network_digest(network), settings, config.per_class, seed, dtype)
    more = {**settings, "images": count, "seed": seed, "dtype": dtype}
    asked = [_Asked(each, each.key(*shown), {**head, **each.label, **more}) for each in measurements]
    folder = images and images.with_name(f"{images.name}-{asked[0].key[:8]}")
    with _alone([out / f".{one.key}.lock" for one in asked], world, stopping):
        known = world.main_first(lambda: [_whole(one.measurement.results.find(one.key)) for one in asked])
        rest = [one for one, line in zip(asked, known, strict=True) if line is None]
        spans = world.main_first(lambda: _missing(asked[0].chunks.spans(), rest, folder))
        if spans:
            sets = [(one.chunks, one.measurement.extractor) for one in rest]
            source = _source(draw, config.per_class, seed, folder)
            compute_together(sets, spans, source, world, config.batch_size, stopping)
        found = world.main_first(lambda: [line or one.result() for line, one in zip(known, asked, strict=True)])
        for one in asked:
            one.chunks.remove()
    # Equal weights share a result, each under its own name.
    return [line | one.head for line, one in zip(found, asked, strict=True)]


@dataclass(frozen=True)
class _Asked:
    """A result that is asked for: its key, and what it says besides the numbers."""

    measurement: Measurement
    key: str
    head: dict[str, Any]

    @property
    def chunks(self) -> Chunks:
        """The features on disk."""
        size = self.measurement.config.chunk
        return Chunks(self.measurement.out / f".{self.key}-{size}", self.head["images"], size)

    def result(self) -> dict[str, Any]:
        """The result, from finished chunks."""
        return self.measurement.result(self.chunks, self.head, self.key)


@contextlib.contextmanager
def _alone(files: Sequence[Path], world: World, stopping: Callable[[], bool]) -> Iterator[None]:
    """Hold all of these lock files, taken in one order by all evaluations so that no two wait for each other."""
    with contextlib.ExitStack() as stack:
        for file in sorted(files):
            if not stack.enter_context(alone(file, world, stopping)):
                raise Stopped
        yield


def _missing(spans: list[range], asked: Sequence[_Asked], folder: Path | None) -> list[range]:
    """The spans of images some of whose features are not on disk, or some of whose pictures are not in the folder."""
    return [
        span
        for span in spans
        if not all(one.chunks.file(span).is_file() for one in asked)
        or (folder is not None and not all(_png(folder, i).is_file() for i in span))
    ]


def _source(draw: Draw, per_class: int, seed: int, folder: Path | None) -> Source:
    """Image i shows class i // per_class and has seed `seed` + i."""

    def images(batch: range) -> Iterator[Tensor]:
        labels, seeds = [i // per_class for i in batch], [seed + i for i in batch]
        pixels = to_bytes(draw(labels, seeds).float()).expand(-1, 3, -1, -1)
        if folder is not None:
            for i, image in zip(batch, pixels.permute(0, 2, 3, 1).cpu().numpy(), strict=True):
                save_png(_png(folder, i), image)
        yield pixels

    return images


def _check_enough(pictures: Pictures | None, given: Statistics | None) -> None:
    """Refuse at the start what precision and recall would refuse in the end."""
    features = given.features if given is not None else None
    count = pictures.count if pictures is not None else None if features is None else len(features)
    enough = count is None or count > NEIGHBOURS
    require(enough, f"reference: expected more than {NEIGHBOURS} images, for precision and recall, got {count}")


def _check_space(statistics: Statistics, space: str, file: Path) -> None:
    """Refuse statistics that are known to be of another space."""
    got = statistics.space
    require(got in (None, space), f"reference: {file}: expected features of {space}, got {got}")


def _check_width(statistics: Statistics, width: int) -> None:
    got = len(statistics.mu)
    require(got == width, f"reference: expected statistics of {width} features, got {got}")


def _png(folder: Path, index: int) -> Path:
    return folder / f"{index:06d}.png"
