"""Activation checkpointing of dual layers: backward recomputes values, never tangents."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from pmf.pair import Dual
from pmf.private import tree_flatten, tree_unflatten


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
    return _join(list(out_values), tangents_out, outline[0])
