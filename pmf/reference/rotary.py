"""Per-head RMSNorm of q and k, 2-D rotary positions, and the split of packed q, k, v."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pmf.pair import Dual, tail
from pmf.reference.norm import normalise, normalise_dot
from pmf.reference.tangent import accumulate


def rope_tables(grid_size: int, head_dim: int, *, theta: float = 10000.0, device=None) -> tuple[Tensor, Tensor]:
    """cos and sin of the 2-D rotary angles of a square grid, each float32 [grid_size^2, head_dim / 2].

    The first half of the pairs rotates with the row index, the second half with the column index;
    pair i of a half rotates by theta^(-i / (head_dim / 4)) per step. Angles are computed in float64.
    """
    pairs = head_dim // 4
    frequency = theta ** (-torch.arange(pairs, device=device, dtype=torch.float64) / pairs)
    angle = torch.arange(grid_size, device=device, dtype=torch.float64)[:, None] * frequency
    row = angle[:, None].expand(grid_size, grid_size, pairs)
    column = angle[None].expand(grid_size, grid_size, pairs)
    angles = torch.cat([row, column], -1).flatten(0, 1)
    return angles.cos().float(), angles.sin().float()


def _turn(cos: Tensor, sin: Tensor, prefix_length: int, heads: int) -> Tensor:
    """Tables [N, D / 2] as (cos, sin) pairs [S, 2, H, D / 2, 2]; prefix tokens do not rotate: (1, 0)."""
    before = (0, 0, prefix_length, 0)
    turn = torch.stack([F.pad(cos, before, value=1.0), F.pad(sin, before)], -1)
    return turn[:, None, None].expand(-1, 2, heads, -1, -1).contiguous()


def _rotate(x: Tensor, turn: Tensor) -> Tensor:
    """Rotate adjacent pairs (a, b), (a + ib) (cos + i sin): x [B, S, 2, H, D]."""
    pairs = x.contiguous().unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():  # compilers fuse only real products; in eager mode, a complex one is one pass
        (a, b), (cos, sin) = pairs.unbind(-1), turn.unbind(-1)
        return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)
    return torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(turn)).flatten(-2)


def qk_norm_rope(
    qkv: Dual,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    prefix_length: int,
    eps: float = 1e-6,
) -> tuple[Dual, Dual, Dual]:
    """q, k = R(n(q) q_weight), R(n(k) k_weight), v unchanged; see `pmf.ops.qk_norm_rope`."""
    qk, v = qkv.value.split([2, 1], 2)
    qk, v = accumulate(qk), v[:, :, 0]
    # Expand both factors to a token's width: products with them, and the sums after those, run along whole tokens.
    heads, dtype = qk.shape[3], qkv.value.dtype
    weight = accumulate(torch.stack([q_weight, k_weight]))[:, None].expand(-1, heads, -1).contiguous()
    turn = _turn(cos.to(qk.dtype), sin.to(qk.dtype), prefix_length, heads)

    n, rstd = normalise(qk, "rms", eps)
    q, k = _rotate(n * weight, turn).to(dtype).unbind(2)
    if qkv.dot is None:
        return Dual(q), Dual(k), Dual(v)
    with torch.no_grad():
        rows = qkv.dot.shape[0]
        n_dot = normalise_dot(tail(n, rows), tail(rstd, rows), accumulate(qkv.dot[:, :, :2]), "rms")
        q_dot, k_dot = _rotate(n_dot.mul_(weight), turn).to(dtype).unbind(2)
    return Dual(q, q_dot), Dual(k, k_dot), Dual(v, qkv.dot.detach()[:, :, 2])
