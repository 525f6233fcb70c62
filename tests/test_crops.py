import math

import pytest
import torch

import pmf
from pmf.crops import AREA, RATIO, draw_crops, resize_crops

# (height, width, boxes): crops shrunk, enlarged and kept, at every edge, of one pixel and of everything.
CASES = [
    (32, 32, [(0, 0, 32, 32), (3, 5, 9, 20), (31, 0, 1, 1), (20, 20, 12, 12)]),
    (256, 256, [(0, 0, 256, 256), (10, 3, 224, 224), (100, 7, 80, 249), (255, 255, 1, 1)]),
    (300, 410, [(1, 0, 299, 400), (0, 9, 75, 401), (76, 186, 224, 224), (0, 0, 300, 410)]),
]


def resized_alone(images, boxes, size):
    """Every crop on its own, pixel by pixel of the definition: the filter reads the whole image, cut at its edge."""
    rows = []
    for image, (top, left, height, width) in zip(images, boxes.tolist(), strict=True):
        vertical = weights_alone(top, height, image.shape[1], size, image.dtype)
        horizontal = weights_alone(left, width, image.shape[2], size, image.dtype)
        rows.append(torch.stack([vertical @ channel @ horizontal.T for channel in image]))
    return torch.stack(rows)


def cubic(x):
    """Keys' kernel with a = -1/2."""
    if x < 1:
        return 1.5 * x**3 - 2.5 * x**2 + 1
    return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0


def weights_alone(start, length, pixels, size, dtype):
    scale = length / size
    weights = torch.zeros(size, pixels, dtype=torch.float64)
    for i in range(size):
        centre = start + (i + 0.5) * scale
        row = [cubic(abs(j + 0.5 - centre) / max(scale, 1)) for j in range(pixels)]
        weights[i] = torch.tensor(row, dtype=torch.float64) / math.fsum(row)
    return weights.to(dtype)


def rounding_bound(images, boxes, size):
    """What two ways of computing the same crops may differ by, at most.

    A coordinate of up to `length` pixels is rounded to eps length, and divided by max(scale, 1); the kernel
    is no steeper than 1.39 and itself rounded to 8 eps; an output sums so many weights per axis, and those
    of the other axis sum to 1.25 in absolute value. Once for either way and axis.
    """
    length = boxes[:, 2:].max().item()
    scale = max(length / size, 1)
    weight = (1.39 * length / scale + 8) * torch.finfo(images.dtype).eps
    return 2 * 2 * (4 * scale + 2) * weight * 1.25 * images.abs().max().item()


@pytest.mark.parametrize(("height", "width", "boxes"), CASES)
def test_crops_are_the_antialiased_bicubic_of_the_whole_image(height, width, boxes):
    torch.manual_seed(0)
    boxes = torch.tensor(boxes, dtype=torch.float32)
    images = torch.rand(len(boxes), 3, height, width, dtype=torch.float64) * 2 - 1
    exact = resized_alone(images, boxes, 224)
    crops = resize_crops(images, boxes, 224)
    assert crops.dtype == torch.float64 and crops.is_contiguous(memory_format=torch.channels_last)
    assert (crops - exact).abs().max().item() <= rounding_bound(images, boxes, 224)

    single = images.float()  # the same images to its last bit: only the arithmetic differs
    exact = resized_alone(single.double(), boxes, 224)
    assert (resize_crops(single, boxes, 224) - exact).abs().max().item() <= rounding_bound(single, boxes, 224)


def test_gradient_is_the_one_through_the_definition():
    torch.manual_seed(0)
    boxes = torch.tensor([(0, 0, 40, 30), (5, 2, 20, 17), (39, 29, 1, 1)], dtype=torch.float32)
    images = torch.randn(3, 3, 40, 30, dtype=torch.float64, requires_grad=True)
    d_crops = torch.randn(3, 3, 24, 24, dtype=torch.float64)
    (ours,) = torch.autograd.grad(resize_crops(images, boxes, 24), images, d_crops)
    (theirs,) = torch.autograd.grad(resized_alone(images, boxes, 24), images, d_crops)
    outputs_per_pixel = 24**2  # a one-pixel crop gathers the whole output in one sum
    assert (ours - theirs).abs().max() <= outputs_per_pixel * rounding_bound(d_crops, boxes, 24)


def test_autocast_and_low_precision_images_leave_the_arithmetic_in_float32():
    torch.manual_seed(0)
    images, boxes = torch.rand(2, 3, 50, 50), torch.tensor([[1.0, 2, 30, 40], [0, 0, 50, 50]])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = resize_crops(images, boxes, 224)
    assert torch.equal(inside, resize_crops(images, boxes, 224))
    low = images.bfloat16()
    assert torch.equal(resize_crops(low, boxes, 224), resize_crops(low.float(), boxes, 224))


def drawn_one_by_one(rows, height, width, generator):
    """The authors' law, row by row, on the same uniform numbers."""
    numbers = torch.rand(rows, 4, dtype=torch.float64, generator=generator).tolist()
    for area, ratio, top, left in numbers:
        area = height * width * (AREA[0] + area * (AREA[1] - AREA[0]))
        ratio = math.exp(math.log(RATIO[0]) + ratio * (math.log(RATIO[1]) - math.log(RATIO[0])))
        w = min(max(round(math.sqrt(area * ratio)), 1), width)
        h = min(max(round(math.sqrt(area / ratio)), 1), height)
        yield math.floor(top * (height - h + 1)), math.floor(left * (width - w + 1)), h, w


@pytest.mark.parametrize(("height", "width"), [(256, 256), (32, 32), (8, 8), (64, 20), (20, 64), (100, 2), (1, 1)])
def test_boxes_follow_the_authors_law(height, width):
    seeds = [torch.Generator().manual_seed(3) for _ in range(2)]
    expected = list(drawn_one_by_one(500, height, width, seeds[0]))
    assert draw_crops(500, height, width, seeds[1]).tolist() == [list(map(float, box)) for box in expected]


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
