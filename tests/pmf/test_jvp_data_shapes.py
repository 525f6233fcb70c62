"""`pmf.jvp` in compiled code of tensors whose shape depends on data: what selects, and what then computes with it."""

import pytest
import torch

import pmf
from tests.pmf.jvp_checks import drawn

KEPT = torch.tensor([True, True, False, True])
SELECTIONS = {
    "slice": lambda x: x[:, : KEPT.sum()],
    "mask": lambda x: x[:, KEPT],
    "masked_select": lambda x: x.masked_select(KEPT),
    "split": lambda x: x.split([KEPT.sum().item(), (~KEPT).sum().item()], 1)[0],
    "narrow": lambda x: x.narrow(1, 0, KEPT.sum().item()),
}
USES = {
    "products": lambda x: (x * 2 + x).mul(x).sin(),
    "sums": lambda x: x + x.mean() + x.sum(-1, keepdim=True),
    "written": lambda x: (x * 1).mul_(x).add_(x.exp()),
    "stacked": lambda x: torch.cat((x, x.cos()), -1).softmax(-1),
    "flattened": lambda x: x.reshape(-1).square(),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("selection", SELECTIONS)
@torch._dynamo.config.patch(capture_scalar_outputs=True, capture_dynamic_output_shape_ops=True)
def test_shapes_may_depend_on_data(selection, use):
    """Of three of four columns, whose number the compiler does not know."""

    def network(x):
        return USES[use](SELECTIONS[selection](x.sin()))

    torch._dynamo.reset()
    x, v = drawn(3, 4).requires_grad_(), drawn(3, 4, seed=1)
    out, dot = torch.compile(lambda x: pmf.jvp(network, (x,), (v,)), fullgraph=True, backend="aot_eager")(x)
    plain, (_, wanted) = network(x), torch.func.jvp(network, (x.detach(),), (v,))
    gradient, expected = (torch.autograd.grad(y.sum(), x)[0] for y in (out, plain))
    for a, b in ((out, plain), (dot, wanted), (gradient, expected)):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
