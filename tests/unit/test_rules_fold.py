"""The fold: frames that are forged, replayed, torn or foreign become one rejected leaf each and move nothing."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ledger_fixtures import Fleet, inputs_for, toy
from rules_helpers import agreed, carries_on, founded, frame_refused, kinds, memory, one_rejected, openings, refused

from bmoe.ledger.rules.entries import BY_REFEREE, Entry, Genesis, Opened, Rejected, Tick, Verdict, parse_entry
from bmoe.ledger.rules.fold import apply_message
from bmoe.ledger.rules.frames import NO_FRAME, build_frame
from bmoe.ledger.rules.merkle import merkle_root
from bmoe.ledger.rules.quorum import quorum_of
from bmoe.ledger.rules.state import State
from bmoe.protocol.encoding import bstr, encode, read_bstrs
from bmoe.protocol.envelope import split_envelope
from bmoe.protocol.keys import Signer

QUICK = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def fleet() -> Fleet:
    return founded()


def frame_of(fleet: Fleet, author: str, signer: Signer | None = None, **changes: Any) -> bytes:
    """The author's next frame over one tick, with fields of the header changed; the fleet's chain stands still."""
    chain = fleet.state.authors.get(author)
    fields = {
        **fleet.common(author, (chain.seq if chain else 0) + 1),
        "previous": chain.previous if chain else NO_FRAME,
        "time_ms": fleet.now_ms,
        **changes,
    }
    common = {k: v for k, v in fields.items() if k != "previous"}
    entries = fields.pop("entries", [Tick(**common, size=1).to_bytes()] if "entries" not in changes else None)
    return build_frame(signer or fleet.signers[author], **fields, entries=entries, attachments=[])[0]


def honest_stream() -> Fleet:
    """Everything at once: verdicts, a referee, an answer, a challenge, a confirmation, ticks, an opaque entry."""
    fleet = founded(validators=4)
    task, outputs = agreed(fleet)
    fleet.decide(task, outputs)
    (kind, fields), opening, _ = fleet.answer([(task, outputs[0])])
    assert kinds(fleet.enter("coordinator", (kind, fields), attachments=[opening, outputs[0].opening])) == ["answer"]
    task = fleet.open_task()
    lie = fleet.output("agent-2", task, toy(task.x) + 1)
    referee = fleet.output("coordinator", task)
    honest = fleet.output("agent-1", task)
    fleet.decide(task, [honest, lie], policy="referee", referee=referee, accepted=BY_REFEREE)
    for name in fleet.validators[:3]:
        fleet.challenge(task, fleet.output(name, task), [lie])
    for name in fleet.validators:
        fleet.tick(name)
    assert fleet.state.standing("agent-2").value == "quarantined"
    fleet.messages.append(frame_of(fleet, "agent-1", entries=[encode({0: 1, 1: 99, 2: b"later"})]))
    apply_message(fleet.state, fleet.messages[-1])
    return fleet


def folded(fleet: Fleet, recompute: bool) -> tuple[State, list[bytes]]:
    state, leaves = State(fleet.ledger, fleet.epoch, fleet.registrar.public_key), []
    for message in fleet.messages:
        leaves += apply_message(state, message, recompute=recompute).leaves
    return state, leaves


def test_the_same_stream_gives_everyone_the_same_leaves_and_state() -> None:
    fleet = honest_stream()
    (one, leaves), (two, again), (relying, third) = folded(fleet, True), folded(fleet, True), folded(fleet, False)
    assert not [leaf for leaf in leaves if isinstance(parse_entry(leaf), Rejected)]
    assert leaves == again == third and merkle_root(leaves) == merkle_root(again)
    assert one == two == relying == fleet.state
    assert one.size == len(leaves)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"registrar": Signer.generate().public_key}, "another registrar key"),
        ({"quorum": 1}, "4 validators need a quorum of 3"),
        ({"quorum": 4}, "4 validators need a quorum of 3"),
        ({"validators": (), "quorum": 1}, "0 validators"),
        ({"validators": (("v-1", b"\x01" + bytes(31)),), "quorum": 1}, "small order"),
        ({"validators": (("v-1", bytes(range(32))), ("v-1", bytes(range(32)))), "quorum": 2}, "1 validators"),
        ({"validators": (("v-1", bytes(range(32))), ("v-2", bytes(range(32)))), "quorum": 2}, "have one key"),
        ({"rules": 2}, "rules version 2, this is 1"),
    ],
)
def test_false_genesis_founds_nothing_and_the_true_one_still_does(changes: dict[str, Any], reason: str) -> None:
    fleet = Fleet(validator_count=4)
    kind, fields = fleet.genesis()
    before = memory(fleet.state)
    one_rejected(fleet.enter("registrar", (kind, {**fields, **changes})), "registrar", reason)
    assert memory(fleet.state) == before and not fleet.state.authors["registrar"].fenced
    assert kinds(fleet.enter("registrar", fleet.genesis())) == ["genesis"]
    assert fleet.state.quorum == quorum_of(4) == 3


def test_nothing_comes_before_the_genesis_not_even_the_unknown() -> None:
    fleet = Fleet()
    one_rejected(fleet.enter("registrar", fleet.member("agent-1", "agent")), "registrar", "first entry .* genesis")
    opaque = frame_of(fleet, "registrar", entries=[encode({0: 1, 1: 99})])
    one_rejected(apply_message(fleet.state, opaque), "registrar", "first entry .* genesis")
    assert fleet.state.members == {}
    stranger = Fleet(ledger=fleet.ledger, registrar=Signer.generate())
    frame_refused(fleet, stranger.frame("registrar", stranger.genesis()), "bad signature")


def test_second_genesis_cannot_replace_the_validators(fleet: Fleet) -> None:
    refused(fleet, "registrar", fleet.genesis(), "has its genesis already")
    refused(fleet, "coordinator", (Genesis, fleet.genesis()[1]), "has its genesis already")


ATTACKS: dict[str, tuple[Callable[[Fleet], bytes], str]] = {
    "a stranger writes": (lambda f: frame_of(f, "mallory", Signer.generate()), "mallory is not enrolled"),
    "a forger writes as a validator": (lambda f: frame_of(f, "validator-1", Signer.generate()), "bad signature"),
    "an agent writes as a validator": (lambda f: frame_of(f, "validator-1", f.signers["agent-1"]), "bad signature"),
    "a frame of another ledger": (lambda f: frame_of(f, "validator-1", ledger=bytes(16)), "frame of ledger 00000000"),
    "a frame of the last epoch": (lambda f: frame_of(f, "validator-1", epoch=0), "/0, this is"),
    "a frame left out": (lambda f: frame_of(f, "coordinator", seq=2), "frame 2 does not follow its frame 0"),
    "sequence zero": (lambda f: frame_of(f, "coordinator", seq=0), "does not follow"),
    "a rewritten past": (lambda f: frame_of(f, "registrar", previous=bytes(32)), "does not follow its frame 3"),
    "an empty frame": (lambda f: frame_of(f, "coordinator", entries=[]), "is empty"),
    "a frame sent twice": (lambda f: f.messages[-1], "does not follow"),
    "a genesis sent twice": (lambda f: f.messages[0], "does not follow"),
    "half a frame": (lambda f: f.messages[1][:-1], "byte string"),
    "a frame with something behind": (lambda f: f.messages[1] + b"\x40", "came"),
    "entries in another order": (lambda f: swapped(f), "not the one that the frame pins"),
    "a frame too large": (lambda f: bytes(9 << 20), "at most"),
    "nothing": (lambda f: b"", "COSE_Sign1"),
}


def swapped(fleet: Fleet) -> bytes:
    """A frame whose two entries change places behind the signature."""
    chain = fleet.chains["registrar"]
    seq, previous = chain.seq, chain.previous
    data = fleet.frame("registrar", fleet.member("agent-1", "agent"), fleet.member("agent-2", "agent"))
    chain.seq, chain.previous = seq, previous
    _, end = split_envelope(data)
    return data[:end] + b"".join(bstr(entry) for entry in reversed(read_bstrs(data, end, 2)))


@pytest.mark.parametrize("attack", ATTACKS)
def test_frame_refused_whole_is_one_leaf_and_its_author_can_go_on(fleet: Fleet, attack: str) -> None:
    make, reason = ATTACKS[attack]
    frame_refused(fleet, make(fleet), reason)
    assert kinds(fleet.tick("validator-1")) == ["tick"]
    carries_on(fleet, "registrar")
    carries_on(fleet, "coordinator")


@pytest.mark.parametrize("field", ["ledger", "epoch", "author", "seq", "time_ms"])
def test_entry_lifted_from_another_frame_is_rejected(fleet: Fleet, field: str) -> None:
    true = Tick(**fleet.common("validator-1", 1), time_ms=fleet.now_ms, size=1)
    other = {"ledger": bytes(16), "epoch": 2, "author": "validator-2", "seq": 2, "time_ms": fleet.now_ms + 1}
    before = memory(fleet.state)
    data = frame_of(fleet, "validator-1", entries=[dataclasses.replace(true, **{field: other[field]}).to_bytes()])
    one_rejected(apply_message(fleet.state, data), "validator-1", f"the entry's {field} is not its frame's")
    assert memory(fleet.state) == before


def test_nobody_can_write_a_rejection_in_anothers_name(fleet: Fleet) -> None:
    refused(fleet, "validator-1", (Rejected, {"digest": bytes(32), "reason": "I say so"}), "written by the rules")


def test_entry_types_of_the_future_are_kept_as_they_are(fleet: Fleet) -> None:
    before, later = memory(fleet.state), encode({0: 1, 1: 200, 2: b"whatever", 7: "later"})
    applied = apply_message(fleet.state, frame_of(fleet, "agent-1", entries=[later]))
    assert applied.leaves == (later,) and kinds(applied) == ["opaque"]
    assert memory(fleet.state) == before


def test_fenced_author_is_heard_no_more_neither_in_this_frame_nor_later(fleet: Fleet) -> None:
    task, outputs = agreed(fleet)
    lie = fleet.verdict(task, outputs, stances="aad")
    data = fleet.frame("coordinator", lie, fleet.opened(inputs_for(1))[1], attachments=openings(outputs))
    before = memory(fleet.state)
    applied = apply_message(fleet.state, data)
    reasons = [parse_entry(leaf).reason for leaf in applied.leaves]
    assert len(reasons) == 2 and "claims 0 with 'aad'" in reasons[0] and "coordinator is fenced" in reasons[1]
    frame_refused(fleet, fleet.frame("coordinator", fleet.verdict(task, outputs)), "coordinator is fenced")
    assert memory(fleet.state) == before
    carries_on(fleet, "coordinator")


def test_one_validator_of_four_cannot_move_time_nor_close_what_is_open_to_challenge() -> None:
    fleet = founded(validators=4)
    task, outputs = agreed(fleet)
    fleet.decide(task, outputs)
    for name in fleet.validators[1:3]:
        fleet.tick(name)
    assert fleet.state.time_ms == 0, "two of four are no quorum"
    fleet.tick("validator-4")
    honest_ms = fleet.state.time_ms
    assert honest_ms == min(fleet.state.ticks.values()) > 0
    liar = frame_of(fleet, "validator-1", time_ms=2**52)
    assert kinds(apply_message(fleet.state, liar)) == ["tick"]
    assert fleet.state.time_ms == sorted(fleet.state.ticks.values())[1] < honest_ms + 10
    assert task.task in fleet.state.closed
    fleet.now_ms -= 1000
    before = fleet.state.time_ms
    for name in fleet.validators[1:]:
        fleet.tick(name)
    assert fleet.state.time_ms == before, "time never goes back"
    carries_on(fleet, "registrar")


def harmless(fleet: Fleet, data: bytes) -> None:
    before, size = memory(fleet.state), fleet.state.size
    applied = apply_message(fleet.state, data)
    assert len(applied.leaves) == len(applied.events) == 1
    assert isinstance(parse_entry(applied.leaves[0]), Rejected)
    assert fleet.state.size == size + 1 and memory(fleet.state) == before


@QUICK
@given(st.binary(max_size=300))
def test_garbage_never_raises_and_is_one_leaf(fleet: Fleet, data: bytes) -> None:
    harmless(fleet, data)


@QUICK
@given(st.randoms(use_true_random=False))
def test_true_frame_with_bytes_changed_never_raises_and_is_one_leaf(fleet: Fleet, draw: random.Random) -> None:
    data = bytearray(draw.choice(fleet.messages))
    for _ in range(draw.randint(1, 4)):
        spot = draw.randrange(len(data))
        old = data[spot : spot + 1]
        changed = {"flip": bytes([old[0] ^ 1 << draw.randrange(8)]), "drop": b"", "double": old * 2}
        data[spot : spot + 1] = changed[draw.choice(sorted(changed))]
    harmless(fleet, bytes(data))


@QUICK
@given(st.data())
def test_signed_entries_full_of_garbage_never_raise_and_are_one_leaf_each(fleet: Fleet, data: st.DataObject) -> None:
    """The author is a real coordinator: its signature is good, and only what it says is not."""
    types: list[type[Entry]] = [Opened, Verdict, Tick, Genesis]
    blob = st.binary(max_size=40)
    whole = st.recursive(st.integers(0, 2**40) | blob | st.text(max_size=5), lambda x: st.lists(x, max_size=3))
    entries = []
    for _ in range(data.draw(st.integers(1, 4))):
        common = {0: 1, 1: data.draw(st.sampled_from(types)).TYPE, 2: fleet.ledger, 3: 1, 4: "coordinator"}
        rest = {k: data.draw(whole) for k in sorted(data.draw(st.sets(st.integers(7, 22), max_size=16)))}
        chain = fleet.state.authors.get("coordinator")
        seq = (chain.seq if chain else 0) + 1
        entries.append(data.draw(blob | st.just(encode({**common, 5: seq, 6: fleet.now_ms, **rest}))))
    before, size = memory(fleet.state), fleet.state.size
    applied = apply_message(fleet.state, frame_of(fleet, "coordinator", entries=entries))
    assert len(applied.leaves) == len(entries) and set(kinds(applied)) <= {"rejected", "opaque", "opened"}
    assert fleet.state.size == size + len(entries)
    assert memory(fleet.state) == before


@QUICK
@given(st.randoms(use_true_random=False))
def test_statement_with_a_bit_flipped_enrols_nobody(fleet: Fleet, draw: random.Random) -> None:
    fleet.signers["agent-9"] = fleet.signers["agent-1"]
    kind, fields = fleet.member("agent-9", "agent")
    spoiled = bytearray(fields["statement"])
    spoiled[draw.randrange(len(spoiled))] ^= 1 << draw.randrange(8)
    before = memory(fleet.state)
    one_rejected(fleet.enter("registrar", (kind, {"statement": bytes(spoiled)})), "registrar", ".")
    assert memory(fleet.state) == before and not fleet.state.authors["registrar"].fenced
