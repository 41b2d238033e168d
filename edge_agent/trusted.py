"""What an updater takes on trust: the ledger's policy, as enrolment told it, and the repository's first root, pinned once."""

from __future__ import annotations

import json
from pathlib import Path

from bmoe.protocol.errors import ConfigError
from bmoe.protocol.files import write_durably
from bmoe.protocol.tls import mutual_tls
from bmoe.storage.update_ledger import Word
from bmoe.storage.updater import ROOT_BYTES, Trusted
from edge_agent.fleet import FleetClient
from edge_agent.identity import Identity, load_identity
from edge_agent.policy import ledger_policy
from edge_agent.wanted import FOLDER

ROOT = "/v1/repository/metadata/1.root.json"


def trusted(state: Path) -> Trusted:
    """For the device enrolled under `state`. The first root is fetched once, over the TLS that enrolment pinned, and kept.

    Raises ConfigError for a device that has not joined or a damaged file, and what the fleet's server may answer with at
    that first time.
    """
    identity = load_identity(state)
    kept = state / FOLDER / "root.json"
    try:
        root = kept.read_bytes()
    except FileNotFoundError:
        root = fleet_client(identity).get(ROOT, ROOT_BYTES)
        write_durably(kept, root, mode=0o600)
    limits = state / FOLDER / "limits.json"
    try:
        values = json.loads(limits.read_bytes())
        word = Word(ledger_policy(identity), str(values["assurance"]))
        return Trusted(root, word, int(values["file_bytes"]), int(values["memory_mb"]))
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise ConfigError(f"{limits} cannot be read ({error!r}): the agent writes it at the next update") from None


def fleet_client(identity: Identity) -> FleetClient:
    """The gateway's HTTPS, with this device's certificate."""
    return FleetClient(identity.url, lambda: mutual_tls(identity.ca, identity.certificate, identity.key))
