"""The benchmark's cases run in small on the CPU, with the kernels in the interpreter."""

import dataclasses
import functools
import time
import types

import pytest
import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import Interval, Kernel

import pmf
from pmf.benchmarks import cases, memory, steps
from pmf.benchmarks.baselines import joint_jvp_loss, two_pass_loss
from pmf.benchmarks.timing import ceilings, host_us, measure, profile_of, profiled, warm_up
from pmf.counting import operations, row_operations
from pmf.kernels.attention import HOPPER_TILES
from pmf.memory import saved_per_row, training_memory
from tests.networks import TINY, meta_step, random_model, relative_error
from tests.test_loss import LOSS, gradients, step_inputs

CPU = torch.device("cpu")
SMALL = dataclasses.replace(TINY, image_size=8, hidden_size=32)
BLOCK = cases.block_ops(SMALL, batch=2)
OPS = {f"{op.name} {len(op.moving)}": op for op in (*BLOCK, cases.patch_op(SMALL, 2), cases.attention_op(2, 7, 2, 16))}


@pytest.fixture(autouse=True)
def presets(monkeypatch):
    monkeypatch.setitem(pmf.MODELS, "small", SMALL)
    monkeypatch.setitem(pmf.LOSSES, "small", LOSS)


@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize("op", OPS)
def test_every_case_runs(benchmark, op, mode):
    case = OPS[op].cases("small")[cases.MODES.index(mode)]
    torch.manual_seed(0)
    providers = {n: prepare() for n, prepare in case.providers(CPU).items() if n != "compiled reference"}
    benchmark.pedantic(providers["triton"], rounds=1)
    assert case.bytes > 0
    for run in providers.values():
        assert all(torch.isfinite(x).all() for x in cases._flat(run()) if isinstance(x, torch.Tensor))


def test_bytes_are_those_of_inputs_and_outputs():
    """What the formula says a forward pass moves, counted on real tensors (parameters are negligible)."""
    for op in BLOCK:
        primals = op.make(CPU)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value, _ = getattr(pmf.ops, f"{op.name}_dual")(primals, (None,) * len(primals), **op.options)
        rows = [x for x in (*primals, *cases._flat(value)) if x is not None and x.ndim >= 3]
        moved = sum(x.numel() * x.element_size() for x in rows)
        if op.name == "qk_norm_rope":  # v is neither read nor written
            moved = moved * 2 // 3
        assert moved == op.traffic["forward"], op.name


def test_the_objective_case_runs():
    case = cases.objective_case("small", 4)
    for name, prepare in case.providers(CPU).items():
        if "compiled" not in name:
            assert all(torch.isfinite(gradient).all() for gradient in prepare()())


def test_attention_is_measured_on_every_backend_and_tile():
    """Those meant for a GPU are named for one alone; the tiles compute the same in the interpreter."""
    op, on_gpu = OPS["attention 3"], torch.device("cuda")
    for mode in ("forward", "backward"):
        case = op.cases("small")[cases.MODES.index(mode)]
        assert {f"triton, {name}" for name in cases.BACKENDS} <= case.providers(on_gpu).keys()
    dual = op.cases("small")[cases.MODES.index("dual")]
    assert next(iter(dual.providers(CPU))) == cases.VALUE_ALONE
    more = dual.providers(on_gpu).keys() - dual.providers(CPU).keys()
    assert {"triton 128x32 w8 s3", "triton 64x32 w4 s3"} <= more and len(more) == len(HOPPER_TILES)
    primals, tangents = op.make(CPU), op.make(CPU)
    _, expected = pmf.ops.attention_dual(primals, tangents, impl="triton")
    for context in op.variants("dual", on_gpu).values():
        with context():
            _, found = pmf.ops.attention_dual(primals, tangents, impl="triton")
        assert relative_error(expected, found) < 2**-8


def test_every_published_shape_has_a_case():
    names = [case.name for case in cases.op_cases()]
    assert len(names) == len(set(names))
    for size in ("B/16", "L/16", "H/16"):
        assert f"attention dual {size}" in names and f"patch_embed backward {size}" in names
    assert "attention dual S 4096 D 128" in [case.name for case in cases.long_attention_cases()]


@pytest.mark.parametrize("size", ["pMF-B/32", "pMF-L/32", "pMF-H/32"])  # test_counting.py counts the others
def test_every_preset_has_a_step(size):
    """Its providers are named, its operations counted, and forward and backward run through on meta tensors."""
    case = steps.step_case(size, 4)
    assert {"lean", "flow matching", "joint jvp, compiled"} <= case.providers(CPU).keys()
    draws = pmf.sample_draws(4, (1, 1, 1), pmf.LOSSES[size], torch.Generator().manual_seed(0))
    assert operations(meta_step(pmf.MODELS[size], draws, steps.lean_loss)) == case.operations


def test_measure_takes_turns_and_gives_quartiles():
    order = []
    ready = {name: warm_up(lambda name=name: order.append(name), CPU) for name in "ab"}
    result = measure(ready, CPU, repeats=4)
    assert "".join(order) == "aaabbb" + "ab" * 4
    assert result["a"].quartiles_us[0] <= result["a"].median_us <= result["a"].quartiles_us[1]
    assert result["a"].repeats == 4


def test_a_measurement_says_what_its_peak_is_of():
    class Counted:
        peak_from = "warm-up and capture"

        def __call__(self):
            pass

        def peak_bytes(self):
            return 7

    ready = {"counted": warm_up(Counted(), CPU), "plain": warm_up(lambda: None, CPU)}
    assert (ready["counted"].peak_bytes, ready["counted"].peak_from) == (7, "warm-up and capture")
    found = measure(ready, CPU, repeats=3)
    assert (found["counted"].peak_bytes, found["counted"].peak_from) == (7, "warm-up and capture")
    assert (found["plain"].peak_bytes, found["plain"].peak_from, found["plain"].reserved_bytes) == (
        None,
        "a warm run",
        None,
    )


def test_repeats_shrink_to_the_time_there_is():
    runs = []
    slow = dataclasses.replace(warm_up(lambda: runs.append(0), CPU), seconds=1.0)
    assert measure({"slow": slow}, CPU, repeats=30, seconds=10.0)["slow"].repeats == 10
    assert measure({"slow": slow}, CPU, repeats=30, seconds=0.5)["slow"].repeats == 3


def test_a_profile_names_what_takes_the_time():
    a, b = torch.randn(400, 400), torch.randn(4)
    found = profiled(lambda: (a @ a, a @ a, b + b), CPU)
    name, took, calls = found.kernels[0]
    assert name == "aten::mm" and calls == 2 and 0 < took <= found.busy_us <= 1.5 * found.span_us
    assert [took for _, took, _ in found.kernels] == sorted((took for _, took, _ in found.kernels), reverse=True)
    lines = found.table(1).splitlines()
    assert lines[0].startswith(f"{found.launches} launches, busy ") and lines[2].endswith("2  aten::mm")
    assert len(lines) == 3 < len(found.table().splitlines())


def test_a_kernel_is_named_by_the_operator_that_launched_it():
    def event(name, start, end, device=DeviceType.CUDA, kernels=()):
        times = Interval(start, end)
        return types.SimpleNamespace(name=name, time_range=times, device_type=device, kernels=kernels)

    kernels = [event("_forward", 0, 10), event("_forward", 20, 50), event("gemm", 60, 100)]
    launched = [Kernel("_forward", 0, 10), Kernel("_forward", 0, 30)]
    operators = [event("pmf::norm", 0, 5, DeviceType.CPU, launched[:1]), event("aten::mm", 0, 5, DeviceType.CPU)]
    found = profile_of([*operators, event("pmf::swiglu", 5, 9, DeviceType.CPU, launched[1:]), *kernels])
    assert found.kernels == [
        ("gemm", 40.0, 1),
        ("_forward of pmf::swiglu", 30.0, 1),
        ("_forward of pmf::norm", 10.0, 1),
    ]
    assert found.launches == 3 and found.busy_us == 80.0 and found.span_us == 100.0
    assert found.table().startswith("3 launches, busy 80 us of 100 us, gaps 20 us\n")


def test_host_time_is_that_of_the_call():
    assert host_us(lambda: time.sleep(0.01), CPU, 3) == pytest.approx(1e4, rel=0.5)


def test_a_step_that_is_counted_tells_what_it_must_keep():
    plain, checkpointed = (
        steps.counted_bytes("small", 4, name, CPU)["counted_bytes"] for name in ("lean", "lean, checkpointed")
    )
    more = steps.counted_bytes("small", 8, "lean", CPU)["counted_bytes"]
    assert checkpointed < plain < more < 2 * plain  # weights do not grow with the batch
    assert steps.counted_bytes("small", 4, "joint jvp", CPU) == {}


def test_ceilings_are_positive():
    assert all(value > 0 for value in ceilings(CPU).values())


@pytest.mark.parametrize("case", [steps.step_case, steps.sampling_case])
def test_step_and_sampling_cases_run(case, monkeypatch):
    monkeypatch.setitem(pmf.SAMPLING, "small", dict(omega=2.0, t_min=0.1, t_max=0.9))
    small = case("small", 2)
    assert small.operations > 0
    for name, prepare in small.providers(CPU).items():
        if "compiled" not in name and name != "JAX":
            prepare()()


def test_what_is_counted_is_what_is_measured():
    case, counted, (_, _, draws) = steps.step_case("small", 64), row_operations(SMALL), steps._inputs("small", 64, CPU)
    assert case.operations == counted.lean(draws)
    floor = counted.flow_matching(draws)
    assert case.other_operations == {"flow matching": floor, "flow matching, captured": floor}


@pytest.mark.parametrize("name", ["joint jvp, compiled", "jvp without gradient, second forward, compiled"])
def test_a_compiled_rival_runs_compiled(name, monkeypatch):
    ran, compiler = [], torch.compile

    def backend(graph, _):
        return lambda *inputs: ran.append(graph) or graph(*inputs)

    monkeypatch.setattr(torch, "compile", functools.partial(compiler, backend=backend))
    steps.step_providers("small", 2, CPU)[name]()()
    assert len(ran) == 1


def test_a_compiled_backward_runs_again(monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager", dynamic=True))
    run = OPS["attention 3"].cases("small")[2].providers(CPU)["compiled reference"]()
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
    found = memory.largest(lambda n: tries.append(n) or n <= limit, guess)
    assert found <= limit <= found + max(1, found // 16) and len(set(tries)) == len(tries) <= 16
    assert (limit, guess) != (599, 449) or len(tries) <= 7


def test_the_joint_step_needs_more_memory():
    joint = training_memory("small", impl="reference", forward=memory.joint_pass)
    assert joint.per_row > 2 * training_memory("small", impl="reference").per_row


def test_the_joint_step_of_a_deep_network_is_counted_on_shallow_ones():
    deep = dataclasses.replace(SMALL, depth=6, aux_head_depth=2)
    whole = saved_per_row(deep, "reference", forward=memory.joint_pass)
    assert training_memory(deep, impl="reference", forward=memory.joint_pass).per_row == whole


def test_a_lean_step_is_much_faster_than_a_joint_jvp_step():
    """On the digits network, in one run, in turns; only the ratio counts."""
    case = steps.step_case("pMF-digits", 64)
    providers = case.providers(CPU)
    chosen = {name: providers[name]() for name in ("joint jvp", "lean")}
    times = measure({name: warm_up(run, CPU) for name, run in chosen.items()}, CPU, repeats=12)
    ratio = times["joint jvp"].quartiles_us[0] / times["lean"].quartiles_us[0]
    print(f"joint jvp / lean: {ratio:.2f}")
    assert ratio >= 1.8
