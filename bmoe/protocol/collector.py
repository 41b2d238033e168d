"""The garbage collector of a process that keeps much and makes little of it into cycles."""

from __future__ import annotations

import gc

# Objects made and not freed before the youngest are looked through; what is young, and what is old, as multiples of it.
THRESHOLDS = (25_000, 20, 20)


def keep_what_is_loaded() -> None:
    """Call it once, when a process is ready to serve.

    What is loaded by now stays for the life of the process, so no collection looks through it again. And since nearly
    all that a request makes is freed by reference counts, collections come far apart: each takes longer the more verdicts
    are remembered, and holds up every request meanwhile.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*THRESHOLDS)
