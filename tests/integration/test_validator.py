"""Validator processes on a real ledger engine: they cosign truth, turn lies into rejected leaves, and refute liars."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
from pathlib import Path

import pytest
from certs import Authority, issue, make_authority
from ledger_fixtures import digest_of, tensor_of, toy
from validator_site import PATIENCE, VALIDATORS, ended, launch, retried, running, site

from bmoe.ledger.complaints import Complaints
from bmoe.ledger.replica import Settings, Validator
from bmoe.ledger.rules.checkpoint import parse_checkpoint, parse_note, verify_cosignature
from bmoe.ledger.rules.entries import Rejected, parse_entry
from bmoe.ledger.rules.merkle import merkle_root
from bmoe.ledger.rules.receipt import verify_receipt
from bmoe.ledger.rules.standing import Standing
from bmoe.ledger.rules.trust import Anchor
from bmoe.ledger.spotcheck import Rates
from bmoe.ledger.stream import LedgerStream
from bmoe.protocol.errors import UnavailableError, UnknownError
from bmoe.protocol.messages import Complaint, seal_message


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    made = make_authority(tmp_path_factory.mktemp("pki"))
    issue(made, "gateway", server=True)
    for name in ("bmoe-admin", "coordinator", "registrar", *VALIDATORS):
        issue(made, name)
    return made


async def test_validators_cosign_one_root_and_their_receipts_merge_across_a_kill(
    tmp_path: Path, authority: Authority
) -> None:
    async with site(tmp_path / "state", authority, *VALIDATORS) as made:
        live = await made.writers["coordinator"].client.subscribe("ledger.checkpoint.>")
        task, outputs = await made.decide({})
        (kind, fields), opening, result = made.fleet.answer([(task, outputs[0])])
        made.fleet.enter("coordinator", (kind, fields), attachments=[opening, outputs[0].opening])
        await made.flush()
        audited = verify_receipt(
            await retried(lambda: made.whole_receipt(request=fields["request"].hex())), made.fleet.trust
        )
        assert audited.result == (tensor_of("y", result),)
        assert [name for name, _ in audited.cosigned] == list(VALIDATORS)
        await made.sees(lambda state: state.size >= audited.size)
        assert audited.root == merkle_root(made.leaves[: audited.size])
        note = parse_note((await live.next_msg(timeout=PATIENCE)).data)
        key = next(k for k in made.fleet.trust.validators if k.name == note.signatures[0].name)
        assert verify_cosignature(note, key) > 0
        with pytest.raises(UnknownError, match=r"no verdict for 0{32} stands on this ledger"):
            await made.ask(VALIDATORS[0], task=bytes(16).hex(), wait_ms=50)
        with pytest.raises(UnavailableError, match=r"no verdict for .* stands among the first 1 leaves"):
            await made.ask(VALIDATORS[0], task=task.task.hex(), size=1)
        with pytest.raises(UnavailableError, match="asked for with"):
            await made.ask(VALIDATORS[0], tusk=task.task.hex())

        os.kill(made.supervisor.pids()[VALIDATORS[0]], signal.SIGKILL)
        later, _ = await made.decide({})
        await made.sees(lambda state: later.task in state.closed)
        text = await retried(lambda: made.whole_receipt(task=later.task.hex()))
        again = verify_receipt(text, made.fleet.trust)
        assert again.size > audited.size
        await made.sees(lambda state: state.size >= again.size)
        assert again.root == merkle_root(made.leaves[: again.size])


async def test_false_verdict_becomes_a_rejected_leaf_and_liars_are_refuted(
    tmp_path: Path, authority: Authority
) -> None:
    async with site(tmp_path / "state", authority, *VALIDATORS) as made:
        # A referee contradicts agent-2; both validators execute it again and confirm: quarantine.
        await made.decide({"agent-2": 1.0}, referee=True)
        state = await made.sees(lambda s: s.agents["agent-2"].standing is Standing.QUARANTINED)
        assert state.agents["agent-1"].standing is Standing.PROBATION
        # All three collude under `quorum`: nobody dissents, and the validators' own draws find it.
        task, _ = await made.decide(dict.fromkeys(made.fleet.agents[:3], 0.5))
        state = await made.sees(
            lambda s: all(r.standing is not Standing.PROBATION for r in list(s.agents.values())[:3])
        )
        assert state.agents["agent-2"].standing is Standing.REVOKED
        assert state.claims[(task.task, "agent-1")] == set(VALIDATORS)
        assert f"/v1/evidence/{task.task.hex()}" in made.kept.asked
        # The coordinator claims stances that the outputs do not have: a rejected leaf, and it is fenced.
        lie, _ = await made.decide({"agent-1": 1.0}, stances="aaa", accepted=1)
        state = await made.sees(lambda s: bool(s.authors["coordinator"].fenced))
        assert "the entry claims 1 with 'aaa'" in state.authors["coordinator"].fenced
        assert lie.task in state.open and lie.task not in state.closed
        where = next(i for i, leaf in enumerate(made.leaves) if isinstance(parse_entry(leaf), Rejected))
        with pytest.raises(UnknownError, match=r"no verdict for .* stands on this ledger"):
            await made.ask(VALIDATORS[0], task=lie.task.hex(), wait_ms=100)
        text = await retried(lambda: made.whole_receipt(task=task.task.hex()), beyond=where)
        audited = verify_receipt(text, made.fleet.trust)
        assert audited.root == merkle_root(made.leaves[: audited.size])

        # A validator that comes back later verifies the lie again, and lands on the same leaves.
        os.kill(made.supervisor.pids()[VALIDATORS[1]], signal.SIGKILL)
        found = await retried(lambda: made.ask(VALIDATORS[1], task=task.task.hex(), size=audited.size))
        assert parse_checkpoint(parse_note(found.partition("\n\n")[2]).text).root == audited.root


async def test_changed_position_halts_a_validator_with_evidence(tmp_path: Path, authority: Authority) -> None:
    async with site(tmp_path / "state", authority) as made:
        one = VALIDATORS[0]
        task, _ = await made.decide({})
        async with running(made, one):
            await retried(lambda: made.ask(one, task=task.task.hex()))
        with sqlite3.connect(made.folder / one / "replica.db") as db:
            db.execute("UPDATE frames SET digest = ? WHERE position = 3", (bytes(32),))
        db.close()
        code, told = await ended(await launch(made, one))
        assert code == 3
        assert f"validator halted: ledger position 3 changed: it held a message of SHA-256 {'00' * 32}" in told
        with sqlite3.connect(made.folder / one / "replica.db") as db:
            frame = made.fleet.messages[2]
            db.execute("UPDATE frames SET digest = ? WHERE position = 3", (digest_of(frame),))
            db.execute("INSERT INTO frames VALUES (99, ?, 0, 0, 0)", (bytes(32),))
        db.close()
        code, told = await ended(await launch(made, one))
        assert code == 3 and "is missing: the replica holds 99 positions, the engine only" in told


async def test_complaint_of_a_dropped_agent_brings_the_verdict_down(tmp_path: Path, authority: Authority) -> None:
    """Two liars outvote in a verdict that leaves the honest third out; the gateway withholds its evidence as well."""
    async with site(tmp_path / "state", authority) as made:
        fleet, one = made.fleet, VALIDATORS[0]
        task = fleet.open_task()
        liars = [fleet.output(a, task, toy(task.x) + 1) for a in fleet.agents[:2]]
        honest = fleet.output("agent-3", task)
        fleet.decide(task, liars)
        await made.flush()
        parts = [fleet.task_message(task, "agent-3"), honest.message]
        header = Complaint(**fleet.common("agent-3", 7), task=task.task, reason="missing")
        complaint = seal_message(fleet.signers["agent-3"], header, parts)
        anchor = Anchor(fleet.ledger, fleet.epoch, fleet.origin, fleet.registrar.public_key)
        stream = await LedgerStream.connect(made.access(one), one)
        gateway = f"https://127.0.0.1:{made.kept.port}"
        settings = Settings(
            one, made.folder / one, anchor, fleet.signers[one], made.access(one), gateway, None, Rates(0, 0)
        )
        validator, ready = Validator(settings, stream), asyncio.Event()
        running = asyncio.create_task(validator.run(ready))
        await asyncio.wait_for(ready.wait(), PATIENCE)
        assert validator.checks is not None
        complaints = Complaints(validator.state, validator.author, validator.checks)
        worker = asyncio.create_task(complaints.work_for_ever(validator.follower.changed))
        for topic in ("bmoe/v1/agent-1/complaint", *["bmoe/v1/agent-3/complaint"] * 9, "bmoe/v1/stranger/complaint"):
            complaints.on_message(topic, complaint)
        complaints.on_message("bmoe/v1/agent-3/complaint", b"garbage")
        state = await made.sees(lambda s: s.claims.get((task.task, "agent-1")) == {one})
        assert state.complaints == {(task.task, "agent-3")}
        assert state.claims[(task.task, "agent-2")] == {one}
        assert state.agents["agent-1"].standing is Standing.PROBATION, "one validator of two is no quorum"
        assert f"/v1/evidence/{task.task.hex()}" not in made.kept.asked
        for background in (worker, running):
            background.cancel()
        await asyncio.gather(worker, running, return_exceptions=True)
        await stream.close()
