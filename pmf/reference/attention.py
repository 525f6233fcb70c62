"""Softmax attention and its tangent."""

from __future__ import annotations

import torch
from torch import Tensor

from pmf.reference.tangent import accumulate, tail, tangent_rows, total


def _scores(q: Tensor, k: Tensor) -> Tensor:
    """q k^T over heads: [B, H, S_q, S_k], accumulated in float32."""
    return accumulate(torch.einsum("bqhd,bkhd->bhqk", q, k))


def _mix(p: Tensor, v: Tensor) -> Tensor:
    """p v over heads: [B, S_q, H, D]."""
    return torch.einsum("bhqk,bkhd->bqhd", p.to(v.dtype), v)


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
    q, k, v = primals
    q_dot, k_dot, v_dot = tangents
    scale = q.shape[-1] ** -0.5 if scale is None else scale

    p = torch.softmax(scale * _scores(q, k), -1)
    o = _mix(p, v)

    rows = tangent_rows(tangents)
    if rows is None:
        return o, None
    with torch.no_grad():
        q, k, v, p = (tail(x, rows) for x in (q, k, v, p))
        s_dot = total(
            None if q_dot is None else _scores(q_dot, k),
            None if k_dot is None else _scores(q, k_dot),
        )
        o_dot = None if v_dot is None else _mix(p, v_dot)
        if s_dot is not None:
            h = p * (scale * s_dot)
            row_sum = h.sum(-1).transpose(1, 2)[..., None]
            o_dot = total(o_dot, _mix(h, v) - row_sum * accumulate(tail(o, rows)))
        return o, o_dot.to(o.dtype)
