"""`pmf.jvp`, the value and the stop-gradient tangent of any network."""

from __future__ import annotations

import gc
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from pmf.errors import InputError
from pmf.private import forward_mode, operators_of, tree_broadcast, tree_flatten, tree_leaves, tree_map, tree_unflatten
from pmf.tangents import (  # noqa: F401 (they register)
    attention,
    flex_attention,
    formulas,
    in_place,
    norms,
    operators,
    packages,
    places,
    pointwise,
    products,
    queries,
    recurrent,
    shapes,
    wrappers,
)
from pmf.tangents.carriers import CARRIERS, carrier, open_call
from pmf.tangents.fallback import forward_mode_around
from pmf.tangents.handlers import TORCH_SCRIPT, ruled
from pmf.tangents.memory import fitted
from pmf.tangents.rules import HANDLERS, Rule

Number = int | float | complex
DICTS = dict, OrderedDict, defaultdict


def jvp(func: Callable, primals: tuple, tangents: tuple, *, has_aux: bool = False, rows: int | None = None) -> tuple:
    """`func(*primals)` and its derivative along `tangents`, without recording the derivative for backward.

    out_dot = sum_i (d func / d primal_i) tangent_i, by forward-mode differentiation: MeanFlow's du/dt is
    `pmf.jvp(network, (z, t, r), (v, 1, 0))`. The arguments are those of `torch.func.jvp`, and so is the result, but
    for the gradient: `out` is recorded exactly as `func(*primals)` is, and `out_dot` has none. No more is saved
    for backward than by `func(*primals)`; the tangent of each layer is freed when the next has read it.

    Args:
        func: any function of tensors that calls PyTorch: a module, or one that calls modules.
        primals: tuple of tensors, or of lists, tuples and dicts of tensors. Other leaves are passed on as they are.
        tangents: for each primal a tree of the same structure with tensors of the same shapes. None or 0 in place of
            a tensor or of a whole tree is zero and costs nothing; another number stands for a tensor filled with it.
        has_aux: `func` returns (output, aux); aux is returned as it is, without tangents.
        rows: the tangents cover only the last `rows` samples (the first dimension) of every tensor, and so does the
            derivative; there may be 0 of them. `func` is called on the other samples and then on these, so samples
            must not depend on one another, every tensor with samples must be among the primals, and no other tensor
            of that length, such as a table of positions.

    Returns (out, out_dot), with has_aux (out, out_dot, aux). out_dot has the structure of out; it is zero where
    nothing moves, and None for leaves that are not tensors.

    Numerics: values are those of `func(*primals)` bit by bit, except that PyTorch's fused inference path of
    nn.MultiheadAttention and nn.TransformerEncoderLayer (in eval, without gradients) is not taken and rounds otherwise;
    tangents are computed in the dtypes of their values.
    Inside, a value that moves is a Tensor with a second one beside it, of a subclass: `isinstance(x, torch.Tensor)`
    holds, `type(x) is torch.Tensor` does not. Cut from the tangent, as under torch.func.jvp: `detach()`, `data`,
    `item()`.

    Errors: `InputError` names the function where the tangent would be lost: an autograd.Function without `jvp`
    or a custom operator, unless `pmf.jvp.rule` knows it; reentrant checkpointing, torch.vmap, scripted modules, numpy;
    outputs in objects that are no lists, tuples or dicts; and bad primals or tangents.
    """
    return _jvp(func, primals, tangents, has_aux, rows)


def _jvp(func: Callable, primals: tuple, tangents: tuple, has_aux: bool, rows: int | None) -> tuple:
    """`jvp`. Apart from it, so that torch.compile(jvp) compiles what Dynamo may not begin with."""
    if forward_mode() and (torch.compiler.is_compiling() or forward_mode_around()):
        raise InputError("pmf.jvp: expected no torch.func.jvp or forward_ad around it, which it would not carry on")
    if not callable(func):
        raise InputError(f"pmf.jvp: func must be callable, got {type(func).__name__}")
    leaves, dots, spec = _leaves(primals, tangents)
    if rows is not None:
        return _on_last_rows(func, leaves, dots, spec, has_aux, rows)
    # A compiler traces the carriers of this call into one graph, and nothing of them is left.
    with nullcontext() if torch.compiler.is_compiling() else _eager_call():
        result = func(*tree_unflatten(list(map(_moving, leaves, dots)), spec))
        if has_aux and not (isinstance(result, tuple) and len(result) == 2):
            raise InputError(
                f"pmf.jvp: with has_aux the function must return (output, aux), got {_described(_value(result))}"
            )
        out, *aux = result if has_aux else (result,)
        with torch.no_grad():
            out_dots = tree_map(_dot, out)
    return tree_map(_value, out), out_dots, *tree_map(_value, aux)


NO_ADDRESS = (
    "Cannot access data pointer of Tensor (e.g. FakeTensor",
    "The tensor has a non-zero number of elements, but",
)
"""How PyTorch begins when a carrier is asked for its memory."""
EXTENSION = "its tangent would be lost (by a C++ extension or DLPack); expected an operator known to pmf.jvp.rule"


@contextmanager
def _eager_call() -> Iterator[None]:
    try:
        packages.look_up_late()
        with open_call(), wrappers.seen_through():
            yield
    except RuntimeError as error:
        if "TorchScript interpreter" in str(error):
            raise InputError(f"pmf.jvp: a scripted function got a moving value; {TORCH_SCRIPT}") from error
        if str(error).startswith(NO_ADDRESS):
            raise InputError(f"pmf.jvp: code without torch functions got a moving value; {EXTENSION}") from error
        raise


def _leaves(primals: Any, tangents: Any) -> tuple[list, list, Any]:
    """The leaves of the primals, the tangent of each, and the structure."""
    for name, given in (("primals", primals), ("tangents", tangents)):
        if not isinstance(given, tuple):
            raise InputError(f"pmf.jvp: {name} must be a tuple, got {type(given).__name__}")
    leaves, spec = tree_flatten(primals)
    dots = tree_broadcast(_in_order(tangents, primals), spec)
    if dots is None:
        raise InputError("pmf.jvp: tangents must have the structure of primals, with None or 0 for what stands still")
    return leaves, [None if isinstance(dot, Number) and dot == 0 else dot for dot in dots], spec


def _in_order(tangents: Any, primals: Any) -> Any:
    """The tangents with the entries of each dict in the order of the primals', in which PyTorch pairs them."""
    kind = type(tangents)
    if kind in DICTS and isinstance(primals, dict) and primals.keys() == tangents.keys():
        made = tangents.copy()  # of the same kind
        made.clear()
        made.update({name: _in_order(tangents[name], x) for name, x in primals.items()})
        return made
    if kind in (tuple, list) and isinstance(primals, (tuple, list)) and len(primals) == len(tangents):
        return kind([_in_order(dot, x) for dot, x in zip(tangents, primals, strict=True)])
    return tangents


def _moving(primal: Any, tangent: Any) -> Any:
    """A carrier of one tensor and its tangent; the primal itself if the tangent is None."""
    if tangent is None:
        return primal
    _check(primal, tangent)
    if isinstance(tangent, Number):
        return carrier(primal, torch.full_like(primal, tangent, requires_grad=False))
    with torch.no_grad():
        return carrier(primal, fitted(tangent.detach().clone(), primal))


def _check(primal: Any, tangent: Any) -> None:
    """Errors: `InputError` unless the primal can move along the tangent."""
    if not isinstance(primal, Tensor) or not (primal.is_floating_point() or primal.is_complex()):
        raise InputError(f"pmf.jvp: a primal with tangent must be a floating tensor, got {_described(primal)}")
    if type(primal) in CARRIERS:
        raise InputError("pmf.jvp: expected primals that do not move, got those of another call")
    if primal.layout != torch.strided or primal.is_nested:
        raise InputError(f"pmf.jvp: a primal with tangent must be dense, got a {type(primal)} that is {primal.layout}")
    by_number = isinstance(tangent, Number)
    if not by_number and (not isinstance(tangent, Tensor) or tangent.shape != primal.shape):
        raise InputError(
            f"pmf.jvp: a tangent must have the shape of its primal, {list(primal.shape)}, got {_described(tangent)}"
        )
    if not primal.is_complex() and (isinstance(tangent, complex) if by_number else tangent.is_complex()):
        raise InputError(f"pmf.jvp: the tangent of a real primal must be real, got {_described(tangent)}")
    if not by_number and (tangent.device, tangent.layout) != (primal.device, primal.layout):
        raise InputError(
            "pmf.jvp: a tangent must have the device and layout of its primal, "
            f"{primal.device} and {primal.layout}, got {tangent.device} and {tangent.layout}"
        )


def _described(x: Any) -> str:
    return f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__


def _value(x: Any) -> Any:
    """The tensor of an output; that of a carrier can be one itself, of what had taken over an ordinary tensor."""
    while type(x) in CARRIERS:
        x = x.value
    return x


def _dot(x: Any) -> Any:
    """The tangent of an output; zeros if it does not move, None if it is no tensor."""
    if type(x) in CARRIERS:
        return torch.zeros_like(x.value) if x.tangent is None else x.tangent
    if isinstance(x, Tensor):
        return torch.zeros_like(x, requires_grad=False)
    if not torch.compiler.is_compiling() and (isinstance(x, Iterator) or _holds_carriers(x)):
        raise InputError(
            f"pmf.jvp: the function returned {type(x)}, in which tangents would be lost; "
            "expected tensors, or lists, tuples and dicts of them"
        )
    return None


def _holds_carriers(x: Any) -> bool:
    """Whether an object (a dataclass, a set) holds carriers."""
    return any(type(held) in CARRIERS for held in tree_leaves(gc.get_referents(x)))


def _on_last_rows(function: Callable, leaves: list, dots: list, spec: Any, has_aux: bool, rows: int) -> tuple:
    """`jvp` of the last rows, and the function alone of the others; outputs joined."""
    if not hasattr(rows, "__index__"):
        raise InputError(f"pmf.jvp: rows must be an int, got {type(rows).__name__}")
    moving = [(len(x), dot) for x, dot in zip(leaves, dots, strict=True) if dot is not None and _has_samples(x)]
    samples = {n for n, dot in moving if isinstance(dot, Tensor)} or {n for n, _ in moving}
    if len(samples) != 1:
        raise InputError(f"pmf.jvp: with rows all primals that move must have as many samples, got {sorted(samples)}")
    (batch,) = samples
    if not 0 <= rows <= batch:
        raise InputError(f"pmf.jvp: rows must lie in [0, {batch}], got {rows}")

    if rows == 0:
        out, *aux = function(*tree_unflatten(leaves, spec)) if has_aux else (function(*tree_unflatten(leaves, spec)),)
        return out, tree_map(_of_no_sample, out), *aux

    def part(rows: slice) -> list:
        return [x[rows] if _has_samples(x) and len(x) == batch else x for x in leaves]

    last = _jvp(
        function, tree_unflatten(part(slice(batch - rows, None)), spec), tree_unflatten(dots, spec), has_aux, None
    )
    if rows == batch:
        return last
    first = function(*tree_unflatten(part(slice(batch - rows)), spec))
    out, *aux = first if has_aux else (first,)
    joined = [_joined(a, b, (batch - rows, rows)) for a, b in zip((out, *aux), (last[0], *last[2:]), strict=True)]
    return joined[0], last[1], *joined[1:]


def _of_no_sample(x: Any) -> Any:
    """The tangent of an output where no sample moves; None if it is no tensor. Errors: `InputError`."""
    if isinstance(x, Tensor) and not x.ndim:
        raise InputError("pmf.jvp: with rows outputs must have samples, got a single number")
    return torch.zeros_like(x[:0], requires_grad=False) if isinstance(x, Tensor) else None


def _has_samples(x: Any) -> bool:
    """Whether x is a tensor with a first dimension."""
    return isinstance(x, Tensor) and x.ndim > 0


def _joined(first: Any, last: Any, samples: tuple[int, int]) -> Any:
    """Two trees of outputs, tensors joined along the samples. Errors: `InputError` if one has other numbers of them."""
    one, spec = tree_flatten(first)
    two, _ = tree_flatten(last)
    pairs = list(zip(one, two, strict=True))
    for pair in pairs:
        if isinstance(pair[0], Tensor) and tuple(len(x) if x.ndim else 0 for x in pair) != samples:
            shapes = [list(x.shape) for x in pair]
            raise InputError(f"pmf.jvp: with rows outputs must have {samples} samples in two calls, got {shapes}")
    return tree_unflatten([torch.cat(pair) if isinstance(pair[0], Tensor) else pair[1] for pair in pairs], spec)


def rule(function: Callable) -> Callable[[Rule], Rule]:
    """Register how values move through an autograd.Function, a custom operator or a torch function.

    The decorated function is called without gradients, with the output and then the arguments of `function`; the
    output has been computed and recorded as usual, and every argument that moves is a `pmf.Dual`. It returns the
    tangent of the output (a tuple for several outputs); None is zero. An autograd.Function is registered as its class,
    and must be called as `Class.apply(...)`: an `apply` that was looked up before the call of pmf.jvp raises.

    For example, `pmf.jvp.rule(Square)(lambda out, x: 2 * x.value * x.dot)`.
    """

    if not callable(function):
        raise InputError(f"pmf.jvp.rule: expected a function, got {type(function).__name__}")

    def register(given: Rule) -> Rule:
        for one in operators_of(function):
            HANDLERS[one] = ruled(given)
        return given

    return register


jvp.rule = rule  # type: ignore[attr-defined]
