"""The entries that a ledger begins with: its genesis, and the membership of the gateway's own coordinator and validators."""

from __future__ import annotations

from typing import Any

from bmoe.ledger.rules.entries import Entry, Genesis, MemberEntry
from bmoe.ledger.rules.membership import RULES_VERSION, quorum_of
from bmoe.ledger.rules.state import State
from coordinator.identity.directory import Known
from coordinator.identity.enrol import LedgerPort, certify
from coordinator.identity.infrastructure import Identity
from coordinator.state_layout import LedgerId

OWNER = "operator"


def missing_entries(
    founded: LedgerId, state: State, identity: Identity, ledger: LedgerPort, now_ms: int
) -> list[tuple[type[Entry], dict[str, Any]]]:
    """What the ledger lacks of genesis and members; the same code founds it and repairs a half-founded one."""
    entries: list[tuple[type[Entry], dict[str, Any]]] = []
    if not state.origin:
        fields = {
            "origin": founded.origin,
            "registrar": founded.registrar,
            "validators": tuple(founded.validators.items()),
            "quorum": quorum_of(len(founded.validators)),
            "rules": RULES_VERSION,
        }
        entries.append((Genesis, fields))
    for name, public_key in founded.authors.items():
        role = "validator" if name in founded.validators else "coordinator"
        wanted = Known(name, role, OWNER, public_key, identity.spki(name))
        found = state.members.get(name)
        if found is None or (found.public_key, found.spki) != (public_key, wanted.spki):
            entries.append((MemberEntry, {"statement": certify(identity.registrar, ledger, wanted, "", now_ms)}))
    return entries
