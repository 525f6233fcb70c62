import logging

import pytest
import torch

from pmf import InputError, ops

x = torch.randn(2, 5, 8)
qkv = torch.randn(2, 5, 3, 2, 8)
angles = torch.randn(5, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: ops.norm_modulate(x[0]),
            r"norm_modulate: x must have shape \[any, any, any\], got \[5, 8\]",
        ),
        (
            lambda: ops.norm_modulate(x, torch.ones(7)),
            r"norm_modulate: weight must have shape \[8\], got \[7\]",
        ),
        (
            lambda: ops.norm_modulate(x, scale=torch.ones(3, 8)),
            r"scale must have shape \[2, 8\], got \[3, 8\]",
        ),
        (lambda: ops.norm_modulate(x, kind="batch"), 'kind must be "rms" or "layer", got \'batch\''),
        (lambda: ops.residual_norm_modulate(x, x[:1], torch.ones(8)), r"branch must have shape \[2, 5, 8\]"),
        (
            lambda: ops.norm_modulate_dual((x, torch.ones(8), None, None), (x, torch.ones(8), None, None)),
            "norm_modulate: weight takes no tangent, got one; expected None",
        ),
        (
            lambda: ops.norm_modulate_dual((x, None, None, None), (x, None, torch.ones(2, 8), None)),
            "norm_modulate: scale is absent, so its tangent must be None",
        ),
        (lambda: ops.norm_modulate_dual((x,), (x,)), "norm_modulate: expected 4 primals, got 1"),
        (
            lambda: ops.swiglu_dual((x,), (torch.randn(3, 5, 8),)),
            "x's tangent must have at most 2 samples, got 3",
        ),
        (lambda: ops.swiglu(x[..., :7]), "swiglu: x must have an even last dimension, got 7"),
        (
            lambda: ops.qk_norm_rope(qkv, torch.ones(8), torch.ones(8), angles, angles, prefix_length=1),
            r"qk_norm_rope: cos must have shape \[4, 4\], got \[5, 4\]",
        ),
        (
            lambda: ops.qk_norm_rope(qkv, torch.ones(8), torch.ones(8), angles, angles, prefix_length=6),
            r"prefix_length must lie in \[0, 5\], got 6",
        ),
        (
            lambda: ops.attention(qkv[:, :, 0], qkv[:, :, 1, :1], qkv[:, :, 2]),
            r"attention: k must have shape \[2, any, 2, 8\], got \[2, 5, 1, 8\]",
        ),
        (
            lambda: ops.patch_embed(
                torch.randn(2, 3, 9, 8),
                torch.randn(4, 3, 4, 4),
                torch.randn(4),
                torch.randn(8, 4, 1, 1),
                torch.randn(8),
                torch.randn(4, 8),
            ),
            "images must have sides that are multiples of the patch size 4, got 9 x 8",
        ),
    ],
)
def test_bad_input_is_one_line_that_names_the_argument(call, message):
    with pytest.raises(InputError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


def test_impl_is_checked_by_name_and_source(monkeypatch):
    with pytest.raises(InputError, match=r"impl: expected one of .*, got 'cuda'"):
        ops.swiglu(x, impl="cuda")
    monkeypatch.setenv("PMF_IMPL", "fast")
    with pytest.raises(InputError, match=r"PMF_IMPL: expected one of .*, got 'fast'"):
        ops.swiglu(x)


def test_the_choice_is_reported_once(caplog):
    ops._report.cache_clear()
    with caplog.at_level(logging.INFO, logger="pmf"):
        ops.swiglu(x, impl="reference")
        ops.swiglu(x, impl="reference")
    assert [r.getMessage() for r in caplog.records] == ["swiglu runs on reference: requested"]
