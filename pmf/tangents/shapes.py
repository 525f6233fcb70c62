"""Rules of linear functions: the tangent passes through the function itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pmf.errors import InputError
from pmf.pair import Dual
from pmf.private import assume
from pmf.tangents.fallback import check_eager
from pmf.tangents.handlers import by_torch_func, made_like, refused, ruled, still
from pmf.tangents.rules import (
    HANDLERS,
    TRACED,
    Rule,
    argument,
    getter,
    is_dual,
    jointly_linear,
    linear_in_first,
    named,
    plain,
    zero,
)

LINEAR = """
__neg__ __pos__ _upsample_bicubic2d_aa _upsample_bilinear2d_aa _upsample_nearest_exact1d _upsample_nearest_exact2d
_upsample_nearest_exact3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adjoint alias_copy avg_pool1d
avg_pool2d avg_pool3d bfloat16 broadcast_to cdouble cfloat chalf channel_shuffle chunk clone col2im conj conj_physical
contiguous cpu cuda cumsum diag diag_embed diagonal diagonal_copy double dsplit expand expand_copy fft fft2 fftn
fftshift flatten flip fliplr flipud float gather half hfft hfft2 hfftn hsplit ifft ifft2 ifftn ifftshift ihfft ihfft2
ihfftn im2col imag index_select irfft irfft2 irfftn ldexp mean moveaxis movedim narrow narrow_copy
native_channel_shuffle neg negative permute permute_copy pixel_shuffle pixel_unshuffle positive ravel real
reflection_pad1d reflection_pad2d reflection_pad3d repeat repeat_interleave replication_pad1d replication_pad2d
replication_pad3d reshape resolve_conj resolve_neg rfft rfft2 rfftn roll rot90 select select_copy slice_copy split
split_copy split_with_sizes split_with_sizes_copy squeeze squeeze_copy sum sum_to_size swapaxes swapdims t t_copy take
take_along_dim tensor_split tile to trace transpose transpose_copy tril triu type unbind unbind_copy unflatten unfold
unfold_copy unsafe_chunk unsafe_split unsafe_split_with_sizes unsqueeze unsqueeze_copy upsample_bicubic2d
upsample_bilinear2d upsample_linear1d upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_trilinear3d
view_as_complex view_as_real view_copy vsplit
"""
"""Linear in the first argument, over the real numbers."""

SELECTING = "__getitem__ masked_select"
"""Linear in the first argument too, with a result whose shape may depend on data."""

LIKE = "expand_as reshape_as to type_as view_as"
"""Linear in the first argument; of the second only shape, dtype or device count."""

STACKING = "block_diag cat column_stack concat concatenate dstack hstack row_stack stack vstack"
"""Linear in all tensors of the list that comes first."""

TOGETHER = "atleast_1d atleast_2d atleast_3d broadcast_tensors cartesian_prod meshgrid"
"""Linear in all arguments."""

ZERO = """
bernoulli ceil detach detach_copy fix floor floor_divide heaviside round sign trunc
"""
"""Piecewise constant, or cut from the tangent as under `torch.func.jvp`."""

MADE_LIKE = """
empty_like full_like new new_empty new_empty_strided new_full new_ones new_tensor new_zeros ones_like rand_like
randint_like randn_like zeros_like
"""
"""New tensors, which may move later: when a moving value is written to them."""


def _like(function: Callable) -> Rule:
    linear = linear_in_first(function)
    return lambda out, x, *args, **kwargs: linear(out, x, *map(plain, args), **{k: plain(v) for k, v in kwargs.items()})


def _selecting(function: Callable) -> Rule:
    """The rule of a linear function. Compilers give value and tangent sizes of their own where these depend on data."""
    linear = linear_in_first(function)

    def rule(out, *args, **kwargs):
        dot = linear(out, *args, **kwargs)
        if not torch.compiler.is_compiling() or dot is NotImplemented:
            return dot
        for n, size in zip(dot.shape, out.shape, strict=True):
            assume(n == size)
        return dot.expand(out.shape)

    return rule


def _dot(x: Tensor | Dual) -> Any:
    return x.dot if isinstance(x, Dual) else zero(x)


def _stacking(function: Callable) -> Rule:
    def rule(out, tensors, *args, **kwargs):
        if is_dual(tensors):
            return NotImplemented
        return function(list(map(_dot, tensors)), *args, **kwargs)

    return rule


def _together(function: Callable) -> Rule:
    """The rule of a function that is linear in all its arguments, which may be tensors or one list of tensors."""

    def rule(out, *tensors, **kwargs):
        listed = len(tensors) == 1 and isinstance(tensors[0], list | tuple) and not is_dual(tensors[0])
        given = tensors[0] if listed else tensors
        dots = list(map(_dot, given))
        result = function(dots, **kwargs) if listed else function(*dots, **kwargs)
        if isinstance(result, Tensor):
            return result
        return [dot if is_dual(x) else None for x, dot in zip(given, result, strict=True)]

    return rule


def _taken(position: int) -> Rule:
    """The rule of a function that gives some of the values along a dimension, and their places."""

    def rule(out, *args, **kwargs):
        x, dim = args[0], argument(args, kwargs, (position, "dim"))
        if not is_dual(x) or not isinstance(out, tuple):
            return NotImplemented
        (values, places), dim = out, -1 if dim is None else dim
        if values.ndim == x.value.ndim:
            return x.dot.gather(dim, places), None
        return x.dot.gather(dim, places.unsqueeze(dim)).squeeze(dim), None

    return rule


def _fill(function: Callable) -> Rule:
    """The rule of `masked_fill` and `index_fill` by a number: zero there."""

    def rule(out, x, *args, **kwargs):
        given = [*args, *kwargs.values()]
        places, filled = given[:-1], given[-1]
        if not is_dual(x) or kwargs.keys() - {"value"} or isinstance(filled, Tensor) or is_dual(filled):
            return NotImplemented
        return function(x.dot, *places, 0)

    return rule


def _pad(function: Callable) -> Rule:
    def rule(out, x, pad, mode="constant", value=None):
        return function(x.dot, pad, mode, 0.0 if value is not None else None)

    return rule


def _constant_pad(function: Callable) -> Rule:
    return lambda out, x, pad, value=0: function(x.dot, pad, 0)


def _as_strided(function: Callable) -> Rule:
    """The storage offset counts from the start of the memory, in which the tangent may lie elsewhere."""

    def rule(out, x, size, stride, storage_offset=None):
        if x.dot.stride() != x.value.stride():
            raise InputError("pmf.jvp: as_strided got a moving value that is expanded; expected a contiguous one")
        if torch.compiler.is_compiling() and storage_offset is None:
            return function(x.dot, size, stride)
        check_eager(function)
        offset = x.dot.storage_offset() + out.storage_offset() - x.value.storage_offset()
        try:
            return function(x.dot, size, stride, offset)
        except RuntimeError as error:
            raise InputError("pmf.jvp: as_strided reads beyond the tensor that moves; expected places in it") from error

    return rule


JOINT: dict[str, tuple[tuple[int, str], ...]] = {
    "lerp": ((0, "input"), (1, "end")),
    "diff": ((0, "input"), (3, "prepend"), (4, "append")),
    "where": ((1, "input"), (2, "other")),
    "scatter_add": ((0, "input"), (3, "src")),
    "index_add": ((0, "input"), (3, "source")),
    "index_copy": ((0, "input"), (3, "source")),
    "index_put": ((0, "input"), (2, "values")),
    "masked_scatter": ((0, "input"), (2, "source")),
    "slice_scatter": ((0, "input"), (1, "src")),
    "select_scatter": ((0, "input"), (1, "src")),
    "diagonal_scatter": ((0, "input"), (1, "src")),
}
"""Linear in the arguments at these slots together."""


def _register(names: str, rule_of: Callable[[Callable], Rule]) -> None:
    for function in named(*names.split()):
        HANDLERS[function] = ruled(rule_of(function))


def _scatter(function: Callable) -> Rule:
    """Linear in input and source together, unless it reduces."""
    linear = jointly_linear(function, (0, "input"), (3, "src"), (4, "value"))
    return lambda out, *args, **kwargs: NotImplemented if "reduce" in kwargs else linear(out, *args, **kwargs)


def _scatter_reduce(function: Callable, args: tuple, kwargs: dict) -> Any:
    """By `torch.func.jvp`, which is wrong for products."""
    if argument(args, kwargs, (4, "reduce")) == "prod":
        return refused("expected no product: torch.func.jvp is wrong there")(function, args, kwargs)
    return by_torch_func(function, args, kwargs)


def _view(view: Callable, args: tuple, kwargs: dict) -> Any:
    """x.view(shape); x.view(dtype) reads the bits of x as other numbers and has no derivative."""
    by_dtype = "dtype" in kwargs or any(isinstance(x, torch.dtype) for x in args)
    return (still if by_dtype else _VIEW)(view, args, kwargs)


_VIEW = ruled(linear_in_first(Tensor.view))
HANDLERS[Tensor.view] = _view
_register("scatter", _scatter)
for _function in named("scatter_reduce"):
    HANDLERS[_function] = _scatter_reduce
_register(LINEAR, linear_in_first)
_register(SELECTING, _selecting)
_register(LIKE, _like)
_register(STACKING, _stacking)
_register("masked_fill index_fill", _fill)
_register("pad", _pad)
_register("constant_pad_nd", _constant_pad)
_register("as_strided", _as_strided)
_register(TOGETHER, _together)
for _name in ("sort", "max", "min", "median", "nanmedian", "mode", "cummax", "cummin"):
    _register(_name, lambda function: _taken(1))
for _name in ("topk", "kthvalue"):
    _register(_name, lambda function: _taken(2))
for _name, _slots in JOINT.items():
    for _function in named(_name):
        HANDLERS[_function] = ruled(jointly_linear(_function, *_slots))
for _function in named(*ZERO.split()):
    HANDLERS[_function] = still
HANDLERS[Tensor.where] = ruled(jointly_linear(Tensor.where, (0, "input"), (2, "other")))
TRACED[torch.split] = ruled(linear_in_first(torch.split))
for _function in (torch.stft, torch.istft, Tensor.stft, Tensor.istft):
    HANDLERS[_function] = TRACED[_function] = ruled(linear_in_first(_function))
for _function in (torch.atleast_1d, torch.atleast_2d, torch.atleast_3d, torch.broadcast_tensors):
    TRACED[_function] = ruled(_together(_function))
HANDLERS[torch.functional.meshgrid] = ruled(_together(torch.functional.meshgrid))
for _function in named(*MADE_LIKE.split()):
    HANDLERS[_function] = made_like
for _name in ("T", "mT", "H", "mH", "real", "imag"):
    HANDLERS[getter(_name)] = ruled(linear_in_first(getter(_name)))
for _name in ("data", "grad"):
    HANDLERS[getter(_name)] = still
HANDLERS[torch.embedding] = ruled(jointly_linear(torch.embedding, (0, "weight")))
