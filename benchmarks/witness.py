"""`python -m pmf.benchmarks.witness FILE TEST...`: pytest, with what becomes of every test written to FILE as it comes.

On all processors where pytest-xdist is installed. A run that is stopped leaves what it knew.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest

MOST_PROCESSES = 16


def _reason(report) -> str:
    """What went wrong, in one line."""
    crash = getattr(report.longrepr, "reprcrash", None)
    if crash is not None:
        return crash.message.partition("\n")[0]
    return str(report.longrepr).strip().rpartition("\n")[2].removeprefix("E").strip()


class Witness:
    """A pytest plugin: what was collected, and what became of it, one JSON line each."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def _write(self, **line: object) -> None:
        with open(self.file, "a") as file:
            file.write(json.dumps(line) + "\n")

    def pytest_collection_finish(self, session) -> None:
        """The tests, where this process runs them."""
        if session.items:
            self._write(collected=[item.nodeid for item in session.items])

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node, ids) -> None:
        """The tests, where others do."""
        self._write(collected=list(ids))

    def pytest_collectreport(self, report) -> None:
        """A file that cannot be collected."""
        if report.failed:
            self._write(failed=report.nodeid, reason=_reason(report))

    def pytest_runtest_logreport(self, report) -> None:
        """A test, when each of its three phases ends."""
        if report.failed:
            self._write(failed=report.nodeid, reason=_reason(report))
        if report.when == "teardown":
            self._write(done=report.nodeid)


def main(arguments: list[str]) -> int:
    """Run pytest with a witness; its exit status."""
    file, *tests = arguments
    processes = min(MOST_PROCESSES, len(os.sched_getaffinity(0)))
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the processes share the processors
    options = ["-p", "no:cacheprovider", "--continue-on-collection-errors"]
    if importlib.util.find_spec("xdist") and processes > 1:
        options += ["-n", str(processes), "--dist", "load"]
    return int(pytest.main([*options, *tests], plugins=[Witness(Path(file))]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
