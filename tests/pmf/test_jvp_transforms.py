"""`pmf.jvp` inside PyTorch's function transforms: right, or one line that says why not."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vjp, vmap

import pmf

torch.manual_seed(0)
NETWORK = nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.LayerNorm(8), nn.Linear(8, 4)).double()
X, V = torch.randn(2, 3, 4, dtype=torch.float64)


def value(x, differentiate=pmf.jvp):
    return differentiate(NETWORK, (x,), (V,))[0]


def loss(parameters, differentiate):
    u, du = differentiate(lambda x: functional_call(NETWORK, parameters, (x,)), (X,), (V,))
    return (u + du.detach()).square().mean()


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_gradients_with_respect_to_parameters():
    parameters = dict(NETWORK.named_parameters())
    close(grad(loss)(parameters, pmf.jvp), grad(loss)(parameters, jvp))


def test_vjp_and_jacrev():
    close(vjp(value, X)[1](V), vjp(NETWORK, X)[1](V))
    close(jacrev(value)(X), jacrev(NETWORK)(X))


def test_vmap_over_samples():
    close(vmap(lambda x, v: pmf.jvp(NETWORK, (x,), (v,)))(X, V), jvp(NETWORK, (X,), (V,)))


FUNCTIONS = {
    "acos": lambda x: (x / 10).acos(),
    "norm": lambda x: x.norm(dim=-1) + F.normalize(x, dim=-1).sum(-1),
    "clamp": lambda x: x.clamp(-0.5, 0.6) + x.clamp_min(0.5),
    "atan2": lambda x: torch.atan2(x, x * x) % 0.3,
    "spectrum": lambda x: torch.fft.rfft(x).abs(),
    "written": lambda x: torch.zeros_like(x).copy_(x) * x,
    "broadcast": lambda x: x + torch.ones(2, 1, 4, dtype=x.dtype),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_without_a_rule(name):
    function = FUNCTIONS[name]

    def moved(x, differentiate=pmf.jvp):
        return differentiate(function, (x,), (torch.ones_like(x),))

    close(vmap(moved)(X), vmap(lambda x: moved(x, jvp))(X))
    close(jacrev(lambda x: moved(x)[0])(X), jacrev(function)(X))
    close(vmap(grad(lambda x: moved(x)[0].sum()))(X), vmap(grad(lambda x: function(x).sum()))(X))


def test_a_tangent_of_other_samples_than_the_value():
    """torch.vmap batches one of them alone."""
    t = torch.rand(3, 1, dtype=torch.float64)

    def added(x, t, differentiate=pmf.jvp):
        return differentiate(lambda t: (x + t) * t, (t,), (torch.ones_like(t),))

    close(vmap(added)(X, t), vmap(lambda x, t: added(x, t, jvp))(X, t))
    close(vmap(lambda x: added(x, t))(X), vmap(lambda x: added(x, t, jvp))(X))


def by_forward_ad(x):
    with forward_ad.dual_level():
        value(forward_ad.make_dual(x, V))


@pytest.mark.parametrize("around", [lambda x: jvp(value, (x,), (V,)), jacfwd(value), by_forward_ad])
def test_a_forward_mode_around_it_is_refused(around):
    with pytest.raises(pmf.InputError, match=r"expected no .* around it"):
        around(X)
    close(value(X), NETWORK(X))
