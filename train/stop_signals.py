"""Stop requests: Ctrl-C, a closed terminal, SIGTERM and others ask the loop to save and stop after the current step."""

from __future__ import annotations

import os
import signal
import sys

from pmf.data.loader import STOP_SIGNALS


class StopRequest:
    """While entered, a stop signal sets `requested`, and says so at once if `told`. Further ones change nothing.

    A hangup that is ignored on entry, as under nohup, stays ignored.
    """

    def __init__(self, told: bool = True) -> None:
        self.requested, self.told = False, told

    def __enter__(self) -> StopRequest:
        ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        numbers = [number for number in STOP_SIGNALS if number != signal.SIGHUP or not ignored]
        self._before = {number: signal.signal(number, self._request) for number in numbers}
        return self

    def _request(self, number: int, frame: object) -> None:
        now = "is still about to save" if self.requested else "saves and stops after at most one more step"
        self.requested = True
        if self.told:
            end = f"kill -9 {os.getpid()} ends it unsaved"
            print(f"\n{signal.Signals(number).name}: the run {now} ({end})", file=sys.stderr, flush=True)

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
