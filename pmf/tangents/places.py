"""Rules of functions of places in space, which have no forward mode: distances of points, samples of images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pmf.pair import total
from pmf.tangents.fallback import tangents_by_torch_func
from pmf.tangents.handlers import ruled
from pmf.tangents.rules import HANDLERS, TRACED, Rule, is_dual, named, plain

_ATEN = torch.ops.aten


def _cdist(out: Tensor, x1: Any, x2: Any, p: float = 2.0, compute_mode: Any = None) -> Any:
    """Of |x1_i - x2_j|_p for x1 [..., N, C], x2 [..., M, C]; all differences [..., N, M, C] are in memory meanwhile."""

    def distances(x1: Tensor, x2: Tensor) -> Tensor:
        return torch.linalg.vector_norm(x1.unsqueeze(-2) - x2.unsqueeze(-3), p, dim=-1)

    return tangents_by_torch_func(distances, out, (x1, x2), {})


def _pdist(out: Tensor, x: Any, p: float = 2.0) -> Any:
    """Of the distances of each row of x [N, C] and each later one."""
    one, other = torch.triu_indices(len(x.value), len(x.value), 1, device=out.device)
    return tangents_by_torch_func(lambda x: torch.linalg.vector_norm(x[one] - x[other], p, dim=-1), out, (x,), {})


def _grid_sampler(function: Callable) -> Rule:
    """Linear in the images; of the grid by its backward, which sums over the channels of an image.

    With every channel as an image of its own it gives d sample / d place, [N C, ..., 2 or 3].
    """

    def rule(out, input, grid, *options):
        dot = function(input.dot, plain(grid), *options) if is_dual(input) else None
        if is_dual(grid):
            image, places = plain(input).to(out.dtype), grid.value.to(out.dtype)
            n, c = image.shape[:2]
            backward = _ATEN.grid_sampler_2d_backward if image.ndim == 4 else _ATEN.grid_sampler_3d_backward
            ones, alone = out.new_ones(n * c, 1, *out.shape[2:]), image.reshape(n * c, 1, *image.shape[2:])
            slopes = backward(ones, alone, places.repeat_interleave(c, 0), *options, [False, True])[1]
            moved = (slopes.view(n, c, *places.shape[1:]) * grid.dot[:, None]).sum(-1)
            dot = total(dot, moved)
        return dot

    return rule


for _names, _rule in (("cdist", _cdist), ("pdist", _pdist)):
    for _function in named(_names):
        HANDLERS[_function] = ruled(_rule)
TRACED[torch.cdist] = ruled(_cdist)
for _function in named("grid_sampler", "grid_sampler_2d", "grid_sampler_3d"):
    HANDLERS[_function] = ruled(_grid_sampler(_function))
