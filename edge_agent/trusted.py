"""What an updater takes on trust: the ledger's policy, as enrolment told it, and the repository's first root, pinned once."""

from __future__ import annotations

import json
from pathlib import Path

from bmoe.ledger.rules.membership import quorum_of
from bmoe.ledger.rules.trust import Trust, validator_key
from bmoe.protocol.errors import ConfigError
from bmoe.protocol.files import write_durably
from bmoe.protocol.tls import mutual_tls
from bmoe.storage.update_ledger import Word
from bmoe.storage.updater import ROOT_BYTES, Trusted
from edge_agent.fleet import FleetClient
from edge_agent.identity import Identity, load_identity
from edge_agent.wanted import FOLDER

ROOT = "/v1/repository/metadata/1.root.json"


def trusted(state: Path) -> Trusted:
    """For the device enrolled under `state`. The first root is fetched once, over the TLS that enrolment pinned, and kept.

    Raises ConfigError for a device that has not joined, and what the fleet's server may answer with at that first time.
    """
    identity = load_identity(state)
    kept = state / FOLDER / "root.json"
    try:
        root = kept.read_bytes()
    except FileNotFoundError:
        root = fleet_client(identity).get(ROOT, ROOT_BYTES)
        write_durably(kept, root, mode=0o600)
    limits = json.loads((state / FOLDER / "limits.json").read_bytes())
    return Trusted(root, Word(ledger_policy(identity)), int(limits["file_bytes"]), int(limits["memory_mb"]))


def ledger_policy(identity: Identity) -> Trust:
    """The ledger's trust policy: its validators, as the registrar certified them, and how many must agree."""
    found = sorted((m.member, m.public_key) for m in identity.members if m.role == "validator")
    if not found:
        raise ConfigError("enrolment named no validators: join again with --force")
    validators = tuple(validator_key(name, key) for name, key in found)
    origin = f"bmoe.ledger/{identity.ledger.hex()[:16]}/{identity.epoch}"
    return Trust(identity.ledger, identity.epoch, origin, identity.registrar, validators, quorum_of(len(found)))


def fleet_client(identity: Identity) -> FleetClient:
    """The gateway's HTTPS, with this device's certificate."""
    return FleetClient(identity.url, lambda: mutual_tls(identity.ca, identity.certificate, identity.key))
