"""Launch compiled kernels without the work that Triton repeats on every launch.

On every launch, Triton binds and classifies the arguments and looks the kernel up under a string made of all of them,
which takes more than twice the time of the launch itself. Here, compiled kernels are cached under a key that
distinguishes at least what Triton distinguishes, and are launched directly, with addresses in place of tensors (for a
tensor, Triton's launcher queries the driver). Triton 3.6 and 3.7 distinguish a pointer's dtype and whether it is a
multiple of 16; an integer that is 1, a multiple of 16, or too large for 32 bits; and the type of anything else. With
other versions, and while a profiler hooks into Triton's launches, Triton launches as usual.
"""

from __future__ import annotations

import triton
from torch import Tensor
from torch.nn import Parameter
from triton import knobs
from triton.runtime import driver

KNOWN = triton.__version__.startswith(("3.6.", "3.7."))
LIMIT = 4096
"""Maximum number of cached keys. They hold integers by value, and numbers of tokens can take many values."""

_compiled: dict[tuple, tuple] = {}


def taken_apart(arguments: tuple) -> tuple[list, list]:
    """A key that identifies the kernel that Triton compiles for these arguments, given its source and options; and the
    arguments with tensors replaced by their addresses.
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
            key.append((kind, argument))  # 1.0 and True equal 1, but compile to different kernels
            plain.append(argument)
    return key, plain


def _hooked() -> bool:
    """Whether anything is hooked into Triton's launches."""
    runtime = knobs.runtime
    return bool(runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls)


def launch(kernel, grid: int, *arguments, **options) -> None:
    """Run `grid` programs of a kernel; an empty grid is a no-op.

    `arguments` are the kernel's first parameters, `options` its constexprs by name, num_warps and num_stages.
    """
    if grid <= 0:
        return
    if not (KNOWN and isinstance(kernel, triton.JITFunction)) or _hooked():  # not in Triton's interpreter
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
