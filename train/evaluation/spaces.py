"""Fréchet distances in several feature spaces: what a run was post-trained on, beside what it was not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from pmf.errors import InputError, require
from pmf.feature_networks import NETWORKS, SpaceExtractor, feature_network, network_name
from pmf.metrics import INCEPTION_FEATURES, Statistics, frechet_distance
from pmf.train.config import ExtractionConfig, MeasurementConfig
from pmf.train.distributed import World
from pmf.train.evaluation.measurement import Measurement
from pmf.train.evaluation.reference import Pictures, pictures_digest, warn_of_few, write_folder_statistics


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
    require(not out.exists() or out.is_dir(), f"out: {out} is a file, expected a directory for one npz per network")
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
        world.main_first(partial(part.replace, file))
        world.say(f"wrote {file}: statistics of {pictures.count} images, {space}")


class SpacesMeasurement:
    """Compares generated images with the statistics of real ones in every space of a directory.

    `config.networks` chooses among the directory's statistics, and says where weights come from; by default all are
    measured with published weights. Everything is loaded and checked first. Errors: `InputError` on statistics that are
    missing or unreadable, or of another network, width or image size.
    """

    def __init__(self, config: MeasurementConfig, out: Path, world: World) -> None:
        folder = config.reference
        assert folder is not None
        files = sorted(file.stem for file in folder.glob("*.npz") if not file.name.startswith("."))
        specs = named(config.networks or files)
        self.measurements: dict[str, Measurement] = {}
        self.floors: dict[str, float] = {}
        for name, spec in specs.items():
            file = _file(folder, name, "reference")
            _check_inception(name, file)
            extractor = SpaceExtractor(feature_network(spec, device=world.device))
            one = replace(config, reference=file)
            made = Measurement(one, out, world, lambda resize, made=extractor: made, network=name)
            self.measurements[name] = made
            if config.held_out is not None:
                self.floors[name] = _floor(name, config.held_out, made)

    def __iter__(self) -> Iterator[Measurement]:
        return iter(self.measurements.values())

    def fdr(self, lines: list[dict[str, Any]]) -> dict[str, float]:
        """FDr by network, empty without held-out images.

        FDr = FD(generated, reference) / FD(held out, reference): 1 is as far from the reference as other real images.
        """
        distances = _distances(lines)
        return {name: distances[name] / floor for name, floor in self.floors.items()}

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


def _file(folder: Path, name: str, argument: str) -> Path:
    file = folder / f"{name}.npz"
    require(file.is_file(), f"{argument}: {folder} has no {name}.npz, expected statistics in the space of {name}")
    return file


def _check_inception(name: str, file: Path) -> None:
    """Refuse, before a network is loaded, what no resize of a feature network gives."""
    if name == "inception":
        known = Statistics.load(file)
        got = known.resize
        require(got == "tf1", f"reference: {file}: expected mu and sigma, of the tf1 resize, got those of {got}")
        width = len(known.mu)
        require(width == INCEPTION_FEATURES, f"reference: {file}: expected {INCEPTION_FEATURES} features, got {width}")


def _floor(name: str, held_out: Path, measurement: Measurement) -> float:
    """The distance between held-out real images and the reference."""
    file = _file(held_out, name, "held_out")
    statistics, reference = Statistics.load(file), measurement.reference()[0]
    try:
        distance = frechet_distance(statistics, reference)
    except InputError as error:
        raise InputError(f"held_out: {file}: {error}") from None
    require(distance > 0, f"held_out: {file}: expected other images than the reference's, got a distance of {distance}")
    return distance
