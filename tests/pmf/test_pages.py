"""The code in docs/library.md that needs no data and no GPU runs as printed."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import pmf
from pmf import layers, metrics
from pmf.images import save_png
from tests.networks import relative_error
from tests.train.evaluation import Toy

PAGE = (Path(__file__).parents[2] / "docs" / "library.md").read_text()
SECTIONS = {
    "Layers for any transformer": 2,
    "Explicit tangents: pmf.dual": 3,
    "Any network: pmf.jvp": 2,
}


class Square(torch.autograd.Function):
    """What the page gives a rule."""

    @staticmethod
    def forward(ctx, x):
        return x * x


def blocks(section):
    """The blocks of Python in a section."""
    (text,) = re.findall(rf"^## {re.escape(section)}\n(.*?)(?=^## )", PAGE, re.MULTILINE | re.DOTALL)
    return re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def names():
    """What the page takes for granted."""
    q, q_dot, k, k_dot, v, v_dot = torch.randn(6, 2, 5, 2, 8)
    angle, width = torch.rand(5, 32), 768
    return dict(
        torch=torch, pmf=pmf, layers=layers, Square=Square, q=q, q_dot=q_dot, k=k, k_dot=k_dot, v=v, v_dot=v_dot,
        x=torch.randn(2, 5, width), x_dot=torch.randn(2, 5, width), cos=angle.cos(), sin=angle.sin(),
        scale=torch.randn(2, width), shift=torch.randn(2, width),
        condition=(torch.randn(2, width), torch.randn(1, width)),
        linear=nn.Linear(width, 3 * width), mlp=layers.Mlp(width, width), block=layers.DiTBlock(width, 12),
        vit=SimpleNamespace(blocks=nn.ModuleList([layers.ViTBlock(width, 12, qkv_bias=True)])),
        network=lambda z, t, r: z * (t * r)[:, None, None, None], z=q, t=torch.rand(2), r=torch.rand(2),
    )  # fmt: skip


@pytest.mark.parametrize("section", SECTIONS)
def test_code_runs_as_printed(section):
    found, given = blocks(section), names()
    assert len(found) == SECTIONS[section]
    for block in found:
        exec(block, given)


def test_metrics_are_computed_as_printed(tmp_path, monkeypatch, capsys):
    """By a small extractor in Inception's place, on the CPU."""
    (block,) = blocks("Metrics")
    folder = tmp_path / "images"
    for i in range(12):
        pixels = torch.randint(256, (8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(i))
        save_png(folder / f"{i}.png", pixels.numpy())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(metrics, "inception", lambda device: Toy())
    metrics.Statistics.of(torch.randn(20, 6)).save("imagenet.npz")
    exec(block.replace('"cuda"', '"cpu"'), dict(folder=folder))
    assert "'fid': " in capsys.readouterr().out


def test_the_block_of_ones_own_is_llamas():
    """Against plain PyTorch: value, gradients, and the tangent inside pmf.jvp."""
    torch.manual_seed(0)
    given = names()
    for block in blocks("Explicit tangents: pmf.dual"):
        exec(block, given)
    dim, heads, groups = 32, 4, 2
    ours = given["LlamaBlock"](dim, heads, groups, 20).double()
    for parameter in ours.parameters():
        nn.init.normal_(parameter, std=0.3)
    x, x_dot = torch.randn(2, 3, 5, dim, dtype=torch.float64)
    cos, sin = torch.randn(2, 5, dim // heads // 2, dtype=torch.float64)

    def rotated(x):
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)

    def plain(x):
        y = nn.functional.rms_norm(x, (dim,), ours.norm1.weight)
        q, k, v = (h.transpose(1, 2) for h in ours.attention.qkv(y).unflatten(-1, (-1, 8)).split([heads, 2, 2], 2))
        k, v = (h.repeat_interleave(heads // groups, 1) for h in (rotated(k), v))
        mixed = (rotated(q) @ k.mT / 8**0.5).softmax(-1) @ v
        x = x + ours.attention.proj(mixed.transpose(1, 2).flatten(2))
        y = nn.functional.rms_norm(x, (dim,), ours.norm2.weight)
        return x + ours.mlp.w2(nn.functional.silu(ours.mlp.w1(y)) * ours.mlp.w3(y))

    value, tangent = torch.func.jvp(plain, (x,), (x_dot,))
    y, y_dot = pmf.jvp(lambda x: ours(x, layers.Rope(cos, sin)), (x,), (x_dot,))
    assert relative_error(y, value) < 1e-13 and relative_error(y_dot, tangent) < 1e-13
    gradients, wanted = (torch.autograd.grad(out.square().sum(), [*ours.parameters()]) for out in (y, plain(x)))
    assert all(relative_error(*pair) < 1e-12 for pair in zip(gradients, wanted, strict=True))
