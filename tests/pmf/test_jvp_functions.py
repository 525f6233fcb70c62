"""`pmf.jvp` of single functions and of random compositions: value, tangent and gradients."""

import functools
import math
import operator
import random

import pytest
import torch
import torch.nn.functional as F

from tests.pmf.jvp_checks import F64, W, compare, drawn

MASK = torch.ones(4, 4, dtype=torch.bool).tril()
INDEX = torch.tensor([2, 0, 1, 3, 3, 1])


def in_place(change):
    """A function of a new tensor that `change` writes to; a view of it sees the change."""

    def run(x):
        y = x * 1.5
        view = y[..., :3]
        change(y)
        return torch.cat([y, view], -1)

    return run


def filled(x):
    y = torch.empty_like(x)
    y[..., 0::2] = x[..., 1::2].sin()
    y[..., 1::2] = 2
    return y


def rotary_complex(x):
    turned = torch.view_as_complex(x.unflatten(-1, (3, 2)).contiguous()) * torch.polar(W[:4, :3].exp(), W[:4, 3:])
    return torch.view_as_real(turned).flatten(-2)


def rotary_real(x):
    a, b = x.chunk(2, -1)
    return x * W[0].cos() + torch.cat((-b, a), -1) * W[0].sin()


def heads(x):
    return x.unflatten(-1, (2, 3)).transpose(1, 2)


def attention(**options):
    return lambda x: F.scaled_dot_product_attention(heads(x), heads(x @ W), heads(x.sin()), **options)


UNARY = {  # of x [3, 4, 6]
    "linear": lambda x: F.linear(x, W, W[0]),
    "matmul": lambda x: x @ W,
    "square product": lambda x: x @ x.transpose(1, 2),
    "mul": lambda x: x * x.sum(-1, keepdim=True),
    "quotient": lambda x: x / (2 + x.square()),
    "from number": lambda x: 2 / (2 + x * x) - 1 + (3 - x),
    "pow": lambda x: (x * x + 1) ** 1.5,
    "number to the power": lambda x: 2**x,
    "einsum": lambda x: torch.einsum("bsc,cd,btd->bst", x, W, x),
    "silu": F.silu,
    "glu": lambda x: F.glu(x) * F.glu(x, 1).sum() + F.glu(input=x, dim=-1),
    "gelu": F.gelu,
    "gelu tanh": functools.partial(F.gelu, approximate="tanh"),
    "softmax": lambda x: x.softmax(1),
    "log_softmax": functools.partial(F.log_softmax, dim=-1),
    "sigmoid": lambda x: x.sigmoid() * torch.tanh(x) + torch.relu(x),
    "softplus": lambda x: F.softplus(x) + F.leaky_relu(x) + F.mish(x) + F.hardswish(x) + F.elu(x),
    "roots": lambda x: (x * x + 1).sqrt() + (x * x + 1).rsqrt() + (x.exp() + 1).log() + (x * x + 1).reciprocal(),
    "angles": lambda x: x.sin() + x.cos() + x.abs() + torch.atan2(x, x * x + 1),
    "clamp": lambda x: x.clamp(-0.5, 0.5) + x.clamp(min=0.1),
    "minimum": lambda x: torch.minimum(x, x.flip(-1)) + x.amax(-1, keepdim=True) + x.max(1, keepdim=True).values,
    "sorted": lambda x: x.sort(-1).values.cumsum(1) + torch.sort(x, dim=1, descending=True)[0],
    "largest": lambda x: (
        x.topk(2).values @ x.topk(3, 1)[0][:, :2] + x.max(1)[0].unsqueeze(1).min(dim=-1, keepdim=True)[0]
    ),
    "of a number": lambda x: x.sum().max(0).values * x.sum().sort().values + x[0, 0].norm() * x,
    "middle": lambda x: x.median(-1).values + x.nanmedian(1, keepdim=True).values[..., :4].sum() + x.kthvalue(2).values,
    "running": lambda x: x.cummax(1).values - x.cummin(-1)[0] + x.mode(dim=0).values,
    "rectifiers": lambda x: F.elu(x, 0.7) + F.selu(x) + F.celu(x, 0.5) + F.relu6(4 * x) + F.hardtanh(x, -0.4, 0.8),
    "logarithms": lambda x: F.logsigmoid(x) + (x * x).log1p() + (x * x + 1).log2() + (x * x + 1).log10() + x.exp2(),
    "inverse angles": lambda x: (x.tanh() * 0.9).asin() + x.tanh().mul(0.9).arccos() + x.atan() + x.tan(),
    "hyperbolic": lambda x: x.sinh() - x.cosh() + x.erf() + torch.special.erfc(x) + torch.special.expm1(x),
    "bounds": lambda x: x.clip(max=0.1) + x.clamp_min(0.2) + torch.clamp_max(x, 0.3) + x.clamp(W[0], W[0] + 1),
    "moving bounds": lambda x: x.clamp(x.mean(), x.mean() + 1) + torch.clamp(min=-0.3, input=x),
    "interpolated": lambda x: torch.lerp(x, W[:4], 0.3) + x.lerp(x * x, W[0]) + torch.lerp(W[:4], x, x.sin()),
    "addcmul": lambda x: torch.addcmul(x, x, W[0], value=0.7) + W[:4].addcmul(x, x.sin()) + x.addcmul(W[0], W[1]),
    "lengths": lambda x: (
        x.norm() + torch.linalg.vector_norm(x, dim=(0, 2)) @ x + torch.linalg.norm(x, dim=1, keepdim=True)
    ),
    "other lengths": lambda x: (
        torch.linalg.vector_norm(x, 1, dim=1, keepdim=True) + x.norm(p=3) + (x * 0).norm(dim=-1, keepdim=True)
    ),
    "deviation": lambda x: x.std(1, keepdim=True) + torch.std(x, correction=0) + (x * 0).std(-1, keepdim=True),
    "spectrogram": lambda x: torch.view_as_real(
        torch.stft(x.flatten(1), 8, 4, window=W[:4].flatten()[:8].exp(), return_complex=True)
    ),
    "without diagonal": lambda x: (x @ x.mT)[0].fill_diagonal_(2.0) + (x[0] @ x[0].mT).fill_diagonal_(0.0, wrap=True),
    "layer_norm": lambda x: F.layer_norm(x, (6,), W[0], W[1]),
    "layer_norm plain": lambda x: F.layer_norm(x, (4, 6)),
    "rms_norm": lambda x: F.rms_norm(x, (6,), W[0], 1e-6) + F.rms_norm(x, (6,)),
    "group_norm": lambda x: F.group_norm(x, 2, W[0, :4], W[1, :4]) + F.group_norm(x, 4),
    "batch_norm": lambda x: F.batch_norm(x, None, None, W[0, :4], W[1, :4], training=True),
    "batch_norm eval": lambda x: F.batch_norm(x, W[0, :4], W[1, :4].exp(), W[2, :4], None),
    "instance_norm": lambda x: F.instance_norm(x),
    "moving modulation": lambda x: F.layer_norm(x, (6,)) * (1 + x.mean(1, keepdim=True)) + x[:, :1],
    "moving weight": lambda x: F.layer_norm(x, (6,), x[0, 0], x[0, 1]),
    "normalize": lambda x: F.normalize(x, dim=-1) + x / x.norm(dim=-1, keepdim=True),
    "attention": attention(),
    "attention causal": attention(is_causal=True, scale=0.3),
    "attention mask": attention(attn_mask=MASK),
    "attention bias": attention(attn_mask=W[:4, :4]),
    "attention moving bias": lambda x: F.scaled_dot_product_attention(x, x, x, attn_mask=x @ x.mT),
    "attention of groups": lambda x: F.scaled_dot_product_attention(
        x[:, None].expand(3, 4, 4, 6), x[:, None].repeat(1, 2, 1, 1), x[:, None].repeat(1, 2, 1, 1), enable_gqa=True
    ),
    "multi-head": lambda x: F.multi_head_attention_forward(
        x, x, x, 6, 2, torch.cat([W, W.T, W]), W.flatten()[:18], None, None, False, 0.0, W, W[0], need_weights=False
    )[0],
    "rope real": rotary_real,
    "rope complex": rotary_complex,
    "fft": lambda x: torch.fft.irfft(torch.fft.rfft(x, dim=1) * W[:3], dim=1),
    "complex abs": lambda x: torch.complex(x, x.flip(0) + 1).abs(),
    "shapes": lambda x: x.reshape(12, 6).t().unsqueeze(0).expand(2, 6, 12).permute(2, 0, 1).flatten(1).contiguous(),
    "indexing": lambda x: torch.cat([x[:, 1:], x[..., INDEX][:, :1], x[:, None, 2], x[:, [0, 1]]], 1),
    "masks": lambda x: torch.where(x > 0, x, W[:4]) + x.masked_fill(x < 0, 3.0) + x.tril(),
    "stacks": lambda x: torch.stack([x, W.expand(3, 6, 6)[:, :4]], 1).flatten(1, 2) + torch.hstack([x, x]),
    "unbind": lambda x: functools.reduce(operator.mul, x.unbind(1)) + sum(x.split([2, 2], 1)).sum(1),
    "iteration": lambda x: torch.stack([row * (i + 1) for i, row in enumerate(x)]),
    "padding": lambda x: F.pad(x, (1, 2), value=3.0)[..., :6] + F.pad(x, (1, 1), mode="reflect")[..., :6],
    "convolution": lambda x: F.conv1d(x, W[:, :4, None].expand(6, 4, 3), W[0], padding=1),
    "transposed": lambda x: F.conv_transpose1d(x, W[:4, :, None].expand(4, 6, 2), W[0], stride=2),
    "convolution by itself": lambda x: F.conv1d(x[:1], x.transpose(1, 2)[:, :4], padding=1),
    "interpolate": lambda x: F.interpolate(x, scale_factor=2) + F.interpolate(x, size=12, mode="linear"),
    "pooling": lambda x: F.avg_pool1d(x, 2) + F.max_pool1d(x, 2) + F.adaptive_avg_pool1d(x, 3),
    "gather": lambda x: x.gather(-1, (x.argsort(-1) + 1) % 6) + x.scatter(1, INDEX[None, None].expand(3, 1, 6), 2.0),
    "embedding": lambda x: F.embedding(INDEX[:4], x[0]).expand(3, 4, 6) + W[INDEX[:4]],
    "by keyword": lambda x: (
        torch.flatten(input=x, start_dim=1).sum() * torch.softmax(input=x, dim=-1)
        + torch.cat(tensors=[x[:1], x[1:]], dim=0)
        + torch.add(input=x, other=torch.mul(input=x, other=x))
    ),
    "still written": lambda x: x * torch.zeros(3, 4, 6, dtype=F64).copy_(torch.ones_like(x)),
    "detached": lambda x: x.detach() * x + x.data,
    "read": lambda x: x * x.sum().item() + len(x),
    "rounded": lambda x: x.round() + x * x.sign(),
    "dropout": lambda x: F.dropout(x, 0.4) * x + F.dropout(x, 0.4, training=False),
    "dropout of channels": lambda x: F.dropout1d(x, 0.4) + F.alpha_dropout(x, 0.3, training=True),
    "noise": lambda x: x * torch.randn_like(x) + torch.rand(3, 1, 1, dtype=F64) * x,
    "filled": filled,
    "added in place": in_place(lambda y: y.add_(y * 3, alpha=2)),
    "multiplied in place": in_place(lambda y: y.mul_(W[0]).div_(2).clamp_(max=1)),
    "operators in place": in_place(lambda y: operator.imul(operator.iadd(y, y * 2), 3)),
    "activated in place": in_place(lambda y: F.relu(F.silu(y, inplace=True), inplace=True)),
    "assigned": in_place(lambda y: y.__setitem__((slice(None), 0), y[:, 1] * 2)),
    "zeroed": in_place(lambda y: (y[:, :2].zero_(), y[:, 2].copy_(W[0]), y[:, 3].copy_(y[:, 2] * 2))),
    "double precision": lambda x: x.float().double() + x.to(torch.float32).to(F64),
    "new": lambda x: x.new_zeros(3, 4, 6).index_add_(1, INDEX[:4], x) + torch.zeros_like(x),
    "loss": lambda x: F.mse_loss(x, W[:4].expand(3, 4, 6), reduction="none") + F.smooth_l1_loss(x, x.detach() + 1),
    "cumulative": lambda x: x.cumprod(1) + x.logsumexp(-1, keepdim=True) + x.var(1, keepdim=True) + x.std(),
    "variance": lambda x: x.var(1, keepdim=True) + x.var(False) + torch.var(x, (0, 2), correction=2)[:, None],
    "inverse": lambda x: torch.linalg.solve(x @ x.mT + 5 * torch.eye(4, dtype=F64), x),
}


@pytest.mark.parametrize("name", UNARY)
def test_value_tangent_and_gradient_of_a_function(name):
    compare(UNARY[name], [drawn(3, 4, 6)], [drawn(3, 4, 6, seed=1)])


SHAPE_KEPT = [name for name in UNARY if name not in ("fft", "double precision", "dropout of channels")]


@pytest.mark.parametrize("seed", range(40))
def test_random_compositions_agree_or_raise(seed):
    """Chains of functions that fold their output back to [3, 4, 6]."""
    chosen = random.Random(seed).sample(SHAPE_KEPT, 4)

    def fold(y):
        y = y.real if y.is_complex() else y
        flat = y.reshape(-1)
        return (flat.repeat(math.ceil(72 / flat.numel()))[:72].view(3, 4, 6) / 3).tanh()

    def chain(x):
        for name in chosen:
            x = x * 0.5 + fold(UNARY[name](x))
        return x

    compare(chain, [drawn(3, 4, 6)], [drawn(3, 4, 6, seed=1)])
