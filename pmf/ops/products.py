"""The option `linear` of ops: a product of their result, which then is not kept for backward."""

from __future__ import annotations

import torch
from torch import Tensor

from pmf.errors import InputError
from pmf.inputs import Inputs

Linear = tuple[Tensor, Tensor | None]
"""(weight [N, C], bias [N] or None): y W^T + b takes the place of y."""


def linear_inputs(linear: Linear | None) -> dict[str, Tensor | None]:
    """The weight and bias as fixed inputs of an op."""
    if linear is None:
        return {}
    if not (isinstance(linear, tuple) and len(linear) == 2):
        raise InputError(f"linear: expected a pair (weight, bias), got {type(linear).__name__}")
    return {"linear's weight": linear[0], "linear's bias": linear[1]}


def checked_linear(inputs: Inputs, linear: Linear | None, width: int, dtype: torch.dtype) -> Linear | None:
    """The weight and bias of a product of rows of `width` values, in the dtype of the rows."""
    if linear is None:
        return None
    weight, bias = linear
    inputs.shape("linear's weight", weight, None, width)
    if bias is not None:
        inputs.shape("linear's bias", bias, len(weight))
    return weight.to(dtype), None if bias is None else bias.to(dtype)
