"""The primal of attention: the choice of library, and the layout of the heads it gets."""

import itertools
import logging
import sys

import pytest
import torch

from pmf import dispatch, ops
from pmf.errors import InputError
from pmf.kernels import flash, flash_attn_4
from tests.kernels.checks import DEVICE, close, dual_op, evaluate, strided
from tests.kernels.test_attention import inputs
from tests.kernels.test_masked_attention import ALL, problem

F32, BF16 = torch.float32, torch.bfloat16
HALF = "torch.bfloat16"
FLASH_ATTN_2 = {"flash_attn/__init__.py": "flash_attn_func = print"}
FLASH_ATTN_4 = {
    "flash_attn/cute/__init__.py": "",
    "flash_attn/cute/interface.py": "_flash_attn_fwd = _flash_attn_bwd = print",
}


CACHED = (flash_attn_4.library, flash.flash_attn_2, flash._missing, flash._report, flash._chosen)
"""Caches of imported libraries, missing ones, and reported choices."""


def forget():
    for cached in CACHED:
        cached.cache_clear()


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    monkeypatch.delenv("PMF_ATTENTION", raising=False)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    forget()
    yield
    forget()


@pytest.fixture
def installed(monkeypatch, tmp_path):
    """A function that installs files of packages where imports find them, and hides this machine's flash_attn."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "flash_attn"]:
        monkeypatch.delitem(sys.modules, name)

    def install(files):
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        if files:
            monkeypatch.syspath_prepend(str(tmp_path))
        else:
            monkeypatch.setitem(sys.modules, "flash_attn", None)
        forget()

    yield install
    for name in [name for name in sys.modules if name.partition(".")[0] == "flash_attn"]:
        del sys.modules[name]


NONE = "is not installed"


@pytest.mark.parametrize(
    ("files", "capability", "backend", "reason"),
    [
        ({}, 80, "flash", f"flash_attn {NONE}"),
        ({}, 89, "flash", f"flash_attn {NONE}"),
        ({}, 90, "cudnn", "the first choice on sm_90"),
        ({}, 100, "cudnn", "the first choice on sm_100"),
        ({}, 120, "flash", f"flash_attn {NONE}"),
        ({}, 75, "efficient", "flash_attn needs sm_80 or later, got sm_75; flash needs"),
        (FLASH_ATTN_2, 80, "flash_attn", "the first choice on sm_80"),
        (FLASH_ATTN_2, 89, "flash_attn", "the first choice on sm_89"),
        (FLASH_ATTN_2, 90, "cudnn", "the first choice on sm_90"),
        (FLASH_ATTN_4, 80, "flash", f"flash_attn {NONE}"),
        (FLASH_ATTN_4, 90, "cudnn", "the first choice on sm_90"),
        (FLASH_ATTN_4, 100, "cudnn", "the first choice on sm_100"),
        (FLASH_ATTN_4, 103, "cudnn", "the first choice on sm_103"),
        (FLASH_ATTN_2 | FLASH_ATTN_4, 80, "flash_attn", "the first choice on sm_80"),
        (FLASH_ATTN_2 | FLASH_ATTN_4, 90, "cudnn", "the first choice on sm_90"),
    ],
)
def test_the_first_that_can_run(installed, files, capability, backend, reason):
    """With either, both or neither of the packages, which share the name flash_attn."""
    installed(files)
    found = flash.decide("cuda", HALF, capability, 64)
    assert found[0] == backend and found[1].startswith(reason)
    assert flash.decide("cuda", "torch.float32", capability, 64) == ("efficient", "FlashAttention takes no float32")
    assert flash.decide("cpu", HALF, 0, 64)[0] == "cpu"


def test_flash_attn_4_is_taken_by_request_where_it_has_a_backward(installed):
    installed(FLASH_ATTN_4)
    for head_dim in (24, 64, 96, 120, 128):
        assert flash.decide("cuda", HALF, 90, head_dim, "flash_attn_4") == ("flash_attn_4", "requested")
    for head_dim in (8, 16, 40, 48, 72, 80, 104, 112):
        assert flash.decide("cuda", HALF, 100, head_dim, "flash_attn_4")[0] == "flash_attn_4"
        with pytest.raises(InputError, match=f"it has a wrong gradient of q for head_dim {head_dim} on sm_90"):
            flash.decide("cuda", HALF, 90, head_dim, "flash_attn_4")


@pytest.mark.parametrize(
    ("files", "name", "reason"),
    [
        ({"flash_attn/__init__.py": "raise OSError('undefined symbol: x\\nmore')"}, "flash_attn", "OSError: undefined"),
        ({"flash_attn/__init__.py": "raise OSError('undefined symbol: x\\nmore')"}, "flash_attn_4", "OSError: undef"),
        (FLASH_ATTN_4 | {"flash_attn/cute/interface.py": "import cutlass_x"}, "flash_attn_4", "the package cutlass_x"),
        (FLASH_ATTN_4 | {"flash_attn/cute/interface.py": ""}, "flash_attn_4", "has another interface"),
    ],
)
def test_packages_that_do_not_work(installed, files, name, reason):
    installed(files)
    found = flash.obstacle(name, "cuda", HALF, 90, 64)
    assert reason in found and "\n" not in found


def test_pytorch_s_switches(installed):
    installed(FLASH_ATTN_2 | FLASH_ATTN_4)
    backends = torch.nn.attention.SDPBackend
    for capability in (80, 90):
        with torch.nn.attention.sdpa_kernel(backends.CUDNN_ATTENTION):
            assert flash.decide("cuda", HALF, capability, 64)[0] == "cudnn"
            assert flash.decide("cuda", HALF, capability, 64, "flash")[0] == "flash"
        with torch.nn.attention.sdpa_kernel(backends.FLASH_ATTENTION):
            assert flash.decide("cuda", HALF, capability, 64)[0] == "flash_attn"
        with torch.nn.attention.sdpa_kernel(backends.EFFICIENT_ATTENTION):
            assert flash.decide("cuda", HALF, capability, 64)[0] == "efficient"


def test_each_choice_is_reported_once(installed, monkeypatch, caplog):
    installed({})
    monkeypatch.setattr(flash, "_capability", lambda _: 80)
    with caplog.at_level(logging.INFO, logger="pmf"):
        for _ in range(2):
            assert flash.choose("cuda", 0, HALF, 64, None) == "flash"
    assert [r.getMessage() for r in caplog.records] == [
        "attention of torch.bfloat16 runs its primal on flash: flash_attn is not installed"
    ]


# Backends requested by name.


def test_requests(installed, monkeypatch):
    """The context overrides the environment, the inner context the outer; both are restored on exit."""
    installed(FLASH_ATTN_2 | FLASH_ATTN_4)
    monkeypatch.setattr(flash, "_capability", lambda _: 90)

    def found():
        return dispatch.attention_backend(torch.device("cuda"), BF16, 64)[0]

    assert found() == "cudnn"
    monkeypatch.setenv("PMF_ATTENTION", "flash")
    assert found() == "flash"
    with ops.use_attention_backend("flash_attn_4"):
        assert found() == "flash_attn_4"
        with pytest.raises(LookupError), ops.use_attention_backend("flash_attn"):
            assert found() == "flash_attn"
            with ops.use_attention_backend(None):
                assert found() == "flash_attn"
            raise LookupError
        assert found() == "flash_attn_4"
    assert found() == "flash"
    monkeypatch.setenv("PMF_ATTENTION", "auto")
    assert found() == "cudnn"


@pytest.mark.parametrize(
    ("backend", "place", "reason"),
    [
        ("flash_attn_4", ("cuda", HALF, 80, 64), "is for sm_90 and sm_100, not sm_80"),
        ("flash_attn_4", ("cuda", HALF, 90, 104), "has a wrong gradient of q for head_dim 104 on sm_90"),
        ("flash_attn_4", ("cuda", HALF, 90, 64), "is not installed"),
        ("flash_attn", ("cuda", HALF, 80, 64), "is not installed"),
        ("flash_attn_4", ("cuda", "torch.float32", 90, 64), "takes bfloat16 and float16, got float32"),
        ("flash", ("cuda", "torch.float32", 90, 64), "takes bfloat16 and float16, got float32"),
        ("cudnn", ("cuda", HALF, 75, 64), "needs sm_80 or later, got sm_75"),
        ("efficient", ("cpu", HALF, 0, 64), "needs cuda tensors, got cpu"),
    ],
)
def test_a_request_that_cannot_be_met(installed, backend, place, reason):
    installed({})
    with pytest.raises(InputError) as error:
        flash.decide(*place, backend)
    assert str(error.value) == f"attention: backend {backend} was requested, but it {reason}"


def test_not_built_in(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: False)
    for backend in ("flash", "cudnn"):
        assert flash.obstacle(backend, "cuda", HALF, 80, 64) == "is not built into this PyTorch"


def test_unknown_names(monkeypatch):
    with pytest.raises(InputError, match=r"^attention backend: expected one of .*'cudnn'.*, got 'cuddn'$"):
        ops.use_attention_backend("cuddn").__enter__()
    monkeypatch.setenv("PMF_ATTENTION", "fast")
    with pytest.raises(InputError, match=r"^PMF_ATTENTION: expected one of .*'auto'.*, got 'fast'$"):
        dispatch.attention_backend(torch.device("cpu"), BF16, 64)


def test_the_op_never_falls_back():
    primals = tuple(torch.randn(1, 5, 2, 16, device=DEVICE) for _ in range(3))
    with ops.use_attention_backend("cudnn"), pytest.raises(InputError, match="cudnn was requested, but it"):
        ops.attention(*primals, impl="triton")


def test_compiled_functions_follow_the_context():
    primals = tuple(torch.randn(1, 5, 2, 16, device=DEVICE) for _ in range(3))
    torch._dynamo.reset()
    compiled = torch.compile(lambda *p: ops.attention(*p, impl="triton"), backend="aot_eager", fullgraph=True)
    expected = compiled(*primals)
    with ops.use_attention_backend("cudnn"), pytest.raises(Exception, match="cudnn was requested"):
        compiled(*primals)
    close(compiled(*primals), expected)


def test_sizes_that_compilers_keep_open():
    compiled = torch.compile(
        lambda *p: ops.attention(*p, impl="triton"), backend="aot_eager", fullgraph=True, dynamic=True
    )
    for length, head_dim in ((5, 16), (7, 16), (7, 24)):
        primals = tuple(torch.randn(2, length, 3, head_dim, device=DEVICE) for _ in range(3))
        close(compiled(*primals), ops.attention(*primals, impl="triton"))


# Heads in the layout that the libraries need.


def plain(*shape, dtype=BF16):
    return torch.randn(*shape).to(DEVICE, dtype)


def at_odd_address(*shape):
    """A tensor at an odd address whose storage_offset is zero."""
    buffer = bytearray(2 * torch.Size(shape).numel() + 64)
    start = -torch.frombuffer(buffer, dtype=torch.uint8).data_ptr() % 16 + 2
    count = torch.Size(shape).numel()
    return torch.frombuffer(buffer, dtype=BF16, count=count, offset=start).view(shape)


VIEWS = {
    "contiguous": (lambda: plain(2, 5, 2, 16), True),
    "packed": (lambda: plain(2, 5, 3, 2, 16)[:, :, 2], True),
    "heads first": (lambda: plain(2, 2, 5, 16).transpose(1, 2), True),
    "last samples": (lambda: plain(2, 5, 3, 2, 16)[1:, :, 0], True),
    "one token of all": (lambda: plain(2, 1, 2, 16).expand(2, 5, 2, 16), True),
    "whole groups of 8": (lambda: plain(2, 5, 2, 32)[..., 8:24], True),
    "float32": (lambda: plain(2, 5, 2, 16, dtype=F32), True),
    "channels apart": (lambda: plain(2, 5, 2, 32)[..., ::2], False),
    "channels before heads": (lambda: plain(2, 5, 16, 2).mT, False),
    "gaps": (lambda: strided(plain(2, 5, 2, 16)), False),
    "shifted by 4": (lambda: plain(2, 5, 2, 32)[..., 4:20], False),
    "float32, shifted by 2": (lambda: plain(2, 5, 2, 32, dtype=F32)[..., 2:18], False),
    "contiguous, shifted": (lambda: plain(1, 5 * 2 * 16 + 1)[:, 1:].view(1, 5, 2, 16), False),
}
if DEVICE == "cpu":
    VIEWS["odd address"] = (lambda: at_odd_address(2, 5, 2, 16), False)


@pytest.mark.parametrize("name", VIEWS)
def test_unaligned_heads_are_copied(name):
    make, fits = VIEWS[name]
    x = make()
    found = flash.aligned(x)
    assert (found is x) == fits
    assert torch.equal(found, x)
    assert found.stride(-1) == 1 and all(step % 8 == 0 for step in found.stride()[:-1]) and found.data_ptr() % 16 == 0
    assert flash.aligned(None) is None


def test_unaligned_heads_under_transforms_and_gradients():
    x = VIEWS["contiguous, shifted"][0]().float()
    view = torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape)
    starts = []

    def function(x):
        y = flash.aligned(x)
        starts.append(torch.func.debug_unwrap(y).data_ptr() % 16)
        return (y * y).sum()

    assert view.data_ptr() % 16 != 0
    torch.testing.assert_close(torch.func.grad(function)(view), 2 * view)
    torch.testing.assert_close(torch.func.jvp(function, (view,), (view,))[1], 2 * (view * view).sum())
    leaf = view.detach().requires_grad_()
    torch.testing.assert_close(torch.autograd.grad(function(leaf), leaf)[0], 2 * view)
    assert starts == [0, 0, 0]


@pytest.mark.skipif(DEVICE == "cuda", reason="sums of backward passes on GPUs come in any order")
@pytest.mark.parametrize("name", [name for name, (_, fits) in VIEWS.items() if not fits])
def test_attention_of_unaligned_heads(monkeypatch, name):
    """Value, tangent and gradients equal those of aligned copies bit for bit; no library gets unaligned heads."""
    compute, seen = flash.attention, []
    monkeypatch.setattr(flash, "attention", lambda *heads: seen.append(heads[:3]) or compute(*heads))
    x = VIEWS[name][0]()
    copy = x.clone(memory_format=torch.contiguous_format)
    runs = [evaluate("attention", (t, t, t), (t, t, t), None, impl="triton") for t in (x, copy)]
    for a, b in zip(*runs, strict=True):
        close(tuple(a), tuple(b))
    assert all(flash.aligned(head) is head for heads in seen for head in heads) and len(seen) == 2


@pytest.mark.parametrize("dtype", (F32, BF16), ids=str)
def test_one_key_is_exact(dtype):
    """With one key, o is v, the log-sum-exp is the score, and the gradients of q and k are zero."""
    (q, k, v), _ = inputs(2, 20, 1, 16, None, dtype)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    o, lse = flash.attention(*leaves, 0.3)
    assert torch.equal(o, v.expand_as(o)) and o.is_contiguous()
    torch.testing.assert_close(lse, 0.3 * torch.einsum("bqhd,bkhd->bhq", q.float(), k.float()))
    assert lse.is_contiguous() and not lse.requires_grad
    dq, dk, _ = torch.autograd.grad(o.float().square().sum(), leaves)
    assert not dq.any() and not dk.any()


# Stand-ins with the libraries' signatures compute by formula: layouts, padding, scale.


def formula(q, k, v, scale, causal, bias=None):
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    s = scale * q @ k.mT
    s = s if bias is None else s + bias
    s = s.masked_fill(torch.ones_like(s).triu(1).bool(), -torch.inf) if causal else s
    return s.softmax(-1) @ v, s.logsumexp(-1)


def heads_first(q, k, v, *, scale, is_causal):
    return *formula(q, k, v, scale, is_causal), None


def package(q, k, v, softmax_scale, causal, return_attn_probs):
    o, lse = formula(*(x.transpose(1, 2) for x in (q, k, v)), softmax_scale, causal)
    return o.transpose(1, 2).contiguous(), lse, None


def cudnn(q, k, v, bias, with_lse, scale, is_causal):
    assert bias is None and with_lse is True
    o, lse = formula(q, k, v, scale, is_causal)
    return o, lse[..., None]


def efficient(q, k, v, bias, with_lse, scale, is_causal):
    assert with_lse is True and q.shape[1] == k.shape[1] == v.shape[1]
    assert bias is None or not is_causal  # PyTorch never passes both
    o, lse = formula(q, k, v, scale, is_causal, bias)
    return o, torch.nn.functional.pad(lse, (0, -lse.shape[-1] % 32), value=torch.nan)


@pytest.mark.parametrize(
    ("backend", "kind"),
    [
        *itertools.product(("flash_attn", "flash", "cudnn", "efficient"), ((), ("causal",), ("grouped",))),
        *itertools.product(("efficient",), (("lengths",), ALL)),
    ],
)
def test_every_primal_gives_what_the_tangent_needs(monkeypatch, backend, kind):
    played = {"flash": heads_first, "cudnn": cudnn, "efficient": efficient}
    primals, tangents, options = problem(kind, 2, 20, 33, (4, 2), 16, 1, F32)
    expected = dual_op("attention", primals, tangents, impl="reference", scale=0.3, **options)
    monkeypatch.setattr(flash, "choose", lambda *_: backend)
    monkeypatch.setattr(flash, "flash_attn_2", lambda: package)
    monkeypatch.setattr(flash, "SCALED_DOT_PRODUCT", played)
    found = dual_op("attention", primals, tangents, impl="triton", scale=0.3, **options)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", ("flash", "cudnn", "efficient"))
def test_pytorch_s_backends_on_meta_tensors(monkeypatch, backend):
    """Shapes of values, log-sum-exps and gradients where nothing is computed; heads of keys in groups."""
    monkeypatch.setattr(flash, "choose", lambda *_: backend)
    q, k, v = (torch.empty(3, 33, n, 80, dtype=BF16, device="meta", requires_grad=True) for n in (4, 2, 2))
    lengths = torch.empty(3, dtype=torch.int64, device="meta") if backend == "efficient" else None
    for causal, given in ((True, None), (False, lengths), (True, lengths)):
        o, lse = flash.attention(q, k, v, 0.1, causal, given)
        assert o.shape == q.shape and o.is_contiguous() and lse.shape == (3, 4, 33) and lse.dtype == F32
        assert [x.shape for x in torch.autograd.grad(o.sum(), (q, k, v))] == [q.shape, k.shape, v.shape]


def test_key_lengths_go_to_the_memory_efficient_attention(installed):
    """Whatever else could run; the reason says which did not."""
    installed(FLASH_ATTN_2 | FLASH_ATTN_4)
    for capability in (75, 80, 90):
        backend, reason = flash.decide("cuda", HALF, capability, 64, lengths=True)
        assert backend == "efficient" and "cudnn takes no key_lengths" in reason
        assert flash.decide("cuda", HALF, capability, 64, "efficient", lengths=True)[0] == "efficient"
    assert flash.decide("cpu", HALF, 0, 64, lengths=True)[0] == "cpu"
    for backend in set(flash.BACKENDS) - {"efficient"}:
        with pytest.raises(InputError, match=f"backend {backend} was requested, but it takes no key_lengths$"):
            flash.decide("cuda", HALF, 90, 64, backend, lengths=True)
