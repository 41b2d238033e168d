"""A board that was away for weeks: what it has seen is long out of date, and it catches up, or says why not."""

from __future__ import annotations

import datetime
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from release_site import Site

from bmoe.storage.updater import Installed

pytestmark = pytest.mark.usefixtures("unsynced")
DAYS = 40 * 86_400


def test_after_forty_days_away_a_board_says_why_it_waits_and_then_catches_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [time.time() - DAYS]

    class Then(datetime.datetime):
        """What time the board has it."""

        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> datetime.datetime:
            return datetime.datetime.fromtimestamp(clock[0], tz)

    dated = SimpleNamespace(datetime=Then, timezone=datetime.timezone)
    monkeypatch.setattr("tuf.ngclient._internal.trusted_metadata_set.datetime", dated)
    site = Site(tmp_path, clock=lambda: clock[0])
    site.release(site.model(1))
    assert site.update(1) == Installed("lines", 1, 0)
    site.release(site.model(2))
    clock[0] += DAYS  # the gateway was off as well
    assert site.stays("the repository's metadata is out of date", version=2).again
    assert set(site.repository.refresh()[0]) >= {"timestamp", "snapshot"}
    for role in ("root", "owner-ada", "snapshot"):
        site.repository.rotate(role)
    site.release(site.model(3))
    assert site.update(3) == Installed("lines", 3, 1)
    site.stays("not in the repository", version=9, installed=3)
