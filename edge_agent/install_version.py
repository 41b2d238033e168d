"""A wanted version installed by the update core (bmoe/storage/updater.py); only ever called in an updater's process."""

from __future__ import annotations

import contextlib
from pathlib import Path

from bmoe.storage.download import progress
from bmoe.storage.update_source import Received, Source
from bmoe.storage.updater import Installed, apply
from bmoe.storage.updater import Wanted as Version
from edge_agent.self_test import reproduces_golden
from edge_agent.trusted import trusted
from edge_agent.wanted import Result, Wanted, write_result

__all__ = ["Received", "Source", "install", "keep", "progress"]


def install(state: Path, wanted: Wanted, source: Source) -> Result:
    """What became of it, kept on disk; "failed" is tried again. Raises as `trusted` does, and what is a fault of ours."""
    found = apply(source, state, Version(wanted.model, wanted.version), trusted(state), reproduces_golden)
    if isinstance(found, Installed):
        result = Result(wanted.rollout, "installed")
    else:
        result = Result(wanted.rollout, "failed" if found.again else "refused", f"{found.step}: {found.reason}")
    return keep(state, result)


def keep(state: Path, result: Result) -> Result:
    """Keep a result on disk, as far as that takes it: an agent that finds none is told so by the next try."""
    with contextlib.suppress(OSError):
        write_result(state, result)
    return result
