"""The option `linear` of ops: a product of their result, which then is not kept for backward."""

from __future__ import annotations

import torch
from torch import Tensor

from pmf.autocast import autocast_dtype
from pmf.errors import InputError
from pmf.inputs import Inputs
from pmf.pair import Weights


def linear_inputs(op: str, linear: Weights | None) -> dict[str, Tensor | None]:
    """The weight and bias as fixed inputs of an op."""
    if linear is None:
        return {}
    if not (isinstance(linear, tuple | list) and len(linear) == 2):
        got = f"{len(linear)} values" if isinstance(linear, tuple | list) else type(linear).__name__
        raise InputError(f"{op}: linear must be a pair (weight, bias), got {got}")
    return {"linear's weight": linear[0], "linear's bias": linear[1]}


def checked_linear(inputs: Inputs, linear: Weights | None, width: int, dtype: torch.dtype) -> Weights | None:
    """The weight and bias of a product of rows of `width` values and this dtype, cast to it by autocast alone."""
    if linear is None:
        return None
    weight, bias = linear
    inputs.shape("linear's weight", weight, None, width)
    if bias is not None:
        inputs.shape("linear's bias", bias, len(weight))
    if autocast_dtype(weight.device.type) is not None:
        return weight.to(dtype), None if bias is None else bias.to(dtype)
    for name, given in (("weight", weight), ("bias", bias)):
        if given is not None and given.dtype != dtype:
            raise InputError(f"{inputs.op}: linear's {name} must have the result's dtype {dtype}, got {given.dtype}")
    return weight, bias
