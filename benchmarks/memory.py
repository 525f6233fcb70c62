"""How large a batch fits: measured under a memory fraction on a GPU, computed from saved bytes elsewhere."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from pmf.benchmarks.baselines import joint_jvp_loss
from pmf.benchmarks.ledger import Key, Record
from pmf.benchmarks.steps import lean_loss, training_step
from pmf.memory import main_pass, optimizer_bytes, training_memory
from pmf.model import PMFDiT, create_model

BUDGETS_GB = (40, 80, 141)
WAYS = {"lean": "none", "lean, checkpointed": "block", "joint jvp": "none"}
"""The steps of the memory table, and their checkpointing."""


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


def measured_largest_batch(size: str, checkpointing: str, budget_gb: float, guess: int, joint: bool = False) -> int:
    """The largest batch, to a sixteenth, whose step runs on this GPU under the budget; `guess`: where to begin.

    What the optimizer and the averages keep is held beside it, so that it compares with `training_memory`.
    """
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, budget_gb * 1e9 / total))
    options = dict(impl="reference") if joint else dict(checkpointing=checkpointing)
    loss = joint_jvp_loss if joint else lean_loss
    kept = optimizer_bytes(create_model(size, device="meta"))

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

    found = largest(fits, guess)
    torch.cuda.set_per_process_memory_fraction(1.0)
    return found


def memory_case(size: str) -> str:
    """What the largest batches of a preset are filed under."""
    return f"largest batch {size.removeprefix('pMF-')}"


def memory_keys(size: str) -> set[Key]:
    """What `memory_rows` gives, as the ledger names it."""
    return {(memory_case(size), way, 0, budget) for way in WAYS for budget in BUDGETS_GB}


def memory_rows(size: str, device: torch.device, held: frozenset[Key] = frozenset()) -> Iterator[Record]:
    """A record per step and budget, but for those `held`: the computed largest batch, and on a GPU that has the
    memory the measured.

    Counted on the Triton kernels where they can run (a GPU, or TRITON_INTERPRET=1), else on the reference.
    """
    on_gpu = device.type == "cuda"
    triton = on_gpu or os.environ.get("TRITON_INTERPRET") == "1"
    there = torch.cuda.get_device_properties(device).total_memory / 1e9 if on_gpu else 0
    for way, checkpointing in WAYS.items():
        budgets = [budget for budget in BUDGETS_GB if (memory_case(size), way, 0, budget) not in held]
        if not budgets:
            continue
        joint = way == "joint jvp"
        impl = "triton" if triton and not joint else "reference"
        memory = training_memory(size, checkpointing, impl, forward=joint_pass if joint else main_pass)
        for budget in budgets:
            computed = memory.largest_batch(budget * 1e9)
            measured = None
            # A card of 80 GB has a little less, or more, than 80e9 bytes.
            if there > 0.95 * budget:
                measured = measured_largest_batch(size, checkpointing, budget, computed * 3 // 4, joint)
            yield {
                "provider": way,
                "impl": impl,
                "budget_gb": budget,
                "bytes_per_image": memory.per_row,
                "computed_batch": computed,
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
