"""The pMF step in JAX, compiled: what a script like the authors' costs on this machine."""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import jax
from torch import Tensor

from pmf.config import LossConfig
from pmf.draws import Draws
from pmf.errors import require
from pmf.model import PMFDiT
from pmf.reference.jax_loss import jax_loss
from pmf.reference.jax_network import Arrays, arrays

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # otherwise JAX takes most of the GPU at once


class JaxStep:
    """Forward and backward of one batch on JAX's default device, compiled once; it waits for loss and gradients."""

    def __init__(
        self, model: PMFDiT, inputs: tuple[Tensor, Tensor, Draws], config: LossConfig, compute: str = "float32"
    ) -> None:
        """`inputs`: images, labels and draws. `compute`: the dtype of matrix products."""
        published = model.config.conditioning == "in_context"
        require(published, "config: the JAX step has the published conditioning alone")
        x, y, draws = inputs
        self.params, self.batch = arrays(model.state_dict()), arrays({"x": x, "y": y, **vars(draws)})
        self.step = jax.jit(jax.value_and_grad(partial(jax_loss, model.config, config, compute)))

    def __call__(self) -> tuple[Any, Arrays]:
        """The loss, and gradients named as the parameters are."""
        return jax.block_until_ready(self.step(self.params, self.batch))

    def peak_bytes(self) -> int | None:
        """Peak of JAX's own allocator above what parameters and batch take; None where it keeps no count."""
        stats = jax.devices()[0].memory_stats()
        resting = sum(x.nbytes for x in (*self.params.values(), *self.batch.values()))
        return None if stats is None else stats["peak_bytes_in_use"] - resting
