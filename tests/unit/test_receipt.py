"""Receipts: what an auditor with only a policy file believes, and every way of lying to him that is refused."""

from __future__ import annotations

import base64
import dataclasses
import json
import random
import time
from pathlib import Path

import numpy as np
import pytest
from ledger_fixtures import TOY, tensor_of, toy
from receipt_ledger import SIGNED_S, Ledger, answered, decided

from bmoe.ledger.rules.checkpoint import parse_note
from bmoe.ledger.rules.entries import Rejected, Verdict, parse_entry
from bmoe.ledger.rules.merkle import leaf_hash
from bmoe.ledger.rules.receipt import merge_receipts, verify_receipt
from bmoe.ledger.rules.receipt_format import Evidence, format_receipt, parse_receipt
from bmoe.ledger.rules.trust import Trust, format_trust, parse_anchor, parse_trust
from bmoe.protocol.errors import ConfigError, ProofError
from bmoe.protocol.keys import Signer


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path)


def test_verdict_and_answer_verify_and_say_who_stood_where(ledger: Ledger) -> None:
    request, result = answered(ledger)
    task, *_ = decided(ledger, wrong=("agent-2",))
    size = ledger.seal()
    audited = verify_receipt(ledger.receipt("answer", request, size), ledger.fleet.trust)
    assert audited.kind == "answer" and audited.size == size
    assert audited.result == (tensor_of("y", result),)
    assert audited.cosigned == tuple((name, SIGNED_S) for name in ledger.fleet.validators)
    verdict = verify_receipt(ledger.receipt("verdict", task.task, size), ledger.fleet.trust).verdicts[0]
    assert [(a, s) for a, _, s in verdict.agents] == [("agent-1", "a"), ("agent-2", "d"), ("agent-3", "a")]
    assert verdict.referee == verdict.accepted_from == "coordinator"
    assert verdict.value == (tensor_of("y", toy(task.x)),)


def test_a_bit_flipped_anywhere_is_refused(ledger: Ledger) -> None:
    request, _ = answered(ledger)
    text = ledger.receipt("answer", request, ledger.seal()).encode()
    trust = ledger.fleet.trust
    verify_receipt(text, trust)
    draw = random.Random(5)
    for position in sorted(draw.sample(range(len(text)), 400)):
        flipped = bytearray(text)
        flipped[position] ^= 1 << draw.randrange(7)
        with pytest.raises(ProofError):
            verify_receipt(bytes(flipped), trust)


def test_a_bit_flipped_in_the_evidence_is_refused_even_when_respelled(ledger: Ledger) -> None:
    """Base64 hides nothing: every byte behind it is tied to a signature, a digest or the tree."""
    request, _ = answered(ledger)
    text = ledger.receipt("answer", request, ledger.seal())
    line = next(row for row in text.split("\n") if row.startswith("extra "))
    extra = base64.b64decode(line[6:])
    draw = random.Random(6)
    for position in sorted(draw.sample(range(len(extra)), 300)):
        flipped = bytearray(extra)
        flipped[position] ^= 1 << draw.randrange(8)
        with pytest.raises(ProofError):
            verify_receipt(text.replace(line, "extra " + base64.b64encode(flipped).decode()), ledger.fleet.trust)


def test_receipt_of_another_ledger_is_refused_though_its_own_policy_accepts_it(tmp_path: Path) -> None:
    ours, theirs = Ledger(tmp_path / "a"), Ledger(tmp_path / "b")
    task, *_ = decided(theirs)
    text = theirs.receipt("verdict", task.task, theirs.seal())
    verify_receipt(text, theirs.fleet.trust)
    with pytest.raises(ProofError, match=r"step 2 \(checkpoint\): a quorum of 3 .* found 0: nobody"):
        verify_receipt(text, ours.fleet.trust)
    other = dataclasses.replace(theirs.fleet.trust, ledger=bytes(16))
    with pytest.raises(ProofError, match=r"step 1 .*leaf is of ledger 0001"):
        verify_receipt(text, other)
    with pytest.raises(ProofError, match=r"step 2 .*the policy trusts 'elsewhere'"):
        verify_receipt(text, dataclasses.replace(theirs.fleet.trust, origin="elsewhere"))


def test_below_quorum_is_refused_and_a_merge_reaches_it(ledger: Ledger) -> None:
    task, *_ = decided(ledger)
    size = ledger.seal()
    whole = parse_receipt(ledger.receipt("verdict", task.task, size))
    singles = []
    for signature in whole.note.signatures:
        note = whole.note.text + "\n" + signature.line()
        singles.append(format_receipt(whole.evidence, whole.index, whole.path, note))
    with pytest.raises(ProofError, match="found 1: validator-1"):
        verify_receipt(singles[0], ledger.fleet.trust)
    with pytest.raises(ProofError, match="found 2"):
        verify_receipt(merge_receipts([singles[0], singles[1], singles[0]]), ledger.fleet.trust)
    assert len(verify_receipt(merge_receipts(singles), ledger.fleet.trust).cosigned) == 3
    twice = whole.note.text + "\n" + whole.note.signatures[0].line() * 3
    with pytest.raises(ProofError, match="found 1: validator-1"):
        verify_receipt(format_receipt(whole.evidence, whole.index, whole.path, twice), ledger.fleet.trust)


def test_receipts_of_different_leaves_are_not_merged(ledger: Ledger) -> None:
    one, *_ = decided(ledger)
    two, *_ = decided(ledger)
    size = ledger.seal()
    with pytest.raises(ProofError, match="different leaves or checkpoints"):
        merge_receipts([ledger.receipt("verdict", t.task, size) for t in (one, two)])


def test_wrong_registrar_is_refused(ledger: Ledger) -> None:
    task, *_ = decided(ledger)
    text = ledger.receipt("verdict", task.task, ledger.seal())
    trust = dataclasses.replace(ledger.fleet.trust, registrar=Signer.generate().public_key)
    with pytest.raises(ProofError, match=r"step 5 \(statements\): bad signature"):
        verify_receipt(text, trust)


def test_swapped_leaf_is_refused(ledger: Ledger) -> None:
    one, *_ = decided(ledger)
    two, *_ = decided(ledger)
    size = ledger.seal()
    first, second = (parse_receipt(ledger.receipt("verdict", t.task, size)) for t in (one, two))
    text = format_receipt(second.evidence, first.index, first.path, first.note.format())
    with pytest.raises(ProofError, match=r"step 3 \(inclusion\)"):
        verify_receipt(text, ledger.fleet.trust)


def changed(ledger: Ledger, receipt: str, **changes: object) -> str:
    whole = parse_receipt(receipt)
    return format_receipt(
        dataclasses.replace(whole.evidence, **changes), whole.index, whole.path, whole.note.format()
    )  # fmt: skip


def test_evidence_left_out_added_or_exchanged_is_refused(ledger: Ledger) -> None:
    request, _ = answered(ledger)
    other, *_ = decided(ledger)
    size = ledger.seal()
    text, trust = ledger.receipt("answer", request, size), ledger.fleet.trust
    evidence = parse_receipt(text).evidence
    foreign = parse_receipt(ledger.receipt("verdict", other.task, size)).evidence
    extra_member = ledger.fleet.state.statements["agent-5"]
    for step, changes in {
        "4": {"supports": ()},
        "5": {"releases": ()},
        "6": {"members": evidence.members[1:]},
        "6 ": {"members": (*evidence.members, extra_member)},
        "7": {"openings": evidence.openings[1:]},
        "7 ": {"openings": foreign.openings},
        "7  ": {"openings": evidence.openings[::-1]},
        "8": {"models": ()},
        "8 ": {"models": evidence.models * 2},
    }.items():
        with pytest.raises(ProofError, match=f"step {step.strip()} "):
            verify_receipt(changed(ledger, text, **changes), trust)
    with pytest.raises(ProofError, match="step 4"):
        verify_receipt(changed(ledger, ledger.receipt("verdict", other.task, size), supports=evidence.supports), trust)


def test_without_openings_it_says_what_was_not_recomputed(ledger: Ledger) -> None:
    request, _ = answered(ledger)
    text = ledger.receipt("answer", request, ledger.seal())
    audited = verify_receipt(changed(ledger, text, openings=()), ledger.fleet.trust)
    assert audited.result is None and audited.verdicts[0].value is None
    assert any("carries no openings" in line for line in audited.relied_on)
    assert not any("combination" in line for line in audited.recomputed)


def forged(ledger: Ledger, leaf: bytes, text: str) -> str:
    """A receipt of another leaf, in a tree of one that all validators cosigned: colluders could do that."""
    evidence = dataclasses.replace(parse_receipt(text).evidence, leaf=leaf)
    return format_receipt(evidence, 0, [], ledger.note(1, leaf_hash(leaf), ledger.fleet.validators))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"stances": "aaa"}, "step 7 .*stances are 'ada', the verdict states 'aaa'"),
        ({"accepted": 1}, "step 7 .*accepts its referee's value"),
        ({"accepted": 7}, "step 7"),
        ({"outcome": "undecided"}, "step 7 .*undecided and yet accepts"),
        ({"policy": "unheard-of"}, "step 7 .*unheard-of"),
        ({"input_root": bytes(32)}, "step 6 .*input_root"),
        ({"task": bytes(16)}, "step 6 .*task is"),
        ({"rows": 1}, "step 6 .*rows"),
        ({"assigned": ("agent-1", "agent-3")}, "step 6 .*agent-2 was not assigned"),
        ({"openings": ()}, "step 7"),
    ],
)
def test_false_verdict_is_caught_even_if_every_validator_colludes(
    ledger: Ledger, changes: dict[str, object], words: str
) -> None:
    task, *_ = decided(ledger, wrong=("agent-2",))
    text = ledger.receipt("verdict", task.task, ledger.seal())
    entry = parse_entry(parse_receipt(text).evidence.leaf)
    assert isinstance(entry, Verdict)
    verify_receipt(forged(ledger, entry.to_bytes(), text), ledger.fleet.trust)
    with pytest.raises(ProofError, match=words):
        verify_receipt(forged(ledger, dataclasses.replace(entry, **changes).to_bytes(), text), ledger.fleet.trust)


def test_receipt_of_a_rejected_entry_says_so(ledger: Ledger) -> None:
    task, *_ = decided(ledger)
    text = ledger.receipt("verdict", task.task, ledger.seal())
    fleet = ledger.fleet
    common = {**fleet.common("coordinator", 9), "time_ms": fleet.now_ms}
    leaf = Rejected(**common, digest=bytes(32), reason="false").to_bytes()
    with pytest.raises(ProofError, match=r"step 1 .*an entry by coordinator was rejected: false"):
        verify_receipt(forged(ledger, leaf, text), fleet.trust)
    with pytest.raises(ProofError, match=r"step 1 .*found Tick"):
        fleet.tick("validator-1")
        verify_receipt(forged(ledger, fleet.leaves[-1], text), fleet.trust)


def test_garbage_is_refused_without_a_crash(ledger: Ledger) -> None:
    for data in (b"", b"\x00" * 100, b"c2sp.org/tlog-proof@v1\n", "ü" * 9, b"\xff\xfe", b"x" * (2 << 20)):
        with pytest.raises(ProofError, match="step 1"):
            verify_receipt(data, ledger.fleet.trust)


def test_two_experts_weighted_answer_is_recomputed(ledger: Ledger) -> None:
    fleet = ledger.fleet
    second = bytes(31) + b"\x02"
    fleet.enter("registrar", fleet.release(second, "toy-2"), fleet.model((TOY, second), version=2, top_k=2))
    parts = []
    for expert, shift in ((TOY, 0.0), (second, 2.0)):
        task = fleet.open_task(1, expert=expert)
        outputs = [fleet.output(a, task, toy(task.x) + shift, expert=expert) for a in fleet.agents[:3]]
        fleet.decide(task, outputs, expert=expert)
        ledger.attach += [o.opening for o in outputs]
        parts.append((task, outputs[0]))
    (kind, fields), opening, result = fleet.answer(parts, top_k=2)
    assert fleet.enter("coordinator", (kind, fields), attachments=[opening, *[s.opening for _, s in parts]]).events[0]
    ledger.attach.append(opening)
    audited = verify_receipt(ledger.receipt("answer", fields["request"], ledger.seal()), fleet.trust)
    assert audited.result == (tensor_of("y", result),)
    assert np.allclose(result, toy(parts[0][0].x) + 1, atol=1e-6)


def test_trust_file_round_trips_and_refuses_what_it_cannot_mean(ledger: Ledger) -> None:
    trust = ledger.fleet.trust
    text = format_trust(trust)
    assert parse_trust(text) == trust
    assert parse_anchor(text).ledger == trust.ledger
    values = json.loads(text)
    anchor = {name: values[name] for name in ("ledger", "epoch", "origin", "registrar")}
    assert parse_anchor(json.dumps(anchor)) == parse_anchor(text)
    for changes in (
        {"quorum": 2},
        {"quorum": 4},
        {"quorum": True},
        {"ledger": "00"},
        {"ledger": values["ledger"].upper() if values["ledger"].upper() != values["ledger"] else "zz"},
        {"registrar": "00" * 32},
        {"validators": [values["validators"][0]] * 3},
        {"validators": []},
        {"origin": "two words"},
        {"surplus": 1},
    ):
        with pytest.raises(ConfigError):
            parse_trust(json.dumps({**values, **changes}))
    for data in ("", "[]", "[" * 100_000, '{"quorum": 1, "quorum": 2}', b"\xff"):
        with pytest.raises(ConfigError):
            parse_trust(data)


def test_verification_is_quick(ledger: Ledger) -> None:
    request, _ = answered(ledger)
    text = ledger.receipt("answer", request, ledger.seal())
    begun = time.perf_counter()
    verify_receipt(text, ledger.fleet.trust)
    assert time.perf_counter() - begun < 1


def test_note_of_a_receipt_reads_as_a_c2sp_note(ledger: Ledger) -> None:
    task, *_ = decided(ledger)
    whole = parse_receipt(ledger.receipt("verdict", task.task, ledger.seal()))
    assert parse_note(whole.note.format()) == whole.note
    assert isinstance(ledger.fleet.trust, Trust) and isinstance(whole.evidence, Evidence)
