"""Seeded noise: a function of the seed; its distribution, exactly from the table; statistics of millions of values."""

import hashlib
import math
import re

import numpy as np
import pytest
import torch

from pmf import LossConfig, noise, sample_draws
from pmf.errors import InputError
from pmf.noise import seeded_noise
from pmf.private import FakeTensorMode
from tests.pmf.test_host_sync import Copies

SHAPE, COUNT = (3, 32, 32), 3072
SEEDS = 1024
UNIT = 2**-20


def normal_moment(order):
    return math.prod(range(1, order, 2)) * (order % 2 == 0)


# An image is a function of its seed.


def test_golden_bits():
    """A change of these bits changes the sample of every seed."""
    images = seeded_noise([0, 1, 2**32 - 1], SHAPE)
    assert images[0, 0, 0, :4].tolist() == [
        -1.032792091369629,
        1.1790857315063477,
        -1.488255500793457,
        -1.0051937103271484,
    ]
    digest = hashlib.sha256(images.numpy().tobytes()).hexdigest()
    assert digest == "c95a1adadc23dc7a0c84af2544959f032d2647e024452609611cf39860965ba6"


@pytest.mark.parametrize("shape", [SHAPE, (1, 1, 1), (1, 8, 8), (3, 5, 7), (3, 256, 256)])
def test_an_image_is_a_function_of_its_seed(shape):
    seeds = [5, 11, 2**31, 0, 5, 7, 2**32 - 1]
    images = seeded_noise(seeds, shape)
    assert images.shape == (7, *shape) and images.dtype == torch.float32 and images.is_contiguous()
    assert torch.equal(images[0], images[4]) and not torch.equal(images[0], images[1])
    for image, seed in zip(images, seeds, strict=True):
        assert torch.equal(seeded_noise([seed], shape)[0], image)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_no_images(device):
    assert seeded_noise([], SHAPE, device).shape == (0, *SHAPE)
    assert seeded_noise([1, 2], (1, 0, 2), device).shape == (2, 1, 0, 2)


def test_threads_change_no_bit():
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = seeded_noise(range(5), SHAPE)
        for several in (2, 3, 8):
            torch.set_num_threads(several)
            assert torch.equal(seeded_noise(range(5), SHAPE), one)
    finally:
        torch.set_num_threads(threads)


def test_values_are_those_of_the_equation():
    """The equation in integers, from the generator's bits and the table."""
    table = np.rint(np.stack([noise._points().real, noise._points().imag], -1).astype(float) / UNIT).astype(int)
    index = np.random.SFC64(7).random_raw(COUNT // 8).view(np.uint16).reshape(4, -1)
    a, b, c, d = table[index].reshape(4, -1)
    rows = np.stack([a + b + c + d, a - b + c - d, a + b - c - d, a - b - c + d])
    assert np.array_equal(seeded_noise([7], SHAPE).double().numpy().reshape(4, -1), rows * UNIT)


@pytest.mark.parametrize("at_once", [1, 2**24])
def test_what_a_gpu_computes_has_the_same_bits(at_once, monkeypatch):
    monkeypatch.setattr(noise, "_AT_ONCE", at_once)
    on_device = torch.empty(5, 4, COUNT // 4)
    noise._on_device(range(5), on_device)
    assert torch.equal(on_device.view(5, *SHAPE), seeded_noise(range(5), SHAPE))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_default_dtype_changes_nothing(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        on_device = torch.empty(1, 4, COUNT // 4, dtype=torch.float32)
        noise._on_device([3], on_device)
        images = seeded_noise([3], SHAPE)
    finally:
        torch.set_default_dtype(before)
    assert images.dtype == torch.float32 and torch.equal(on_device.view_as(images), images)
    assert torch.equal(images, seeded_noise([3], SHAPE))


@pytest.mark.parametrize("columns", [2, 14, 768, 2**14, 2**14 + 2, 37632, 2 * 16411])
def test_no_matrix_product_is_wide(columns):
    """768 columns are those of 32 px, 37,632 those of 224 px; 16,411 is prime."""
    pieces = noise._pieces(columns)
    assert columns % pieces == 0 and columns // pieces <= noise._WIDEST
    assert all(columns % fewer or columns // fewer > noise._WIDEST for fewer in range(1, pieces))


@pytest.mark.parametrize("shape", [SHAPE, (3, 5, 7), (3, 224, 224), (1, 8, 16411)])
def test_drawn_in_place(shape):
    """Neighbouring memory is not written."""
    buffer = torch.full((4, *shape), math.nan)
    images = seeded_noise([4, 9], shape, out=buffer[1:3])
    assert images.data_ptr() == buffer[1].data_ptr() and torch.equal(images, seeded_noise([4, 9], shape))
    assert buffer[0].isnan().all() and buffer[3].isnan().all()


GOOD = torch.empty(2, *SHAPE)


@pytest.mark.parametrize(
    ("out", "got"),
    [
        (torch.empty(3, *SHAPE), "torch.float32 [3, 3, 32, 32] with strides [3072, 1024, 32, 1]"),
        (GOOD.bfloat16(), "torch.bfloat16 [2, 3, 32, 32] with strides [3072, 1024, 32, 1]"),
        (GOOD.to(memory_format=torch.channels_last), "torch.float32 [2, 3, 32, 32] with strides [3072, 1, 96, 3]"),
        (GOOD.clone().requires_grad_(), "one that requires a gradient"),
        (GOOD.numpy(), "ndarray"),
    ],
    ids=["shape", "dtype", "layout", "gradient", "array"],
)
def test_bad_input_out(out, got):
    message = f"out: expected a contiguous float32 tensor [2, 3, 32, 32], got {got}"
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        seeded_noise([0, 1], SHAPE, out=out)


@pytest.mark.parametrize("shape", [SHAPE, (3, 5, 7)])
def test_inference_tensors_are_drawn_into_in_inference_mode(shape):
    with torch.inference_mode():
        out = torch.empty(1, *shape)
        seeded_noise([3], shape, out=out)
    assert torch.equal(out, seeded_noise([3], shape))
    with pytest.raises(InputError, match="got an inference tensor outside inference mode"):
        seeded_noise([3], shape, out=out)


@pytest.mark.parametrize("shape", [SHAPE, (3, 5, 7)])
def test_autograd_knows_that_out_has_changed(shape):
    out, weight = torch.ones(1, *shape), torch.ones(1, *shape, requires_grad=True)
    product = (weight * out).sum()
    seeded_noise([3], shape, out=out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_fake_tensors():
    """Counting operations draws noise on fake tensors too."""
    with FakeTensorMode():
        assert seeded_noise([1, 2], SHAPE).shape == (2, *SHAPE)


def test_bad_input_seeds_and_device():
    with pytest.raises(InputError, match="seeds: expected integers >= 0, got -1"):
        seeded_noise([3, -1], SHAPE)
    with pytest.raises(InputError, match="device: cannot use 'warp'"):
        seeded_noise([0], SHAPE, "warp")


@pytest.mark.parametrize(
    "draw", [lambda: seeded_noise([0], SHAPE, 0), lambda: sample_draws(1, SHAPE, LossConfig(), device=0).noise]
)
def test_device_0_is_the_first_gpu(draw):
    if torch.cuda.is_available():
        assert draw().device == torch.device("cuda", 0)
    else:
        with pytest.raises(InputError, match="device: cannot use 0"):
            draw()


def test_bad_input_device_and_out():
    with pytest.raises(InputError, match="out: expected either"):
        seeded_noise([0, 1], SHAPE, "cpu", out=torch.empty(2, *SHAPE))


def test_a_gpu_gets_random_words_by_asynchronous_copies():
    with Copies() as copies:
        assert seeded_noise(range(4), SHAPE, "meta").is_meta
    assert copies.seen == [(65536, True), (4 * COUNT // 8, True)]


# The exact distribution, from the table.


@pytest.fixture(scope="module")
def points():
    """The table as integers: complex128 [65536]."""
    table = noise._points().astype(np.complex128) / UNIT
    assert table.shape == (65536,) and np.array_equal(table, np.rint(table.real) + 1j * np.rint(table.imag))
    return table


@pytest.fixture(scope="module")
def law(points):
    """(y, P(Y = y)) of one value, the sum of four independent coordinates; it is symmetric.

    y wraps around at 8 standard deviations: the probability beyond, less than 1e-14, lands on the other side.
    """
    size = 2**24
    single = np.bincount(points.real.astype(int) % size, minlength=size) / len(points)
    chances = torch.fft.irfft(torch.fft.rfft(torch.from_numpy(single)) ** 4, size)
    return UNIT * torch.arange(-size // 2, size // 2, dtype=torch.float64), torch.fft.fftshift(chances)


def test_float32_holds_every_sum(points):
    assert 4 * max(abs(points.real).max(), abs(points.imag).max()) < 8.9 / UNIT < 2**24


def test_points_turn_by_quarters(points):
    """Hence both coordinates have the same distribution, symmetric and uncorrelated."""
    assert len(set(points)) == 65536 and set(points) == set(1j * points)


def test_distribution_function(law):
    y, chances = law
    below = torch.cumsum(chances, 0) - chances / 2
    assert (below - torch.special.ndtr(y)).abs().max() < 2e-7


@pytest.mark.parametrize(("start", "bound"), [(3, 1e-5), (4, 5e-5), (5, 2e-4), (6, 2e-2)])
def test_tail(law, start, bound):
    y, chances = law
    tail = chances[y > start].sum() + chances[y == start].sum() / 2
    assert abs(tail.item() / (math.erfc(start / math.sqrt(2)) / 2) - 1) < bound


def test_distribution_function_of_a_point(points):
    """The distribution of the table's points, before four of them are mixed."""
    ordered = torch.special.ndtr(torch.from_numpy(np.sort(2 * UNIT * points.real)))
    assert (ordered - (torch.arange(65536) + 0.5) / 65536).abs().max() < 6e-4 - 0.5 / 65536


@pytest.mark.parametrize("order", [2, 4, 6, 8, 10])
def test_moments_of_a_value(law, order):
    y, chances = law
    assert abs((y**order * chances).sum().item() / normal_moment(order) - 1) < 1e-6


def test_mixed_moments_of_the_values_that_share_points(points):
    """Eight values are a linear map of four independent points: their cumulants are sums of the points'.

    Cumulants up to order 4 determine the moments; those of independent normals are 0, the unit matrix, 0, 0.
    """
    z = np.stack([points.real, points.imag], 1) * UNIT
    first, second, third = z.mean(0), z.T @ z / len(z), np.einsum("ni,nj,nk->ijk", z, z, z, optimize=True) / len(z)
    pairs = np.einsum("ni,nj->nij", z, z).reshape(len(z), 4)
    fourth = (pairs.T @ pairs / len(z)).reshape(2, 2, 2, 2)
    for split in ("ij,kl->ijkl", "ik,jl->ijkl", "il,jk->ijkl"):
        fourth = fourth - np.einsum(split, second, second)
    mix = np.einsum("rj,ab->rajb", noise._HADAMARD, np.eye(2)).reshape(8, 4, 2)
    expected = {1: np.zeros(8), 2: np.eye(8), 3: np.zeros((8,) * 3), 4: np.zeros((8,) * 4)}
    for order, cumulant in ((1, first), (2, second), (3, third), (4, fourth)):
        axes = [letter for i in range(order) for letter in (mix, [i, 20, 10 + i])]
        mixed = np.einsum(*axes, cumulant, [10 + i for i in range(order)], list(range(order)), optimize="greedy")
        assert abs(mixed - expected[order]).max() < 1e-7


def test_mixed_moments_of_a_point(points):
    """The two coordinates of a point, which are neighbours in an image: up to order 10."""
    a, b = 2 * UNIT * points.real, 2 * UNIT * points.imag
    for n in range(11):
        for m in range(11 - n):
            size = math.sqrt(normal_moment(2 * n) * normal_moment(2 * m))
            assert abs((a**n * b**m).mean() - normal_moment(n) * normal_moment(m)) < 1e-6 * size


# Statistics of millions of values. Seeds are fixed: these tests pass always or never.


@pytest.fixture(scope="module")
def images():
    """3 million values of consecutive seeds, float64 [1024, 3072]."""
    return seeded_noise(range(SEEDS), SHAPE).flatten(1).double()


def standard_chi_square(counts):
    """Chi-square of equally likely bins, standardised: about N(0, 1)."""
    expected, freedom = counts.sum() / len(counts), len(counts) - 1
    return (((counts - expected) ** 2 / expected).sum().item() - freedom) / math.sqrt(2 * freedom)


def test_kolmogorov_smirnov(images):
    """The statistic exceeds 1.95 with probability 0.001."""
    ordered = torch.special.ndtr(images.flatten().sort().values)
    ranks = (torch.arange(len(ordered)) + 0.5) / len(ordered)
    assert (ordered - ranks).abs().max().item() * math.sqrt(len(ordered)) < 1.95


def test_every_seed_is_normal(images):
    """Chi-square of 16 bins per seed; the scores follow their own distribution too."""
    bins = (torch.special.ndtr(images) * 16).long()
    scores = torch.tensor([standard_chi_square(torch.bincount(image, minlength=16)) for image in bins])
    assert abs(scores.mean()) < 4 / math.sqrt(SEEDS) and 0.85 < scores.std() < 1.15 and scores.max() < 6


GROUP = [COUNT // 4 * row + side for row in range(4) for side in (-1, 0, 1) if (row, side) > (0, 0)]
DISTANCES = [1, 2, 3, 4, 7, 8, 16, 31, 32, 33, 64, 1024, 1025, 2048, 3071, 3072, 3073, 6144, *GROUP]


@pytest.mark.parametrize("distance", sorted(set(DISTANCES)))
def test_pairs_are_independent(images, distance):
    """Joint bins, 16 by 16, of values at a distance: within points and groups, across rows, channels and seeds."""
    bins = (torch.special.ndtr(images.flatten()) * 16).long()
    for start in (0, 1):  # points start at even indices
        first, second = bins[start:-distance:2], bins[start + distance :: 2]
        counts = torch.bincount(16 * first + second[: len(first)], minlength=256)
        assert abs(standard_chi_square(counts)) < 4.5


def test_the_eight_values_of_a_group_are_independent(images):
    """Their joint signs, and which of them exceed the median magnitude: 256 equally likely cases each."""
    groups = images.view(SEEDS, 4, -1, 2).transpose(1, 2).reshape(-1, 8)
    for cases in (groups > 0, groups.abs() > 0.6744897501960817):
        counts = torch.bincount((cases.long() << torch.arange(8)).sum(1), minlength=256)
        assert abs(standard_chi_square(counts)) < 4.5


@pytest.mark.parametrize("power", [1, 2, 3])
def test_no_correlation_at_any_distance(images, power):
    """Correlations of powers of values, within images and between images of consecutive seeds."""
    moved = images**power
    moved = (moved - moved.mean()) / moved.std()
    waves = torch.fft.fft(moved)
    within = torch.fft.ifft((waves * waves.conj()).sum(0)).real[1 : COUNT // 2]
    between = torch.fft.ifft((waves[1:] * waves[:-1].conj()).sum(0)).real
    for sums in (within, between):
        z = sums / math.sqrt(moved.numel())
        assert z.abs().max() < 5 and 0.9 < z.std() < 1.1


@pytest.mark.parametrize("power", [1, 2])
def test_seeds_far_apart_are_unrelated(power):
    """No correlation at any distance in large images."""
    values = seeded_noise([0, 1, 2**31, 2**31 + 1, 2**32 - 1], (3, 256, 256)).flatten(1).double() ** power
    values = (values - values.mean()) / values.std()
    waves = torch.fft.rfft(values)
    for i in range(5):
        for j in range(i):
            z = torch.fft.irfft(waves[i] * waves[j].conj()) / math.sqrt(values.shape[1])
            assert z.abs().max() < 6 and 0.98 < z.std() < 1.02


def test_the_spectrum_is_flat(images):
    """Mean power of every spatial frequency per channel, without the columns that have real coefficients."""
    power = torch.fft.rfft2(images.view(SEEDS, *SHAPE)).abs().square().mean(0)[..., 1:-1] / 1024
    z = (power - 1) * math.sqrt(SEEDS)
    assert z.abs().max() < 5 and 0.95 < z.std() < 1.05


def test_every_pixel_varies_with_the_seed(images):
    means, variances = images.mean(0) * math.sqrt(SEEDS), (images.var(0) - 1) * math.sqrt(SEEDS / 2)
    for z in (means, variances):
        assert z.abs().max() < 5 and 0.95 < z.std() < 1.05
