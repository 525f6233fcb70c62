"""How large a batch fits: measured under a memory fraction on a GPU, computed from saved bytes elsewhere."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor

from pmf.benchmarks.baselines import joint_jvp_loss
from pmf.benchmarks.cases import Case
from pmf.benchmarks.ledger import Record
from pmf.benchmarks.step_cases import COUNTED, lean_loss, training_step
from pmf.memory import TrainingMemory, main_pass, optimizer_bytes, training_memory
from pmf.model import PMFDiT, create_model

BUDGETS_GB = (40, 80, 141)
JOINT = "joint jvp"
CHECKPOINTING = {**COUNTED, JOINT: "none"}
"""The steps of the table of largest batches."""


def joint_pass(model: PMFDiT, rows: int) -> object:
    """The recorded pass of a step by one `torch.func.jvp`, which records the tangents too."""
    device = next(model.parameters()).device
    one, y = torch.ones(rows, device=device), torch.zeros(rows, dtype=torch.int64, device=device)
    z = torch.empty(rows, *model.config.image_shape, device=device)

    def fields(z: Tensor, t: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        return model(z, t, h, one, one, one, y)

    return torch.func.jvp(fields, (z, one, one), (z, one, one), has_aux=True)


def largest(fits: Callable[[int], bool], guess: int) -> int:
    """The largest number that fits, to a sixteenth; 0 where 1 does not. A good guess saves tries."""
    low, high = 0, max(1, guess)
    while fits(high):
        low, high = high, 2 * high
    while high - low > max(1, low // 16):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def measured_largest_batch(size: str, step: str, budget_gb: float, guess: int, device: torch.device) -> int:
    """The largest batch, to a sixteenth, whose step runs on this GPU under the budget; `guess`: where to begin.

    What the optimizer and the averages keep is held beside it, so that it compares with `training_memory`.
    """
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, budget_gb * 1e9 / total))
    kept = optimizer_bytes(create_model(size, device="meta"))
    loss, impl = (joint_jvp_loss, "reference") if step == JOINT else (lean_loss, None)

    def fits(batch: int) -> bool:
        torch.cuda.empty_cache()
        try:
            optimizer = torch.empty(kept, dtype=torch.int8, device=device)
            training_step(loss, size, batch, device, impl=impl, checkpointing=CHECKPOINTING[step])()
            torch.cuda.synchronize()
            del optimizer
            return True
        except torch.cuda.OutOfMemoryError:
            return False

    found = largest(fits, guess)
    torch.cuda.set_per_process_memory_fraction(1.0)
    return found


@cache
def _memory(size: str, step: str, impl: str) -> TrainingMemory:
    return training_memory(size, CHECKPOINTING[step], impl, forward=joint_pass if step == JOINT else main_pass)


def largest_batch(size: str, step: str, budget_gb: int, device: torch.device) -> Record:
    """The computed largest batch, and on a GPU that has the memory the measured.

    Counted on the Triton kernels where they can run (a GPU, or TRITON_INTERPRET=1), else on the reference.
    """
    on_gpu = device.type == "cuda"
    triton = step != JOINT and (on_gpu or os.environ.get("TRITON_INTERPRET") == "1")
    impl = "triton" if triton else "reference"
    memory = _memory(size, step, impl)
    computed, measured = memory.largest_batch(budget_gb * 1e9), None
    # A card of 80 GB has a little less, or more, than 80e9 bytes.
    if on_gpu and torch.cuda.get_device_properties(device).total_memory / 1e9 > 0.95 * budget_gb:
        measured = measured_largest_batch(size, step, budget_gb, computed * 3 // 4, device)
    found = {"status": "measured", "computed_batch": computed, "measured_batch": measured}
    return {"step": step, "impl": impl, "budget_gb": budget_gb, "bytes_per_image": memory.per_row, **found}


def largest_batch_case(size: str, batch: int, device: torch.device) -> Case:
    """The largest batches of a preset, a provider for each step and budget: its run gives a record."""
    found = {
        f"{step}, {gb} GB": partial(partial, largest_batch, size, step, gb, device)
        for step in CHECKPOINTING
        for gb in BUDGETS_GB
    }
    return Case(f"largest batch {size.removeprefix('pMF-')}", found, {})
