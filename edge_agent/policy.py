"""Which releases this board takes: those that the ledger has, final, by a receipt checked here and offline.

The ledger's policy is what enrolment told: the validators that the registrar certified, and the quorum they imply.
"""

from __future__ import annotations

from collections.abc import Callable

from bmoe.ledger.rules.quorum import quorum_of
from bmoe.ledger.rules.receipt_release import verify_release
from bmoe.ledger.rules.tlog_proof import MAX_PROOF_BYTES
from bmoe.ledger.rules.trust import Trust, validator_key
from bmoe.protocol.errors import ConfigError, RefusedError
from bmoe.protocol.messages import Release
from edge_agent.fleet import FleetClient
from edge_agent.identity import Identity

RECEIPTS = "/v1/repository/receipts/releases/"
Check = Callable[[Release], None]


def ledger_policy(identity: Identity) -> Trust:
    """The ledger's trust policy, as enrolment told it; raises ConfigError where that named no validators."""
    found = sorted((m.member, m.public_key) for m in identity.members if m.role == "validator")
    if not found:
        raise ConfigError("enrolment named no validators: join again with --force")
    validators = tuple(validator_key(name, key) for name, key in found)
    origin = f"bmoe.ledger/{identity.ledger.hex()[:16]}/{identity.epoch}"
    return Trust(identity.ledger, identity.epoch, origin, identity.registrar, validators, quorum_of(len(found)))


def release_check(identity: Identity, fleet: FleetClient, assurance: str) -> Check:
    """What an expert's release must pass before its file is fetched; with "committed" the registrar's signature does."""
    if assurance == "committed":
        return lambda release: None

    def check(release: Release) -> None:
        """Raises UnavailableError while the entry is not final, ProofError or RefusedError for a receipt that is wrong."""
        receipt = fleet.get(RECEIPTS + release.digest.hex(), MAX_PROOF_BYTES)
        entered = verify_release(receipt, ledger_policy(identity)).statement
        if (entered.digest, entered.inputs, entered.outputs) != (release.digest, release.inputs, release.outputs):
            raise RefusedError(f"the ledger's release of {release.digest.hex()[:12]} is another than the one served")

    return check
