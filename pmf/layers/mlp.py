"""MLPs of transformers."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from pmf import ops
from pmf.dual import linear_dual
from pmf.errors import require
from pmf.layers.base import DualModule, Linears, Weights, check_linear, check_sizes, check_width
from pmf.packing import Join, PackedModule
from pmf.pair import Dual

ACTIVATIONS = ("swiglu", "gelu", "gelu_tanh")


class Mlp(DualModule, PackedModule):
    """fc2(gelu(fc1 x)), or w2(silu(w1 x) * w3 x) for act "swiglu"; parameters as in timm and in LLaMA.

    `linear` makes the Linear layers: nn.Linear or one with another initialisation.
    """

    def __init__(
        self, dim: int, hidden: int, *, act: str = "gelu", bias: bool = True,
        linear: Linears = nn.Linear, impl: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__(impl)
        check_sizes("Mlp", dim=dim, hidden=hidden)
        require(act in ACTIVATIONS, lambda: f"Mlp: act must be one of {ACTIVATIONS}, got {act!r}")
        self.act, self.dim, self.hidden = act, dim, hidden
        self._add_projections(dim, hidden, bias, linear)

    def _add_projections(self, dim: int, hidden: int, bias: bool, linear: Linears) -> None:
        """Make the Linear layers that `projections` returns."""
        if self.act == "swiglu":
            self.w1, self.w3 = linear(dim, hidden, bias=bias), linear(dim, hidden, bias=bias)
            self.w2 = linear(hidden, dim, bias=bias)
        else:
            self.fc1, self.fc2 = linear(dim, hidden, bias=bias), linear(hidden, dim, bias=bias)

    def projections(self) -> tuple[Sequence[nn.Linear], nn.Linear]:
        """The layers to the hidden width, two for swiglu, and the one back."""
        return ([self.w1, self.w3], self.w2) if self.act == "swiglu" else ([self.fc1], self.fc2)

    def joins(self) -> tuple[Join, ...]:
        """The weights to the hidden width as one, that back, then the biases; for swiglu with the hidden width padded
        with zeros to a multiple of 8, which keep every row 16-byte aligned and do not change the result.
        """
        first, second = self.projections()
        check_linear("Mlp", *first, second)
        hidden = self.hidden + (-self.hidden % 8 if self.act == "swiglu" else 0)
        weights = (
            Join(tuple(layer.weight for layer in first), (hidden, self.dim)),
            Join((second.weight,), (self.dim, hidden)),
        )
        if second.bias is None:
            return weights
        return *weights, Join(tuple(layer.bias for layer in first), (hidden,)), Join.of(second.bias)

    def weights(self) -> tuple[Weights, Weights]:
        """Weight and bias of the product to the hidden width, and of that back."""
        first, second, *biases = self.packed()
        bias1, bias2 = biases or (None, None)
        return (first, bias1), (second, bias2)

    def forward_dual(self, x: Dual) -> Dual:
        """x [B, C], [B, S, C] or [B, H, W, C]; returns the same shape."""
        x = Dual.of(x)
        check_width("Mlp", "x", x, self.dim)
        first, second = self.weights()
        return self.finish(linear_dual(x, *first), second)

    def finish(self, hidden: Dual, second: Weights) -> Dual:
        """All that follows the product to the hidden width."""
        options: dict = dict(impl=self.impl)
        if self.light:
            options["linear"] = second
        if self.act == "swiglu":
            result = ops.swiglu(hidden, **options)
        else:
            approximate = "tanh" if self.act == "gelu_tanh" else "none"
            result = ops.gelu(hidden, approximate=approximate, **options)
        return result if self.light else linear_dual(result, *second)
