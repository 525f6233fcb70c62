"""The rules of other packages' attention, which are autograd.Functions without jvp: flash-attn 2, 3, 4 and xformers.

The versions of flash-attn differ in the arguments of their Functions: `dropout_p` is of version 2, `learnable_sink` of
4, and before 2.3 there is no `window_size`.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from types import BuiltinMethodType, MethodType
from typing import Any

import torch
from torch import Tensor

from pmf.errors import InputError
from pmf.pair import Dual
from pmf.private import schema
from pmf.tangents.attention import attention_dot
from pmf.tangents.handlers import ruled
from pmf.tangents.rules import FINDERS, Handler, expect_none, linear_in_first, mapped, plain

ATTENTION = {
    f"FlashAttn{lengths}{packed}Func" for lengths in ("", "Varlen") for packed in ("", "KVPacked", "QKVPacked")
}
LINEAR = {"ApplyRotaryEmb", "ApplyRotaryEmbQKV_", "ApplyRotaryEmbKV_", "IndexFirstAxis", "IndexPutFirstAxis"}
"""What is linear in its first argument: rotations, also in place, and padding."""
MODULES = "flash_attn_interface", "flash_attn.cute.interface", "layers.rotary", "bert_padding"
"""The ends of the names of their modules."""
XFORMERS = "xformers.ops.fmha", "_fMHA"
VARLEN = "torch_attn::_varlen_attn"
"""The operator of `torch.nn.attention.varlen`, and its names for flash-attn's arguments."""
VARLEN_NAMES = {
    "query": "q", "key": "k", "value": "v", "cu_seq_q": "cu_seqlens_q", "cu_seq_k": "cu_seqlens_k",
    "max_q": "max_seqlen_q", "max_k": "max_seqlen_k", "is_causal": "causal", "scale": "softmax_scale",
}  # fmt: skip

WITHOUT_EFFECT = """
deterministic disable_scheduler_metadata enable_gqa is_grad_enabled min_seqlen_k num_splits pack_gqa scheduler_metadata
seqlen_k_per_split sm_margin
"""
"""Arguments that say how to compute, not what."""
FOLLOWED = """
q k v kv qkv softmax_scale causal window_size cu_seqlens cu_seqlens_q cu_seqlens_k max_seqlen max_seqlen_q max_seqlen_k
"""
"""Arguments that the formula has."""


def _of_xformers(function: Any) -> Handler | None:
    """The handler of xformers' autograd.Function; None for others."""
    return ruled(_memory_efficient) if (function.__module__, function.__name__) == XFORMERS else None


def _memory_efficient(
    out: tuple, op_fw: Any, op_bw: Any, query: Any, key: Any, value: Any, attn_bias: Any = None, p: float = 0.0,
    scale: float | None = None, *others: Any,
) -> tuple:  # fmt: skip
    """The tangent of softmax(scale q k^T + bias) v, of [B, S, H, D] or [B, S, G, H, D], and None for the statistics."""
    if p:
        raise InputError("pmf.jvp: xformers' attention got a moving value and p; expected no dropout")
    o, q, k, v = (mapped(x, _heads_first) for x in (out[0], query, key, value))
    causal = type(attn_bias).__name__ == "LowerTriangularMask"
    if isinstance(attn_bias, Tensor | Dual):
        attn_bias = mapped(attn_bias, lambda part: part.reshape(-1, *o.shape[1:-1], part.shape[-1]))
    elif attn_bias is not None and not causal:
        attn_bias = attn_bias.materialize((*o.shape[:-1], plain(k).shape[2]), dtype=torch.float32, device=o.device)
    dot = attention_dot(o, q, k, v, None if causal else attn_bias, is_causal=causal, scale=scale)
    return dot.transpose(1, 2).reshape(out[0].shape), *[None] * (len(out) - 1)


def _heads_first(x: Tensor) -> Tensor:
    return x.flatten(2, -2).transpose(1, 2)


def _of_flash_attn(function: Any) -> Handler | None:
    """The handler of one of flash-attn's autograd.Functions; None for others."""
    name, module = function.__name__, function.__module__
    if not module.endswith(MODULES):
        return None
    if name in LINEAR:
        return _linear
    if name not in ATTENTION:
        return None
    names = list(inspect.signature(function.forward).parameters)[1:]

    def rule(out, *args):
        return _attention(f"{module}.{name}", out, names, args)

    return ruled(rule)


def _of_varlen(function: Any) -> Handler | None:
    """The handler of PyTorch's attention of samples of any length; None for others."""
    operator, arguments, _ = schema(function)
    if operator != VARLEN:
        return None
    names = [VARLEN_NAMES.get(name, name) for name in arguments]

    def rule(out, *args):
        return _attention(VARLEN, out, names, args)

    return ruled(rule)


def _linear(function: Callable, args: tuple, kwargs: dict) -> Any:
    return ruled(linear_in_first(function))(function, args, kwargs)


def _attention(name: str, out: Any, names: list[str], args: tuple) -> Any:
    """The tangent of softmax(scale q k^T) v, of [B, S, H, D] or of samples of any length one after another."""
    given = dict(zip(names, args, strict=False))
    _check(name, given)
    value = out if isinstance(out, Tensor) else out[0]
    if not value.numel():
        return None
    tokens = len(value)
    q, k, v = _separate(given)
    packing = _packing(given)
    if packing is not None:
        q = packing[0].padded(q)
        k, v = (packing[1].padded(x) for x in (k, v))
    queries, keys, causal = plain(q).shape[1], plain(k).shape[1], given.get("causal", False)
    aligned = packing[0] is packing[1] if packing else queries == keys
    left, right = _window(given, keys)
    read: dict[str, Any] = {"key_lengths": packing[1].lengths.clamp(min=1)} if packing else {}
    if left >= 0 or right >= 0 or (causal and not aligned):
        if "window_size" not in names:
            raise InputError(f"pmf.jvp: {name} got causal and unequal lengths; expected flash-attn 2.3 or later")
        seen = _seen(queries, keys, packing, left, 0 if causal else right, value.device)
        read, causal = {"attn_mask": seen}, False
    q, k, v = (mapped(x, lambda part: part.transpose(1, 2)) for x in (q, k, v))
    scale = given.get("softmax_scale")
    dot = attention_dot(value, q, k, v, is_causal=causal, scale=scale, enable_gqa=True, **read).transpose(1, 2)
    if packing is not None:
        dot = packing[0].joined(dot, tokens)
    return dot if isinstance(out, Tensor) else (dot, *[None] * (len(out) - 1))


def _check(name: str, given: dict[str, Any]) -> None:
    """Errors: `InputError` on an argument that changes the value in a way that the formula does not have."""
    expect_none(name, given, WITHOUT_EFFECT.split() + FOLLOWED.split())
    left, right = given.get("window_size") or (None, None)
    endless = left is not None and right is not None and max(left, right) < 0
    counted = [x for x in ((left,) if given.get("causal") else (left, right)) if x is not None]
    if "learnable_sink" in given and not endless and min(counted, default=0) < 0:  # versions 4 differ in what they read
        message = f"got window_size {(left, right)}; expected None for a side without limit"
        raise InputError(f"pmf.jvp: {name} {message}")


def _window(given: dict[str, Any], keys: int) -> tuple[int, int]:
    """How many keys before and behind its own a query reads; -1 for all."""
    left, right = (-1 if side is None else side for side in given.get("window_size") or (-1, -1))
    dropped = "dropout_p" in given and right >= keys  # as version 2 has it, also where queries are more than keys
    return left, -1 if dropped else right


def _separate(given: dict[str, Any]) -> list:
    """q, k and v, which the Function takes apart or as one tensor."""
    if "qkv" in given:
        return [_part(given["qkv"], i) for i in range(3)]
    if "kv" in given:
        return [given["q"], *[_part(given["kv"], i) for i in range(2)]]
    return [given["q"], given["k"], given["v"]]


def _part(x: Any, i: int) -> Any:
    return mapped(x, lambda tensor: tensor.select(-3, i))


class _Packing:
    """Samples of any length one after another, [T, ...], the first token of sample b at starts[b]."""

    def __init__(self, starts: Tensor, longest: int | None) -> None:
        self.starts, self.lengths = starts.long(), starts.diff()
        self.longest = int(self.lengths.max() if longest is None else longest)

    def padded(self, x: Any) -> Any:
        """x as [B, longest, ...], zero after the end of each sample."""
        if not len(plain(x)):
            return mapped(x, lambda part: part.new_zeros(len(self.lengths), self.longest, *part.shape[1:]))
        place = torch.arange(self.longest, device=self.starts.device)
        outside = place >= self.lengths[:, None]
        index = (self.starts[:-1, None] + place).masked_fill(outside, 0)
        return mapped(x, lambda part: part[index].masked_fill(outside[..., None, None], 0))

    def joined(self, x: Tensor, tokens: int) -> Tensor:
        """The first tokens of each sample one after another, as in what `padded` was given; zero behind the last."""
        token = torch.arange(tokens, device=x.device)
        sample = torch.searchsorted(self.starts[1:], token, right=True).clamp(max=len(self.lengths) - 1)
        place = (token - self.starts[sample]).clamp(max=self.longest - 1)
        return x[sample, place].masked_fill((token >= self.starts[-1])[:, None, None], 0)


def _packing(given: dict[str, Any]) -> tuple[_Packing, _Packing] | None:
    """How queries and keys are packed, the same object if they are packed alike; None if they are not."""
    starts, lengths = (
        [given.get(name), given.get(f"{name}_q"), given.get(f"{name}_k")] for name in ("cu_seqlens", "max_seqlen")
    )
    if starts[0] is not None:
        starts, lengths = [starts[0]] * 3, [lengths[0]] * 3
    if starts[1] is None and starts[2] is None:
        return None
    if starts[1] is None or starts[2] is None:
        raise InputError("pmf.jvp: flash-attn got one of cu_seqlens_q and cu_seqlens_k; expected both")
    queries = _Packing(starts[1], lengths[1])
    alike = starts[1] is starts[2] and lengths[1] == lengths[2]
    return queries, queries if alike else _Packing(starts[2], lengths[2])


def _seen(queries: int, keys: int, packing: Any, left: int, right: int, device: torch.device) -> Tensor:
    """Which keys a query reads, [S_q, S_k] or [B, 1, S_q, S_k]: the last query and the last key stand side by side."""
    i, j = torch.arange(queries, device=device)[:, None], torch.arange(keys, device=device)
    if packing is None:
        beside, seen = j - i - (keys - queries), torch.ones((), dtype=torch.bool, device=device)
    else:
        of_queries, of_keys = (part.lengths[:, None, None, None] for part in packing)
        beside, seen = j - i - (of_keys - of_queries), j < of_keys
    if left >= 0:
        seen = seen & (beside >= -left)
    return seen & (beside <= right) if right >= 0 else seen


def look_up_late() -> None:
    """Let flash-attn's padding look its Functions up when it applies them: what is looked up earlier hides tangents."""
    module = sys.modules.get("flash_attn.bert_padding")
    for name, function in (("index_first_axis", "IndexFirstAxis"), ("index_put_first_axis", "IndexPutFirstAxis")):
        if isinstance(getattr(module, name, None), MethodType | BuiltinMethodType):
            setattr(module, name, functools.partial(_applied, getattr(module, function)))


def _applied(function: Any, *args: Any) -> Any:
    return function.apply(*args)


FINDERS += [_of_flash_attn, _of_xformers, _of_varlen]
