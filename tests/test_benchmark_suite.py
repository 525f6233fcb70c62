"""A measurement within its time: what happens to what fails, and what is made of the figures."""

import contextlib
import json
import subprocess
import sys
import time

import pytest
import torch

from pmf.benchmarks import cli, jobs, ledger, plots, report, suite
from pmf.benchmarks.cases import Case
from pmf.benchmarks.jobs import Job, Settings, case_records, run_job
from pmf.errors import InputError

CPU = torch.device("cpu")
SETTINGS = Settings("cpu", 2, "lean")


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A real run of every suite on the digits, recorded into a folder of its own."""
    folder = tmp_path_factory.mktemp("ledger")
    few = ["--only", "digits", "--repeats", "2", "--providers"]
    size = ["--sizes", "pMF-digits", "--batch", "2", "--device", "cpu", "--record", str(folder)]
    cli.main(["steps", *size, *few, "flow matching", "lean"])
    cli.main(["sampling", *size, *few, "eager"])
    cli.main(["ops", *size, *few, "triton", "--only", "swiglu forward"])
    cli.main(["memory", *size])
    return folder / "cpu.jsonl"


def test_a_run_records_every_figure_with_its_origin(measured):
    records = report.read_ledger(measured)
    assert {r["suite"] for r in records} == {"steps", "sampling", "ops", "memory"}
    for r in records:
        assert r["status"] == "measured", r
        assert {"commit", "dirty", "torch", "triton", "gpu", "copy_bytes_per_s"} <= r.keys()
    lean = next(r for r in records if r["suite"] == "steps" and r["provider"] == "lean")
    assert lean["batch"] == 2 and lean["size"] == "pMF-digits" and lean["operations"] > 0
    assert lean["of_product_rate"] > 0 and lean["peak_of_flow_matching"] is None
    assert lean["images_per_s"] == pytest.approx(2e6 / lean["median_us"])
    assert 1 <= len(lean["profile"]) <= 25 and 0 < lean["profile"][0][1] <= 1
    assert not any("profile" in r for r in records if r["provider"] != "lean")
    assert {r["provider"] for r in records if r["suite"] == "memory"} == {"lean", "lean, checkpointed", "joint jvp"}


def test_report_prints_the_ledgers_figures(measured, capsys):
    cli.main(["report", "--ledger", str(measured)])
    out = capsys.readouterr().out
    assert out.startswith(f"From `{measured}`: cpu")
    lean = next(r for r in report.read_ledger(measured) if r["provider"] == "lean")
    assert f"| step digits batch 2 | lean | {lean['median_us'] / 1e3:.4g} |" in out
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
        ("nonsense\n", "line 1 of"),
        ('{"a": 1}\n', "line 1 of"),
    ):
        file.write_text(text)
        for reader in ("plot", "report"):
            with pytest.raises(SystemExit):
                cli.main([reader, "--ledger", str(file)])
            assert message in capsys.readouterr().err
    with pytest.raises(InputError, match="ledger: no such file"):
        report.find_ledger(tmp_path / "absent.jsonl")


def test_memory_columns_are_aligned(measured):
    lines = suite.memory_table([r for r in report.read_ledger(measured) if r["suite"] == "memory"]).splitlines()
    assert len(lines) == 4 and len({len(line) for line in lines}) == 1 and "141 GB" in lines[0]


def test_one_provider_that_fails_loses_no_other():
    def broken():
        raise RuntimeError("first line\nsecond line")

    providers = {"broken": broken, "fails when run": lambda: broken, "works": lambda: lambda: None}
    records = list(case_records("case", providers, CPU, SETTINGS))
    assert [r["status"] for r in records] == ["failed", "failed", "measured"]
    assert records[0]["error"] == "RuntimeError: first line" and records[0]["provider"] == "broken"


def test_a_step_that_does_not_fit_is_measured_at_half_the_batch(monkeypatch):
    def prepare(batch):
        def run():
            if batch > 2:
                raise torch.OutOfMemoryError("CUDA out of memory")

        return run

    providers = lambda size, batch, device: {"lean": lambda: prepare(batch)}  # noqa: E731
    monkeypatch.setattr(jobs, "step_providers", providers)
    job = Job("steps", "pMF-digits", 8, ("step digits batch 8",), "lean")
    records = list(jobs._step_records(job, SETTINGS, CPU, 1.0))
    assert [(r["batch"], r["status"]) for r in records] == [(8, "failed"), (4, "failed"), (2, "measured")]
    assert records[-1]["case"] == "step digits batch 2"


def test_every_case_is_compiled_anew(monkeypatch):
    """A compiler that has met many shapes of one function leaves the next ones uncompiled."""
    ran = []

    def case(rows):
        def prepare():
            work = torch.compile(torch.sin, backend=lambda graph, _: lambda *x: ran.append(rows) or graph(*x))
            return lambda: work(torch.ones(rows))

        return Case(f"case {rows}", 0, 0, lambda device: {"compiled": prepare}, "")

    cases = [case(rows) for rows in range(2, 14)]
    monkeypatch.setattr(jobs, "suite_cases", lambda *a: cases)
    job = Job("ops", "", 1, tuple(case.name for case in cases))
    assert all(r["status"] == "measured" for r in jobs._records(job, SETTINGS, CPU, 1.0))
    assert set(ran) == set(range(2, 14))


def test_each_provider_is_rated_by_what_it_computes():
    plan = suite.Plan.of([("steps", "pMF-digits")], 2, "")
    (name, case) = next(iter(plan.cases.items()))
    run = suite.Measurement(plan, SETTINGS, suite.Budget(1), None)
    run.origin = {"copy_bytes_per_s": 1.0, "product_operations_per_s": 1.0}
    record = {"case": name, "suite": "steps", "size": "pMF-digits", "batch": 2, "median_us": 1e6, "peak_bytes": None}
    shares = {p: run._shares({**record, "provider": p})["operations"] for p in ("lean", "flow matching")}
    assert shares == {"lean": case.operations, "flow matching": case.other_operations["flow matching"]}
    assert shares["flow matching"] < shares["lean"]


def test_a_run_without_time_leaves_earlier_figures(tmp_path):
    file = tmp_path / "gpu.jsonl"
    key = {"case": "x", "provider": "y"}
    found = {}
    for statuses in (("measured", "skipped"), ("measured", "skipped", "failed"), ("skipped", "measured")):
        file.write_text("".join(json.dumps({**key, "status": status}) + "\n" for status in statuses))
        with contextlib.suppress(InputError):  # no figures
            found[statuses] = report.read_ledger(file)[0]["status"]
    assert list(found.values()) == ["measured", "measured"]


def test_pictures_say_which_batches_were_computed():
    record = {"size": "L", "budget_gb": 40, "computed_batch": 9, "provider": "lean"}
    bars = plots._largest([{**record, "measured_batch": None}, {**record, "measured_batch": 7}])
    assert [(bar["provider"], bar["batch"]) for bar in bars] == [("lean, computed", 9), ("lean, measured", 7)]


class Action:
    """Unpickled in the job's process, it acts there."""

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
    (record,) = run_job(Job("steps", Action(source), 1, ("case",), "lean"), SETTINGS, seconds)
    assert record["status"] == "failed" and error in record["error"] and record["provider"] == "lean"
    assert time.monotonic() - began < 30


def test_what_the_jobs_are_forked_from_touches_no_gpu():
    """A process that has asked CUDA for anything cannot fork others that use it."""
    code = "import torch; torch._C._cuda_getDeviceCount = torch._C._cuda_init = None; import pmf.benchmarks.jobs"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert result.returncode == 0, result.stderr


def test_what_no_longer_fits_is_named(tmp_path, capsys, monkeypatch):
    plan = suite.Plan.of([("steps", "pMF-digits"), ("memory", "pMF-digits")], 2, "")
    budget = suite.Budget(1.0)
    monkeypatch.setattr(budget, "left", lambda: 3.0)
    monkeypatch.setattr(budget, "largest_job", lambda: 60.0)
    suite.Measurement(plan, SETTINGS, budget, tmp_path).run()
    lines = [json.loads(line) for line in (tmp_path / "cpu.jsonl").read_text().splitlines()]
    assert len(lines) == len(plan.jobs) and {r["status"] for r in lines} == {"skipped"}
    out = capsys.readouterr().out
    assert "joint jvp, compiled" in out and "largest batch digits" in out and "no time was left" in out


def test_a_job_takes_a_share_of_what_is_left():
    budget = suite.Budget(20)
    assert budget.largest_job() == pytest.approx(200, rel=0.01)
    budget.end = time.monotonic() + 12
    assert budget.largest_job() <= 12
    with pytest.raises(InputError, match="minutes: expected a positive time"):
        suite.Budget(0)


def test_the_most_important_comes_first(monkeypatch):
    monkeypatch.setattr(suite, "suite_cases", lambda *a: [])
    seen = []
    monkeypatch.setattr(suite, "_jobs", lambda kind, size, *a: seen.append((kind, size)) or [Job(kind, size)])
    cli.plan_of(cli.Options("gpu"))
    assert seen[:5] == [*((kind, "pMF-B/16") for kind in suite.SUITES), ("steps", "pMF-L/16")]
    assert seen[-3:] == [(kind, "pMF-H/32") for kind in ("steps", "sampling", "memory")]
    assert ("ops", jobs.LONG_ATTENTION) in seen and ("ops", "pMF-B/32") not in seen


def test_a_test_that_fails_keeps_figures_out(tmp_path, monkeypatch):
    monkeypatch.setattr(ledger, "ROOT", tmp_path)
    monkeypatch.setattr(suite, "ROOT", tmp_path)
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/test_good.py").write_text("def test():\n    pass\n")
    (tmp_path / "tests/test_bad.py").write_text("def test():\n    assert False\n")
    (tmp_path / "tests/test_slow.py").write_text("import time\ndef test():\n    time.sleep(60)\n")
    assert suite.failing_tests(["test_good.py", "test_bad.py"], 60.0) == {"test_bad.py": "test_bad.py fails"}
    assert suite.failing_tests(["test_slow.py"], 1.0) == {"test_slow.py": "test_slow.py did not finish in 1 s"}


def test_ledger_appends_a_line_with_its_origin(tmp_path):
    record = {**ledger.provenance(CPU), "case": "x", "median_us": 1.0}
    for _ in range(2):
        file = ledger.append(record, tmp_path)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert file.name == "cpu.jsonl" and len(lines) == 2
    assert {"commit", "dirty", "torch", "triton", "gpu"} <= lines[0].keys()


def test_without_a_gpu_nothing_is_recorded_unless_asked(capsys, monkeypatch):
    monkeypatch.setattr(suite, "append", lambda *a: pytest.fail("recorded without a GPU"))
    few = ["--only", "digits", "--repeats", "2", "--batch", "2", "--device", "cpu", "--providers", "eager"]
    cli.main(["sampling", "--sizes", "pMF-digits", *few])
    out = capsys.readouterr().out
    assert "eager" in out and "no GPU: nothing was recorded" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gpu", "--sizes", "pMF-Q"], "sizes: unknown preset 'pMF-Q'"),
        (["ops", "--sizes", "pMF-digits", "--only", "nothing"], "only: 'nothing' fits no case"),
        (["steps", "--sizes", "pMF-digits", "--providers", "lean,eager"], "providers: expected some of ["),
        (["steps", "--minutes", "-1"], "minutes: expected a positive time"),
    ],
)
def test_bad_options_are_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit):
        cli.main(arguments)
    assert capsys.readouterr().err.startswith(f"pmf.benchmarks: {message}")
