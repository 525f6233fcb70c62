"""Softmax attention."""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor

from pmf.autocast import autocast_dtype
from pmf.errors import InputError, readable, require
from pmf.fields import check_flags, checked_number
from pmf.inputs import Inputs, Moving, Pair
from pmf.pair import Dual


@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, causal: bool = False,
    key_lengths: Tensor | None = None, enable_gqa: bool = False, impl: str | None = None,
) -> Tensor: ...  # fmt: skip
@overload
def attention(
    q: Pair, k: Moving, v: Moving, *, scale: float | None = None, causal: bool = False,
    key_lengths: Tensor | None = None, enable_gqa: bool = False, impl: str | None = None,
) -> Dual: ...  # fmt: skip
def attention(q, k, v, *, scale=None, causal=False, key_lengths=None, enable_gqa=False, impl=None):
    """Softmax attention: o = softmax(scale q k^T) v, over all keys or over those that a query may read.

    P = softmax(S), S_dot = scale (q_dot k^T + q k_dot^T), H = P * S_dot,
    o_dot = P v_dot + H v - rowsum(H) o.

    Args: q [B, S_q, H, D]; k, v [B, S_k, H, D]; scale defaults to 1 / sqrt(D).
    enable_gqa: k and v may have fewer heads, G; query head h reads key head h // (H / G).
    causal: query i reads keys 0 to i; S_q must be S_k.
    key_lengths: int32 or int64 [B], from 1 to S_k (checked on CPUs only); queries of sample b read keys 0 to
    key_lengths[b] - 1. The others may hold anything, NaN too (PyTorch's masks let NaN through; here k and v are
    copied without it). All queries are computed.
    Returns o [B, S_q, H, D]. Tangents: of q, k and v.
    """
    inputs = Inputs("attention", {"q": q, "k": k, "v": v})
    q, k, v = (dual.value for dual in inputs.duals)
    inputs.shape("q", q, None, None, None, None)
    check_flags("attention", causal=causal, enable_gqa=enable_gqa)
    _check_keys(inputs, q, k, v, enable_gqa)
    if causal and q.shape[1] != k.shape[1]:
        reason = "backends differ on which keys a query reads otherwise"
        raise InputError(
            f"attention: causal needs as many queries as keys, got {q.shape[1]} and {k.shape[1]}; {reason}"
        )
    if key_lengths is not None:
        _check_lengths(key_lengths, k)
    wanted = autocast_dtype(q.device.type)
    if wanted is not None and q.dtype != torch.float64:
        inputs.cast(wanted)
    if inputs.dtypes.count(inputs.dtypes[0]) != len(inputs.dtypes):
        raise InputError(f"attention: q, k, v and their tangents must have one dtype, got {inputs.dtypes}")
    head_dim = q.shape[3]
    run = inputs.implementation(impl, head_dim)
    scale = head_dim**-0.5 if scale is None else checked_number("attention", "scale", scale)
    return inputs.give(run.attention(*inputs.duals, scale=scale, causal=bool(causal), key_lengths=key_lengths))


def _check_keys(inputs: Inputs, q: Tensor, k: Tensor, v: Tensor, enable_gqa: bool) -> None:
    """Errors: `InputError` on keys or values whose shape does not go with that of q, or without tokens."""
    samples, _, heads, head_dim = q.shape
    if head_dim == 0:
        raise InputError("attention: q must have at least one channel in each head, got 0")
    if k is None:
        inputs.shape("k", k)
    fits = k.ndim == 4 and k.shape[0] == samples and k.shape[3] == head_dim
    if not fits or not _serves(k.shape[2], heads, enable_gqa):
        wanted = f"a divisor of {heads}" if enable_gqa else heads
        more = "" if enable_gqa else f" (a divisor of {heads} heads with enable_gqa=True)"
        expected = f"[{samples}, any, {wanted}, {head_dim}], got {list(k.shape)}{more}"
        hint = "expected [B, S, H, D]; heads first? transpose(1, 2)"
        raise InputError(f"attention: k must have shape {expected}; {hint}")
    inputs.shape("v", v, *k.shape)
    if k.shape[1] == 0:
        raise InputError("attention: k must have at least one token, got 0")


def _serves(groups: int, heads: int, enable_gqa: bool) -> bool:
    """Whether keys with `groups` heads go with queries with `heads` heads."""
    return groups == heads or (enable_gqa and groups > 0 and heads % groups == 0)


def _check_lengths(key_lengths: Tensor, k: Tensor) -> None:
    """Errors: `InputError` on lengths of another form, and where they can be read on those beyond S_k."""
    wanted = "attention: key_lengths must be an int32 or int64 tensor"
    if isinstance(key_lengths, Dual):  # what a layer made of a floating tensor
        key_lengths = key_lengths.value
    known = isinstance(key_lengths, Tensor) and key_lengths.dtype in (torch.int32, torch.int64)
    if not known:
        raise InputError(f"{wanted}, got {getattr(key_lengths, 'dtype', type(key_lengths).__name__)}")
    if key_lengths.shape != k.shape[:1] or key_lengths.device != k.device:
        got = f"got {list(key_lengths.shape)} on {key_lengths.device}"
        raise InputError(f"{wanted} of shape [{k.shape[0]}] on {k.device}, {got}")
    if readable(key_lengths) and len(key_lengths):
        least, most = key_lengths.min().item(), key_lengths.max().item()
        message = f"attention: key_lengths must lie in [1, {k.shape[1]}], got {least} to {most}"
        require(least >= 1 and most <= k.shape[1], message)
