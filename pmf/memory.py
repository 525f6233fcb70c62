"""Training memory: estimated on fake tensors, which compute nothing, or measured on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from pmf.config import ModelConfig, model_config
from pmf.counting import per_block, saved_bytes
from pmf.model import PMFDiT, create_model
from pmf.pair import Dual
from pmf.private import FakeTensorMode
from pmf.reference.jvp import model_jvp

EMA_COPIES = 3
Pass = Callable[[PMFDiT, int], object]
"""(model, rows) -> a forward pass on that many rows, recorded for backward."""


@dataclass(frozen=True)
class TrainingMemory:
    """Memory that training holds in one process, in bytes."""

    state: int
    """float32 parameters, gradients, optimizer moments and averages: the part that sharding divides."""
    copies: int
    """Low-precision copies of the weights that autocast makes; every process holds all of them."""
    per_row: int
    """Activations that each row of the device batch saves for backward."""

    @property
    def fixed(self) -> int:
        """Bytes that do not depend on the batch size."""
        return self.state + self.copies

    def sharded(self, processes: int) -> TrainingMemory:
        """The memory of each of `processes` processes that shard the state."""
        return replace(self, state=-(-self.state // processes))

    def expected(self, rows: int) -> int:
        """Bytes at a device batch of `rows` rows: a lower bound, since temporary buffers are not counted."""
        return self.fixed + rows * self.per_row

    def largest_batch(self, budget: float) -> int:
        """Rows that fit into `budget` bytes with the fixed part: an upper bound, since `expected` is a lower one."""
        return max(0, int((budget - self.fixed) // self.per_row))


def optimizer_bytes(model: nn.Module, ema_copies: int = EMA_COPIES) -> int:
    """Bytes of one float32 moment (Muon, on Linear weights) or two (Adam, on the rest), and of the averages."""
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
    stream: Literal["float32", "bfloat16"] = "float32",
    device: str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    forward: Pass = main_pass,
) -> int:
    """Bytes that one more row saves for backward on a device type, under autocast to bfloat16 or without (float32).

    `device`: cuda or cpu (default: cuda if available). Fake tensors on it select the same ops as real ones.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    with FakeTensorMode():
        model = create_model(config, impl=impl, checkpointing=checkpointing, stream=stream, device=device)

        def kept(rows: int) -> int:
            with torch.autocast(device, dtype=torch.bfloat16, enabled=dtype != torch.float32):
                return saved_bytes(lambda: forward(model, rows), model.parameters())

        return kept(3) - kept(2)


def training_memory(
    name_or_config: str | ModelConfig,
    checkpointing: Literal["none", "block"] = "none",
    impl: str = "triton",
    *,
    stream: Literal["float32", "bfloat16"] = "float32",
    device: str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    ema_copies: int = EMA_COPIES,
    forward: Pass = main_pass,
) -> TrainingMemory:
    """Estimate the memory of training a network with Muon and Adam; `forward` is the recorded pass.

    Blocks are alike, so it is counted on two shallow networks. With "block" checkpointing, it includes the one block
    that backward recomputes. `device`: as in `saved_per_row`. `dtype`: bfloat16 (products and activations, under
    autocast) or float32. Perceptual networks are not counted. impl "triton" needs a GPU or TRITON_INTERPRET=1.
    Errors: `InputError` if `impl` cannot run.
    """
    config = model_config(name_or_config)
    blocks = config.depth + config.aux_head_depth

    def counted(checkpointing: Literal["none", "block"]) -> int:
        def count(shallow: ModelConfig) -> list[int]:
            kept = saved_per_row(
                shallow, impl, checkpointing, stream=stream, device=device, dtype=dtype, forward=forward
            )
            return [kept]

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
    """Largest batch, to within a sixteenth, that `run(batch)` computes on this GPU in `budget` bytes; 0 if none fits.

    `guess` is the first batch tried. The allocator is limited to the budget meanwhile; the limit is lifted afterwards.
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
    """Largest number that fits, to within a sixteenth; 0 if 1 does not fit. A good guess saves tries."""
    low, high = 0, max(1, guess)
    while fits(high):
        low, high = high, 2 * high
    while high - low > max(1, low // 16):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
