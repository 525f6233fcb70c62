"""Training memory: expected, counted on fake tensors without computing anything, or tried on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from pmf.config import ModelConfig, model_config
from pmf.counting import per_block, saved_bytes
from pmf.dual import Dual
from pmf.model import PMFDiT, create_model
from pmf.private import FakeTensorMode
from pmf.reference.jvp import model_jvp

EMA_COPIES = 3
Pass = Callable[[PMFDiT, int], object]
"""(model, rows) -> a forward pass on that many rows, recorded for backward."""


@dataclass(frozen=True)
class TrainingMemory:
    """What training keeps in the memory of one process, in bytes."""

    state: int
    """float32 parameters, gradients, optimizer moments and averages: what sharding divides."""
    copies: int
    """Low-precision copies of the weights that autocast makes; every process holds all of them."""
    per_row: int
    """Activations that each row of the device batch saves for backward."""

    @property
    def fixed(self) -> int:
        """What does not depend on the batch."""
        return self.state + self.copies

    def sharded(self, processes: int) -> TrainingMemory:
        """The memory of each of `processes` processes that shard the state."""
        return replace(self, state=-(-self.state // processes))

    def expected(self, rows: int) -> int:
        """Bytes at a device batch of `rows` rows: a lower bound, since temporary buffers are not counted."""
        return self.fixed + rows * self.per_row

    def largest_batch(self, budget: float) -> int:
        """Rows that fit into `budget` bytes beside the fixed part: an upper bound, since `expected` is a lower one."""
        return max(0, int((budget - self.fixed) // self.per_row))


def optimizer_bytes(model: nn.Module, ema_copies: int = EMA_COPIES) -> int:
    """One float32 moment (Muon, on Linear weights) or two (Adam, on the rest), and the averages."""
    muon = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    total = sum(p.numel() for p in model.parameters())
    return 4 * (ema_copies * total + muon + 2 * (total - muon))


def _pass_inputs(model: PMFDiT, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images, a scalar and labels for a pass on that many rows."""
    device = next(model.parameters()).device
    z = torch.empty(rows, *model.config.image_shape, device=device)
    return z, torch.ones(rows, device=device), torch.zeros(rows, dtype=torch.int64, device=device)


def main_pass(model: PMFDiT, rows: int) -> object:
    """The recorded pass of a lean step: both heads, without tangents, which record nothing."""
    z, one, y = _pass_inputs(model, rows)
    return model.predict_dual(Dual(z), Dual(one), one, one, one, y)


def joint_pass(model: PMFDiT, rows: int) -> object:
    """The recorded pass of a step by one `torch.func.jvp`, which records the tangents too."""
    z, one, y = _pass_inputs(model, rows)
    return model_jvp(model, z, one, one, one, one, one, y, z, one, one)


def saved_per_row(
    config: ModelConfig,
    impl: str = "triton",
    checkpointing: Literal["none", "block"] = "none",
    *,
    device: str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    forward: Pass = main_pass,
) -> int:
    """Bytes that one more row saves for backward on a type of device, under autocast to `dtype` (float32: none).

    `device`: cuda or cpu (default: cuda where there is one). Fake tensors on it choose the ops that real ones would.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    with FakeTensorMode():
        model = create_model(config, impl=impl, checkpointing=checkpointing, device=device)

        def kept(rows: int) -> int:
            with torch.autocast(device, dtype=torch.bfloat16, enabled=dtype != torch.float32):
                return saved_bytes(lambda: forward(model, rows), model.parameters())

        return kept(3) - kept(2)


def training_memory(
    name_or_config: str | ModelConfig,
    checkpointing: Literal["none", "block"] = "none",
    impl: str = "triton",
    *,
    device: str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    ema_copies: int = EMA_COPIES,
    forward: Pass = main_pass,
) -> TrainingMemory:
    """The memory of training a network with Muon and Adam, by the recorded pass `forward`.

    Counted on two shallow networks, as blocks are alike. Under "block" checkpointing the one block that backward
    recomputes counts too. `device`: as for `saved_per_row`. `dtype`: bfloat16 (products and activations, under
    autocast) or float32. Perceptual networks are not counted. impl "triton" needs a GPU or TRITON_INTERPRET=1.
    Errors: `InputError` where it cannot run.
    """
    config = model_config(name_or_config)
    blocks = config.depth + config.aux_head_depth

    def counted(checkpointing: Literal["none", "block"]) -> int:
        def count(shallow: ModelConfig) -> list[int]:
            return [saved_per_row(shallow, impl, checkpointing, device=device, dtype=dtype, forward=forward)]

        first, added = per_block(config, count)
        return first[0] + (blocks - 3) * added[0]

    saved = counted(checkpointing)
    if checkpointing == "block":
        saved += counted("none") // blocks
    model = create_model(config, impl=impl, device="meta")
    values = sum(p.numel() for p in model.parameters())
    copies = 0 if dtype == torch.float32 else dtype.itemsize * values
    return TrainingMemory(2 * 4 * values + optimizer_bytes(model, ema_copies), copies, saved)


def measured_largest_batch(run: Callable[[int], object], budget: float, guess: int, device: torch.device) -> int:
    """The largest batch, to a sixteenth, that `run(batch)` computes on this GPU within `budget` bytes; 0 for none.

    `guess`: where to begin. The allocator's limit is the budget meanwhile, and none afterwards.
    """

    def fits(batch: int) -> bool:
        torch.cuda.empty_cache()
        try:
            run(batch)
            torch.cuda.synchronize(device)
            return True
        except torch.cuda.OutOfMemoryError:
            return False

    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, budget / total), device)
    try:
        return largest(fits, guess)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def largest(fits: Callable[[int], bool], guess: int) -> int:
    """The largest number that fits, to a sixteenth; 0 where 1 does not. A good guess saves tries."""
    low, high = 0, max(1, guess)
    while fits(high):
        low, high = high, 2 * high
    while high - low > max(1, low // 16):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
