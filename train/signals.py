"""Asked to stop: Ctrl-C, SIGTERM and SIGUSR1 become a request that the loop honours after the step."""

from __future__ import annotations

import signal

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""SIGUSR1 is what Slurm's --signal=USR1@60 sends before the time is up."""


class StopRequest:
    """While entered, the first signal sets `requested`; a second one of that kind does what it always does."""

    def __enter__(self) -> StopRequest:
        self.requested = False
        self._before = {number: signal.signal(number, self._request) for number in SIGNALS}
        return self

    def _request(self, number: int, frame: object) -> None:
        self.requested = True
        signal.signal(number, self._before[number])

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
