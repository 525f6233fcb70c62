"""`pmf.jvp` of networks that DDP or FSDP2 wraps, in two processes, and under torch.compile."""

import os

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import pmf
from pmf import layers, ops
from pmf.counting import saved_bytes
from tests.pmf.jvp_checks import PARTITIONED, drawn


class Block(nn.Module):
    """A transformer block of fused layers with adaLN modulation."""

    def __init__(self, width):
        super().__init__()
        self.norm1 = layers.NormModulate(width, kind="layer", elementwise_affine=True)
        self.norm2 = layers.NormModulate(width, kind="layer", elementwise_affine=True)
        self.modulation, self.qkv = nn.Linear(width, 6 * width), nn.Linear(width, 3 * width)
        self.out, self.up, self.down = nn.Linear(width, width), nn.Linear(width, 4 * width), nn.Linear(2 * width, width)

    def forward(self, x, c):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(F.silu(c)).chunk(6, -1)
        q, k, v = self.qkv(self.norm1(x, scale1, shift1)).unflatten(-1, (3, 2, -1)).unbind(2)
        x = x + gate1[:, None] * self.out(ops.attention(q, k, v).flatten(2))
        return x + gate2[:, None] * self.down(ops.swiglu(self.up(self.norm2(x, scale2, shift2))))


class FusedDiT(nn.Module):
    """A DiT of fused layers: z [B, 3, H, W], t and r [B]."""

    def __init__(self, width=32, depth=2):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Conv2d(3, width, 4, stride=4), nn.Linear(width, 48)
        self.time, self.span = layers.ScalarEmbedder(width), layers.ScalarEmbedder(width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.double()

    def forward(self, z, t, r):
        side = z.shape[-1] // 4
        x, c = self.embed(z).flatten(2).transpose(1, 2), self.time(t) + self.span(t - r)
        for block in self.blocks:
            x = block(x, c)
        x = self.head(x).unflatten(1, (side, side)).unflatten(-1, (3, 4, 4))
        return x.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


def batch(samples=4, side=16):
    generator = torch.Generator().manual_seed(3)
    z, v = (torch.randn(samples, 3, side, side, dtype=torch.float64, generator=generator) for _ in range(2))
    t = torch.rand(samples, dtype=torch.float64, generator=generator)
    return z, v, t, t / 2


def step(network, z, v, t, r):
    u, du = pmf.jvp(network, (z, t, r), (v, 1, 0))
    (u + (t - r)[:, None, None, None] * du - v).square().mean().backward()
    return u, du


def gradients(network):
    return [p.grad for p in network.parameters()]


def wrapped(kind, network):
    if kind == "fsdp":
        mesh = init_device_mesh("cpu", (2,))
        for block in network.blocks:
            fully_shard(block, mesh=mesh)
        return fully_shard(network, mesh=mesh)
    return DistributedDataParallel(network, static_graph=kind == "static", find_unused_parameters=kind == "unused")


def work(rank, kind, store):
    """One process: its half of the batch, and the gradients of both halves compared with those of one process."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    network = FusedDiT()
    outer = wrapped(kind, network)
    half = [x[2 * rank : 2 * rank + 2] for x in batch()]
    if kind == "unused":
        with pytest.raises(pmf.InputError, match="expected find_unused_parameters=False"):
            step(outer, *half)
    else:
        step(lambda *given: outer(*given), *half)
        got = [g.full_tensor() if kind == "fsdp" else g for g in gradients(network)]
        alone = FusedDiT()
        step(alone, *batch())
        for a, b in zip(got, gradients(alone), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    dist.barrier()
    os._exit(0)  # DTensor's caches keep the process group, whose threads would outlive it


@pytest.mark.parametrize("kind", ["ddp", "static", "unused", "fsdp"])
def test_two_processes_have_the_gradients_of_one(kind, tmp_path):
    torch.multiprocessing.spawn(work, (kind, tmp_path / "store"), nprocs=2)


@pytest.mark.parametrize("compiled", ["whole call", "blocks"])
def test_compiled_without_break_it_is_equal_and_saves_the_bytes_of_the_compiled_forward(compiled):
    torch._dynamo.reset()
    eager, network = FusedDiT(), FusedDiT()
    z, v, t, r = batch()
    expected = step(eager, z, v, t, r)
    forward, call = network, lambda: pmf.jvp(network, (z, t, r), (v, 1, 0))
    if compiled == "blocks":
        for block in network.blocks:
            block.compile(**PARTITIONED)
    else:
        forward, call = torch.compile(forward, **PARTITIONED), torch.compile(call, **PARTITIONED)
    plain = saved_bytes(lambda: forward(z, t, r), network.parameters())
    assert saved_bytes(call, network.parameters()) <= 1.02 * plain
    u, du = call()
    (u + (t - r)[:, None, None, None] * du - v).square().mean().backward()
    for a, b in zip([u, du, *gradients(network)], [*expected, *gradients(eager)], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("register", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_backward_hooks_of_a_submodule(register):
    def network():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 6), nn.SiLU(), nn.Linear(6, 6)).double()

    plain, hooked = network(), network()
    getattr(hooked[1], register)(lambda module, *gradients: (2 * gradients[0][0],))
    x, v = drawn(3, 6).requires_grad_(), drawn(3, 6, seed=1)
    out, dot = pmf.jvp(hooked, (x,), (v,))
    assert torch.equal(out, plain(x))
    torch.testing.assert_close(dot, torch.func.jvp(plain, (x.detach(),), (v,))[1])
    (got,), (expected,) = torch.autograd.grad(out.sum(), x), torch.autograd.grad(hooked(x).sum(), x)
    assert torch.equal(got, expected)
