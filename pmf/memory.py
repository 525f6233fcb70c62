"""Training memory: estimated on fake tensors, which compute nothing, or measured on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from pmf.config import LOSSES, LossConfig, ModelConfig, model_config
from pmf.counting import live_bytes, per_block, saved_bytes
from pmf.draws import Draws, sample_draws
from pmf.loss import squared_errors
from pmf.model import Checkpointing, PMFDiT, Stream, create_model
from pmf.pair import Dual
from pmf.private import FakeTensorMode
from pmf.reference.jvp import model_jvp
from pmf.step_plan import PlannedStep, plan_step

EMA_COPIES = 3
PEAK_ROWS = (64, 128)
"""Batches whose peaks differ by what rows add: activations outweigh all else in both."""
Pass = Callable[[PMFDiT, int], object]
"""(model, rows) -> a forward pass on that many rows, recorded for backward."""


@dataclass(frozen=True)
class TrainingMemory:
    """Memory that training holds in one process, in bytes."""

    weights: int
    """float32 parameters and their gradients."""
    optimizer: int
    """float32 moments, and averages that are on the same device."""
    copies: int
    """Low-precision copies of the weights that autocast makes; every process holds all of them."""
    per_row: int
    """What each row of the device batch adds to the peak of live tensors in a step."""
    saved_per_row: int
    """The part of it that is saved for backward; the rest are tensors that backward and products pass on."""

    @property
    def state(self) -> int:
        """What is held between steps: the part that sharding divides."""
        return self.weights + self.optimizer

    @property
    def fixed(self) -> int:
        """Bytes that do not depend on the batch size."""
        return self.state + self.copies

    def sharded(self, processes: int, *, weights: bool = True) -> TrainingMemory:
        """The memory of each of `processes` processes that shard the state; without `weights`, the optimizer alone."""
        kept = -(-self.weights // processes) if weights else self.weights
        return replace(self, weights=kept, optimizer=-(-self.optimizer // processes))

    def expected(self, rows: int) -> int:
        """Bytes at a device batch of `rows` rows: what operators allocate and free inside is not counted."""
        return self.fixed + rows * self.per_row

    def largest_batch(self, budget: float) -> int:
        """Rows that fit into `budget` bytes with the fixed part."""
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


@dataclass(frozen=True)
class Precision:
    """Where and in which precision a network is counted."""

    device: str
    """cuda or cpu: fake tensors on it select the same ops as real ones."""
    dtype: torch.dtype = torch.bfloat16
    """bfloat16 (products and activations, under autocast) or float32."""

    @classmethod
    def on(cls, device: str | None, dtype: torch.dtype) -> Precision:
        """`device` None is cuda if available, else cpu."""
        return cls(device or ("cuda" if torch.cuda.is_available() else "cpu"), dtype)

    def autocast(self) -> torch.autocast:
        """The context of a pass."""
        return torch.autocast(self.device, dtype=torch.bfloat16, enabled=self.dtype != torch.float32)


def saved_per_row(
    config: ModelConfig,
    impl: str = "triton",
    *,
    device: str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    forward: Pass = main_pass,
    checkpointing: Checkpointing = "none",
    stream: Stream = "float32",
) -> int:
    """Bytes that one more row saves for backward; for the arguments see `training_memory`."""
    precision = Precision.on(device, dtype)
    with FakeTensorMode():
        how: dict[str, Any] = dict(checkpointing=checkpointing, stream=stream, device=precision.device)
        model = create_model(config, impl=impl, **how)

        def kept(rows: int) -> int:
            with precision.autocast():
                return saved_bytes(lambda: forward(model, rows), model.parameters())

        return kept(3) - kept(2)


def fully_guided(rows: int, loss: LossConfig) -> Draws:
    """Draws whose step needs most memory: guidance on every row. The noise is one value for each."""
    draws = sample_draws(rows, (1, 1, 1), loss, torch.Generator().manual_seed(0))
    never, zero, one = torch.zeros_like(draws.drop_mask), torch.zeros_like(draws.t), torch.ones_like(draws.t)
    return replace(draws, drop_mask=never, t_min=zero, t_max=one)


def meta_plan(config: ModelConfig, draws: Draws, loss: LossConfig) -> PlannedStep:
    """The plan of a step on meta tensors, whose images are as many as `draws`."""
    x = torch.empty(len(draws.t), *config.image_shape, device="meta")
    y = torch.empty(len(x), dtype=torch.int64, device="meta")
    return plan_step(create_model(config, device="meta"), x, y, replace(draws, noise=x), loss)


def allocated(planned: PlannedStep, device: str) -> PlannedStep:
    """A plan with tensors of the same shapes and dtypes on the device, undefined in value; fake in `FakeTensorMode`."""
    parts = {field.name: getattr(planned, field.name) for field in fields(planned)}
    made: dict[str, Any] = {
        name: torch.empty(part.shape, dtype=part.dtype, device=device)
        for name, part in parts.items()
        if isinstance(part, Tensor)
    }
    return replace(planned, **made)


def forward_and_backward(model: PMFDiT, step: PlannedStep, loss: LossConfig, precision: Precision) -> None:
    """Run forward and backward of a planned step."""
    with precision.autocast():
        losses = squared_errors(model, step, loss).rows
    losses.mean().backward()


def step_peak(
    config: ModelConfig,
    rows: int,
    impl: str = "triton",
    *,
    loss: LossConfig | None = None,
    device: str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    checkpointing: Checkpointing = "none",
    stream: Stream = "float32",
) -> int:
    """Bytes of live tensors that forward and backward of a step with `rows` rows add at their peak, gradients included.

    Counted on fake tensors, by `fully_guided` draws of `loss` (default: `LossConfig()`). What an operator allocates and
    frees inside is not counted.
    """
    precision, settings = Precision.on(device, dtype), loss or LossConfig()
    planned = meta_plan(config, fully_guided(rows, settings), settings)
    with FakeTensorMode():
        how: dict[str, Any] = dict(checkpointing=checkpointing, stream=stream, device=precision.device)
        model = create_model(config, impl=impl, **how)
        step = allocated(planned, precision.device)
        return live_bytes(lambda: forward_and_backward(model, step, settings, precision)).peak


def training_memory(
    name_or_config: str | ModelConfig,
    checkpointing: Checkpointing = "none",
    impl: str = "triton",
    *,
    loss: LossConfig | None = None,
    device: str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    ema_copies: int = EMA_COPIES,
    forward: Pass = main_pass,
    stream: Stream = "float32",
) -> TrainingMemory:
    """Estimate the memory of training a network with Muon and Adam; `forward` is the recorded pass.

    `device`: cuda or cpu (default: cuda if available). `dtype`: bfloat16 (products and activations, under autocast) or
    float32. `loss`: the law of the draws (default: a preset's own). `ema_copies`: averages on the same device.
    `checkpointing`, `stream`: those of `create_model`. Not counted: perceptual networks, and what a `forward` of
    another step does not save. impl "triton" needs a GPU or TRITON_INTERPRET=1. Errors: `InputError` if `impl` cannot
    run.
    """
    config = model_config(name_or_config)
    options: dict[str, Any] = dict(device=device, dtype=dtype, checkpointing=checkpointing, stream=stream)
    if loss is None and isinstance(name_or_config, str):
        loss = LOSSES.get(name_or_config)

    def count(shallow: ModelConfig) -> list[int]:
        saved = saved_per_row(shallow, impl, forward=forward, **options)
        if forward is not main_pass:
            return [saved, saved]
        few, many = (step_peak(shallow, rows, impl, loss=loss, **options) for rows in PEAK_ROWS)
        return [saved, (many - few) // (PEAK_ROWS[1] - PEAK_ROWS[0])]

    if checkpointing == "block" and forward is main_pass:  # the peak is at another place in a deep network
        saved, peak = count(config)
    else:  # blocks are alike
        first, added = per_block(config, count)
        further = config.depth + config.aux_head_depth - 3
        saved, peak = (one + further * more for one, more in zip(first, added, strict=True))
    model = create_model(config, impl=impl, device="meta")
    values = sum(p.numel() for p in model.parameters())
    copies = 0 if dtype == torch.float32 else dtype.itemsize * values
    return TrainingMemory(2 * 4 * values, optimizer_bytes(model, ema_copies), copies, peak, saved)


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

    index = torch.cuda.current_device() if device.index is None else device.index  # PyTorch wants a number here
    total = torch.cuda.get_device_properties(index).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, budget / total), index)
    try:
        return largest(fits, guess)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, index)


def largest(fits: Callable[[int], bool], guess: int) -> int:
    """Largest number that fits, to within a sixteenth; 0 if 1 does not fit. A good guess saves tries."""
    low, high = 0, max(1, guess)
    while fits(high):
        low, high = high, 2 * high
    while high - low > max(1, low // 16):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
