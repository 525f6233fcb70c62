"""Queries of autocast's state that also work in compiled code and on devices without autocast."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from pmf.private import constant


@constant  # Dynamo in torch 2.11 cannot trace the call
def available(device_type: str) -> bool:
    """Whether a device type supports autocast; `is_autocast_enabled` raises on those that do not ("meta")."""
    return torch.amp.is_autocast_available(device_type)


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The autocast dtype if autocast is on, else None."""
    there = device_type in ("cuda", "cpu") or available(device_type)
    return torch.get_autocast_dtype(device_type) if there and torch.is_autocast_enabled(device_type) else None


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype of matrix products with x: the autocast dtype if autocast is on, else that of x."""
    return autocast_dtype(x.device.type) or x.dtype


def no_autocast(device: torch.device) -> AbstractContextManager:
    """A context that turns autocast off, so that operations inside keep the dtypes of their inputs."""
    return torch.autocast(device.type, enabled=False) if available(device.type) else nullcontext()


def autocast_to(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager:
    """A context with autocast to `dtype`, or without autocast for None."""
    return no_autocast(device) if dtype is None else torch.autocast(device.type, dtype)
