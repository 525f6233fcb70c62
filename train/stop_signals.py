"""Stop requests: Ctrl-C, SIGTERM and SIGUSR1 ask the loop to save and stop after the current step."""

from __future__ import annotations

import signal

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""Slurm sends SIGUSR1 before the time is up, when asked to by --signal=USR1@60."""


class StopRequest:
    """While entered, the first signal sets `requested`; a second one of its kind has its usual effect."""

    def __enter__(self) -> StopRequest:
        self.requested = False
        self._before = {int(number): signal.signal(number, self._request) for number in SIGNALS}
        return self

    def _request(self, number: int, frame: object) -> None:
        self.requested = True
        signal.signal(number, self._before[number])

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
