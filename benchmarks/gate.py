"""The tests that must pass on this machine before a figure is recorded."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

from pmf.benchmarks import ledger

AT_ONCE = 3
"""Test files run side by side, each on a share of the processors, so that their start-up times overlap."""
Verdict = tuple[str, str | None]
"""passed, failed or skipped (it did not finish, so another run tries again), and the reason."""


def run_test(test: str, seconds: float) -> Verdict:
    """Run a test file with a time limit, on several processors if pytest-xdist is installed."""
    command = [sys.executable, "-m", "pytest", "-rfE", "--tb=no", "-p", "no:cacheprovider", f"tests/{test}"]
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(max(1, len(os.sched_getaffinity(0)) // AT_ONCE))]
    env = {"OMP_NUM_THREADS": "1", **os.environ, "COLUMNS": "400"}  # the processes share the processors
    out, err = subprocess.PIPE, subprocess.STDOUT
    process = subprocess.Popen(
        command, cwd=ledger.ROOT, env=env, text=True, stdout=out, stderr=err, start_new_session=True
    )
    try:
        lines = process.communicate(timeout=seconds)[0].strip().splitlines()
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # its workers too
        process.wait()
        return "skipped", f"{test} did not finish in {seconds:.0f} s"
    if process.returncode == 0:
        return "passed", None
    red = [line[:200] for line in lines if line.startswith(("FAILED ", "ERROR "))]
    if not red:
        return "skipped", f"{test} did not run to its end ({''.join(lines[-1:]).strip('= ')[:160]})"
    return "failed", f"{test} fails: {'; '.join(red)}"[:500]


def run_tests(tests: list[str], seconds: float) -> dict[str, Verdict]:
    """Run test files; the time limit is for all of them together."""
    deadline = time.monotonic() + seconds
    with ThreadPoolExecutor(AT_ONCE) as pool:
        found = pool.map(lambda test: run_test(test, max(0.0, deadline - time.monotonic())), tests)
        return dict(zip(tests, found, strict=True))


def failing(tests: list[str], known: ledger.Ledger, seconds: float) -> dict[str, str]:
    """Map each test file that does not pass to the reason.

    A recorded verdict on the same sources and tests, on this machine, is reused.
    """
    origin = ledger.digest("tests")
    held = [r for r in known.earlier if r["suite"] == "tests" and r["tests"] == origin and r["status"] != "skipped"]
    errors = {r["case"]: r["error"] for r in held if r["case"] in tests}
    for test, (status, error) in run_tests([test for test in tests if test not in errors], seconds).items():
        print(error or f"{test} passes", file=sys.stderr)
        known.add({"suite": "tests", "case": test, "provider": None, "status": status, "error": error, "tests": origin})
        errors[test] = error
    return {test: error for test, error in errors.items() if error is not None}
