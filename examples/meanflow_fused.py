"""The same MeanFlow with fused layers in the blocks of diffusers' DiT.

    pip install '.[train]' diffusers
    python examples/meanflow_fused.py --help

The blocks keep their parameters and names, so checkpoints stay as they are. `pmf.jvp` carries the tangent through fused
and other code alike; at the end the script prints what each step gains.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
import tyro
from meanflow import DiT, Options, joint_jvp, meanflow_errors, run, step_of
from torch import Tensor, nn

from pmf import ops


class FusedBlock(nn.Module):
    """A block of diffusers' DiT by fused ops, on the block's own parameters."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.norm1, self.attn1, self.norm3, self.ff = block.norm1, block.attn1, block.norm3, block.ff

    def forward(self, x: Tensor, timestep: Tensor, **unused: None) -> Tensor:
        """x [B, S, C] -> [B, S, C]; timestep [B, C] is the condition."""
        attn, modulation = self.attn1, self.norm1.linear(F.silu(timestep))
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, 1)
        y = ops.norm_modulate(x, None, scale1, shift1, kind="layer", eps=self.norm1.norm.eps)
        q, k, v = (linear(y).unflatten(-1, (attn.heads, -1)) for linear in (attn.to_q, attn.to_k, attn.to_v))
        y = attn.to_out[0](ops.attention(q, k, v).flatten(2))
        x, y = ops.residual_norm_modulate(x, y, gate1, None, scale2, shift2, kind="layer", eps=self.norm3.eps)
        return x + gate2[:, None] * self.ff(y)


def fused(network: DiT) -> DiT:
    """The network with fused blocks in place of its own."""
    network.dit.transformer_blocks = nn.ModuleList(map(FusedBlock, network.dit.transformer_blocks))
    return network


def main(options: Options) -> None:
    """Train the fused network by `pmf.jvp`."""
    torch.manual_seed(0)
    before, after = DiT().to(options.device), fused(DiT()).to(options.device)
    compared = {
        "torch.func.jvp": step_of(before, partial(meanflow_errors, jvp=joint_jvp), options),
        "pmf.jvp": step_of(before, meanflow_errors, options),
        "pmf.jvp, fused layers": step_of(after, meanflow_errors, options),
    }
    run(after, meanflow_errors, options, compared)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
