"""Autocast as layers and kernels see it, also while they are compiled and on devices that have none."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from pmf.private import constant


@constant  # Dynamo of torch 2.11 cannot trace it
def available(device_type: str) -> bool:
    """Whether a type of device has autocast; asking whether it is on raises where there is none ("meta")."""
    return torch.amp.is_autocast_available(device_type)


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """Autocast's dtype where it is on, else None."""
    on = available(device_type) and torch.is_autocast_enabled(device_type)
    return torch.get_autocast_dtype(device_type) if on else None


def no_autocast(device: torch.device) -> AbstractContextManager:
    """What runs inside keeps its own dtypes."""
    return torch.autocast(device.type, enabled=False) if available(device.type) else nullcontext()
