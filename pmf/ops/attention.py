"""Softmax attention."""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor

from pmf.autocast import autocast_dtype
from pmf.errors import InputError
from pmf.inputs import Inputs, Moving, Pair
from pmf.pair import Dual


@overload
def attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, impl: str | None = None) -> Tensor: ...
@overload
def attention(q: Pair, k: Moving, v: Moving, *, scale: float | None = None, impl: str | None = None) -> Dual: ...
def attention(q, k, v, *, scale=None, impl=None):
    """Softmax attention over all keys: o = softmax(scale q k^T) v.

    P = softmax(S), S_dot = scale (q_dot k^T + q k_dot^T), H = P * S_dot,
    o_dot = P v_dot + H v - rowsum(H) o.

    Args: q [B, S_q, H, D]; k, v [B, S_k, H, D]; scale defaults to 1 / sqrt(D).
    Returns o [B, S_q, H, D]. Tangents: of q, k and v.
    """
    inputs = Inputs("attention", {"q": q, "k": k, "v": v})
    q, k, v = (dual.value for dual in inputs.duals)
    inputs.shape("q", q, None, None, None, None)
    samples, _, heads, head_dim = q.shape
    inputs.shape("k", k, samples, None, heads, head_dim)
    inputs.shape("v", v, *k.shape)
    if k.shape[1] == 0:
        raise InputError("attention: k must have at least one token, got 0")
    wanted = autocast_dtype(q.device.type)
    if wanted is not None and q.dtype != torch.float64:
        inputs.cast(wanted)
    if inputs.dtypes.count(inputs.dtypes[0]) != len(inputs.dtypes):
        raise InputError(f"attention: q, k, v and their tangents must have one dtype, got {inputs.dtypes}")
    run = inputs.implementation(impl, head_dim)
    return inputs.give(run.attention(*inputs.duals, scale=head_dim**-0.5 if scale is None else scale))
