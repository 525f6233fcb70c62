"""`pmf.jvp` where an operator's arguments beyond the first move, and where memory is shared before it moves."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.pmf.jvp_checks import W, compare, drawn


def written_after_a_view(x):
    new = x.new_zeros(3, 4, 6)
    view, sample = new[..., :2], new[1]
    new[..., 1:4] = x[..., :3].sin()
    return view * 2 + sample[:, :2] * x[..., :2]


def written_through_a_view(x):
    new = torch.zeros_like(x)
    new[..., :3].copy_(x[..., 3:])
    new.transpose(0, 1)[1:].add_(x.transpose(0, 1)[1:].cos())
    return new * x


UNARY = {
    "padding by a number": lambda x: F.pad(x, (1, 2), value=3.0) * 2,
    "constant_pad_nd": lambda x: torch.constant_pad_nd(x, (1, 2), 3.0),
    "frac": lambda x: torch.frac(4 * x),
    "a parameter minus x": lambda x: nn.Parameter(W[0]) - x,
    "a parameter over x": lambda x: nn.Parameter(W[0]) / (x + 9),
    "a parameter times x": lambda x: nn.Parameter(W) @ x.mT,
    "a tensor to the power of x": lambda x: W[0].exp() ** x,
    "a new tensor, written to after a view": written_after_a_view,
    "a new tensor, written to through a view": written_through_a_view,
    "dropout in place": lambda x: F.dropout(x * 1, 0.5, inplace=True) * x,
    "sum to size": lambda x: x.sum_to_size(3, 1, 6),
    "where with names": lambda x: torch.where(condition=x > 0, input=x.sin(), other=x),
}
CONVOLUTIONS = [
    (F.conv1d, (2, 4, 7), (6, 2, 3), 6, dict(stride=2, padding=1, groups=2)),
    (F.conv2d, (2, 4, 7, 5), (6, 4, 3, 3), 6, dict(stride=2)),
    (F.conv2d, (4, 7, 5), (6, 4, 3, 3), 6, dict(dilation=2, padding="same")),
    (F.conv_transpose1d, (2, 4, 7), (4, 3, 3), 3, dict(stride=2)),
    (F.conv_transpose2d, (2, 4, 5, 4), (4, 3, 3, 2), 6, dict(groups=2)),
    (F.conv3d, (1, 2, 4, 4, 4), (3, 2, 2, 2, 2), 3, {}),
    (F.linear, (2, 5, 4), (6, 4), 6, {}),
]


@pytest.mark.parametrize("name", UNARY)
def test_equals_torch_func_jvp(name):
    compare(UNARY[name], [drawn(3, 4, 6)], [drawn(3, 4, 6, seed=1)])


@pytest.mark.parametrize(("function", "shape", "weight", "channels", "options"), CONVOLUTIONS)
def test_input_weight_and_bias_move(function, shape, weight, channels, options):
    primals = [drawn(*shape), drawn(*weight, seed=1), drawn(channels, seed=2)]
    compare(lambda *given: function(*given, **options), primals, [drawn(*x.shape, seed=4) for x in primals])
