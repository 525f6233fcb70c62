"""flash-attn-4 as operators, with PyTorch's CPU FlashAttention as a stand-in; and the installed package (extras)."""

import importlib
import inspect
import os
import subprocess
import sys
import textwrap

import pytest
import torch

from pmf import ops
from pmf.kernels import flash, flash_attn_4
from tests.kernels.checks import DEVICE, check, check_compiles, check_forward_mode
from tests.kernels.test_attention import inputs
from tests.kernels.test_flash import clean  # noqa: F401 (a fixture that every test uses)
from tests.kernels.test_masked_attention import problem

F32, BF16 = torch.float32, torch.bfloat16


def repeated(x, heads):
    """Keys or values, heads first, with a head for each of the queries'."""
    return x.transpose(1, 2).repeat_interleave(heads // x.shape[2], 1)


def forward(q, k, v, softmax_scale, causal, return_lse, out, lse):
    """The package's forward, computed by PyTorch's FlashAttention for CPUs."""
    assert return_lse and out.is_contiguous() and lse.dtype == F32
    heads = (repeated(x, q.shape[2]) for x in (q, k, v))
    options = {"is_causal": causal, "scale": softmax_scale}
    o, found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*heads, **options)
    out.copy_(o.transpose(1, 2))
    lse.copy_(found)
    return out, lse, None, None, None


def backward(q, k, v, out, dout, lse, softmax_scale, causal, deterministic, dq, dk, dv):
    heads = (repeated(x, q.shape[2]) for x in (dout, q, k, v, out))
    gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *heads, lse.float(), 0.0, causal, scale=softmax_scale
    )
    for into, gradient in zip((dq, dk, dv), gradients, strict=True):
        shared = gradient.unflatten(1, (into.shape[2], -1)).sum(2)
        into.copy_(shared.transpose(1, 2))


NO_GPU = pytest.mark.skipif(DEVICE == "cuda", reason="where there is a GPU, test_gpu.py runs the package")


@pytest.fixture
def on_flash_attn_4(monkeypatch):
    if DEVICE == "cuda":
        pytest.skip("the stand-in computes on CPUs; test_gpu.py runs the package")
    monkeypatch.setattr(flash, "choose", lambda *_: "flash_attn_4")
    monkeypatch.setattr(flash_attn_4, "library", lambda: (forward, backward))


def test_flash_attn_4_as_an_operator(on_flash_attn_4):
    """The checks of every kernel: values, tangents, gradients, compilers, checkpointing, forward mode."""
    primals, tangents = inputs(3, 20, 33, 16, 2, BF16)
    check("attention", primals, tangents)
    check("attention", *inputs(2, 276, 276, 80, None, BF16))
    for kind in (("causal",), ("grouped",), ("causal", "grouped")):
        *heads, options = problem(kind, 3, 20, 33, (4, 2), 16, 2, BF16)
        check("attention", *heads, **options)
        check_compiles("attention", *heads, **options)
    check_compiles("attention", primals, tangents)
    check_forward_mode("attention", primals, (0, 1, 2))
    assert ops.attention(primals[0][:0], primals[1][:0], primals[2][:0], impl="triton").shape == (0, 20, 2, 16)


def test_flash_attn_4_saves_no_more_than_it_needs(on_flash_attn_4):
    leaves, saved = [p.detach().requires_grad_() for p in inputs(2, 20, 20, 16, None, BF16)[0]], []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)) or t, lambda t: t):
        o, lse = flash_attn_4.attention(*leaves, 0.25)
    assert sorted(saved) == [(2, 2, 20)] + 4 * [(2, 20, 2, 16)]
    assert o.requires_grad and not lse.requires_grad


def test_flash_attn_4_s_fake_functions(on_flash_attn_4):
    (q, k, v), _ = inputs(2, 20, 33, 16, None, BF16)
    o, lse = torch.ops.pmf.flash_attn_4_forward(q, k, v, 0.25)
    utils = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.pmf.flash_attn_4_forward.default, (q, k, v, 0.25), test_utils=utils)
    arguments = (q, k, v, o, lse, torch.ones_like(o), 0.25)
    torch.library.opcheck(torch.ops.pmf.flash_attn_4_backward.default, arguments, test_utils=utils)


@pytest.mark.extras
@NO_GPU
def test_the_installed_flash_attn_4_takes_our_calls():
    """Its signatures accept our calls and match those of the stand-ins above."""
    pytest.importorskip("flash_attn.cute")
    true = [inspect.signature(function) for function in flash_attn_4.library()]
    for signature, stand_in in zip(true, (forward, backward), strict=True):
        names = list(inspect.signature(stand_in).parameters)
        bound = signature.bind(*names[:3], **{name: name for name in names[3:]})
        assert all(name == value for name, value in bound.arguments.items())
    positional = list(true[1].parameters)[:6]
    assert positional == list(inspect.signature(backward).parameters)[:6]


@pytest.mark.extras
@NO_GPU
def test_the_installed_flash_attn_4_is_refused_where_its_kernels_disagree():
    """On Hopper the kernel that sums dq must use the same padded width as those that clear and read the sums.

    If this fails for a new release, check whether the bug is fixed there, and update `limit`.
    """
    pytest.importorskip("flash_attn.cute")
    cutlass = importlib.import_module("cutlass")
    add, clear, read = (
        getattr(importlib.import_module(f"flash_attn.cute.flash_bwd_{name}"), f"FlashAttentionBackward{kind}")
        for name, kind in (("sm90", "Sm90"), ("preprocess", "Preprocess"), ("postprocess", "Postprocess"))
    )
    for head_dim in range(8, 129, 8):
        half = cutlass.BFloat16, head_dim
        widths = add(*half).tile_hdim, clear(*half, head_dim).head_dim_padded, read(*half, 90).tile_hdim
        refused = flash_attn_4.limit(90, head_dim) is not None
        assert refused == (len(set(widths)) > 1), (head_dim, widths)


@pytest.mark.extras
@NO_GPU
def test_the_installed_flash_attn_4_compiles_for_hopper():
    """It compiles our calls at pMF's widths and the edges of `limit`; on fake tensors, so nothing is launched."""
    pytest.importorskip("flash_attn.cute")
    code = """
        import torch
        from torch._subclasses.fake_tensor import FakeTensorMode
        from pmf.kernels import flash_attn_4, registration
        registration.shapes_only = lambda x: False  # the package itself is called, with fake tensors
        forward, backward = (getattr(flash_attn_4, f"flash_attn_4_{way}").function for way in ("forward", "backward"))
        for head_dim in (24, 64, 96, 120, 128):
            assert flash_attn_4.limit(90, head_dim) is None
            with FakeTensorMode():
                q, k, few = (torch.empty(2, 276, n, head_dim, dtype=torch.bfloat16, device="cuda") for n in (12, 12, 3))
                for keys, causal in ((k, False), (few, True)):
                    o, lse = forward(q, keys, keys, 0.125, causal)
                    gradients = backward(q, keys, keys, o, lse, o, 0.125, causal)
                    assert [x.shape for x in gradients] == [q.shape, keys.shape, keys.shape]
        print("compiled")
    """
    target = {"FLASH_ATTENTION_ARCH": "sm_90", "CUTE_DSL_ARCH": "sm_90a", "FLASH_ATTENTION_NUM_SMS": "132"}
    found = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env=os.environ | target,
    )
    assert found.returncode == 0 and "compiled" in found.stdout, found.stderr[-2000:]
