"""The memory of whole training steps, counted on fake tensors."""

import pytest

import pmf
from pmf.benchmarks import __main__ as cli
from pmf.benchmarks.peaks import SAVINGS, Saving, step_bytes
from pmf.memory import optimizer_bytes

SIZE, BATCH = "pMF-digits", 64


def test_a_process_holds_weights_gradients_moments_and_averages_between_steps():
    model = pmf.create_model(SIZE, device="meta")
    values = sum(p.numel() for p in model.parameters())
    small = sum(b.nbytes for b in model.buffers()) + 4 * len(list(model.parameters()))  # rotary tables, step counts
    for averages in (0, 3):
        found = step_bytes(SIZE, BATCH, Saving(averages=averages))
        assert found.end == 8 * values + optimizer_bytes(model, averages) + small
        assert found.peak > found.end


def test_each_saving_lowers_the_peak():
    plain, light, away, both, block, least = (step_bytes(SIZE, BATCH, saving).peak for saving in SAVINGS)
    assert both < away < light < plain and least < block < plain


def test_the_command_prints_a_row_for_each_saving(capsys):
    cli.main(["peaks", "--size", SIZE, "--batch", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if line.startswith("| checkpointing")]) == len(SAVINGS)
    with pytest.raises(SystemExit):
        cli.main(["peaks", "--size", "pMF-Z"])
    assert capsys.readouterr().err.startswith("pmf.benchmarks: size: expected one of pMF-B/16")
