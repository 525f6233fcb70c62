"""The ledger: the origin in each record, and which earlier results still count."""

import subprocess

from pmf.benchmarks import ledger
from pmf.benchmarks.ledger import Ledger
from tests.benchmarks.test_suite import CPU, ORIGIN, lines_of


def test_a_ledger_says_what_is_settled(tmp_path):
    results = {
        "measured": {"status": "measured"},
        "full": {"status": "failed", "error": "OutOfMemoryError: CUDA out of memory"},
        "slow": {"status": "failed", "error": "did not finish in 90 s"},
        "late": {"status": "skipped", "error": "no time was left"},
    }
    for case, result in results.items():
        Ledger(ORIGIN, tmp_path).add({"suite": "steps", "case": case, "provider": "p", **result})
    old = {"suite": "steps", "case": "old", "provider": "p", "status": "measured"}
    Ledger({**ORIGIN, "sources": ""}, tmp_path).add(old)
    with open(tmp_path / "card.jsonl", "a") as file:
        file.write('{"case": "cut o')
    found = Ledger(ORIGIN, tmp_path)
    assert {case for case, *_ in found.settled()} == {"measured", "full"}
    assert {case for case, *_ in found.tried()} == {"slow"}


def test_a_commit_can_be_named_where_there_is_no_repository(tmp_path, monkeypatch):
    monkeypatch.setattr(ledger, "ROOT", tmp_path)
    monkeypatch.delenv("PMF_COMMIT", raising=False)
    assert ledger.commit() == ("unknown", True)
    for given, found in (("abc", ("abc", False)), ("abc-dirty", ("abc", True))):
        monkeypatch.setenv("PMF_COMMIT", given)
        assert ledger.commit() == found


def test_files_outside_the_measured_folders_leave_a_commit_clean(tmp_path, monkeypatch):
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
    for name, text in (("cases.py", "a"), ("cases.py", "b"), ("figures.py", "c"), ("cases.py", "b")):
        (tmp_path / "benchmarks" / name).write_text(text)
        found.append(ledger.digest("benchmarks"))
    assert len(set(found)) == 3 and found[2] == found[3] == found[4]


def test_ledger_appends_a_line_with_its_origin(tmp_path):
    known = Ledger(ledger.provenance(CPU), tmp_path)
    for _ in range(2):
        known.add({"case": "x", "provider": "y", "status": "measured", "median_us": 1.0})
    lines = lines_of(tmp_path / "cpu.jsonl")
    assert known.file.name == "cpu.jsonl" and len(lines) == 2
    assert {"commit", "dirty", "torch", "triton", "gpu", "median_us"} <= lines[0].keys()
