"""The expected training memory: per row as real passes save it, for every size, precision and sharding."""

import dataclasses

import pytest
import torch

import pmf
from pmf.counting import saved_bytes
from pmf.memory import main_pass, saved_per_row, training_memory
from pmf.train.demo import digits
from pmf.train.loop import Trainer
from tests.networks import TINY
from tests.train.test_loop import config as run_config

DEEP = dataclasses.replace(TINY, depth=6, aux_head_depth=2)


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize(
    ("dtype", "stream"),
    [(torch.bfloat16, "float32"), (torch.bfloat16, "bfloat16"), (torch.float32, "float32")],
)
def test_memory_per_row_is_what_a_row_saves(dtype, stream, impl):
    """The count on fake tensors equals the bytes that a real forward pass saves for one more row."""
    model = pmf.create_model(TINY, impl=impl, stream=stream)

    def kept(rows):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            return saved_bytes(lambda: main_pass(model, rows), model.parameters())

    counted = training_memory(TINY, impl=impl, dtype=dtype, stream=stream, device="cpu")
    assert counted.per_row == kept(3) - kept(2)


@pytest.mark.parametrize("checkpointing", ["none", "block"])
def test_memory_of_a_deep_network_is_counted_on_shallow_ones(checkpointing):
    """Every further block saves the same, so the count equals that of the deep network itself."""
    whole = saved_per_row(DEEP, "reference", checkpointing)
    recomputed = saved_per_row(DEEP, "reference") // 8 if checkpointing == "block" else 0
    assert training_memory(DEEP, checkpointing, "reference").per_row == whole + recomputed


def test_checkpointing_saves_memory():
    assert training_memory(TINY, "block", "reference").per_row < training_memory(TINY, impl="reference").per_row


@pytest.mark.parametrize("checkpointing", ["none", "block"])
def test_a_bfloat16_stream_saves_memory(checkpointing):
    whole, half = (
        training_memory(TINY, checkpointing, "triton", stream=stream, device="cpu").per_row
        for stream in ("float32", "bfloat16")
    )
    assert half < whole


def test_the_largest_batch_is_what_is_expected_to_fit():
    memory = training_memory(TINY, impl="reference")
    rows = memory.largest_batch(1e9)
    assert memory.expected(rows) <= 1e9 < memory.expected(rows + 1)
    assert memory.largest_batch(memory.fixed - 1) == 0


def test_the_state_is_what_a_trainer_holds(tmp_path):
    """Parameters, gradients, moments and averages of a run that has taken a step."""
    trainer = Trainer(run_config(tmp_path / "run"), digits()[0])
    trainer.train_step(*next(trainer._loader()))
    parameters = list(trainer.model.parameters())
    moments = [
        value
        for part in trainer.optimizers.values()
        for state in part.state.values()
        for value in state.values()
        if value.ndim > 0  # without step counts, which are scalars
    ]
    averages = [value for ema in trainer.emas.values() for value in ema.average.values()]
    held = sum(t.nbytes for t in (*parameters, *parameters, *moments, *averages))
    memory = training_memory(trainer.config.model, impl="reference")
    assert memory.state == held
    assert memory.copies == sum(p.numel() for p in parameters) * 2
    assert training_memory(trainer.config.model, impl="reference", dtype=torch.float32).copies == 0


def test_sharding_divides_the_state_alone():
    memory = training_memory(TINY, impl="reference")
    eighth = memory.sharded(8)
    assert memory.state <= 8 * eighth.state < memory.state + 8
    assert (eighth.copies, eighth.per_row) == (memory.copies, memory.per_row)
