"""Activation checkpointing of dual layers: backward recomputes values, never tangents.

`checkpoint_values` repeats a whole layer, `made_again` only its cheap first part; it keeps what follows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pmf.autocast import autocast_dtype, autocast_to
from pmf.pair import Dual, tail
from pmf.private import saved_tensor_hooks, storage_id, transforming, tree_flatten, tree_unflatten, version


def _is_dual(node: Any) -> bool:
    return isinstance(node, Dual)


def _split(tree: Any) -> tuple[list, list, Any]:
    """The values and the tangents of the `Dual`s in a tree of named tuples, and its structure."""
    leaves, spec = tree_flatten(tree, is_leaf=_is_dual)
    values = [leaf.value if _is_dual(leaf) else leaf for leaf in leaves]
    dots = [leaf.dot if _is_dual(leaf) else None for leaf in leaves]
    duals = [_is_dual(leaf) for leaf in leaves]
    return values, dots, (spec, duals)


def _join(values: list, dots: list, structure: Any) -> Any:
    spec, duals = structure
    leaves = [Dual(v, d) if dual else v for v, d, dual in zip(values, dots, duals, strict=True)]
    return tree_unflatten(leaves, spec)


def checkpoint_values(layer: Callable, *inputs: Any, preserve_rng_state: bool = True, compiled: bool = False) -> Any:
    """`layer(*inputs)`, keeping only the values of `inputs` for backward: activation checkpointing of dual code.

    The first run computes values and tangents, the run in backward only values. Tangents record nothing, so both
    runs record the same operations.

    Inputs are Duals, tensors, and trees of them; in a plain tuple, both tensors are kept. Returns what `layer` does.
    `preserve_rng_state`: the second run draws the random numbers of the first; False saves time if it draws none.
    `compiled`: the graphs with and without tangents may save different tensors, so the first run records nothing and
    backward differentiates the second (reentrant checkpointing): `backward` works, `torch.autograd.grad` does not.
    """
    if torch.compiler.is_compiling():  # backward of one graph makes again what it reads; no tangent is among that
        return checkpoint(lambda: layer(*inputs), use_reentrant=False, preserve_rng_state=preserve_rng_state)
    values, dots, structure = _split(inputs)
    tangents_in: list = [dots]
    tangents_out: list = []
    outline: list = []

    def run(*values: Any) -> tuple:
        first = bool(tangents_in)
        result = layer(*_join(list(values), tangents_in.pop() if first else [None] * len(values), structure))
        out_values, out_dots, out_structure = _split(result)
        if first:
            tangents_out.extend(out_dots)
            outline.append(out_structure)
        # Reentrant checkpointing makes these the outputs of one autograd node, which a parameter cannot be.
        return tuple(v.clone() if compiled and isinstance(v, nn.Parameter) else v for v in out_values)

    out_values = checkpoint(run, *values, use_reentrant=compiled, preserve_rng_state=preserve_rng_state)
    dots = tangents_out.copy()
    tangents_out.clear()  # backward keeps `run`, and would keep them with it
    return _join(list(out_values), dots, outline[0])


def made_again(make: Callable[[Dual], tuple[Dual, ...]], use: Callable[..., Any], x: Dual) -> Any:
    """`use(*make(x))`, where backward calls `make` again instead of keeping what it gave.

    `make` gives Duals, deterministically; results that are views of x are kept, as x is. Backward makes only values.
    Of modules, `make` must hold the parameters themselves: a module may have others when backward runs.
    """
    if not torch.is_grad_enabled() or transforming():
        return use(*make(x))
    if torch.compiler.is_compiling():
        return use(*_made_in_checkpoint(make, x))
    made = make(x)
    again = _Again(make, x.value, [dual.value for dual in made])
    with torch.autograd.graph.saved_tensors_hooks(again.pack, again.unpack):
        result = use(*made)
    again.x = None  # if nothing is to be made again, nothing is kept for it
    return result


def _made_in_checkpoint(make: Callable[[Dual], tuple[Dual, ...]], x: Dual) -> tuple[Dual, ...]:
    """`make(x)`, whose values compilers make again where they are read in backward.

    The tangents are made apart, because compilers would repeat the whole call, and keep what it reads.
    """
    values = checkpoint(lambda value: tuple(dual.value for dual in make(Dual(value))), x.value, use_reentrant=False)
    if x.dot is None:
        return tuple(map(Dual, values))
    with torch.no_grad():
        dots = [dual.dot for dual in make(Dual(tail(x.value, len(x.dot)), x.dot))]
    return tuple(map(Dual, values, dots))


class _Place(NamedTuple):
    """A saved tensor as a view of what is made again."""

    which: int
    size: torch.Size
    stride: tuple[int, ...]
    offset: int | torch.SymInt


class _Again:
    """Hooks that swap what `make(x)` gave, where autograd saves it, for its place, and make it when backward asks.

    Everything else goes to the hooks around, and with the first place x: they may count tensors, or move them.
    """

    def __init__(self, make: Callable[[Dual], tuple[Dual, ...]], x: Tensor, made: list[Tensor]) -> None:
        self.make, self.autocast = make, autocast_dtype(x.device.type)
        # Without hooks around: an output that is kept as it is would keep its own node, and that the output.
        around: tuple[Callable, Callable] = saved_tensor_hooks() or (Tensor.detach, _unchanged)
        self.pack_around, self.unpack_around = around
        self.x: Tensor | None = x
        self.kept: Any = None
        self.version = 0
        self.which = {(storage_id(m), m.dtype): i for i, m in enumerate(made) if storage_id(m) != storage_id(x)}
        self.places = 0
        self.served: set[int] = set()
        self.made: list[Tensor] = []

    def pack(self, x: Tensor) -> Any:
        """The place of x, or what the hooks around make of it."""
        which = self.which.get((storage_id(x), x.dtype))
        if which is None:
            return self.pack_around(x)
        if self.places == 0 and self.x is not None:
            self.kept = self.pack_around(self.x.detach())
            self.version = version(self.kept) if isinstance(self.kept, Tensor) else 0
        self.places += 1
        return _Place(which, x.shape, x.stride(), x.storage_offset())

    def unpack(self, packed: Any) -> Tensor:
        """The tensor; what was made is dropped when it has been read everywhere."""
        if not isinstance(packed, _Place):
            return self.unpack_around(packed)
        made = self.made or self._make()
        self.made = made
        found = made[packed.which].as_strided(*packed[1:])
        self.served.add(id(packed))
        if len(self.served) == self.places:
            self.made, self.served = [], set()
        return found

    def _make(self) -> list[Tensor]:
        if isinstance(self.kept, Tensor) and version(self.kept) != self.version:
            raise RuntimeError("made_again: what backward reads was changed in place after the forward pass")
        x = self.unpack_around(self.kept)
        with torch.no_grad(), autocast_to(x.device, self.autocast):
            return [dual.value for dual in self.make(Dual(x))]


def _unchanged(x: Tensor) -> Tensor:
    return x
