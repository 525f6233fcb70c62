"""How a kernel becomes an operator: registration, gradients, and the chip it runs on.

`operator` registers a function as `pmf::<name>`; the schema is inferred from its annotations, the only place that
states its arguments. The function allocates its outputs, returns them at once where tensors have `shapes_only` (so it
is its own fake function), and launches kernels. An output that is not needed is None; operators, which return tensors
alone, return an empty one in its place.

`differentiable` makes a function with gradients of a forward operator, of what it keeps and of its backward.
Compilers see the operators as opaque calls. There is no forward-mode rule on purpose: Dynamo drops such rules, so
`pmf.inputs` takes dual tensors apart, in eager mode only.

Host time. An operator costs 20 us on its way through PyTorch, `Function.apply` 50 us more, most of it to bind
arguments to names: more than a launch. Where nothing intercepts operators (`pmf.private.intercepted`), the function
behind the operator is called directly, and a Function runs whose `forward` takes the context itself, or none.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pmf.kernels.launching import launch as launch
from pmf.private import FakeTensor, apply_without_transforms, intercepted, ordinary

_LIBRARY = torch.library.Library("pmf", "FRAGMENT")


@dataclass(frozen=True)
class Chip:
    """What launch configurations depend on."""

    capability: int
    """Compute capability times ten: 80, 90, 120; 0 for Triton's interpreter."""
    processors: int
    """Number of streaming multiprocessors."""
    shared_memory: int = 99 << 10
    """Bytes of shared memory a program can have: 227 KB on H100 and B200, 163 on A100, 99 on RTX 30, 40 and 50."""

    @property
    def interpreted(self) -> bool:
        """Triton's interpreter, where a program takes milliseconds whatever the size of its tile."""
        return self.capability == 0

    def stages(self, programs: int, staged: int, scratch: int) -> int:
        """Stages of a loop that loads ahead into shared memory: up to two iterations ahead, as far as there is room.

        `programs` reside on a multiprocessor; each needs `staged` bytes an iteration, `scratch` bytes and 1 KB more.
        """
        room = self.shared_memory // programs - scratch - 1024
        return 1 + min(max(room // staged, 0), 2)


@dataclass(frozen=True)
class RowTile:
    """The rows that a program works on at a time."""

    rows: int
    block: int
    """Columns, padded to a power of two."""
    warps: int


@functools.cache
def _cuda_chip(index: int) -> Chip:
    found: Any = torch.cuda.get_device_properties(index)  # its type lacks the last of these
    return Chip(10 * found.major + found.minor, found.multi_processor_count, found.shared_memory_per_block_optin)


def chip(device: torch.device) -> Chip:
    """The chip behind `device`."""
    if device.type != "cuda":
        return Chip(0, 1)
    return _cuda_chip(torch.cuda.current_device() if device.index is None else device.index)


def shapes_only(x: Tensor) -> bool:
    """Whether x has a shape and no values: a fake or a meta tensor."""
    return x.is_meta or isinstance(x, FakeTensor)


def _elsewhere(x: Tensor) -> bool:
    """Whether x is on another GPU than the current one; Triton launches on the current one."""
    return x.is_cuda and x.get_device() != torch.cuda.current_device()


def _direct(arguments: tuple) -> bool:
    """Whether a function may run in place of its operator: nothing intercepts operators, all tensors are ordinary."""
    first = arguments[0]
    return (first.is_cuda or first.is_cpu) and not intercepted() and ordinary(arguments)


def _asked_for(outputs: Any) -> Any:
    """An operator's outputs, None for those that were not asked for."""
    if isinstance(outputs, Tensor):
        return outputs
    return tuple(None if x.ndim == 1 and x.shape[0] == 0 else x for x in outputs)


class Operator:
    """A function registered as the operator `pmf::<name>`, and the shortest way to call it."""

    def __init__(self, function: Callable) -> None:
        self.function = function
        name = function.__name__.strip("_")
        _LIBRARY.define(torch.library.infer_schema(function, op_name=name, mutates_args=()))
        for key in ("CUDA", "CPU"):
            _LIBRARY.impl(name, self._on_its_device, key)
        torch.library.register_fake(f"pmf::{name}", self._tensors, lib=_LIBRARY)
        torch.library.register_autograd(f"pmf::{name}", self._refuse, lib=_LIBRARY)
        self.overload = getattr(torch.ops.pmf, name).default

    def _on_its_device(self, first: Tensor, *others):
        with torch.cuda.device(first.device) if _elsewhere(first) else contextlib.nullcontext():
            return self._tensors(first, *others)

    def _tensors(self, first: Tensor, *others):
        outputs = self.function(first, *others)
        if isinstance(outputs, Tensor):
            return outputs
        return tuple(first.new_empty(0) if x is None else x for x in outputs)

    def _refuse(self, context, *gradients):
        """Gradients belong to the Function around the operator."""
        raise RuntimeError(
            f"{self.overload}: its gradient was lost, because torch.func.grad or vjp ran inside torch.compile; "
            "use loss.backward() or torch.autograd.grad there"
        )

    def __call__(self, *arguments):
        """The function's outputs, by the operator where something intercepts those or would record gradients."""
        # Dynamo traces `is_compiling`, and nothing that comes after it. With gradients on, `_refuse` has a say.
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or not _direct(arguments):
            return _asked_for(self.overload(*arguments))
        if _elsewhere(arguments[0]):
            with torch.cuda.device(arguments[0].device):
                return self.function(*arguments)
        return self.function(*arguments)


def operator(function: Callable) -> Operator:
    """Register `function` as the operator of its name. Its first argument is a tensor, on whose device it runs."""
    return Operator(function)


@dataclass(frozen=True)
class Differentiable:
    """How a forward operator records gradients.

    The first `inputs` inputs and the first `outputs` outputs have gradients, None where nothing reads an output.
    `save(ctx, inputs, outputs)` keeps what `backward(ctx, *gradients)` needs to return those of the inputs.
    `complete(inputs, outputs)` may add views of inputs, which operators do not return, to the outputs.
    """

    name: str
    """Of the nodes in a graph."""
    forward: Operator
    save: Callable
    backward: Callable
    inputs: int
    outputs: int = 1
    complete: Callable[[tuple, Any], Any] = lambda inputs, outputs: outputs

    def by_operators(self) -> Callable:
        """`apply` of a Function that compilers, transforms and modes see as PyTorch means them to."""
        overload, signature = self.forward.overload, inspect.signature(self.forward.function)
        save, backward, complete, outputs = self.save, self.backward, self.complete, self.outputs
        others = (None,) * (len(signature.parameters) - self.inputs)

        def forward(*arguments):
            return complete(arguments, overload(*arguments))

        def setup_context(ctx, arguments, results):
            save(ctx, arguments, results)
            ctx.set_materialize_grads(False)
            if not isinstance(results, Tensor):
                ctx.mark_non_differentiable(*results[outputs:])

        def gradients(ctx, *gradients):
            return *backward(ctx, *gradients), *others

        # Without gradients Dynamo tells by the number of parameters whether `forward` takes a context.
        setattr(forward, "__signature__", signature)  # noqa: B010
        return _function(self.name, forward=forward, setup_context=setup_context, backward=gradients).apply

    def directly(self) -> Callable:
        """The same around the function itself. What has no gradient goes past autograd in a tuple, at no cost."""
        function, inputs, outputs = self.forward.function, self.inputs, self.outputs
        save, backward, complete = self.save, self.backward, self.complete

        def forward(ctx, *grouped):
            arguments = grouped[:inputs] + grouped[inputs]
            results = complete(arguments, function(*arguments))
            save(ctx, arguments, results)
            ctx.set_materialize_grads(False)
            return (*results[:outputs], results[outputs:]) if type(results) is tuple else results

        def gradients(ctx, *gradients):
            return *backward(ctx, *gradients), None

        return apply_without_transforms(_function(self.name, forward=forward, backward=gradients))


def _function(name: str, **methods: Callable) -> type[torch.autograd.Function]:
    return type(name, (torch.autograd.Function,), {key: staticmethod(method) for key, method in methods.items()})


def differentiable(name: str, forward: Operator, save: Callable, backward: Callable, **options) -> Callable:
    """A function of `forward`'s arguments that records gradients; see `Differentiable`."""
    made = Differentiable(name, forward, save, backward, **options)
    long_way, short_way = made.by_operators(), made.directly()
    function, inputs, outputs, complete = forward.function, made.inputs, made.outputs, made.complete

    def call(*arguments):
        if torch.compiler.is_compiling() or not _direct(arguments):
            return _asked_for(long_way(*arguments))
        if _elsewhere(arguments[0]):
            with torch.cuda.device(arguments[0].device):
                return call(*arguments)
        if not torch.is_grad_enabled():
            return complete(arguments, function(*arguments))
        results = short_way(*arguments[:inputs], arguments[inputs:])
        return results[:outputs] + results[outputs] if type(results) is tuple else results

    return call


def as_rows(x: Tensor) -> Tensor:
    """x [..., C] as [rows, C] with unit stride along C; copied only where no view has that shape."""
    return unit_step(x.flatten(0, -2))


def unit_step(x: Tensor | None) -> Tensor | None:
    """x with unit stride along its last dimension; copied only where it has another."""
    return x if x is None or x.is_contiguous() or x.stride(-1) == 1 else x.contiguous()


def first_dot(samples: int, *tangents: Tensor | None) -> int:
    """The first sample that carries a tangent: tangents cover the last samples."""
    for tangent in tangents:
        if tangent is not None:
            return samples - tangent.shape[0]
    return samples


def cdiv(size: int, part: int) -> int:
    """How many parts of that size cover `size`. (Outside kernels, Triton's own functions take a microsecond.)"""
    return -(-size // part)


def power_of_two(size: int) -> int:
    """The smallest power of two that is at least `size`, as the sides of tiles are."""
    return 1 << max(size - 1, 0).bit_length()
