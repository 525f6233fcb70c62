"""Self-attention and cross-attention with normalised and rotated heads."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

from pmf import ops
from pmf.dual import acts_as, chunk, dual, linear_dual
from pmf.errors import InputError, require
from pmf.fields import check_flags, checked_integer, checked_number
from pmf.layers.base import DualModule, Linears, Weights, check_linear, check_sizes, check_tokens, warn_of_hooks
from pmf.ops.heads import Norm, Pairs
from pmf.packing import Join, PackedModule
from pmf.pair import Dual
from pmf.recompute import made_again


class Rope(NamedTuple):
    """cos and sin of the tokens' rotary angles, [N, D / 2] or [B, N, D / 2] each; of images: `ops.rope_tables`."""

    cos: Tensor
    sin: Tensor


def _head_dim(owner: str, dim: int, num_heads: int) -> int:
    """The width of a head. Errors: `InputError` unless both are positive integers and the heads fill dim."""
    check_sizes(owner, dim=dim)
    whole = checked_integer(owner, "num_heads", num_heads, 0) > 0 and dim % num_heads == 0
    require(whole, lambda: f"{owner}: dim must be a multiple of num_heads, got {dim} and {num_heads}")
    return dim // num_heads


def _check_tables(pairs: Pairs | None, tables: Rope | None) -> None:
    """Errors: `InputError` unless there are two tables where a layer rotates `pairs`, and none elsewhere."""
    if (tables is None) != (pairs is None):
        wanted, got = ("no tables", "some") if pairs is None else ("tables", "none")
        raise InputError(f"Attention: with rope={pairs!r} forward expects {wanted}, got {got}")
    if tables is None:
        return
    if type(tables) is Dual or not isinstance(tables, (tuple, list)):  # `forward` makes a Dual of a tensor
        got = "a tensor" if type(tables) is Dual else type(tables).__name__
        raise InputError(f"Attention: rope must be a pair (cos, sin), got {got}")
    if len(tables) != 2:
        raise InputError(f"Attention: rope must be a pair (cos, sin), got {len(tables)} values")


def _norm(kind: Norm | None, dim: int, eps: float | None) -> nn.Module:
    """The parameters of a norm of queries or keys."""
    known = kind in (None, "rms", "layer")
    require(known, lambda: f'Attention: qk_norm must be None, "rms" or "layer", got {kind!r}')
    if eps is not None:
        checked_number("Attention", "eps", eps, 0)
    return nn.Identity() if kind is None else (nn.RMSNorm if kind == "rms" else nn.LayerNorm)(dim, eps=eps)


def _parameters(norm: nn.Module, kind: Norm | None) -> tuple[Tensor | None, Tensor | None]:
    """Weight and bias of a norm. Errors: `InputError` on another than `_norm` made, which would not be computed."""
    known = nn.Identity if kind is None else nn.RMSNorm if kind == "rms" else nn.LayerNorm
    if not acts_as(norm, known, hooks=True):
        raise InputError(f"Attention: with qk_norm={kind!r} q_norm and k_norm must be as they were, got {norm}")
    warn_of_hooks("Attention", norm)
    return getattr(norm, "weight", None), getattr(norm, "bias", None)


def _joined(layers: Sequence[nn.Linear]) -> tuple[Join, ...]:
    """The layers' weights as one, and their biases if they have any."""
    check_linear("Attention", *layers)
    if len({layer.bias is None for layer in layers}) > 1:
        raise InputError("Attention: projections must all have a bias, or none of them")
    weights = Join.of(*(layer.weight for layer in layers))
    return (weights,) if layers[0].bias is None else (weights, Join.of(*(layer.bias for layer in layers)))


class Attention(DualModule, PackedModule):
    """Multi-head self-attention; the parameters `qkv`, `q_norm`, `k_norm` and `proj` are timm's.

    qk_norm: the norm of queries and keys, over each head or, with norm_across_heads, over the whole width.
    rope: "adjacent" or "half", the pairs of channels that the tables of `forward` rotate; None: no positions.
    num_kv_heads: fewer heads of keys and values (grouped queries). prefix_length: the first tokens do not rotate.
    causal: a token attends to those before it and itself. `linear` makes the Linear layers.
    """

    def __init__(
        self, dim: int, num_heads: int = 8, *, num_kv_heads: int | None = None, qkv_bias: bool = False,
        qk_norm: Norm | None = None, norm_across_heads: bool = False, eps: float | None = 1e-6,
        rope: Pairs | None = None, prefix_length: int = 0, causal: bool = False, proj_bias: bool = True,
        linear: Linears = nn.Linear, impl: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__(impl)
        self.num_heads, self.head_dim = num_heads, _head_dim("Attention", dim, num_heads)
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        check_sizes("Attention", num_kv_heads=self.num_kv_heads)
        require(
            num_heads % self.num_kv_heads == 0,
            lambda: f"Attention: num_kv_heads must divide num_heads {num_heads}, got {num_kv_heads}",
        )
        known = rope in (None, "adjacent", "half")
        require(known, lambda: f'Attention: rope must be None, "adjacent" or "half", got {rope!r}')
        checked_integer("Attention", "prefix_length", prefix_length, 0)
        check_flags("Attention", norm_across_heads=norm_across_heads, causal=causal)
        self.qk_norm, self.norm_across_heads, self.eps = qk_norm, norm_across_heads, eps
        self.rope, self.prefix_length, self.causal = rope, prefix_length, causal
        kv_dim = self.num_kv_heads * self.head_dim
        self._add_projections(dim, kv_dim, qkv_bias, proj_bias, linear)
        self.q_norm = _norm(qk_norm, dim if norm_across_heads else self.head_dim, eps)
        self.k_norm = _norm(qk_norm, kv_dim if norm_across_heads else self.head_dim, eps)

    def _add_projections(self, dim: int, kv_dim: int, qkv_bias: bool, proj_bias: bool, linear: Linears) -> None:
        """Make the Linear layers that `projections` returns."""
        self.qkv = linear(dim, dim + 2 * kv_dim, bias=qkv_bias)
        self.proj = linear(dim, dim, bias=proj_bias)

    def projections(self) -> tuple[Sequence[nn.Linear], nn.Linear]:
        """The layers whose results, side by side, are q, k and v; and that of the result."""
        return [self.qkv], self.proj

    def joins(self) -> tuple[Join, ...]:
        """One weight for q, k and v, the output weight, and the biases of each."""
        inputs, out = self.projections()
        return *_joined(inputs), *_joined([out])

    def forward_dual(self, x: Dual, rope: Rope | None = None, *, key_lengths: Tensor | None = None) -> Dual:
        """x [B, S, C] -> [B, S, C]; rope: the tables; key_lengths int [B]: the tokens of each sample that count."""
        x = Dual.of(x)
        check_tokens("Attention", "x", x, self.num_heads * self.head_dim)
        first, last = self.weights()
        return self.mix(linear_dual(x, *first), last, rope, key_lengths=key_lengths)

    def weights(self) -> tuple[Weights, Weights]:
        """Weight and bias of the product that gives q, k and v, and of the last one."""
        inputs, out = self.projections()
        packed = iter(self.packed())
        weight, bias = next(packed), None if inputs[0].bias is None else next(packed)
        return (weight, bias), (next(packed), None if out.bias is None else next(packed))

    def mix(self, packed: Dual, last: Weights, rope: Rope | None = None, *, key_lengths: Tensor | None = None) -> Dual:
        """All that follows the product that gives q, k and v, `packed` [B, S, C + 2 C_kv]."""
        grouped = self.num_kv_heads != self.num_heads

        def attend(q: Dual, k: Dual, v: Dual) -> Dual:
            return ops.attention(
                q, k, v, causal=self.causal, key_lengths=key_lengths, enable_gqa=grouped, impl=self.impl
            )

        heads = functools.partial(self._heads, rope=rope, norms=self._norms())
        mixed = made_again(heads, attend, packed) if self.light else attend(*heads(packed))
        return linear_dual(mixed.map(lambda o: o.flatten(2)), *last)

    def _norms(self) -> tuple[tuple[Tensor | None, Tensor | None], ...]:
        """Weight and bias of the norms of queries and keys."""
        return _parameters(self.q_norm, self.qk_norm), _parameters(self.k_norm, self.qk_norm)

    def _heads(self, packed: Dual, *, rope: Rope | None, norms: tuple) -> tuple[Dual, Dual, Dual]:
        """q, k and v [B, S, H, D] of the projected tokens, normalised and rotated; norms: see `_norms`."""
        _check_tables(self.rope, rope)
        heads = packed.map(lambda p: p.unflatten(-1, (-1, self.head_dim)))
        if self.qk_norm is None and rope is None:
            sizes = [self.num_heads, self.num_kv_heads, self.num_kv_heads]
            dots = [None] * 3 if heads.dot is None else heads.dot.split(sizes, 2)
            q, k, v = map(Dual, heads.value.split(sizes, 2), dots)
            return q, k, v
        (q_weight, q_bias), (k_weight, k_bias) = norms
        return ops.qk_norm_rope(
            heads, q_weight, k_weight, *(rope or (None, None)), q_bias=q_bias, k_bias=k_bias,
            num_kv_heads=self.num_kv_heads, norm=self.qk_norm, across_heads=self.norm_across_heads,
            pairs=self.rope or "adjacent", prefix_length=self.prefix_length, eps=self.eps, impl=self.impl,
        )  # fmt: skip


class SeparateAttention(Attention):
    """`Attention` with a projection each, `q_proj`, `k_proj`, `v_proj` and `out_proj`, as optimizers like Muon want."""

    def _add_projections(self, dim: int, kv_dim: int, qkv_bias: bool, proj_bias: bool, linear: Linears) -> None:
        require(kv_dim == dim, "SeparateAttention: grouped-query heads have projections of two sizes; use Attention")
        self.q_proj, self.k_proj, self.v_proj = (linear(dim, dim, bias=qkv_bias) for _ in range(3))
        self.out_proj = linear(dim, dim, bias=proj_bias)

    def projections(self) -> tuple[Sequence[nn.Linear], nn.Linear]:
        """q, k and v; and the output."""
        return [self.q_proj, self.k_proj, self.v_proj], self.out_proj


class CrossAttention(DualModule):
    """Multi-head attention of tokens to a context of other length: `q`, `kv`, `q_norm`, `k_norm`, `proj`.

    context_dim: the context's width, by default that of the tokens; the rest as in `Attention`.
    """

    def __init__(
        self, dim: int, num_heads: int = 8, *, context_dim: int | None = None, qkv_bias: bool = False,
        qk_norm: Norm | None = None, norm_across_heads: bool = False, eps: float | None = 1e-6,
        proj_bias: bool = True, linear: Linears = nn.Linear, impl: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__(impl)
        self.head_dim, self.qk_norm, self.eps = _head_dim("CrossAttention", dim, num_heads), qk_norm, eps
        check_flags("CrossAttention", norm_across_heads=norm_across_heads)
        self.dim, self.context_dim = dim, dim if context_dim is None else context_dim
        check_sizes("CrossAttention", context_dim=self.context_dim)
        self.norm_across_heads = norm_across_heads
        self._add_projections(dim, self.context_dim, qkv_bias, proj_bias, linear)
        self.q_norm, self.k_norm = (_norm(qk_norm, dim if norm_across_heads else self.head_dim, eps) for _ in range(2))

    def _add_projections(self, dim: int, context_dim: int, qkv_bias: bool, proj_bias: bool, linear: Linears) -> None:
        self.q = linear(dim, dim, bias=qkv_bias)
        self.kv = linear(context_dim, 2 * dim, bias=qkv_bias)
        self.proj = linear(dim, dim, bias=proj_bias)

    def project(self, x: Dual, context: Dual) -> tuple[Dual, Dual, Dual]:
        """q [B, S, C] of the tokens, k and v [B, T, C] of the context."""
        k, v = chunk(dual(self.kv, context), 2)
        return dual(self.q, x), k, v

    def output(self, mixed: Dual) -> Dual:
        """The last projection."""
        return dual(self.proj, mixed)

    def forward_dual(self, x: Dual, context: Dual, *, key_lengths: Tensor | None = None) -> Dual:
        """x [B, S, C], context [B, T, E] -> [B, S, C]; key_lengths int [B]: the context's tokens that count."""
        x, context = Dual.of(x), Dual.of(context)
        check_tokens("CrossAttention", "x", x, self.dim)
        check_tokens("CrossAttention", "context", context, self.context_dim)
        parts = self.project(x, context)
        q, k, v = (part.map(lambda p: p.unflatten(-1, (-1, self.head_dim))) for part in parts)
        if self.qk_norm is not None:
            q, k = self._normalised(q, self.q_norm), self._normalised(k, self.k_norm)
        mixed = ops.attention(q, k, v, key_lengths=key_lengths, impl=self.impl)
        return self.output(mixed.map(lambda o: o.flatten(2)))

    def _normalised(self, heads: Dual, norm: nn.Module) -> Dual:
        weight, bias = _parameters(norm, self.qk_norm)
        return ops.norm_rope(
            heads, weight, bias=bias, norm=self.qk_norm, across_heads=self.norm_across_heads, eps=self.eps,
            impl=self.impl,
        )  # fmt: skip
