"""The feature networks of a post-training, and the statistics of real images in their spaces."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from pmf.errors import reading, require
from pmf.feature_networks import FeatureNetwork, feature_network
from pmf.images import to_float
from pmf.metrics import Statistics
from pmf.train.config import PosttrainConfig
from pmf.train.demo import digits
from pmf.train.evaluation.spaces import load_statistics

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
    folder = config.reference
    if folder is None:
        require(config.data == DIGITS, "reference: expected a directory of statistics (pmf eval statistics), got none")
        return {name: _statistics_of_digits(network) for name, network in networks.items()}
    with reading("reference", folder):
        require(folder.is_dir(), f"reference: expected a directory of statistics, got {folder}")
    return {name: _read(folder, config, network) for name, network in networks.items()}


def _read(folder: Path, config: PosttrainConfig, network: FeatureNetwork) -> Statistics:
    found, where = load_statistics(folder, network.name, "reference"), f"reference: {folder / network.name}.npz"
    space = found.space in (None, network.space)
    require(space, f"{where}: expected features of {network.space}, got {found.space}")
    width, side = len(found.mu), config.model.image_size
    expected = network.width or config.model.in_channels * side**2
    require(width == expected, f"{where}: expected {expected} features, got {width}")
    size = found.image_size
    require(size in (None, side), f"{where}: expected images of {side} pixels, as the network's, got {size}")
    return _described(found, network, side)


def _described(statistics: Statistics, network: FeatureNetwork, image_size: int) -> Statistics:
    """The statistics with what is known of their features."""
    return replace(statistics, space=network.space, image_size=image_size)


@torch.no_grad()
def _statistics_of_digits(network: FeatureNetwork) -> Statistics:
    images = to_float(digits()[0].images)
    parts = [network(part.to(network.device)).cpu() for part in images.split(AT_ONCE)]
    return _described(Statistics.of(torch.cat(parts)), network, images.shape[-1])
