"""The MeanFlow steps that are benchmarked: every provider computes the same; memory and time of `pmf.jvp`."""

import statistics
import time

import pytest
import torch

from pmf.benchmarks import __main__ as cli
from pmf.benchmarks import figures, plan
from pmf.benchmarks.network_cases import FULL_SIZE, JOINT, NETWORKS, PLAIN, WAYS, meanflow_step, network_case
from pmf.counting import live_bytes, saved_bytes
from tests.networks import relative_error

CPU = torch.device("cpu")
SMALL = [size for size in NETWORKS if size not in FULL_SIZE]
PAIRS = [(size, way) for size in SMALL for way in network_case(size, 2, CPU).providers if way not in (PLAIN, JOINT)]


def randomised(size, way, batch=3):
    """A step in float64 of a network whose every parameter is random."""
    step = meanflow_step(size, batch, CPU, WAYS[way])
    step.network.double()
    step.inputs, step.v = tuple(x.double() for x in step.inputs), step.v.double()
    torch.manual_seed(1)
    for parameter in step.network.parameters():
        torch.nn.init.normal_(parameter, std=0.5 * parameter[0].numel() ** -0.5)
    return step


def results(step):
    """u, du/dt, the loss and its gradients."""
    u, du_dt = step.differentiate(step.network, step.inputs, step.v)
    loss = step.loss()
    return u, du_dt, loss, torch.autograd.grad(loss, list(step.network.parameters()))


@pytest.mark.parametrize(("size", "way"), PAIRS)
def test_every_provider_computes_the_joint_jvp(size, way):
    u, du_dt, loss, gradients = results(randomised(size, way))
    expected_u, expected_dot, expected_loss, expected = results(randomised(size, JOINT))
    assert relative_error(u, expected_u) < 1e-10 and relative_error(du_dt, expected_dot) < 1e-10
    assert relative_error(loss, expected_loss) < 1e-10 and not du_dt.requires_grad
    assert max(map(relative_error, gradients, expected)) < 1e-9 and expected_dot.norm() > 0.1 * expected_u.norm()


def test_the_compiled_step_computes_the_same():
    """Of the UNet, whose layers have no tangents of their own."""
    eager, compiled = randomised("UNet small", "pmf.jvp"), randomised("UNet small", "pmf.jvp")
    compiled.differentiate = torch.compile(compiled.differentiate, fullgraph=True, backend="aot_eager")
    for a, b in zip(results(compiled), results(eager), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_compiled_ways_are_measured_on_a_gpu_each_in_its_own_process():
    ways = {f"{way}, compiled" for way in WAYS}
    case = network_case("DiT-B/4", 8, torch.device("cuda"))
    assert case.providers.keys() == WAYS.keys() | ways and not network_case("DiT-B/4", 8, CPU).providers.keys() & ways
    jobs = plan.jobs_of("networks", plan.Options(sizes=("DiT-B/4",), device="cuda"))
    assert sorted(len(job.pairs) for job in jobs) == [1] * len(WAYS) + [len(WAYS)]
    assert all("pmf/test_jvp_compiled.py" in job.tests() for job in jobs if len(job.pairs) == 1)
    parts = plan.parts_of("gpu", plan.Options(device="cuda"))
    assert {part.group for part in parts if part.suite == "networks"} == {"eager", "compiled"}


@pytest.mark.parametrize("size", SMALL)
def test_the_plain_forward_has_the_same_value_and_no_tangent(size):
    step = randomised(size, PLAIN)
    u, du_dt = step.differentiate(step.network, step.inputs, step.v)
    assert du_dt is None and torch.equal(u, results(randomised(size, "pmf.jvp"))[0])


@pytest.mark.parametrize("size", SMALL)
def test_steps_hold_no_more_than_flow_matching(size):
    """What is alive between forward and backward is what plain flow matching saves for backward, and the loss.

    du/dt is stopped before then, so the joint jvp's tangents are freed too: they count at its peak.
    """
    steps = {way: prepare() for way, prepare in network_case(size, 4, CPU).providers.items()}
    held = {way: step.held_bytes() for way, step in steps.items()}
    peak = {way: live_bytes(step).peak for way, step in steps.items()}
    plain = steps[PLAIN]
    saved = saved_bytes(plain.loss, [*plain.network.parameters(), *plain.inputs, plain.v])
    print(size, saved, held, peak)
    assert held[PLAIN] <= 1.001 * saved
    for way in held.keys() & {"pmf.jvp", "explicit duals"}:
        assert held[way] <= 1.02 * saved
        assert peak[way] <= 1.25 * peak[PLAIN] < 0.5 * peak[JOINT]


def processor_ms(runs, turns=21, warm=3):
    """Median processor time of each run, in turn. Unlike that of a clock, it leaves out what else ran meanwhile."""
    spent = [[] for _ in runs]
    for _ in range(warm + turns):
        for times, run in zip(spent, runs, strict=True):
            began = time.process_time()
            run()
            times.append(1e3 * (time.process_time() - began))
    return [statistics.median(times[warm:]) for times in spent]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("size", SMALL)
def test_pmf_jvp_takes_at_most_nine_tenths_of_the_joint_jvp(size):
    providers = network_case(size, 4, CPU).providers
    ours, joint = processor_ms([providers["pmf.jvp"](), providers[JOINT]()])
    print(f"{size}: {ours:.0f} ms, joint jvp {joint:.0f} ms: {ours / joint:.2f}")
    assert ours <= 0.9 * joint


def test_the_suite_runs_and_reports(tmp_path, capsys):
    options = ["--batch", "2", "--repeats", "3", "--device", "cpu", "--record", str(tmp_path)]
    cli.main(["networks", "--sizes", "UNet small", *options, "--providers", PLAIN, "pmf.jvp", JOINT])
    out, records = capsys.readouterr().out, figures.read_ledger(tmp_path / "cpu.jsonl")
    assert [(r["provider"], r["status"]) for r in records] == [(p, "measured") for p in (PLAIN, "pmf.jvp", JOINT)]
    assert all(r["peak_bytes"] >= r["held_bytes"] > 0 and r["peak_from"] == "live tensors" for r in records)
    row = f"| MeanFlow UNet small batch 2 | {PLAIN} | {records[0]['median_us'] / 1e3:.4g} ("
    assert " GB held" in out and row in out
    cli.main(["report", "--ledger", str(tmp_path / "cpu.jsonl")])
    assert row in capsys.readouterr().out


def test_the_full_sizes_are_measured_by_default(capsys):
    names = [job.pairs[0][0] for job in plan.jobs_of("networks", plan.Options(batch=8, device="cpu"))]
    assert names == ["MeanFlow DiT-B/4 batch 8", "MeanFlow UNet batch 8"]
    assert {way for way in WAYS} - network_case("UNet", 8, CPU).providers.keys() == {"explicit duals"}
    with pytest.raises(SystemExit):
        cli.main(["networks", "--sizes", "pMF-B/16"])
    assert "sizes: unknown preset 'pMF-B/16', expected one of DiT-B/4, UNet" in capsys.readouterr().err
