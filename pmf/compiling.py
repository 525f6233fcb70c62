"""Compile the blocks as a few graphs that all blocks share."""

from __future__ import annotations

import inspect
import itertools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pmf.blocks import Block
from pmf.layers import Residual, Rope
from pmf.pair import Dual
from pmf.private import open_batch, tree_map_only

_compilations = itertools.count()


class CompiledBlocks:
    """`Block.forward_residual`, compiled twice: for passes that record for backward, and for passes that do not.

    The block is an argument of the compiled function, so that one graph serves all blocks.
    """

    def __init__(self, **options: Any) -> None:
        """Pass `options` to `torch.compile`, with fullgraph=True by default."""
        if "recompile_limit" in inspect.signature(torch.compile).parameters:  # older versions use the global limit, 8
            options = {"recompile_limit": 32, **options}
        options = {"fullgraph": True, **options}
        self._passes = {
            recorded: torch.compile(_block_pass_named(f"{name}_{next(_compilations)}"), **options)
            for recorded, name in ((True, "recorded"), (False, "unrecorded"))
        }

    def __call__(self, block: Block, stream: Residual, rope: Rope, vector: Dual) -> Residual:
        """As `block.forward_residual(stream, rope, vector)`."""
        recorded = torch.is_grad_enabled()
        if not recorded:
            stream, vector = tree_map_only(Tensor, _of_any_batch, (stream, vector))
        return self._passes[recorded](block, stream, rope, vector)


def _block_pass(block: Block, stream: Residual, rope: Rope, vector: Dual) -> Residual:
    return block.forward_residual(stream, rope, vector)


def _block_pass_named(name: str) -> Callable[..., Residual]:
    """`_block_pass` with its own code object: Dynamo caches graphs, and limits their number, per code object."""
    return types.FunctionType(_block_pass.__code__.replace(co_name=name), globals(), name)


def _of_any_batch(x: Tensor) -> Tensor:
    """Detach x and mark its batch size as dynamic."""
    x = x.detach()
    if x.ndim > 1:
        open_batch(x)
    return x
