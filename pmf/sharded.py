"""Tensors and state dicts that several processes hold, in shards (DTensor) or as copies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

Sharding = Literal["ddp", "zero1", "fsdp", "hybrid"]
"""How several processes hold the state of a run."""
REPLICATED: tuple[Sharding, ...] = ("ddp", "zero1")
"""Those in which every process holds the whole network."""


def local(tensor: Tensor, mesh: DeviceMesh | None = None) -> Tensor:
    """This rank's part of a sharded tensor; any other tensor itself, or, with a mesh, the rows that `shard` takes."""
    if isinstance(tensor, DTensor):
        return tensor.to_local()
    if mesh is None or not divided(tensor, mesh):
        return tensor
    rows = -(-len(tensor) // mesh.size())  # as Shard divides
    return tensor[mesh.get_local_rank() * rows :][:rows]


def divided(tensor: Tensor, mesh: DeviceMesh) -> bool:
    """Whether `shard` divides this replicated tensor over the ranks of `mesh`: it has a row for each."""
    return tensor.ndim > 0 and len(tensor) >= mesh.size()


def shard(tensor: Tensor, mesh: DeviceMesh | None) -> Tensor:
    """A replicated tensor as one that is sharded by rows over a mesh of one dimension; this rank's are a view.

    A tensor with fewer rows than there are ranks stays as it is, and so does every tensor without a mesh.
    """
    if mesh is None or isinstance(tensor, DTensor) or not divided(tensor, mesh):
        return tensor
    return distributed(local(tensor, mesh), mesh, [Shard(0)], tensor.shape)


def distributed(part: Tensor, mesh: DeviceMesh, placements: Sequence[Placement], shape: torch.Size) -> DTensor:
    """The contiguous tensor of this shape of which `part` is this rank's part."""
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=shape, stride=stride)


def batched(tensor: Tensor, mesh: DeviceMesh) -> list[Placement]:
    """The placements of a batch [n, ...] of tensors that are placed like this one."""
    if not isinstance(tensor, DTensor):
        return [Replicate()] * mesh.ndim
    return [Shard(p.dim + 1) if isinstance(p, Shard) else p for p in tensor.placements]


def full(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor, on every rank; any other tensor itself."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole(state: dict[str, Tensor], keep: bool = True) -> dict[str, Tensor]:
    """A state dict with whole tensors on the CPU, as `pmf.save_model` takes it.

    Every rank must call it; those without `keep` get an empty dict.
    """
    return {name: value.detach().cpu() for name, value in ((n, full(v)) for n, v in state.items()) if keep}


@torch.no_grad()
def give(target: Tensor, value: Tensor | None) -> None:
    """Copy rank 0's whole tensor into `target`, which every rank holds, whole or in shards.

    Every rank must call it; only rank 0's `value` is read.
    """
    several = dist.is_initialized()
    empty = torch.empty(target.shape, dtype=target.dtype, device=target.device)
    value = empty if value is None or (several and dist.get_rank() > 0) else value.to(empty)
    if isinstance(target, DTensor):
        value = distribute_tensor(value, target.device_mesh, target.placements).to_local()
    elif several:
        dist.broadcast(value, 0)
    local(target).copy_(value)
