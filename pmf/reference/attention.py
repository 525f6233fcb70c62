"""Softmax attention and its tangent."""

from __future__ import annotations

import torch
from torch import Tensor

from pmf.pair import Dual, tail, tangent_rows, total
from pmf.private import forward_mode, transform_level
from pmf.reference.tangent import accumulate


def _heads(x: Tensor) -> Tensor:
    """[B, S, H, D] as [B H, S, D]: one batch of matrices."""
    return x.transpose(1, 2).flatten(0, 1)


def _tokens(x: Tensor, heads: int) -> Tensor:
    """[B H, S, D] as [B, S, H, D]."""
    return x.unflatten(0, (-1, heads)).transpose(1, 2)


def _softmax(scores: Tensor) -> Tensor:
    """Over the last dimension. PyTorch's own gives tangents without gradient under forward_ad outside torch.func."""
    if not forward_mode() or transform_level() is not None:
        return torch.softmax(scores, -1)
    weights = torch.exp(scores - scores.detach().amax(-1, keepdim=True))
    return weights / weights.sum(-1, keepdim=True)


def attention(q: Dual, k: Dual, v: Dual, *, scale: float) -> Dual:
    """o = softmax(scale q k^T) v, and its tangent; see `pmf.ops.attention`.

    With P the softmax and S_dot the tangent of the scores, H = P * S_dot:
    o_dot = P v_dot + H v - rowsum(H) o.
    """
    heads = q.value.shape[2]
    q_heads, k_heads, v_heads = (_heads(x.value) for x in (q, k, v))
    p = _softmax(scale * accumulate(torch.bmm(q_heads, k_heads.mT)))
    mixed = torch.bmm(p.to(v_heads.dtype), v_heads)
    o = _tokens(mixed, heads)

    rows = tangent_rows((q.dot, k.dot, v.dot))
    if rows is None:
        return Dual(o)
    with torch.no_grad():
        q_last, k_last, v_last, p_last, o_last = (tail(x, rows * heads) for x in (q_heads, k_heads, v_heads, p, mixed))
        q_dot, k_dot, v_dot = (None if x.dot is None else _heads(x.dot) for x in (q, k, v))
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
