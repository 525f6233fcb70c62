"""The product behind an op: backward makes its input again instead of keeping it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pmf.pair import Dual, Weights, linear_dual
from pmf.private import transforming
from pmf.recompute import checkpoint_values


def then_linear(op: Callable[..., Any]) -> Callable[..., Any]:
    """`op` with an option `linear`: W and b of a product of its last result.

    Backward runs op again, up to the product, which checkpoints of PyTorch do not repeat where nothing needs its
    result. Compilers choose themselves what to keep, and transforms keep everything.
    """

    def run(*inputs: Any, linear: Weights | None = None, **options: Any) -> Any:
        if linear is None:
            return op(*inputs, **options)

        def both(matrix: Tensor, bias: Tensor | None, *inputs: Any) -> Any:
            result = op(*inputs, **options)
            if isinstance(result, Dual):
                return linear_dual(result, matrix, bias)
            return *result[:-1], linear_dual(result[-1], matrix, bias)

        if torch.compiler.is_compiling() or transforming() or not torch.is_grad_enabled():
            return both(*linear, *inputs)
        # As an input, the weight is saved, and backward raises if it was changed in place.
        return checkpoint_values(both, *linear, *inputs, preserve_rng_state=False)

    run.__doc__ = op.__doc__
    return run
