"""Norm of heads, rotation by their positions, and the split of packed q, k, v."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from pmf.pair import Dual, tail
from pmf.reference.norm import Kind, normalise, normalise_dot
from pmf.reference.tangent import accumulate

Pairs = Literal["adjacent", "half"]


def rope_tables(grid_size: int, head_dim: int, *, theta: float = 10000.0, device=None) -> tuple[Tensor, Tensor]:
    """cos and sin of the 2-D rotary angles of a square grid, each float32 [grid_size^2, head_dim / 2].

    The first half of the pairs rotates with the row index, the second half with the column index;
    pair i of a half rotates by theta^(-i / (head_dim / 4)) per step. head_dim is a multiple of 4.
    Angles are computed in float64.
    """
    pairs = head_dim // 4
    frequency = theta ** (-torch.arange(pairs, device=device, dtype=torch.float64) / pairs)
    angle = torch.arange(grid_size, device=device, dtype=torch.float64)[:, None] * frequency
    row = angle[:, None].expand(grid_size, grid_size, pairs)
    column = angle[None].expand(grid_size, grid_size, pairs)
    angles = torch.cat([row, column], -1).flatten(0, 1)
    return angles.cos().float(), angles.sin().float()


def _turn(cos: Tensor | None, sin: Tensor | None, prefix_length: int, x: Tensor) -> Tensor | None:
    """Tables [(B,) N, D / 2] as (cos, sin) pairs [(B,) S, H, D / 2, 2]; prefix tokens do not rotate: (1, 0)."""
    if cos is None or sin is None:
        return None
    before = (0, 0, prefix_length, 0)
    turn = torch.stack([F.pad(cos, before, value=1.0), F.pad(sin, before)], -1).to(accumulate(x[:0]).dtype)
    return turn.unsqueeze(-3).expand(*turn.shape[:-2], x.shape[2], -1, -1).contiguous()


def _rotate(x: Tensor, turn: Tensor, pairs: Pairs) -> Tensor:
    """Rotate pairs (a, b), (a + ib) (cos + i sin): x [B, S, H, D]."""
    if pairs == "half":
        (a, b), (cos, sin) = x.chunk(2, -1), turn.unbind(-1)
        return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)
    couples = x.contiguous().unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():  # compilers fuse only real products; in eager mode, a complex one is one pass
        (a, b), (cos, sin) = couples.unbind(-1), turn.unbind(-1)
        return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)
    if couples.storage_offset() % 2:  # where no complex number can lie
        couples = couples.clone()
    return torch.view_as_real(torch.view_as_complex(couples) * torch.view_as_complex(turn)).flatten(-2)


def norm_rope(
    x: Dual,
    weight: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    norm: Kind | None = "rms",
    across_heads: bool = False,
    pairs: Pairs = "adjacent",
    prefix_length: int = 0,
    eps: float = 1e-6,
) -> Dual:
    """y = R(n(x) weight + bias), x [B, S, H, D]; see `pmf.ops.norm_rope`."""
    turn = _turn(cos, sin, prefix_length, x.value)
    return _norm_rope(x, weight, bias, turn, norm, across_heads, pairs, eps)


def _norm_rope(
    x: Dual,
    weight: Tensor | None,
    bias: Tensor | None,
    turn: Tensor | None,
    norm: Kind | None,
    across_heads: bool,
    pairs: Pairs,
    eps: float,
) -> Dual:
    value, heads = accumulate(x.value), x.value.shape[2]
    # Expand the factors to a token's width: products with them, and the sums after those, run along whole tokens.
    weight, bias = (None if p is None else _per_head(p, heads, across_heads) for p in (weight, bias))

    n = value
    if norm is not None:
        n, rstd = normalise(value.flatten(2) if across_heads else value, norm, eps)
    y = n.view_as(value)
    y = y if weight is None else y * weight
    y = y if bias is None else y + bias
    y = y if turn is None else _rotate(y, turn, pairs)
    y = y.to(x.value.dtype)
    if x.dot is None:
        return Dual(y)
    with torch.no_grad():
        rows, y_dot = x.dot.shape[0], accumulate(x.dot)
        if norm is not None:
            n_dot = y_dot.flatten(2) if across_heads else y_dot
            y_dot = normalise_dot(tail(n, rows), tail(rstd, rows), n_dot, norm).view_as(y_dot)
        y_dot = y_dot if weight is None else y_dot.mul_(weight)
        if turn is not None:
            y_dot = _rotate(y_dot, tail(turn, rows) if turn.ndim == 5 else turn, pairs)
        return Dual(y, y_dot.to(x.value.dtype))


def _per_head(parameter: Tensor, heads: int, across_heads: bool) -> Tensor:
    """A weight or bias [D], or [H D] across heads, as [H, D]."""
    parameter = accumulate(parameter)
    return parameter.unflatten(0, (heads, -1)) if across_heads else parameter.expand(heads, -1).contiguous()


def qk_norm_rope(
    qkv: Dual,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    q_bias: Tensor | None = None,
    k_bias: Tensor | None = None,
    num_kv_heads: int | None = None,
    norm: Kind | None = "rms",
    across_heads: bool = False,
    pairs: Pairs = "adjacent",
    prefix_length: int = 0,
    eps: float = 1e-6,
) -> tuple[Dual, Dual, Dual]:
    """q, k = `norm_rope` of each, v unchanged; see `pmf.ops.qk_norm_rope`."""
    q, k, v = (Dual(*parts) for parts in zip(*(_parts(x, num_kv_heads) for x in qkv), strict=True))
    turn, options = _turn(cos, sin, prefix_length, q.value), (norm, across_heads, pairs, eps)
    k_turn = None if turn is None else turn[..., : k.value.shape[2], :, :]
    return (
        _norm_rope(q, q_weight, q_bias, turn, *options),
        _norm_rope(k, k_weight, k_bias, k_turn, *options),
        v if v.dot is None else Dual(v.value, v.dot.detach()),
    )


def _parts(qkv: Tensor | None, kv_heads: int | None) -> tuple[Tensor | None, ...]:
    """q, k and v of [B, S, 3, H, D], or of [B, S, H + 2 G, D] with G heads of k and v."""
    if qkv is None:
        return (None,) * 3
    if kv_heads is None:
        return qkv.unbind(2)
    return qkv.split([qkv.shape[2] - 2 * kv_heads, kv_heads, kv_heads], 2)
