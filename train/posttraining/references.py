"""The feature networks of a post-training, and the statistics of real images in their spaces."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from pmf.errors import InputError, require
from pmf.feature_networks import FeatureNetwork, feature_network
from pmf.images import to_float
from pmf.metrics import Statistics, frechet_distance
from pmf.train.config import PosttrainConfig
from pmf.train.demo import digits

DIGITS = "digits"
AT_ONCE = 500
"""Images whose features are computed at a time."""


def open_networks(config: PosttrainConfig, device: torch.device) -> dict[str, FeatureNetwork]:
    """The networks by name. Errors: `InputError` on one that is unknown, missing, or not for such images."""
    dtype = torch.bfloat16 if config.feature_precision == "bfloat16" else torch.float32
    made = [_network(spec, config, device, dtype) for spec in config.features]
    networks = {network.name: network for network in made}
    if config.label_weight:
        known = {name: network.classes for name, network in networks.items() if network.classes is not None}
        wanted = config.model.num_classes
        fits = bool(known) and set(known.values()) == {wanted}
        require(fits, f"label_weight: expected a network with a classifier of {wanted} classes, got {known or 'none'}")
    return networks


def _network(spec: str, config: PosttrainConfig, device: torch.device, dtype: torch.dtype) -> FeatureNetwork:
    if spec == DIGITS:
        from pmf.train.demo.networks import digits_network

        shape = config.model.image_shape
        require(shape == (1, 8, 8), f"features: digits is for images of shape [1, 8, 8], got {list(shape)}")
        return digits_network(device)
    return feature_network(spec, device=device, dtype=dtype)


def open_references(config: PosttrainConfig, networks: Mapping[str, FeatureNetwork]) -> dict[str, Statistics]:
    """The statistics of real images by network: those of `reference`, or of the training digits.

    Errors: `InputError` if there are none, or if they are of another network or of images of another size.
    """
    if config.reference is None:
        require(config.data == DIGITS, "reference: expected a directory of statistics (pmf eval statistics), got none")
        return {name: _statistics_of_digits(network) for name, network in networks.items()}
    return read_statistics(config.reference, "reference", config, networks)


def read_statistics(
    folder: Path, argument: str, config: PosttrainConfig, networks: Mapping[str, FeatureNetwork]
) -> dict[str, Statistics]:
    """NAME.npz of every network in a folder, which `argument` names. Errors: see `open_references`."""
    require(folder.is_dir(), f"{argument}: expected a directory of statistics, got {folder}")
    return {name: _read(folder / f"{name}.npz", argument, config, network) for name, network in networks.items()}


def _read(file: Path, argument: str, config: PosttrainConfig, network: FeatureNetwork) -> Statistics:
    require(file.is_file(), f"{argument}: {file} does not exist, expected the statistics of {network.name}")
    try:
        found = Statistics.load(file)
    except InputError as error:
        raise InputError(f"{argument}: {str(error).removeprefix('reference: ')}") from error
    size, wanted = found.image_size, config.model.image_size
    resized = network.name != "inception" or found.resize in (None, "tf1")
    require(resized, f"{argument}: {file} has ref_mu and ref_sigma, of the half_pixel resize, expected mu and sigma")
    space = found.space in (None, network.space)
    require(space, f"{argument}: {file} was made by {found.space}, expected {network.space}")
    width = len(found.mu)
    expected = network.width or config.model.in_channels * wanted**2
    require(width == expected, f"{argument}: {file} has {width} features, expected {expected}")
    require(size in (None, wanted), f"{argument}: {file} is of images of {size} pixels, the network has {wanted}")
    return found


@torch.no_grad()
def _statistics_of_digits(network: FeatureNetwork) -> Statistics:
    images = to_float(digits()[0].images)
    parts = [network(part.to(network.device)).cpu() for part in images.split(AT_ONCE)]
    return Statistics.of(torch.cat(parts))


def held_out_distances(
    config: PosttrainConfig, networks: Mapping[str, FeatureNetwork], references: Mapping[str, Statistics]
) -> dict[str, float]:
    """FD of held-out real images to the reference by network, over which FDr is taken; empty without them."""
    if config.held_out is None:
        return {}
    found = read_statistics(config.held_out, "held_out", config, networks)
    distances = {name: frechet_distance(found[name], references[name]) for name in networks}
    for name, value in distances.items():
        require(value > 0, f"held_out: expected other images than those of the reference, {name} has a distance of 0")
    return distances
