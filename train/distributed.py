"""The processes that torchrun starts: joining and leaving them, and exchanging values between them."""

from __future__ import annotations

import logging
import os
import re
import signal
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, get_args

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from pmf.data.workers import after_parent
from pmf.errors import InputError, checked_device, first_line, require
from pmf.sharded import REPLICATED, Sharding

log = logging.getLogger(__name__)
SHARDINGS = get_args(Sharding)
PATIENCE = timedelta(days=30)
"""Timeout of processes that wait for one that evaluates or writes."""
T = TypeVar("T")


def pick_device(name: str) -> torch.device:
    """ "auto" is cuda if available, else cpu; "cuda" under torchrun is this process's own GPU.

    Errors: `InputError` on an unavailable device.
    """
    require(name.split(":")[0] != "meta", f"device: cannot use {name!r}: it computes nothing")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    return checked_device(name)


def lost(error: BaseException) -> bool:
    """Whether an error of PyTorch's says that another process has gone, as gloo, NCCL and the store do in words."""
    return re.search("closed by peer|reset by peer|Broken pipe|remote process exited", str(error)) is not None


class CommonError(InputError):
    """An error that every process raises at the same place; the main one reports it."""


@dataclass(frozen=True)
class World:
    """The processes of a run or an evaluation, as seen by one of them."""

    device: torch.device
    """This process's device."""
    rank: int = 0
    """This process's rank."""
    size: int = 1
    """Number of processes."""
    sharding: str | None = None
    """How the state is distributed: ddp, zero1, fsdp or hybrid; None in a single process and in evaluations."""
    mesh: DeviceMesh | None = None
    """The processes' devices: one dimension, or (replicate, shard) for hybrid; None where `sharding` is."""
    group: dist.ProcessGroup | None = None
    """The gloo group for exchanging objects and for barriers; None in a single process."""

    @property
    def replicated(self) -> bool:
        """Whether every process holds the whole network."""
        return self.sharding is None or self.sharding in REPLICATED

    @property
    def shard_over(self) -> DeviceMesh | None:
        """The mesh that shards the optimizers' state and the averages of a replicated network."""
        return self.mesh if self.sharding == "zero1" else None

    @property
    def main(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    def say(self, *lines: str) -> None:
        """Print from the main process only."""
        for line in lines if self.main else ():
            print(line, flush=True)

    def warn(self, text: str) -> None:
        """Log a warning on the main process."""
        if self.main:
            log.warning(text)

    def mean(self, values: Tensor) -> Tensor:
        """Mean over all processes (overwrites `values`); not finite where any process's value is not finite."""
        if self.size > 1:
            dist.all_reduce(values)
        return values / self.size

    def broadcast(self, value: T) -> T:
        """Return the main process's value on every process."""
        box = [value]
        if self.size > 1:
            dist.broadcast_object_list(box, group=self.group)
        return box[0]

    def gather(self, value: T) -> list[T]:
        """Return every process's value, in order of rank, on every process."""
        box = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(box, value, group=self.group)
        return box

    def wait(self) -> None:
        """Wait until every process has called this."""
        if self.size > 1:
            dist.barrier(group=self.group)

    def main_first(self, work: Callable[[], T]) -> T:
        """Run `work` on the main process only; return its result, or raise a `CommonError`, on every process."""
        result: Any = None
        message = None
        if self.main:
            try:
                result = work()
            except (InputError, OSError) as error:
                message = str(error)
        result, message = self.broadcast((result, message))
        if message is not None:
            raise CommonError(message)
        return result

    def raise_first(self, error: InputError | None) -> None:
        """Raise the error of the first process that has one, as a `CommonError`, on every process."""
        messages = self.gather("" if error is None else str(error))
        message = next(filter(None, messages), None)
        if message is not None:
            raise CommonError(message) from error


def join(device: str, sharding: str | None = None) -> World:
    """Join the world that torchrun's environment variables describe, or else a world of this process only.

    Without `sharding` there is no device mesh: evaluations only exchange objects.
    Errors: `InputError` on an unknown device or sharding, on hybrid sharding without several processes on each of
    several machines, and on variables that are missing, impossible, or lead to no meeting of the processes.
    """
    known = sharding is None or sharding in SHARDINGS
    require(known, f"sharding: expected one of {', '.join(SHARDINGS)}, got {sharding!r}")
    chosen = pick_device(device)
    if chosen.index is not None and chosen.type == "cuda":
        torch.cuda.set_device(chosen)  # Triton launches on the current device
    if "TORCHELASTIC_RUN_ID" in os.environ:
        # torchrun would ask this process to stop; once that is gone, nobody else ends it or the others.
        after_parent(lambda: os.kill(os.getpid(), signal.SIGTERM))
    size = _variable("WORLD_SIZE", range(1, 2**31), default=1)
    if size == 1:
        return World(chosen)
    if not dist.is_initialized():
        _meet(size, "cpu:gloo,cuda:nccl" if sharding and chosen.type == "cuda" else "gloo")
    group = dist.new_group(backend="gloo", timeout=PATIENCE)
    mesh = _mesh(chosen.type, size, sharding) if sharding else None
    return World(chosen, dist.get_rank(), size, sharding, mesh, group)


def own_rank() -> int:
    """This process's number by its environment, 0 where it has none; `join` says what is wrong with it."""
    text = os.environ.get("RANK", "0")
    return int(text) if text.isdecimal() else 0


def _variable(name: str, values: range, default: int | None = None) -> int:
    """The integer in an environment variable. Errors: `InputError` if it has none of these values."""
    text = os.environ.get(name)
    value = None
    with suppress(ValueError):
        value = default if text is None else int(text)
    if value is None or value not in values:
        expected = f"an integer from {values.start} to {values.stop - 1} in this environment variable"
        got = "none" if text is None else repr(text)
        raise InputError(f"{name}: expected {expected}, as torchrun sets it, got {got}")
    return value


def _meet(size: int, backend: str) -> None:
    """Connect this process with the others. Errors: see `join`."""
    _variable("RANK", range(size))
    port, address = _variable("MASTER_PORT", range(1, 2**16)), os.environ.get("MASTER_ADDR")
    require(bool(address), "MASTER_ADDR: expected the address of process 0 in this environment variable, got none")
    try:
        dist.init_process_group(backend)
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        if lost(error):
            raise
        met = f"{size} processes cannot meet at {address}:{port}: {first_line(error)}"
        expected = "the address of process 0 and a port that is free there"
        raise InputError(f"MASTER_ADDR, MASTER_PORT: {met}; expected {expected}") from error


def leave(world: World) -> None:
    """Destroy the process groups."""
    if world.size > 1:
        dist.destroy_process_group()


def _mesh(device_type: str, size: int, sharding: str) -> DeviceMesh:
    if sharding != "hybrid":
        return init_device_mesh(device_type, (size,), mesh_dim_names=("data",))
    node = _variable("LOCAL_WORLD_SIZE", range(1, size + 1), default=size)
    require(
        node < size and size % node == 0 and node > 1,
        f"sharding: hybrid shards within a machine and replicates across machines, expected several processes on each "
        f"of several machines, got {size} processes with {node} on this one",
    )
    return init_device_mesh(device_type, (size // node, node), mesh_dim_names=("replicate", "shard"))
