"""Failed enrolments counted by address, so that nobody grinds tokens or keeps the server busy with refusals."""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Callable

FAILURES_MAX = 10
WINDOW_S = 60.0
ADDRESSES_MAX = 4096


class Failures:
    """The latest failures of each address; the address that failed longest ago is forgotten first."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._times: OrderedDict[str, deque[float]] = OrderedDict()

    def add(self, address: str) -> None:
        """Count one failure now."""
        times = self._times.setdefault(address, deque(maxlen=FAILURES_MAX))
        times.append(self._clock())
        self._times.move_to_end(address)
        if len(self._times) > ADDRESSES_MAX:
            self._times.popitem(last=False)

    def too_many(self, address: str) -> bool:
        """Whether the address has failed 10 times within the last minute."""
        times = self._times.get(address)
        return times is not None and len(times) == FAILURES_MAX and self._clock() - times[0] < WINDOW_S
