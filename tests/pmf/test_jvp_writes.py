"""`pmf.jvp` of networks that fill tensors of their own: `h = torch.zeros(...); h[i] = f(x)`."""

import copy
import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import pmf
from pmf import InputError
from tests.pmf.jvp_checks import F64, W, compare, drawn

EVERY_OTHER = torch.tensor([True, False, True, False])
ROWS = torch.tensor([0, 2, 2, 3])

MADE = {  # of x [4, 6]
    "zeros": lambda x: torch.zeros(4, 6, dtype=F64),
    "empty": lambda x: torch.empty(4, 6, dtype=F64).fill_(2.0),
    "one after another": lambda x: torch.eye(6, dtype=F64)[None].repeat(4, 1, 1)[:, 0].contiguous(),
    "another shape": lambda x: torch.zeros(24, dtype=F64).view(4, 6),
    "expanded": lambda x: torch.ones(4, 1, dtype=F64).expand(4, 6).clone(),
    "copy of zeros like x": lambda x: torch.zeros_like(x).clone(),
    "zeros like x, repeated": lambda x: x.new_zeros(1, 6).repeat(4, 1),
    "zeros like x, summed": lambda x: x.new_zeros(4, 6) + 1,
    "zeros like what is cut": lambda x: torch.zeros_like(x.detach()),
    "zeros like x, cast": lambda x: x.new_zeros(4, 6).float().double(),
    "result of a still function": lambda x: W[:4].sin(),
}
WRITTEN = {  # to h, of x
    "column": lambda h, x: h.__setitem__((slice(None), 0), x[:, 1] * 2),
    "mask": lambda h, x: h.__setitem__(EVERY_OTHER, x[:2].sin()),
    "rows": lambda h, x: h.__setitem__(ROWS.unique(), x[1:] * 3),
    "sum": lambda h, x: h.add_(x, alpha=2.0),
    "operator": lambda h, x: h.__imul__(x + 1),
    "copy": lambda h, x: h.copy_(x[0]),
    "indices": lambda h, x: h.index_add_(0, ROWS, x.cos()),
    "scattered": lambda h, x: h.scatter_add_(0, ROWS[:, None].expand(4, 6), x),
    "put": lambda h, x: h.index_put_((ROWS,), x, accumulate=True),
    "view afterwards": lambda h, x: (h.mul_(x), h[1].copy_(x[0] * 3), h.view(-1)[:2].mul_(2)),
    "filled": lambda h, x: h.fill_(x[0, 0]),
    "part": lambda h, x: h[1:3].mul_(x[:2]),
    "sum in a part": lambda h, x: add_to(h, 2, x[0]),
    "part of a part": lambda h, x: h[1:][1].copy_(x[0]),
    "permuted part": lambda h, x: h.T[1:].sub_(x.T[1:]),
}


def add_to(h, i, x):
    h[i] += x


PAIRS = [(made, written) for made in MADE for written in WRITTEN]
THIRD = [pair for pair in PAIRS if pair[0] == "another shape" and "part" in pair[1]]
"""There what is written to is the third tensor of one memory."""


@pytest.mark.parametrize(("made", "written"), PAIRS)
def test_a_new_tensor_moves_once_it_is_written_to(made, written):
    def function(x):
        h = MADE[made](x)
        kept = h
        WRITTEN[written](h, x)
        return h * x + kept.sin() + torch.stack([*h.unbind(0)])

    if (made, written) in THIRD:
        with pytest.raises(InputError, match="into a tensor that cannot move"):
            pmf.jvp(function, (drawn(4, 6),), (1,))
    else:
        compare(function, [drawn(4, 6)], [drawn(4, 6, seed=1)])


def test_it_is_written_to_in_a_loop():
    def function(x, weight):
        h, total = torch.zeros(4, 6, dtype=F64), torch.zeros((), dtype=F64)
        for i in range(4):
            h[i] = (x[i] if i == 0 else h[i - 1].clone()) @ weight
            h[i, 2:] += weight[i, 2:]
            total += h[i].sum()
        return h * total

    compare(function, [drawn(4, 6), W], [drawn(4, 6, seed=1), drawn(6, 6, seed=2)])


def test_spectra():
    """Spectral layers fill the modes that they keep."""

    def function(x):
        spectrum = torch.zeros(4, 4, dtype=torch.cdouble)
        spectrum[:, :2] = torch.fft.rfft(x)[:, :2] * (1 + 2j)
        return torch.fft.irfft(spectrum, n=6)

    compare(function, [drawn(4, 6)], [drawn(4, 6, seed=1)])


def test_integers_do_not_move():
    def function(x):
        counts = torch.zeros(4, 6, dtype=torch.long)
        counts[0] = x[0] * 10
        counts[1].copy_(x[1] * 10)
        counts[2].fill_(x[2, 2] * 10)
        return counts * x

    x, v = drawn(4, 6), drawn(4, 6, seed=1)
    out, dot = pmf.jvp(function, (x,), (v,))
    assert torch.equal(out, function(x))
    torch.testing.assert_close(dot, function(x) / x * v)


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode])
def test_without_recording(around):
    def function(x):
        h, product = torch.zeros(4, 6, dtype=F64), torch.ones(4, 6, dtype=F64)
        h[1:] = x[1:] * x[:3]
        product *= x
        return h + product

    x, v = drawn(4, 6), W[:4]
    with around():
        out, dot = pmf.jvp(function, (x,), (v,))
        assert torch.equal(out, function(x))
    torch.testing.assert_close(dot[0], v[0])
    torch.testing.assert_close(dot[1:], x[1:] * v[:3] + v[1:] * x[:3] + v[1:])


class Remembering(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(6, dtype=F64))
        self.weight = nn.Parameter(torch.ones(6, dtype=F64))

    def forward(self, x):
        with torch.no_grad():
            self.mean.mul_(0.5).add_(x.mean(0), alpha=0.5)
        return (x - self.mean) * self.weight


def test_a_buffer_is_an_ordinary_tensor_again_after_the_call():
    network, other = Remembering(), Remembering()
    x, v = drawn(4, 6), drawn(4, 6, seed=1)
    buffer = network.mean
    for _ in range(2):
        out, dot = pmf.jvp(network, (x,), (v,))
        out.sum().backward()
        assert torch.equal(out, other(x)) and torch.equal(network.mean, other.mean)
        torch.testing.assert_close(dot, v - 0.5 * v.mean(0))
    assert network.mean is buffer and type(buffer) is torch.Tensor and not buffer.requires_grad
    assert torch.equal(copy.deepcopy(network).mean, other.mean)
    network.load_state_dict(copy.deepcopy(other.state_dict()))
    assert torch.equal(network(x), other(x))


def test_what_outlives_the_call_is_the_tensor_that_was_written_to():
    b = torch.zeros(4, 6, dtype=F64)
    b.label, row, kept, seen = "sum", b[1], [], []

    def function(x):
        row.add_(x[0])
        b.add_(x)
        kept.extend([b, b.contiguous(), b * 1])
        return x * b, {"sum": b}

    x = drawn(4, 6).requires_grad_()
    out, dot, aux = pmf.jvp(function, (x,), (1,), has_aux=True)
    assert aux["sum"] is b and kept[0] is b and type(b) is torch.Tensor and b.label == "sum" and row._base is b
    assert torch.equal(kept[1], b) and torch.equal(kept[2], b)
    torch.testing.assert_close(dot, b + x * (1 + torch.eye(4, dtype=F64)[:, 1:2]))
    b.register_hook(lambda gradient: seen.append(gradient))
    (gradient,) = torch.autograd.grad(out.sum(), b, retain_graph=True)
    assert torch.equal(gradient, x) and torch.equal(seen[0], x)
    out.sum().backward()
    assert torch.equal(x.grad[2:], (x + b)[2:])
    row.add_(torch.ones(6, dtype=F64).requires_grad_())
    assert b.requires_grad and row.requires_grad
    assert pmf.jvp(lambda y: b * y, (x,), (1,))[1].equal(b)


def test_an_output_that_was_filled_is_the_tensor_itself():
    kept = []

    def function(x):
        kept.append(torch.zeros(4, 6, dtype=F64).add_(x))
        return kept[0]

    out, dot = pmf.jvp(function, (drawn(4, 6),), (W[:4],))
    assert type(out) is torch.Tensor and torch.equal(out, drawn(4, 6)) and torch.equal(dot, W[:4])
    assert torch.equal(kept[0], out)


@pytest.mark.parametrize(
    "same",
    [
        torch.Tensor.contiguous,
        torch.Tensor.double,
        torch.atleast_2d,
        lambda h: torch.nn.functional.dropout(h, 0.5, False),
    ],
)
def test_outputs_are_ordinary_tensors_and_one_where_the_function_gives_one(same):
    def function(x):
        h = torch.zeros(4, 6, dtype=F64)
        h[:] = x * 2
        return h, same(h)

    x, dot = drawn(4, 6), drawn(4, 6, seed=1)
    plain = function(x)
    (one, other), (one_dot, other_dot) = pmf.jvp(function, (x,), (dot,))
    assert type(one) is type(other) is torch.Tensor and (one is other) == (plain[0] is plain[1])
    assert torch.equal(one, 2 * x) and torch.equal(other, one)
    assert torch.equal(one_dot, 2 * dot) and torch.equal(other_dot, one_dot)


SCATTERED = {
    "itself": lambda h: h.masked_scatter_(h > 0, h),
    "copy": lambda h: h.masked_scatter_(source=h.clone(), mask=h > 0),
    "other rows": lambda h: h[:2].masked_scatter_(h[:2] > 0, h[2:]) + h[2:],
    "overlapping rows": lambda h: (h[1:].masked_scatter_(h[1:] > 0, h[:3]), h)[1],
    "still source": lambda h: h.masked_scatter_(h > 0, W[:4]),
    "still target": lambda h: torch.zeros(4, 6, dtype=F64).masked_scatter_(h > 0, h),
}


@pytest.mark.parametrize("name", SCATTERED)
def test_a_source_may_share_memory_with_what_is_written_to(name):
    def function(x):
        return SCATTERED[name](x * 1)

    x, dot = drawn(4, 6), drawn(4, 6, seed=1)
    out, out_dot = pmf.jvp(function, (x,), (dot,))
    assert torch.equal(out, function(x))
    step = 1e-6 * dot
    torch.testing.assert_close(out_dot, (function(x + step) - function(x - step)) / 2e-6, rtol=1e-6, atol=1e-6)
    with pytest.raises(TypeError, match="source"):
        pmf.jvp(lambda x: (x * 1).masked_scatter_(x > 0), (x,), (dot,))


def test_a_buffer_that_outputs_of_the_last_call_hold_moves_again():
    class Network(Remembering):
        def forward(self, x):
            return super().forward(x) * self.mean, self.mean

    network, other, outs = Network(), Network(), []
    for _ in range(3):
        outs.append(pmf.jvp(network, (drawn(4, 6),), (1,))[0])
        assert torch.equal(outs[-1][0], other(drawn(4, 6))[0]) and outs[-1][1] is network.mean


def test_retained_gradients():
    weight = W[:4].clone().requires_grad_()

    def before(x):
        h = weight * 2
        h.retain_grad()
        h.mul_(x)
        return h * x

    kept = []

    def after(x):
        h = weight * 2
        h.mul_(x)
        h.retain_grad()
        kept.append(h)
        return h * x

    with pytest.raises(InputError, match="cannot move"):
        pmf.jvp(before, (drawn(4, 6),), (1,))
    out, _ = pmf.jvp(after, (drawn(4, 6),), (1,))
    out.sum().backward()
    assert torch.equal(kept[0].grad, drawn(4, 6))


def test_a_transform_around_is_named():
    def filled(x):
        h = torch.zeros(4, 6, dtype=F64)
        h[0] = x[0]
        return h * x

    with pytest.raises(InputError, match="cannot move"):
        torch.func.grad(lambda x: pmf.jvp(filled, (x,), (1,))[0].sum())(drawn(4, 6))


def test_a_checkpoint_recomputes_what_it_filled():
    def filled(x):
        h = torch.zeros(4, 6, dtype=F64)
        h[:, 1:] = x[:, 1:].sin() * x[:, :5]
        return h.exp()

    x, v = drawn(4, 6).requires_grad_(), W[:4]
    out, dot = pmf.jvp(lambda x: checkpoint(filled, x, use_reentrant=False), (x,), (v,))
    assert torch.equal(out, filled(x))
    torch.testing.assert_close(dot, torch.func.jvp(filled, (x.detach(),), (v,))[1])
    assert torch.equal(*(torch.autograd.grad(y.square().sum(), x)[0] for y in (out, filled(x))))


def test_another_thread_fills_a_tensor():
    def function(x):
        h = torch.zeros(4, 6, dtype=F64)
        thread = threading.Thread(target=lambda: h.add_(x * x))
        thread.start()
        thread.join()
        return h * 1

    x, v = drawn(4, 6), drawn(4, 6, seed=1)
    out, dot = pmf.jvp(function, (x,), (v,))
    assert torch.equal(out, x * x)
    torch.testing.assert_close(dot, 2 * x * v)


def tensor_and_view(view_of):
    def function(x):
        h = torch.zeros(4, 6, dtype=F64)
        view = view_of(h)
        h.add_(x)
        return view * 1

    return function


@pytest.mark.parametrize("recording", [True, False])
@pytest.mark.parametrize(
    "function",
    [
        tensor_and_view(lambda h: h[1]),
        tensor_and_view(lambda h: h.unbind(0)[0]),
        tensor_and_view(lambda h: h.detach()),
        tensor_and_view(lambda h: torch.from_numpy(h.numpy())),
        lambda x: torch.from_numpy(W[:4].numpy().copy()).add_(x),
        lambda x: (lambda h: (h.untyped_storage(), h.add_(x)))(torch.zeros(4, 6, dtype=F64)),
        lambda x: (lambda rows: [rows[0].copy_(x[0]), rows[1]])([*torch.zeros(4, 6, dtype=F64).split(1)]),
        lambda x: (lambda part: [part[0].copy_(x[0]), part])(torch.zeros(4, 6, dtype=F64)[:2]),
    ],
)
def test_views_that_would_not_move_are_an_error(function, recording):
    with (
        torch.set_grad_enabled(recording),
        pytest.raises(InputError, match="into a tensor that cannot move; expected a"),
    ):
        pmf.jvp(function, (drawn(4, 6),), (1,))


@pytest.mark.parametrize("view", [torch.view_as_real, lambda h: h.real[..., None], lambda h: h.conj()])
def test_views_that_read_the_memory_as_other_numbers_are_an_error(view):
    def function(x):
        h = torch.zeros(4, 6, dtype=torch.cdouble)
        view(h).copy_(x[..., None] if view(h).ndim == 3 else x)
        return h * 1

    with pytest.raises(InputError, match="into a tensor that cannot move"):
        pmf.jvp(function, (drawn(4, 6),), (1,))


@pytest.mark.parametrize("write", [lambda h, x: h.add_(x), lambda h, x: h.__setitem__(0, x[0])])
def test_compilers_ask_for_a_tensor_like_a_moving_one(write):
    torch._dynamo.reset()

    def function(x):
        h = torch.zeros(4, 6, dtype=F64)
        write(h, x)
        return h

    with pytest.raises(Exception) as raised:
        torch.compile(lambda x: pmf.jvp(function, (x,), (1,)), fullgraph=True, backend="eager")(drawn(4, 6))
    assert "cannot move; expected one made like a moving tensor" in f"{raised.value} {raised.value.__cause__}"
