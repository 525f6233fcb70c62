"""A step of post-training as it is counted, against a real one of a small generator and network."""

import pytest
import torch

from pmf import create_model, feature_networks
from pmf.benchmarks import __main__ as cli
from pmf.benchmarks import posttrain
from pmf.benchmarks.posttrain import BATCH, SHARE, Setting, frechet_loss, frechet_operations, step_bytes, train
from pmf.counting import computing_operators, live_bytes, operations
from pmf.feature_networks import feature_network
from tests.networks import extras

SIZE, WIDTH, ROWS = "pMF-digits", 192, 3


@pytest.fixture
def small(monkeypatch):
    """A tiny ViT as mae."""
    vit = feature_networks._Source("vit_tiny_patch16_224.augreg_in21k", 224, WIDTH, 0)
    monkeypatch.setitem(feature_networks._TIMM, "mae", vit)
    posttrain.meta_network.cache_clear()
    yield
    posttrain.meta_network.cache_clear()


def bytes_of(module):
    return sum(t.nbytes for t in (*module.parameters(), *module.buffers()))


def state(width, dtype):
    """Weights, gradients, two moments and an average; the network; target, population; the step's output."""
    model, network = create_model(SIZE, aux_head=False, device="meta"), feature_network("mae:random", dtype=dtype)
    values = sum(p.numel() for p in model.parameters())
    small = sum(b.nbytes for b in model.buffers()) + 4 * len(list(model.parameters()))  # rotary tables, step counts
    # Target and population: two sigmas and a root; two means; the largest eigenvalue and the number of features.
    frechet = 8 * (3 * width**2 + 2 * width + 2)
    output = 4 * BATCH * width + 8 * 2  # features of all processes; the loss and the distance, float64
    return 4 * 5 * values + small + bytes_of(network) + frechet + output


@extras
@pytest.mark.parametrize(("checkpointing", "dtype"), [("none", torch.float32), ("block", torch.bfloat16)])
def test_the_count_is_that_of_a_real_step(small, checkpointing, dtype):
    """To the byte. No operator returns what a real step makes of numbers and arrays, so only fake tensors count it."""
    setting = Setting(SIZE, ("mae",), dtype, checkpointing)
    counted = step_bytes(setting, ROWS)
    real = live_bytes(lambda: train(setting, ROWS, lambda name: feature_network(f"{name}:random", dtype=dtype)))
    counts = 4 * len(list(create_model(SIZE, aux_head=False, device="meta").parameters()))
    unseen = counts + 8 * WIDTH + 2 * 4 * 3  # of steps; mu of the reference; mean and deviation of the network's input
    assert counted.end == state(WIDTH, dtype) == real.end + unseen
    assert counted.peak == real.peak + unseen


@extras
def test_operations_of_the_products_of_the_frechet_part(small):
    loss = frechet_loss({"mae": WIDTH})
    rows = torch.randn(SHARE, WIDTH, requires_grad=True)

    def step():
        out = loss({"mae": rows})
        out.loss.backward()
        loss.add(out.features)

    assert operations(step) == frechet_operations(WIDTH) - posttrain.EIGH * WIDTH**3


def test_operators_that_compute_are_counted():
    x = torch.randn(4, 4)
    assert computing_operators(lambda: (x @ x).T.reshape(2, 8).add_(1)) == 3  # product, the reshape's copy, sum
    assert computing_operators(lambda: torch.empty(3).view(3, 1).detach()) == 0


@extras
def test_operators_of_a_step(small):
    """More images are no more operators, unless they take a second batch: then all passes but the update repeat."""
    one, more, two = (posttrain.step_operators(Setting(SIZE, ("mae",)), rows) for rows in (SHARE, 2 * SHARE, 4))
    alone = posttrain.step_operators(Setting(SIZE), SHARE)
    assert one == more and alone < one < two < 3 * one


@extras
def test_operations_of_an_image_are_those_of_its_parts(small):
    alone, both = (posttrain.image_operations(Setting(SIZE, names)) for names in ((), ("mae",)))
    network, x = posttrain.meta_network("mae"), torch.empty(1, 1, 8, 8, device="meta", requires_grad=True)
    assert both - alone == operations(lambda: network(x).sum().backward())
    repeated = posttrain.image_operations(Setting(SIZE, ("mae",)), SHARE // 2)
    generator = posttrain.image_operations(Setting(SIZE), SHARE // 2) - alone
    with torch.no_grad():
        assert repeated - both == generator + operations(lambda: network(x))


def test_the_largest_batch_fits_on_either_side_of_a_share():
    def peak(rows):
        return 1000 + (3 if rows < SHARE else 2) * rows

    for budget in (2000, 1300, 1007.5, 900):
        rows = posttrain.largest_batch(peak, budget)
        assert peak(rows + 1) > budget and (rows == 0 or peak(rows) <= budget)


@extras
def test_the_command_prints_both_tables(small, monkeypatch, capsys):
    monkeypatch.setattr(posttrain, "ROWS", ((), ("mae",)))
    cli.main(["posttrain", "--size", SIZE, "--device-batch", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("| generator alone |") for line in lines) == 2
    assert sum(line.startswith("| mae |") for line in lines) == 2


@pytest.mark.parametrize(("option", "value"), [("size", "pMF-Z"), ("device-batch", "0")])
def test_bad_options_are_one_line(option, value, capsys):
    with pytest.raises(SystemExit):
        cli.main(["posttrain", f"--{option}", value])
    error = capsys.readouterr().err
    assert error.startswith(f"pmf.benchmarks: {option.replace('-', '_')}: expected") and error.count("\n") == 1
