"""Crops are drawn and resampled as in the authors' JAX code; test_crops.py checks them without JAX."""

import pytest
import torch

from pmf.crops import draw_crops, resize_crops

pytestmark = pytest.mark.extras

EDGES = [(0, 0), (0, 1), (1, 0), (1, 1), (0.5, 0.5)]  # the image's corners and middle
CASES = [  # image, sizes of crops, side of the result
    ((256, 256), [(256, 256), (224, 224), (73, 190), (1, 1), (255, 3)], 224),
    ((32, 32), [(32, 32), (9, 20), (28, 31)], 224),
    ((45, 130), [(45, 130), (45, 33), (17, 129)], 24),  # shrunk, up to five times
    ((512, 300), [(400, 290), (150, 300)], 64),
]


@pytest.fixture(scope="module")
def authors():
    pytest.importorskip("optax", reason="JAX and optax are not installed")
    from tests.train import authors_training

    return authors_training


def boxes_of(image, sides):
    """Boxes of each size at each place of EDGES."""
    rows = [
        (*(int(e * (n - s)) for e, n, s in zip(edge, image, side, strict=True)), *side)
        for side in sides
        for edge in EDGES
    ]
    return torch.tensor(rows, dtype=torch.float32).unique(dim=0)


@pytest.mark.parametrize(("image", "sides", "size"), CASES)
def test_resampling_and_its_gradient_are_those_of_jax(authors, image, sides, size):
    import jax

    torch.manual_seed(0)
    boxes = boxes_of(image, sides)
    images = torch.rand(len(boxes), 3, *image) * 2 - 1
    d_crops = torch.randn(len(boxes), 3, size, size)

    def ours(dtype):
        x = images.to(dtype).requires_grad_()
        crops = resize_crops(x, boxes, size)
        return crops.detach(), *torch.autograd.grad(crops, x, d_crops.to(dtype))

    def theirs(dtype):
        def resized(x):
            crops = jax.vmap(lambda image, box: authors.crop(image, box, size))
            return crops(x.transpose(0, 2, 3, 1), boxes_).transpose(0, 3, 1, 2)

        with authors.precision(dtype):
            x, boxes_, cotangent = (authors.as_jax(value.to(dtype)) for value in (images, boxes, d_crops))
            crops, pull = jax.vjp(resized, x)
            return authors.as_torch(crops), authors.as_torch(*pull(cotangent))

    for single, double, single_theirs, exact in zip(
        ours(torch.float32), ours(torch.float64), theirs(torch.float32), theirs(torch.float64), strict=True
    ):
        assert single.dtype == single_theirs.dtype == torch.float32 and exact.dtype == torch.float64
        assert (double - exact).norm() < 1e-12 * exact.norm()
        rounding = (single_theirs - exact).abs().max()
        assert (single - exact).abs().max() <= 2 * rounding + torch.finfo(torch.float32).eps


@pytest.mark.parametrize("image", [(256, 256), (48, 20)])
def test_boxes_are_distributed_as_the_authors(authors, image):
    """Kolmogorov-Smirnov tests on 200,000 boxes of each: every coordinate, areas and places."""
    stats = pytest.importorskip("scipy.stats")
    theirs = authors.as_torch(authors.draw_boxes(0, 200_000, *image)).numpy()
    ours = draw_crops(200_000, *image, torch.Generator().manual_seed(0)).numpy()
    for i, name in enumerate(("top", "left", "height", "width")):
        assert stats.ks_2samp(ours[:, i], theirs[:, i]).pvalue > 1e-3, name
    for a, b in ((0, 1), (0, 2), (1, 3), (2, 3)):
        assert stats.ks_2samp(ours[:, a] * ours[:, b], theirs[:, a] * theirs[:, b]).pvalue > 1e-3, (a, b)
