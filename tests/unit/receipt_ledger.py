"""A ledger in a validator's store, to make receipts from: what the tests of receipts and of the auditor share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from ledger_fixtures import Fleet, Signed, digest_of, toy

from bmoe.ledger.receipts import make_receipt
from bmoe.ledger.rules.checkpoint import Checkpoint, cosign
from bmoe.ledger.rules.entries import BY_REFEREE, parse_entry
from bmoe.ledger.rules.fold import Applied
from bmoe.ledger.store import Store

SIGNED_S = 1_800_000_000


class Ledger:
    """A fleet's stream in a validator's store, with a checkpoint cosigned by every validator."""

    def __init__(self, folder: Path, validators: int = 3) -> None:
        self.fleet = Fleet(validator_count=validators)
        self.store = Store(folder / "replica.db", self.fleet.ledger, self.fleet.epoch)
        self.fleet.found()
        self.openings: dict[bytes, bytes] = {}
        self.attach: list[bytes] = []

    def seal(self) -> int:
        """Put all leaves into the store and sign their root; the size."""
        size = len(self.fleet.leaves)
        openings = {digest_of(o): o for o in self.attach}
        position = self.store.next_position
        leaves = tuple(self.fleet.leaves[self.store.size :])
        applied = Applied(leaves, tuple(map(parse_entry, leaves)), ())
        self.store.append(position, b"all of it", applied, [size], openings)
        ((_, root),) = self.store.commit()
        self.store.keep_notes([(size, self.note(size, root, self.fleet.validators))])
        return size

    def note(self, size: int, root: bytes, validators: list[str], origin: str | None = None) -> str:
        body = Checkpoint(origin or self.fleet.origin, size, root).body()
        keys = {name: self.fleet.signers[name].private_key for name in validators}
        return body + "\n" + "".join(cosign(body, name, key, SIGNED_S) for name, key in keys.items())

    def receipt(self, kind: str, name: bytes, size: int) -> str:
        return make_receipt(self.store, self.fleet.state, kind, name, size)


def decided(ledger: Ledger, wrong: tuple[str, ...] = (), rows: int = 2) -> tuple[Signed, ...]:
    """Three agents answer a task, the wrong ones wrongly; the coordinator referees when one is wrong."""
    fleet = ledger.fleet
    task = fleet.open_task(rows)
    outputs = [fleet.output(a, task, toy(task.x) + 1 if a in wrong else None) for a in fleet.agents[:3]]
    options = {"referee": fleet.output("coordinator", task), "accepted": BY_REFEREE} if wrong else {}
    policy = "referee" if wrong else "quorum"
    applied = fleet.decide(task, outputs, policy=policy, **options)
    assert applied.events[0].kind == "verdict"
    ledger.attach += [o.opening for o in (*outputs, *([options["referee"]] if wrong else []))]
    return task, *outputs


def answered(ledger: Ledger) -> tuple[bytes, np.ndarray]:
    """A request answered from one verdict; request id and result."""
    task, first, *_ = decided(ledger)
    (kind, fields), opening, result = ledger.fleet.answer([(task, first)])
    applied = ledger.fleet.enter("coordinator", (kind, fields), attachments=[opening, first.opening])
    assert [e.kind for e in applied.events] == ["answer"]
    ledger.attach.append(opening)
    return fields["request"], result
