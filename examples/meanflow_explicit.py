"""The same MeanFlow with tangents passed by hand, so that only the samples with r < t have one.

    pip install '.[train]' diffusers
    python examples/meanflow_explicit.py --help

Half of the samples have r = t: V = u there, whatever du/dt is. A `pmf.Dual` holds a value and the tangent of its last
samples. Parts that are not worth porting stay as they are, and get their tangent from `pmf.jvp`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
import tyro
from einops import rearrange
from meanflow import DiT, Options, joint_jvp, meanflow_errors, run, step_of
from meanflow_fused import FusedBlock, fused
from torch import Tensor, nn

import pmf
from pmf import Dual, ops
from pmf.dual import tangent_rows
from pmf.layers import Residual, linear_dual


def unported(part: Callable[..., Tensor], *inputs: Dual) -> Dual:
    """Value and tangent of code that takes and returns tensors."""
    values, dots = zip(*inputs, strict=True)
    return Dual(*pmf.jvp(part, values, dots, rows=tangent_rows(dots)))


def linear(layer: nn.Linear, x: Dual) -> Dual:
    """x W^T + b, and x_dot W^T."""
    return linear_dual(x, layer.weight, layer.bias)


class ExplicitBlock(FusedBlock):
    """A fused block that takes and returns Duals."""

    def forward_dual(self, x: Dual, condition: Dual) -> Dual:
        """x [B, S, C] -> [B, S, C]; condition [B, C]."""
        attn, modulation = self.attn1, linear(self.norm1.linear, ops.silu(condition))
        shift1, scale1, gate1, shift2, scale2, gate2 = map(Dual, *(part.chunk(6, 1) for part in modulation))
        y = ops.norm_modulate(x, None, scale1, shift1, kind="layer", eps=self.norm1.norm.eps)
        q, k, v = (
            linear(layer, y).map(lambda p: p.unflatten(-1, (attn.heads, -1)))
            for layer in (attn.to_q, attn.to_k, attn.to_v)
        )
        y = linear(attn.to_out[0], ops.attention(q, k, v).map(lambda o: o.flatten(2)))
        x, y = ops.residual_norm_modulate(x, y, gate1, None, scale2, shift2, kind="layer", eps=self.norm3.eps)
        return Residual(x, unported(self.ff, y), gate2).add()


class ExplicitDiT(DiT):
    """The DiT with explicit tangents, on the same parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.dit.transformer_blocks = nn.ModuleList(map(ExplicitBlock, self.dit.transformer_blocks))

    def head(self, x: Tensor, condition: Tensor) -> Tensor:
        """Tokens to images: the end of diffusers' forward pass."""
        shift, scale = self.dit.proj_out_1(F.silu(condition)).chunk(2, 1)
        x = self.dit.proj_out_2(self.dit.norm_out(x) * (1 + scale[:, None]) + shift[:, None])
        return rearrange(x, "b (h w) (p q c) -> b c (h p) (w q)", h=4, p=2, q=2)

    def forward_dual(self, z: Dual, t: Dual, r: Dual, y: Tensor) -> Dual:
        """u and the tangent of its last samples."""
        condition = unported(self.condition, t, r, Dual(y))
        x = unported(self.dit.pos_embed, z)
        for block in self.dit.transformer_blocks:
            x = block.forward_dual(x, condition)
        return unported(self.head, x, condition)


def explicit_jvp(network: ExplicitDiT, primals: tuple, tangents: tuple) -> tuple[Tensor, Tensor]:
    """u, and du/dt of the samples with r < t, the last half; zero of the others."""
    (z, t, r, y), v = primals, tangents[0]
    half = len(z) // 2
    u, du_dt = network.forward_dual(Dual(z, v[half:]), Dual(t, torch.ones_like(t[half:])), Dual(r), y)
    return u, torch.cat([torch.zeros_like(v[:half]), du_dt])


def main(options: Options) -> None:
    """Train with explicit tangents."""
    torch.manual_seed(0)
    networks = DiT(), fused(DiT()), ExplicitDiT()
    before, swapped, after = (network.to(options.device) for network in networks)
    errors = partial(meanflow_errors, jvp=explicit_jvp)
    compared = {
        "torch.func.jvp": step_of(before, partial(meanflow_errors, jvp=joint_jvp), options),
        "pmf.jvp": step_of(before, meanflow_errors, options),
        "pmf.jvp, fused layers": step_of(swapped, meanflow_errors, options),
        "explicit, r < t only": step_of(after, errors, options),
    }
    run(after, errors, options, compared)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
