"""The rule of attention: softmax(scale q k^T + mask) v.

P = softmax(S), S_dot = scale (q_dot k^T + q k_dot^T) + mask_dot, H = P * S_dot, o_dot = P v_dot + H v - rowsum(H) o.
Dropout keeps some of P, D = P M / (1 - p) for a mask M of zeros and ones. Then o = D v, and
o_dot = D v_dot + (D * S_dot) v - rowsum(H) o.
"""

from __future__ import annotations

import functools
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
from pmf.tangents.rules import HANDLERS, argument, is_dual, named, replaced
from pmf.tangents.rules import value as plain


def _product(a: Any, b: Any) -> tuple[Tensor, Tensor | None]:
    """a b and its tangent."""
    product = plain(a) @ plain(b)
    dot = total(a.dot @ plain(b) if is_dual(a) else None, plain(a) @ b.dot if is_dual(b) else None)
    return product, dot


def _transposed(k: Any) -> Any:
    return k.map(lambda part: part.mT) if is_dual(k) else k.mT


def _repeated(x: Any, heads: int) -> Any:
    """The heads of grouped keys or values, each repeated for the queries that share it."""
    return _mapped(x, lambda part: part.repeat_interleave(heads // part.shape[-3], -3))


def _mapped(x: Any, function) -> Any:
    return x.map(function) if is_dual(x) else function(x)


def _plain(
    out: Tensor, q: Any, k: Any, v: Any, mask: Any, is_causal: bool, scale: float, kept: Tensor | None = None
) -> Tensor:
    """o_dot by the formula above, in plain PyTorch: it needs all scores at once. `kept` is D."""
    scores, scores_dot = _product(_mapped(q, lambda part: part * scale), _transposed(k))
    if is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        seen = plain(mask)
        scores = scores.masked_fill(~seen, -torch.inf) if seen.dtype == torch.bool else scores + seen
        scores_dot = total(scores_dot, mask.dot if is_dual(mask) else None)
    weights = scores.softmax(-1).nan_to_num(0)  # as attention gives zero where a query sees no key
    kept = weights if kept is None else kept
    dot = kept @ v.dot if is_dual(v) else torch.zeros_like(out)
    if scores_dot is None:
        return dot
    return dot + (kept * scores_dot) @ plain(v) - (weights * scores_dot).sum(-1, keepdim=True) * out


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


def _attention(
    out, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False, kept=None
):
    scale = plain(query).shape[-1] ** -0.5 if scale is None else scale
    if kept is None and _on_kernels(query, key, value, attn_mask, is_causal, enable_gqa):
        # Ops take [B, S, H, D]; the product that they need again costs less than a second form of the value.
        duals = [_mapped(x, lambda part: part.detach().transpose(1, 2)) for x in (query, key, value)]
        duals = [x if is_dual(x) else Dual(x) for x in duals]
        dot: Any = ops.attention(*duals, scale=scale, causal=is_causal, enable_gqa=enable_gqa).dot
        return dot.transpose(1, 2)
    if enable_gqa:
        heads = plain(query).shape[-3]
        key, value = _repeated(key, heads), _repeated(value, heads)
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
    dtype = torch.promote_types(query.dtype, torch.float32)
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
            return _attention(out, query, key, value, attn_mask, *args, **kwargs, kept=kept)

        return ruled(rule)(function, args, kwargs)


_WITHOUT_DROPOUT = ruled(_attention)

for _function in named("scaled_dot_product_attention"):
    HANDLERS[_function] = _scaled_dot_product
