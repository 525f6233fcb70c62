"""The rule of attention: softmax(scale q k^T + mask) v.

P = softmax(S), S_dot = scale (q_dot k^T + q k_dot^T) + mask_dot, H = P * S_dot, o_dot = P v_dot + H v - rowsum(H) o.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pmf import ops
from pmf.dispatch import implementation
from pmf.errors import InputError
from pmf.pair import Dual, total
from pmf.tangents.handlers import by_torch_func, ruled
from pmf.tangents.rules import HANDLERS, TRACED, argument, is_dual, name_of, named
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


def _plain(out: Tensor, q: Any, k: Any, v: Any, mask: Any, is_causal: bool, scale: float) -> Tensor:
    """o_dot by the formula above, in plain PyTorch: it needs all scores at once."""
    scores, scores_dot = _product(_mapped(q, lambda part: part * scale), _transposed(k))
    if is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        seen = plain(mask)
        scores = scores.masked_fill(~seen, -torch.inf) if seen.dtype == torch.bool else scores + seen
        scores_dot = total(scores_dot, mask.dot if is_dual(mask) else None)
    weights = scores.softmax(-1).nan_to_num(0)  # as attention gives zero where a query sees no key
    dot = weights @ v.dot if is_dual(v) else torch.zeros_like(out)
    if scores_dot is None:
        return dot
    weights_dot = weights * scores_dot
    return dot + weights_dot @ plain(v) - weights_dot.sum(-1, keepdim=True) * out


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


def _attention(out, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    if dropout_p > 0:
        raise InputError(
            f"pmf.jvp: scaled_dot_product_attention got dropout_p {dropout_p}, whose mask is not known; expected 0"
        )
    scale = plain(query).shape[-1] ** -0.5 if scale is None else scale
    if _on_kernels(query, key, value, attn_mask, is_causal, enable_gqa):
        # Ops take [B, S, H, D]; the product that they need again costs less than a second form of the value.
        duals = [_mapped(x, lambda part: part.detach().transpose(1, 2)) for x in (query, key, value)]
        options: dict[str, Any] = dict(scale=scale, causal=is_causal, enable_gqa=enable_gqa)
        return ops.attention(*(x if is_dual(x) else Dual(x) for x in duals), **options).dot.transpose(1, 2)
    if enable_gqa:
        heads = plain(query).shape[-3]
        key, value = _repeated(key, heads), _repeated(value, heads)
    return _plain(out, query, key, value, attn_mask, is_causal, scale)


def _traced_multi_head(function: Callable, args: tuple, kwargs: dict) -> Any:
    """For compilers, attention without dropout, by `torch.func.jvp` as a whole."""
    if argument(args, kwargs, (10, "dropout_p")) and kwargs.get("training", True):
        raise InputError(f"pmf.jvp: {name_of(function)} with dropout has no rule that compiles; expected dropout 0")
    return by_torch_func(function, args, kwargs)


TRACED[F.multi_head_attention_forward] = _traced_multi_head
for _function in named("scaled_dot_product_attention"):
    HANDLERS[_function] = ruled(_attention)
