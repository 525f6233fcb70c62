"""Several gloo processes against one: gradients, updates, averages, draws and runs."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import socket
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from torch.distributed.tensor import DTensor, distribute_tensor

import pmf
from pmf.data import ImageSet
from pmf.errors import InputError
from pmf.optim import OptimizerConfig, split_parameters
from pmf.sharded import full
from pmf.train import distributed
from pmf.train.cli import main
from pmf.train.config import RunConfig
from pmf.train.distributed import join
from pmf.train.learner import Learner
from pmf.train.loop import Trainer
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


HOW: dict[str, dict] = {
    "reference": dict(impl="reference"),
    "triton": dict(impl="triton"),
    "light": dict(impl="triton", checkpointing="light"),
    "bfloat16": dict(impl="reference", precision="bfloat16", stream="bfloat16"),
    "captured": dict(impl="reference", captured=True),
}
EXACT = ("reference", "captured")
"""Those in float64."""


def first_steps(out: Path, sharding: str, impl: str) -> dict[str, torch.Tensor]:
    """Gradients of the first step, and weights and averages after one step (in float64, two steps).

    `impl`: see `HOW`.
    """
    exact = impl in EXACT
    torch.set_default_dtype(torch.float64 if exact else torch.float32)
    trainer = Trainer(config(out, sharding=sharding, **HOW[impl]), data())
    torch.manual_seed(1)
    with torch.no_grad():  # most gradients of a new network are zero
        for p in trainer.model.parameters():
            spread = 1.0 if p.ndim == 1 else p.shape[-1] ** -0.5
            p.copy_(placed_like(p, torch.randn(p.shape) * spread))
    batches = trainer._loader()
    x, y = next(batches)
    trainer._gradients(x, y)
    result = {f"gradient {name}": full(p.grad).clone() for name, p in trainer.model.named_parameters()}
    trainer.model.zero_grad()
    trainer.train_step(x, y)
    if exact:
        trainer.train_step(*next(batches))
    result |= {f"weight {name}": full(p).detach().clone() for name, p in trainer.model.named_parameters()}
    result |= {f"average {name}": full(v).clone() for name, v in trainer.emas["ema_500"].state_dict().items()}
    return result


def placed_like(parameter: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """The value, sharded like the parameter."""
    if not isinstance(parameter, DTensor):
        return value
    return distribute_tensor(value, parameter.device_mesh, parameter.placements)


def worker(rank: int, size: int, port: int, out: str, cases: list[tuple[str, str]]) -> None:
    local = 2 if size == 4 else size
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank % local), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(local))
    os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    for sharding, impl in cases:
        result = first_steps(Path(out) / f"{sharding}-{impl}", sharding, impl)
        if rank == 0:
            torch.save(result, Path(out) / f"{sharding}-{impl}.pt")
    torch.distributed.destroy_process_group()
    os._exit(0)  # for the reason given in train/__main__.py


def free_port() -> int:
    """A free port for processes that start seconds later.

    It is below the ephemeral ports, which other connections may take in the meantime.
    """
    while True:
        port = random.SystemRandom().randrange(10000, 30000)
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind(("127.0.0.1", port))
            return port


CASES = {
    2: [
        *((sharding, impl) for sharding in ("ddp", "zero1", "fsdp") for impl in ("reference", "triton")),
        *((sharding, "light") for sharding in ("ddp", "fsdp")),
        *((sharding, "captured") for sharding in ("ddp", "zero1")),
        ("fsdp", "bfloat16"),
    ],
    4: [*((sharding, "reference") for sharding in ("ddp", "zero1", "fsdp", "hybrid")), ("fsdp", "triton")],
}


@pytest.fixture(scope="module", params=CASES)
def several(request, tmp_path_factory):
    """Results by (sharding, impl) of two or four processes."""
    out, cases = tmp_path_factory.mktemp("several"), CASES[request.param]
    mp.spawn(worker, (request.param, free_port(), str(out), cases), nprocs=request.param)
    return {case: torch.load(out / f"{case[0]}-{case[1]}.pt") for case in cases}


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """Results of one process, by impl."""
    out = tmp_path_factory.mktemp("one")
    results = {impl: first_steps(out / impl, "ddp", impl) for impl in ("reference", "triton", "bfloat16")}
    torch.set_default_dtype(torch.float32)
    return results


def test_several_processes_give_the_results_of_one(several, one):
    """Compares gradients relative to their norm, and weights and averages, which are of order 1, absolutely.

    The reference agrees to 1e-12 in float64, captured or not; the kernels, and products in bfloat16, agree to 1e-6 on
    float32 weights. There Adam's weights are left out: Adam divides gradients that are only rounding by their own size.
    Several processes that keep less, or capture their steps, are compared with one that does not.
    """
    muon = {name for name, _ in named_matrices()}
    for (sharding, impl), result in several.items():
        expected = one[{"light": "triton", "captured": "reference"}.get(impl, impl)]
        assert result.keys() == expected.keys()
        for key in expected:
            kind, name = key.split()
            if impl not in EXACT and kind != "gradient" and name not in muon:
                continue
            scale = expected[key].norm() if kind == "gradient" else 1.0
            difference = (result[key] - expected[key]).abs().max() / scale
            assert difference <= (1e-12 if impl in EXACT else 1e-6), (sharding, impl, key, difference)


def test_sharded_state_gives_the_weights_of_replicated_state_bit_for_bit(several):
    for impl in {impl for sharding, impl in several if sharding == "zero1"}:
        expected, result = several["ddp", impl], several["zero1", impl]
        assert all(torch.equal(result[key], expected[key]) for key in expected), impl


def named_matrices():
    """Muon's parameters with their names."""
    model = pmf.create_model(TINY)
    chosen = {id(p) for p in split_parameters(model)[0]}
    return [(name, p) for name, p in model.named_parameters() if id(p) in chosen]


def started(rank: int, size: int, port: int, out: str) -> None:
    """Two ranks start from weights of their own seeds, and end with rank 0's; fsdp cannot be captured."""
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size))
    os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    world = join("cpu", "ddp")
    for captured in (False, True):
        learner = Learner(config(Path(out), seed=rank, captured=captured), world)
        weights = [p.double().sum().item() for p in learner.model.parameters()]
        assert world.gather(weights) == [weights] * size
    with pytest.raises(InputError, match=r"^captured: expected sharding ddp or zero1, got fsdp$"):
        Learner(config(Path(out), sharding="fsdp", captured=True), join("cpu", "fsdp"))
    torch.distributed.destroy_process_group()
    os._exit(0)


def test_replicated_processes_start_from_the_same_weights(tmp_path):
    mp.spawn(started, (2, free_port(), str(tmp_path)), nprocs=2)


TORCHRUN = dict(WORLD_SIZE="2", RANK="0", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("WORLD_SIZE", "two", "an integer from 1 to 2147483647 in this environment variable, as .*, got 'two'"),
        ("WORLD_SIZE", "0", "an integer from 1 to 2147483647 in this environment variable, as .*, got '0'"),
        ("RANK", None, "an integer from 0 to 1 in this environment variable, as torchrun sets it, got none"),
        ("RANK", "abc", "an integer from 0 to 1 in this environment variable, as torchrun sets it, got 'abc'"),
        ("RANK", "2", "an integer from 0 to 1 in this environment variable, as torchrun sets it, got '2'"),
        ("MASTER_PORT", None, "an integer from 1 to 65535 .*, got none"),
        ("MASTER_PORT", "65536", "an integer from 1 to 65535 .*, got '65536'"),
        ("MASTER_ADDR", None, "the address of process 0 in this environment variable, got none"),
        ("MASTER_ADDR", "", "the address of process 0 in this environment variable, got none"),
    ],
)
def test_variables_of_the_environment_that_make_no_world_are_named(monkeypatch, name, value, message):
    environment = TORCHRUN | {name: value}
    for variable, text in environment.items():
        monkeypatch.delenv(variable, raising=False)
        if text is not None:
            monkeypatch.setenv(variable, text)
    with pytest.raises(InputError, match=f"^{name}: expected {message}$"):
        join("cpu", "ddp")


def test_a_number_of_processes_on_a_machine_that_is_none_is_named(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "few")
    with pytest.raises(InputError, match=r"^LOCAL_WORLD_SIZE: expected an integer from 1 to 4 .*, got 'few'$"):
        distributed._mesh("cpu", 4, "hybrid")


def test_a_single_process_needs_no_variables_and_minds_none_of_several(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("RANK", "machine-7")
    assert join("cpu", "ddp").size == 1


def test_a_port_that_is_in_use_is_one_line_that_names_the_variables(monkeypatch, tmp_path, capsys):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        for variable, text in (TORCHRUN | dict(MASTER_PORT=str(port))).items():
            monkeypatch.setenv(variable, text)
        with pytest.raises(SystemExit) as ended:
            main(["digits", "--device", "cpu", "--out", str(tmp_path / "run")])
    told = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and len(told) == 1
    assert told[0].startswith(f"pmf: MASTER_ADDR, MASTER_PORT: 2 processes cannot meet at 127.0.0.1:{port}: ")
    assert "EADDRINUSE" in told[0] and told[0].endswith(
        "expected the address of process 0 and a port that is free there"
    )


def test_a_process_that_is_lost_while_all_meet_is_no_bad_address(monkeypatch):
    def reset(backend):
        raise torch.distributed.DistNetworkError("recvBytes: Connection reset by peer")

    for variable, text in TORCHRUN.items():
        monkeypatch.setenv(variable, text)
    monkeypatch.setattr(torch.distributed, "init_process_group", reset)
    with pytest.raises(torch.distributed.DistNetworkError) as error:
        join("cpu", "ddp")
    assert distributed.lost(error.value)
