"""Launches: what Triton does anew on each of them, done once.

Triton binds and classifies the arguments of every launch, and looks for the compiled kernel under a text made of
all that: more than twice the time of the launch itself. Here a compiled kernel is kept under a key that tells apart
at least what Triton tells apart, and launched as it is, with addresses for tensors: of every tensor its launcher asks
the driver what lies behind it. Triton 3.6 and 3.7 go by a pointer's dtype and by whether it is a multiple of 16, by
integers' values (1, multiples of 16, 32 bits or more) and by the types of everything else. Other versions launch as
usual, and so does everything while a profiler hangs on Triton's launches.
"""

from __future__ import annotations

import triton
from torch import Tensor
from torch.nn import Parameter
from triton import knobs
from triton.runtime import driver

KNOWN = triton.__version__.startswith(("3.6.", "3.7."))
LIMIT = 4096
"""Keys that are kept. Integers count by their value here, and numbers of tokens can take many."""

_compiled: dict[tuple, tuple] = {}


def taken_apart(arguments: tuple) -> tuple[list, list]:
    """A key that tells apart the kernels that Triton compiles from one source with one set of options, and the
    arguments with addresses for tensors.
    """
    key: list = []
    plain: list = []
    for argument in arguments:
        kind = type(argument)
        if kind is Tensor or kind is Parameter:
            address = argument.data_ptr()
            key.append((argument.dtype, address % 16) if address % 16 else argument.dtype)
            plain.append(address)
        elif kind is int or argument is None:
            key.append(argument)
            plain.append(argument)
        elif kind is tuple or isinstance(argument, tuple):
            inner, places = taken_apart(argument)
            key.append((kind, *inner))  # kernels read named tuples by their fields
            plain.append(tuple(places))
        else:
            key.append((kind, argument))  # 1.0 and True equal 1, but compile to other kernels
            plain.append(argument)
    return key, plain


def _watched() -> bool:
    """Whether somebody wants to know of launches."""
    runtime = knobs.runtime
    return bool(runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls)


def launch(kernel, grid: int, *arguments, **options) -> None:
    """Run `grid` programs of a kernel; an empty grid is no work.

    `arguments` are the kernel's first parameters, `options` its constexprs by name, num_warps and num_stages.
    """
    if grid <= 0:
        return
    if not (KNOWN and isinstance(kernel, triton.JITFunction)) or _watched():  # not in Triton's interpreter
        kernel[(grid,)](*arguments, **options)
        return
    active = driver.active
    device = active.get_current_device()
    told_apart, plain = taken_apart(arguments)
    key = (id(kernel), device, *options.values(), *told_apart)
    found = _compiled.get(key)
    if found is None:
        compiled = kernel[(grid,)](*arguments, **options)
        constants = tuple(options[name] for name in kernel.arg_names[len(arguments) :])
        if len(_compiled) >= LIMIT:
            _compiled.clear()
        _compiled[key] = compiled.run, compiled.function, compiled.packed_metadata, constants
        return
    run, function, metadata, constants = found
    run(grid, 1, 1, active.get_current_stream(device), function, metadata, None, None, None, *plain, *constants)
