"""Policies: how many replicas a task gets and when its outputs decide it. Replaceable by name, each a small file."""

from __future__ import annotations

from bmoe.ledger.rules.policies import diagnosis, full, quorum, referee, single
from bmoe.ledger.rules.policies.ballot import Ballot, Decision, Need, Policy, Vote, accept
from bmoe.protocol.errors import MessageError

POLICIES: dict[str, Policy] = {
    policy.name: policy for policy in (referee.POLICY, quorum.POLICY, full.POLICY, single.POLICY, diagnosis.POLICY)
}
DEFAULT = referee.POLICY.name
# Diagnosis is the coordinator's own; no client may ask for it.
FOR_CLIENTS = tuple(name for name in POLICIES if name != diagnosis.POLICY.name)


def verifies(name: str) -> bool:
    """Whether verdicts of this policy claim that anything was verified; one that is not known claims nothing here."""
    return name in POLICIES and POLICIES[name].verifies


def policy_named(name: str, version: int | None = None) -> Policy:
    """The policy of that name (and version, when one is given); raises MessageError listing what there is."""
    policy = POLICIES.get(name)
    if policy is None:
        raise MessageError(f"policy {name!a} is not one of {', '.join(FOR_CLIENTS)}")
    if version is not None and version != policy.version:
        raise MessageError(f"policy {name!a} has version {policy.version} here, the verdict names {version}")
    return policy


__all__ = [
    "DEFAULT",
    "FOR_CLIENTS",
    "POLICIES",
    "Ballot",
    "Decision",
    "Need",
    "Policy",
    "Vote",
    "accept",
    "policy_named",
    "verifies",
]
