"""Count operations and bytes saved for backward, exactly and without a GPU."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from pmf.config import ModelConfig
from pmf.draws import Draws
from pmf.model import Checkpointing, create_model
from pmf.pair import Dual
from pmf.private import TorchDispatchMode, storage_id, tree_leaves
from pmf.step_plan import StepPlan


def saved_bytes(run: Callable[[], object], parameters: Iterable[Tensor] = ()) -> int:
    """Bytes that autograd saves for backward during `run`; counts each storage once and skips `parameters`."""
    excluded = {storage_id(p) for p in parameters}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if (storage := storage_id(tensor)) not in excluded:
            kept[storage] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = run()
        total = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    del result
    return total


class LiveBytes(NamedTuple):
    """Bytes of the tensors that a run has allocated and not yet freed; each storage counts once."""

    peak: int
    """The most at any time during the run."""
    end: int
    """At its end, while its result is held."""


def live_bytes(run: Callable[[], object]) -> LiveBytes:
    """Count the tensors that `run` keeps alive, backward included; exact on the CPU without a profiler.

    What existed before and is only read or written does not count, nor does what a single operator allocates and
    frees inside. Compiled functions run uncompiled or raise, as PyTorch does with them under a dispatch mode.
    """
    with _LiveStorages() as counted:
        result = run()
        found = LiveBytes(counted.peak, counted.now)
    del result
    return found


class _LiveStorages(TorchDispatchMode):
    """Adds a storage to `now` when an operator returns it first, and subtracts it when it is freed."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.alive: dict[int, weakref.finalize] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        known = {storage_id(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        out = function(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and (storage := storage_id(x)) not in known and storage not in self.alive:
                size = x.untyped_storage().nbytes()
                self.alive[storage] = weakref.finalize(x.untyped_storage(), self._free, storage, size)
                self.now += size
                self.peak = max(self.peak, self.now)
        return out

    def _free(self, storage: int, size: int) -> None:
        del self.alive[storage]
        self.now -= size


@dataclass(frozen=True)
class RowOperations:
    """Operations per batch row, for each part of a step."""

    guidance: int
    """The shared blocks and the v head, forward."""
    main: int
    """Both heads, forward and backward."""
    tangent: int
    """The tangent through the shared blocks and the u head."""

    def lean(self, draws: Draws) -> int:
        """Operations of the lean step on these draws."""
        plan = StepPlan.of(draws)
        guided = plan.tangent_rows + len(plan.padded_null_rows())
        return guided * self.guidance + len(draws.t) * self.main + plan.tangent_rows * self.tangent

    def naive(self, draws: Draws) -> int:
        """Operations of the published step: three guidance passes (v head only) and a tangent on every row."""
        return len(draws.t) * (3 * self.guidance + self.main + self.tangent)

    def flow_matching(self, draws: Draws) -> int:
        """Operations of a plain flow-matching step of the same network."""
        return len(draws.t) * self.main


def operations(run: Callable[[], object]) -> int:
    """Multiplications and additions of the matrix products in `run`, on any device including meta."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def computing_operators(run: Callable[[], object]) -> int:
    """Operators in `run` that compute values, neither views nor allocations, on any device.

    On a GPU each launches at least one kernel: few launch more, such as sums in two passes and eigenvectors.
    """
    with _Computing() as counter:
        run()
    return counter.count


class _Computing(TorchDispatchMode):
    """Counts operators as they are dispatched."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().partition("::")[2]
        allocates = name.startswith(("empty", "new_empty", "detach", "lift_fresh", "is_same_size", "_unsafe_view"))
        self.count += not (func.is_view or allocates)
        return func(*args, **(kwargs or {}))


def per_block(config: ModelConfig, count: Callable[[ModelConfig], list[int]]) -> tuple[list[int], list[int]]:
    """`count` of the network with one shared block and one block per head, and the increment per further block.

    All blocks cost the same, so two shallow networks give the exact cost of a deep one in a fraction of the time.
    """
    shallow, deeper = (count(replace(config, depth=depth, aux_head_depth=1)) for depth in (2, 3))
    return shallow, [b - a for a, b in zip(shallow, deeper, strict=True)]


def row_operations(config: ModelConfig, checkpointing: Checkpointing = "none") -> RowOperations:
    """Count the operations of one row, using shallow networks on the meta device."""
    shallow, added = per_block(config, lambda config: _part_operations(config, checkpointing))
    path, blocks = config.depth - 2, config.depth + config.aux_head_depth - 3
    further = (path, blocks, path)
    return RowOperations(*(first + n * more for first, n, more in zip(shallow, further, added, strict=True)))


def _part_operations(config: ModelConfig, checkpointing: Checkpointing) -> list[int]:
    """Count the fields of `RowOperations` for this network."""
    model = create_model(config, device="meta", impl="reference", checkpointing=checkpointing)
    one = torch.ones(1, device="meta")
    y = torch.zeros(1, dtype=torch.int64, device="meta")
    z = torch.empty(1, *config.image_shape, device="meta")

    def forward(heads: tuple[str, ...], z_dot: Tensor | None = None) -> list[Tensor]:
        h = Dual(one, None if z_dot is None else one)
        nets = model.predict_dual(Dual(z, z_dot), h, one, one, one, y, heads=heads)
        return [net.value for net in nets.values()]

    def train() -> None:
        u, v = forward(("u", "v"))
        (u.sum() + v.sum()).backward()

    plain = operations(lambda: forward(("u",)))
    tangent = operations(lambda: forward(("u",), z)) - plain
    return [operations(lambda: forward(("v",))), operations(train), tangent]
