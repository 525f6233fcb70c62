"""Join weights for fewer, larger products, and cast them under autocast: once per step, all of them in one pass.

Padding, concatenating and casting each weight separately would take eight launches per block, and as many in backward.
Here, one copy of all parts fills the joined weights, and in backward one copy per module returns the gradients, as soon
as they are available.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pmf.autocast import autocast_dtype
from pmf.private import foreach_copy_, foreach_zero_, transforming


class Join(NamedTuple):
    """Parameters [n, ...] stacked along their first dimension in one weight, each zero-padded to `shape`."""

    parts: tuple[Tensor, ...]
    shape: tuple[int, ...]

    @classmethod
    def of(cls, *parts: Tensor) -> Join:
        """Parameters of one shape, without padding."""
        return cls(parts, tuple(parts[0].shape))

    @property
    def padded(self) -> bool:
        """Whether the parts are padded."""
        return self.parts[0].shape != self.shape

    def copied(self, dtype: torch.dtype | None) -> bool:
        """Whether the joined weight in `dtype` is a copy, not its only part itself."""
        return len(self.parts) > 1 or self.padded or dtype not in (None, self.parts[0].dtype)

    def recorded(self) -> Tensor:
        """The joined weight, made by operations that autograd, compilers and transforms can trace."""
        parts = self.parts
        if self.padded:
            missing = [wanted - size for wanted, size in zip(self.shape, parts[0].shape, strict=True)]
            after = [amount for size in reversed(missing) for amount in (0, size)]
            parts = tuple(F.pad(part, after) for part in parts)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def empty(self, dtype: torch.dtype | None) -> Tensor:
        """Uninitialised memory for the joined weight."""
        rows, *rest = self.shape
        return self.parts[0].new_empty((rows * len(self.parts), *rest), dtype=dtype)

    def places(self, joined: Tensor) -> list[Tensor]:
        """Views of the parts in the joined weight, or of their gradients in its gradient."""
        places = [joined] if len(self.parts) == 1 else list(joined.chunk(len(self.parts)))
        if not self.padded:
            return places
        return [place[tuple(map(slice, part.shape))] for place, part in zip(places, self.parts, strict=True)]

    def gaps(self, joined: Tensor) -> list[Tensor]:
        """Views to fill with zeros: the rows between parts, or the whole weight if columns are padded."""
        if not self.padded:
            return []
        rows = len(self.parts[0])
        between_rows = self.parts[0].shape[1:] == self.shape[1:]
        return [place[rows:] for place in joined.chunk(len(self.parts))] if between_rows else [joined]


class Held(NamedTuple):
    """The joined weights of one layer, and the passes that they serve: those in the mode that they were made in."""

    weights: tuple[Tensor, ...]
    device_type: str
    dtype: torch.dtype | None
    """The autocast dtype."""
    recorded: bool
    """Whether backward reaches the parameters."""

    def serves(self) -> bool:
        """Whether a pass that joined the weights here and now would get the same ones."""
        recorded = self.recorded or not torch.is_grad_enabled()
        return recorded and self.dtype == autocast_dtype(self.device_type)


class _Holder(threading.local):
    """What the contexts of this thread hold of one layer, the innermost last; other threads hold their own."""

    def __init__(self) -> None:  # Dynamo would take an attribute of the class for a constant
        self.open: list[Held] = []

    def __reduce__(self):
        return _Holder, ()  # copies of a layer hold nothing


class PackedModule(nn.Module):
    """A layer whose weights are joined and cast on every call, or once per step."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self._holder = _Holder()

    def joins(self) -> tuple[Join, ...]:
        """The weights that `packed` gives, and the parameters in them."""
        raise NotImplementedError

    @property
    def held(self) -> bool:
        """Whether a `held_weights` of this thread holds the weights, so the parameters are whole and do not change."""
        return len(self._holder.open) > 0

    def packed(self) -> tuple[Tensor, ...]:
        """The weights that the innermost `held_weights` holds for such a pass, else freshly joined ones."""
        for held in reversed(self._holder.open):
            if held.serves():
                return held.weights
        return tuple(join.recorded() for join in self.joins())


Joins = list[tuple[PackedModule, tuple[Join, ...]]]


def _joins(module: nn.Module) -> Joins:
    """All layers with plain weights, and their joins.

    Sharded weights (FSDP) are whole only while their block runs and are joined then, as are other tensor subclasses.
    """
    if isinstance(module, PackedModule):
        joins = module.joins()
        return [] if hasattr(joins[0].parts[0], "__tensor_flatten__") else [(module, joins)]
    return [found for child in module.children() for found in _joins(child)]


@torch.no_grad()
def _filled(joins: list[Join], dtype: torch.dtype | None) -> list[Tensor]:
    """The joined weights, filled by one pass over all parts and one copy for each part with padded rows."""
    joined = [join.empty(dtype) for join in joins]
    gaps = [gap for join, weight in zip(joins, joined, strict=True) for gap in join.gaps(weight)]
    if gaps:
        foreach_zero_(gaps)
    together: tuple[list[Tensor], list[Tensor]] = ([], [])
    for join, weight in zip(joins, joined, strict=True):
        for place, part in zip(join.places(weight), join.parts, strict=True):
            if place.stride() == part.stride():
                together[0].append(place)
                together[1].append(part)
            else:  # one pair with unequal strides makes foreach loop over all pairs
                place.copy_(part)
    if together[0]:
        foreach_copy_(*together)
    return joined


class _Recorded(torch.autograd.Function):
    """(joins, joined weights, parts of all) -> the joined weights, recorded as functions of their parts."""

    @staticmethod
    def forward(ctx, joins, joined, *parts):
        ctx.joins = joins
        ctx.set_materialize_grads(False)
        return joined

    @staticmethod
    def backward(ctx, *gradients):
        wanted, results = iter(ctx.needs_input_grad[2:]), []
        together: tuple[list[Tensor], list[Tensor]] = ([], [])
        for join, gradient in zip(ctx.joins, gradients, strict=True):
            places = [None] * len(join.parts) if gradient is None else join.places(gradient)
            for part, place in zip(join.parts, places, strict=True):
                if not next(wanted) or place is None:
                    results.append(None)
                elif torch.is_grad_enabled() or place.dtype == part.dtype or place.stride() != part.stride():
                    results.append(place.to(part.dtype))
                else:
                    results.append(torch.empty_like(part))
                    together[0].append(results[-1])
                    together[1].append(place)
        if together[0]:
            foreach_copy_(*together)
        return None, None, *results


def _joined(modules: Joins, dtype: torch.dtype | None) -> list[tuple[Tensor, ...]]:
    """Every module's weights, joined and cast."""
    if torch.compiler.is_compiling() or transforming():
        weights = [[join.recorded() for join in joins] for _, joins in modules]
        return [tuple(w if dtype is None else w.to(dtype) for w in each) for each in weights]
    copied = [[join for join in joins if join.copied(dtype)] for _, joins in modules]
    filled = iter(_filled([join for each in copied for join in each], dtype))
    result = []
    for (_, joins), made in zip(modules, copied, strict=True):
        joined = tuple(next(filled) for _ in made)
        if made and torch.is_grad_enabled():
            joined = _Recorded.apply(made, joined, *(part for join in made for part in join.parts))
        places = iter(joined)
        result.append(tuple(next(places) if join.copied(dtype) else join.parts[0] for join in joins))
    return result


def _held(modules: Joins, device_type: str) -> list[Held]:
    dtype, recorded = autocast_dtype(device_type), torch.is_grad_enabled()
    return [Held(joined, device_type, dtype, recorded) for joined in _joined(modules, dtype)]


def joined_weights(model: nn.Module, device_type: str) -> list[Held]:
    """The joined weights of every `PackedModule`, cast under autocast."""
    return _held(_joins(model), device_type)


@contextlib.contextmanager
def held_weights(model: nn.Module, device_type: str, weights: list[Held] | None = None) -> Iterator[None]:
    """Join the weights of every `PackedModule` once for all passes inside the context, or hold those given.

    They serve this thread's passes of the same autocast dtype, and only if they were recorded those that are recorded.
    The parameters must not change inside the context.
    """
    modules = _joins(model)
    held = _held(modules, device_type) if weights is None else weights
    stacks = [module._holder.open for module, _ in modules]  # those of this thread, though another may end the context
    try:
        for stack, one in zip(stacks, held, strict=True):
            stack.append(one)
        yield
    finally:
        for stack, one in zip(stacks, held, strict=True):
            _drop(stack, one)


def _drop(stack: list[Held], held: Held) -> None:
    """Take `held` out; contexts may end in any order."""
    place = next((i for i in reversed(range(len(stack))) if stack[i] is held), None)
    if place is not None:
        del stack[place]
