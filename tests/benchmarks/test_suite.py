"""Runs of the benchmarks: jobs, failures, time limits, and the reports of recorded figures."""

import contextlib
import json
import math
import subprocess
import sys
import time

import pytest
import torch

from pmf.benchmarks import __main__ as cli
from pmf.benchmarks import figures, ledger, measuring, plan, processes
from pmf.benchmarks.cases import Case
from pmf.benchmarks.ledger import Ledger
from pmf.benchmarks.op_cases import VALUE_ALONE
from pmf.benchmarks.plan import LONG_ATTENTION, Job, Options
from pmf.benchmarks.processes import isolated, job_records
from pmf.errors import InputError

CPU = torch.device("cpu")
ORIGIN = {"gpu": "card", "sources": "s", "torch": "t", "triton": "3"}
ORIGIN |= {"copy_bytes_per_s": 1.0, "product_operations_per_s": 1.0}


def job(suite, size, batch, *pairs):
    return Job(Options(repeats=2, device="cpu"), suite, size, batch, pairs=pairs)


def lines_of(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A real run of every suite on digits, recorded in a folder of its own."""
    folder = tmp_path_factory.mktemp("ledger")
    few = ["--only", "digits", "--repeats", "2", "--providers"]
    size = ["--sizes", "pMF-digits", "--batch", "2", "--device", "cpu", "--record", str(folder)]
    cli.main(["steps", *size, *few, "flow matching", "lean"])
    cli.main(["sampling", *size, *few, "eager"])
    cli.main(["ops", *size, *few, "triton", "--only", "swiglu forward"])
    cli.main(["memory", *size])
    return folder / "cpu.jsonl"


def test_a_run_records_every_figure_with_its_origin(measured):
    records = figures.read_ledger(measured)
    assert {r["suite"] for r in records} == {"steps", "sampling", "ops", "memory"}
    for r in records:
        assert r["status"] == "measured", r
        assert {"commit", "dirty", "torch", "triton", "gpu", "copy_bytes_per_s"} <= r.keys()
        assert r["attention"] == "cpu"
    lean = next(r for r in records if r["suite"] == "steps" and r["provider"] == "lean")
    assert lean["batch"] == 2 and lean["size"] == "pMF-digits" and lean["operations"] > 0
    assert lean["of_product_rate"] > 0 and lean["peak_bytes"] is None
    assert lean["host_us"] > 0 and lean["busy_us"] is None and lean["launches"] is None
    table = (measured.parent / "cpu-profile-step-digits-batch-2-lean.txt").read_text()
    assert table.startswith("step digits batch 2, lean: median") and lean["profile"][0][0] in table
    assert 1 <= len(lean["profile"]) <= 25 and 0 < lean["profile"][0][1] <= 1
    assert not any("profile" in r for r in records if r["provider"] != "lean")
    assert {r["step"] for r in records if r["suite"] == "memory"} == {
        "lean",
        "lean, light",
        "lean, checkpointed",
        "joint jvp",
    }


def test_report_prints_the_ledgers_figures(measured, capsys):
    cli.main(["report", "--ledger", str(measured)])
    out = capsys.readouterr().out
    assert out.startswith(f"From `{measured}`: cpu")
    lean = next(r for r in figures.read_ledger(measured) if r["provider"] == "lean")
    assert f"| step digits batch 2 | lean | {lean['median_us'] / 1e3:.4g} |" in out
    assert f" | {2e6 / lean['median_us']:.4g} | " in out  # images per second
    assert "| swiglu forward digits |" in out and "| digits | joint jvp | reference |" in out


def test_plot_draws_each_kind_of_figure(measured, tmp_path, capsys):
    cli.main(["plot", "--ledger", str(measured), "--out", str(tmp_path)])
    written = {path.name for path in tmp_path.iterdir()}
    assert written == {"cpu-step-time.png", "cpu-ops.png", "cpu-largest-batch.png"}  # no peak memory without a GPU
    assert capsys.readouterr().out.count(".png") == 3
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in tmp_path.iterdir())


def test_a_ledger_without_figures_is_refused(tmp_path, capsys):
    file = tmp_path / "empty.jsonl"
    for text, message in (
        ("", "holds no figures"),
        ('{"case": "x", "provider": "y", "status": "failed", "error": "z"}\n', "holds no figures"),
        ("nonsense\n", "holds no figures"),
        ('{"a": 1}\n', "holds no figures"),
    ):
        file.write_text(text)
        for reader in ("plot", "report"):
            with pytest.raises(SystemExit):
                cli.main([reader, "--ledger", str(file)])
            assert message in capsys.readouterr().err
    with pytest.raises(InputError, match="ledger: no such file"):
        figures.find_ledger(tmp_path / "absent.jsonl")


def test_the_end_of_a_measurement_shows_the_largest_batches(measured):
    lines = figures.summary(figures.read_ledger(measured)).splitlines()
    assert len(lines) == 6 and lines[0].endswith("| 40 GB | 80 GB | 141 GB |")
    assert [line.split(" | ")[1] for line in lines[2:]] == ["lean", "lean, light", "lean, checkpointed", "joint jvp"]


def test_published_tables_are_printed_from_the_ledger():
    """The figures of README and docs/performance.md come from the file that they name."""
    out = figures.tables(ledger.RESULTS / "h200.jsonl")
    assert out.startswith("From `benchmarks/results/h200.jsonl`: NVIDIA H200, in the latest run copy 4244 GB/s")
    start = "| step B/16 batch 128 | lean | 123.5 | 123 to 123.9 | 1036 | 53.6% | 88.9 | GPU, busy 99% | 1534 | 29.94 "
    assert f"{start}| 1.00 | 1.02 | 32.92 |" in out
    assert "| swiglu dual B/16 | 1883 µs, 8% | 192.1 µs, 80% | 155.6 µs, 99% |" in out
    assert "| step B/16 batch 128 | joint jvp | failed | OutOfMemoryError: CUDA out of memory." in out


def test_a_step_that_does_not_fit_is_measured_at_half_the_batch(monkeypatch, tmp_path):
    def fake(work, seconds, *arguments):
        if work is processes.origin_records:
            yield {**ORIGIN, "gpu": "card"}
            return
        (asked, _) = arguments
        ((case, provider),) = asked.pairs
        full = {"status": "failed", "error": "OutOfMemoryError: CUDA out of memory"}
        times = {"status": "measured", "median_us": 1.0, "peak_bytes": None}
        yield {"case": case, "provider": provider, **(full if asked.batch > 2 else times)}

    monkeypatch.setattr(measuring, "isolated", fake)
    options = Options(("pMF-digits",), 8, providers=("lean",), record=tmp_path, device="cpu")
    measuring.run("steps", options)
    records = lines_of(tmp_path / "card.jsonl")
    assert [(r["batch"], r["status"]) for r in records] == [(8, "failed"), (4, "failed"), (2, "measured")]
    assert records[-1]["case"] == "step digits batch 2"
    measuring.run("steps", options)
    assert lines_of(tmp_path / "card.jsonl") == records  # out of memory is final: not tried again


def test_every_case_is_compiled_anew(monkeypatch):
    """Without a reset the compiler leaves a function uncompiled after it has met many shapes of it."""
    ran = []

    def case(rows):
        def prepare():
            work = torch.compile(torch.sin, backend=lambda graph, _: lambda *x: ran.append(rows) or graph(*x))
            return lambda: work(torch.ones(rows))

        return Case(f"case {rows}", {"compiled": prepare}, {})

    cases = {f"case {rows}": case(rows) for rows in range(2, 14)}
    monkeypatch.setattr(Job, "cases", lambda self: cases)
    pairs = [(name, "compiled") for name in cases]
    assert all(r["status"] == "measured" for r in job_records(job("ops", "", 1, *pairs), 1.0))
    assert set(ran) == set(range(2, 14))


def test_figures_are_fractions_of_the_ceilings():
    case = Case("c", {}, {}, bytes=30, operations={"": 70, "flow matching": 7})
    record = {"provider": "lean", "median_us": 1e7}
    shares = measuring.shares(record, case, {"copy_bytes_per_s": 2.0, "product_operations_per_s": 10.0})
    assert shares == {"bytes": 30, "operations": 70, "of_copy_bandwidth": 1.5, "of_product_rate": 0.7}
    record["provider"] = "flow matching"
    assert measuring.shares(record, case, ORIGIN)["operations"] == 7


def test_a_dual_pass_is_reported_as_a_multiple_of_the_value():
    record = {"case": "attention dual digits", "of_copy_bandwidth": 0.0, "of_product_rate": 0.5}
    records = [{**record, "provider": "triton", "median_us": 35.0}]
    assert "| attention dual digits | 35 µs, 50% |" in figures.op_table(records)
    records.append({**record, "provider": VALUE_ALONE, "median_us": 10.0})
    assert "| attention dual digits | 35 µs, 50%, 3.50 x the value |" in figures.op_table(records)


def test_the_report_tells_what_a_step_waits_for():
    record = {"median_us": 100.0}
    found = [figures.bound({**record, "busy_us": busy}) for busy in (None, 95.0, 120.0, 40.0)]
    assert found == ["-", "GPU, busy 95%", "GPU, busy 100%", "host, busy 40%"]


def test_a_run_without_time_leaves_earlier_figures(tmp_path):
    file = tmp_path / "gpu.jsonl"
    key = {"case": "x", "provider": "y"}
    found = {}
    for statuses in (("measured", "skipped"), ("measured", "skipped", "failed"), ("skipped", "measured")):
        file.write_text("".join(json.dumps({**key, "status": status}) + "\n" for status in statuses))
        with contextlib.suppress(InputError):  # no figures
            found[statuses] = figures.read_ledger(file)[0]["status"]
    assert list(found.values()) == ["measured", "measured"]


def test_a_case_that_was_measured_in_the_end_is_not_missing(tmp_path):
    file = tmp_path / "gpu.jsonl"
    origin = {**ORIGIN, "commit": "c", "dirty": False, "suite": "ops", "batch": 1, "case": "x"}
    rates = {"median_us": 1.0, "of_copy_bandwidth": 1.0, "of_product_rate": 0.0}
    late = {**origin, "provider": None, "status": "skipped", "error": "no time was left"}
    file.write_text(
        f"{json.dumps(late)}\n{json.dumps({**origin, 'provider': 'triton', 'status': 'measured', **rates})}\n"
    )
    assert "no time was left" not in figures.tables(file)


class Action:
    """Runs its source when it is unpickled in the job's process."""

    def __init__(self, source):
        self.source = source

    def __reduce__(self):
        return (eval, (self.source,))


@pytest.mark.parametrize(
    ("source", "seconds", "error"),
    [("__import__('time').sleep(60)", 2, "did not finish in 2 s"), ("__import__('os')._exit(3)", 60, "with code 3")],
)
def test_a_job_that_hangs_or_dies_is_a_record(source, seconds, error):
    began = time.monotonic()
    asked = job("steps", Action(source), 1, ("case", "lean"))
    (record,) = isolated(job_records, seconds, asked, seconds)
    assert record["status"] == "failed" and error in record["error"]
    assert time.monotonic() - began < 30


def test_the_error_of_a_job_is_recorded_for_every_case_without_a_record():
    known = Ledger(ORIGIN)
    asked = job("ops", "B", 1, ("a", "x"), ("a", "y"), ("b", "x"), ("c", "x"))
    known.add({"case": "a", "provider": "x", "batch": 1, "status": "measured"})
    known.add({"case": "a", "provider": "y", "batch": 1, "status": "measured"})
    found = list(measuring.completed({"status": "failed", "error": "gone"}, asked, known))
    assert [(r["case"], r["provider"], r["batch"]) for r in found] == [("b", None, 1), ("c", None, 1)]
    (one,) = measuring.completed({"status": "failed", "error": "gone"}, job("steps", "B", 1, ("a", "z")), known)
    assert (one["case"], one["provider"]) == ("a", "z")


def test_the_process_that_forks_jobs_touches_no_gpu():
    """A process that has initialised CUDA cannot fork processes that use it."""
    code = "import torch; torch._C._cuda_getDeviceCount = torch._C._cuda_init = None; import pmf.benchmarks.processes"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert result.returncode == 0, result.stderr


def test_jobs_without_time_left_are_recorded_as_skipped(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(measuring, "LEAST_SECONDS", 1e9)
    size = ["--sizes", "pMF-digits", "--batch", "2", "--device", "cpu", "--record", str(tmp_path)]
    cli.main(["steps", *size])
    cli.main(["memory", *size])
    lines = lines_of(tmp_path / "cpu.jsonl")
    assert len(lines) > 10 and {r["status"] for r in lines} == {"skipped"}
    out = capsys.readouterr().out
    assert "joint jvp, compiled" in out and "largest batch digits" in out and "no time was left" in out
    cli.main(["steps", *size])
    assert lines_of(tmp_path / "cpu.jsonl") == lines  # recorded only once


def test_a_job_takes_a_share_of_what_is_left():
    assert measuring.largest_time(1200.0) == pytest.approx(200)
    assert measuring.largest_time(1200.0, measuring.SECOND_SHARE) == 600
    assert measuring.largest_time(60.0) == 30 and measuring.largest_time(12.0) == 12
    with pytest.raises(InputError, match="minutes: expected a positive time"):
        measuring.run("ops", Options(minutes=0))


def test_the_most_important_comes_first():
    parts = plan.parts_of("gpu", Options(device="cpu"))
    places = {(part.suite, part.size, part.batch, part.group): i for i, part in enumerate(parts)}
    assert list(places)[:2] == [("steps", "pMF-B/16", batch, "eager") for batch in (64, 128)]
    for size in ("pMF-L/16", "pMF-H/16"):
        assert places["steps", "pMF-B/16", 64, "compiled"] < places["steps", size, 64, "eager"]
        assert places["sampling", "pMF-B/16", 128, ""] < places["sampling", size, 128, ""]
    assert ("ops", LONG_ATTENTION, 1, "") in places and ("ops", "pMF-B/32", 128, "") not in places
    every = plan.jobs_of("gpu", Options(device="cuda"))
    assert len(set(every)) == len(every)


def test_the_groups_of_a_step_cover_all_providers(monkeypatch):
    def names(group, device="cuda"):
        monkeypatch.setattr(plan, "parts_of", lambda suite, options: [Job(options, "steps", "pMF-B/16", 64, group)])
        return [provider for job in plan.jobs_of("steps", Options(device=device)) for _, provider in job.pairs]

    groups = [names(group) for group in ("eager", "compiled", "backends")]
    assert sorted(name for group in groups for name in group) == sorted(names(""))
    assert [group[0] for group in groups] == ["flow matching", "lean, compiled", "lean, captured, flash"]
    assert not set(groups[2]) & set(names("", "cpu"))


def test_providers_are_grouped_into_processes():
    """One process for each provider of a step, for all of an op's, and for all largest batches."""
    jobs = {s: plan.jobs_of(s, Options(("pMF-digits",), 2, device="cpu")) for s in ("steps", "ops", "memory")}
    assert all(len(job.pairs) == 1 for job in jobs["steps"]) and len(jobs["memory"]) == 1
    assert [job.pairs[0][0].split()[0] for job in jobs["ops"]] == [
        *("norm_modulate", "residual_norm_modulate", "qk_norm_rope", "swiglu", "gelu"),
        *("patch_embed", "attention", "pmf_objective"),
    ]
    assert {case for case, _ in jobs["ops"][0].pairs} == {
        f"norm_modulate {mode} digits" for mode in ("forward", "dual", "backward")
    }


def test_no_figure_is_recorded_if_its_tests_fail(tmp_path):
    known = Ledger(ORIGIN, tmp_path)
    asked = plan.jobs_of("steps", Options(("pMF-digits",), 2, providers=("lean", "lean, captured"), device="cpu"))
    for one in asked:
        measuring.measure_job(one, known, {"pmf/test_cuda_graphs.py": "red", "pmf/test_loss.py": "redder"}, 1e9)
    assert [(r["provider"], r["status"], r["error"]) for r in known.records] == [
        ("lean", "failed", "redder"),
        ("lean, captured", "failed", "red"),
    ]


def test_a_second_part_measures_nothing_twice(tmp_path, capsys, monkeypatch):
    few = ["--only", "digits", "--repeats", "2", "--batch", "2", "--record", str(tmp_path), "--profile", ""]
    command = ["gpu", "--sizes", "pMF-digits", "--device", "cpu", *few, "--providers"]

    cli.main([*command, "eager", "lean, 40 GB"])
    first = lines_of(tmp_path / "cpu.jsonl")
    assert {r["suite"] for r in first} == {"sampling", "memory"}
    cli.main([*command, "eager", "lean, 40 GB"])
    assert lines_of(tmp_path / "cpu.jsonl") == first and "2 of 2 jobs were measured before" in capsys.readouterr().out
    cli.main([*command, "eager", "lean"])
    new = lines_of(tmp_path / "cpu.jsonl")[len(first) :]
    assert {(r["suite"], r["provider"]) for r in new} == {("steps", "lean")}
    monkeypatch.setattr(ledger, "MEASURED", ("kernels",))  # changes the digest, as changed sources do
    assert not Ledger(ledger.provenance(CPU), tmp_path).earlier


def test_what_failed_before_comes_last(tmp_path):
    jobs = plan.jobs_of("steps", Options(("pMF-digits",), 2, device="cpu"))
    names = [job.pairs[0][1] for job in jobs]
    where = {"suite": "steps", "case": "step digits batch 2", "batch": 2}
    Ledger(ORIGIN, tmp_path).add({**where, "provider": names[0], "status": "failed", "error": "slow"})
    Ledger(ORIGIN, tmp_path).add({**where, "provider": names[2], "status": "measured"})
    left = measuring.remaining(jobs, Ledger(ORIGIN, tmp_path))
    assert [job.pairs[0][1] for job in left] == [names[1], *names[3:], names[0]]


def test_without_a_gpu_nothing_is_recorded_unless_asked(capsys):
    before = sorted(ledger.RESULTS.iterdir())
    few = ["--only", "digits", "--repeats", "2", "--batch", "2", "--device", "cpu", "--providers", "eager"]
    cli.main(["sampling", "--sizes", "pMF-digits", *few])
    out = capsys.readouterr().out
    assert "eager" in out and "no GPU: nothing was recorded" in out
    assert sorted(ledger.RESULTS.iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gpu", "--sizes", "pMF-Q"], "sizes: unknown preset 'pMF-Q'"),
        (["ops", "--sizes", "pMF-digits", "--only", "nothing"], "only: 'nothing' matches no case"),
        (["steps", "--sizes", "pMF-digits", "--providers", "lean,eager"], "providers: expected some of ["),
        (["steps", "--minutes", "-1"], "minutes: expected a positive time"),
    ],
)
def test_bad_options_are_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit):
        cli.main(arguments)
    assert capsys.readouterr().err.startswith(f"pmf.benchmarks: {message}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(batch=0), "batch: expected a positive number, got 0"),
        (dict(batch=-3), "batch: expected a positive number, got -3"),
        (dict(repeats=0), "repeats: expected a positive number, got 0"),
        (dict(device="foo"), "device: cannot use 'foo'"),
        (dict(minutes=math.nan), "minutes: expected a finite number"),
    ],
)
def test_impossible_measurements_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        Options(**change)
