"""MeanFlow training steps of networks that are not pMF: `pmf.jvp` against the ways that scripts take du/dt."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import pmf
from pmf.benchmarks.cases import Case
from pmf.benchmarks.networks import DiT, UNet
from pmf.benchmarks.step_cases import JOINT
from pmf.counting import live_bytes
from pmf.timing import Run

NETWORKS: dict[str, Callable[[], Any]] = {
    "DiT-B/4": DiT,
    "UNet": UNet,
    "DiT small": partial(DiT, width=192, depth=3, heads=3),
    "UNet small": partial(UNet, width=32, blocks=1, heads=1, side=16),
}
FULL_SIZE = "DiT-B/4", "UNet"
PLAIN = "plain forward"
Differentiate = Callable[[nn.Module, tuple[Tensor, ...], Tensor], tuple[Tensor, Tensor | None]]
"""u and du/dt, None for zero, of a network at (z, t, r) along (v, 1, 0)."""


def plain(network: nn.Module, inputs: tuple[Tensor, ...], v: Tensor) -> tuple[Tensor, None]:
    """Flow matching: no tangent."""
    return network(*inputs), None


def by_pmf_jvp(network: nn.Module, inputs: tuple[Tensor, ...], v: Tensor) -> tuple[Tensor, Tensor]:
    """`pmf.jvp` of the unmodified network."""
    u, du_dt = pmf.jvp(network, inputs, (v, 1, 0))
    return u, du_dt


def explicit(network: Any, inputs: tuple[Tensor, ...], v: Tensor) -> tuple[Tensor, Tensor | None]:
    """The network's own `forward_dual`."""
    z, t, r = inputs
    return network.forward_dual(pmf.Dual(z, v), pmf.Dual(t, torch.ones_like(t)), pmf.Dual(r))


def joint(network: nn.Module, inputs: tuple[Tensor, ...], v: Tensor) -> tuple[Tensor, Tensor]:
    """`torch.func.jvp`; fused attention has no forward mode in PyTorch."""
    (_, t, r), jvp = inputs, cast(Callable[..., Any], torch.func.jvp)
    with sdpa_kernel(SDPBackend.MATH):
        u, du_dt = jvp(network, inputs, (v, torch.ones_like(t), torch.zeros_like(r)))
    return u, du_dt.detach()


def two_passes(network: nn.Module, inputs: tuple[Tensor, ...], v: Tensor) -> tuple[Tensor, Tensor]:
    """`torch.func.jvp` without gradient for du/dt, then a recorded forward pass for u."""
    with torch.no_grad():
        _, du_dt = joint(network, inputs, v)
    return network(*inputs), du_dt


WAYS: dict[str, Differentiate] = {
    PLAIN: plain,
    "pmf.jvp": by_pmf_jvp,
    "explicit duals": explicit,
    JOINT: joint,
    "jvp without gradient, second forward": two_passes,
}


class MeanFlowStep:
    """Forward and backward of one batch, under bfloat16 autocast on CUDA; the gradients are dropped."""

    def __init__(self, network: nn.Module, differentiate: Differentiate, z: Tensor, v: Tensor, t: Tensor, r: Tensor):
        self.network, self.differentiate, self.inputs, self.v = network, differentiate, (z, t, r), v

    def loss(self) -> Tensor:
        """The squared error of V = u + (t - r) stopgrad(du/dt) against v (arXiv 2505.13447)."""
        z, t, r = self.inputs
        with torch.autocast(z.device.type, dtype=torch.bfloat16, enabled=z.is_cuda):
            u, du_dt = self.differentiate(self.network, self.inputs, self.v)
        target = self.v if du_dt is None else self.v - (t - r)[:, None, None, None] * du_dt
        return (u - target).square().mean()

    def __call__(self) -> None:
        """Run the step."""
        self.loss().backward()
        self.network.zero_grad()

    def held_bytes(self) -> int:
        """Bytes alive between forward and backward."""
        if not self.v.is_cuda:
            return live_bytes(self.loss).end
        before = torch.cuda.memory_allocated(self.v.device)
        loss = self.loss()
        held = torch.cuda.memory_allocated(self.v.device) - before
        del loss
        return held


def meanflow_step(
    size: str, batch: int, device: torch.device, differentiate: Differentiate, compiled: bool = False
) -> Run:
    """The step of one network by one way to differentiate; the same weights and inputs each time."""
    if compiled:
        differentiate = torch.compile(differentiate, fullgraph=True)
    torch.manual_seed(0)
    network = NETWORKS[size]()
    z, v = torch.randn(2, batch, *network.shape)
    t, r = torch.rand(2, batch).sort(0, descending=True).values
    return MeanFlowStep(network.to(device), differentiate, *(x.to(device) for x in (z, v, t, r)))


def network_case(size: str, batch: int, device: torch.device) -> Case:
    """The step of one network; the UNet is not written with explicit duals.

    Compiled ways only on CUDA: on a CPU the peak of live tensors is counted by a mode that compilers do not take.
    """
    ways = {name: way for name, way in WAYS.items() if "DiT" in size or way is not explicit}
    step = partial(meanflow_step, size, batch, device)
    providers = {name: partial(step, way) for name, way in ways.items()}
    if device.type == "cuda":
        providers |= {f"{name}, compiled": partial(step, way, compiled=True) for name, way in ways.items()}
    attention, norm = "kernels/test_attention.py", "kernels/test_norm.py"
    tests = {"": "pmf/test_jvp.py", "pmf.jvp": attention, "duals": attention, "explicit": norm}
    tests["compiled"] = "pmf/test_jvp_compiled.py"
    return Case(f"MeanFlow {size} batch {batch}", providers, tests)
