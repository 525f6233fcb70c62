"""Optimizer state and averages that are sharded over ranks while the network is replicated (ZeRO-1)."""

import copy
import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import pmf
from pmf.optim import EMA, Averages, Muon, NesterovAdam, OptimizerConfig, build_optimizers
from pmf.sharded import full, local, shard
from tests.train.test_distributed import free_port

RANKS = 4
ROWS = (1, 2, 3, 4, 5, 7, 8, 9)
"""Fewer than ranks, as many, and so many that a rank has fewer rows than others or none (5)."""


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    model = torch.nn.ModuleList([torch.nn.Linear(6, rows) for rows in ROWS for _ in range(3)])
    model.scalar = torch.nn.Parameter(torch.randn(()))
    model.none = torch.nn.Parameter(torch.randn(0, 3))
    model.turned = torch.nn.Parameter(torch.randn(6, 9).T)  # not contiguous
    return model


def steps(mesh, shard_over, count=4):
    """The network, its optimizers and an average after some steps, in which not every parameter has a gradient."""
    model = network()
    optimizers = build_optimizers(model, OptimizerConfig(learning_rate=0.1), mesh, shard_over)
    averages = Averages(model, (1.0,), every=2, shard_over=shard_over, background=shard_over is not None)
    go_on(model, optimizers, averages, 0, count)
    return model, optimizers, averages["ema_1"]


def go_on(model, optimizers, averages, first, last):
    """Take steps `first` to `last`."""
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        for i, p in enumerate(model.parameters()):
            gradient = torch.randn(p.shape, generator=generator)
            p.grad = gradient if i % 5 or step % 2 else None
        averages.before_step()
        for part in optimizers.values():
            part.step()
        averages.update(model, 8, 8 * (step + 1))


def check_loading(mesh, rank):
    """A replicated state goes on sharded, and a sharded one replicated, with the same results."""
    expected = values(*steps(mesh, None, count=6))
    for first, then in (((mesh, None), (None, mesh)), ((None, mesh), (mesh, None))):
        model, before, _ = steps(*first)
        after = build_optimizers(model, OptimizerConfig(learning_rate=0.1), *then)
        for name, part in after.items():
            part.load_state_dict(before[name].state_dict())
        go_on(model, after, Averages(model, ()), 4, 6)
        for name, p in model.named_parameters():
            assert torch.equal(p, expected[f"weight {name}"]), name
            for key, value in next((part.state[p] for part in after.values() if p in part.state), {}).items():
                whole = expected[f"{key} {name}"]
                check_share(whole, value, rank) if then[1] else check_same(whole, value)


def check_same(whole, value):
    assert not isinstance(value, DTensor) and torch.equal(value, whole)


def values(model, optimizers, ema):
    """Everything that changes, whole."""
    held = {f"weight {name}": p.detach() for name, p in model.named_parameters()}
    held |= {f"average {name}": full(value) for name, value in ema.average.items()}
    for name, p in model.named_parameters():
        states = [part.state[p] for part in optimizers.values() if p in part.state]
        held |= {f"{key} {name}": full(value) for state in states for key, value in state.items()}
    return held


def check_share(whole, part, rank):
    """`part` holds this rank's rows of `whole` alone, as torch.chunk divides them."""
    if whole.ndim == 0 or len(whole) < RANKS:
        assert not isinstance(part, DTensor) and torch.equal(part, whole)
        return
    assert isinstance(part, DTensor) and part.placements == (Shard(0),)
    rows = (*whole.chunk(RANKS), *[whole[:0]] * RANKS)[rank]
    assert torch.equal(local(part), rows) and local(part).untyped_storage().nbytes() == rows.nbytes


def check_refusals(mesh, square):
    """What cannot be sharded is named in one line."""
    model = network()
    sharded = [torch.nn.Parameter(distribute_tensor(torch.ones(8, 2), mesh, [Shard(0)]))]
    kinds = (lambda p, m: Muon(p, lr=1, shard_over=m), lambda p, m: NesterovAdam(p, lr=1, shard_over=m))
    for kind in kinds:
        with pytest.raises(pmf.InputError, match="shard_over: expected replicated parameters, got sharded ones"):
            kind(sharded, mesh)
        with pytest.raises(pmf.InputError, match="shard_over: expected a mesh of one dimension, got 2"):
            kind(model.parameters(), square)
    with pytest.raises(pmf.InputError, match="shard_over: expected a mesh of one dimension, got 2"):
        EMA(model, 1, shard_over=square)
    with pytest.raises(pmf.InputError, match="shard_over: expected no other mesh beside it"):
        Muon(model.parameters(), lr=1, mesh=square, shard_over=mesh)


def worker(rank, port):
    os.environ |= dict(RANK=str(rank), WORLD_SIZE=str(RANKS), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (RANKS,))
    replicated, sharded = steps(mesh, None), steps(None, mesh)
    expected, found = values(*replicated), values(*sharded)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    for name, p in sharded[0].named_parameters():
        check_share(expected[f"average {name}"], sharded[2].average[name], rank)
        for part in sharded[1].values():
            for key, value in part.state.get(p, {}).items():
                check_share(expected[f"{key} {name}"], value, rank)  # a step count is a scalar
    assert all(copy.deepcopy(part).shard_over == mesh for part in sharded[1].values())
    whole = torch.arange(10.0).view(5, 2)
    assert torch.equal(shard(whole, mesh).full_tensor(), whole) and shard(whole, None) is whole
    assert local(shard(whole, mesh)).data_ptr() == whole[2 * rank :].data_ptr() or rank == 3  # a view
    check_loading(mesh, rank)
    check_refusals(mesh, init_device_mesh("cpu", (2, 2)))
    dist.destroy_process_group()
    os._exit(0)  # for the reason given in train/__main__.py


def test_sharded_state_gives_the_results_of_replicated_state_bit_for_bit():
    mp.spawn(worker, (free_port(),), nprocs=RANKS)
