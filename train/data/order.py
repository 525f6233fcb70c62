"""The order in which a run sees its data: a function of (seed, position), without state."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor


def step_seed(seed: int, index: int, purpose: str) -> int:
    """A seed of its own for each (run seed, step or epoch, purpose).

    Hashed to 32 bits, since PyTorch's CPU generator reads no more of a seed.
    """
    entropy = [seed, index, *purpose.encode()]
    return int(np.random.SeedSequence(entropy).generate_state(1)[0])


def order(length: int, seed: int, epoch: int) -> Tensor:
    """The permutation int64 [length] of that epoch."""
    generator = torch.Generator().manual_seed(step_seed(seed, epoch, "epoch"))
    return torch.randperm(length, generator=generator)


def indices_at(length: int, seed: int, first: int, count: int) -> list[int]:
    """What stands at positions [first, first + count) of the permutations of epochs 0, 1, ... in a row."""
    found: list[int] = []
    while len(found) < count:
        epoch, place = divmod(first + len(found), length)
        found += _epoch(length, seed, epoch)[place : place + count - len(found)].tolist()
    return found


def mirrored_at(seed: int, step: int, batch_size: int) -> list[bool]:
    """Which images of a step's global batch are seen in a mirror: each with probability 1/2."""
    generator = torch.Generator().manual_seed(step_seed(seed, step, "mirror"))
    return torch.randint(2, (batch_size,), generator=generator).bool().tolist()


# A batch may lie across two epochs; the next one starts with the second.
@lru_cache(maxsize=2)
def _epoch(length: int, seed: int, epoch: int) -> Tensor:
    return order(length, seed, epoch)
