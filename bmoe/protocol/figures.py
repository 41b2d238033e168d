"""Figures that a process keeps of itself: durations in buckets, and a small file by which it hands its figures on.

Plain numbers, changed by one thread: an observation costs well under a microsecond. What becomes of them stands in
coordinator/metrics.py; this is what a validator or the supervisor can use without any of that.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import time
from bisect import bisect_left
from collections.abc import Callable
from pathlib import Path

from bmoe.protocol.errors import InputError

# Seconds; from what one signature takes to the longest time that anybody waits.
BOUNDS = (0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
EVERY_S = 5.0
FILE_BYTES = 64 * 1024
Figures = dict[str, float]


class Seconds:
    """Durations counted in buckets. `counts[i]` are those of at most BOUNDS[i], the last those beyond all bounds."""

    __slots__ = ("counts", "total")

    def __init__(self) -> None:
        self.counts = [0] * (len(BOUNDS) + 1)
        self.total = 0.0

    def add(self, seconds: float) -> None:
        """Count one duration."""
        self.counts[bisect_left(BOUNDS, seconds)] += 1
        self.total += seconds


async def hand_on(path: Path, read: Callable[[], Figures]) -> None:
    """Write what `read` gives to a file, every 5 s, for ever. A disk that takes nothing leaves the figures old."""
    while True:
        with contextlib.suppress(OSError):
            write_figures(path, read())
        await asyncio.sleep(EVERY_S)


def write_figures(path: Path, figures: Figures) -> None:
    """Replace a file of figures in one step. Not synced: after a crash the next ones matter. May raise OSError."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    beside = path.with_name(f".{path.name}")
    try:
        beside.write_text(json.dumps(figures))
        os.replace(beside, path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise


def read_figures(path: Path) -> tuple[Figures, float]:
    """The figures in a file, and how many seconds old they are; raises OSError or InputError where there are none."""
    with path.open("rb") as file:
        data = file.read(FILE_BYTES + 1)
        age_s = time.time() - os.fstat(file.fileno()).st_mtime
    if len(data) > FILE_BYTES:
        raise InputError(f"{path} holds more than {FILE_BYTES} bytes")
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is no JSON: {error}") from error
    if not isinstance(found, dict) or not all(type(value) in (int, float) for value in found.values()):
        raise InputError(f"{path} holds no figures, expected an object of numbers")
    return found, max(0.0, age_s)
