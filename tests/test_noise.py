"""Seeded noise: a function of the seed alone, and Gaussian as far as a few million values can tell."""

import hashlib
import math

import pytest
import torch

from pmf.noise import seeded_noise
from tests.test_host_sync import Copies

SHAPE = (3, 32, 32)


@pytest.fixture(scope="module")
def values():
    """2000 images of neighbouring seeds, float64 [2000, 3072]."""
    return seeded_noise(range(2000), SHAPE).flatten(1).double()


def test_golden_bits():
    """Whoever changes these changes every sample that was ever named by a seed."""
    noise = seeded_noise([0, 1, 2**32 - 1], SHAPE)
    expected = [0.8567619323730469, -0.3955717086791992, -0.5139741897583008, 0.8106622695922852]
    assert noise[0, 0, 0, :4].tolist() == expected
    digest = hashlib.sha256(noise.numpy().tobytes()).hexdigest()
    assert digest == "78450576e5dce89de80196f18186d61482f93d04929eb4db7616719097ef0788"


@pytest.mark.parametrize("shape", [SHAPE, (1, 8, 8), (3, 5, 7), (3, 256, 256)])
def test_an_image_is_a_function_of_its_seed(shape):
    seeds = [5, 11, 2**31, 0, 5, 7, 2**32 - 1]
    noise = seeded_noise(seeds, shape)
    assert noise.shape == (7, *shape) and noise.is_contiguous() and torch.equal(noise[0], noise[4])
    for row, seed in zip(noise, seeds, strict=True):
        assert torch.equal(seeded_noise([seed], shape)[0], row)


def test_threads_change_no_bit():
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = seeded_noise(range(3), (3, 256, 256))
        torch.set_num_threads(2)
        assert torch.equal(seeded_noise(range(3), (3, 256, 256)), one)
    finally:
        torch.set_num_threads(threads)


def test_sums_are_exact():
    """Every value is a multiple of 2^-20 below 16: no order of additions, and no device, rounds it otherwise."""
    noise = seeded_noise(range(20), SHAPE)
    units = noise.double() * 2**20
    assert torch.equal(units, units.round()) and noise.abs().max() < 16


def test_a_device_makes_its_own_noise():
    """Only keys travel, three numbers an image, and nobody waits for them."""
    seeded_noise([0], SHAPE, "meta")  # the tables are there from now on
    with Copies() as copies:
        assert seeded_noise(range(4), SHAPE, "meta").is_meta
    assert copies.seen == [(12, True)]


def test_no_images():
    assert seeded_noise([], SHAPE).shape == (0, *SHAPE)


def test_moments(values):
    """Each within 4 of its standard deviations."""
    for power in range(1, 9):
        exact, square = (math.prod(range(1, n, 2)) * (n % 2 == 0) for n in (power, 2 * power))
        deviation = math.sqrt((square - exact**2) / values.numel())
        assert abs((values**power).mean().item() - exact) < 4 * deviation


def test_distribution_function(values):
    """Kolmogorov and Smirnov: larger than 1.95 in one of a thousand cases."""
    ordered = torch.special.ndtr(values.flatten().sort().values)
    ranks = (torch.arange(len(ordered)) + 0.5) / len(ordered)
    assert (ordered - ranks).abs().max().item() * math.sqrt(len(ordered)) < 1.95


@pytest.mark.parametrize("power", [1, 2, 3])
def test_neighbours_are_independent(values, power):
    """No correlation of powers at any distance, within images and between those of neighbouring seeds."""
    moved = values**power
    moved = (moved - moved.mean()) / moved.std()
    waves = torch.fft.fft(moved.view(-1, 3072))
    within = torch.fft.ifft((waves * waves.conj()).sum(0)).real[1 : 3072 // 2]
    between = torch.fft.ifft((waves[1:] * waves[:-1].conj()).sum(0)).real
    for sums in (within, between):
        z = sums / math.sqrt(moved.numel())
        assert z.abs().max() < 5 and 0.9 < z.std() < 1.1


def test_every_pixel_varies_with_the_seed(values):
    means, variances = values.mean(0) * math.sqrt(2000), (values.var(0) - 1) * math.sqrt(2000 / 2)
    for z in (means, variances):
        assert z.abs().max() < 5 and 0.9 < z.std() < 1.1
