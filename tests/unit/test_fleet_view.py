"""The fleet as operators see it: rebuilt from the ledger, written in one step, no loss when it is damaged."""

from __future__ import annotations

import json
import time
from pathlib import Path

from tinydb import TinyDB

from bmoe.ledger.rules.standing import Act, Record, Standing
from bmoe.ledger.rules.state import State
from bmoe.protocol.messages import Member
from coordinator.fleet import EVIDENCE_A_MINUTE, DurableStorage, Fleet, Presence


def ledger_with(*agents: str) -> State:
    """A state in which these agents are enrolled, each with an owner of its own."""
    state = State(bytes(16), 0, bytes(32))
    for name in agents:
        state.members[name] = Member(
            ledger=bytes(16), epoch=0, author="registrar", seq=1, member=name, role="agent", public_key=bytes(32),
            owner=f"{name}-owner", batch="", spki=bytes(32), issued_ms=0,
        )  # fmt: skip
        state.agents[name] = Record()
    return state


def save(state: State, view: Path) -> None:
    """What a coordinator does at every start."""
    fleet = Fleet(state, view)
    fleet.save_view(fleet.table())


def test_the_view_is_rebuilt_from_the_ledger_when_its_file_is_lost_or_damaged(tmp_path: Path) -> None:
    """Delete it, fill it with rubbish: the next save has the ledger's facts again, and TinyDB reads them."""
    state, view = ledger_with("pi-1", "pi-2"), tmp_path / "fleet.json"
    save(state, view)
    before = view.read_bytes()
    view.write_bytes(b"\x00 rubbish")
    save(state, view)
    assert view.read_bytes() == before
    view.unlink()
    save(state, view)
    rows = TinyDB(view, storage=DurableStorage).all()
    assert {row["agent"]: row["standing"] for row in rows} == {"pi-1": "probation", "pi-2": "probation"}


def test_a_write_that_is_cut_short_leaves_the_old_view(tmp_path: Path) -> None:
    """The new content goes beside the old and takes its place in one rename: no reader ever sees a part."""
    storage = DurableStorage(tmp_path / "fleet.json")
    storage.write({"_default": {"1": {"agent": "old"}}})
    (tmp_path / ".fleet.json.half").write_bytes(b'{"_default": {"1": {"ag')
    assert storage.read() == {"_default": {"1": {"agent": "old"}}}
    assert json.loads((tmp_path / "fleet.json").read_bytes())["_default"]["1"]["agent"] == "old"


def test_only_those_online_in_service_and_unsuspected_are_asked(tmp_path: Path) -> None:
    """Quarantine takes an agent out at once, suspicion for a while, and diagnosis finds the quarantined."""
    state = ledger_with("honest", "refuted", "suspect", "offline")
    fleet = Fleet(state, tmp_path / "fleet.json")
    for name in ("honest", "refuted", "suspect"):
        fleet.of(name).online = True
    state.act("refuted", Act.REFUTED)
    fleet.suspect("suspect")
    assert [e.agent for e in fleet.eligible(())] == ["honest"]
    assert [e.agent for e in fleet.eligible((), standing=(Standing.QUARANTINED,))] == ["refuted"]
    assert fleet.eligible(("honest",)) == []


def test_p95_is_told_only_once_there_is_enough_to_tell(tmp_path: Path) -> None:
    """Nineteen answers say nothing; of a hundred, the 95th percentile is near the top."""
    fleet = Fleet(ledger_with("a"), tmp_path / "fleet.json")
    for i in range(19):
        fleet.answered("a", b"expert", i / 1000)
    assert fleet.p95(b"expert") is None
    for i in range(19, 100):
        fleet.answered("a", b"expert", i / 1000)
    assert fleet.p95(b"expert") == 0.094


def test_a_liar_cannot_fill_the_disk_with_evidence() -> None:
    """At most ten refused messages of an agent are kept in any minute."""
    presence, now = Presence(), time.monotonic()
    kept = [presence.may_keep(now + i / 100) for i in range(100)]
    assert sum(kept) == EVIDENCE_A_MINUTE
    assert presence.may_keep(now + 61)


def test_an_agent_that_leaves_tasks_unanswered_is_given_fewer_and_one_answer_mends_it(tmp_path: Path) -> None:
    """Silence is no offence: it lowers the load given, never the standing."""
    state = ledger_with("mute")
    fleet = Fleet(state, tmp_path / "fleet.json")
    fleet.of("mute").online = True
    loads = []
    for _ in range(3):
        fleet.unanswered("mute")
        loads.append(fleet.eligible(())[0].load)
    assert loads == sorted(set(loads)) and loads[0] > 0
    assert state.standing("mute") is Standing.PROBATION
    fleet.answered("mute", b"expert", 0.1)
    assert fleet.eligible(())[0].load == 0
