"""Softmax attention and its tangent."""

from __future__ import annotations

import torch
from torch import Tensor

from pmf.reference.tangent import accumulate, tail, tangent_rows, total


def _heads(x: Tensor) -> Tensor:
    """[B, S, H, D] as [B H, S, D]: one batch of matrices."""
    return x.transpose(1, 2).flatten(0, 1)


def _tokens(x: Tensor, heads: int) -> Tensor:
    """[B H, S, D] as [B, S, H, D]."""
    return x.unflatten(0, (-1, heads)).transpose(1, 2)


def attention_dual(
    primals: tuple[Tensor, Tensor, Tensor],
    tangents: tuple[Tensor | None, Tensor | None, Tensor | None],
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor | None]:
    """o = softmax(scale q k^T) v, and its tangent; see `pmf.ops.attention`.

    With P the softmax and S_dot the tangent of the scores, H = P * S_dot:
    o_dot = P v_dot + H v - rowsum(H) o.
    """
    heads, head_dim = primals[0].shape[2:]
    scale = head_dim**-0.5 if scale is None else scale

    q, k, v = (_heads(x) for x in primals)
    p = torch.softmax(scale * accumulate(torch.bmm(q, k.mT)), -1)
    mixed = torch.bmm(p.to(v.dtype), v)
    o = _tokens(mixed, heads)

    rows = tangent_rows(tangents)
    if rows is None:
        return o, None
    with torch.no_grad():
        q, k, v, p, mixed = (tail(x, rows * heads) for x in (q, k, v, p, mixed))
        q_dot, k_dot, v_dot = (None if x is None else _heads(x) for x in tangents)
        s_dot = total(
            None if q_dot is None else accumulate(torch.bmm(q_dot, k.mT)),
            None if k_dot is None else accumulate(torch.bmm(q, k_dot.mT)),
        )
        o_dot = None if v_dot is None else accumulate(torch.bmm(p.to(v.dtype), v_dot))
        if s_dot is not None:
            h = s_dot.mul_(scale).mul_(p)
            o_dot = total(o_dot, accumulate(torch.bmm(h.to(v.dtype), v)))
            o_dot.addcmul_(h.sum(-1, keepdim=True), accumulate(mixed), value=-1)
        return o, _tokens(o_dot.to(o.dtype), heads)
