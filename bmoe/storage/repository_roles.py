"""The roles of a repository in memory: who signs what, and the changes that give a role other keys or an owner a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tuf.api.metadata import DelegatedRole, Key, Metadata, Root, Snapshot, Targets, Timestamp

from bmoe.protocol.errors import RefusedError, UnknownError
from bmoe.storage.targets import owned_paths, owner_role

TOP = ("root", "targets", "snapshot", "timestamp")
# Signed at every change, so always by keys that are here.
ONLINE = ("snapshot", "timestamp")


@dataclass
class Roles:
    """All current metadata, and which of it a change has touched. `extra` are keys that sign besides a role's own;
    `read` the files as they were read, by path."""

    root: Metadata[Root]
    timestamp: Metadata[Timestamp]
    snapshot: Metadata[Snapshot]
    targets: Metadata[Targets]
    owners: dict[str, Metadata[Targets]]
    changed: set[str] = field(default_factory=set)
    extra: dict[str, list[str]] = field(default_factory=dict)
    read: dict[str, bytes] = field(default_factory=dict)

    def named(self, role: str) -> Metadata[Any]:
        """The metadata of a role; raises UnknownError for one that there is not."""
        found = getattr(self, role) if role in TOP else self.owners.get(role)
        if found is None:
            raise UnknownError(f"the repository has no role {role}; it has {', '.join((*TOP, *self.owners))}")
        return found

    def trusts(self, role: str) -> Any:
        """Keys and threshold of a role, as whoever delegates to it says."""
        if role in TOP:
            return self.root.signed.roles[role]
        assert self.targets.signed.delegations is not None and self.targets.signed.delegations.roles is not None
        return self.targets.signed.delegations.roles[role]

    def delegator(self, role: str) -> Root | Targets:
        """Who says whose signatures count for a role."""
        return self.root.signed if role in TOP else self.targets.signed


def delegation(roles: Roles, owner: str, model: str, key: Callable[[], Key]) -> str:
    """The role of an owner, for whom this model is delegated from now on; raises RefusedError for another owner's model."""
    role, pattern = owner_role(owner), owned_paths(model)
    delegations = roles.targets.signed.delegations
    assert delegations is not None and delegations.roles is not None
    for name, other in delegations.roles.items():
        if name != role and pattern in (other.paths or ()):
            raise RefusedError(f"model {model} belongs to {name.removeprefix('owner-')}, not to {owner}")
    if role not in delegations.roles:
        delegations.roles[role] = DelegatedRole(role, [], 1, True, paths=[])
        roles.targets.signed.add_key(key(), role)
        roles.owners[role] = Metadata(Targets())
        roles.owners[role].signed.version = 0
        roles.changed.add("targets")
    paths = delegations.roles[role].paths
    assert paths is not None
    if pattern not in paths:
        paths.append(pattern)
        roles.changed.add("targets")
    return role


def touch(roles: Roles, role: str, extra: Iterable[str] = ()) -> None:
    """Have a role signed anew, by `extra` keys too."""
    roles.changed.add(role)
    roles.extra[role] = list(extra)


def root_anew(roles: Roles, role: str, keys: Sequence[Key], threshold: int, extra: Iterable[str] = ()) -> None:
    """Have root name other keys for a role; `extra` sign it besides root's own."""
    root = roles.root.signed
    for keyid in list(root.roles[role].keyids):
        root.revoke_key(keyid, role)
    for key in keys:
        root.add_key(key, role)
    root.roles[role].threshold = threshold
    touch(roles, "root", extra)


def delegate_anew(roles: Roles, role: str, keys: Sequence[Key], threshold: int) -> None:
    """Have targets name other keys for an owner's role."""
    targets = roles.targets.signed
    delegated = roles.trusts(role)
    for keyid in list(delegated.keyids):
        targets.revoke_key(keyid, role)
    for key in keys:
        targets.add_key(key, role)
    delegated.threshold = threshold
    roles.changed |= {"targets", role}
