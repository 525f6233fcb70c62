"""How large a batch fits: measured under a memory fraction on a GPU, computed from saved bytes elsewhere."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from pmf.benchmarks.baselines import joint_jvp_loss
from pmf.benchmarks.counting import per_block, saved_bytes
from pmf.benchmarks.steps import lean_loss, training_step
from pmf.config import MODELS, ModelConfig
from pmf.dual import Dual
from pmf.model import create_model

BUDGETS_GB = (40, 80, 141)
EMA_COPIES = 3
WAYS = {"lean": "none", "lean, checkpointed": "block", "joint jvp": "none"}
"""The steps of the memory table, and their checkpointing."""


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


def _optimizer_bytes(model: nn.Module) -> int:
    """One float32 moment (Muon) or two (Adam), and the averages."""
    muon = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    total = sum(p.numel() for p in model.parameters())
    return 4 * (EMA_COPIES * total + muon + 2 * (total - muon))


def _fixed_bytes(model: nn.Module) -> int:
    """float32 master and gradient, a bfloat16 copy, what the optimizer keeps."""
    return (4 + 4 + 2) * sum(p.numel() for p in model.parameters()) + _optimizer_bytes(model)


def _saved_per_row(config: ModelConfig, impl: str, checkpointing: str, joint: bool) -> int:
    """Bytes that one more row saves for backward, on fake tensors under bfloat16 autocast."""
    model = create_model(config, impl=impl, checkpointing=checkpointing, device="cpu")

    def kept(batch: int) -> int:
        one, y = torch.ones(batch), torch.zeros(batch, dtype=torch.int64)
        z = torch.empty(batch, *config.image_shape)

        def fields(z: Tensor, t: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
            return model(z, t, h, one, one, one, y)

        def run():
            with torch.autocast("cpu", dtype=torch.bfloat16):
                if joint:
                    return torch.func.jvp(fields, (z, one, one), (z, one, one), has_aux=True)
                return model.predict_dual(Dual(z), Dual(one), one, one, one, y)

        return saved_bytes(run, model.parameters())

    return kept(3) - kept(2)


def row_memory(size: str, checkpointing: str = "none", impl: str = "triton", joint: bool = False) -> RowMemory:
    """Counted on fake tensors, without computing anything: two shallow networks, and what a block adds.

    Under "block" checkpointing the one block that backward recomputes counts too. `joint`: the step by one
    recorded `torch.func.jvp`, which runs on the reference. impl "triton" needs a GPU or TRITON_INTERPRET=1.
    """
    config = MODELS[size]
    blocks = config.depth + config.aux_head_depth
    with FakeTensorMode():
        first, added = per_block(config, lambda shallow: [_saved_per_row(shallow, impl, checkpointing, joint)])
        fixed = _fixed_bytes(create_model(config, impl=impl, device="cpu"))
    saved = first[0] + (blocks - 3) * added[0]
    if checkpointing == "block":
        saved += row_memory(size, "none", impl).per_row // blocks
    return RowMemory(fixed, saved)


def measured_largest_batch(size: str, checkpointing: str, budget_gb: float, joint: bool = False) -> int:
    """The largest batch, to a sixteenth, whose step runs on this GPU under the budget.

    What the optimizer and the averages keep is held beside it, so that it compares with `row_memory`.
    """
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, budget_gb * 1e9 / total))
    options = dict(impl="reference") if joint else dict(checkpointing=checkpointing)
    loss = joint_jvp_loss if joint else lean_loss
    kept = _optimizer_bytes(create_model(size, device="meta"))

    def fits(batch: int) -> bool:
        torch.cuda.empty_cache()
        try:
            optimizer = torch.empty(kept, dtype=torch.int8, device="cuda")
            training_step(loss, size, batch, torch.device("cuda"), **options)()
            torch.cuda.synchronize()
            del optimizer
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


def memory_rows(size: str, device: torch.device) -> Iterator[dict[str, object]]:
    """A record per step and budget: the computed largest batch, and on a GPU that has the memory the measured.

    Counted on the Triton kernels where they can run (a GPU, or TRITON_INTERPRET=1), else on the reference.
    """
    on_gpu = device.type == "cuda"
    triton = on_gpu or os.environ.get("TRITON_INTERPRET") == "1"
    held = torch.cuda.get_device_properties(device).total_memory / 1e9 if on_gpu else 0
    for way, checkpointing in WAYS.items():
        joint = way == "joint jvp"
        impl = "triton" if triton and not joint else "reference"
        memory = row_memory(size, checkpointing, impl, joint)
        for budget in BUDGETS_GB:
            # A card of 80 GB has a little less, or more, than 80e9 bytes.
            measured = measured_largest_batch(size, checkpointing, budget, joint) if held > 0.95 * budget else None
            yield {
                "provider": way,
                "impl": impl,
                "budget_gb": budget,
                "bytes_per_image": memory.per_row,
                "computed_batch": memory.largest_batch(budget),
                "measured_batch": measured,
            }


def memory_table(records: list[dict]) -> str:
    """The records of `memory_rows`, with their sizes, as aligned columns: computed, and measured in brackets."""
    lines = [f"{'size':10}{'step':20}{'ops':11}{'MB/image':>9}" + "".join(f"{f'{gb} GB':>14}" for gb in BUDGETS_GB)]
    groups: dict[tuple, dict[int, str]] = {}
    for r in records:
        measured = "" if r["measured_batch"] is None else f" [{r['measured_batch']}]"
        key = (r["size"], r["provider"], r["impl"], round(r["bytes_per_image"] / 1e6))
        groups.setdefault(key, {})[r["budget_gb"]] = f"{r['computed_batch']}{measured}"
    for (size, way, impl, megabytes), batches in groups.items():
        cells = "".join(f"{batches.get(gb, '-'):>14}" for gb in BUDGETS_GB)
        lines.append(f"{size.removeprefix('pMF-'):10}{way:20}{impl:11}{megabytes:9}{cells}")
    return "\n".join(lines)
