"""Triton's interpreter for tests on machines without a GPU, patched to round and add as GPUs do, and to be quick."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from collections.abc import Iterator

import numpy as np
import pytest
import torch


def round_to_nearest() -> None:
    """Make the interpreter round float32 to the nearest bfloat16, as GPUs do; Triton 3.7 truncates.

    Truncation doubles the largest error and is biased: over a network its errors add up.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def convert_float(values, source, target, rounding_mode):
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(values, source, target, rounding_mode)
        return torch.tensor(values).bfloat16().view(torch.uint16).numpy()

    interpreter._convert_float = convert_float


def add_in_pairs() -> None:
    """Make the interpreter sum a tile's values pairwise, much as a GPU does: each thread adds a few of a column's
    values one after another, then threads add in pairs.

    numpy adds all rows one after another, so that the error grows with their number.
    """
    from triton.runtime import interpreter

    one_by_one = interpreter.ReduceOps.sum

    def add(self, tile):
        values = tile.handle.data
        if self.axis is None:
            return one_by_one(self, tile)
        while (terms := values.shape[self.axis]) > 1:
            values = values.take(range(0, terms, 2), self.axis) + values.take(range(1, terms, 2), self.axis)
        return self.to_tensor(values if self.keep_dims else values.squeeze(self.axis), tile.dtype)

    interpreter.ReduceOps.sum = add


def patch_once_a_launch() -> None:
    """Make the interpreter patch triton.language for a module's functions once a launch.

    It does so again at every call of a function of a kernel, a third of the time that the tests of kernels take.
    """
    from triton.runtime import interpreter

    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched = set()

    def patch_module(function):
        if function.__module__ in patched:
            return None  # which the caller of a function does not use
        patched.add(function.__module__)
        return patch(function)

    def launch_afresh(self, *args, **options):
        patched.clear()
        return launch(self, *args, **options)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_module, launch_afresh


def refuse_overflow() -> None:
    """Make the interpreter refuse sums, differences and products of int32 that overflow, as offsets never may.

    Its own check computes the same by tiles of int64, a third of the time of attention's tests, and then ignores what
    it found unless kernels are compiled for debugging. Other integers may wrap; lanes that a mask leaves out may not.
    """
    import triton.language as tl
    from triton.language.semantic import TritonSemantic

    exact = {"add": np.add, "sub": np.subtract, "mul": np.multiply}

    def check(self, left, right, operator):
        if left.type.scalar == tl.int32:
            name = operator.__name__
            values = exact[name](left.handle.data, right.handle.data, dtype=np.int64)
            assert values.min() >= -(2**31) and values.max() < 2**31, f"{name} of int32 overflows"

    TritonSemantic.binary_op_sanitize_overflow_impl = check


def remember_dtypes() -> None:
    """Make the interpreter find numpy's dtype of a number once; it builds the table of all of them at every use."""
    from triton.runtime import interpreter

    of_any = interpreter._get_np_dtype
    of_number = functools.cache(of_any)
    interpreter._get_np_dtype = lambda dtype: of_any(dtype) if dtype.scalar.is_ptr() else of_number(dtype.scalar)


@contextlib.contextmanager
def last_programs(count: int) -> Iterator[None]:
    """Run only the last `count` programs of every launch, so that tensors may be huge: memory that no program touches
    is never taken.
    """
    from triton.runtime import interpreter

    executor, builder = interpreter.GridExecutor, interpreter.interpreter_builder
    launch, number, place = executor.__call__, builder.set_grid_dim, builder.set_grid_idx

    def launch_last(self, *args, **options):
        (programs,) = self.grid
        skipped = max(programs - count, 0)
        self.grid = (programs - skipped,)
        self._restore_args_dev = lambda *_: None  # it would copy every tensor to itself
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(builder, "set_grid_dim", lambda *_: number(programs, 1, 1))
            patch.setattr(builder, "set_grid_idx", lambda x, y, z: place(x + skipped, y, z))
            return launch(self, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(executor, "__call__", launch_last)
        yield


def interpret() -> None:
    """Run kernels in the interpreter from now on."""
    os.environ["TRITON_INTERPRET"] = "1"
    if importlib.util.find_spec("triton") is not None:
        round_to_nearest()
        add_in_pairs()
        patch_once_a_launch()
        refuse_overflow()
        remember_dtypes()
