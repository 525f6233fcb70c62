"""Check an op's inputs, convert each to a `Dual`, and return the results in the form of the inputs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd import forward_ad

from pmf import dispatch, reference
from pmf.errors import InputError, no_vmap
from pmf.pair import ABSENT, Dual
from pmf.private import batched_by_autograd, forward_mode, is_dual_tensor, is_vmapped
from pmf.tangents.carriers import CARRIERS, as_dual, carrier_of
from pmf.unrecorded import Sources, without_gradient

Pair = tuple[Tensor, Tensor | None]
"""A value and its tangent; `Dual` is one."""
Moving = Tensor | Pair
"""An input that may have a tangent."""


def _value_alone(result: Dual) -> Tensor:
    return result.value


def _as_it_is(result: Dual) -> Dual:
    return result


def _dual_tensor(op: str, sources: Sources, result: Dual) -> Tensor:
    value, dot = result
    return value if dot is None else forward_ad.make_dual(value, sources.of(op, dot))


def _with_dual_tensor(op: str, sources: Sources, result: Dual) -> Dual:
    return Dual(_dual_tensor(op, sources, result))


def _per_sample(dot: Tensor, samples: int) -> Tensor:
    """An input's tangent without gradient; in forward mode, a parameter per channel has the same for every sample."""
    dot = without_gradient(dot)
    return dot if dot.ndim > 1 else dot.expand(samples, -1)


def _named(name: str, dual: Dual) -> tuple[tuple[str, Tensor | None], ...]:
    return (name, dual.value), (f"{name}'s tangent", dual.dot)


class Inputs:
    """The inputs of one op call. Errors: `InputError` if they are not floating tensors on one device.

    `moving` may have tangents: each is a Tensor, a pair (value, tangent) or None. All tangents cover the same
    number of samples, the last ones. `fixed` are Tensors or None. Messages are formatted on failure only: every op
    of every layer runs this code, and Dynamo cannot format a symbolic size.
    """

    __slots__ = ("device", "dtypes", "duals", "fixed", "form", "names", "op")

    def __init__(self, op: str, moving: dict[str, Moving | None], fixed: dict[str, Tensor | None] | None = None):
        self.op, self.names, self.fixed = op, tuple(moving), {} if fixed is None else fixed
        self.form: Callable[[Dual], Tensor | Dual] = _value_alone
        duals: list[Dual] = []
        tensors: list[Tensor] = []
        moves = False
        for name, given in moving.items():
            if type(given) is Dual:
                dual, self.form = given, _as_it_is
            else:
                dual = self._dual(name, given)
            duals.append(dual)
            value, dot = dual
            if value is not None:
                tensors.append(value)
            if dot is not None:
                tensors.append(dot)
                moves = True
        for tensor in self.fixed.values():
            if tensor is not None:
                tensors.append(tensor)
        self.duals = duals
        device: torch.device | None = getattr(tensors[0], "device", None) if tensors else None
        self.device = device
        dtypes: list[torch.dtype] = []
        self.dtypes = dtypes
        """The dtypes of all tensors given, tangents included."""
        for tensor in tensors:
            # The first test is faster.
            if type(tensor) is not Tensor and (not isinstance(tensor, Tensor) or type(tensor) in CARRIERS):
                self._refuse()
            dtype = tensor.dtype
            if tensor.device != device or not dtype.is_floating_point:
                self._refuse()
            dtypes.append(dtype)
        if moves:
            self._check_tangents()

    def _dual(self, name: str, given: Moving | None) -> Dual:
        if given is None:
            return ABSENT
        if type(given) in CARRIERS:
            self.form = carrier_of
            return as_dual(given)
        if not isinstance(given, tuple):
            return Dual(given)
        if len(given) != 2:
            wanted = "a tensor or a pair (value, tangent)"
            raise InputError(f"{self.op}: {name} must be {wanted}, got {len(given)} values")
        self.form = _as_it_is
        return Dual(*given)

    def _values(self) -> list[Tensor]:
        return [x for x in (*(dual.value for dual in self.duals), *self.fixed.values()) if x is not None]

    def _refuse(self) -> None:
        """Raise, naming the first input that is not a floating tensor on the device of the first tensor."""
        named = [part for name, dual in zip(self.names, self.duals, strict=True) for part in _named(name, dual)]
        for name, tensor in (*named, *self.fixed.items()):
            if isinstance(tensor, tuple) or type(tensor) in CARRIERS:
                form = "a pair" if isinstance(tensor, tuple) else "a moving value"
                raise InputError(f"{self.op}: {name} takes no tangent, got {form}; expected a tensor")
            if tensor is not None and not (isinstance(tensor, Tensor) and tensor.is_floating_point()):
                got = getattr(tensor, "dtype", tensor)
                raise InputError(f"{self.op}: {name} must be a floating tensor, got {got}")
            if tensor is not None and tensor.device != self.device:
                raise InputError(f"{self.op}: {name} must be on {self.device}, got {tensor.device}")

    def _check_tangents(self) -> None:
        """Check that each tangent has the shape of its value's last rows, and that all have as many rows."""
        if forward_mode() and any(map(is_dual_tensor, self._values())):
            raise RuntimeError(f"{self.op}: got explicit tangents and dual tensors; expected one or the other")
        rows = None
        for name, (value, dot) in zip(self.names, self.duals, strict=True):
            if dot is None:
                continue
            if value is None:
                raise InputError(f"{self.op}: {name} is absent, so its tangent must be None")
            sizes, dot_sizes = value.shape, dot.shape
            if len(sizes) == 0:
                raise InputError(f"{self.op}: {name} must have samples to have a tangent, got a single number")
            if rows is None and len(dot_sizes) > 0:
                rows = dot_sizes[0]
            matches = len(dot_sizes) == len(sizes) and dot_sizes[0] == rows
            for i in range(1, len(sizes)):
                matches = matches and dot_sizes[i] == sizes[i]
            if not matches:
                self._wrong_shape(f"{name}'s tangent", dot, (rows, *sizes[1:]))
            if rows > sizes[0]:
                raise InputError(f"{self.op}: {name}'s tangent must have at most {sizes[0]} samples, got {rows}")

    def shape(self, name: str, tensor: Tensor | None, *expected: int | None) -> None:
        """Errors: `InputError` unless `tensor` is there and has that shape; None in `expected` allows any size."""
        if tensor is None:
            raise InputError(f"{self.op}: {name} must be a floating tensor, got None")
        sizes = tensor.shape
        if sizes == expected:
            return
        if len(sizes) != len(expected):
            self._wrong_shape(name, tensor, expected)
        for want, size in zip(expected, sizes, strict=True):
            if want is not None and want != size:
                self._wrong_shape(name, tensor, expected)

    def one_of_shapes(self, name: str, tensor: Tensor | None, *allowed: tuple[int | None, ...], hint: str = "") -> None:
        """`shape` for inputs with several `allowed` shapes, all of which the error says; `hint` ends it."""
        if tensor is None:
            raise InputError(f"{self.op}: {name} must be a floating tensor, got None")
        sizes = tensor.shape
        for expected in allowed:
            if len(sizes) == len(expected) and all(
                want is None or want == size for want, size in zip(expected, sizes, strict=True)
            ):
                return
        self._wrong_shape(name, tensor, *allowed, hint=hint)

    def _wrong_shape(self, name: str, tensor: Tensor, *allowed: tuple[int | None, ...], hint: str = "") -> None:
        *others, last = dict.fromkeys(
            f"[{', '.join('any' if size is None else str(size) for size in expected)}]" for expected in allowed
        )
        wanted = f"{', '.join(others)} or {last}" if others else last
        raise InputError(f"{self.op}: {name} must have shape {wanted}, got {list(tensor.shape)}{hint}")

    def cast(self, dtype: torch.dtype) -> None:
        """Convert values and tangents to `dtype`."""
        self.duals = [dual.map(lambda x: x.to(dtype)) for dual in self.duals]
        self.dtypes = [dtype] * len(self.dtypes)

    def give(self, result: Dual) -> Tensor | Dual:
        """Return a Dual if any input was a pair, else a Tensor; under forward mode, hold the tangent as dual tensor."""
        return self.form(result)

    def implementation(self, impl: str | None, *sizes: int) -> ModuleType:
        """The module that computes the op on these inputs; `sizes` are those that limit its kernel.

        Under forward-mode differentiation (`torch.func.jvp`, `torch.autograd.forward_ad`), unpack dual tensors into
        `duals` for the kernels. The reference is plain PyTorch and needs no help there.
        """
        module = dispatch.implementation(self.op, impl, self.device.type, tuple(self.dtypes), sizes)
        if forward_mode() and module is not reference:
            self._take_apart()
        return module

    def _take_apart(self) -> None:
        """Unpack dual tensors into `Dual`s, and make `give` return dual tensors.

        Errors: RuntimeError in compiled code, which would drop the tangents (pytorch issue 192985), on a dual
        tensor among the `fixed` inputs, inside `torch.vmap`, and on tangents that `torch.autograd.functional` batches.
        """
        op = self.op
        if torch.compiler.is_compiling():
            raise RuntimeError(
                f"{op}: torch.compile would lose the tangents of forward-mode differentiation "
                f"(torch.func.jvp, forward_ad); give {op} explicit tangents: Dual(value, tangent)"
            )
        if any(map(is_vmapped, self._values())):
            raise no_vmap(op)
        parts = [ABSENT if dual.value is None else Dual(*forward_ad.unpack_dual(dual.value)) for dual in self.duals]
        for name, tensor in self.fixed.items():
            if tensor is not None and is_dual_tensor(tensor):
                raise RuntimeError(f"{op}: {name} takes no tangent, got a dual tensor")
        if all(part.dot is None for part in parts):
            return
        if any(part.dot is not None and batched_by_autograd(part.dot) for part in parts):
            raise RuntimeError(
                f"{op}: kernels take no batch of tangents, as torch.autograd.functional gives in forward mode; "
                'use reverse mode or impl="reference"'
            )
        form = _dual_tensor if self.form is _value_alone else _with_dual_tensor
        self.form = functools.partial(form, op, Sources(parts, self.fixed.values()))
        samples = len(parts[0].value)
        self.duals = [Dual(value, None if dot is None else _per_sample(dot, samples)) for value, dot in parts]
