"""Several gloo processes against one: gradients, updates, averages, draws and runs."""

from __future__ import annotations

import dataclasses
import os
import socket
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

import pmf
from pmf.train.config import RunConfig
from pmf.train.data import ImageSet
from pmf.train.distributed import full, join, whole
from pmf.train.loop import Trainer
from pmf.train.optim import OptimizerConfig
from tests.networks import TINY

ROWS = 8


def data():
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(24, *TINY.image_shape, generator=generator) * 2 - 1
    return ImageSet(images, torch.arange(24) % TINY.num_classes)


def config(out: Path, **changes) -> RunConfig:
    loss = dataclasses.replace(pmf.LossConfig(), class_dropout=0.3)
    base = dict(model=TINY, loss=loss, steps=2, batch_size=ROWS, device_batch=2, device="cpu", ema_half_lives=(500.0,))
    return RunConfig(out=out, optimizer=OptimizerConfig(learning_rate=1e-2), **(base | changes))


def first_steps(run_config: RunConfig) -> dict[str, torch.Tensor]:
    """Gradients of the first step, and what two steps make of weights, averages and momentum."""
    trainer = Trainer(run_config, data())
    with torch.no_grad():  # at the start most gradients are zero
        torch.manual_seed(1)
        for value in whole(trainer.model.state_dict(), keep=True).values():
            assert value.device.type == "cpu"
        for parameter in trainer.model.parameters():
            noise = torch.randn(parameter.shape) * (1.0 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5)
            full_noise = noise if not hasattr(parameter, "to_local") else _shard_like(noise, parameter)
            parameter.copy_(full_noise)
    batches = iter(trainer._loader())
    result = {}
    for step in range(2):
        x, y = next(batches)
        if step == 0:
            trainer._gradients(x, y)
            for name, parameter in trainer.model.named_parameters():
                result[f"gradient {name}"] = full(parameter.grad).clone()
                parameter.grad = None
        trainer.train_step(x, y)
    result |= {f"weight {name}": full(p).detach().clone() for name, p in trainer.model.named_parameters()}
    result |= {f"average {name}": full(v).clone() for name, v in trainer.emas["ema_500"].state_dict().items()}
    return result


def _shard_like(value, parameter):
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, parameter.device_mesh, parameter.placements)


def worker(rank: int, size: int, port: int, out: str, cases: list[tuple[str, str]]) -> None:
    local = 2 if size == 4 else size
    os.environ |= dict(
        RANK=str(rank), LOCAL_RANK=str(rank % local), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(local)
    )
    os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    for sharding, impl in cases:
        result = first_steps(config(Path(out) / f"{sharding}-{impl}", sharding=sharding, impl=impl))
        if rank == 0:
            torch.save(result, Path(out) / f"{sharding}-{impl}.pt")
    torch.distributed.destroy_process_group()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module", params=[2, 4])
def several(request, tmp_path_factory):
    """Results by (sharding, impl) of two or four processes."""
    out = tmp_path_factory.mktemp("several")
    shardings = ("ddp", "fsdp") if request.param == 2 else ("ddp", "fsdp", "hybrid")
    cases = [(sharding, impl) for sharding in shardings for impl in ("reference", "triton")]
    mp.spawn(worker, (request.param, free_port(), str(out), cases), nprocs=request.param)
    return {case: torch.load(out / f"{case[0]}-{case[1]}.pt") for case in cases}


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """Results of one process, by impl."""
    out = tmp_path_factory.mktemp("one")
    return {impl: first_steps(config(out / impl, impl=impl)) for impl in ("reference", "triton")}


@pytest.mark.parametrize("kind", ["gradient", "weight", "average"])
def test_several_processes_are_one(several, one, kind):
    """To 1e-6: relative to the gradients' norm, and in the weights, which are of the order of 1."""
    for (sharding, impl), result in several.items():
        expected = one[impl]
        assert result.keys() == expected.keys()
        names = [name for name in expected if name.startswith(kind)]
        for name in names:
            difference = (result[name] - expected[name]).abs().max()
            scale = expected[name].norm() if kind == "gradient" else 1.0
            assert difference <= 1e-6 * scale, (sharding, impl, name, difference / scale)
