"""A wanted version installed by the update core (bmoe/storage/updater.py); only ever called in an updater's process."""

from __future__ import annotations

from pathlib import Path

from bmoe.storage.download import progress
from bmoe.storage.update_source import Received, Source
from bmoe.storage.updater import Installed, apply
from bmoe.storage.updater import Wanted as Version
from edge_agent.self_test import reproduces_golden
from edge_agent.trusted import trusted
from edge_agent.wanted import Result, Wanted, write_result

__all__ = ["Received", "Source", "install", "progress"]


def install(state: Path, wanted: Wanted, source: Source) -> Result:
    """What became of it, kept on disk unless it may become better: "failed" is tried again."""
    found = apply(source, state, Version(wanted.model, wanted.version), trusted(state), reproduces_golden)
    if isinstance(found, Installed):
        result = Result(wanted.rollout, "installed")
    else:
        result = Result(wanted.rollout, "failed" if found.again else "refused", f"{found.step}: {found.reason}")
    if result.state != "failed":
        write_result(state, result)
    return result
