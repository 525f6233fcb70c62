"""`pmf.jvp` of functions that have no forward mode in PyTorch: its own tangents, against central differences."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import pmf
from pmf import InputError
from tests.pmf.jvp_checks import PARTITIONED, W, drawn

EDGES = (torch.rand(6, 4, generator=torch.Generator().manual_seed(8)) > 0.5).double().to_sparse()
NETWORKS = {
    "lstm": lambda: nn.LSTM(4, 6),
    "lstm batch first, without bias": lambda: nn.LSTM(4, 6, batch_first=True, bias=False),
    "lstm both ways, projected": lambda: nn.LSTM(4, 6, num_layers=2, bidirectional=True, proj_size=3),
    "gru both ways": lambda: nn.GRU(4, 6, num_layers=3, bidirectional=True, batch_first=True),
    "gru without bias": lambda: nn.GRU(4, 6, bias=False),
    "tanh": lambda: nn.RNN(4, 6, num_layers=2),
    "relu": lambda: nn.RNN(4, 6, nonlinearity="relu", bidirectional=True),
    "lstm with dropout": lambda: nn.LSTM(4, 6, num_layers=3, dropout=0.4, bidirectional=True),
    "gru with dropout": lambda: nn.GRU(4, 6, num_layers=2, dropout=0.4, batch_first=True),
    "all dropped": lambda: nn.RNN(4, 6, num_layers=2, dropout=1.0),
}


def differences(function, primals, tangents, step=1e-5):
    """(f(x + h v) - f(x - h v)) / 2 h, with the same random numbers."""

    def at(h):
        torch.manual_seed(1)
        return function(*[x if v is None else x + h * v for x, v in zip(primals, tangents, strict=True)])

    return (at(step) - at(-step)) / (2 * step)


def check(function, primals, tangents, parameters=(), compiled=False):
    """Value and gradients bit by bit, the tangent as by central differences."""
    torch._dynamo.reset()
    inputs = [x.clone().requires_grad_() for x in primals]

    def call(*inputs):
        return pmf.jvp(function, inputs, tuple(tangents))

    torch.manual_seed(1)
    out, dot = torch.compile(call, **PARTITIONED)(*inputs) if compiled else call(*inputs)
    torch.manual_seed(1)
    plain = function(*inputs)
    close = dict(rtol=1e-12, atol=1e-12) if compiled else dict(rtol=0, atol=0)
    torch.testing.assert_close(out, plain, **close)
    torch.testing.assert_close(dot, differences(function, primals, tangents), rtol=1e-6, atol=1e-8)
    assert not dot.requires_grad and dot.abs().max() > 0
    weights = drawn(*plain.shape, seed=9)
    got, right = (
        torch.autograd.grad((weights * y).sum(), [*inputs, *parameters], allow_unused=True) for y in (out, plain)
    )
    for a, b in zip(got, right, strict=True):
        torch.testing.assert_close(a, b, **close)


def flat(out, last):
    """What a recurrent network returns, in one tensor."""
    return torch.cat([x.flatten() for x in (out, *(last if isinstance(last, tuple) else [last]))])


def recurrent(name):
    torch.manual_seed(0)
    return NETWORKS[name]().double()


@pytest.mark.parametrize("name", NETWORKS)
def test_recurrent_network(name):
    network = recurrent(name)
    last = network(drawn(5, 3, 4))[1]
    states = [drawn(*x.shape, seed=2 + i) / 2 for i, x in enumerate(last if isinstance(last, tuple) else [last])]

    def function(x, *states):
        return flat(*network(x, states if len(states) > 1 else states[0]))

    primals = drawn(5, 3, 4), *states
    tangents = drawn(5, 3, 4, seed=1), *[drawn(*x.shape, seed=4 + i) for i, x in enumerate(states)]
    check(function, primals, tangents, list(network.parameters()))


@pytest.mark.parametrize("lengths", [[5, 4, 1], [2, 5, 3]])
@pytest.mark.parametrize("name", NETWORKS)
def test_packed_sequences(name, lengths):
    network = recurrent(name)

    def function(x):
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=lengths == [5, 4, 1])
        out, last = network(packed)
        padded, _ = pad_packed_sequence(out, batch_first=True, padding_value=3.0, total_length=7)
        return flat(padded, last)

    check(function, [drawn(3, 5, 4)], [drawn(3, 5, 4, seed=1)], list(network.parameters()))


def test_weights_of_recurrent_networks_move():
    network = recurrent("lstm")
    names, weights = zip(*network.named_parameters(), strict=True)

    def function(*weights):
        return torch.func.functional_call(network, dict(zip(names, weights, strict=True)), (drawn(5, 3, 4),))[0]

    primals = [x.detach() for x in weights]
    check(function, primals, [drawn(*x.shape, seed=i) for i, x in enumerate(primals)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NETWORKS)
def test_recurrent_network_in_lower_precision(name, dtype):
    """oneDNN computes an LSTM in these dtypes; dropout loses the same numbers of value and tangent."""
    wide = recurrent(name)
    network = copy.deepcopy(wide).to(dtype)
    wide.load_state_dict(network.state_dict())
    x, v = drawn(5, 3, 4).to(dtype), drawn(5, 3, 4, seed=1).to(dtype)
    results = []
    for run, cast in ((network, lambda x: x), (wide, torch.Tensor.double)):
        torch.manual_seed(1)
        out, dot = pmf.jvp(lambda x, run=run: run(x)[0], (cast(x),), (cast(v),))
        assert dot.dtype == out.dtype
        results.append((out.double(), dot.double()))
    tolerance = 1e-5 if dtype == torch.float32 else 0.06
    torch.testing.assert_close(*results, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["lstm", "gru both ways"])
def test_recurrent_network_under_autocast(name):
    network, x, v = recurrent(name).float(), drawn(5, 3, 4).float(), drawn(5, 3, 4, seed=1).float()
    with torch.autocast("cpu", torch.bfloat16):
        try:
            expected = network(x)[0]
        except RuntimeError as error:  # oneDNN, which computes LSTMs, needs AVX-512 for bfloat16
            assert name == "lstm" and "primitive descriptor" in str(error)
            pytest.skip("PyTorch itself has no LSTM in bfloat16 on this processor")
        out, dot = pmf.jvp(lambda x: network(x)[0], (x,), (v,))
        assert torch.equal(out, expected) and dot.dtype == out.dtype
    torch.testing.assert_close(dot.float(), pmf.jvp(lambda x: network(x)[0], (x,), (v,))[1], rtol=0.05, atol=0.02)


@pytest.mark.parametrize("name", ["gru both ways", "gru with dropout"])
@torch._dynamo.config.patch(allow_rnn=True)
def test_compiled_recurrent_network(name):
    """Compilers trace it on demand; they cannot draw the numbers of its dropout again."""
    network = recurrent(name)

    def run():
        check(lambda x: network(x)[0], [drawn(3, 5, 4)], [drawn(3, 5, 4, seed=1)], list(network.parameters()), True)

    if network.dropout:
        with pytest.raises(Exception, match="gru has no rule that compiles"):
            run()
    else:
        run()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("cell", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_recurrent_cell(cell, compiled):
    torch.manual_seed(0)
    network = cell(4, 6).double()

    def function(x, h, c):
        out = network(x, (h, c) if cell is nn.LSTMCell else h)
        return torch.cat([*out] if isinstance(out, tuple) else [out, c])

    primals = drawn(3, 4), drawn(3, 6, seed=1), drawn(3, 6, seed=2)
    tangents = drawn(3, 4, seed=3), drawn(3, 6, seed=4), drawn(3, 6, seed=5)
    check(function, primals, tangents, list(network.parameters()), compiled)


def test_a_packed_sequence_may_be_taken_apart():
    network = recurrent("gru both ways")

    def function(data):
        packed = PackedSequence(data, torch.tensor([3, 2, 1]))
        return network(packed)[0].data * 2

    check(function, [drawn(6, 4)], [drawn(6, 4, seed=1)], list(network.parameters()))


FUNCTIONS = {
    "distances": lambda x, y: torch.cdist(x, y),
    "distances of themselves": lambda x, y: torch.cdist(x, x) + torch.cdist(y, y)[:3, :3],
    "distances to what stands still": lambda x, y: torch.cdist(W[:, :4], x),
    "sums of differences": lambda x, y: torch.cdist(x, y, p=1.0, compute_mode="donot_use_mm_for_euclid_dist"),
    "largest differences": lambda x, y: torch.cdist(x[None], y.expand(2, 5, 4), p=float("inf")),
    "powers of differences": lambda x, y: torch.cdist(x, y, p=3.0),
    "distances of pairs": lambda x, y: torch.pdist(x)[:, None] + F.pdist(y, p=1.5),
}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_distances(name, compiled):
    tangents = drawn(3, 4, seed=1), drawn(5, 4, seed=2)
    primals = drawn(3, 4), drawn(5, 4, seed=3)

    def function(x, y):
        return FUNCTIONS[name](x, y) + y.sum() + x.sum()  # so that both have gradients

    check(function, primals, tangents, compiled=compiled)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("padding", ["zeros", "border", "reflection"])
@pytest.mark.parametrize("mode", ["bilinear", "nearest", "bicubic"])
def test_sampled_images(mode, padding, aligned, compiled):
    def sampled(x, grid):
        return F.grid_sample(x, grid, mode, padding, aligned)

    primals = drawn(2, 3, 5, 4), drawn(2, 6, 7, 2, seed=2)
    check(sampled, primals, (drawn(2, 3, 5, 4, seed=1), drawn(2, 6, 7, 2, seed=3)), compiled=compiled)
    check(lambda x: sampled(x, primals[1]), primals[:1], [drawn(2, 3, 5, 4, seed=1)], compiled=compiled)
    if mode != "nearest":
        check(lambda grid: sampled(primals[0], grid), primals[1:], [drawn(2, 6, 7, 2, seed=3)], compiled=compiled)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("mode", ["bilinear", "nearest", "bicubic"])
def test_the_tangent_of_samples_is_sampled(mode, compiled):
    """Where the grid stands still: they are linear in the images."""
    torch._dynamo.reset()
    x, v, grid = drawn(2, 3, 5, 4), drawn(2, 3, 5, 4, seed=1), drawn(2, 6, 7, 2, seed=2)

    def sampled(x):
        return F.grid_sample(x, grid, mode=mode, align_corners=False)

    call = torch.compile(
        lambda: pmf.jvp(sampled, (x,), (v,)), fullgraph=True, backend="aot_eager", disable=not compiled
    )
    out, dot = call()
    torch.testing.assert_close(out, sampled(x), rtol=0, atol=0)
    torch.testing.assert_close(dot, sampled(v), rtol=0, atol=0)


@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
def test_sampled_volumes(mode):
    primals = drawn(2, 3, 4, 5, 4), drawn(2, 3, 6, 2, 3, seed=2) / 2
    tangents = drawn(2, 3, 4, 5, 4, seed=1), drawn(2, 3, 6, 2, 3, seed=3)
    check(lambda x, grid: F.grid_sample(x, grid, mode, align_corners=False), primals, tangents)


def test_products_with_sparse_matrices():
    check(lambda x: torch.sparse.mm(EDGES, x * x), [drawn(4, 3)], [drawn(4, 3, seed=1)])
    check(lambda x: EDGES @ (x * x), [drawn(4, 3)], [drawn(4, 3, seed=1)])


@pytest.mark.filterwarnings("ignore:Sparse")
def test_products_with_sparse_matrices_that_take_other_terms_than_sums():
    edges = EDGES.to_sparse_csr()
    check(lambda x: torch.sparse.mm(edges, x, "mean"), [drawn(4, 3)], [drawn(4, 3, seed=1)])
    with pytest.raises(InputError, match="_sparse_mm has no rule"):
        pmf.jvp(lambda x: torch.sparse.mm(edges, x, "amax"), (drawn(4, 3),), (1,))
