"""What is measured: each case with its shapes, its bytes and operations by formula, and its rivals.

Bytes are the least that the case must move: every input read once, every output written once, in the
precision pMF trains in (bfloat16 activations, float32 residual stream, float32 parameters). Rows that
carry a tangent are the last half of the batch, as with the published draws.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pmf import ops
from pmf.config import LOSSES, MODELS, ModelConfig
from pmf.draws import sample_draws
from pmf.layers import PatchEmbed
from pmf.private import reread_buffers
from pmf.step_plan import StepPlan

MODES = ("forward", "dual", "backward")
VALUE_ALONE = "value alone"
"""The provider that computes no tangent, on the same rows: what value and tangent together are measured by."""
BACKENDS = ("flash", "cudnn", "flash_attn_4", "flash_attn")
"""What else may compute attention's value and its gradients; see `pmf.kernels.flash`."""
Run = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """One op at one shape in one mode: what it must move, and the ways to compute it."""

    name: str
    """Op, mode and size: the key of the ledger."""
    bytes: int
    """Bytes moved at the least."""
    operations: int
    """Multiplications and additions of its matrix products."""
    providers: Callable[[torch.device], dict[str, Callable[[], Run]]]
    """Name -> what prepares the function to time: its inputs are then on the device."""
    test: str
    """The test file that must pass before a figure is recorded."""
    other_operations: dict[str, int] = field(default_factory=dict)
    """Operations of providers that compute something else, for scale."""
    other_tests: dict[str, str] = field(default_factory=dict)
    """Word in a provider's name -> one more test file that must pass before it."""

    def tests(self, provider: str | None) -> set[str]:
        """The test files that must pass before a figure of a provider is recorded."""
        return {self.test} | {test for word, test in self.other_tests.items() if word in (provider or "")}


@dataclass(frozen=True)
class Op:
    """An op with inputs at one shape: primals, which of them move, and the traffic of each mode."""

    name: str
    make: Callable[[torch.device], tuple[Tensor | None, ...]]
    """Primals."""
    moving: tuple[int, ...]
    """Places of the primals that carry a tangent."""
    traffic: dict[str, int]
    """Bytes per mode."""
    test: str
    options: dict[str, object]
    operations: dict[str, int]
    """Operations per mode; empty where there are no products."""
    constant: tuple[int, ...] = ()
    """Places of the primals that take no gradient."""
    every_row: bool = False
    """Tangents on every row, not on the last half alone."""
    rivals: dict[str, Callable] = field(default_factory=dict)
    """Other libraries' ways to compute value and tangent: (primals, tangents) -> anything."""
    variants: Callable[[str, torch.device], dict[str, Callable]] = lambda mode, device: {}
    """Of a mode, further choices of ours: name -> the context in which Triton runs."""
    value_alone: bool = False
    """Whether the value without tangent is timed beside both, as what they are measured by."""

    def cases(self, size: str) -> list[Case]:
        """One case per mode."""
        return [
            Case(
                f"{self.name} {mode} {size}",
                self.traffic[mode],
                self.operations.get(mode, 0),
                lambda device, mode=mode: self._providers(mode, device),
                self.test,
                {VALUE_ALONE: self.operations.get("forward", 0)} if self.value_alone else {},
            )
            for mode in MODES
        ]

    def _providers(self, mode: str, device: torch.device) -> dict[str, Callable[[], Run]]:
        run = getattr(ops, f"{self.name}_dual")

        def dual(primals, tangents, impl):
            with torch.autocast(device.type, dtype=torch.bfloat16):
                return run(primals, tangents, impl=impl, **self.options)

        def within(context):
            def way(primals, tangents):
                with context():
                    return dual(primals, tangents, "triton")

            return way

        compiled = torch.compile(dual)
        ways = {
            "reference": lambda *a: dual(*a, "reference"),
            "compiled reference": lambda *a: compiled(*a, "reference"),
            "triton": lambda *a: dual(*a, "triton"),
        }
        if mode == "dual" and self.value_alone:  # first: the others are measured by it
            ways = {VALUE_ALONE: lambda primals, _: dual(primals, (None,) * len(primals), "triton"), **ways}
        ways |= {name: within(context) for name, context in self.variants(mode, device).items()}
        if mode == "dual":
            ways |= self.rivals
        return {name: functools.partial(self._run, way, mode, device) for name, way in ways.items()}

    def _run(self, way: Callable, mode: str, device: torch.device) -> Run:
        primals = self.make(device)
        nothing = (None,) * len(primals)
        if mode == "forward":
            return lambda: way(primals, nothing)
        if mode == "dual":
            rows = primals[0].shape[0] // (1 if self.every_row else 2)
            dots = (torch.randn_like(p[-rows:]) if i in self.moving else None for i, p in enumerate(primals))
            tangents = tuple(dots)
            return lambda: way(primals, tangents)
        trained = [p for i, p in enumerate(primals) if p is not None and i not in self.constant]
        leaves = [p.requires_grad_() for p in trained]
        reread_buffers()
        outputs = [o for o in _flat(way(primals, nothing)[0]) if o.requires_grad]
        gradients = [torch.randn_like(o) for o in outputs]
        return lambda: torch.autograd.grad(outputs, leaves, gradients, retain_graph=True)


def _flat(result) -> list[Tensor]:
    return list(result) if isinstance(result, tuple) else [result]


def _random(device: torch.device, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(*shape, device=device, dtype=dtype)


def _traffic(tokens: int, forward: int, backward: int) -> dict[str, int]:
    """From bytes per token: half of the tokens carry a tangent, whose traffic is that of the value."""
    return {"forward": tokens * forward, "dual": tokens * forward * 3 // 2, "backward": tokens * backward}


def block_ops(config: ModelConfig, batch: int) -> list[Op]:
    """The memory-bound ops of one transformer block."""
    length, width, heads = config.sequence_length, config.hidden_size, config.num_heads
    tokens, hidden = batch * length, -(-config.mlp_width // 8) * 8
    wide, slim = torch.float32, torch.bfloat16
    norm_test = "test_kernels_norm.py"

    def adaln(device: torch.device) -> list[Tensor]:
        return [_random(device, slim, batch, width) for _ in range(3)]

    def stream(device: torch.device) -> Tensor:
        return _random(device, wide, batch, length, width)

    def branch(device: torch.device) -> Tensor:
        return _random(device, slim, batch, length, width)

    def weight(device: torch.device, size: int = width) -> Tensor:
        return _random(device, wide, size)

    def rope(device: torch.device) -> tuple[Tensor, ...]:
        tables = ops.rope_tables(config.grid_size, config.head_dim, device=device)
        qkv = _random(device, slim, batch, length, 3, heads, config.head_dim)
        return (qkv, weight(device, config.head_dim), weight(device, config.head_dim), *tables)

    return [
        Op(
            "norm_modulate",
            lambda d: (stream(d), weight(d), None, None),
            (0,),
            _traffic(tokens, 6 * width, 10 * width),
            norm_test,
            {},
            {},
        ),
        Op(
            "residual_norm_modulate",
            lambda d: (stream(d), branch(d), weight(d), weight(d), None, None),
            (0, 1),
            _traffic(tokens, 12 * width, 18 * width),
            norm_test,
            {},
            {},
        ),
        Op(
            "residual_norm_modulate",
            lambda d: (stream(d), branch(d), adaln(d)[0], weight(d), *adaln(d)[1:]),
            (0, 1, 2, 4, 5),
            _traffic(tokens, 12 * width, 18 * width),
            norm_test,
            {},
            {},
        ),
        Op(
            "qk_norm_rope",
            rope,
            (0,),
            _traffic(tokens, 8 * width, 16 * width),
            "test_kernels_rotary.py",
            {"prefix_length": config.prefix_length},
            {},
            constant=(3, 4),
        ),
        Op(
            "swiglu",
            lambda d: (_random(d, slim, batch, length, 2 * hidden),),
            (0,),
            _traffic(tokens, 6 * hidden, 10 * hidden),
            "test_kernels_swiglu.py",
            {},
            {},
        ),
    ]


def patch_op(config: ModelConfig, batch: int) -> Op:
    """Image to tokens: the image is read once, the tokens are written once."""
    width, grid, inner = config.hidden_size, config.grid_size, config.bottleneck
    image, tokens = batch * 4 * config.in_channels * config.image_size**2, batch * config.sequence_length * width * 4
    prefix = batch * config.prefix_length * width * 4
    products = 2 * batch * grid**2 * inner * (config.patch_values + width)

    def make(device: torch.device) -> tuple[Tensor, ...]:
        layer = PatchEmbed(config).to(device)
        images = torch.randn(batch, *config.image_shape, device=device)
        tokens = _random(device, torch.float32, batch, config.prefix_length, width)
        first, second = layer.proj1, layer.proj2
        weights = (first.weight, first.bias, second.weight, second.bias, layer.positions)
        return (images, *(w.detach() for w in weights), tokens)

    moved = image + tokens + prefix
    return Op(
        "patch_embed",
        make,
        (0, 6),
        {"forward": moved, "dual": moved * 3 // 2, "backward": moved},
        "test_kernels_patch.py",
        {},
        {"forward": products, "dual": products * 3 // 2, "backward": 2 * products},
        constant=(0,),
    )


def attention_variants(mode: str, device: torch.device) -> dict[str, Callable]:
    """Every backend of the value and of its gradients; other tiles of the tangent, which are meant for Hopper."""
    if device.type != "cuda":
        return {}
    if mode != "dual":
        return {f"triton, {name}": lambda name=name: ops.use_attention_backend(name) for name in BACKENDS}
    from pmf.kernels.attention import HOPPER_TILES, tangent_with

    tiles = {f"triton {t.queries}x{t.keys} w{t.warps} s{t.stages}": t for t in HOPPER_TILES}
    return {name: functools.partial(tangent_with, tile) for name, tile in tiles.items()}


def attention_op(batch: int, length: int, heads: int, head_dim: int) -> Op:
    """Attention with tangents on every row, against what other scripts use."""
    values = batch * length * heads * head_dim * 2
    products = 2 * batch * heads * length**2 * head_dim

    def make(device: torch.device) -> tuple[Tensor, ...]:
        return tuple(_random(device, torch.bfloat16, batch, length, heads, head_dim) for _ in range(3))

    def plain_jvp(primals, tangents):
        return torch.func.jvp(lambda *qkv: ops.attention(*qkv, impl="reference"), primals, tangents)

    rivals = {"plain attention, torch.func.jvp": plain_jvp}
    if importlib.util.find_spec("jvp_flash_attention") and length % 32 == 0 and head_dim in (16, 32, 64, 128):
        rivals["jvp_flash_attention"] = _jvp_flash_attention()
    return Op(
        "attention",
        make,
        (0, 1, 2),
        {"forward": 4 * values, "dual": 8 * values, "backward": 8 * values},
        "test_kernels_attention.py",
        {},
        {"forward": 2 * products, "dual": 7 * products, "backward": 5 * products},
        every_row=True,
        rivals=rivals,
        variants=attention_variants,
        value_alone=True,
    )


def _jvp_flash_attention() -> Callable:
    """The package's dual forward. It takes heads before tokens: laid out so once, outside of what is timed."""
    laid_out: list[tuple[Tensor, Tensor]] = []

    def way(primals, tangents):
        from jvp_flash_attention.jvp_attention import JVPAttn
        from torch.autograd import forward_ad

        if not laid_out:
            pairs = zip(primals, tangents, strict=True)
            laid_out.extend(tuple(x.transpose(1, 2).contiguous() for x in pair) for pair in pairs)
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(*pair) for pair in laid_out]
            return forward_ad.unpack_dual(JVPAttn.fwd_dual(*duals))

    return way


def objective_case(size: str, batch: int) -> Case:
    """The squared errors of a lean step and their gradients: tokens, tangent and guidance read once."""
    config = MODELS[size]
    draws = sample_draws(batch, (1, 1, 1), LOSSES[size], torch.Generator().manual_seed(0))
    plan = StepPlan.of(draws)
    tokens = batch * config.num_patches * config.patch_values
    # Forward: both heads in bfloat16, x in float32; on the last rows the tangent and net_c, on some net_n.
    partial = config.num_patches * config.patch_values * 2 * (2 * plan.tangent_rows + len(plan.null_rows))
    read = tokens * (2 + 2 + 4) + partial
    moved = 2 * read + tokens * 4  # backward reads the same again and writes both gradients

    def prepare(impl: str, compiled: bool, device: torch.device) -> Run:
        def random(rows: int) -> Tensor:
            return _random(device, torch.bfloat16, rows, config.num_patches, config.patch_values)

        heads = [random(batch).requires_grad_() for _ in range(2)]
        rest = (random(plan.tangent_rows), random(plan.tangent_rows), random(len(plan.null_rows)))
        z, x = (torch.randn(batch, *config.image_shape, device=device) for _ in range(2))
        scalars = [v.to(device) for v in (draws.t, draws.t - draws.r, plan.guidance, plan.null_index())]

        def objective(*inputs):
            options = dict(t_clip=config.t_clip, patch_size=config.patch_size, impl=impl)
            return ops.pmf_objective(*inputs, **options)

        way = torch.compile(objective) if compiled else objective

        def run():
            loss_u, loss_v = way(*heads, *rest, z, x, *scalars)
            return torch.autograd.grad((loss_u + loss_v).sum(), heads)

        return run

    def providers(device: torch.device) -> dict[str, Callable[[], Run]]:
        ways = {
            "reference": ("reference", False),
            "compiled reference": ("reference", True),
            "triton": ("triton", False),
        }
        return {name: functools.partial(prepare, *way, device) for name, way in ways.items()}

    name = f"pmf_objective step {size.removeprefix('pMF-')}"
    return Case(name, moved, 0, providers, "test_kernels_objective.py")


LONG = ((1024, 64), (4096, 64), (1024, 128), (4096, 128))
"""(length, head_dim) of attention beyond pMF's own."""


def op_cases(sizes: tuple[str, ...] = ("pMF-B/16", "pMF-L/16", "pMF-H/16"), batch: int = 64) -> list[Case]:
    """Every op at the shapes of these presets."""
    cases = []
    for size in sizes:
        for op in block_ops(MODELS[size], batch):
            adaln = " adaln" if op.name == "residual_norm_modulate" and 2 in op.moving else ""
            cases += op.cases(size.removeprefix("pMF-") + adaln)
        config, name = MODELS[size], size.removeprefix("pMF-")
        cases += patch_op(config, batch).cases(name)
        own = attention_op(batch, config.sequence_length, config.num_heads, config.head_dim)
        cases += [*own.cases(name), objective_case(size, batch)]
    return cases


def long_attention_cases() -> list[Case]:
    """Attention beyond pMF's own lengths and head widths."""
    shapes = ((max(1, 16384 // length), length, head_dim) for length, head_dim in LONG)
    return [
        case
        for batch, length, head_dim in shapes
        for case in attention_op(batch, length, 16, head_dim).cases(f"S {length} D {head_dim}")
    ]
