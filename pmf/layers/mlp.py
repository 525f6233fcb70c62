"""MLPs of transformers."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from pmf import ops
from pmf.dual import linear_dual
from pmf.errors import require
from pmf.layers.base import DualModule
from pmf.packing import Join, PackedModule
from pmf.pair import Dual

ACTIVATIONS = ("swiglu", "gelu", "gelu_tanh")


class Mlp(DualModule, PackedModule):
    """fc2(gelu(fc1 x)), or w2(silu(w1 x) * w3 x) for act "swiglu"; parameters as in timm and in LLaMA.

    `linear` makes the Linear layers: nn.Linear or one with another initialisation.
    """

    def __init__(
        self, dim: int, hidden: int, *, act: str = "gelu", bias: bool = True,
        linear: Callable[..., nn.Linear] = nn.Linear, impl: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__(impl)
        require(act in ACTIVATIONS, f"Mlp: act must be one of {ACTIVATIONS}, got {act!r}")
        self.act, self.dim, self.hidden = act, dim, hidden
        if act == "swiglu":
            self.w1, self.w3 = linear(dim, hidden, bias=bias), linear(dim, hidden, bias=bias)
            self.w2 = linear(hidden, dim, bias=bias)
        else:
            self.fc1, self.fc2 = linear(dim, hidden, bias=bias), linear(hidden, dim, bias=bias)

    def joins(self) -> tuple[Join, ...]:
        """One weight for w1 and w3, and w2, with the hidden width padded with zeros to a multiple of 8; the biases.

        The zeros keep every row 16-byte aligned and do not change the result.
        """
        if self.act != "swiglu":
            parts = self.fc1.weight, self.fc2.weight, self.fc1.bias, self.fc2.bias
            return tuple(Join.of(part) for part in parts if part is not None)
        hidden = self.hidden + -self.hidden % 8
        weights = (
            Join((self.w1.weight, self.w3.weight), (hidden, self.dim)),
            Join((self.w2.weight,), (self.dim, hidden)),
        )
        if self.w1.bias is None:
            return weights
        return *weights, Join((self.w1.bias, self.w3.bias), (hidden,)), Join.of(self.w2.bias)

    def forward_dual(self, x: Dual) -> Dual:
        """x [B, C], [B, S, C] or [B, H, W, C]; returns the same shape."""
        first, second, *biases = self.packed()
        bias1, bias2 = biases or (None, None)
        hidden = linear_dual(Dual.of(x), first, bias1)
        if self.act == "swiglu":
            hidden = ops.swiglu(hidden, impl=self.impl)
        else:
            approximate = "tanh" if self.act == "gelu_tanh" else "none"
            hidden = ops.gelu(hidden, approximate=approximate, impl=self.impl)
        return linear_dual(hidden, second, bias2)
