"""Carriers: values with tangents in the guise of tensors, so that unmodified networks accept them."""

from __future__ import annotations

import contextlib
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pmf.errors import InputError
from pmf.pair import Dual
from pmf.private import exchange, inside_function, make_shell, transform_level, tree_leaves
from pmf.tangents.memory import fitted
from pmf.tangents.rules import HANDLERS, Handler, name_of
from pmf.tangents.tracing import trace_as_tensors, trace_once_imported


class DualTensor(Tensor):
    """A tensor that moves: every torch function that receives one computes value and tangent.

    `value` is recorded for backward, `tangent` never is. Without tangent (None) it acts as its value. The DualTensor
    itself has no storage: C++ code that bypasses torch functions raises instead of losing the tangent.
    """

    __module__ = "torch"
    """Libraries such as opt_einsum ask there which one computes."""
    value: Tensor
    _tangent: Tensor | None
    _view: Callable[[Tensor], Tensor] | None = None
    _viewed: DualTensor | None = None
    _call: list[weakref.ref] | None = None
    """The open call of `pmf.jvp` that made this, also where another thread meets it."""
    _adopted = False
    """Whether this has taken over an ordinary tensor."""

    @staticmethod
    def __new__(cls, *args: Any, **kwargs: Any) -> DualTensor:
        """Errors: `InputError`, always; `dual_tensor` makes one."""
        raise InputError("pmf.jvp: type(x) of a moving value makes no tensor; expected torch functions")

    @property
    def tangent(self) -> Tensor | None:
        """The tangent of `value`, in the memory of that of the DualTensor that this is a view of."""
        if self._tangent is None and self._viewed is not None and self._viewed.tangent is not None:
            with torch.no_grad():
                self._tangent = self._view(self._viewed.tangent)  # type: ignore[misc]
        return self._tangent

    @property
    def stopped(self) -> bool:
        """Whether the call that made this is over."""
        return self._call is None

    def start(self) -> None:
        """Let this stand still with a tangent of zero, to which in-place functions can write."""
        if self.tangent is None and self._viewed is not None:
            self._viewed.start()
        elif self.tangent is None:
            self._tangent = fitted(torch.zeros_like(self.value), self.value)

    def view_of(self, viewed: DualTensor, view: Callable[[Tensor], Tensor]) -> None:
        """Be a view of a DualTensor without tangent; `view` makes this one's tangent of that which the other gets."""
        self._viewed, self._view = viewed, view

    def take_over(self, value: Tensor, tangent: Tensor) -> None:
        """Stand for what was an ordinary tensor, and is `value` now, until the call is over."""
        self.value, self._tangent, self._adopted = value, tangent, True
        _join(self)

    def stop(self) -> None:
        """Act as the value alone from now on; what took over an ordinary tensor is that tensor again."""
        self._tangent = self._viewed = self._view = self._call = None
        if self._adopted:
            self._adopted, value = False, self.value
            with contextlib.suppress(RuntimeError):  # PyTorch holds it weakly, for retain_grad
                exchange(self, value)
                value.value = self  # type: ignore[attr-defined]  # for those that hold what was the value

    @staticmethod
    def __torch_function__(function, types, args=(), kwargs=None):
        return propagate(function, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if not any(x.tangent is not None or x.value.requires_grad for x in _carriers(args, kwargs)):
            return function(*values_of(args), **values_of(kwargs or {}))
        raise InputError(
            f"pmf.jvp: {function} was called around torch functions, where a tangent would be lost "
            "(by vmap, TorchScript, a C++ extension or an autograd.Function); expected torch functions"
        )


def dual_tensor(value: Tensor, dot: Tensor | None) -> DualTensor:
    """A DualTensor with the shape, strides, dtype and device of `value`."""
    made = make_shell(DualTensor, value)
    made.value, made._tangent = value, dot
    _join(made)
    return made


class TracedDualTensor:
    """A `DualTensor` for compilers, which cannot construct subclasses of Tensor: a plain object with its methods."""

    _call: list[weakref.ref] | None = None
    """The open call of `pmf.jvp` in which eager code has met this, which compiled code made."""

    def __init__(self, value: Tensor, dot: Tensor | None) -> None:
        self.value, self.tangent = value, dot

    def start(self) -> None:
        """Does nothing: unlike a DualTensor, this has a tangent from the start."""

    def stop(self) -> None:
        """Act as the value alone from now on."""
        self.tangent = self._call = None

    def join(self) -> None:
        """Be stopped by the end of the call that is open."""
        _join(self)

    @staticmethod
    def __torch_function__(function, types, args=(), kwargs=None):
        return propagate(function, args, kwargs)

    def __iter__(self):
        return iter(propagate(Tensor.unbind, (self, 0), {}))


CARRIERS = (DualTensor, TracedDualTensor)


def _method(function: Callable) -> Callable:
    return lambda self, *args, **kwargs: propagate(function, (self, *args), kwargs)


def _reflected(name: str) -> Callable:
    """The operator `other op self`. Python asks a subclass for it before `other`, whose own operator must run."""
    own, reflected = getattr(Tensor, f"__{name[1:]}__"), getattr(Tensor, f"__{name}__")

    def method(self, other):
        if isinstance(other, Tensor):
            return propagate(own, (other, self), {})
        return propagate(reflected, (self, other), {})

    return method


def _flipped(function: Callable) -> Handler:
    return lambda method, args, kwargs: propagate(function, (args[1], args[0]), kwargs)


def _as(function: Callable) -> Handler:
    return lambda method, args, kwargs: HANDLERS[function](function, args, kwargs)


TRACED_BY_NAME: dict[str, Handler] = {
    "__rsub__": _flipped(torch.sub),
    "__rtruediv__": _flipped(torch.div),
    "__rdiv__": _flipped(torch.div),
    "__rfloordiv__": _flipped(torch.floor_divide),
    "__rmod__": _flipped(torch.remainder),
    "__rpow__": _flipped(torch.pow),
    "__rmatmul__": _flipped(torch.matmul),
    "__floordiv__": lambda method, args, kwargs: propagate(torch.floor_divide, args, kwargs),
    "has_free_unbacked_symbols": lambda function, args, kwargs: function(*values_of(args)),
    "__len__": lambda method, args, kwargs: args[0].value.shape[0],
    "norm": _as(torch.norm),
    "pow": _as(torch.pow),
    "pow_": _as(Tensor.pow_),
    "unflatten": _as(torch.unflatten),
}
"""For compilers, by name, the handlers of what they cannot look up: methods written in Python, and checkpoints."""


def _property(name: str) -> property:
    return property(lambda self: getattr(self.value, name))


def _moving_property(own: Any) -> property:
    read, write = own.__get__, own.__set__
    return property(lambda self: propagate(read, (self,), {}), lambda self, x: propagate(write, (self, x), {}))


def _complete() -> None:
    """Give carriers the methods and properties of Tensor; Dynamo cannot call those that DualTensor would inherit."""
    for name in dir(Tensor):
        method = getattr(Tensor, name)
        if not name.startswith("_") and callable(method):
            for kind in CARRIERS:
                setattr(kind, name, _method(method))
    for name in PROPERTIES.split():
        setattr(TracedDualTensor, name, _property(name))
    for name in ("T", "mT", "H", "mH", "real", "imag", "data"):
        for kind in CARRIERS:
            setattr(kind, name, _moving_property(getattr(Tensor, name)))
    for name in OPERATORS.split():
        for kind in CARRIERS:
            setattr(kind, f"__{name}__", _method(getattr(Tensor, f"__{name}__")))
    for name in REFLECTED.split():
        for kind in CARRIERS:
            setattr(kind, f"__{name}__", _reflected(name))


PROPERTIES = """
device dtype grad grad_fn is_cpu is_cuda is_leaf is_meta is_mkldnn is_mps is_nested is_quantized is_sparse is_sparse_csr
is_xla is_xpu itemsize layout nbytes ndim requires_grad shape
"""
OPERATORS = """
add iadd sub isub mul imul truediv itruediv floordiv ifloordiv mod imod pow ipow matmul neg pos abs getitem setitem
lt le gt ge eq ne len bool float int
"""
REFLECTED = "radd rsub rmul rtruediv rfloordiv rmod rpow rmatmul"
_complete()


class _Calls(threading.local):
    """The calls of `pmf.jvp` that run in this thread, each with its DualTensors."""

    def __init__(self) -> None:
        self.open: list[list[weakref.ref]] = []
        self.level: int | None = None
        self.inference = False


_calls = _Calls()


def _join(x: DualTensor | TracedDualTensor) -> None:
    if x._call is None and _calls.open:
        x._call = _calls.open[-1]
        x._call.append(weakref.ref(x))


@contextmanager
def open_call() -> Iterator[None]:
    """Inside the context values move; after it, what is left of them (in closures, say) acts as plain values."""
    if _calls.open:
        raise InputError("pmf.jvp: expected a function without pmf.jvp in it, got a nested call")
    if "torch._dynamo" in sys.modules:  # the function may call compiled ones
        trace_as_tensors(CARRIERS)
    else:
        trace_once_imported(CARRIERS)
    call: list[weakref.ref] = []
    try:
        with _joined(call):
            yield
    finally:
        while call:
            left = call.pop()()
            if left is not None:
                left.stop()


@contextmanager
def _joined(call: list[weakref.ref]) -> Iterator[None]:
    """Inside the context this thread makes DualTensors of the call."""
    _calls.open.append(call)
    _calls.level, _calls.inference = transform_level(), torch.is_inference_mode_enabled()
    try:
        yield
    finally:
        _calls.open.pop()


def propagate(function: Callable, args: tuple, kwargs: dict | None) -> Any:
    """The result of a torch function some of whose arguments are carriers."""
    handler = None
    if torch.compiler.is_compiling():
        handler = TRACED_BY_NAME.get(getattr(function, "__name__", ""))
        args = tuple([torch.as_tensor(x) if isinstance(x, np.ndarray) else x for x in args])  # also numbers of NumPy
    else:
        if not _calls.open:  # another thread, or the call is over
            calls = [x._call for x in _carriers(args, kwargs) if x._call is not None]
            if calls:
                with _joined(calls[0]):
                    return propagate(function, args, kwargs)
        _check_surroundings(function)
    handler = handler or HANDLERS.get(function) or HANDLERS[None]
    return handler(function, args, {} if kwargs is None else kwargs)


def _check_surroundings(function: Callable) -> None:
    """Errors: `InputError` inside `torch.vmap` and other transforms, or an autograd.Function, begun in the network."""
    if _calls.open and transform_level() != _calls.level:
        raise InputError(f"pmf.jvp: {name_of(function)} got a moving value inside torch.vmap or another transform")
    if torch.is_inference_mode_enabled():
        if _calls.open and not _calls.inference:
            raise InputError(
                f"pmf.jvp: {name_of(function)} got a moving value inside torch.inference_mode, which cuts tangents; "
                "expected torch.no_grad"
            )
    elif inside_function():
        raise InputError(
            f"pmf.jvp: {name_of(function)} got a moving value inside an autograd.Function, which hides tangents; "
            "expected one registered by pmf.jvp.rule, called as Name.apply"
        )


def carrier(value: Tensor, dot: Tensor | None) -> Any:
    """`value` and its tangent as one object that behaves as a tensor."""
    if not torch.compiler.is_compiling():
        return dual_tensor(value, dot)
    trace_as_tensors(CARRIERS)
    return TracedDualTensor(value, dot)


def as_dual(x: Any) -> Dual:
    """A tensor or carrier as a `Dual`."""
    return Dual(x.value, x.tangent) if type(x) in CARRIERS else Dual(x)


def carrier_of(dual: Dual) -> Any:
    """A `Dual` as one object that behaves as a tensor; the value alone if it has no tangent.

    If a weight moves too, the value is a carrier already, whose tangent is the weight's part.
    """
    if dual.dot is None:
        return dual.value
    (value, by_weights), (dot, _) = as_dual(dual.value), as_dual(dual.dot)
    with torch.no_grad():
        return carrier(value, fitted(dot if by_weights is None else dot + by_weights, value))


def give(out: Any, dots: Any) -> Any:
    """Outputs with their tangents; an output whose tangent is None stays as it is."""
    if dots is None:
        return out
    if isinstance(out, Tensor):
        return carrier(out, fitted(dots, out))
    return rebuilt(out, [give(x, dot) for x, dot in zip(out, dots, strict=True)])


def inside_call() -> bool:
    """Whether `pmf.jvp` runs in this thread, in eager mode."""
    return not torch.compiler.is_compiling() and bool(_calls.open)


def moves(x: Any) -> bool:
    """Whether x is, or a list, tuple or dict x contains, a carrier with a tangent."""
    kind = type(x)
    if kind in CARRIERS:
        return x.tangent is not None
    if isinstance(x, (tuple, list)):
        return any([moves(part) for part in x])
    return kind is dict and any([moves(part) for part in x.values()])


def _carriers(*trees: Any) -> list[DualTensor]:
    return [x for x in tree_leaves(trees) if type(x) is DualTensor]


def each(x: Any, change: Callable[[Any], Any]) -> Any:
    """x with its carriers changed, also those in lists, tuples and dicts."""
    kind = type(x)
    if kind in CARRIERS:
        return change(x)
    if kind is tuple:
        return tuple([each(part, change) for part in x])
    if kind is list:
        return [each(part, change) for part in x]
    if kind is dict:
        return {name: each(part, change) for name, part in x.items()}
    if isinstance(x, (tuple, list)):
        return rebuilt(x, [each(part, change) for part in x])
    return x


def rebuilt(like: Any, parts: list) -> Any:
    """The parts in a list or tuple of the kind of another one; that itself if they are its own."""
    if all([a is b for a, b in zip(like, parts, strict=True)]):
        return like
    named = hasattr(like, "_fields") and not hasattr(like, "n_fields")  # not torch.return_types
    return type(like)(*parts) if named else type(like)(parts)


def values_of(x: Any) -> Any:
    """x with the values of its carriers."""
    return each(x, lambda moving: moving.value)
