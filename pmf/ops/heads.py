"""What happens to heads before attention: norm, rotation, split."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from pmf import reference
from pmf.errors import InputError, checked_device
from pmf.fields import check_flags, checked_integer, checked_number
from pmf.inputs import Inputs, Pair
from pmf.ops.norms import checked_epsilon
from pmf.pair import Dual

Norm = Literal["rms", "layer"]
Pairs = Literal["adjacent", "half"]


@overload
def qk_norm_rope(
    qkv: Tensor, q_weight: Tensor | None = None, k_weight: Tensor | None = None, cos: Tensor | None = None,
    sin: Tensor | None = None, *, q_bias: Tensor | None = None, k_bias: Tensor | None = None,
    num_kv_heads: int | None = None, norm: Norm | None = "rms", across_heads: bool = False,
    pairs: Pairs = "adjacent", prefix_length: int = 0, eps: float | None = 1e-6, impl: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]: ...  # fmt: skip
@overload
def qk_norm_rope(
    qkv: Pair, q_weight: Tensor | None = None, k_weight: Tensor | None = None, cos: Tensor | None = None,
    sin: Tensor | None = None, *, q_bias: Tensor | None = None, k_bias: Tensor | None = None,
    num_kv_heads: int | None = None, norm: Norm | None = "rms", across_heads: bool = False,
    pairs: Pairs = "adjacent", prefix_length: int = 0, eps: float | None = 1e-6, impl: str | None = None,
) -> tuple[Dual, Dual, Dual]: ...  # fmt: skip
def qk_norm_rope(
    qkv, q_weight=None, k_weight=None, cos=None, sin=None, *, q_bias=None, k_bias=None, num_kv_heads=None,
    norm="rms", across_heads=False, pairs="adjacent", prefix_length=0, eps=1e-6, impl=None,
):  # fmt: skip
    """Norm of q and k, rotary positions, and the split of packed q, k, v: q [B, S, H, D], k and v [B, S, G, D].

    q = R(n(q) q_weight + q_bias), k = R(n(k) k_weight + k_bias), v unchanged; n and R are those of `norm_rope`.

    Args:
        qkv: [B, S, 3, H, D]; or, with num_kv_heads = G, [B, S, H + 2 G, D]: H heads of q, then G of k, then G of v.
        q_weight, q_bias: [D], or [H D] with across_heads; None: ones, zeros. k_weight, k_bias: [D] or [G D].
        cos, sin, and the options: those of `norm_rope`. q and k have their own statistics.
    Tangents: of qkv. Gradients: of qkv, weights and biases.
    Errors: `InputError`, with the shapes that are allowed.
    """
    fixed = {"q_weight": q_weight, "k_weight": k_weight, "cos": cos, "sin": sin, "q_bias": q_bias, "k_bias": k_bias}
    inputs = Inputs("qk_norm_rope", {"qkv": qkv}, fixed)
    value = inputs.duals[0].value
    if num_kv_heads is not None:
        num_kv_heads = checked_integer(inputs.op, "num_kv_heads", num_kv_heads)
    heads, kv_heads = _packed(inputs, value, num_kv_heads)
    prefix_length = _tables(inputs, "qkv", value, pairs, prefix_length)
    _parameters(inputs, norm, across_heads, "q_", heads, value.shape[-1])
    _parameters(inputs, norm, across_heads, "k_", kv_heads, value.shape[-1])
    run = _implementation(inputs, impl, heads, across_heads)
    options = _options(inputs, value, norm, across_heads, pairs, prefix_length, eps)
    q, k, v = run.qk_norm_rope(*inputs.duals, **fixed, num_kv_heads=num_kv_heads, **options)
    return inputs.give(q), inputs.give(k), inputs.give(v)


@overload
def norm_rope(
    x: Tensor, weight: Tensor | None = None, cos: Tensor | None = None, sin: Tensor | None = None,
    *, bias: Tensor | None = None, norm: Norm | None = "rms", across_heads: bool = False,
    pairs: Pairs = "adjacent", prefix_length: int = 0, eps: float | None = 1e-6, impl: str | None = None,
) -> Tensor: ...  # fmt: skip
@overload
def norm_rope(
    x: Pair, weight: Tensor | None = None, cos: Tensor | None = None, sin: Tensor | None = None,
    *, bias: Tensor | None = None, norm: Norm | None = "rms", across_heads: bool = False,
    pairs: Pairs = "adjacent", prefix_length: int = 0, eps: float | None = 1e-6, impl: str | None = None,
) -> Dual: ...  # fmt: skip
def norm_rope(
    x, weight=None, cos=None, sin=None, *, bias=None, norm="rms", across_heads=False, pairs="adjacent",
    prefix_length=0, eps=1e-6, impl=None,
):  # fmt: skip
    """Norm and rotary positions of heads, such as the queries of cross-attention: y = R(n(x) weight + bias).

    n(x) = (x - mu) / sqrt(mean((x - mu)^2) + eps), with mu = mean(x) for norm "layer" and 0 for "rms"; x for None. The
    means are those of each head or, with across_heads, of all H D values of a token. R rotates each pair (a, b) of a
    head, of the tokens after the prefix: (a cos - b sin, a sin + b cos). Pair i is (x[2 i], x[2 i + 1]) for
    pairs "adjacent" and (x[i], x[i + D / 2]) for "half".

    Args:
        x: [B, S, H, D].
        weight, bias: [D], or [H D] with across_heads; None: ones, zeros.
        cos, sin: [S - prefix_length, D / 2], or [B, S - prefix_length, D / 2] with angles for each sample;
            None: no rotation.
        eps: None is nn.RMSNorm's, 1.2e-7 (2.2e-16 in float64).
    Returns y like x.
    Tangents: of x. Gradients: of x, weight and bias.
    Errors: `InputError`, with the shapes that are allowed.
    """
    fixed = {"weight": weight, "cos": cos, "sin": sin, "bias": bias}
    inputs = Inputs("norm_rope", {"x": x}, fixed)
    value = inputs.duals[0].value
    inputs.shape("x", value, None, None, None, None)
    prefix_length = _tables(inputs, "x", value, pairs, prefix_length)
    _parameters(inputs, norm, across_heads, "", value.shape[2], value.shape[3])
    run = _implementation(inputs, impl, value.shape[2], across_heads)
    options = _options(inputs, value, norm, across_heads, pairs, prefix_length, eps)
    return inputs.give(run.norm_rope(*inputs.duals, **fixed, **options))


def rope_tables(
    grid_size: int, head_dim: int, *, theta: float = 10000.0, device: torch.device | str | None = None
) -> tuple[Tensor, Tensor]:
    """cos and sin of the 2-D rotary angles of a square grid, each float32 [grid_size^2, head_dim / 2].

    The first half of the pairs rotates with the row index, the second half with the column index; pair i of a half
    rotates by theta^(-i / (head_dim / 4)) per step, so head_dim must be a multiple of 4. Angles are made in float64.
    Errors: `InputError` on another head_dim, and unless grid_size is a positive integer and theta a positive number.
    """
    grid_size = checked_integer("rope_tables", "grid_size", grid_size)
    head_dim = checked_integer("rope_tables", "head_dim", head_dim)
    theta = checked_number("rope_tables", "theta", theta)
    if head_dim % 4 != 0:
        raise InputError(f"rope_tables: head_dim must be a multiple of 4 (pairs for rows and columns), got {head_dim}")
    if theta <= 0:
        raise InputError(f"rope_tables: theta must be positive, got {theta}")
    device = device if device is None else checked_device(device)
    return reference.rope_tables(grid_size, head_dim, theta=theta, device=device)


def _packed(inputs: Inputs, qkv: Tensor, kv_heads: int | None) -> tuple[int, int]:
    """Check the shape of qkv; return the numbers of heads of q, and of k and v."""
    if kv_heads is None:
        hint = ": [B, S, 3, H, D]; with num_kv_heads = G, [B, S, H + 2 G, D]"
        inputs.one_of_shapes("qkv", qkv, (None, None, 3, None, None), hint=hint)
        return qkv.shape[3], qkv.shape[3]
    inputs.one_of_shapes("qkv", qkv, (None,) * 4, hint=": with num_kv_heads = G, [B, S, H + 2 G, D]")
    packed = qkv.shape[2]
    if not 1 <= kv_heads <= packed // 3:
        allowed = f"[1, {packed // 3}] for {packed} heads H + 2 G, G <= H"
        raise InputError(f"{inputs.op}: num_kv_heads must lie in {allowed}, got {kv_heads}")
    return packed - 2 * kv_heads, kv_heads


def _tables(inputs: Inputs, name: str, x: Tensor, pairs: str, prefix: int) -> int:
    """Check what describes the rotation; return the prefix's length."""
    length, head_dim, cos, sin = x.shape[1], x.shape[-1], inputs.fixed["cos"], inputs.fixed["sin"]
    if pairs not in ("adjacent", "half"):
        raise InputError(f'{inputs.op}: pairs must be "adjacent" or "half", got {pairs!r}')
    prefix = checked_integer(inputs.op, "prefix_length", prefix, 0)
    if prefix > length:
        raise InputError(f"{inputs.op}: prefix_length must lie in [0, {length}], got {prefix}")
    if (cos is None) != (sin is None):
        raise InputError(f"{inputs.op}: {'cos' if cos is None else 'sin'} must be given with the other table, got None")
    if cos is None or sin is None:
        return prefix
    if head_dim % 2 != 0:
        raise InputError(f"{inputs.op}: head_dim must be even, got {head_dim}")
    rows = length - prefix
    shapes: list[tuple[int, ...]] = [(rows, head_dim // 2), (x.shape[0], rows, head_dim // 2)]
    for table_name, table in (("cos", cos), ("sin", sin)):
        if tuple(table.shape) not in shapes:
            hint = _table_hint(name, x, table, rows, pairs, prefix)
            inputs.one_of_shapes(table_name, table, *shapes, hint=hint)
    if sin.shape != cos.shape:
        inputs.shape("sin", sin, *cos.shape)
    return prefix


def _table_hint(name: str, x: Tensor, table: Tensor, rows: int, pairs: str, prefix: int) -> str:
    """What the shape of a wrong table tells, as the end of an error."""
    meaning = ": [N, D / 2] or [B, N, D / 2], N = S - prefix_length"
    found, head_dim = table.shape[-2:] if table.ndim > 1 else (None, None), x.shape[-1]
    if x.ndim == 4 and found == (x.shape[2] - prefix, head_dim // 2):
        return f"{meaning}; is {name} [B, H, S, D]? It must be [B, S, H, D]: transpose(1, 2)"
    if found == (rows, head_dim):
        part = "cos[..., ::2]" if pairs == "adjacent" else "cos[..., : D // 2]"
        return f"{meaning}; of tables repeated to D, pass {part}"
    return meaning


def _parameters(inputs: Inputs, norm: str | None, across: bool, prefix: str, heads: int, head_dim: int) -> None:
    """Check the norm, its weight and its bias, whose names begin with `prefix`."""
    op, fixed = inputs.op, inputs.fixed
    check_flags(op, across_heads=across)
    if norm not in ("rms", "layer", None):
        raise InputError(f'{op}: norm must be "rms", "layer" or None, got {norm!r}')
    if norm is None and fixed["cos"] is None:
        raise InputError(f"{op}: there is nothing to do: norm, cos and sin are None")
    wanted = heads * head_dim if across else head_dim
    for name in (f"{prefix}weight", f"{prefix}bias"):
        given = fixed[name]
        if given is None:
            continue
        if norm is None:
            raise InputError(f"{op}: {name} must be None with norm=None, got {list(given.shape)}")
        if given.shape != (wanted,):
            meaning = f"across_heads={across}: [{'H D' if across else 'D'}]"
            inputs.one_of_shapes(name, given, (wanted,), hint=f", {meaning}")


def _implementation(inputs: Inputs, impl: str | None, heads: int, across: bool):
    """The module that computes the op on these inputs."""
    tables = (inputs.fixed["cos"], inputs.fixed["sin"])
    trained = any(table is not None and table.requires_grad for table in tables)
    head_dim = inputs.duals[0].value.shape[-1]
    return inputs.implementation(impl, head_dim, trained, heads if across else 1)


def _options(
    inputs: Inputs, value: Tensor, norm, across_heads: bool, pairs: str, prefix_length: int, eps: float | None
) -> dict:
    return {
        "norm": norm,
        "across_heads": bool(across_heads),
        "pairs": pairs,
        "prefix_length": prefix_length,
        "eps": checked_epsilon(inputs, eps, value),
    }
