"""The benchmarks' cases run at small sizes on the CPU, with the kernels in the interpreter."""

import contextlib
import dataclasses
import functools
import math
import pathlib
import time
import types

import pytest
import torch
from torch.autograd import DeviceType

import pmf
from pmf import timing
from pmf.benchmarks import op_cases, step_cases
from pmf.benchmarks.plan import Job, Options
from pmf.benchmarks.processes import finished
from pmf.benchmarks.step_cases import joint_jvp_loss, two_pass_loss
from pmf.counting import operations, row_operations
from pmf.kernels.attention import HOPPER_TILES
from pmf.memory import joint_pass, largest, measured_largest_batch, saved_per_row, training_memory
from pmf.timing import ceilings, comparison, details, measure
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
            moved = moved * 2 // 3
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
    assert len(files) == 9 and all((pathlib.Path(__file__).parents[1] / file).is_file() for file in files)
    step = step_cases.step_case("small", 2, CPU)
    assert step.tests_of("lean") == {"pmf/test_loss.py"}
    assert step.tests_of("lean, captured") == {"pmf/test_loss.py", "pmf/test_cuda_graphs.py"}
    assert case_of("swiglu", "dual").tests_of("triton") == {"kernels/test_swiglu.py"}


def test_every_published_shape_has_a_case():
    for size in ("B/16", "L/16", "H/16"):
        names = [case.name for case in op_cases.op_cases(f"pMF-{size}", 2, CPU)]
        assert len(names) == len(set(names))
        assert f"attention dual {size}" in names and f"patch_embed backward {size}" in names
    assert "attention dual S 4096 D 128" in [case.name for case in op_cases.long_attention_cases(CPU)]


@pytest.mark.parametrize("size", ["pMF-B/32", "pMF-L/32", "pMF-H/32"])  # test_counting.py counts the others
def test_every_preset_has_a_step(size):
    """It lists providers, counts their operations, and runs forward and backward on meta tensors."""
    case = step_cases.step_case(size, 4, CPU)
    assert {"lean", "flow matching", "joint jvp, compiled"} <= case.providers.keys()
    draws = pmf.sample_draws(4, (1, 1, 1), pmf.LOSSES[size], torch.Generator().manual_seed(0))
    assert operations(meta_step(pmf.MODELS[size], draws, step_cases.lean_loss)) == case.operations_of("lean")


def test_a_comparison_shows_time_and_live_memory_as_ratios_to_the_first():
    a = torch.randn(1000)

    def broken():
        raise ValueError("no such thing")

    lines = comparison({"one": lambda: a + 1, "two": lambda: ((a + 1) * 2).sum(), "none": broken}, CPU).splitlines()
    assert (
        lines[:2] == ["| | ms | peak MB |", "|---|---|---|"] and lines[4] == "| none | ValueError: no such thing |  |"
    )
    assert lines[2].startswith("| one | ") and lines[2].endswith(" (1.00) | 0.004 (1.00) |")
    assert lines[3].endswith(" | 0.008 (2.00) |")


def test_measure_takes_turns_and_gives_quartiles():
    order = []
    result = measured({name: lambda name=name: order.append(name) for name in "ab"}, repeats=4)
    assert "".join(order) == "aaabbb" + "ab" * 4
    assert result["a"]["quartiles_us"][0] <= result["a"]["median_us"] <= result["a"]["quartiles_us"][1]
    assert result["a"]["repeats"] == 4


class FakeGPU:
    """Stands in for `torch` in timing.py as if on a GPU: logs calls in order; every run takes a millisecond."""

    int8 = torch.int8

    def __init__(self):
        self.cuda, self.log, self.allocated, self.peak, self.capturing = self, [], 100, 0, False

    def get_device_properties(self, device):
        return types.SimpleNamespace(L2_cache_size=10)

    def empty(self, size, dtype, device):
        return types.SimpleNamespace(zero_=lambda: self.log.append(f"flush {size}"))

    def Event(self, enable_timing):  # noqa: N802
        return types.SimpleNamespace(record=lambda: self.log.append("event"), elapsed_time=lambda end: 1.0)

    def CUDAGraph(self):  # noqa: N802
        return types.SimpleNamespace(replay=lambda: self.log.append("replay"))

    @contextlib.contextmanager
    def graph(self, graph, stream):
        self.capturing = True
        yield
        self.capturing = False

    def run(self, name, fails_in_capture=False):
        if self.capturing and fails_in_capture:
            self.capturing = False
            raise RuntimeError("operation not permitted when stream is capturing")
        self.log.append(name)
        self.peak = self.allocated + (50 if self.log.count(name) == 1 else 5)

    def memory_allocated(self, device):
        return self.allocated

    def max_memory_allocated(self, device):
        return self.peak

    def memory_reserved(self, device):
        return 1000

    def reset_peak_memory_stats(self, device):
        pass

    def current_stream(self):
        pass

    def synchronize(self, device=None):
        pass


def test_on_a_gpu_l2_is_cold_and_providers_take_turns(monkeypatch):
    gpu = FakeGPU()
    monkeypatch.setattr(timing, "torch", gpu)
    runs = {"a": lambda: gpu.run("a"), "b": lambda: gpu.run("b", True), "captured": lambda: gpu.run("captured")}
    found = list(measure({name: lambda run=run: run for name, run in runs.items()}, GPU, 4, replaying=["captured"]))
    warming = ["a"] * 4 + ["b"] * 3 + ["captured"] * 4  # three times, then once in capture if that works
    turn = [x for ran in ("replay", "b", "replay") for x in ("flush 40", "event", ran, "event")]
    assert gpu.log == warming + turn * 4
    kept = ("provider", "captured", "peak_bytes", "peak_from", "reserved_bytes", "median_us", "repeats")
    assert [tuple(r[field] for field in kept) for r in found] == [
        ("a", True, 5, "a warm run", 1000, 1000.0, 4),
        ("b", False, 5, "a warm run", 1000, 1000.0, 4),
        ("captured", True, 50, "warm-up and capture", 1000, 1000.0, 4),
    ]


def test_a_measurement_says_what_its_peak_is_of():
    class Counted:
        def __call__(self):
            pass

        def peak_bytes(self):
            return 7

    runs = {"counted": Counted(), "captured": lambda: None, "plain": lambda: None}
    found = measured(runs, repeats=3, replaying=["captured"])
    memory = {name: (r["peak_bytes"], r["peak_from"], r["reserved_bytes"]) for name, r in found.items()}
    assert memory == {
        "counted": (7, "its own count", None),
        "captured": (None, "warm-up and capture", None),
        "plain": (None, "a warm run", None),
    }


def test_repeats_shrink_to_the_time_there_is(monkeypatch):
    monkeypatch.setattr(timing, "warm_up", lambda *a: ({}, 1.0))
    assert measured({"slow": lambda: None}, repeats=30, seconds=10.0)["slow"]["repeats"] == 10
    assert measured({"slow": lambda: None}, repeats=30, seconds=0.5)["slow"]["repeats"] == 3


def test_one_provider_that_fails_loses_no_other():
    def broken():
        raise RuntimeError("first line\nsecond line")

    providers = {"broken": broken, "fails when run": lambda: broken, "works": lambda: lambda: None}
    records = list(measure(providers, CPU, 3))
    assert [r["status"] for r in records] == ["failed", "failed", "measured"]
    assert records[0]["error"] == "RuntimeError: first line" and records[0]["provider"] == "broken"


def test_a_figure_is_kept_if_its_details_fail(monkeypatch):
    monkeypatch.setattr(timing, "details", lambda *a: 1 / 0)
    (record,) = measure({"lean": lambda: lambda: None}, CPU, 3, detailed=True)
    assert record["status"] == "measured" and record["note"] == "ZeroDivisionError: division by zero"


def test_a_profile_names_what_takes_the_time():
    a, b = torch.randn(400, 400), torch.randn(4)
    found = details(lambda: (a @ a, a @ a, b + b), CPU)
    name, share, calls = found["profile"][0]
    assert name == "aten::mm" and calls == 2 and 0.3 < share <= 1
    assert [share for _, share, _ in found["profile"]] == sorted((s for _, s, _ in found["profile"]), reverse=True)
    assert "aten::mm" in found["table"] and "aten::add" in found["table"]
    assert found["busy_us"] is None and found["launches"] is None


def test_kernels_are_named_by_the_operator_that_launched_them(monkeypatch):
    """Our kernels' names are too alike. On a GPU an operator's time is that of the kernels it launched itself."""

    class Rows(list):
        def table(self, **options):
            return str(options["sort_by"])

    def row(key, took, count, device=DeviceType.CPU, marked=False):
        return types.SimpleNamespace(
            key=key, self_device_time_total=took, count=count, device_type=device, is_user_annotation=marked
        )

    rows = [row("pmf::norm", 10.0, 1), row("aten::mm", 60.0, 2), row("_forward", 30.0, 3, DeviceType.CUDA)]
    rows += [row("gemm", 60.0, 2, DeviceType.CUDA), row("region", 90.0, 1, DeviceType.CUDA, marked=True)]
    recorded = types.SimpleNamespace(key_averages=lambda: Rows([*rows, row("pmf::swiglu", 20.0, 2)]))
    monkeypatch.setattr(timing, "profile", lambda: contextlib.nullcontext(recorded))
    monkeypatch.setattr(timing, "synchronize", lambda device: None)
    found = details(lambda: None, GPU)
    assert found.pop("host_us") > 0
    names = [("aten::mm", 60 / 90, 2), ("pmf::swiglu", 20 / 90, 2), ("pmf::norm", 10 / 90, 1)]
    assert found == {"busy_us": 90.0, "launches": 5, "profile": names, "table": "self_device_time_total"}


def test_host_time_is_that_of_the_call():
    assert details(lambda: time.sleep(0.01), CPU, 3)["host_us"] == pytest.approx(1e4, rel=0.5)


def test_a_step_that_is_counted_tells_what_it_must_keep():
    def counted(provider, batch):
        record = {"provider": provider, "peak_bytes": 1}
        return finished(record, Job(Options(device="cpu"), "steps", "small", batch), CPU)["counted_bytes"]

    plain, more = counted("lean", 4), counted("lean", 8)
    assert counted("lean, checkpointed", 4) < plain < more < 2 * plain  # weights do not grow with the batch
    assert counted("joint jvp", 4) > 2 * plain


def test_ceilings_are_positive():
    assert all(value > 0 for value in ceilings(CPU).values())


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
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda limit, device: limits.append(limit))
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
