"""Softmax attention and its tangent."""

from __future__ import annotations

import torch
from torch import Tensor

from pmf.pair import Dual, tail, tangent_rows, total, without_padding
from pmf.private import forward_mode, transform_level
from pmf.reference.tangent import accumulate


def _heads(x: Tensor, heads: int) -> Tensor:
    """[B, S, G, D] as [B H, S, D]: one batch of matrices; a head of keys is repeated for the queries that share it."""
    groups = x.shape[2]
    x = x.transpose(1, 2)
    return (x if groups == heads else x.repeat_interleave(heads // groups, 1)).flatten(0, 1)


def _tokens(x: Tensor, heads: int) -> Tensor:
    """[B H, S, D] as [B, S, H, D]."""
    return x.unflatten(0, (-1, heads)).transpose(1, 2)


def _masked(scores: Tensor, heads: int, causal: bool, key_lengths: Tensor | None) -> Tensor:
    """The scores [B H, S_q, S_k], -inf where a query does not read a key."""
    i_q, i_k = (torch.arange(size, device=scores.device) for size in scores.shape[1:])
    if causal:
        scores = scores.masked_fill(i_k > i_q[:, None], -torch.inf)
    if key_lengths is not None:
        beyond = i_k >= key_lengths[:, None]
        scores = scores.masked_fill(beyond.repeat_interleave(heads, 0)[:, None], -torch.inf)
    return scores


def _softmax(scores: Tensor) -> Tensor:
    """Over the last dimension. PyTorch's own gives tangents without gradient under forward_ad outside torch.func."""
    if not forward_mode() or transform_level() is not None:
        return torch.softmax(scores, -1)
    weights = torch.exp(scores - scores.detach().amax(-1, keepdim=True))
    return weights / weights.sum(-1, keepdim=True)


def attention(
    q: Dual, k: Dual, v: Dual, *, scale: float, causal: bool = False, key_lengths: Tensor | None = None
) -> Dual:
    """o = softmax(scale q k^T) v, and its tangent; see `pmf.ops.attention`.

    With P the softmax and S_dot the tangent of the scores, H = P * S_dot:
    o_dot = P v_dot + H v - rowsum(H) o. P is zero where a query does not read a key.
    """
    heads = q.value.shape[2]
    k_value, v_value = (without_padding(x.value, key_lengths) for x in (k, v))
    q_heads, k_heads, v_heads = (_heads(x, heads) for x in (q.value, k_value, v_value))
    scores = scale * accumulate(torch.bmm(q_heads, k_heads.mT))
    p = _softmax(_masked(scores, heads, causal, key_lengths))
    mixed = torch.bmm(p.to(v_heads.dtype), v_heads)
    o = _tokens(mixed, heads)

    rows = tangent_rows((q.dot, k.dot, v.dot))
    if rows is None:
        return Dual(o)
    with torch.no_grad():
        lengths = None if key_lengths is None else tail(key_lengths, rows)
        dots = q.dot, *(None if x.dot is None else without_padding(x.dot, lengths) for x in (k, v))
        q_last, k_last, v_last, p_last, o_last = (tail(x, rows * heads) for x in (q_heads, k_heads, v_heads, p, mixed))
        q_dot, k_dot, v_dot = (None if x is None else _heads(x, heads) for x in dots)
        o_dot = _tangent(q_last, k_last, v_last, p_last, o_last, q_dot, k_dot, v_dot, scale)
        return Dual(o, _tokens(o_dot.to(o.dtype), heads))


def _tangent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    p: Tensor,
    o: Tensor,
    q_dot: Tensor | None,
    k_dot: Tensor | None,
    v_dot: Tensor | None,
    scale: float,
) -> Tensor:
    """o_dot of heads [B H, S, D], in the accumulation dtype."""
    s_dot = total(
        None if q_dot is None else accumulate(torch.bmm(q_dot, k.mT)),
        None if k_dot is None else accumulate(torch.bmm(q, k_dot.mT)),
    )
    o_dot = None if v_dot is None else accumulate(torch.bmm(p.to(v.dtype), v_dot))
    if s_dot is not None:
        h = s_dot.mul_(scale).mul_(p)
        o_dot = total(o_dot, accumulate(torch.bmm(h.to(v.dtype), v)))
        o_dot.addcmul_(h.sum(-1, keepdim=True), accumulate(o), value=-1)
    return o_dot
