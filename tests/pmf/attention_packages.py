"""Stand-ins for flash-attn and xformers, which need a GPU: their autograd.Functions by name, module and arguments.

They compute attention by its formula, so that they run on a CPU in float64.
"""

import inspect
import itertools

import torch
from torch import Tensor

FORMS = {
    2: {
        "module": "flash_attn.flash_attn_interface",
        "varlen": "cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k",
        "options": "dropout_p softmax_scale causal window_size softcap alibi_slopes deterministic return_softmax",
        "last": "is_grad_enabled",
    },
    3: {
        "module": "flash_attn_interface",
        "varlen": "cu_seqlens_q cu_seqlens_k seqused_q seqused_k max_seqlen_q max_seqlen_k",
        "options": "softmax_scale causal qv q_descale k_descale v_descale window_size attention_chunk softcap",
        "last": "num_splits pack_gqa deterministic sm_margin return_softmax",
    },
    4: {
        "module": "flash_attn.cute.interface",
        "varlen": "qv cu_seqlens_q cu_seqlens_k seqused_q seqused_k max_seqlen_q max_seqlen_k min_seqlen_k",
        "options": "softmax_scale causal window_size learnable_sink softcap num_splits pack_gqa deterministic",
        "last": "score_mod mask_mod return_lse scheduler_metadata",
    },
}
"""The arguments of the Functions of flash-attn's versions, in their order, but for some of version 4."""


def flash_attn(version: int, varlen: bool = False, packed: str = ""):
    """A function of keywords that applies the Function of a version as flash-attn's own functions do."""
    form = FORMS[version]
    tensors = {"": "q k v", "KV": "q kv", "QKV": "qkv"}[packed]
    lengths = form["varlen"] if varlen else ""
    if packed == "QKV" and varlen:
        lengths = "cu_seqlens max_seqlen"
    names = f"{tensors} {lengths} {form['options']} {form['last']}".split()
    name = f"FlashAttn{'Varlen' if varlen else ''}{packed + 'Packed' if packed else ''}Func"
    function = stand_in(name, form["module"], names, _attend, pair=version != 2)
    defaults = {"window_size": (-1, -1) if version < 4 else (None, None), "causal": False, "dropout_p": 0.0}
    defaults |= {"softcap": 0.0, "deterministic": True, "num_splits": 1, "is_grad_enabled": True}

    def call(**given):
        out = function.apply(*[given.get(name, defaults.get(name)) for name in names])
        return out[0] if version != 2 else out

    return call


def _attend(given: dict) -> Tensor:
    tensors = [given[name] for name in ("q", "k", "v", "kv", "qkv") if name in given]
    q, k, v = [tensors, [tensors[0], *tensors[-1].unbind(-3)], tensors[0].unbind(-3)][3 - len(tensors)]
    starts = [given.get(f"cu_seqlens{end}", given.get("cu_seqlens")) for end in ("_q", "_k")]
    options = given.get("softmax_scale"), given["causal"], given.get("window_size", (None, None)), "dropout_p" in given
    if starts[0] is None:
        return torch.stack([sample_attention(*x, *options) for x in zip(q, k, v, strict=True)])
    ends = [list(itertools.pairwise(x)) for x in starts]
    samples = [sample_attention(q[a:b], k[c:d], v[c:d], *options) for (a, b), (c, d) in zip(*ends, strict=True)]
    return torch.cat([*samples, q.new_zeros(len(q) - starts[0][-1], q.shape[1], v.shape[2])])


def sample_attention(q: Tensor, k: Tensor, v: Tensor, scale, causal, window, second) -> Tensor:
    """Of one sample [S, H, D]; the last query and the last key stand side by side."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    beside = torch.arange(len(k)) - torch.arange(len(q))[:, None] - (len(k) - len(q))
    left, right = (-1 if side is None else side for side in window)
    right = -1 if second and right >= len(k) else right
    seen = (beside <= 0) if causal else torch.ones_like(beside, dtype=torch.bool)
    seen = seen & (beside >= -left) if left >= 0 else seen
    seen = seen & (beside <= right) if right >= 0 else seen
    scores = torch.einsum("shd,thd->hst", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0)
    return torch.einsum("hst,thd->shd", weights, v)


def stand_in(name: str, module: str, names: list[str], compute, pair: bool = False):
    """An autograd.Function of these arguments; its backward computes again what it needs.

    With `pair` it returns statistics beside the output, as attention does.
    """

    def forward(ctx, *args):
        ctx.args = [x.detach() if isinstance(x, Tensor) else x for x in args]
        out = compute(dict(zip(names, ctx.args, strict=True)))
        if not pair:
            return out
        statistics = out.new_zeros(out.shape[:-1])
        ctx.mark_non_differentiable(statistics)
        return out, statistics

    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        moving = [x.requires_grad_(x.is_floating_point()) if isinstance(x, Tensor) else x for x in ctx.args]
        wanted = [x for x in moving if isinstance(x, Tensor) and x.requires_grad]
        with torch.enable_grad():
            out = compute(dict(zip(names, moving, strict=True)))
        found = iter(torch.autograd.grad(out, wanted, grads[:1] if pair else grads))
        return tuple(next(found) if any(x is y for y in wanted) else None for x in moving)

    forward.__signature__ = inspect.Signature(
        [inspect.Parameter(x, inspect.Parameter.POSITIONAL_OR_KEYWORD) for x in ("ctx", *names)]
    )
    body = {"forward": staticmethod(forward), "backward": staticmethod(backward), "__module__": module}
    return type(name, (torch.autograd.Function,), body)


class LowerTriangularMask:
    """What xformers' attention takes for causal."""


class Blocks:
    """One of xformers' masks that can be written out."""

    def __init__(self, seen: Tensor) -> None:
        self.seen = seen

    def materialize(self, shape, dtype, device) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device).masked_fill(~self.seen, -torch.inf)


def _memory_efficient(given: dict) -> Tensor:
    q, k, v = (given[name].flatten(2, -2).transpose(1, 2) for name in ("query", "key", "value"))
    bias, size = given["attn_bias"], (q.shape[2], k.shape[2])
    if isinstance(bias, LowerTriangularMask):
        bias = Blocks(torch.ones(size).tril().bool())
    if isinstance(bias, Blocks):
        bias = bias.materialize(size, q.dtype, q.device)
    if bias is not None and bias.ndim == 5:
        bias = bias.flatten(1, 2)
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if given["scale"] is None else given["scale"])
    o = (scores + (0 if bias is None else bias)).softmax(-1) @ v
    return o.transpose(1, 2).reshape(*given["query"].shape[:-1], v.shape[-1])


NAMES = ["op_fw", "op_bw", "query", "key", "value", "attn_bias", "p", "scale"]
_FMHA = stand_in("_fMHA", "xformers.ops.fmha", NAMES, _memory_efficient, pair=True)


def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None):
    """xformers' function, where something needs a gradient."""
    return _FMHA.apply(None, None, query, key, value, attn_bias, p, scale)[0]
