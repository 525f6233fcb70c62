"""`pmf.jvp` inside PyTorch's function transforms: right, or one line that says why not."""

import pytest
import torch
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


def by_forward_ad(x):
    with forward_ad.dual_level():
        value(forward_ad.make_dual(x, V))


@pytest.mark.parametrize("around", [lambda x: jvp(value, (x,), (V,)), jacfwd(value), by_forward_ad])
def test_a_forward_mode_around_it_is_refused(around):
    with pytest.raises(pmf.InputError, match=r"expected no .* around it"):
        around(X)
    close(value(X), NETWORK(X))
