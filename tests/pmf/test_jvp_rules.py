"""`pmf.jvp` of what is nearly linear, nearly elementwise or in shared memory: arguments that a rule could overlook."""

import collections

import pytest
import torch
import torch.nn.functional as F

import pmf
from pmf import InputError
from tests.pmf.jvp_checks import F64, W, compare, drawn

EVEN = torch.tensor([True, False, True, False, True, False])
FIRST = torch.zeros(4, 1, dtype=torch.long)
Pair = collections.namedtuple("Pair", "a b")


def statistics(channels):
    return torch.zeros(channels, dtype=F64), torch.ones(channels, dtype=F64)


def written_behind(view_of):
    """A new tensor is written to after `view_of` it has been taken."""

    def run(x):
        y = torch.zeros_like(x)
        view = view_of(y)
        y.add_(x)
        return view * 1

    return run


def written_through(x):
    y = torch.zeros_like(x)
    y.flatten()[:2].copy_(x[0, :2])
    return y * 1


def bias_written_later(x):
    bias = x[0] * 1
    out = F.linear(W[0], W, bias)
    bias.mul_(out)
    return bias * out


RULES = {  # of x [4, 6]
    "fraction": lambda x: x.frac() * x,
    "quotient of a still tensor": lambda x: W[:4] / (x * x + 1),
    "operators of a still tensor": lambda x: (W[:4] - x) * (W[:4] + x) + (W[:4] * x) ** 2 + W[:4].abs() ** x,
    "still matrix": lambda x: W @ x.mT,
    "bias of a convolution": lambda x: F.conv1d(W, W[:, :, None].expand(6, 6, 1), x[0]),
    "bias of channels": lambda x: F.conv2d(x[None, None], W[:3, :3].expand(3, 1, 3, 3), x[0, :3]),
    "bias of a transposed convolution": lambda x: F.conv_transpose1d(x[None], W[:4, :, None].expand(4, 6, 2), x[1]),
    "sum with a product": lambda x: (
        torch.addmm(x[0], W, x.mT @ x, beta=0.5, alpha=2.0) + torch.addmm(W, W, x.mT @ W[:4])
    ),
    "sum with products": lambda x: torch.baddbmm(x, W[None, :4], (x.mT @ x)[None], beta=0.0)[0].addr(x[:, 0], x[1]),
    "sum with a vector": lambda x: x[:, 0].addmv(x, W[0], alpha=3.0),
    "sum with a product by keyword": lambda x: (
        torch.addmm(input=W, mat1=W, mat2=W, beta=0.5)
        @ torch.addmv(W[0], mat=x.mT, vec=x[:, 0])
        * torch.addr(x[:, :4], vec1=x[:, 0], vec2=x[:, 1]).sum()
    ),
    "names of numpy": lambda x: (x.softmax(axis=1) + torch.log_softmax(x, axis=0)) * x.var(axis=1, keepdims=True),
    "operands of numpy": lambda x: torch.add(x, x2=x * x) - torch.sub(x1=W[:4], x2=x) / torch.exp(a=x),
    "bias alone": bias_written_later,
    "selected": lambda x: x.where(EVEN, W[:4]) + W[:4].where(EVEN, x),
    "selected by keyword": lambda x: torch.where(condition=EVEN, input=x, other=W[:4]),
    "scattered number": lambda x: x.scatter(1, FIRST, value=2.0) + x.scatter(1, FIRST, 2.0),
    "filled by keyword": lambda x: x.masked_fill(value=3.0, mask=EVEN) + x.index_fill(0, FIRST[0], value=3.0),
    "padded by a number": lambda x: torch.constant_pad_nd(x, (1, 1), 2.0),
    "differences": lambda x: x.diff(prepend=W[:4, :1]) + torch.diff(x, append=x[:, :1]) + x.diff(dim=0, n=1)[:1, :1],
    "named tuple": lambda x: torch.cat(Pair(x, x * 2)) + torch.cat(x.max(1, keepdim=True)[:1]).repeat(2, 1),
    "strided": lambda x: x[1:].as_strided((2, 3), (6, 1)) * x[1:].as_strided((2, 3), (6, 1), 2),
    "grid": lambda x: sum(torch.meshgrid(x[0], W[0] * x[1], indexing="ij")) + sum(torch.meshgrid([x[0], W[0]])),
    "dimensions": lambda x: torch.atleast_3d(x) + torch.atleast_2d(x, W)[0][..., None],
    "dropout by keyword": lambda x: torch.dropout(x, p=0.5, train=True) + torch.dropout(x, p=0.5, train=False),
    "alpha dropout": lambda x: F.alpha_dropout(x, 0.3) + F.feature_alpha_dropout(x[None], 0.3, training=True)[0],
    "generator": lambda x: torch.normal(x, 1.0, generator=torch.Generator().manual_seed(3)),
    "moving affine batch norm": lambda x: F.batch_norm(x, *statistics(6), x[0], x[1], True),
    "moving affine instance norm": lambda x: F.instance_norm(x[None], *statistics(4), x[:, 0], x[:, 1], True),
    "complex already": lambda x: (x * 1j).cdouble().abs() + x.cdouble().real,
    "sign of complex numbers": lambda x: torch.complex(x, W[:4]).sgn().real + x.sgn(),
    "filled by an element of its own": lambda x: (lambda y: y.fill_(y[0, 1]))(x * 1) * x,
    "no out": lambda x: torch.linalg.solve(x[:, :4], x, out=None) + torch.sum(x, 1, keepdim=True, out=None),
    "written through a view": written_through,
    **{
        f"written behind {name}": written_behind(view)
        for name, view in {
            "view": lambda y: y.view(-1),
            "slice": lambda y: y[:2],
            "expansion": lambda y: y[None].expand(2, 4, 6),
            "itself": lambda y: y.contiguous(),
            "transpose": lambda y: y.T,
            "broadcast": lambda y: torch.broadcast_tensors(y, W[:4])[0],
            "view like another": lambda y: y.view_as(W[:4]),
            "dropout": lambda y: F.dropout(y, 0.5, training=False),
            "detach": lambda y: y.detach(),
        }.items()
    },
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", RULES)
def test_value_tangent_and_gradient(name):
    compare(RULES[name], [drawn(4, 6)], [drawn(4, 6, seed=1)])


def test_still_divided_by_moving_is_recorded_as_a_quotient():
    x = drawn(400).requires_grad_()
    out, _ = pmf.jvp(lambda x: drawn(400, seed=2) / x, (x,), (1,))
    assert out.grad_fn.name() == "DivBackward0"
    assert torch.equal(out, drawn(400, seed=2) / x)


def test_primals_in_the_middle_of_a_storage():
    def function(x):
        return x.as_strided((2, 2), (2, 1)) + x.as_strided((2, 2), (2, 1), x.storage_offset())

    base = drawn(9)
    out, dot = pmf.jvp(function, (base[3:],), (drawn(6, seed=1),))
    assert torch.equal(out, function(base[3:]))
    torch.testing.assert_close(dot, 2 * drawn(6, seed=1)[:4].view(2, 2))
    with pytest.raises(InputError, match="as_strided reads beyond the tensor that moves"):
        pmf.jvp(lambda x: x.as_strided((2,), (1,), 0), (base[3:],), (1,))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: x.scatter(1, FIRST, W[:4, :1], reduce="multiply"), "scatter has no rule"),
        (
            lambda x: x.scatter_reduce(1, FIRST, W[:4, :1], "prod"),
            "scatter_reduce got a moving value; expected no",
        ),
        (lambda x: (x * 1).scatter_reduce_(1, FIRST, W[:4, :1], reduce="prod"), "expected no product"),
        (
            lambda x: (x * 1)[None].expand(2, 4, 6).masked_fill_(EVEN, 2.0),
            "masked_fill_ writes to a .* overlaps",
        ),
        (lambda x: (x * 1).unfold(0, 2, 1).mul_(2), "mul_ writes to a tensor that overlaps itself"),
        (torch.special.bessel_j0, "bessel_j0 got a moving value; PyTorch does not differentiate it"),
    ],
)
def test_what_torch_func_jvp_cannot_or_gets_wrong(function, message):
    with pytest.raises(InputError, match=message):
        pmf.jvp(function, (drawn(4, 6),), (1,))


@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_running_statistics_are_updated_once(norm):
    function = {"batch": F.batch_norm, "instance": F.instance_norm}[norm]

    def run(x, weight, running):
        return function(x, *running, weight, None, True, 0.3)

    x, weight = drawn(3, 4, 5), drawn(4, seed=2)
    plain, once = statistics(4), statistics(4)
    run(x, weight, plain)
    pmf.jvp(lambda x, weight: run(x, weight, once), (x, weight), (1, 1))
    assert torch.equal(plain[0], once[0]) and torch.equal(plain[1], once[1]) and plain[0]._version == once[0]._version


def test_a_generator_of_its_own_is_drawn_from_once():
    one, two = (torch.Generator().manual_seed(4) for _ in range(2))
    torch.normal(drawn(3), 1.0, generator=one)
    pmf.jvp(lambda x: torch.normal(x, 1.0, generator=two), (drawn(3),), (1,))
    assert torch.equal(one.get_state(), two.get_state())


def test_products_in_groups():
    """Those of mixtures of experts, which PyTorch does not differentiate forward."""
    ends = torch.tensor([16, 32], dtype=torch.int32)

    def one_by_one(x, weight):
        return torch.cat([x[:16] @ weight[0], x[16:] @ weight[1]])

    primals = drawn(32, 16).float(), drawn(2, 16, 16, seed=1).float()
    tangents = drawn(32, 16, seed=2).float(), drawn(2, 16, 16, seed=3).float()
    out, dot = pmf.jvp(lambda x, weight: F.grouped_mm(x, weight, offs=ends), primals, tangents)
    assert torch.equal(out, F.grouped_mm(*primals, offs=ends))
    torch.testing.assert_close(dot, pmf.jvp(one_by_one, primals, tangents)[1])
