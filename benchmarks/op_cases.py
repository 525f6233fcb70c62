"""Every op at the shapes of a block: inputs, bytes and operations by formula, and the rival implementations.

Bytes count every input read once and every output written once, in pMF's training precision (bfloat16 activations,
float32 residual stream and parameters). The last half of the batch carries a tangent, as with the published draws.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from pmf import ops
from pmf.benchmarks.cases import Case
from pmf.config import LOSSES, MODELS, ModelConfig
from pmf.draws import sample_draws
from pmf.pair import Dual
from pmf.private import reread_buffers
from pmf.step_plan import StepPlan
from pmf.timing import Run

MODES = ("forward", "dual", "backward")
VALUE_ALONE = "value alone"
"""The provider that computes no tangent: the denominator for the cost of value and tangent together."""
BACKENDS = ("flash", "cudnn", "flash_attn_4", "flash_attn")
"""The backends of attention's value and gradients; see `pmf.kernels.flash`."""
LONG = ((1024, 64), (4096, 64), (1024, 128), (4096, 128))
"""(length, head_dim) of attention beyond pMF's own."""
WIDE, SLIM = torch.float32, torch.bfloat16
Primals = tuple[Any, ...]
"""Tensors; None for an input that is left out, and for a tangent of zero."""
Way = Callable[..., Any]
"""Maps primals and tangents to a value, or to value and tangent."""


@dataclass(frozen=True)
class Op:
    """An op at one shape; bytes and operations by mode."""

    name: str
    inputs: tuple[tuple[Any, ...] | None, ...]
    """(dtype, *shape) of each."""
    moving: tuple[int, ...]
    """Indices of the inputs that carry a tangent."""
    bytes: tuple[int, int, int]
    test: str
    operations: tuple[int, int, int] = (0, 0, 0)
    constant: tuple[int, ...] = ()
    """Indices of the inputs that take no gradient."""
    every_row: bool = False
    """Tangents on every row, not only on the last half."""
    options: dict[str, Any] = field(default_factory=dict)
    lengths: tuple[int, ...] = ()
    """Attention's key_lengths."""
    label: str = ""
    """Tells apart two entries of the same op."""

    def cases(self, size: str, device: torch.device, **more: dict[str, Way]) -> list[Case]:
        """One case per mode; `more`: further providers, by mode."""
        found = []
        for mode, moved, operations in zip(MODES, self.bytes, self.operations, strict=True):
            ways: dict[str, Way] = {
                "reference": partial(self.run, impl="reference"),
                "compiled reference": partial(torch.compile(self.run), impl="reference"),
                "triton": self.run,
                **more.get(mode, {}),
            }
            providers = {name: partial(self.prepare, way, mode, device) for name, way in ways.items()}
            rated = {"": operations, VALUE_ALONE: self.operations[0]}
            found.append(Case(f"{self.name} {mode} {size}{self.label}", providers, {"": self.test}, moved, rated))
        return found

    def run(self, primals: Primals, tangents: Primals, impl: str = "triton") -> Any:
        """Call our op under bfloat16 autocast, as in training; with tangents it also gives tangents."""
        inputs = [p if p_dot is None else Dual(p, p_dot) for p, p_dot in zip(primals, tangents, strict=True)]
        device, options = primals[0].device, self.options
        if self.lengths:
            options = options | {"key_lengths": placed(self.lengths, device)}
        with torch.autocast(device.type, dtype=torch.bfloat16):
            return getattr(ops, self.name)(*inputs, impl=impl, **options)

    def prepare(self, way: Way, mode: str, device: torch.device) -> Run:
        """Make the inputs and return the function to time."""
        primals: Primals = tuple(s and torch.randn(s[1:], dtype=s[0], device=device) for s in self.inputs)
        still = (None,) * len(primals)
        if mode == "forward":
            return lambda: way(primals, still)
        if mode == "dual":
            rows = len(primals[0]) // (1 if self.every_row else 2)
            tangents = tuple(torch.randn_like(p[-rows:]) if i in self.moving else None for i, p in enumerate(primals))
            return lambda: way(primals, tangents)
        leaves = [p.requires_grad_() for i, p in enumerate(primals) if p is not None and i not in self.constant]
        reread_buffers()
        values = way(primals, still)
        outputs = [y for y in (values if isinstance(values, tuple) else (values,)) if y.requires_grad]
        gradients = [torch.randn_like(y) for y in outputs]
        return lambda: torch.autograd.grad(outputs, leaves, gradients, retain_graph=True)


def with_tangents(forward: int, backward: int) -> tuple[int, int, int]:
    """Counts by mode: half of the rows carry a tangent, which costs as much as its value."""
    return forward, forward * 3 // 2, backward


def block_ops(config: ModelConfig, batch: int) -> list[Op]:
    """The memory-bound ops of one transformer block."""
    width, heads, head_dim = config.hidden_size, config.num_heads, config.head_dim
    rows, hidden = (batch, config.sequence_length), -(-config.mlp_width // 8) * 8
    stream, branch, vector, weight = (WIDE, *rows, width), (SLIM, *rows, width), (SLIM, batch, width), (WIDE, width)
    head_weight, table = (WIDE, head_dim), (WIDE, config.num_patches, head_dim // 2)
    qkv = ((SLIM, *rows, 3, heads, head_dim), head_weight, head_weight, table, table)

    def per_token(forward: int, backward: int) -> tuple[int, int, int]:
        return with_tangents(rows[0] * rows[1] * forward, rows[0] * rows[1] * backward)

    norm, residual = per_token(6 * width, 10 * width), per_token(12 * width, 18 * width)
    rotation, gating = per_token(8 * width, 16 * width), per_token(6 * hidden, 10 * hidden)
    activation, tokens = per_token(16 * width, 24 * width), per_token(18 * width, 30 * width)
    per_channel = (stream, branch, weight, weight, None, None)
    per_sample = (stream, branch, vector, weight, vector, vector)
    each_token = (stream, branch, branch, weight, branch, branch)
    test, prefix = "kernels/test_norm.py", {"prefix_length": config.prefix_length}
    return [
        Op("norm_modulate", (stream, weight, None, None), (0,), norm, test),
        Op("residual_norm_modulate", per_channel, (0, 1), residual, test),
        Op("residual_norm_modulate", per_sample, (0, 1, 2, 4, 5), residual, test, label=" adaln"),
        Op("residual_norm_modulate", each_token, (0, 1, 2, 4, 5), tokens, test, label=" per token"),
        Op("qk_norm_rope", qkv, (0,), rotation, "kernels/test_rotary.py", constant=(3, 4), options=prefix),
        *other_heads(config, batch),
        Op("swiglu", ((SLIM, *rows, 2 * hidden),), (0,), gating, "kernels/test_pointwise.py"),
        Op("gelu", ((SLIM, *rows, 4 * width),), (0,), activation, "kernels/test_pointwise.py"),
    ]


def other_heads(config: ModelConfig, batch: int) -> list[Op]:
    """The heads of other networks, at this one's shapes."""
    heads, head_dim, length = config.num_heads, config.head_dim, config.sequence_length
    kv_heads, table = max(heads // 4, 1), (WIDE, length, head_dim // 2)

    def op(label: str, weight: int, q: int, k: int, **options: Any) -> Op:
        packed = (q + 2 * k,) if "num_kv_heads" in options else (3, q)
        qkv, values = (SLIM, batch, length, *packed, head_dim), 2 * batch * length * head_dim
        inputs, moved = (qkv, (WIDE, weight), (WIDE, weight), table, table), with_tangents(2 * (q + k), 3 * q + 5 * k)
        counted = (values * moved[0], values * moved[1], values * moved[2])
        test = "kernels/test_rotary_forms.py"
        return Op("qk_norm_rope", inputs, (0,), counted, test, constant=(3, 4), options=options, label=label)

    return [
        op(" layer half", head_dim, heads, heads, norm="layer", pairs="half"),
        op(" grouped", head_dim, heads, kv_heads, num_kv_heads=kv_heads),
        op(" across heads", heads * head_dim, heads, heads, across_heads=True),
    ]


def patch_op(config: ModelConfig, batch: int) -> Op:
    """Image to tokens: reads the image and the prefix once, writes the tokens once."""
    width, inner, p, prefix = config.hidden_size, config.bottleneck, config.patch_size, config.prefix_length
    first, second = (WIDE, inner, config.in_channels, p, p), (WIDE, width, inner, 1, 1)
    images, positions = (WIDE, batch, *config.image_shape), (WIDE, config.sequence_length, width)
    inputs = (images, first, (WIDE, inner), second, (WIDE, width), positions, (WIDE, batch, prefix, width))
    moved = 4 * batch * (config.in_channels * config.image_size**2 + (config.sequence_length + prefix) * width)
    products = 2 * batch * config.num_patches * inner * (config.patch_values + width)
    operations, test = with_tangents(products, 2 * products), "kernels/test_patch.py"
    return Op("patch_embed", inputs, (0, 6), with_tangents(moved, moved), test, operations, constant=(0,))


@lru_cache(maxsize=2)
def placed(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Lengths as a tensor, cached so that the copy is not timed."""
    return torch.tensor(lengths, dtype=torch.int32, device=device)


def attention_op(
    batch: int, length: int, heads: int, head_dim: int, groups: int, causal: bool = False, lengths: tuple[int, ...] = ()
) -> Op:
    """Attention with tangents on every row. Only keys that are read count; all gradients are written."""
    each = lengths or (length,) * batch
    read = sum(each)
    queries, keys, written = (
        2 * head_dim * n for n in (batch * length * heads, read * groups, batch * length * groups)
    )
    pairs = sum(n * length - (n * (n - 1) // 2 if causal else 0) for n in each)
    products = 2 * heads * pairs * head_dim
    moved = 2 * (queries + keys), 4 * (queries + keys), 4 * queries + 2 * (keys + written)
    options: dict[str, Any] = {"causal": True} if causal else {}
    kinds = [
        *(["causal"] if causal else []),
        *(["grouped"] if groups < heads else []),
        *(["lengths"] if lengths else []),
    ]
    if groups < heads:
        options["enable_gqa"] = True
    row = (SLIM, batch, length)
    return Op(
        "attention", ((*row, heads, head_dim), *((*row, groups, head_dim),) * 2), (0, 1, 2), moved,
        f"kernels/test_{'masked_' if kinds else ''}attention.py", (2 * products, 7 * products, 5 * products),
        every_row=True, options=options, lengths=lengths, label="".join(f" {kind}" for kind in kinds),
    )  # fmt: skip


def attention_cases(
    name: str, batch: int, length: int, heads: int, head_dim: int, device: torch.device, *, groups: int = 0, **kind: Any
) -> list[Case]:
    """Attention on each backend and tile, and by rivals; `groups` (0: `heads`), `kind`: see `attention_op`."""
    from pmf.kernels.attention import HOPPER_TILES, tangent_with

    op = attention_op(batch, length, heads, head_dim, groups or heads, **kind)
    on_gpu = device.type == "cuda"
    backends = {f"triton, {b}": ops.use_attention_backend(b)(op.run) for b in BACKENDS if on_gpu and not op.lengths}
    tiles = {f"triton {t.queries}x{t.keys} w{t.warps} s{t.stages}": t for t in HOPPER_TILES if on_gpu}
    dual: dict[str, Way] = {VALUE_ALONE: lambda primals, tangents: op.run(primals, (None,) * 3)}
    dual |= {name: tangent_with(tile)(op.run) for name, tile in tiles.items()}
    if op.label:
        return op.cases(name, device, forward=backends, dual=dual, backward=backends)
    dual["plain attention, torch.func.jvp"] = partial(torch.func.jvp, partial(ops.attention, impl="reference"))
    if importlib.util.find_spec("jvp_flash_attention") and length % 32 == 0 and head_dim in (16, 32, 64, 128):
        dual["jvp_flash_attention"] = jvp_flash_attention
    return op.cases(name, device, forward=backends, dual=dual, backward=backends)


def jvp_flash_attention(primals: Primals, tangents: Primals) -> object:
    """The dual forward pass of the package jvp_flash_attention."""
    from jvp_flash_attention.jvp_attention import JVPAttn

    with forward_ad.dual_level():
        pairs = zip(primals, tangents, strict=True)
        duals = [forward_ad.make_dual(heads_first(x), heads_first(x_dot)) for x, x_dot in pairs]
        return forward_ad.unpack_dual(JVPAttn.fwd_dual(*duals))


@lru_cache(maxsize=6)
def heads_first(x: Tensor) -> Tensor:
    """[B, S, H, D] -> [B, H, S, D], cached so that it is not timed."""
    return x.transpose(1, 2).contiguous()


def objective_case(size: str, batch: int, device: torch.device) -> Case:
    """The squared errors of a lean step and their gradients; tokens, tangent and guidance are read once."""
    config = MODELS[size]
    draws = sample_draws(batch, (1, 1, 1), LOSSES[size], torch.Generator().manual_seed(0))
    plan = StepPlan.of(draws)
    values = config.num_patches * config.patch_values
    # Forward reads both heads in bfloat16 and x in float32, the tangent and net_c on the last rows, net_n on some.
    read = batch * values * (2 + 2 + 4) + values * 2 * (2 * plan.tangent_rows + len(plan.null_rows))
    moved = 2 * read + batch * values * 4  # backward reads the same and writes both gradients

    def objective(*inputs: Tensor, impl: str = "triton") -> tuple[Tensor, Tensor]:
        return ops.pmf_objective(*inputs, t_clip=config.t_clip, patch_size=config.patch_size, impl=impl)

    def prepare(way: Way) -> Run:
        rows = (batch, batch, plan.tangent_rows, plan.tangent_rows, len(plan.null_rows))
        shape = (config.num_patches, config.patch_values)
        tokens = [torch.randn(n, *shape, device=device, dtype=torch.bfloat16) for n in rows]
        heads = [head.requires_grad_() for head in tokens[:2]]
        z, x = (torch.randn(batch, *config.image_shape, device=device) for _ in range(2))
        scalars = [v.to(device) for v in (draws.t, draws.t - draws.r, plan.guidance, plan.null_index())]

        def run() -> tuple[Tensor, ...]:
            loss_u, loss_v = way(*tokens, z, x, *scalars)
            return torch.autograd.grad((loss_u + loss_v).sum(), heads)

        return run

    ways = {"reference": objective, "compiled reference": torch.compile(objective)}
    providers = {name: partial(prepare, partial(way, impl="reference")) for name, way in ways.items()}
    providers["triton"] = partial(prepare, objective)
    name = f"pmf_objective step {size.removeprefix('pMF-')}"
    return Case(name, providers, {"": "kernels/test_objective.py"}, moved)


def op_cases(size: str, batch: int, device: torch.device) -> list[Case]:
    """Every op at the shapes of a preset."""
    config, name = MODELS[size], size.removeprefix("pMF-")
    simple = [case for op in (*block_ops(config, batch), patch_op(config, batch)) for case in op.cases(name, device)]
    attention = (batch, config.sequence_length, config.num_heads, config.head_dim, device)
    return [*simple, *attention_cases(name, *attention), objective_case(size, batch, device)]


def long_attention_cases(device: torch.device) -> list[Case]:
    """Attention at lengths and head widths that pMF does not use, 16384 tokens at a time; at the last also masked."""
    shapes = [(f"S {length} D {d}", 16384 // length, length, 16, d, device) for length, d in LONG]
    kinds: list[dict[str, Any]] = [{"causal": True}, {"groups": 4, "lengths": (1024, 2048, 3072, 4096)}]
    masked = [case for kind in kinds for case in attention_cases(*shapes[-1], **kind)]
    return [*(case for shape in shapes for case in attention_cases(*shape)), *masked]
