"""What is measured: each case with its shapes, its bytes and operations by formula, and its rivals.

Bytes are the least that the case must move: every input read once, every output written once, in the
precision pMF trains in (bfloat16 activations, float32 residual stream, float32 parameters). Rows that
carry a tangent are the last half of the batch, as with the published draws.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pmf import ops
from pmf.config import MODELS, ModelConfig

MODES = ("forward", "dual", "backward")
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

    def cases(self, size: str) -> list[Case]:
        """One case per mode."""
        return [
            Case(
                f"{self.name} {mode} {size}",
                self.traffic[mode],
                self.operations.get(mode, 0),
                lambda device, mode=mode: self._providers(mode, device),
                self.test,
            )
            for mode in MODES
        ]

    def _providers(self, mode: str, device: torch.device) -> dict[str, Callable[[], Run]]:
        run = getattr(ops, f"{self.name}_dual")

        def dual(primals, tangents, impl):
            with torch.autocast(device.type, dtype=torch.bfloat16):
                return run(primals, tangents, impl=impl, **self.options)

        compiled = torch.compile(dual)
        ways = {
            "reference": lambda *a: dual(*a, "reference"),
            "compiled reference": lambda *a: compiled(*a, "reference"),
            "triton": lambda *a: dual(*a, "triton"),
        }
        return {name: functools.partial(self._run, way, mode, device) for name, way in ways.items()}

    def _run(self, way: Callable, mode: str, device: torch.device) -> Run:
        primals = self.make(device)
        nothing = (None,) * len(primals)
        if mode == "forward":
            return lambda: way(primals, nothing)
        if mode == "dual":
            rows = primals[0].shape[0] // 2
            dots = (torch.randn_like(p[-rows:]) if i in self.moving else None for i, p in enumerate(primals))
            tangents = tuple(dots)
            return lambda: way(primals, tangents)
        trained = [p for i, p in enumerate(primals) if p is not None and i not in self.constant]
        leaves = [p.requires_grad_() for p in trained]
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
    adaln = lambda d: [_random(d, slim, batch, width) for _ in range(3)]  # noqa: E731
    norm_test = "test_kernels_norm.py"

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


def op_cases(sizes: tuple[str, ...] = ("pMF-B/16", "pMF-L/16", "pMF-H/16"), batch: int = 64) -> list[Case]:
    """Every op of the block at the shapes of these presets."""
    cases = []
    for size in sizes:
        for op in block_ops(MODELS[size], batch):
            adaln = " adaln" if op.name == "residual_norm_modulate" and 2 in op.moving else ""
            cases += op.cases(size.removeprefix("pMF-") + adaln)
    return cases
