"""Blocks compiled as a few graphs that all of them share."""

from __future__ import annotations

import inspect
import itertools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pmf.dual import Dual
from pmf.layers import Block, Residual
from pmf.private import open_batch, tree_map_only

_compilations = itertools.count()


class CompiledBlocks:
    """`Block.forward_residual` of any block, compiled: once for passes that record for backward, once for the rest.

    The block is an argument of the compiled function, so that one graph serves all blocks.
    """

    def __init__(self, **options: Any) -> None:
        """`options` go to `torch.compile`; fullgraph=True unless given."""
        if "recompile_limit" in inspect.signature(torch.compile).parameters:  # else the global limit, 8, holds
            options = {"recompile_limit": 32, **options}
        options = {"fullgraph": True, **options}
        self._passes = {
            recorded: torch.compile(_block_pass_named(f"{name}_{next(_compilations)}"), **options)
            for recorded, name in ((True, "recorded"), (False, "unrecorded"))
        }

    def __call__(self, block: Block, stream: Residual, rope: tuple[Tensor, Tensor], vector: Dual) -> Residual:
        """As `block.forward_residual(stream, rope, vector)`."""
        recorded = torch.is_grad_enabled()
        if not recorded:
            stream, vector = tree_map_only(Tensor, _of_any_batch, (stream, vector))
        return self._passes[recorded](block, stream, rope, vector)


def _block_pass(block: Block, stream: Residual, rope: tuple[Tensor, Tensor], vector: Dual) -> Residual:
    return block.forward_residual(stream, rope, vector)


def _block_pass_named(name: str) -> Callable[..., Residual]:
    """`_block_pass` with a code object of its own: Dynamo caches graphs, and limits their number, by that."""
    return types.FunctionType(_block_pass.__code__.replace(co_name=name), globals(), name)


def _of_any_batch(x: Tensor) -> Tensor:
    """x without gradient, its batch size left open to compilers."""
    x = x.detach()
    if x.ndim > 1:
        open_batch(x)
    return x
