"""Triton's interpreter as the tests run it: on machines without a GPU, and rounding as GPUs do."""

from __future__ import annotations

import importlib.util
import os

import torch


def round_to_nearest() -> None:
    """Make the interpreter round float32 to the nearest bfloat16, as GPUs do; Triton 3.7 cuts the digits off.

    Cutting off doubles the largest error and is biased: over a network its errors add up.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def convert_float(values, source, target, rounding_mode):
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(values, source, target, rounding_mode)
        return torch.tensor(values).bfloat16().view(torch.uint16).numpy()

    interpreter._convert_float = convert_float


def interpret() -> None:
    """Run kernels in the interpreter from here on."""
    os.environ["TRITON_INTERPRET"] = "1"
    if importlib.util.find_spec("triton") is not None:
        round_to_nearest()
