"""Tensors and state dicts that several processes hold, in shards (DTensor) or as copies."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor; any other tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


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
