"""Fréchet distances in several feature spaces: what a run was post-trained on, beside what it was not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pmf.errors import InputError, reading, require
from pmf.feature_networks import NETWORKS, SpaceExtractor, feature_network, network_name
from pmf.metrics import INCEPTION_FEATURES, Statistics, frechet_distance
from pmf.train.config import ExtractionConfig, MeasurementConfig
from pmf.train.distributed import World
from pmf.train.evaluation.measurement import Measurement
from pmf.train.evaluation.reference import Pictures, pictures_digest, warn_of_few, write_folder_statistics


def spaces_of(config: MeasurementConfig) -> dict[str, str]:
    """Network name -> spec of the spaces to measure: `config.networks`, else all whose statistics the reference has."""
    assert config.reference is not None
    files = sorted(file.stem for file in config.reference.glob("*.npz") if not file.name.startswith("."))
    return named(config.networks or files)


def named(specs: Sequence[str]) -> dict[str, str]:
    """Network name -> spec. Errors: `InputError` on unknown and repeated names."""
    found: dict[str, str] = {}
    for spec in specs:
        name = network_name(spec)
        require(name in NETWORKS, f"networks: expected some of {', '.join(NETWORKS)}, got {spec!r}")
        require(name not in found, f"networks: expected each network once, got {name} twice")
        found[name] = spec
    return found


def write_statistics(
    pictures: Pictures, out: Path, specs: Sequence[str], world: World, config: ExtractionConfig, *, keep: bool
) -> None:
    """Write the statistics of these images in the space of each network, in float32: NAME.npz in the directory `out`.

    Files get their names once all are complete, so that an interrupted call resumes with the network it was at.
    Errors: `InputError` if `out` is a file, or on images of several sizes in the space of pixels.
    """
    networks = named(specs)
    with reading("out", out):
        folder = not out.exists() or out.is_dir()
    require(folder, f"out: {out} is a file, expected a directory for one npz per network")
    side = world.main_first(pictures.side) if "pixels" in networks else None
    one_size = "pixels" not in networks or side is not None
    require(one_size, "folder: expected squares of one size for the network pixels, got others")
    written: dict[str, tuple[Path, str]] = {}
    for name, spec in networks.items():
        network = feature_network(spec, device=world.device)
        warn_of_few(world, "folder", pictures.count, network.width or 3 * (side or 1) ** 2)
        extractor = SpaceExtractor(network)
        kept = "-features" if keep else ""
        part = out / f".{name}-{pictures_digest(pictures, extractor)}{kept}.npz"
        write_folder_statistics(pictures, part, extractor, world, config, keep=keep, again=False)
        written[name] = part, network.space
    for name, (part, space) in written.items():
        file = out / f"{name}.npz"
        world.main_first(partial(_publish, part, file))
        world.say(f"wrote {file}: statistics of {pictures.count} images, {space}")


def _publish(part: Path, file: Path) -> None:
    """Give the statistics their name, unless another process that computed the same has done so."""
    try:
        part.replace(file)
    except FileNotFoundError:
        require(file.is_file(), f"out: {file} was removed meanwhile, expected it to stay")


class SpacesMeasurement:
    """Compares generated images with the statistics of real ones in every space of a directory.

    `config.networks` chooses among the directory's statistics, and says where weights come from; by default all are
    measured with published weights. Everything is loaded and checked first. Errors: `InputError` on statistics that are
    missing or unreadable, or of another network, width or image size.
    """

    def __init__(self, config: MeasurementConfig, out: Path, world: World) -> None:
        folder = config.reference
        assert folder is not None
        self.measurements: dict[str, Measurement] = {}
        for name, spec in world.main_first(lambda: spaces_of(config)).items():  # one listing for all processes
            given = load_statistics(folder, name, "reference")  # before the network, which may have to be downloaded
            extractor = SpaceExtractor(feature_network(spec, device=world.device))
            one = replace(config, reference=folder / f"{name}.npz", resize=None)
            made = Measurement(one, out, world, lambda resize, made=extractor: made, network=name, given=given)
            self.measurements[name] = made
        references = {name: one.reference()[0] for name, one in self.measurements.items()}
        self.world, self.floors = world, floors(config.held_out, references, world)
        self._warned = False

    def __iter__(self) -> Iterator[Measurement]:
        return iter(self.measurements.values())

    def fdr(self, lines: list[dict[str, Any]]) -> dict[str, float]:
        """FDr by network, empty without held-out images.

        FDr = FD(generated, reference) / FD(held out, reference): 1 is as far from the reference as other real images.
        """
        distances = _distances(lines)
        for name, floor in self.floors.items():
            generated = next(line["images"] for line in lines if line["network"] == name)
            if floor.images not in (None, generated) and not self._warned:
                self._warned = True
                self.world.warn(f"held_out: {floor.images:,} images, but {generated:,} are generated; {EQUAL}")
        return {name: distances[name] / floor.distance for name, floor in self.floors.items()}

    def summary(self, head: dict[str, Any], lines: list[dict[str, Any]], trained: Sequence[str]) -> dict[str, Any]:
        """The distances in the spaces that a run was trained on and in the others; with held-out images also FDr."""
        groups = {"trained_on": True, "not_trained_on": False}
        found = {
            group: {name: value for name, value in _distances(lines).items() if (name in trained) == member}
            for group, member in groups.items()
        }
        return head | found | ({"fdr": self.fdr(lines)} if self.floors else {})


def _distances(lines: list[dict[str, Any]]) -> dict[str, float]:
    return {line["network"]: line["fid" if "fid" in line else "frechet_distance"] for line in lines}


def load_statistics(folder: Path, name: str, argument: str) -> Statistics:
    """NAME.npz of a directory, which `argument` names.

    Errors: `InputError` if it is missing or unreadable, or, for inception, of another resize or width than that of the
    feature network, which need not be loaded to know.
    """
    file = folder / f"{name}.npz"
    with reading(argument, file):
        require(file.is_file(), f"{argument}: {folder} has no {name}.npz, expected statistics in the space of {name}")
    try:
        found = Statistics.load(file)
    except InputError as error:
        raise InputError(f"{argument}: {str(error).removeprefix('reference: ')}") from error
    if name == "inception":
        resize, width = found.resize or "tf1", len(found.mu)
        require(resize == "tf1", f"{argument}: {file}: expected mu and sigma, of the tf1 resize, got those of {resize}")
        require(width == INCEPTION_FEATURES, f"{argument}: {file}: expected {INCEPTION_FEATURES} features, got {width}")
    return found


EQUAL = "FDr is too low with fewer held-out images, too high with more"


class Floor(NamedTuple):
    """What FDr is measured by."""

    distance: float
    """FD of held-out real images to the reference."""
    images: int | None
    """How many they are."""


def floors(held_out: Path | None, references: Mapping[str, Statistics], world: World) -> dict[str, Floor]:
    """FD of held-out real images to the reference by network, over which FDr is taken; empty without them."""
    if held_out is None:
        return {}
    return {name: _floor(held_out, name, reference, world) for name, reference in references.items()}


def _floor(held_out: Path, name: str, reference: Statistics, world: World) -> Floor:
    found, where = load_statistics(held_out, name, "held_out"), f"held_out: {held_out / name}.npz"
    warn_of_few(world, "held_out", found.count, len(found.mu))
    try:
        distance = frechet_distance(found, reference)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    # Equal statistics of few images have a distance that is rounding, and not zero.
    equal = np.array_equal(found.mu, reference.mu) and np.array_equal(found.sigma, reference.sigma)
    require(not equal, f"{where}: expected other images than the reference's, got the same statistics")
    require(distance > 0, f"{where}: expected a positive distance to the reference, got {distance}")
    return Floor(distance, found.count)
