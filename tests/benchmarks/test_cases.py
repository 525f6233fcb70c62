"""The benchmarks' cases run at small sizes on the CPU, with the kernels in the interpreter."""

import dataclasses
import functools
import math
import pathlib
import types

import pytest
import torch

import pmf
from pmf.benchmarks import op_cases, step_cases
from pmf.benchmarks.plan import Job, Options
from pmf.benchmarks.processes import finished
from pmf.benchmarks.step_cases import joint_jvp_loss, two_pass_loss
from pmf.counting import operations, row_operations
from pmf.kernels.attention import HOPPER_TILES
from pmf.memory import joint_pass, largest, measured_largest_batch, saved_per_row, training_memory
from pmf.timing import measure
from tests.networks import TINY, meta_step, random_model, relative_error
from tests.pmf.test_loss import LOSS, gradients, step_inputs

CPU, GPU = torch.device("cpu"), torch.device("cuda")  # cases for a GPU can be listed without one
SMALL = dataclasses.replace(TINY, image_size=8, hidden_size=32)
BLOCK = op_cases.block_ops(SMALL, batch=2)
OPS = {f"{op.name}{op.label}": op for op in (*BLOCK, op_cases.patch_op(SMALL, 2))}


def case_of(op, mode, device=CPU):
    if op == "attention":
        cases = op_cases.attention_cases("small", 2, 7, 2, 16, device)
    else:
        cases = OPS[op].cases("small", device)
    return cases[op_cases.MODES.index(mode)]


def measured(runs, repeats=30, seconds=math.inf, **options):
    """Provider -> record of its times."""
    providers = {name: lambda run=run: run for name, run in runs.items()}
    return {r["provider"]: r for r in measure(providers, CPU, repeats, seconds, **options)}


@pytest.fixture(autouse=True)
def presets(monkeypatch):
    monkeypatch.setitem(pmf.MODELS, "small", SMALL)
    monkeypatch.setitem(pmf.LOSSES, "small", LOSS)


def tensors(result):
    return [x for y in result for x in (y if isinstance(y, tuple) else (y,)) if isinstance(x, torch.Tensor)]


@pytest.mark.parametrize("mode", op_cases.MODES)
@pytest.mark.parametrize("op", [*OPS, "attention"])
def test_every_case_runs(benchmark, op, mode):
    case = case_of(op, mode)
    torch.manual_seed(0)
    providers = {n: prepare() for n, prepare in case.providers.items() if n != "compiled reference"}
    benchmark.pedantic(providers["triton"], rounds=1)
    assert case.bytes > 0
    for run in providers.values():
        assert all(torch.isfinite(x).all() for x in tensors(run()))


def test_bytes_are_those_of_inputs_and_outputs():
    """The formula's bytes of a forward pass equal those of its real tensors (parameters are negligible)."""
    for op in BLOCK:
        primals = tuple(spec and torch.randn(spec[1:], dtype=spec[0]) for spec in op.inputs)
        results = op.run(primals, (None,) * len(primals))
        rows = [x for x in (*primals, *tensors([results])) if x is not None and x.ndim >= 3]
        moved = sum(x.numel() * x.element_size() for x in rows)
        if op.name == "qk_norm_rope":  # v is neither read nor written
            moved -= 2 * results[2].numel() * results[2].element_size()
        assert moved == op.bytes[0], op.name


def test_the_objective_case_runs():
    case = op_cases.objective_case("small", 4, CPU)
    for name, prepare in case.providers.items():
        if "compiled" not in name:
            assert all(torch.isfinite(gradient).all() for gradient in prepare()())


def test_attention_is_measured_on_every_backend_and_tile():
    """Backends and tiles are listed only for a GPU; the tiles give the same results in the interpreter."""
    for mode in ("forward", "backward"):
        assert {f"triton, {name}" for name in op_cases.BACKENDS} <= case_of("attention", mode, GPU).providers.keys()
    here, there = (case_of("attention", "dual", device).providers for device in (CPU, GPU))
    more = there.keys() - here.keys()
    assert op_cases.VALUE_ALONE in here and here.keys() <= there.keys()
    assert {"triton 128x32 w8 s3", "triton 64x32 w4 s3"} <= more and len(more) == len(HOPPER_TILES)

    def tangent(name):
        way, mode, _ = there[name].args
        torch.manual_seed(0)
        return there[name].func(way, mode, CPU)()[1]

    for name in more:
        assert relative_error(tangent("triton"), tangent(name)) < 2**-8


@pytest.mark.parametrize(
    ("kind", "label"),
    [
        ({"causal": True}, "causal"),
        ({"groups": 2, "lengths": (3, 7)}, "grouped lengths"),
        ({"groups": 2, "lengths": (3, 7), "causal": True}, "causal grouped lengths"),
    ],
)
def test_masked_attention(kind, label):
    """Operations are those of the pairs that are read, bytes those of the rows that are read or written."""
    cases = op_cases.attention_cases("small", 2, 7, 4, 16, CPU, **kind)
    for case in cases:
        assert all(torch.isfinite(x).all() for x in tensors(case.providers["triton"]()()))
    seen = torch.ones(2, 7, 7, dtype=torch.bool)
    if "causal" in kind:
        seen = seen.tril()
    if "lengths" in kind:
        seen[0, :, 3:] = False
    products = 2 * 4 * 16 * seen.sum().item()
    assert [case.operations_of("triton") for case in cases] == [2 * products, 7 * products, 5 * products]
    keys = 2 * 16 * kind.get("groups", 4)
    queries, read, written = 2 * 2 * 7 * 4 * 16, keys * seen.any(1).sum().item(), keys * 2 * 7
    moved = 2 * (queries + read), 4 * (queries + read), 4 * queries + 2 * (read + written)
    assert tuple(case.bytes for case in cases) == moved
    assert cases[1].name == f"attention dual small {label}"


def test_each_provider_is_rated_by_what_it_computes():
    step = step_cases.step_case("small", 64, CPU)
    counted, draws = row_operations(SMALL), step_cases.step_inputs("small", 64, CPU)[2]
    assert step.operations_of("lean") == step.operations_of("JAX") == counted.lean(draws)
    floor = counted.flow_matching(draws)
    assert step.operations_of("flow matching") == step.operations_of("flow matching, captured") == floor
    attention = case_of("attention", "dual")
    assert attention.operations_of("triton") == 3.5 * attention.operations_of(op_cases.VALUE_ALONE) > 0


def test_every_provider_names_existing_tests():
    every = [*op_cases.op_cases("small", 2, CPU), step_cases.sampling_case("pMF-digits", 2, CPU)]
    files = {test for case in (*every, step_cases.step_case("small", 2, CPU)) for test in case.tests.values()}
    assert len(files) == 10 and all((pathlib.Path(__file__).parents[1] / file).is_file() for file in files)
    step = step_cases.step_case("small", 2, CPU)
    assert step.tests_of("lean") == {"pmf/test_loss.py"}
    assert step.tests_of("lean, captured") == {"pmf/test_loss.py", "pmf/test_cuda_graphs.py"}
    assert case_of("swiglu", "dual").tests_of("triton") == {"kernels/test_pointwise.py"}


def test_every_published_shape_has_a_case():
    for size in ("B/16", "L/16", "H/16"):
        names = [case.name for case in op_cases.op_cases(f"pMF-{size}", 2, CPU)]
        assert len(names) == len(set(names))
        assert f"attention dual {size}" in names and f"patch_embed backward {size}" in names
    names = [case.name for case in op_cases.long_attention_cases(GPU)]
    assert {f"attention dual S 4096 D 128{kind}" for kind in ("", " causal", " grouped lengths")} <= set(names)


@pytest.mark.parametrize("size", ["pMF-B/32", "pMF-L/32", "pMF-H/32"])  # test_counting.py counts the others
def test_every_preset_has_a_step(size):
    """It lists providers, counts their operations, and runs forward and backward on meta tensors."""
    case = step_cases.step_case(size, 4, CPU)
    assert {"lean", "flow matching", "joint jvp, compiled"} <= case.providers.keys()
    draws = pmf.sample_draws(4, (1, 1, 1), pmf.LOSSES[size], torch.Generator().manual_seed(0))
    assert operations(meta_step(pmf.MODELS[size], draws, step_cases.lean_loss)) == case.operations_of("lean")


def test_a_step_that_is_counted_tells_what_it_must_keep():
    def counted(provider, batch):
        record = {"provider": provider, "peak_bytes": 1}
        return finished(record, Job(Options(device="cpu"), "steps", "small", batch), CPU)["counted_bytes"]

    plain, more = counted("lean", 4), counted("lean", 8)
    assert counted("lean, checkpointed", 4) < plain < more < 2 * plain  # weights do not grow with the batch
    assert counted("joint jvp", 4) > 2 * plain


@pytest.mark.parametrize("case", [step_cases.step_case, step_cases.sampling_case])
def test_step_and_sampling_cases_run(case, monkeypatch):
    monkeypatch.setitem(pmf.SAMPLING, "small", dict(omega=2.0, t_min=0.1, t_max=0.9))
    small = case("small", 2, CPU)
    assert small.operations_of("lean") > 0
    for name, prepare in small.providers.items():
        if "compiled" not in name and name != "JAX":
            prepare()()


@pytest.mark.parametrize("name", ["joint jvp, compiled", "jvp without gradient, second forward, compiled"])
def test_compiled_baselines_run_compiled(name, monkeypatch):
    ran, compiler = [], torch.compile

    def backend(graph, _):
        return lambda *inputs: ran.append(graph) or graph(*inputs)

    monkeypatch.setattr(torch, "compile", functools.partial(compiler, backend=backend))
    step_cases.step_providers("small", 2, CPU)[name]()()
    assert len(ran) == 1


def test_a_compiled_backward_runs_again(monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager", dynamic=True))
    run = case_of("attention", "backward").providers["compiled reference"]()
    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("baseline", [joint_jvp_loss, two_pass_loss])
def test_baselines_are_the_same_loss(baseline):
    x, y, draws = step_inputs(6)
    model = random_model()
    out, grads = gradients(model, x, y, draws, LOSS)
    model.zero_grad()
    loss = baseline(model, x, y, draws, LOSS)
    loss.backward()
    assert loss.item() == pytest.approx(out.loss.item(), rel=1e-12)
    for name, p in model.named_parameters():
        if name in grads:
            assert relative_error(grads[name], p.grad) < 1e-9


@pytest.mark.parametrize("limit", [0, 1, 2, 7, 100, 599])
@pytest.mark.parametrize("guess", [0, 1, 70, 449, 1000])
def test_the_largest_batch_is_found_from_any_guess(limit, guess):
    tries = []
    found = largest(lambda n: tries.append(n) or n <= limit, guess)
    assert found <= limit <= found + max(1, found // 16) and len(set(tries)) == len(tries) <= 16
    assert (limit, guess) != (599, 449) or len(tries) <= 7


def test_a_largest_batch_is_measured_within_its_budget(monkeypatch):
    limits = []
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(total_memory=100))

    def limited(limit, device):
        assert torch.cuda._utils._get_device_index(device) == 3  # as PyTorch reads it: a device without a number raises
        limits.append(limit)

    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", limited)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)

    def run(batch):
        if batch > 100 * limits[-1]:
            raise torch.cuda.OutOfMemoryError

    assert measured_largest_batch(run, 40, 30, GPU) in range(38, 41) and limits == [0.4, 1.0]
    with pytest.raises(ZeroDivisionError):
        measured_largest_batch(lambda batch: 1 / 0, 200, 30, GPU)
    assert limits[2:] == [1.0, 1.0]


def test_the_joint_step_needs_more_memory():
    joint = training_memory("small", impl="reference", forward=joint_pass)
    assert joint.per_row > 2 * training_memory("small", impl="reference").per_row


def test_the_joint_step_of_a_deep_network_is_counted_on_shallow_ones():
    deep = dataclasses.replace(SMALL, depth=6, aux_head_depth=2)
    whole = saved_per_row(deep, "reference", forward=joint_pass)
    assert training_memory(deep, impl="reference", forward=joint_pass).per_row == whole


def test_a_lean_step_is_much_faster_than_a_joint_jvp_step():
    """On the digits network, interleaved in one run; only the ratio counts."""
    case = step_cases.step_case("pMF-digits", 64, CPU)
    chosen = {name: case.providers[name]() for name in ("joint jvp", "lean")}
    times = measured(chosen, repeats=12)
    ratio = times["joint jvp"]["quartiles_us"][0] / times["lean"]["quartiles_us"][0]
    print(f"joint jvp / lean: {ratio:.2f}")
    assert ratio >= 1.8
