"""A measurement within its time: what happens to what fails, and what is made of the figures."""

import contextlib
import dataclasses
import json
import subprocess
import sys
import time

import pytest
import torch

from pmf.benchmarks import cli, gate, jobs, ledger, order, plots, report, suite
from pmf.benchmarks.cases import VALUE_ALONE, Case
from pmf.benchmarks.gate import Verdict
from pmf.benchmarks.jobs import Job, Settings, case_records, run_job
from pmf.benchmarks.order import Part
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
        assert r["attention"] == "cpu"
    lean = next(r for r in records if r["suite"] == "steps" and r["provider"] == "lean")
    assert lean["batch"] == 2 and lean["size"] == "pMF-digits" and lean["operations"] > 0
    assert lean["of_product_rate"] > 0 and lean["peak_of_flow_matching"] is None
    assert lean["host_us"] > 0 and lean["busy_us"] is None and lean["launches"] is None
    assert lean["images_per_s"] == pytest.approx(2e6 / lean["median_us"])
    table = (measured.parent / "cpu-profile-step-digits-batch-2-lean.txt").read_text()
    assert table.startswith("step digits batch 2, lean: median") and lean["profile"][0][0] in table
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
    job = dataclasses.replace(job, held=frozenset({("step digits batch 4", "lean", 4, None)}))
    assert [r["batch"] for r in jobs._step_records(job, SETTINGS, CPU, 1.0)] == [8]


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
    plan = suite.Plan.of([Part("steps", "pMF-digits", 2)], CPU)
    (name, case) = next(iter(plan.cases.items()))
    run = suite.Measurement(plan, SETTINGS, suite.Budget(1), None)
    run.origin = {"copy_bytes_per_s": 1.0, "product_operations_per_s": 1.0}
    record = {"case": name, "suite": "steps", "size": "pMF-digits", "batch": 2, "median_us": 1e6, "peak_bytes": None}
    shares = {p: run._shares({**record, "provider": p})["operations"] for p in ("lean", "flow matching")}
    assert shares == {"lean": case.operations, "flow matching": case.other_operations["flow matching"]}
    assert shares["flow matching"] < shares["lean"]


def test_value_and_tangent_are_measured_by_the_value(tmp_path):
    plan = suite.Plan.of([Part("ops", "pMF-digits", 2)], CPU, "attention dual")
    record = {"suite": "ops", "case": "attention dual digits", "median_us": 10.0}
    run = suite.Measurement(plan, SETTINGS, suite.Budget(1), None)
    run.origin = {"copy_bytes_per_s": 1.0, "product_operations_per_s": 1.0}
    assert run._shares({**record, "provider": "triton"})["of_value_alone"] is None
    run.earlier.records = [{**record, "provider": VALUE_ALONE}]
    shares = run._shares({**record, "provider": "triton", "median_us": 35.0})
    assert shares["of_value_alone"] == 3.5
    assert shares["operations"] == 3.5 * run._shares({**record, "provider": VALUE_ALONE})["operations"]


def test_the_report_tells_what_a_step_waits_for():
    record = {"median_us": 100.0}
    found = [report._bound({**record, "busy_us": busy}) for busy in (None, 95.0, 120.0, 40.0)]
    assert found == ["-", "GPU, busy 95%", "GPU, busy 100%", "host, busy 40%"]


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
    plan = suite.Plan.of([Part("steps", "pMF-digits", 2), Part("memory", "pMF-digits", 0)], CPU)
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


def test_the_most_important_comes_first():
    parts = order.parts_of("gpu", (), None)
    places = {(part.suite, part.size, part.batch, part.group): i for i, part in enumerate(parts)}
    assert list(places)[:2] == [("steps", "pMF-B/16", batch, "eager") for batch in (64, 128)]
    for size in ("pMF-L/16", "pMF-H/16"):
        assert places["steps", "pMF-B/16", 64, "compiled"] < places["steps", size, 64, "eager"]
        assert places["sampling", "pMF-B/16", 128, ""] < places["sampling", size, 128, ""]
    assert ("ops", jobs.LONG_ATTENTION, 1, "") in places and ("ops", "pMF-B/32", 128, "") not in places
    every = suite.Plan.of(parts, torch.device("cuda")).jobs
    assert len(set(every)) == len(every)


def test_the_groups_of_a_step_are_all_of_it():
    def names(group, device="cuda"):
        return [
            job.provider for job in suite.Plan.of([Part("steps", "pMF-B/16", 64, group)], torch.device(device)).jobs
        ]

    groups = [names(group) for group in ("eager", "compiled", "backends")]
    assert sorted(name for group in groups for name in group) == sorted(names(""))
    assert [group[0] for group in groups] == ["flow matching", "lean, compiled", "lean, captured, flash"]
    assert not set(groups[2]) & set(names("", "cpu"))


@pytest.fixture
def few_tests(tmp_path, monkeypatch):
    """A repository of a few test files."""
    monkeypatch.setattr(ledger, "ROOT", tmp_path)
    (tmp_path / "tests").mkdir()
    texts = {
        "good": "import pytest\n@pytest.mark.parametrize('n', range(3))\ndef test(n):\n    pass\n",
        "bad": "def test_a():\n    pass\ndef test_b():\n    assert False\n",
        "broken": "import nowhere\n",
        "slow": "import time\ndef test_a():\n    pass\ndef test_b():\n    time.sleep(60)\n",
    }
    for name, text in texts.items():
        (tmp_path / f"tests/test_{name}.py").write_text(text)


def test_a_test_that_fails_keeps_figures_out(few_tests):
    found = gate.run_tests(["test_good.py", "test_bad.py", "test_broken.py"], 120.0)
    assert found == {
        "test_good.py": Verdict(None),
        "test_bad.py": Verdict("test_bad.py fails: test_b; assert False"),
        "test_broken.py": Verdict("test_broken.py fails: collection; ModuleNotFoundError: No module named 'nowhere'"),
    }


def test_tests_that_do_not_finish_keep_figures_out(few_tests, monkeypatch):
    began = time.monotonic()
    (verdict,) = gate.run_tests(["test_slow.py"], 15.0).values()
    assert verdict == Verdict("test_slow.py did not finish in 15 s: 1 of 2 tests", finished=False)
    assert time.monotonic() - began < 40
    monkeypatch.setattr(sys, "executable", "/bin/false")
    (verdict,) = gate.run_tests(["test_good.py"], 15.0).values()
    assert verdict.error.startswith("test_good.py did not run to its end") and not verdict.finished


def test_a_verdict_is_shared_between_parts(tmp_path, monkeypatch):
    origin = {**ledger.provenance(CPU), "copy_bytes_per_s": 1.0, "product_operations_per_s": 1.0}
    asked = []

    def check(tests, seconds):
        asked.append(tests)
        answers = {"a": Verdict(None), "b": Verdict("b fails"), "c": Verdict("c did not finish", finished=False)}
        return {test: answers[test] for test in tests}

    def part():
        run = suite.Measurement(suite.Plan([], {}, CPU), SETTINGS, suite.Budget(1), tmp_path)
        run.origin, run.earlier = origin, ledger.Earlier(tmp_path / "cpu.jsonl", origin)
        return run.gate(["a", "b", "c"], check)

    assert part() == part() == {"b": "b fails", "c": "c did not finish"}
    assert asked == [["a", "b", "c"], ["c"]]
    origin = {**origin, "sources": "others"}
    part()
    monkeypatch.setattr(suite, "digest", lambda *folders: "other tests")
    part()
    assert asked[2:] == [["a", "b", "c"]] * 2
    with pytest.raises(InputError, match="holds no figures"):  # verdicts are none
        report.read_ledger(tmp_path / "cpu.jsonl")


def test_a_second_part_measures_nothing_twice(tmp_path, capsys, monkeypatch):
    few = ["--only", "digits", "--repeats", "2", "--batch", "2", "--record", str(tmp_path), "--profile", ""]
    command = ["gpu", "--sizes", "pMF-digits", "--device", "cpu", *few, "--providers"]

    def lines():
        return [json.loads(line) for line in (tmp_path / "cpu.jsonl").read_text().splitlines()]

    cli.main([*command, "eager"])
    first = lines()
    assert {r["suite"] for r in first} == {"sampling", "memory"}
    cli.main([*command, "eager"])
    assert lines() == first and "2 of 2 jobs were measured before" in capsys.readouterr().out
    cli.main([*command, "eager", "lean"])
    new = lines()[len(first) :]
    assert {(r["suite"], r["provider"]) for r in new} == {("steps", "lean")}
    monkeypatch.setattr(ledger, "MEASURED", ("kernels",))  # as other sources would, changes their hash
    provenance = {**ledger.provenance(CPU), "copy_bytes_per_s": 1.0, "product_operations_per_s": 1.0}
    assert not ledger.Earlier(tmp_path / "cpu.jsonl", provenance).records


def test_a_ledger_says_what_is_held(tmp_path):
    origin = {"gpu": "card", "sources": "s", "torch": "t", "triton": "3"}
    results = {
        "measured": {"status": "measured"},
        "full": {"status": "failed", "error": "OutOfMemoryError: CUDA out of memory"},
        "slow": {"status": "failed", "error": "did not finish in 90 s"},
        "late": {"status": "skipped", "error": "no time was left"},
    }
    for case, result in results.items():
        ledger.append({**origin, "suite": "steps", "case": case, "provider": "p", **result}, tmp_path)
    ledger.append({**origin, "gpu": "card", "sources": "", "suite": "steps", "case": "old", "provider": "p",
                   "status": "measured"}, tmp_path)  # fmt: skip
    with open(tmp_path / "card.jsonl", "a") as file:
        file.write('{"case": "cut o')
    found = ledger.Earlier(tmp_path / "card.jsonl", origin)
    assert {case for case, *_ in found.held} == {"measured", "full"}
    assert {case for case, *_ in found.tried} == {"slow"}


def test_what_failed_before_comes_last(tmp_path):
    plan = suite.Plan.of([Part("steps", "pMF-digits", 2)], CPU)
    run = suite.Measurement(plan, SETTINGS, suite.Budget(1), None)
    names = [job.provider for job in plan.jobs]
    run.earlier.tried = {("step digits batch 2", names[0], 2, None)}
    run.earlier.held = {("step digits batch 2", names[2], 2, None)}
    assert [job.provider for job in run._jobs()] == [names[1], *names[3:], names[0]]


def test_a_commit_can_be_named_where_there_is_no_repository(tmp_path, monkeypatch):
    monkeypatch.setattr(ledger, "ROOT", tmp_path)
    monkeypatch.delenv("PMF_COMMIT", raising=False)
    assert ledger.commit() == ("unknown", True)
    for given, found in (("abc", ("abc", False)), ("abc-dirty", ("abc", True))):
        monkeypatch.setenv("PMF_COMMIT", given)
        assert ledger.commit() == found


def test_what_is_not_measured_makes_no_commit_dirty(tmp_path, monkeypatch):
    def git(*arguments):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", tmp_path, *arguments], check=True)

    monkeypatch.setattr(ledger, "ROOT", tmp_path)
    monkeypatch.delenv("PMF_COMMIT", raising=False)
    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "nothing")
    found = []
    for name in ("wheels/a.whl", "benchmarks/results/card.jsonl", "kernels/norm.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("a")
        found.append(ledger.commit()[1])
    assert found == [False, False, True] and len(ledger.commit()[0]) == 40


def test_a_digest_tells_sources_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(ledger, "ROOT", tmp_path)
    (tmp_path / "benchmarks").mkdir()
    found = [ledger.digest("benchmarks")]
    for name, text in (("cases.py", "a"), ("cases.py", "b"), ("report.py", "c"), ("cases.py", "b")):
        (tmp_path / "benchmarks" / name).write_text(text)
        found.append(ledger.digest("benchmarks"))
    assert len(set(found)) == 3 and found[2] == found[3] == found[4]


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
