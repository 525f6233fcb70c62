"""Stop requests: Ctrl-C, SIGTERM and SIGUSR1 ask the loop to save and stop after the current step."""

from __future__ import annotations

import signal

from pmf.data.loader import STOP_SIGNALS


class StopRequest:
    """While entered, the first signal sets `requested`; a second one of its kind has its usual effect."""

    def __enter__(self) -> StopRequest:
        self.requested = False
        self._before = {int(number): signal.signal(number, self._request) for number in STOP_SIGNALS}
        return self

    def _request(self, number: int, frame: object) -> None:
        self.requested = True
        signal.signal(number, self._before[number])

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
