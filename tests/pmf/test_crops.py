import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats

import pmf
from pmf.crops import draw_crops, resize_crops

# (height, width, boxes): to shrink, enlarge or keep; at every edge and inside; of one pixel and of the whole image.
CASES = [
    (32, 32, [(0, 0, 32, 32), (3, 5, 9, 20), (31, 0, 1, 1), (20, 20, 12, 12)]),
    (256, 256, [(0, 0, 256, 256), (10, 3, 224, 224), (100, 7, 80, 249), (255, 255, 1, 1)]),
    (300, 410, [(1, 0, 299, 400), (0, 9, 75, 401), (76, 186, 224, 224), (0, 0, 300, 410)]),
    (1, 7, [(0, 0, 1, 7), (0, 6, 1, 1), (0, 2, 1, 3), (0, 0, 1, 2)]),
]


def cubic(x):
    """The cubic convolution kernel (Keys 1981, a = -1/2)."""
    x = abs(x)
    if x < 1:
        return 1.5 * x**3 - 2.5 * x**2 + 1
    return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0


def filter_written_out(pixels, start, length, size):
    """Weights [size, pixels] of output i on pixel j, by their distance; each row sums to one."""
    matrix = []
    scale = length / size  # pixels an output covers
    for i in range(size):
        centre = start + (i + 0.5) * scale
        row = [cubic((j + 0.5 - centre) / max(scale, 1)) for j in range(pixels)]
        matrix.append([weight / sum(row) for weight in row])
    return torch.tensor(matrix, dtype=torch.float64)


def resized_written_out(images, boxes, size):
    """Resize the crops one by one, in float64, differentiably."""
    height, width = images.shape[2:]
    rows = []
    for image, (top, left, tall, wide) in zip(images.double(), boxes.int().tolist(), strict=True):
        vertical, horizontal = (filter_written_out(*axis, size) for axis in ((height, top, tall), (width, left, wide)))
        rows.append(vertical @ image @ horizontal.T)
    return torch.stack(rows)


def rounding_bound(images, boxes, size, dtype):
    """Upper bound on the error of crops computed in `dtype`.

    A coordinate is rounded twice, by eps times the image's side, and divided by max(scale, 1); the kernel's slope is at
    most 1.39 and its own rounding 8 eps; an output sums 4 scale + 2 weights per axis, and those of the other axis sum
    to 1.25 in absolute value. The normalising sum errs as much, and there are two axes.
    """
    scale = max((boxes[:, 2:].max() / size).item(), 1)
    weight = (2 * 1.39 * max(images.shape[2:]) / scale + 8) * torch.finfo(dtype).eps
    return 2 * 2 * (4 * scale + 2) * weight * 1.25 * images.abs().max().item()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("height", "width", "boxes"), CASES)
def test_crops_are_filtered_as_written_out(height, width, boxes, dtype):
    torch.manual_seed(0)
    boxes = torch.tensor(boxes, dtype=torch.float32)
    images = torch.rand(len(boxes), 3, height, width, dtype=dtype) * 2 - 1
    crops = resize_crops(images, boxes, 224)
    assert crops.dtype == dtype and crops.is_contiguous(memory_format=torch.channels_last)
    exact = resized_written_out(images, boxes, 224)
    assert (crops.double() - exact).abs().max().item() <= rounding_bound(images, boxes, 224, dtype)


@pytest.mark.parametrize(("image", "length", "size"), [(64, 32, 16), (24, 8, 32), (40, 20, 20)])
def test_a_crop_is_a_part_of_the_resized_image(image, length, size):
    """PyTorch's filter gives the same if the box is aligned with the outputs of the whole image at the same scale."""
    torch.manual_seed(0)
    step = max(length // size, 1)
    starts = range(0, image - length + 1, step)
    boxes = torch.tensor([(top, left, length, length) for top, left in itertools.product(starts, starts)])
    images = torch.rand(1, 3, image, image, dtype=torch.float64) * 2 - 1
    whole = F.interpolate(images, (image * size // length,) * 2, mode="bicubic", antialias=True)[0]
    crops = resize_crops(images.expand(len(boxes), -1, -1, -1), boxes.float(), size)
    for crop, (top, left) in zip(crops, (boxes[:, :2] * size // length).tolist(), strict=True):
        expected = whole[:, top : top + size, left : left + size]
        assert (crop - expected).abs().max() <= 2 * rounding_bound(images, boxes, size, torch.float64)


@pytest.mark.parametrize(("height", "width", "boxes"), [CASES[0], CASES[3], (40, 30, [(0, 0, 40, 30), (5, 2, 20, 17)])])
def test_gradient_is_the_transposed_filter(height, width, boxes):
    torch.manual_seed(0)
    boxes = torch.tensor(boxes, dtype=torch.float32)
    images = torch.randn(len(boxes), 3, height, width, dtype=torch.float64, requires_grad=True)
    d_crops = torch.randn(len(boxes), 3, 24, 24, dtype=torch.float64)
    (ours,) = torch.autograd.grad(resize_crops(images, boxes, 24), images, d_crops)
    (theirs,) = torch.autograd.grad(resized_written_out(images, boxes, 24), images, d_crops)
    outputs_per_pixel = 24**2  # a one-pixel crop sums the gradients of all outputs
    assert (ours - theirs).abs().max() <= outputs_per_pixel * rounding_bound(d_crops, boxes, 24, torch.float64)


def test_autocast_and_low_precision_images_leave_the_arithmetic_in_float32():
    torch.manual_seed(0)
    images, boxes = torch.rand(2, 3, 50, 50), torch.tensor([[1.0, 2, 30, 40], [0, 0, 50, 50]])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = resize_crops(images, boxes, 224)
    assert torch.equal(inside, resize_crops(images, boxes, 224))
    low = images.bfloat16()
    assert torch.equal(resize_crops(low, boxes, 224), resize_crops(low.float(), boxes, 224))


def box_of(height, width, area, ratio, top, left):
    """The authors' box from four numbers in [0, 1): one draw of area and ratio, clipped sides, any corner that fits."""
    area = height * width * (0.08 + (1 - 0.08) * area)
    ratio = math.exp(math.log(3 / 4) + ratio * (math.log(4 / 3) - math.log(3 / 4)))
    w = min(max(round(math.sqrt(area * ratio)), 1), width)
    h = min(max(round(math.sqrt(area / ratio)), 1), height)
    return min(math.floor(top * (height - h + 1)), height - h), min(math.floor(left * (width - w + 1)), width - w), h, w


SIZES = [(256, 256), (32, 32), (8, 8), (1, 1), (64, 20), (20, 64), (100, 2), (2, 31), (1, 50)]


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_boxes_follow_the_law_number_by_number(height, width):
    drawn, again = (torch.Generator().manual_seed(3) for _ in range(2))
    boxes = draw_crops(500, height, width, drawn)
    assert boxes.dtype == torch.float32 and boxes.device.type == "cpu"
    numbers = torch.rand(500, 4, dtype=torch.float64, generator=again).tolist()
    assert boxes.tolist() == [list(map(float, box_of(height, width, *row))) for row in numbers]
    assert torch.equal(drawn.get_state(), again.get_state())


DRAWS = 200_000


@pytest.fixture(scope="module")
def boxes_of_256():
    return draw_crops(DRAWS, 256, 256, torch.Generator().manual_seed(0)).double()


def test_share_of_full_sides_and_mean_area_are_the_laws(boxes_of_256):
    """Exact values by the midpoints of a fine grid: 14.6 % span a whole side; the mean area is 0.534."""
    grid = (np.arange(2000) + 0.5) / 2000
    area, ratio = np.meshgrid(0.08 + 0.92 * grid, (3 / 4) ** (1 - 2 * grid), indexing="ij")
    sides = [np.clip(np.rint(256 * np.sqrt(a)), 1, 256) for a in (area / ratio, area * ratio)]
    full, covered = (sides[0] == 256) | (sides[1] == 256), sides[0] * sides[1] / 256**2
    assert (round(full.mean(), 3), round(covered.mean(), 3)) == (0.146, 0.534)
    drawn = boxes_of_256[:, 2:]
    for statistic, expected in (((drawn == 256).any(1).double(), full), (drawn.prod(1) / 256**2, covered)):
        deviations = (statistic.mean().item() - expected.mean()) / (expected.std() / math.sqrt(DRAWS))
        assert abs(deviations) < 4


def test_every_margin_has_the_laws_distribution(boxes_of_256):
    """Kolmogorov-Smirnov tests against as many boxes of `box_of`, from other random numbers."""
    numbers = np.random.default_rng(1).random((DRAWS, 4)).tolist()
    law = np.array([box_of(256, 256, *row) for row in numbers], dtype=float)
    ours = boxes_of_256.numpy()
    for i, name in enumerate(("top", "left", "height", "width")):
        assert stats.ks_2samp(ours[:, i], law[:, i]).pvalue > 1e-3, name
    for name, a, b in (("area", 2, 3), ("vertical place", 0, 2), ("horizontal place", 1, 3), ("corner", 0, 1)):
        assert stats.ks_2samp(ours[:, a] * ours[:, b], law[:, a] * law[:, b]).pvalue > 1e-3, name


def test_rows_get_boxes_of_their_own_and_a_generator_repeats_them():
    first, again = (draw_crops(64, 256, 256, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(first, again)
    assert len(first.unique(dim=0)) == 64
    assert not torch.equal(first, draw_crops(64, 256, 256, torch.Generator().manual_seed(6)))
    assert draw_crops(0, 8, 8).shape == (0, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: draw_crops(2, 0, 8), "image: expected at least one pixel, got 0 x 8"),
        (
            lambda: resize_crops(torch.zeros(2, 3, 8, 8), torch.zeros(3, 4), 224),
            r"boxes: expected shape \[2, 4\], got \[3, 4\]",
        ),
    ],
)
def test_bad_input_is_one_line_that_names_the_argument(call, message):
    with pytest.raises(pmf.InputError, match=message):
        call()
