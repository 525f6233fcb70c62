"""Training on several GPUs: the loss as one module, under DDP or FSDP2."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, get_args

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel

from pmf.blocks import Block
from pmf.config import Guidance, LossConfig
from pmf.draws import Draws
from pmf.errors import check_network, require
from pmf.fields import check_values
from pmf.loss import pmf_loss
from pmf.model import PMFDiT
from pmf.sampling import integrate
from pmf.sharded import REPLICATED, Sharding


class LossModule(nn.Module):
    """`pmf_loss` of a network as a module: DDP and FSDP2 must see the whole forward pass as one call."""

    def __init__(self, model: PMFDiT, config: LossConfig) -> None:
        super().__init__()
        check_network(model)
        check_values(LossConfig, config=config)
        self.model, self.config = model, config

    def forward(
        self, x: Tensor, y: Tensor, draws: Draws, perceptual: Callable | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, reported terms) of one device batch; arguments: see `pmf_loss`."""
        out = pmf_loss(self.model, x, y, draws, self.config, perceptual)
        return out.loss, out.terms


class GeneratorModule(LossModule):
    """One module for what post-training runs: one-step images, whose gradients it takes, and the loss as an anchor."""

    def __init__(self, model: PMFDiT, config: LossConfig, guidance: Guidance) -> None:
        super().__init__(model, config)
        self.guidance = guidance

    def forward(self, x: Tensor, y: Tensor, draws: Draws | None = None, perceptual: Callable | None = None) -> Any:
        """The images [B, c, H, W] of unit-variance noise x and labels y; given draws, what `LossModule` returns."""
        if draws is not None:
            return super().forward(x, y, draws, perceptual)
        return integrate(self.model, self.model.config.noise_scale * x, y, 1, self.guidance)


def wrap(loss: LossModule, mesh: DeviceMesh | None, sharding: Sharding = "ddp") -> nn.Module:
    """Replicate the loss module (ddp, zero1), or shard its network block by block (fsdp, hybrid), over `mesh`'s ranks.

    `mesh` has one dimension, or two (replicas, shards) for hybrid; None returns the module itself. With zero1 give the
    mesh to `pmf.optim` as `shard_over`. With fsdp and hybrid, enter autocast with `cache_enabled=False`: its cache
    would keep casts of weights that FSDP2 has freed.
    """
    known = get_args(Sharding)
    require(sharding in known, f"sharding: expected one of {', '.join(known)}, got {sharding!r}")
    if mesh is None:
        return loss
    if sharding in REPLICATED:
        return _replicated(loss)
    for block in [m for m in loss.model.modules() if isinstance(m, Block)]:
        fully_shard(block, mesh=mesh)
        register_fsdp_forward_method(block, "forward_residual")
    fully_shard(loss, mesh=mesh)
    return loss


def _replicated(loss: LossModule) -> DistributedDataParallel:
    """DDP without buffer synchronisation: the buffers are rotary tables, equal on all ranks."""
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    if "forward_sync_buffers" in known:  # its name since PyTorch 2.13
        return DistributedDataParallel(loss, gradient_as_bucket_view=True, forward_sync_buffers=False)
    return DistributedDataParallel(loss, gradient_as_bucket_view=True, broadcast_buffers=False)


def synchronise_gradients(wrapped: nn.Module, wanted: bool) -> None:
    """Set whether the next forward and backward reduce gradients over ranks (`wanted`) or keep them local.

    A step that accumulates several device batches must reduce them in the last one.
    """
    if isinstance(wrapped, FSDPModule):
        wrapped.set_requires_gradient_sync(wanted)
    elif isinstance(wrapped, DistributedDataParallel):
        wrapped.require_backward_grad_sync = wanted  # as its no_sync() does
