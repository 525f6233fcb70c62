"""The tests that must pass before a figure is recorded."""

import sys
import time

import pytest

from pmf.benchmarks import figures, gate, ledger
from pmf.benchmarks.ledger import Ledger
from pmf.errors import InputError
from tests.benchmarks.test_suite import CPU, ORIGIN


@pytest.fixture
def few_tests(tmp_path, monkeypatch):
    """A repository with a few test files."""
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
    assert found["test_good.py"] == ("passed", None)
    assert found["test_bad.py"] == ("failed", "test_bad.py fails: FAILED tests/test_bad.py::test_b - assert False")
    status, error = found["test_broken.py"]
    assert status == "failed" and error.startswith(
        "test_broken.py fails: ERROR tests/test_broken.py"
    )  # then the reason


def test_tests_that_do_not_finish_keep_figures_out(few_tests, monkeypatch):
    began = time.monotonic()
    (verdict,) = gate.run_tests(["test_slow.py"], 15.0).values()
    assert verdict == ("skipped", "test_slow.py did not finish in 15 s")
    assert time.monotonic() - began < 40
    monkeypatch.setattr(sys, "executable", "/bin/false")
    ((status, error),) = gate.run_tests(["test_good.py"], 15.0).values()
    assert status == "skipped" and error.startswith("test_good.py did not run to its end")


def test_a_verdict_is_shared_between_parts(tmp_path, monkeypatch):
    origin = {**ORIGIN, **ledger.provenance(CPU)}
    asked = []

    def check(tests, seconds):
        asked.append(tests)
        answers = {"a": ("passed", None), "b": ("failed", "b fails"), "c": ("skipped", "c did not finish")}
        return {test: answers[test] for test in tests}

    def part():
        return gate.failing(["a", "b", "c"], Ledger(origin, tmp_path), 1.0)

    monkeypatch.setattr(gate, "run_tests", check)

    assert part() == part() == {"b": "b fails", "c": "c did not finish"}
    assert asked == [["a", "b", "c"], ["c"]]
    origin = {**origin, "sources": "others"}
    part()
    monkeypatch.setattr(ledger, "digest", lambda *folders: "other tests")
    part()
    assert asked[2:] == [["a", "b", "c"]] * 2
    with pytest.raises(InputError, match="holds no figures"):  # verdicts are not figures
        figures.read_ledger(tmp_path / "cpu.jsonl")
