"""How large a batch fits: measured under a memory fraction on a GPU, computed from saved bytes elsewhere."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from pmf.benchmarks.baselines import joint_jvp_loss
from pmf.benchmarks.counting import saved_bytes
from pmf.benchmarks.steps import lean_loss, training_step
from pmf.config import MODELS
from pmf.dual import Dual
from pmf.model import create_model

BUDGETS_GB = (40, 80, 141)
EMA_COPIES = 3


@dataclass(frozen=True)
class RowMemory:
    """What training keeps in memory, in bytes."""

    fixed: int
    """Parameters, gradients, optimizer moments, averages and bfloat16 copies of the weights."""
    per_row: int
    """Activations that one more row of the batch saves for backward."""

    def largest_batch(self, budget_gb: float) -> int:
        """Rows that fit beside what is fixed: an upper bound, since buffers that come and go are not counted."""
        return max(0, int((budget_gb * 1e9 - self.fixed) // self.per_row))


def _fixed_bytes(model: nn.Module) -> int:
    """float32 master and gradient, one moment (Muon) or two (Adam), the averages, a bfloat16 copy."""
    muon = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    total = sum(p.numel() for p in model.parameters())
    return total * (4 + 4 + 4 * EMA_COPIES + 2) + muon * 4 + (total - muon) * 8


def row_memory(size: str, checkpointing: str = "none", impl: str = "triton") -> RowMemory:
    """Counted on fake tensors under bfloat16 autocast, without computing anything.

    Under "block" checkpointing the one block that backward recomputes counts too. impl "triton" needs a
    GPU or TRITON_INTERPRET=1, as everywhere.
    """
    config = MODELS[size]
    block = 0
    if checkpointing == "block":
        block = row_memory(size, "none", impl).per_row // (config.depth + config.aux_head_depth)
    with FakeTensorMode():
        model = create_model(config, impl=impl, checkpointing=checkpointing, device="cpu")

        def kept(batch: int) -> int:
            one, y = torch.ones(batch), torch.zeros(batch, dtype=torch.int64)
            z = Dual(torch.empty(batch, *model.config.image_shape))

            def run():
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    return model.predict_dual(z, Dual(one), one, one, one, y)

            return saved_bytes(run, model.parameters())

        return RowMemory(_fixed_bytes(model), kept(3) - kept(2) + block)


def measured_largest_batch(size: str, checkpointing: str, budget_gb: float, joint: bool = False) -> int:
    """The largest batch, to a sixteenth, whose step runs on this GPU under the budget."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, budget_gb * 1e9 / total))
    options = dict(impl="reference") if joint else dict(checkpointing=checkpointing)
    loss = joint_jvp_loss if joint else lean_loss

    def fits(batch: int) -> bool:
        torch.cuda.empty_cache()
        try:
            training_step(loss, size, batch, torch.device("cuda"), **options)()
            torch.cuda.synchronize()
            return True
        except torch.cuda.OutOfMemoryError:
            return False

    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > max(1, low // 16):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    torch.cuda.set_per_process_memory_fraction(1.0)
    return low


def table(sizes: tuple[str, ...]) -> list[dict[str, object]]:
    """One row per size and mode: bytes per image, and the computed largest batch per budget.

    Counted on the Triton kernels where they can run (a GPU, or TRITON_INTERPRET=1), else on the reference.
    """
    impl = "triton" if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1" else "reference"
    rows = []
    for size in sizes:
        for mode in ("none", "block"):
            memory = row_memory(size, mode, impl)
            batches = {f"{gb} GB": memory.largest_batch(gb) for gb in BUDGETS_GB}
            rows.append(
                {
                    "size": size,
                    "impl": impl,
                    "checkpointing": mode,
                    "MB per image": round(memory.per_row / 1e6),
                    **batches,
                }
            )
    return rows
