"""The floor: what the steps that nobody can leave out cost by themselves on this machine, measured in this process.

One request's model executions, one signature and one verification, and one durable write: what a request must pay for
is known, so how much of its CPU is neither can be said.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

REPEATS = 200
SYNCS = 30
MESSAGE = bytes(400)


@dataclass(frozen=True)
class Primitives:
    """Milliseconds each: an Ed25519 signature and its check over 400 bytes, and a 4 KiB append made durable."""

    sign_ms: float
    verify_ms: float
    sync_ms: float


def primitives(folder: Path) -> Primitives:
    """Measure them; the file that is synced lies in `folder`."""
    key = Ed25519PrivateKey.generate()
    signature, public = key.sign(MESSAGE), key.public_key()
    path = folder / "sync.probe"
    with open(path, "wb", buffering=0) as file:

        def synced() -> None:
            file.write(bytes(4096))
            os.fdatasync(file.fileno())

        found = Primitives(
            _each_ms(lambda: key.sign(MESSAGE), REPEATS),
            _each_ms(lambda: public.verify(signature, MESSAGE), REPEATS),
            _each_ms(synced, SYNCS),
        )
    path.unlink()
    return found


def _each_ms(work: Callable[[], object], repeats: int) -> float:
    taken = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        taken.append(1000 * (time.perf_counter() - began))
    return median(taken)
