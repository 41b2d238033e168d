"""Replay: what a validator found false stays false after a restart, when the attachments that showed it are gone."""

from __future__ import annotations

from ledger_fixtures import Fleet
from rules_helpers import agreed, founded, memory, openings

from bmoe.ledger.rules.fold import apply_message
from bmoe.ledger.rules.state import State


def replayed(fleet: Fleet, lives: list[tuple[bytes, tuple[bytes, ...]]]) -> State:
    """The state that a restarted validator folds from its stream and the leaves it kept, with no attachment fetched."""
    state = State(fleet.ledger, fleet.epoch, fleet.registrar.public_key)
    for data, leaves in lives:
        again = apply_message(state, data, recompute=False, held=leaves)
        assert again.leaves == leaves
    return state


def test_a_false_verdict_is_false_again_without_its_attachments_and_its_author_still_fenced() -> None:
    """Its opening was too large for the frame and is long dropped: a validator once waited for it for ever."""
    fleet = founded(5)
    task, outputs = agreed(fleet)
    kind, fields = fleet.verdict(task, outputs)
    lie = fields | {"stances": "d" * len(outputs)}
    fleet.enter("coordinator", (kind, lie), attachments=openings(outputs))
    assert fleet.state.authors["coordinator"].fenced
    fleet.enter("coordinator", (kind, fields), attachments=openings(outputs))

    state, lives = State(fleet.ledger, fleet.epoch, fleet.registrar.public_key), []
    for data in fleet.messages:
        lives.append((data, apply_message(state, data).leaves))
    again = replayed(fleet, lives)
    assert memory(again) == memory(state)
    assert again.authors["coordinator"].fenced == state.authors["coordinator"].fenced != ""
    assert again.size == state.size


def test_a_frame_with_one_rejected_entry_keeps_its_good_ones_at_replay() -> None:
    fleet = founded(5)
    task, outputs = agreed(fleet)
    good, again = fleet.verdict(task, outputs), fleet.verdict(task, outputs)
    applied = fleet.enter("coordinator", good, again, attachments=openings(outputs))
    assert [e.kind for e in applied.events if e.kind in ("verdict", "rejected")] == ["verdict", "rejected"]
    state, lives = State(fleet.ledger, fleet.epoch, fleet.registrar.public_key), []
    for data in fleet.messages:
        lives.append((data, apply_message(state, data).leaves))
    assert memory(replayed(fleet, lives)) == memory(state)
