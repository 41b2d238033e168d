"""The entries that a ledger begins with: its genesis, and the membership of the gateway's own coordinator and validators."""

from __future__ import annotations

from typing import Any

from bmoe.ledger.rules.entries import Entry, Genesis, MemberEntry
from bmoe.ledger.rules.membership import RULES_VERSION
from bmoe.ledger.rules.quorum import quorum_of
from bmoe.ledger.rules.state import State
from bmoe.ledger.rules.trust import Trust
from coordinator.identity.directory import Known
from coordinator.identity.enrol import LedgerPort, certify
from coordinator.identity.infrastructure import Identity

OWNER = "operator"
COORDINATOR = "coordinator"


def missing_entries(
    trust: Trust, coordinator: bytes, state: State, identity: Identity, ledger: LedgerPort, now_ms: int
) -> list[tuple[type[Entry], dict[str, Any]]]:
    """What the ledger lacks of genesis and members, `coordinator` being our coordinator's public key.

    The same code founds a ledger and repairs a half-founded one.
    """
    validators = {key.name: key.public_key for key in trust.validators}
    entries: list[tuple[type[Entry], dict[str, Any]]] = []
    if not state.origin:
        fields = {
            "origin": trust.origin,
            "registrar": trust.registrar,
            "validators": tuple(validators.items()),
            "quorum": quorum_of(len(validators)),
            "rules": RULES_VERSION,
        }
        entries.append((Genesis, fields))
    for name, public_key in {COORDINATOR: coordinator, **validators}.items():
        role = "coordinator" if name == COORDINATOR else "validator"
        wanted = Known(name, role, OWNER, public_key, identity.spki(name))
        found = state.members.get(name)
        if found is None or (found.public_key, found.spki) != (public_key, wanted.spki):
            entries.append((MemberEntry, {"statement": certify(identity.registrar, ledger, wanted, "", now_ms)}))
    return entries
