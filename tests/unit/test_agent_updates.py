"""What an agent does with an update: an updater in a process of its own, our word on how it went, and why where it failed."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from bmoe.protocol.errors import ConfigError
from bmoe.protocol.messages import Update
from edge_agent.config import AgentSettings
from edge_agent.trusted import trusted
from edge_agent.updates import Updates
from edge_agent.wanted import Result, wanted_of, write_result, write_wanted

pytestmark = pytest.mark.usefixtures("unsynced")
NOW = 1_800_000_000_000


def update(seq: int = 1, **changes: object) -> Update:
    facts: dict[str, object] = {
        "ledger": bytes(16), "epoch": 0, "author": "coordinator", "seq": seq, "agent": "edge-01", "rollout": b"r" * 16,
        "model": "lines", "version": 2, "digests": (b"d" * 32,), "carrier": "https", "superlink": "", "issued_ms": NOW,
    }  # fmt: skip
    return Update(**{**facts, **changes})  # type: ignore[arg-type]


class Board:
    """An agent's updates, and what it said."""

    def __init__(self, state: Path) -> None:
        self.said: asyncio.Queue[Result] = asyncio.Queue()
        settings = AgentSettings(state=state, updates="https")
        self.updates = Updates(settings, lambda wanted, result, carrier: self.said.put_nowait(result))

    async def told(self) -> Result:
        return await asyncio.wait_for(self.said.get(), 60)


async def test_what_failed_is_tried_again_and_an_updater_that_cannot_even_begin_says_why(tmp_path: Path) -> None:
    """A real process; the board has lost what enrolment told it."""
    board, wanted = Board(tmp_path), wanted_of(update())
    write_wanted(tmp_path, wanted)
    write_result(tmp_path, Result(wanted.rollout, "failed", "download: the disk is full"))
    assert board.updates.take(update(), NOW) == ""
    said = await board.told()
    await board.updates.close()
    assert said.state == "failed" and "has not joined" in said.reason, said


async def test_what_was_refused_or_installed_is_said_again(tmp_path: Path) -> None:
    board, wanted = Board(tmp_path), wanted_of(update())
    write_wanted(tmp_path, wanted)
    write_result(tmp_path, Result(wanted.rollout, "refused", "self-test: y differs"))
    board.updates.take(update(), NOW)
    assert (await board.told()).reason == "self-test: y differs"
    write_result(tmp_path, Result(wanted.rollout, "installed"))
    (tmp_path / "experts").mkdir()
    expert = tmp_path / "experts" / f"{wanted.digests[0].hex()}.onnx"
    expert.write_bytes(b"")
    board.updates.take(update(2), NOW)
    assert (await board.told()).state == "installed"
    expert.unlink()
    assert board.updates._known(wanted) is None, "the expert is gone: it is installed again"
    await board.updates.close()


def test_an_update_of_yesterday_or_told_before_is_ignored(tmp_path: Path) -> None:
    updates = Board(tmp_path).updates
    assert "an old update" in updates.take(update(issued_ms=NOW - 11 * 60_000), NOW)
    assert "an old update" in updates.take(update(0), NOW)
    off = Updates(AgentSettings(state=tmp_path, updates="off"), lambda *_: None)
    assert off.take(update(), NOW) == "updates are off here"


@pytest.mark.parametrize("harm", [b"", b"[]", b"{}", b'{"assurance": "final", "file_bytes": "x", "memory_mb": 1}'])
def test_damaged_limits_are_told_by_name(tmp_path: Path, harm: bytes) -> None:
    folder = tmp_path / "updates" / "rollout"
    folder.mkdir(parents=True)
    (folder / "root.json").write_bytes(b"{}")
    (folder / "limits.json").write_bytes(harm)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ConfigError, match=r"limits\.json cannot be read"):
        patch.setattr("edge_agent.trusted.load_identity", lambda state: None)
        patch.setattr("edge_agent.trusted.ledger_policy", lambda identity: None)
        trusted(tmp_path)
