"""The rule of FlexAttention: softmax(m(scale q k^T)) v over the keys that a mask of blocks lets through.

The caller's m(s, b, h, i, j) changes a score s. S_dot = m'(s) scale (q_dot k^T + q k_dot^T), by `torch.func.jvp` of m;
o_dot is that of `attention.py`. Compiled kernels leave out blocks that the mask does not list, and so does the tangent;
PyTorch's eager form asks the function of the mask alone, which says the same of every mask that is made from one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import jvp as forward_jvp  # scripts may put pmf.jvp in its place

from pmf.private import FLEX_ATTENTION, for_each_score, is_plain_attention
from pmf.tangents.attention import attention_dot, repeated, scores_of, weighted, weights_of
from pmf.tangents.handlers import ruled
from pmf.tangents.rules import HANDLERS, accumulating, is_dual, mapped, plain


def _flex_attention(
    out: tuple, query: Any, key: Any, value: Any, score_mod: Callable, block_mask: tuple, scale: float, options: dict,
    *closures: Any,
) -> tuple:  # fmt: skip
    """The tangents of o, of the logarithm of the sum of exp(S) and of the greatest S, both to base 2 but for FLASH."""
    o, lse, greatest = out
    unit = 1 if options.get("BACKEND") == "FLASH" else 1 / math.log(2)
    samples, heads = plain(query).shape[:2]
    key, value = (mapped(x, lambda part: part.expand(samples, -1, -1, -1)) for x in (key, value))
    if is_plain_attention(score_mod, block_mask) and not options.get("OUTPUT_MAX"):
        asked = lse.numel() and options.get("OUTPUT_LOGSUMEXP", True)
        of_lse = unit * scale * _of_sum(query, key, scale) if asked else None
        return attention_dot(o, query, key, value, scale=scale, enable_gqa=True), of_lse, None
    key, value = repeated(key, heads), repeated(value, heads)
    with torch.autocast(o.device.type, enabled=False):
        scores, dot = _scores(query, key, score_mod, block_mask, scale)
        weights = weights_of(scores)
        of_lse = unit * (weights * dot).sum(-1) if lse.numel() else None
        of_greatest = unit * dot.gather(-1, scores.argmax(-1, keepdim=True)).squeeze(-1) if greatest.numel() else None
        return weighted(weights, dot, value).to(o.dtype), of_lse, of_greatest


def _of_sum(query: Any, key: Any, scale: float) -> Tensor:
    """The sum over the keys of P (q_dot k^T + q k_dot^T), by attention to the keys themselves."""
    q, k = plain(query), plain(key)
    dtype = accumulating(q.dtype)
    terms = [(query.dot, k)] if is_dual(query) else []
    terms += [(q, key.dot)] if is_dual(key) else []
    found = torch.zeros_like(q[..., 0], dtype=dtype)
    for of_queries, of_keys in terms:
        read = F.scaled_dot_product_attention(q, k, of_keys, scale=scale, enable_gqa=True)
        found = found + (of_queries * read).sum(-1, dtype=dtype)
    return found


def _scores(query: Any, key: Any, score_mod: Callable, block_mask: tuple, scale: float) -> tuple[Tensor, Tensor]:
    """S and S_dot; where the mask hides a key, -inf and 0."""
    scores, dot = scores_of(query, key, scale)
    places = [torch.arange(n, device=scores.device) for n in scores.shape]
    change = for_each_score(score_mod, True)
    along = torch.zeros_like(scores) if dot is None else dot
    scores, dot = forward_jvp(lambda s: change(s, *places), (scores,), (along,))[:2]
    hidden = ~_seen(block_mask, places)
    return scores.masked_fill(hidden, -torch.inf), dot.masked_fill(hidden, 0)


def _seen(block_mask: tuple, places: list[Tensor]) -> Tensor:
    """Which keys a query reads, [B, H, S_q, S_k]: all of full blocks, of others those that the mask lets."""
    _, _, counts, indices, full_counts, full_indices, *_, rows, columns, mask_mod = block_mask
    of_query, of_key = places[2] // rows, places[3] // columns
    seen = _listed(counts, indices)[:, :, of_query][..., of_key]
    if mask_mod is not None:
        seen = seen & for_each_score(mask_mod, False)(*places)
    return seen if full_counts is None else seen | _listed(full_counts, full_indices)[:, :, of_query][..., of_key]


def _listed(counts: Tensor, indices: Tensor) -> Tensor:
    """Whether each block is among the first `counts` of `indices`, [B, H, blocks of queries, blocks of keys]."""
    blocks = indices.shape[-1]
    first = torch.arange(blocks, device=indices.device) < counts[..., None]
    listed = torch.zeros(*indices.shape[:-1], blocks + 1, dtype=torch.bool, device=indices.device)
    return listed.scatter(-1, indices.long().masked_fill(~first, blocks), True)[..., :blocks]


HANDLERS[FLEX_ATTENTION] = ruled(_flex_attention)
