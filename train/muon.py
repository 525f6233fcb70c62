"""Muon (Jordan et al. 2024): momentum, orthogonalised; equal shapes iterate together, and ranks share the work."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from pmf.private import foreach_lerp_, foreach_sub_
from pmf.train.moments import begin, count, local, nesterov

COEFFICIENTS = (3.4445, -4.775, 2.0315)
"""a, b, c of the quintic a X + (b X X^T + c (X X^T)^2) X, whose iteration drives singular values to about 1."""
EPS = 1e-8
"""What is added to a matrix's norm before it is divided by it."""
CHUNK_VALUES = 2**27
"""Values orthogonalised at a time; the iteration needs about four times their memory."""


def orthogonalise(x: Tensor, steps: int) -> Tensor:
    """Newton-Schulz: each matrix of x [n, r, c] with its singular values moved to about 1.

    Products are in bfloat16 on CUDA, where it is as good and several times faster; else in the precision of x.
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


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum over matrices: W -= lr sqrt(max(1, r / c)) orthogonalise(update).

    m = lerp(m, g, 1 - beta); update = beta m / (1 - beta^(t + 1)) + (1 - beta) g / (1 - beta^t), t counting a matrix's
    steps from 1: corrected for the zero that m starts at, as in optax. The state of a matrix: momentum_buffer like it,
    and step, on the CPU. Matrices of one shape are orthogonalised in one batch. `mesh`: the device mesh that holds the
    (replicated or sharded) matrices; each of its ranks then orthogonalises its share of the matrices and passes the
    result on.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        *,
        lr: float,
        momentum: float = 0.95,
        steps: int = 5,
        mesh: DeviceMesh | None = None,
    ) -> None:
        super().__init__(parameters, dict(lr=lr, momentum=momentum, steps=steps))
        self.mesh = mesh

    def __getstate__(self) -> dict[str, object]:
        """What copies and pickles take: PyTorch's own leaves the mesh out."""
        return {**super().__getstate__(), "mesh": self.mesh}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update every matrix that has a gradient."""
        for group in self.param_groups:
            matrices = [p for p in group["params"] if p.grad is not None]
            updates = self._momentum(matrices, group["momentum"])
            for places in _batches(matrices):
                batch = [matrices[i] for i in places]
                rows, columns = batch[0].shape
                orthogonal = self._orthogonalised(batch, torch.stack([updates[i] for i in places]), group["steps"])
                scale = group["lr"] * math.sqrt(max(1, rows / columns))
                foreach_sub_([local(p) for p in batch], list(orthogonal.unbind()), alpha=scale)

    def _momentum(self, matrices: list[nn.Parameter], beta: float) -> list[Tensor]:
        """The local parts of the Nesterov updates; elementwise, so that shards need each other for nothing."""
        if not matrices:
            return []
        states = [self.state[p] for p in matrices]
        for state, p in zip(states, matrices, strict=True):
            begin(state, p, ("momentum_buffer",))
        means, gradients = [local(state["momentum_buffer"]) for state in states], [local(p.grad) for p in matrices]
        foreach_lerp_(means, gradients, 1 - beta)
        return nesterov(means, gradients, beta, count(states))

    def _orthogonalised(self, matrices: list[nn.Parameter], update: Tensor, steps: int) -> Tensor:
        """orthogonalise(update) for the local parts [n, r_local, c] of equally placed matrices."""
        if self.mesh is None:
            return orthogonalise(update, steps)
        # Placed as the matrices are, behind a batch dimension; then whole matrices, some on every rank.
        placements = [Replicate()] * self.mesh.ndim
        if isinstance(matrices[0], DTensor):
            placements = [Shard(p.dim + 1) if p.is_shard() else p for p in matrices[0].placements]
        shape = torch.Size((len(matrices), *matrices[0].shape))
        whole = DTensor.from_local(
            update, self.mesh, placements, run_check=False, shape=shape, stride=_contiguous_stride(shape)
        )
        shared = whole.redistribute(placements=[Shard(0)] * self.mesh.ndim)
        mine = orthogonalise(shared.to_local(), steps)
        result = DTensor.from_local(
            mine, self.mesh, shared.placements, run_check=False, shape=shape, stride=_contiguous_stride(shape)
        )
        return result.redistribute(placements=placements).to_local()


def _contiguous_stride(shape: torch.Size) -> tuple[int, ...]:
    return torch.empty(shape, device="meta").stride()


def _batches(matrices: list[nn.Parameter]) -> Iterator[list[int]]:
    """Places of matrices with one shape, at most CHUNK_VALUES values together."""
    by_shape: dict[torch.Size, list[int]] = defaultdict(list)
    for i, matrix in enumerate(matrices):
        by_shape[matrix.shape].append(i)
    for shape, places in by_shape.items():
        size = max(1, CHUNK_VALUES // shape.numel())
        yield from (places[i : i + size] for i in range(0, len(places), size))
