"""Several processes: who they are, and how the step is wrapped, on PyTorch's own engine (torchrun, DDP, FSDP2)."""

from __future__ import annotations

import contextlib
import inspect
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import pmf
from pmf.config import LossConfig
from pmf.errors import InputError, require
from pmf.layers import Block
from pmf.train.moments import local

SHARDINGS = ("ddp", "fsdp", "hybrid")
# The buffers are rotary tables, the same everywhere. PyTorch 2.13 renamed the flag.
_RENAMED = "forward_sync_buffers" in inspect.signature(DistributedDataParallel.__init__).parameters
_SYNC_BUFFERS = "forward_sync_buffers" if _RENAMED else "broadcast_buffers"


def pick_device(name: str) -> torch.device:
    """ "auto" is cuda where there is one, else cpu; under torchrun, this process's own GPU.

    Errors: a device that is not there.
    """
    require(name.split(":")[0] != "meta", f"device: cannot use {name!r}: it computes nothing")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        torch.empty(0, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device: cannot use {name!r}: {str(error).splitlines()[0]}") from None


@dataclass(frozen=True)
class World:
    """The processes of a run, seen from one of them."""

    device: torch.device
    """This process's device."""
    rank: int = 0
    """This process's number, from 0."""
    size: int = 1
    """How many processes there are."""
    sharding: str | None = None
    """How the network lives on them: ddp, fsdp or hybrid; None in a single process."""
    mesh: DeviceMesh | None = None
    """Their devices: one dimension, or (replicas, shards) under hybrid; None in a single process."""

    @property
    def main(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    def mean(self, values: Tensor) -> Tensor:
        """The mean over all processes; a value that is not finite anywhere is so everywhere."""
        if self.mesh is not None:
            dist.all_reduce(values)
        return values / self.size

    def broadcast(self, value: object) -> object:
        """The main process's value, on every process."""
        if self.mesh is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, device=torch.device("cpu"))
        return box[0]

    def main_first(self, work: Callable[[], object]) -> object:
        """`work()` on the main process alone; its result, or its error, on every process."""
        outcome: tuple[object, str | None] = (None, None)
        if self.main:
            try:
                outcome = (work(), None)
            except (InputError, OSError) as error:
                outcome = (None, str(error))
        value, error = self.broadcast(outcome)
        if error is not None:
            raise InputError(error)
        return value

    def give(self, target: Tensor, value: Tensor | None) -> None:
        """Copy the main process's value into a tensor that every process holds, whole or in shards."""
        kind = dict(dtype=target.dtype, device=self.device)
        value = value.to(**kind) if self.main else torch.empty(target.shape, **kind)
        if isinstance(target, DTensor):
            value = distribute_tensor(value, target.device_mesh, target.placements).to_local()
        elif self.mesh is not None:
            dist.broadcast(value, 0)
        local(target).copy_(value)


def join(device: str, sharding: str) -> World:
    """This process's world: that of torchrun's environment variables, else itself alone.

    Errors: `InputError` on an unknown device or sharding, or on hybrid sharding without several GPUs on
    several machines.
    """
    require(sharding in SHARDINGS, f"sharding: expected one of {', '.join(SHARDINGS)}, got {sharding!r}")
    chosen = pick_device(device)
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size == 1:
        return World(chosen)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo")
    return World(chosen, dist.get_rank(), size, sharding, _mesh(chosen.type, size, sharding))


def leave(world: World) -> None:
    """Part from the other processes."""
    if world.mesh is not None:
        dist.destroy_process_group()


def _mesh(device_type: str, size: int, sharding: str) -> DeviceMesh:
    if sharding != "hybrid":
        return init_device_mesh(device_type, (size,), mesh_dim_names=("data",))
    node = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    require(
        node < size and size % node == 0 and node > 1,
        f"sharding: hybrid shards within a machine and replicates across machines, expected several processes on each "
        f"of several machines, got {size} processes with {node} on this one",
    )
    return init_device_mesh(device_type, (size // node, node), mesh_dim_names=("replicate", "shard"))


class LossModule(nn.Module):
    """The loss of a network as a module, so that wrappers see its whole forward pass as one."""

    def __init__(self, model: pmf.PMFDiT, config: LossConfig) -> None:
        super().__init__()
        self.model, self.config = model, config

    def forward(
        self, x: Tensor, y: Tensor, draws: pmf.Draws, perceptual: Callable | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, reported terms) of one device batch."""
        out = pmf.pmf_loss(self.model, x, y, draws, self.config, perceptual)
        return out.loss, out.terms


def wrap(loss: LossModule, world: World) -> nn.Module:
    """The loss module, its network replicated (ddp) or sharded block by block (fsdp, hybrid)."""
    if world.mesh is None:
        return loss
    if world.sharding == "ddp":
        return DistributedDataParallel(loss, gradient_as_bucket_view=True, **{_SYNC_BUFFERS: False})
    for block in [m for m in loss.model.modules() if isinstance(m, Block)]:
        fully_shard(block, mesh=world.mesh)
        register_fsdp_forward_method(block, "forward_residual")
    return fully_shard(loss, mesh=world.mesh)


@contextlib.contextmanager
def gradient_synchronisation(wrapped: nn.Module, wanted: bool) -> Iterator[None]:
    """Inside, backward adds gradients over processes (the last device batch of a step) or leaves them local."""
    if isinstance(wrapped, FSDPModule):
        wrapped.set_requires_gradient_sync(wanted)
        yield
    elif isinstance(wrapped, DistributedDataParallel) and not wanted:
        with wrapped.no_sync():
            yield
    else:
        yield


def full(tensor: Tensor) -> Tensor:
    """A sharded tensor put together, on every process; any other tensor itself."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole(state: dict[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """A state dict put together on the CPU. Every process must call; those without `keep` get nothing."""
    return {name: value.detach().cpu() for name, value in ((n, full(v)) for n, v in state.items()) if keep}
