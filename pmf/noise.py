"""Gaussian noise that depends only on a seed: the same bits on every device and in every batch.

An image of N values needs N / 8 words of 64 bits, from its own generator, and the Table-Hadamard method (D. B.
Thomas, "Parallel Generation of Gaussian Random Numbers Using the Table-Hadamard Transform", FCCM 2013):

    w = SFC64(seed).random_raw(N / 8)        the fastest of numpy's generators, whose streams never change
    z = points[each 16 bits of w]            N / 2 points of the plane out of 65,536, two values each
    y = H z                                  z as four rows of N / 4 values; H_ij = +-1, H H' = 4

`points` are stored halved, because H / 2 is orthogonal. Eight values derive from four independent points; like these
they are uncorrelated, and they are closer to normal. The points lie on 4,096 circles, 16 on each at even angles, which
gives a pair the mixed moments of independent normals if its radius has the right moments. Half the squared radius has
the moments 1 to 5 of Exp(1): the quantiles s = -ln(1 - (i + 1/2) / 4096) of Exp(1), corrected by a polynomial.

Computed exactly from the table (tests/pmf/test_noise.py): the moments of a value up to order 10 and the mixed moments
of 8 values up to order 4 agree with those of independent normals to 1e-6, and the distribution function to 2e-7. The
tail beyond 3, 4, 5 and 6 standard deviations has a relative error of 1e-5, 5e-5, 2e-4 and 2e-2. No value exceeds 8.9.
The remaining error shows only if the mix is undone: half the sum of a column's four values is a coordinate of one
point, whose distribution function is accurate to 6e-4.

Every coordinate is a multiple of 2^-20 and every sum is below 16, so float32 rounds nothing: neither the order of
sums nor the device changes a bit, if matrix products do not reduce float32's precision, as numpy's do not.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from pmf.errors import checked_device, require

_HADAMARD = np.array([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]], np.float32)
_CIRCLES, _ANGLES = 4096, 16
_CORRECTION = (2.266866939e-4, -3.334423014e-3, 1.517891459e-2, -2.368119168e-2, 9.469157533e-3)
_WIDEST = 2**14  # columns of one matrix product
_AT_ONCE = 2**24  # values per pass on a device, which bounds temporary memory


def seeded_noise(
    seeds: Sequence[int],
    image_shape: tuple[int, int, int],
    device: torch.device | str | int | None = None,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Unit-variance noise [n, c, H, W], float32, on `device` (None: the CPU), each image from its own seed.

    An image depends on its seed, an integer >= 0, and on its number of values. The CPU draws the words, on as many
    threads as PyTorch uses; a GPU receives the words, a quarter of the bytes, and computes the values. The host does
    not wait for the GPU and can draw the words of the next batch meanwhile.

    `out` receives the noise instead of new memory on `device`; on a CPU, allocation can take a quarter of the time.
    Errors: `InputError` on a negative seed, if both `out` and `device` are given, and on an `out` that is not a
    contiguous float32 [n, c, H, W] or requires a gradient.
    """
    n, count = len(seeds), math.prod(image_shape)
    shape = (n, *image_shape)
    require(out is None or device is None, "out: expected either out or device, got both")
    require(min(seeds, default=0) >= 0, lambda: f"seeds: expected integers >= 0, got {min(seeds)}")
    if out is not None:
        _check_out(out, shape)
    device = checked_device("cpu" if device is None else device) if out is None else out.device
    if count % 8 > 0:
        whole = seeded_noise(seeds, (1, 1, count + -count % 8), device)  # the last word yields surplus values
        images = whole.flatten(1)[:, :count].reshape(shape).contiguous()
        return images if out is None else out.copy_(images)
    if device.type == "cpu":
        values = np.empty(shape, np.float32) if out is None else out.numpy()  # numpy requests huge pages
        _on_cpu(seeds, values.reshape(n, 4, count // 4))
        images = torch.from_numpy(values) if out is None else out
    else:
        images = torch.empty(shape, device=device, dtype=torch.float32) if out is None else out
        _on_device(seeds, images.view(n, 4, count // 4))
    if out is not None:
        torch.autograd.graph.increment_version(out)  # makes autograd reject saved versions of it
    return images


def _check_out(out: Tensor, shape: tuple[int, ...]) -> None:
    wanted = f"out: expected a contiguous float32 tensor {list(shape)}"
    require(isinstance(out, Tensor), f"{wanted}, got {type(out).__name__}")
    fits = out.shape == shape and out.dtype == torch.float32 and out.is_contiguous()
    require(fits, lambda: f"{wanted}, got {out.dtype} {list(out.shape)} with strides {list(out.stride())}")
    require(not out.requires_grad, f"{wanted}, got one that requires a gradient")
    writable = not out.is_inference() or torch.is_inference_mode_enabled()
    require(writable, f"{wanted}, got an inference tensor outside inference mode")


def _on_cpu(seeds: Sequence[int], values: np.ndarray) -> None:
    """Fill values [n, 4, N / 4], one image at a time so that it stays in a core's cache."""
    points, (_, _, columns) = _points(), values.shape
    pieces = (4, _pieces(columns), -1)

    def draw(part: slice) -> None:
        found = np.empty(2 * columns, np.complex64)
        z = found.view(np.float32).reshape(pieces).transpose(1, 0, 2)
        for seed, row in zip(seeds[part], values[part], strict=True):
            np.take(points, _words(seed, columns // 2).view(np.uint16), out=found, mode="wrap")  # "raise" would copy
            np.matmul(_HADAMARD, z, out=row.reshape(pieces).transpose(1, 0, 2))

    _on_threads(draw, len(seeds))


@functools.cache
def _pieces(columns: int) -> int:
    """Number of equal matrix products per image: OpenBLAS would spread wider ones over its own threads."""
    return next(pieces for pieces in itertools.count(max(-(-columns // _WIDEST), 1)) if columns % pieces == 0)


def _on_device(seeds: Sequence[int], values: Tensor) -> None:
    """Fill values with the same bits as `_on_cpu`, in few launches."""
    device, columns = values.device, values.shape[2]
    points = torch.from_numpy(_points())
    points = (points.pin_memory() if device.type == "cuda" else points).to(device, non_blocking=True)
    rows = max(1, _AT_ONCE // max(4 * columns, 1))
    for start in range(0, len(seeds), rows):
        part = slice(start, start + rows)
        words = _staged_words(seeds[part], columns // 2, device).to(device, non_blocking=True)
        _mix(words, points, values[part])


def _mix(words: Tensor, points: Tensor, out: Tensor) -> None:
    """Words int64 [n, length] to values [n, 4, 2 length], by additions, because matrix units could round products."""
    index = words.view(torch.int16).int().bitwise_and_(0xFFFF)
    found = torch.view_as_real(points.index_select(0, index.flatten())).view_as(out)
    for half, operation in enumerate((torch.add, torch.sub)):
        first, second = operation(found[:, :2], found[:, 2:]).unbind(1)
        torch.add(first, second, out=out[:, 2 * half])
        torch.sub(first, second, out=out[:, 2 * half + 1])


def _staged_words(seeds: Sequence[int], length: int, device: torch.device) -> Tensor:
    """Words int64 [n, length] in memory that can be copied to `device` asynchronously."""
    words = torch.empty(len(seeds), length, dtype=torch.int64, device="cpu", pin_memory=device.type == "cuda")
    rows = words.numpy().view(np.uint64)

    def draw(part: slice) -> None:
        for seed, row in zip(seeds[part], rows[part], strict=True):
            row[:] = _words(seed, length)

    _on_threads(draw, len(seeds))
    return words


def _words(seed: int, length: int) -> np.ndarray:
    """The bits of one image, uint64 [length]."""
    return np.random.SFC64(int(seed)).random_raw(length)


def _on_threads(draw: Callable[[slice], None], rows: int) -> None:
    """Call `draw` on shares of the rows in several threads, the first in this one: numpy releases the GIL."""
    threads = max(1, min(torch.get_num_threads(), rows))
    cuts = [rows * i // threads for i in range(threads + 1)]
    with ThreadPoolExecutor(threads) as pool:
        others = [pool.submit(draw, slice(*ends)) for ends in itertools.pairwise(cuts[1:])]
        draw(slice(cuts[1]))
    for other in others:
        other.result()


@functools.cache
def _points() -> np.ndarray:
    """The table: complex64 [65536], halved, in multiples of 2^-20."""
    i = np.arange(_CIRCLES)
    s = -np.log1p(-(i + 0.5) / _CIRCLES)
    s *= 1 + np.polyval(_CORRECTION, s)
    golden = (math.sqrt(5) - 1) / 2  # of a turn: keeps the angles of neighbouring circles far apart
    turns = (i + 0.5) * golden % 1 + np.arange(_ANGLES // 4)[:, None]
    quarter = np.sqrt(2 * s) / 2 * np.exp(2j * np.pi / _ANGLES * turns)
    quarter = (np.rint(quarter.real * 2**20) + 1j * np.rint(quarter.imag * 2**20)) / 2**20
    return np.stack([quarter, 1j * quarter, -quarter, -1j * quarter]).astype(np.complex64).reshape(-1)
