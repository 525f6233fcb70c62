"""The division of tokens into shares, and the sums over them."""

import itertools

import pytest
import torch

pytest.importorskip("triton")

from pmf.kernels import sums
from tests.kernels.checks import DEVICE, generator, randn, within_budget

SHAPES = list(itertools.product((1, 2, 3, 7), (1, 5, 8, 16), (1, 3, 6, 16)))
"""Samples, tokens, programs: samples that end inside a share or at its end, and many samples in one share."""


def segments_of(shares: sums.Shares) -> list[tuple[int, int, int]]:
    """(row of the partial buffer, first token, last token + 1) in the order of the programs."""
    found = []
    for program in range(shares.programs):
        start = program * shares.share
        stop = min(start + shares.share, shares.samples * shares.length)
        for sample in range(start // shares.length, min(stop // shares.length, shares.samples - 1) + 1):
            first, last = sample * shares.length, (sample + 1) * shares.length
            found.append((program + sample, max(start, first), max(min(stop, last), max(start, first))))
    return found


@pytest.mark.parametrize("per_sample", (False, True))
@pytest.mark.parametrize(("samples", "length", "programs"), SHAPES)
def test_segments(samples, length, programs, per_sample):
    """Every row of the partial buffer is written once, in order, and every token belongs to one segment."""
    shares = sums.divide(samples, length, per_sample, programs, 1)
    segments = segments_of(shares)
    assert shares.programs <= programs
    assert [row for row, _, _ in segments] == list(range(shares.segments))
    assert [t for _, first, last in segments for t in range(first, last)] == list(range(samples * length))


@pytest.mark.parametrize(("samples", "processors"), list(itertools.product((1, 8, 63, 128, 140, 257), (108, 132, 148))))
def test_work_is_even(samples, processors):
    """At any batch size, no program takes more tokens than the mean, rounded up."""
    for per_sample in (False, True):
        shares = sums.divide(samples, 276, per_sample, 2 * processors, 1)
        assert shares.share == -(-samples * 276 // (2 * processors))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize(("samples", "length", "programs"), SHAPES[::3])
def test_add_up(samples, length, programs, dtype):
    """Sums per sample and over all samples, of one buffer each, in one launch."""
    shares = sums.divide(samples, length, True, programs, 1)
    terms = randn(samples * length, 40, gen=generator(samples, length, programs))
    partials = torch.full((2, shares.segments, 40), float("nan"), device=DEVICE)
    for row, first, last in segments_of(shares):
        partials[:, row] = terms[first:last].sum(0)
    like = [torch.empty(samples, 40, dtype=dtype, device=DEVICE), torch.empty(40, dtype=dtype, device=DEVICE)]
    found = sums.add_up(partials.unbind(), shares, like)
    each = terms.view(samples, length, 40)
    for mine, low, truth in zip(
        found, (each.sum(1), terms.sum(0)), (each.double().sum(1), terms.double().sum(0)), strict=True
    ):
        within_budget("sum", mine, low.to(dtype), truth)
