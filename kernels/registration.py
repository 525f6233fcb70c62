"""How a kernel becomes an operator: registration, launch, forward mode, and the chip it runs on.

An op family is a `torch.autograd.Function` over raw operators `pmf::<name>`: one for value and
tangent, one for the gradients. Compilers see the raw operators as opaque calls with a fake
(shape-only) version. The Function has no forward-mode rule on purpose: Dynamo drops such rules, so
`run_dual` takes dual tensors apart itself, in eager mode only, and puts them together again. The
Function's `forward` names every argument: where nothing is recorded, Dynamo goes by their number.

Host time. An operator costs 20 us on its way through PyTorch, `Function.apply` 50 us more, most of it to bind
arguments to names: more than a launch. Where nobody watches operators (`pmf.private.watched`), `define` calls the
function behind the operator and `apply` runs a Function whose `forward` takes the context itself, or none. What
`apply` has examined is not examined again by the operators inside.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import forward_ad

from pmf.kernels.launching import launch as launch
from pmf.private import forward_mode, ordinary, watched

_LIBRARY = torch.library.Library("pmf", "FRAGMENT")


class _Direct(threading.local):
    inside = False
    """Whether functions behind operators run here as functions: nobody watches, their arguments are ordinary."""


_direct = _Direct()


def _plain(arguments: tuple) -> bool:
    """Whether the arguments, a tensor first, are ordinary and on a device that kernels run on."""
    first = arguments[0]
    return (first.is_cuda or first.is_cpu) and ordinary(arguments)


def _directly(function: Callable, arguments: tuple):
    """`function(*arguments)`, whose operators examine nothing."""
    before, _direct.inside = _direct.inside, True
    try:
        return function(*arguments)
    finally:
        _direct.inside = before


@dataclass(frozen=True)
class Chip:
    """What launch configurations depend on."""

    capability: int
    """Compute capability times ten: 80, 90, 120; 0 for Triton's interpreter."""
    processors: int
    """Number of streaming multiprocessors."""
    shared_memory: int = 99 << 10
    """Bytes of shared memory that a program can have: 227 KB on H100 and B200, 163 on A100, 99 on RTX 30, 40 and 50."""

    @property
    def interpreted(self) -> bool:
        """Triton's interpreter, where a program costs milliseconds whatever the size of its tile."""
        return self.capability == 0

    def stages(self, programs: int, staged: int, scratch: int) -> int:
        """Stages of a loop that loads ahead into shared memory: two iterations, or as many as there is room for.

        `programs` reside on a multiprocessor, each with `staged` bytes an iteration, and `scratch` and 1 KB beside.
        """
        room = self.shared_memory // programs - scratch - 1024
        return 1 + min(max(room // staged, 0), 2)


@dataclass(frozen=True)
class Tile:
    """The tile that a program works on at a time."""

    rows: int
    block: int
    """Columns, padded to a power of two."""
    warps: int


@functools.cache
def _cuda_chip(index: int) -> Chip:
    found = torch.cuda.get_device_properties(index)
    return Chip(10 * found.major + found.minor, found.multi_processor_count, found.shared_memory_per_block_optin)


def chip(device: torch.device) -> Chip:
    """The chip behind `device`."""
    if device.type != "cuda":
        return Chip(0, 1)
    return _cuda_chip(torch.cuda.current_device() if device.index is None else device.index)


def define(schema: str, run: Callable, fake: Callable) -> Callable:
    """Register the operator `pmf::<schema>`, computed by `run`, and return a function that does the same.

    Its first argument is a tensor, on whose device it runs.
    `fake` computes the same shapes, dtypes and strides without data. Gradients belong to the
    autograd.Function around the operator: asking the bare operator for them raises.
    """
    name = schema.partition("(")[0]

    def on_its_device(first, *others):
        if not first.is_cuda or first.get_device() == torch.cuda.current_device():
            return run(first, *others)
        with torch.cuda.device(first.device):
            return run(first, *others)

    def refuse(context, *gradients):
        raise RuntimeError(
            f"pmf::{name}: its gradient was lost, because torch.func.grad or vjp ran inside torch.compile; "
            "use loss.backward() or torch.autograd.grad there"
        )

    _LIBRARY.define(schema)
    for key in ("CUDA", "CPU"):
        _LIBRARY.impl(name, on_its_device, key)
    torch.library.register_fake(f"pmf::{name}", fake, lib=_LIBRARY)
    torch.library.register_autograd(f"pmf::{name}", refuse, lib=_LIBRARY)
    operator = getattr(torch.ops.pmf, name).default

    def call(*arguments):
        # Compilers must see the test of `is_compiling` first, and no other. With gradients on, `refuse` has a say.
        if torch.compiler.is_compiling():
            return operator(*arguments)
        if _direct.inside:
            return on_its_device(*arguments)
        if torch.is_grad_enabled() or watched():
            return operator(*arguments)
        if not _plain(arguments):
            return operator(*arguments)
        return _directly(on_its_device, arguments)

    return call


@functools.cache
def _with_context(function: type[torch.autograd.Function]) -> type[torch.autograd.Function]:
    """The same Function with its `setup_context` inside `forward`: transforms cannot take it, and it costs less."""

    def forward(ctx, *arguments):
        outputs = _directly(function.forward, arguments)
        function.setup_context(ctx, arguments, outputs)
        return outputs

    body = {"forward": staticmethod(forward), "backward": staticmethod(function.backward)}
    return type(function.__name__, (torch.autograd.Function,), body)


def apply(function: type[torch.autograd.Function], *arguments):
    """`function.apply(*arguments)`, by the shortest way that gives the same."""
    if torch.compiler.is_compiling() or watched() or not _plain(arguments):
        return function.apply(*arguments)
    if not torch.is_grad_enabled():
        return _directly(function.forward, arguments)
    # Function.apply looks for transforms, and for what finished ones left behind: neither is here.
    return super(torch.autograd.Function, _with_context(function)).apply(*arguments)


def run_dual(op: str, names: str, compute: Callable, primals: tuple, tangents: tuple) -> tuple:
    """`compute(primals, tangents)`, a tuple of values and one of tangents, also for dual tensors.

    `names` lists the primals; those with a * take a tangent.

    Inside `torch.func.jvp` or `torch.autograd.forward_ad`, primals that are dual tensors are taken
    apart and the values returned as dual tensors. Errors: inside a compiled function, which would
    drop the tangent (pytorch issue 192985).
    """
    if not forward_mode():
        return compute(primals, tangents)
    if torch.compiler.is_compiling():
        raise RuntimeError(
            f"{op}: torch.compile would lose the tangents of forward-mode differentiation "
            f"(torch.func.jvp, forward_ad); call {op}_dual with explicit tangents"
        )
    duals = [(None, None) if p is None else forward_ad.unpack_dual(p) for p in primals]
    found = tuple(tangent for _, tangent in duals)
    if all(tangent is None for tangent in found):
        return compute(primals, tangents)
    for name, tangent in zip(names.split(), found, strict=True):
        if tangent is not None and not name.endswith("*"):
            raise RuntimeError(f"{op}: {name} takes no tangent, got a dual tensor")
    if any(tangent is not None for tangent in tangents):
        raise RuntimeError(f"{op}: got explicit tangents and dual tensors; expected one or the other")
    values, dots = compute(tuple(primal for primal, _ in duals), found)
    pairs = zip(values, dots, strict=True)
    return tuple(v if dot is None else forward_ad.make_dual(v, dot) for v, dot in pairs), (None,) * len(dots)


@functools.cache
def _nothing(device: torch.device, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):
        return torch.empty(0, device=device, dtype=dtype)


def absent(like: Tensor) -> Tensor:
    """What an operator returns in place of an output that was not asked for; a function, always the same."""
    return _nothing(like.device, like.dtype) if _direct.inside else like.new_empty(0)


def present(output: Tensor, asked: bool) -> Tensor | None:
    """The output, or None where it was not asked for."""
    return output if asked else None


def as_rows(x: Tensor) -> Tensor:
    """x [..., C] as [rows, C] with unit stride along C; a copy only where no view can say it."""
    return unit_step(x.flatten(0, -2))


def unit_step(x: Tensor | None) -> Tensor | None:
    """x with its last dimension side by side; the steps of the others stay as they are where they can."""
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


def first_dot(samples: int, *tangents: Tensor | None) -> int:
    """The first sample that carries a tangent; tangents cover the last ones."""
    return samples - next((tangent.shape[0] for tangent in tangents if tangent is not None), 0)


def cdiv(size: int, part: int) -> int:
    """The parts of that size that cover `size`. Triton's own costs a microsecond outside kernels, as does its power."""
    return -(-size // part)


def power_of_two(size: int) -> int:
    """The smallest power of two that is at least `size`: tiles have such sides."""
    return 1 << max(size - 1, 0).bit_length()
