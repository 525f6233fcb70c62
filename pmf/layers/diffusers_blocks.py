"""diffusers' `BasicTransformerBlock` of DiT and PixArt, with its parameter names, so that state dicts load strictly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from pmf import ops
from pmf.dual import add, chunk, dual
from pmf.errors import InputError, require
from pmf.layers.attention import Attention, CrossAttention
from pmf.layers.base import DualModule, Linears, check_sizes, check_tokens, check_width
from pmf.layers.mlp import Mlp
from pmf.layers.norms import NormModulate, Residual
from pmf.pair import ABSENT, Dual
from pmf.tangents.carriers import CARRIERS

ACTIVATIONS = {"gelu": "gelu", "gelu-approximate": "gelu_tanh"}


class _SelfAttention(Attention):
    """`to_q`, `to_k`, `to_v` and `to_out.0`."""

    def _add_projections(self, dim: int, kv_dim: int, qkv_bias: bool, proj_bias: bool, linear: Linears) -> None:
        self.to_q, self.to_k, self.to_v = (linear(dim, dim, bias=qkv_bias) for _ in range(3))
        self.to_out = nn.ModuleList([linear(dim, dim, bias=proj_bias)])

    def projections(self) -> tuple[Sequence[nn.Linear], nn.Linear]:
        """q, k and v; and the output."""
        return [self.to_q, self.to_k, self.to_v], cast(nn.Linear, self.to_out[0])


class _CrossAttention(CrossAttention):
    """`to_q`, `to_k`, `to_v` and `to_out.0`."""

    def _add_projections(self, dim: int, context_dim: int, qkv_bias: bool, proj_bias: bool, linear: Linears) -> None:
        self.to_q = linear(dim, dim, bias=qkv_bias)
        self.to_k, self.to_v = (linear(context_dim, dim, bias=qkv_bias) for _ in range(2))
        self.to_out = nn.ModuleList([linear(dim, dim, bias=proj_bias)])

    def project(self, x: Dual, context: Dual) -> tuple[Dual, Dual, Dual]:
        """q, k and v."""
        return dual(self.to_q, x), dual(self.to_k, context), dual(self.to_v, context)

    def output(self, mixed: Dual) -> Dual:
        """The last projection."""
        return dual(self.to_out[0], mixed)


class _Projection(nn.Module):
    """A Linear called `proj`."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.proj = layer


class _FeedForward(Mlp):
    """`net.0.proj` and `net.2`."""

    def _add_projections(self, dim: int, hidden: int, bias: bool, linear: Linears) -> None:
        first = _Projection(linear(dim, hidden, bias=bias))
        self.net = nn.ModuleList([first, nn.Identity(), linear(hidden, dim, bias=bias)])

    def projections(self) -> tuple[Sequence[nn.Linear], nn.Linear]:
        """The layer to the hidden width, and the one back."""
        return [cast(_Projection, self.net[0]).proj], cast(nn.Linear, self.net[2])


class _TimeAndLabel(DualModule):
    """The sum of the embeddings of a time [B] and a class [B], as a vector [B, C]."""

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        self.timestep_embedder = nn.ModuleDict({"linear_1": nn.Linear(256, dim), "linear_2": nn.Linear(dim, dim)})
        self.class_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(num_classes + 1, dim)})

    def forward_dual(self, timestep: Dual, class_labels: Tensor, hidden_dtype: torch.dtype | None = None) -> Dual:
        """The embedding, in `hidden_dtype` if that is given."""
        first, second = self.timestep_embedder.values()
        dtype = next(first.parameters()).dtype
        features = ops.scalar_features(Dual.of(timestep), 256, shift=1.0).map(lambda x: x.to(dtype))
        time = dual(second, ops.silu(dual(first, features)))
        embedding = add(time, self.class_embedder["embedding_table"](class_labels))
        return embedding.map(lambda x: x.to(hidden_dtype or x.dtype))


class _AdaLayerNormZero(nn.Module):
    """`emb` and `linear`: a condition as shift, scale and gate of both halves."""

    def __init__(self, dim: int, num_classes: int | None) -> None:
        super().__init__()
        self.embeds = num_classes is not None
        self.emb = _TimeAndLabel(dim, num_classes) if self.embeds else None
        self.linear = nn.Linear(dim, 6 * dim)

    def modulations(self, condition: Dual, class_labels: Tensor | None) -> tuple[Dual, ...]:
        """(shift, scale, gate) of attention and of the MLP."""
        if self.embeds:
            if class_labels is None:
                raise InputError("BasicTransformerBlock: class_labels must be given with num_embeds_ada_norm, got None")
            if not isinstance(class_labels, Tensor):
                got = class_labels.value.dtype if isinstance(class_labels, Dual) else type(class_labels).__name__
                raise InputError(f"BasicTransformerBlock: class_labels must be an integer tensor [B], got {got}")
            condition = self.emb.forward_dual(condition, class_labels)
        check_width("BasicTransformerBlock", "timestep", condition, self.linear.in_features)
        return chunk(dual(self.linear, ops.silu(condition)), 6)


class BasicTransformerBlock(DualModule):
    """diffusers' block with adaLN, `norm_type` "ada_norm_zero" (DiT) or "ada_norm_single" (PixArt).

    It drops neither activations nor labels in training.

    x + gate attn1(norm(x)), then x + attn2(x, context) if there is a cross_attention_dim, then x + gate ff(norm(x)).

    The condition is what diffusers calls timestep: a vector [B, C] for "ada_norm_zero", or with num_embeds_ada_norm
    a time [B] beside class_labels int [B], which the block embeds itself; [B, 6 C] for "ada_norm_single", to which the
    block adds its table.
    """

    def __init__(
        self, dim: int, num_attention_heads: int, attention_head_dim: int, *, norm_type: str = "ada_norm_zero",
        num_embeds_ada_norm: int | None = None, cross_attention_dim: int | None = None,
        activation_fn: str = "gelu-approximate", attention_bias: bool = False, norm_elementwise_affine: bool = False,
        norm_eps: float = 1e-5, ff_inner_dim: int | None = None, ff_bias: bool = True,
        attention_out_bias: bool = True, impl: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__(impl)
        name = "BasicTransformerBlock"
        check_sizes(name, dim=dim, num_attention_heads=num_attention_heads, attention_head_dim=attention_head_dim)
        optional = dict(
            num_embeds_ada_norm=num_embeds_ada_norm, cross_attention_dim=cross_attention_dim, ff_inner_dim=ff_inner_dim
        )
        check_sizes(name, **{option: size for option, size in optional.items() if size is not None})
        self.dim = dim
        self.single = norm_type == "ada_norm_single"
        known = self.single or norm_type == "ada_norm_zero"
        require(known, lambda: f'{name}: norm_type must be "ada_norm_zero" or "ada_norm_single", got {norm_type!r}')
        filled = num_attention_heads * attention_head_dim
        require(dim == filled, lambda: f"{name}: heads must fill dim {dim}, got {filled}")
        act = ACTIVATIONS[activation_fn] if activation_fn in tuple(ACTIVATIONS) else None
        require(
            act is not None, lambda: f"{name}: activation_fn must be one of {tuple(ACTIVATIONS)}, got {activation_fn!r}"
        )
        norms = [NormModulate(
            dim, kind="layer", elementwise_affine=norm_elementwise_affine, bias=norm_elementwise_affine,
            eps=norm_eps, impl=impl,
        ) for _ in range(3)]  # fmt: skip
        biases: dict[str, Any] = dict(qkv_bias=attention_bias, proj_bias=attention_out_bias)
        self.attn1 = _SelfAttention(dim, num_attention_heads, **biases, impl=impl)
        crosses = cross_attention_dim is not None
        self.attn2 = (
            None
            if not crosses
            else _CrossAttention(dim, num_attention_heads, context_dim=cross_attention_dim, **biases, impl=impl)
        )
        self.norm1: nn.Module = norms[0] if self.single else _AdaLayerNormZero(dim, num_embeds_ada_norm)
        self.norm2 = norms[1] if self.single or crosses else None
        if self.single:
            self.scale_shift_table = nn.Parameter(torch.randn(6, dim) / dim**0.5)
        else:
            self.norm3 = norms[2]
        self.ff = _FeedForward(dim, ff_inner_dim or 4 * dim, act=act, bias=ff_bias, impl=impl)

    def forward(
        self, hidden_states: Tensor, attention_mask: None = None, encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: None = None, timestep: Tensor | None = None,
        cross_attention_kwargs: dict | None = None, class_labels: Tensor | None = None,
        added_cond_kwargs: dict | None = None,
    ) -> Tensor:  # fmt: skip
        """As diffusers calls its block. Errors: `InputError` on masks; `forward_dual` takes lengths."""
        unused = dict(
            attention_mask=attention_mask, encoder_attention_mask=encoder_attention_mask,
            cross_attention_kwargs=cross_attention_kwargs or None, added_cond_kwargs=added_cond_kwargs or None,
        )  # fmt: skip
        for name, given in unused.items():
            require(given is None, f"BasicTransformerBlock: {name} must be None, got {type(given).__name__}")
        return super().forward(hidden_states, timestep, encoder_hidden_states, class_labels=class_labels)

    def _modulations(self, condition: Dual, class_labels: Tensor | None) -> tuple[Dual, ...]:
        if not self.single:
            return cast(_AdaLayerNormZero, self.norm1).modulations(condition, class_labels)
        table, sizes = self.scale_shift_table.flatten(), condition.value.shape
        if len(sizes) > 1:
            condition = condition.map(lambda c: c.flatten(1))
        if len(sizes) < 2 or condition.value.shape[1] != len(table):
            raise InputError(
                f"BasicTransformerBlock: timestep must be [B, {len(table)}] with ada_norm_single, got {list(sizes)}"
            )
        return chunk(add(condition, table), 6)

    def forward_dual(
        self, x: Dual, condition: Dual, context: Dual = ABSENT, *, class_labels: Tensor | None = None,
        context_lengths: Tensor | None = None,
    ) -> Dual:  # fmt: skip
        """x [B, S, C] -> [B, S, C]; context [B, T, E], of whose tokens context_lengths int [B] count."""
        x, condition, context = Dual.of(x), Dual.of(condition), Dual.of(context)
        check_tokens("BasicTransformerBlock", "x", x, self.dim)
        if not isinstance(condition.value, (Tensor, *CARRIERS)):
            got = "None" if condition.value is None else type(condition.value).__name__
            raise InputError(f"BasicTransformerBlock: timestep must be a floating tensor, got {got}")
        shift1, scale1, gate1, shift2, scale2, gate2 = self._modulations(condition, class_labels)
        if self.single:
            y = cast(NormModulate, self.norm1).forward_dual(x, scale1, shift1)
        else:
            y = ops.norm_modulate(x, None, scale1, shift1, kind="layer", impl=self.impl)
        residual = Residual(x, self.attn1.forward_dual(y), gate1)
        if self.attn2 is not None:
            residual = self._crossed(residual, context, context_lengths)
        last = self.norm2 if self.single else self.norm3
        x, y = last.after_residual(residual, scale2, shift2)
        return Residual(x, self.ff.forward_dual(y), gate2).add()

    def _crossed(self, residual: Residual, context: Dual, lengths: Tensor | None) -> Residual:
        """The stream after cross-attention, which has no norm before it in PixArt."""
        given = context.value is not None
        require(given, "BasicTransformerBlock: encoder_hidden_states must be given with cross_attention_dim, got None")
        if self.single:
            x = y = residual.add()
        else:
            x, y = self.norm2.after_residual(residual)
        return Residual(x, self.attn2.forward_dual(y, context, key_lengths=lengths))
