"""Inception's features with both resizes, against torch-fidelity's network and the formula of the JAX release."""

import numpy as np
import pytest
import torch

from pmf.errors import InputError
from pmf.metrics import half_pixel, inception
from tests.networks import relative_error

SIZES = [(256, 256), (512, 512), (64, 64), (299, 299), (37, 501), (1, 7)]


def random_images(size, count=2):
    return torch.randint(0, 256, (count, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def weights_between(size):
    """Weights of output pixel i of 299, at (i + 1/2) size / 299 - 1/2 between two neighbours, clipped to the image."""
    matrix = np.zeros((299, size))
    for i in range(299):
        place = (i + 0.5) * size / 299 - 0.5
        low = int(np.floor(place))
        for neighbour, weight in ((low, 1 - (place - low)), (low + 1, place - low)):
            matrix[i, min(max(neighbour, 0), size - 1)] += weight
    return matrix


def resized_by_formula(images):
    rows, columns = (weights_between(size) for size in images.shape[2:])
    return torch.from_numpy(rows @ images.double().numpy() @ columns.T)


@pytest.mark.parametrize("size", [*SIZES, (8, 8), (299, 300), (1024, 768), (1, 1)])
def test_the_half_pixel_resize_is_its_formula_to_the_edge(size):
    images = random_images(size)
    got, expected = half_pixel(images), resized_by_formula(images)
    assert got.dtype == torch.float32 and got.shape == (2, 3, 299, 299)
    # One rounding to float32 of values up to 255; float64 errors can tip it either way.
    assert (got.double() - expected).abs().max() <= 256 * torch.finfo(torch.float32).eps


@pytest.fixture(scope="module")
def theirs(fidelity, inception_weights):
    """torch-fidelity's own extractor."""
    outputs = ["2048", "logits_unbiased"]
    return fidelity.FeatureExtractorInceptionV3("theirs", outputs, feature_extractor_weights_path=inception_weights)


def behind_its_resize(network, resized):
    """The output of torch-fidelity's network for float32 images that are 299 pixels wide already."""
    hook = network.Conv2d_1a_3x3.register_forward_pre_hook(lambda module, inputs: ((resized - 128) / 128,))
    with hook, torch.no_grad():
        return network(torch.zeros(resized.shape, dtype=torch.uint8))


@pytest.mark.extras
@pytest.mark.parametrize("size", SIZES)
def test_features_agree_with_their_sources(theirs, inception_weights, size):
    images = random_images(size)
    tf1, half = (inception(inception_weights, resize=resize)(images) for resize in ("tf1", "half_pixel"))
    with torch.no_grad():
        published = theirs(images)
    by_formula = behind_its_resize(theirs, resized_by_formula(images).float())
    for got, expected in ((tf1, published), (half, by_formula)):
        assert all(relative_error(ours, others) <= 1e-6 for ours, others in zip(got, expected, strict=True))
    if size == (299, 299):  # nothing is resized
        assert all(torch.equal(a, b) for a, b in zip(tf1, half, strict=True))
    else:
        assert relative_error(tf1[0], half[0]) > 1e-3


@pytest.mark.extras
def test_the_half_pixel_resize_repeats_exactly(inception_weights):
    extractor, images = inception(inception_weights, resize="half_pixel"), random_images((40, 60))
    features, logits = extractor(images)
    assert features.shape == (2, 2048) and logits.shape == (2, 1008) and features.dtype == torch.float32
    assert torch.equal(extractor(images)[0], features) and not features.requires_grad


def test_an_unknown_resize_is_named():
    with pytest.raises(InputError, match="resize: expected one of tf1, half_pixel, got 'bicubic'"):
        inception(resize="bicubic")
