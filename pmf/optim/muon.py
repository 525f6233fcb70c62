"""Muon (Jordan et al. 2024): orthogonalised momentum. Matrices of one shape are batched, and ranks share the work."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard

from pmf.errors import require
from pmf.fields import check_values
from pmf.optim.moments import MomentOptimizer, advance, batches, evaluated, nesterov
from pmf.private import foreach_lerp_, foreach_sub_
from pmf.sharded import batched, distributed, local

COEFFICIENTS = (3.4445, -4.775, 2.0315)
"""a, b, c of the quintic a X + (b X X^T + c (X X^T)^2) X, which when iterated drives singular values to about 1."""
EPS = 1e-8
"""Added to a matrix's norm before dividing by it."""
CHUNK_VALUES = 2**27
"""Values orthogonalised at a time; the iteration takes about four times their memory."""


def orthogonalise(x: Tensor, steps: int) -> Tensor:
    """Newton-Schulz iteration: move the singular values of each matrix of x [n, r, c] to about 1.

    Products are in bfloat16 on CUDA, which is accurate enough and several times faster, else in the dtype of x.
    """
    a, b, c = COEFFICIENTS
    tall = x.shape[-2] > x.shape[-1]
    y = x / (x.norm(dim=(-2, -1), keepdim=True) + EPS)
    y = y.bfloat16() if x.is_cuda else y
    y = y.mT if tall else y
    for _ in range(steps):
        gram = y @ y.mT
        y = torch.baddbmm(y, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    return (y.mT if tall else y).to(x.dtype)


class Muon(MomentOptimizer):
    """Muon with Nesterov momentum over matrices: W -= lr sqrt(max(1, r / c)) orthogonalise(update).

    m = lerp(m, g, 1 - beta); update = beta m / (1 - beta^(t + 1)) + (1 - beta) g / (1 - beta^t), where t counts a
    matrix's steps from 1; as in optax, both terms are corrected for m having started at zero. State of a matrix:
    momentum_buffer, shaped like it, and step, on the CPU. Matrices of one shape are orthogonalised in one batch of
    `steps` iterations (`orthogonalise`).

    `parameters` are matrices [r, c], as from `pmf.optim.split_parameters`. `mesh`: the device mesh that holds them,
    replicated (DDP) or sharded (FSDP2). Each of its ranks orthogonalises its share of the matrices and sends the result
    to the others; without a mesh, every rank orthogonalises all matrices. `shard_over`: a mesh of one dimension over
    which the momentum of replicated matrices is sharded by rows (ZeRO-1; `pmf.sharded.shard`); it is then `mesh` too.
    """

    moments = ("momentum_buffer",)

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        *,
        lr: float,
        momentum: float = 0.95,
        steps: int = 5,
        mesh: DeviceMesh | None = None,
        shard_over: DeviceMesh | None = None,
    ) -> None:
        require(shard_over is None or mesh in (None, shard_over), "shard_over: expected no other mesh beside it")
        self.mesh = shard_over if mesh is None else mesh
        super().__init__(parameters, dict(lr=lr, momentum=momentum, steps=steps), shard_over)

    def __getstate__(self) -> dict[str, object]:
        """The state for copies and pickles; PyTorch's own omits the meshes."""
        return {**super().__getstate__(), "mesh": self.mesh}

    def check_group(self, group: dict[str, Any]) -> None:
        """Raise `InputError` unless these are matrices, and options of Muon."""
        lr, momentum, steps = group["lr"], group["momentum"], group["steps"]
        check_values(float, lr=lr, momentum=momentum)
        check_values(int, steps=steps)
        require(
            lr >= 0 and 0 <= momentum < 1 and steps > 0,
            f"lr, momentum, steps: expected >= 0, in [0, 1) and >= 1, got {lr}, {momentum}, {steps}",
        )
        others = [list(p.shape) for p in group["params"] if p.ndim != 2]
        require(not others, lambda: f"parameters: expected matrices, as of split_parameters, got {others[0]}")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every matrix that has a gradient. `closure`: see `evaluated`."""
        result = evaluated(closure)
        for group in self.param_groups:
            matrices = [p for p in group["params"] if p.grad is not None]
            updates = self._momentum(matrices, group["momentum"])
            for places in batches(matrices, CHUNK_VALUES):
                batch = [matrices[i] for i in places]
                rows, columns = batch[0].shape
                orthogonal = self._orthogonalised(batch, torch.stack([updates[i] for i in places]), group["steps"])
                scale = group["lr"] * math.sqrt(max(1, rows / columns))
                foreach_sub_([local(p) for p in batch], list(orthogonal.unbind()), alpha=scale)
        return result

    def _momentum(self, matrices: list[nn.Parameter], beta: float) -> list[Tensor]:
        """The local parts of the Nesterov updates; they are elementwise, so shards need no communication."""
        if not matrices:
            return []
        counts, gradients, (means,) = advance(self.state, matrices, self.moments, self.shard_over)
        foreach_lerp_(means, gradients, 1 - beta)
        return nesterov(means, gradients, beta, counts)

    def _orthogonalised(self, matrices: list[nn.Parameter], update: Tensor, steps: int) -> Tensor:
        """orthogonalise(update), placed like the matrices, of updates [n, r_local, c] that are placed like momenta.

        Matrices have equal placements, and so have momenta.
        """
        if self.mesh is None:
            return orthogonalise(update, steps)
        shape = torch.Size((len(matrices), *matrices[0].shape))
        given = distributed(update, self.mesh, batched(self.state[matrices[0]]["momentum_buffer"], self.mesh), shape)
        shared = given.redistribute(placements=[Shard(0)] * self.mesh.ndim)  # each rank has whole matrices
        mine = distributed(orthogonalise(shared.to_local(), steps), self.mesh, shared.placements, shape)
        return mine.redistribute(placements=batched(matrices[0], self.mesh)).to_local()
