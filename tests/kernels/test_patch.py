"""`patch_embed` in Triton against the float64 reference: two convolutions, concatenation and addition."""

import math
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pmf import ops
from pmf.errors import InputError
from pmf.kernels import patch, registration
from tests.kernels.checks import check, check_compiles, check_forward_mode, generator, randn

SECOND_WEIGHT = 3
F32, BF16 = torch.float32, torch.bfloat16


def inputs(batch, patch, size, *, channels=3, bottleneck=24, width=40, prefix=5, rows=1, images=F32, dtype=F32):
    """Primals and the tangents of images and prefix; rows None: no tangent."""
    gen = generator(batch, patch, size, channels, bottleneck, width, prefix, rows)
    height, across = size

    def data(n, param=dtype):
        return (
            randn(n, channels, height, across, gen=gen, dtype=images),
            randn(n, prefix, width, gen=gen, dtype=param) if prefix else None,
        )

    pixels, tokens = data(batch)
    fan_in = channels * patch * patch
    weights = (
        randn(bottleneck, channels, patch, patch, gen=gen) * fan_in**-0.5,
        randn(bottleneck, gen=gen),
        randn(width, bottleneck, 1, 1, gen=gen) * bottleneck**-0.5,
        randn(width, gen=gen),
        randn(prefix + (height // patch) * (across // patch), width, gen=gen),
    )
    moving = data(rows) if rows is not None else (None, None)
    primals = (pixels, *(w.to(dtype) for w in weights), tokens)
    return primals, (moving[0], None, None, None, None, None, moving[1])


@pytest.mark.parametrize("images", (F32, BF16), ids=str)
@pytest.mark.parametrize(("patch", "side"), ((2, 20), (4, 16), (8, 32), (16, 64), (32, 64)))
def test_patch_sizes(patch, side, images):
    """Values, tangents and every gradient; weights in float32 and bfloat16."""
    for dtype in (F32, BF16):
        case = inputs(3, patch, (side, side), rows=2, images=images, dtype=dtype)
        check("patch_embed", *case, products=(SECOND_WEIGHT,))


@pytest.mark.parametrize("images", (F32, BF16), ids=str)
def test_autocast(images):
    """Matrix products are in bfloat16, tokens in the positions' float32."""
    check("patch_embed", *inputs(2, 4, (16, 16), images=images), autocast=BF16)


@pytest.mark.parametrize("rows", (None, 0, 1, 3))
@pytest.mark.parametrize("prefix", (0, 20))
def test_rows(prefix, rows):
    check("patch_embed", *inputs(3, 4, (8, 12), prefix=prefix, rows=rows))


def test_each_tangent_alone():
    """A missing tangent, of the images or of the prefix, is zero."""
    primals, tangents = inputs(3, 4, (8, 12), rows=2)
    for i in (0, 6):
        check("patch_embed", primals, tuple(t if i == j else None for j, t in enumerate(tangents)))


def test_published_shape():
    """256 px, patches of 16, bottleneck 128, a prefix of 20; with a smaller width."""
    check("patch_embed", *inputs(1, 16, (256, 256), bottleneck=128, width=96, prefix=20, dtype=BF16))
    check("patch_embed", *inputs(1, 32, (64, 96), bottleneck=256, width=80, prefix=20, dtype=BF16))


def test_views():
    primals, tangents = inputs(3, 4, (16, 16), rows=2)
    images, *rest = primals
    turned = images.to(memory_format=torch.channels_last)
    dot = tangents[0].mT.contiguous().mT
    check("patch_embed", (turned, *rest), (dot, *tangents[1:]))


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    batch=st.integers(0, 3),
    patch=st.sampled_from((2, 4, 8)),
    rows=st.integers(1, 5),
    columns=st.integers(1, 5),
    channels=st.integers(1, 4),
    bottleneck=st.integers(1, 40),
    width=st.integers(1, 70),
    prefix=st.integers(0, 5),
    share=st.floats(0, 1),
)
def test_any_shape(batch, patch, rows, columns, channels, bottleneck, width, prefix, share):
    size = (rows * patch, columns * patch)
    options = dict(channels=channels, bottleneck=bottleneck, width=width, prefix=prefix)
    check("patch_embed", *inputs(batch, patch, size, rows=round(share * batch), **options))


def test_some_gradients_only():
    """A gradient is the same whether it is asked for alone or with the others."""
    primals, _ = inputs(2, 4, (16, 16))

    def gradients(wanted):
        leaves = [p.detach().requires_grad_(i in wanted) for i, p in enumerate(primals)]
        tokens = ops.patch_embed(*leaves, impl="triton")
        return dict(zip(wanted, torch.autograd.grad(tokens.square().sum(), [leaves[i] for i in wanted]), strict=True))

    everything = gradients(range(7))
    for i in range(7):
        assert torch.equal(gradients((i,))[i], everything[i]), i
    with torch.no_grad():
        assert not ops.patch_embed(*primals, impl="triton").requires_grad


def test_compilers_checkpointing_and_forward_mode():
    primals, tangents = inputs(3, 4, (8, 8), rows=2)
    check_compiles("patch_embed", primals, tangents)
    check_forward_mode("patch_embed", primals, (0, 6))
    with pytest.raises(RuntimeError, match="patch_embed: weight1 takes no tangent"):
        of_weight = lambda w: ops.patch_embed(primals[0], w, *primals[2:], impl="triton")  # noqa: E731
        torch.func.jvp(of_weight, primals[1:2], primals[1:2])


def test_registered_operators():
    primals, tangents = inputs(3, 4, (8, 8), rows=2)
    ops.patch_embed(*primals, impl="triton")
    utils = ("test_schema", "test_faketensor")
    images, weight1, bias1, weight2, bias2, positions, prefix = primals
    arguments = (images, tangents[0], weight1, bias1, weight2, bias2, positions, prefix, tangents[6], BF16, True)
    torch.library.opcheck(torch.ops.pmf.patch_forward.default, arguments, test_utils=utils)
    tokens, _, hidden = torch.ops.pmf.patch_forward(*arguments)
    for needs in ([True] * 5, [False, True, False, False, True]):
        arguments = (tokens, images, weight1, weight2, hidden, 5, needs)
        torch.library.opcheck(torch.ops.pmf.patch_backward.default, arguments, test_utils=utils)


class Traffic(TorchDispatchMode):
    """Counts the bytes that operators and kernel launches read and write: once for every tensor of each."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def count(self, *tensors):
        """Add the bytes of the tensors; views count by their own shape, expanded dimensions once."""
        for x in tree_leaves(tensors):
            if isinstance(x, torch.Tensor):
                self.bytes += x.itemsize * math.prod(n for n, step in zip(x.shape, x.stride(), strict=True) if step)

    def launch(self, kernel, grid, *arguments, **options):
        self.count(*arguments)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        allocates = "empty" in function.__name__
        if not allocates and not any(r.alias_info for r in function._schema.returns):
            self.count(args, result)
        return result


@pytest.mark.parametrize(("width", "bottleneck"), ((768, 128), (1280, 256)), ids=("B", "H"))
def test_backward_moves_little_more_than_it_must(width, bottleneck, monkeypatch):
    """At most 1.3 times the bytes of all inputs and gradients once, at B/16 and H/16 with 128 samples."""

    def meta(*shape, dtype=F32):
        return torch.empty(*shape, dtype=dtype, device="meta")

    traffic = Traffic()
    monkeypatch.setattr(registration, "chip", lambda device: registration.Chip(90, 132))
    monkeypatch.setattr(registration, "launch", traffic.launch)
    monkeypatch.setattr(registration, "shapes_only", lambda x: False)
    monkeypatch.setattr(patch, "patch_backward", patch.patch_backward.function)
    saved = (meta(128, 3, 256, 256), meta(bottleneck, 3, 16, 16), meta(width, bottleneck, 1, 1))
    saved = (*saved, meta(128, 256, bottleneck, dtype=BF16))
    needs = (False, False, *(True,) * 6, *(False,) * 3)
    context = types.SimpleNamespace(
        saved_tensors=saved, prefix=(20, F32), positions_dtype=F32, needs_input_grad=needs, needs=[False, *(True,) * 4]
    )
    dtokens = meta(128, 276, width)
    with traffic:
        gradients = patch._gradients(context, dtokens)
    assert [g is not None for g in gradients] == list(needs)[:8]
    *written, dprefix = gradients[:8]
    assert dprefix._base is dtokens  # a view: not written
    least = sum(x.nbytes for x in (dtokens, *saved, *written) if x is not None)
    assert least < traffic.bytes <= 1.3 * least, f"{traffic.bytes / 1e6:.0f} MB against {least / 1e6:.0f}"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(patch=3, size=(6, 6)), r"patch size must be one of \(2, 4, 8, 16, 32\) .* got 3"),
        (dict(patch=4, size=(8, 8), bottleneck=264), "bottleneck must be at most 256 .* got 264"),
        (dict(patch=4, size=(8, 8), images=torch.float64), "dtype must be float32, bfloat16 or float16"),
    ],
)
def test_bad_input(monkeypatch, options, message):
    monkeypatch.setattr("tests.kernels.checks.DEVICE", "cpu")  # refused on any device
    primals, _ = inputs(2, **options)
    with pytest.raises(InputError, match=f"^patch_embed: .*{message}") as error:
        ops.patch_embed(*primals, impl="triton")
    assert "\n" not in str(error.value)
