"""The expected training memory: per row as real passes save it, for every size, precision and sharding."""

import dataclasses

import pytest
import torch

import pmf
from pmf.counting import live_bytes, saved_bytes
from pmf.loss import squared_errors
from pmf.memory import PEAK_ROWS, fully_guided, main_pass, saved_per_row, step_peak, training_memory
from pmf.step_plan import plan_step
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
    assert counted.saved_per_row == kept(3) - kept(2)


@pytest.mark.parametrize("checkpointing", ["none", "light", "block"])
def test_memory_of_a_deep_network_is_counted_on_shallow_ones(checkpointing):
    """Where it is: every further block adds as much."""
    memory = training_memory(DEEP, checkpointing, "triton")
    few, many = (step_peak(DEEP, rows, "triton", checkpointing=checkpointing) for rows in PEAK_ROWS)
    assert memory.per_row == (many - few) // (PEAK_ROWS[1] - PEAK_ROWS[0])
    assert memory.saved_per_row == saved_per_row(DEEP, "triton", checkpointing=checkpointing)


@pytest.mark.parametrize("checkpointing", ["none", "light", "block"])
@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_the_peak_is_that_of_a_real_step(impl, checkpointing):
    """The count on fake tensors equals the bytes of live tensors of the step itself, at any number of rows."""
    loss = pmf.LossConfig()
    for rows in (6, 12):
        model = pmf.create_model(TINY, impl=impl, checkpointing=checkpointing)
        draws = dataclasses.replace(fully_guided(rows, loss), noise=torch.zeros(rows, *TINY.image_shape))
        x, y = torch.zeros(rows, *TINY.image_shape), torch.zeros(rows, dtype=torch.int64)
        planned = plan_step(model, x, y, draws, loss)

        def step(model=model, planned=planned):
            with torch.autocast("cpu", torch.bfloat16):
                squared = squared_errors(model, planned, loss)
            squared.rows.mean().backward()

        peak = live_bytes(step).peak
        counted = step_peak(TINY, rows, impl, loss=loss, checkpointing=checkpointing)
        # In PyTorch's checkpoints, real tensors are freed a little later than fake ones: less than a row's.
        repeats = checkpointing == "block" or (checkpointing, impl) == ("light", "reference")
        assert 0 <= peak - counted <= (peak / rows if repeats else 0)


def test_checkpointing_saves_memory():
    """Live tensors, not only saved ones: neither mode keeps tangents, or what it makes again."""
    config = dataclasses.replace(DEEP, hidden_size=128, num_heads=2)
    none, light, block = (training_memory(config, mode, "triton") for mode in ("none", "light", "block"))
    assert light.saved_per_row < 0.75 * none.saved_per_row and block.saved_per_row < 0.35 * none.saved_per_row
    assert light.per_row < 0.8 * none.per_row and block.per_row < 0.5 * none.per_row


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
    assert memory.state <= 8 * eighth.state < memory.state + 16
    assert (eighth.copies, eighth.per_row) == (memory.copies, memory.per_row)
    optimizer = memory.sharded(8, weights=False)
    assert (optimizer.weights, optimizer.optimizer) == (memory.weights, eighth.optimizer)
