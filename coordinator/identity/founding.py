"""What a ledger is founded on: its id, its registrar and validators, in `state`/trust.json; and the entries that say so."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bmoe.ledger.rules.entries import Entry, Genesis, MemberEntry
from bmoe.ledger.rules.membership import RULES_VERSION, quorum_of
from bmoe.ledger.rules.state import State
from bmoe.protocol.errors import ConfigError
from bmoe.protocol.files import write_durably
from bmoe.protocol.keys import Signer, check_public_key
from bmoe.protocol.schema import is_name
from coordinator.identity.directory import Known
from coordinator.identity.enrol import LedgerPort, certify
from coordinator.identity.infrastructure import Identity

FILE = "trust.json"
OWNER = "operator"


@dataclass(frozen=True)
class Trust:
    """Whom everyone believes: the auditor's anchor. Keys are Ed25519 public keys by name."""

    ledger: bytes
    epoch: int
    origin: str
    registrar: bytes
    validators: dict[str, bytes]
    quorum: int

    def new_state(self) -> State:
        """The state before the first entry."""
        return State(self.ledger, self.epoch, self.registrar)


def found(state: Path, registrar: bytes, validators: Mapping[str, bytes], origin: str = "") -> Trust:
    """The trust file's content, made durably when there is none; raises ConfigError where it names other keys."""
    path = state / FILE
    if not path.exists():
        if not validators:
            raise ConfigError(f"{path} is missing and no validator is known to found a ledger with")
        ledger = os.urandom(16)
        fields = {
            "ledger": ledger.hex(),
            "epoch": 0,
            "origin": origin or f"bmoe.ledger/{ledger.hex()[:16]}/0",
            "registrar": registrar.hex(),
            "validators": {name: key.hex() for name, key in validators.items()},
            "quorum": quorum_of(len(validators)),
        }
        write_durably(path, json.dumps(fields, indent=1).encode() + b"\n")
    trust = read_trust(path)
    if trust.registrar != registrar:
        raise ConfigError(
            f"{path} names another registrar key than identity/registrar.key: restore both from one backup"
        )
    return trust


def read_trust(path: Path) -> Trust:
    """The trust file; raises ConfigError naming what is wrong with it."""
    try:
        data = json.loads(path.read_bytes())
        validators = {name: check_public_key(bytes.fromhex(key)) for name, key in data["validators"].items()}
        trust = Trust(
            ledger=bytes.fromhex(data["ledger"]),
            epoch=int(data["epoch"]),
            origin=str(data["origin"]),
            registrar=check_public_key(bytes.fromhex(data["registrar"])),
            validators=validators,
            quorum=int(data["quorum"]),
        )
    except Exception as error:
        raise ConfigError(f"{path} cannot be used: {error or type(error).__name__}: restore it") from error
    if len(trust.ledger) != 16 or not all(map(is_name, validators)) or trust.quorum != quorum_of(len(validators)):
        raise ConfigError(f"{path} cannot be used: a ledger id of 16 bytes, names and the quorum of {len(validators)}")
    return trust


def missing_entries(
    trust: Trust, state: State, identity: Identity, coordinators: Mapping[str, bytes], ledger: LedgerPort
) -> list[tuple[type[Entry], dict[str, Any]]]:
    """The founding entries that the ledger lacks: genesis, and the membership of each coordinator and validator."""
    entries: list[tuple[type[Entry], dict[str, Any]]] = []
    if not state.origin:
        fields = {
            "origin": trust.origin,
            "registrar": trust.registrar,
            "validators": tuple(trust.validators.items()),
            "quorum": trust.quorum,
            "rules": RULES_VERSION,
        }
        entries.append((Genesis, fields))
    now_ms = time.time_ns() // 1_000_000
    for role, keys in (("coordinator", coordinators), ("validator", trust.validators)):
        for name, public_key in keys.items():
            wanted = Known(name, role, OWNER, public_key, identity.spki(name))
            found = state.members.get(name)
            if found is None or (found.public_key, found.spki) != (public_key, wanted.spki):
                statement = certify(identity.registrar, ledger, wanted, "", now_ms)
                entries.append((MemberEntry, {"statement": statement}))
    return entries


def own_keys(state: Path) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """Public signing keys of the coordinator and of this machine's validators (folders validator-N), made if missing."""
    coordinators = {"coordinator": Signer.load_or_create(state / "coordinator" / "coordinator.key").public_key}
    folders = sorted(path for path in state.glob("validator-*") if path.is_dir())
    validators = {f.name: Signer.load_or_create(f / "validator.key").public_key for f in folders}
    return coordinators, validators
