"""Turn kernels into operators: registration, gradients, and the chip they run on.

`operator` registers a function as `pmf::<name>`; the schema is inferred from its annotations, the only place that
states its arguments. The function allocates its outputs, returns them at once if tensors have `shapes_only` (so it
is its own fake function), else launches kernels. An output that is not needed is None; operators can return only
tensors, so they return an empty one in its place.

`differentiable` makes a function with gradients from a forward operator, what it saves, and its backward.
Compilers see the operators as opaque calls. There is deliberately no forward-mode rule: Dynamo drops such rules, so
`pmf.inputs` unpacks dual tensors, in eager mode only.

Host time. PyTorch needs 20 us to dispatch an operator, and 50 us more for `Function.apply`, mostly to bind arguments
to names: more than for a launch. If nothing intercepts operators (`pmf.private.intercepted`), the operator's function
is called directly: through a Function whose `forward` takes the context itself or, without gradients, through none.
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

from pmf.errors import no_vmap
from pmf.kernels.gradients import nested_forward_mode, underivable, unrecorded_without_grad
from pmf.kernels.launching import launch as launch
from pmf.private import FakeTensor, apply_without_transforms, intercepted, ordinary

_LIBRARY = torch.library.Library("pmf", "FRAGMENT")


@dataclass(frozen=True)
class Chip:
    """The properties of a GPU that launch configurations depend on."""

    capability: int
    """Compute capability times ten: 80, 90, 120; 0 for Triton's interpreter."""
    processors: int
    """Number of streaming multiprocessors."""
    shared_memory: int = 99 << 10
    """Maximum bytes of shared memory per program: 227 KB on H100 and B200, 163 on A100, 99 on RTX 30, 40 and 50."""

    @property
    def interpreted(self) -> bool:
        """Whether this is Triton's interpreter, where a program takes milliseconds whatever the size of its tile."""
        return self.capability == 0

    def stages(self, programs: int, staged: int, scratch: int) -> int:
        """Stages of a loop that prefetches into shared memory: up to two iterations ahead, if there is room.

        `programs` share a multiprocessor; each needs `staged` bytes per iteration, `scratch` bytes and 1 KB more.
        """
        room = self.shared_memory // programs - scratch - 1024
        return 1 + min(max(room // staged, 0), 2)


@dataclass(frozen=True)
class RowTile:
    """The rows that a program processes at a time."""

    rows: int
    block: int
    """Columns, padded to a power of two."""
    warps: int


@functools.cache
def _cuda_chip(index: int) -> Chip:
    found: Any = torch.cuda.get_device_properties(index)  # its declared type lacks the last attribute
    return Chip(10 * found.major + found.minor, found.multi_processor_count, found.shared_memory_per_block_optin)


def chip(device: torch.device) -> Chip:
    """The chip behind `device`."""
    if device.type != "cuda":
        return Chip(0, 1)
    return _cuda_chip(torch.cuda.current_device() if device.index is None else device.index)


def shapes_only(x: Tensor) -> bool:
    """Whether x has a shape but no values: a fake or a meta tensor."""
    return x.is_meta or isinstance(x, FakeTensor)


def _elsewhere(x: Tensor) -> bool:
    """Whether x is on a GPU other than the current one, on which Triton launches."""
    return x.is_cuda and x.get_device() != torch.cuda.current_device()


def _direct(arguments: tuple) -> bool:
    """Whether a function may run instead of its operator: nothing intercepts operators, all tensors are ordinary."""
    first = arguments[0]
    return (first.is_cuda or first.is_cpu) and not intercepted() and ordinary(arguments)


def _asked_for(outputs: Any) -> Any:
    """An operator's outputs, with None in place of the empty tensors."""
    if isinstance(outputs, Tensor):
        return outputs
    return tuple(None if x.ndim == 1 and x.shape[0] == 0 else x for x in outputs)


def _with_empty(like: Tensor, outputs: Any) -> Any:
    """Outputs with an empty tensor in the place of None; the inverse of `_asked_for`."""
    if isinstance(outputs, Tensor):
        return outputs
    return tuple(like.new_empty(0) if x is None else x for x in outputs)


class Operator:
    """A function registered as the operator `pmf::<name>`, and the shortest way to call it."""

    def __init__(self, function: Callable, gradient_of: str | Callable[..., str] | None = None) -> None:
        self.function, self.gradient_of = function, gradient_of
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
        return _with_empty(first, self.function(first, *others))

    def _refuse(self, context, *gradients):
        """Raise: the Function around the operator computes its gradients."""
        raise RuntimeError(
            f"{self.overload}: its gradient was lost, because torch.func.grad or vjp ran inside torch.compile; "
            "use loss.backward() or torch.autograd.grad there"
        )

    def __call__(self, *arguments):
        """The function's outputs, through the operator if something intercepts operators or records gradients."""
        if torch.compiler.is_compiling():
            return _asked_for(self.overload(*arguments))
        if torch.is_grad_enabled() or not _direct(arguments):
            return _asked_for(underivable(self.overload, self.gradient_of, *arguments))
        try:
            if _elsewhere(arguments[0]):
                with torch.cuda.device(arguments[0].device):
                    return self.function(*arguments)
            return self.function(*arguments)
        except NotImplementedError:  # batched gradients (is_grads_batched) look ordinary, but have no memory
            return _asked_for(self.overload(*arguments))


class Composition:
    """A function of operators, which `differentiable` takes as it takes an operator.

    `compose(run)` returns the function, which calls an operator op by run(op).
    """

    def __init__(self, compose: Callable[[Callable[[Operator], Callable]], Callable]) -> None:
        self.function = compose(lambda op: op.function)
        of_overloads = compose(_as_dispatched)

        def overload(first: Tensor, *others):
            return _with_empty(first, of_overloads(first, *others))

        self.overload = overload


def _as_dispatched(op: Operator) -> Callable:
    """What calls an operator as PyTorch dispatches it; compilers cannot trace an `Operator` itself."""
    overload = op.overload
    return lambda *arguments: _asked_for(overload(*arguments))


def operator(function: Callable) -> Operator:
    """Register `function` as the operator of its name. It runs on the device of its first argument, a tensor."""
    return Operator(function)


def gradient_operator(op: str | Callable[..., str]) -> Callable[[Callable], Operator]:
    """`operator` for a function that computes gradients of `op`, which errors name (by its arguments, if callable)."""
    return functools.partial(Operator, gradient_of=op)


@dataclass(frozen=True)
class Differentiable:
    """How a forward operator records gradients.

    The first `inputs` inputs and the first `outputs` outputs have gradients (None for an unused output).
    `save(ctx, inputs, outputs)` saves what `backward(ctx, *gradients)` needs to return the inputs' gradients.
    `complete(inputs, outputs)` may add views of inputs to the outputs, since operators cannot return views.
    """

    name: str
    """The name of the nodes in autograd's graph."""
    op: str
    """The public function, for errors."""
    forward: Operator | Composition
    save: Callable
    backward: Callable
    inputs: int
    outputs: int = 1
    complete: Callable[[tuple, Any], Any] = lambda inputs, outputs: outputs

    def by_operators(self, **rules: Callable) -> Callable:
        """`apply` of a Function in PyTorch's standard form, for compilers; with `refusals`, for all else."""
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

        # Without gradients, Dynamo decides by the number of parameters whether `forward` takes a context.
        setattr(forward, "__signature__", signature)  # noqa: B010
        return _function(self.name, forward=forward, setup_context=setup_context, backward=gradients, **rules).apply

    def refusals(self) -> dict[str, Callable]:
        """Rules for forward mode and vmap, which raise; Dynamo accepts no Function that has rules."""

        def jvp(ctx, *tangents):
            raise nested_forward_mode(self.op)

        def vmap(info, in_dims, *arguments):
            raise no_vmap(self.op)

        return dict(jvp=jvp, vmap=vmap)

    def directly(self) -> Callable:
        """The same around the function itself. A tuple carries what has no gradient past autograd at no cost."""
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


def differentiable(
    name: str, op: str, forward: Operator | Composition, save: Callable, backward: Callable, **options
) -> Callable:
    """A function of `forward`'s arguments that records gradients; see `Differentiable`."""
    made = Differentiable(name, op, forward, save, backward, **options)
    compiled_way, long_way, short_way = made.by_operators(), made.by_operators(**made.refusals()), made.directly()
    function, inputs, outputs, complete = forward.function, made.inputs, made.outputs, made.complete

    def call(*arguments):
        if torch.compiler.is_compiling():
            return _asked_for(compiled_way(*arguments))
        if not _direct(arguments):
            return _asked_for(unrecorded_without_grad(long_way(*arguments)))
        if _elsewhere(arguments[0]):
            with torch.cuda.device(arguments[0].device):
                return call(*arguments)
        if not torch.is_grad_enabled():
            return complete(arguments, function(*arguments))
        results = short_way(*arguments[:inputs], arguments[inputs:])
        return results[:outputs] + results[outputs] if type(results) is tuple else results

    return call


def as_rows(x: Tensor) -> Tensor:
    """x [..., C] as [rows, C] with unit stride along C; copied only if no view has that shape."""
    return unit_step(x.flatten(0, -2))


def unit_step(x: Tensor | None) -> Tensor | None:
    """x with unit stride along its last dimension; copied only if its stride is another."""
    return x if x is None or x.is_contiguous() or x.stride(-1) == 1 else x.contiguous()


def first_dot(samples: int, *tangents: Tensor | None) -> int:
    """The first sample that carries a tangent: tangents cover the last samples."""
    for tangent in tangents:
        if tangent is not None:
            return samples - tangent.shape[0]
    return samples


def cdiv(size: int, part: int) -> int:
    """Number of parts of size `part` that cover `size`. (Outside kernels, Triton's `cdiv` takes a microsecond.)"""
    return -(-size // part)


def power_of_two(size: int) -> int:
    """The smallest power of two that is at least `size`; the sides of tiles must be powers of two."""
    return 1 << max(size - 1, 0).bit_length()
