"""The tests that stand before every figure: run on this machine, within a time, with a verdict per file."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from pmf.benchmarks import ledger


def _file_of(nodeid: str) -> str:
    return Path(nodeid.partition("::")[0]).name


@dataclass(frozen=True)
class Verdict:
    """What became of a test file."""

    error: str | None
    """Why it is not green; None: every test of it passed."""
    finished: bool = True
    """False where more time, or another try, might change it."""


def verdicts(file: Path, tests: list[str], ending: str) -> dict[str, Verdict]:
    """The verdict of each test file from what the witness wrote; `ending`: why its run ended early, if so."""
    lines = list(ledger.records_of(file))
    failed: dict[str, str] = {}
    for line in lines:
        if "failed" in line:
            failed.setdefault(line["failed"], line["reason"])  # a test can fail in its call, then in its teardown
    expected = {nodeid for line in lines for nodeid in line.get("collected", ())}
    done = {line["done"] for line in lines if "done" in line}
    every, ended = (Counter(_file_of(nodeid) for nodeid in ids) for ids in (expected, done))
    found = {}
    for test in tests:
        broken = {nodeid: reason for nodeid, reason in failed.items() if _file_of(nodeid) == test}
        if broken:
            names = sorted(nodeid.partition("::")[2] or "collection" for nodeid in broken)
            reason = next(iter(broken.values()))  # of the first that came
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            found[test] = Verdict(f"{test} fails: {', '.join(names[:5])}{more}; {reason[:160]}"[:500])
        elif ended[test] < max(every[test], 1):
            found[test] = Verdict(f"{test} {ending}: {ended[test]} of {every[test]} tests", finished=False)
        else:
            found[test] = Verdict(None)
    return found


def run_tests(tests: list[str], seconds: float) -> dict[str, Verdict]:
    """The verdict of each test file, from one run of all in at most `seconds`."""
    with tempfile.TemporaryDirectory() as folder:
        file, log = Path(folder) / "witness.jsonl", Path(folder) / "log"
        command = [sys.executable, "-m", "pmf.benchmarks.witness", str(file)]
        command += [str(ledger.ROOT / "tests" / test) for test in tests]
        with open(log, "w") as output:
            streams = dict(stdout=output, stderr=subprocess.STDOUT)
            process = subprocess.Popen(command, cwd=ledger.ROOT, start_new_session=True, **streams)
        try:
            process.wait(seconds)
            last = [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-1:]
            ending = f"did not run to its end ({''.join(last)[:160]})"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # its workers too
            process.wait()
            ending = f"did not finish in {seconds:.0f} s"
        return verdicts(file, tests, ending)
