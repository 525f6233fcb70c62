"""The rule of attention: softmax(scale q k^T + mask) v.

P = softmax(S), S_dot = scale (q_dot k^T + q k_dot^T) + mask_dot, P_dot = P * (S_dot - rowsum(P * S_dot)), and
o_dot = P v_dot + P_dot v. Dropout keeps some of P, D = P M / (1 - p) for a mask M of zeros and ones. Then o = D v, and
o_dot = D v_dot + (D * (S_dot - rowsum(P * S_dot))) v.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pmf import ops
from pmf.dispatch import implementation
from pmf.errors import InputError
from pmf.pair import Dual, total
from pmf.private import tree_leaves
from pmf.tangents.carriers import values_of
from pmf.tangents.handlers import ruled
from pmf.tangents.random_state import replayed
from pmf.tangents.rules import HANDLERS, accumulating, argument, is_dual, mapped, named, plain, replaced

SCORES_AT_ONCE = 2**24
"""About as many scores of a tangent without kernel are in memory at once; compilers take all of them."""
LEAST_QUERIES = 64


def scores_of(q: Any, k: Any, scale: float) -> tuple[Tensor, Tensor | None]:
    """S = scale q k^T and its tangent, in float32 or float64."""
    q, k = (mapped(x, lambda part: part.to(accumulating(part.dtype))) for x in (q, k))
    keys = mapped(k, lambda part: scale * part.mT)
    scores = plain(q) @ plain(keys)
    return scores, total(q.dot @ plain(keys) if is_dual(q) else None, plain(q) @ keys.dot if is_dual(k) else None)


def weights_of(scores: Tensor) -> Tensor:
    """P; zero where a query sees no key, as fused attention has it."""
    return scores.softmax(-1).masked_fill((scores == -torch.inf).all(-1, keepdim=True), 0)


def weighted(weights: Tensor, scores_dot: Tensor | None, v: Any, kept: Tensor | None = None) -> Any:
    """o_dot by the formula above, in the dtype of the weights P; `kept` is D, if that is another."""
    v = mapped(v, lambda part: part.to(weights.dtype))
    kept = weights if kept is None else kept.to(weights.dtype)
    dot = kept @ v.dot if is_dual(v) else None
    if scores_dot is not None:
        mean = (weights * scores_dot).sum(-1, keepdim=True)
        dot = total(dot, (kept * (scores_dot - mean)) @ plain(v))
    return dot


def repeated(x: Any, heads: int) -> Any:
    """The heads of grouped keys or values, each repeated for the queries that share it."""
    return mapped(x, lambda part: part.repeat_interleave(heads // part.shape[-3], -3))


def _plain(
    out: Tensor, q: Any, k: Any, v: Any, mask: Any, is_causal: bool, scale: float, kept: Tensor | None = None
) -> Tensor:
    """o_dot in plain PyTorch, of so many queries at once that their scores fit a limit."""
    (*batch, queries, _), keys = plain(q).shape, plain(k).shape[-2]
    if is_causal:
        seen = torch.ones(queries, keys, dtype=torch.bool, device=out.device).tril()
        mask = seen if mask is None else mask & seen
    if torch.compiler.is_compiling():
        return _of_queries(q, k, v, mask, scale, kept).to(out.dtype)
    step = max(LEAST_QUERIES, SCORES_AT_ONCE // max(1, math.prod(batch) * keys))
    parts = []
    for start in range(0, max(1, queries), step):
        rows = slice(start, start + step)
        part = _of_queries(_rows(q, rows), k, v, _rows(mask, rows), scale, _rows(kept, rows))
        parts.append(part.to(out.dtype))
    return torch.cat(parts, -2) if len(parts) > 1 else parts[0]


def _rows(x: Any, rows: slice) -> Any:
    """The queries of a tensor, or all of it if it says the same of every query."""
    if x is None or plain(x).shape[-2] == 1:
        return x
    return mapped(x, lambda part: part[..., rows, :])


def _of_queries(q: Any, k: Any, v: Any, mask: Any, scale: float, kept: Tensor | None) -> Tensor:
    """o_dot of some queries, in the dtype of the weights."""
    with torch.autocast(plain(q).device.type, enabled=False):
        scores, scores_dot = scores_of(q, k, scale)
        if mask is not None:
            seen = plain(mask)
            scores = scores.masked_fill(~seen, -torch.inf) if seen.dtype == torch.bool else scores + seen
            scores_dot = total(scores_dot, mask.dot if is_dual(mask) else None)
        return weighted(weights_of(scores), scores_dot, v, kept)


def _on_kernels(q: Any, k: Any, v: Any, mask: Any, is_causal: bool, enable_gqa: bool) -> bool:
    """Whether the Triton kernel can compute the tangent: attention without mask, in the shapes that it takes."""
    numbers = [plain(x) for x in (q, k, v)]
    if mask is not None or any(x.ndim != 4 for x in numbers) or not numbers[0].is_cuda:
        return False
    q, k, v = numbers
    if k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[-1] != k.shape[-1] or q.dtype != k.dtype:
        return False
    if is_causal and q.shape[2] != k.shape[2]:
        return False
    heads, groups = q.shape[1], k.shape[1]
    if heads != groups and (not enable_gqa or groups == 0 or heads % groups):
        return False
    module = implementation("attention", None, "cuda", (q.dtype, v.dtype), (q.shape[-1],))
    return module.__name__ != "pmf.reference"


def attention_dot(
    out, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False, kept=None,
    key_lengths=None,
):  # fmt: skip
    """o_dot; queries, keys and values are [B, H, S, D], and of sample b only the first key_lengths[b] keys are read."""
    scale = plain(query).shape[-1] ** -0.5 if scale is None else scale
    if kept is None and _on_kernels(query, key, value, attn_mask, is_causal, enable_gqa):
        # Ops take [B, S, H, D]; the product that they need again costs less than a second form of the value.
        duals = [mapped(x, lambda part: part.detach().transpose(1, 2)) for x in (query, key, value)]
        duals = [x if is_dual(x) else Dual(x) for x in duals]
        dot: Any = ops.attention(
            *duals, scale=scale, causal=bool(is_causal), key_lengths=key_lengths, enable_gqa=bool(enable_gqa)
        ).dot
        return dot.transpose(1, 2)
    if enable_gqa:
        heads = plain(query).shape[-3]
        key, value = repeated(key, heads), repeated(value, heads)
    if key_lengths is not None:
        attn_mask = torch.arange(plain(key).shape[-2], device=out.device) < key_lengths[:, None, None, None]
    return _plain(out, query, key, value, attn_mask, is_causal, scale, kept)


def _kept(attention: Callable, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
    """D, the attention of the columns of the identity: kernels do not say what they drop.

    As many columns as v has at once, so that PyTorch chooses the kernel that it chose for v.
    """
    if not value.numel():
        return None
    keys, columns = value.shape[-2:]
    identity = torch.eye(keys, -(-keys // columns) * columns, dtype=value.dtype, device=value.device)
    parts = [attention(query, key, part.expand_as(value), *args, **kwargs) for part in identity.split(columns, -1)]
    return torch.cat(parts, -1)[..., :keys]


def _unfused(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """Attention function by function, each with its rule, for compilers: they would draw the mask of dropout twice.

    Scores and weights of half precision are float32, as in PyTorch's attention.
    """
    dtype = accumulating(query.dtype)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if enable_gqa:
        heads = query.shape[-3]
        key, value = (x.repeat_interleave(heads // x.shape[-3], -3) for x in (key, value))
    with torch.autocast(query.device.type, enabled=False):
        scores = (query.to(dtype) * scale) @ key.to(dtype).mT
    if is_causal:
        if attn_mask is not None:
            raise InputError("pmf.jvp: scaled_dot_product_attention got attn_mask and is_causal; expected one of them")
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is None:
        return F.dropout(scores.softmax(-1), dropout_p).to(value.dtype) @ value
    hidden = ~attn_mask if attn_mask.dtype == torch.bool else attn_mask.detach() == -torch.inf
    sees_no_key = hidden.all(-1, keepdim=True)
    scores = scores.masked_fill(hidden, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    weights = scores.masked_fill(sees_no_key, 0).softmax(-1).masked_fill(sees_no_key, 0)
    return F.dropout(weights, dropout_p).to(value.dtype) @ value


def _scaled_dot_product(function: Callable, args: tuple, kwargs: dict) -> Any:
    if not argument(args, kwargs, (4, "dropout_p")):
        return _WITHOUT_DROPOUT(function, args, kwargs)
    if torch.compiler.is_compiling():
        checked, named = replaced(values_of(args), values_of(kwargs), (4, "dropout_p"), 0.0)
        function(*checked, **named)  # it raises where the arguments do not fit; compilers drop what nobody reads
        return _unfused(*args, **kwargs)
    with replayed(tree_leaves(values_of((args, kwargs)))) as replay:

        def rule(out, query, key, value, attn_mask=None, *args, **kwargs):
            kept = _kept(
                functools.partial(replay, function), *map(plain, (query, key, value, attn_mask)), *args, **kwargs
            )
            return attention_dot(out, query, key, value, attn_mask, *args, **kwargs, kept=kept)

        return ruled(rule)(function, args, kwargs)


_WITHOUT_DROPOUT = ruled(attention_dot)

for _function in named("scaled_dot_product_attention"):
    HANDLERS[_function] = _scaled_dot_product
