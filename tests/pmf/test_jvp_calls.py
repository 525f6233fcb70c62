"""`pmf.jvp` as a call: what goes in and comes out, and several threads at once."""

import collections
import concurrent.futures
import dataclasses
import threading

import pytest
import torch
import torch.nn.functional as F

import pmf
from pmf import InputError
from tests.pmf.jvp_checks import F64, compare, drawn


@dataclasses.dataclass
class Output:
    sample: torch.Tensor


class Held:
    __slots__ = ("sample",)

    def __init__(self, sample):
        self.sample = sample


@pytest.mark.parametrize(
    "function",
    [Output, Held, lambda x: {x}, lambda x: (x * i for i in range(2)), lambda x: [Output([{"a": x}])]],
    ids=["dataclass", "slots", "set", "generator", "nested"],
)
def test_outputs_that_would_hide_tangents_are_refused(function):
    with pytest.raises(InputError, match=r"the function returned .*; expected tensors, or lists, tuples and dicts"):
        pmf.jvp(function, (drawn(3),), (1,))
    assert pmf.jvp(lambda x: (x, function(x)), (drawn(3),), (1,), has_aux=True)[1].sum() == 3


def test_what_cannot_be_called_is_refused():
    with pytest.raises(InputError, match=r"^pmf.jvp: func must be callable, got Tensor$"):
        pmf.jvp(drawn(3), (drawn(3),), (1,))


@pytest.mark.parametrize(
    ("primal", "tangent", "message"),
    [
        (drawn(3), torch.complex(drawn(3), drawn(3)), "tangent of a real primal must be real, got torch.complex128"),
        (drawn(3), 1j, "tangent of a real primal must be real, got complex"),
        (drawn(3), drawn(3).to("meta"), "device and layout of its primal, cpu and torch.strided, got meta"),
        (drawn(3), drawn(3).to_sparse(), "got cpu and torch.sparse_coo"),
        (drawn(3).to_sparse(), 1, "primal with tangent must be dense, got .* torch.sparse"),
        (torch.nested.nested_tensor([drawn(3)], layout=torch.jagged), 1, "primal with tangent must be dense"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_tangents_that_do_not_fit_are_named(primal, tangent, message):
    with pytest.raises(InputError, match=message):
        pmf.jvp(torch.sin, (primal,), (tangent,))


@pytest.mark.parametrize("kind", [dict, collections.OrderedDict])
@pytest.mark.parametrize("compiled", [False, True])
def test_entries_of_dicts_are_paired_by_name(kind, compiled):
    x, w, v = drawn(3), drawn(3, seed=1), drawn(3, seed=2)

    def call(x, w, v):
        primals, tangents = ([kind(x=x, w=w)], x), ([kind(w=None, x=v)], 1)
        return pmf.jvp(lambda parts, y: parts[0]["x"] * parts[0]["w"] + y, primals, tangents)

    out, dot = (torch.compile(call, fullgraph=True, backend="aot_eager") if compiled else call)(x, w, v)
    assert torch.equal(out, x * w + x) and torch.equal(dot, v * w + 1)
    with pytest.raises(InputError, match="tangents must have the structure of primals"):
        pmf.jvp(lambda d: d["x"] * d["w"], ({"x": x, "w": w},), ({"x": v},))


@pytest.mark.parametrize("rows", ["2", 2.0])
def test_rows_must_be_a_number(rows):
    with pytest.raises(InputError, match="rows must be an int, got"):
        pmf.jvp(torch.sin, (drawn(3),), (drawn(2),), rows=rows)


@pytest.mark.parametrize("function", [torch.sum, lambda x: x.sum(0), lambda x: (x, x.mean())])
def test_outputs_without_samples_cannot_be_joined(function):
    with pytest.raises(InputError, match=r"with rows outputs must have \(2, 3\) samples in two calls, got"):
        pmf.jvp(function, (drawn(5, 4),), (drawn(3, 4),), rows=3)


def test_no_row_may_move():
    x, v, w = drawn(4, 3), drawn(4, 3, seed=1), drawn(3, 3, seed=2).requires_grad_()
    (out, mask), (dot, none), aux = pmf.jvp(
        lambda x: ((torch.linalg.vector_norm(x @ w, dim=-1, keepdim=True), "label"), x), (x,), (v[4:],), rows=0,
        has_aux=True,
    )  # fmt: skip
    assert torch.equal(out, torch.linalg.vector_norm(x @ w, dim=-1, keepdim=True)) and out.requires_grad
    assert dot.shape == (0, 1) and not dot.requires_grad and mask == "label" and none is None and aux is x
    with pytest.raises(InputError, match="with rows outputs must have samples, got a single number"):
        pmf.jvp(torch.sum, (x,), (1,), rows=0)


def test_rows_with_tangents_that_are_numbers_or_of_scalars():
    z, t, s = drawn(4, 2), drawn(4, seed=1), torch.tensor(0.5, dtype=F64)

    def function(z, t, s):
        return z * t[:, None] * s

    all_rows = pmf.jvp(function, (z, t, s), (1, 1, s))[1]
    torch.testing.assert_close(pmf.jvp(function, (z, t, s), (1, 1, s), rows=3)[1], all_rows[1:])
    torch.testing.assert_close(pmf.jvp(function, (z, t, s), (1, 1, 0.5), rows=3)[1], all_rows[1:])


def test_views_of_expanded_primals():
    x, v = drawn(6).expand(2, 3, 6), drawn(3, 2, 6, seed=2).transpose(0, 1)
    out, dot = pmf.jvp(lambda x: x.view(6, 6), (x,), (v,))
    assert torch.equal(out, x.reshape(6, 6)) and torch.equal(dot, v.reshape(6, 6))


OVERLAPPING = {
    "expanded": lambda: drawn(1, 6).expand(4, 6),
    "windows": lambda: drawn(15).unfold(0, 6, 3),
    "interleaved": lambda: drawn(20).as_strided((4, 6), (2, 2)),
}


@pytest.mark.parametrize(
    "function", [torch.sin, torch.erf, lambda x: x.std(0), lambda x: (x * 1)[:, 1:].mul_(x[:, 1:])]
)
@pytest.mark.parametrize("kind", OVERLAPPING)
def test_primals_whose_elements_share_memory_have_a_tangent_each(kind, function):
    x, v = OVERLAPPING[kind](), drawn(4, 6, seed=2)
    out, dot = pmf.jvp(function, (x,), (v,))
    assert torch.equal(out, function(x))
    expected = torch.func.jvp(function, (x.contiguous(),), (v,))[1]
    torch.testing.assert_close(dot, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", [(0, 6), (0, 6, 2)])
def test_empty_primals(shape):
    def function(x):
        y = torch.empty_like(x)
        y[:, :3].copy_(F.group_norm(x, 2)[:, 3:]).mul_(2)
        return y

    out, dot = pmf.jvp(function, (drawn(*shape),), (1,))
    assert out.shape == dot.shape == shape


def test_calls_of_several_threads():
    def function(x):
        return F.elu(x) * torch.zeros_like(x).add_(x) * torch.erf(x)

    expected = [torch.func.jvp(function, (drawn(4, seed=i),), (drawn(4, seed=9),)) for i in range(4)]
    wrong = []

    def run(i):
        try:
            for _ in range(100):
                out, dot = pmf.jvp(function, (drawn(4, seed=i),), (drawn(4, seed=9),))
                torch.testing.assert_close((out, dot), expected[i], rtol=1e-12, atol=1e-12)
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def in_thread(function):
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def viewed(x, run):
    y = torch.zeros_like(x)
    view = run(lambda: y[:2])
    y.add_(x)
    return view * 1


@pytest.mark.parametrize("function", [viewed, lambda x, run: run(lambda: torch.erf(x) * x.sum())])
def test_threads_of_the_function(function):
    """torch.func.jvp loses tangents in them, so its function runs without."""
    x, v = drawn(4), drawn(4, seed=1)
    out, dot = pmf.jvp(lambda x: function(x, in_thread), (x,), (v,))
    plain, expected = torch.func.jvp(lambda x: function(x, lambda part: part()), (x,), (v,))
    assert torch.equal(out, plain)
    torch.testing.assert_close(dot, expected, rtol=1e-12, atol=1e-12)


def test_tangents_of_the_threads_of_the_function_are_freed_with_the_call():
    kept = []
    pmf.jvp(lambda x: in_thread(lambda: kept.append(x.sin()) or x * 2), (drawn(3),), (drawn(3),))
    assert kept[0].tangent is None
    compare(lambda x: x * kept[0], [drawn(3)], [drawn(3, seed=1)])


def test_libraries_that_ask_for_the_module_of_a_class_find_torch():
    """opt_einsum chooses so who computes."""
    modules = []
    pmf.jvp(lambda x: modules.append(type(x).__module__) or x * 1, (drawn(3),), (1,))
    assert modules == ["torch"]


def test_arguments_by_name_as_those_of_torch_func_jvp():
    given = dict(func=torch.sin, primals=(drawn(3),), tangents=(drawn(3, seed=1),))
    for got, expected in zip(pmf.jvp(**given), torch.func.jvp(**given), strict=True):
        torch.testing.assert_close(got, expected)
