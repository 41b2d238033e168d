"""The signed repository: TUF metadata over the releases of gates and experts, one delegated role an owner.

A change is made in memory, signed, and written so that a reader and a crash find the old state or the new one: blobs,
then each role's next version under a name of its own, then `timestamp.json`, which alone says what counts. What a crash
leaves behind is never referred to, and is written over by the next change.
Source: The Update Framework Specification 1.0.31, sections 4 (formats) and 6 (writing consistent snapshots).
"""

from __future__ import annotations

import datetime as dt
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from tuf.api.exceptions import RepositoryError, UnsignedMetadataError
from tuf.api.metadata import DelegatedRole, Delegations, Key, Metadata, MetaFile, Root, Snapshot, Targets, Timestamp

from bmoe.protocol.errors import ConfigError, RefusedError, UnknownError
from bmoe.storage.blobs import Store, read_whole
from bmoe.storage.repository_keys import KeyFolder
from bmoe.storage.targets import METADATA_BYTES, metadata_path, owned_paths, owner_role

TOP = ("root", "targets", "snapshot", "timestamp")
DAY = 24 * 3600
LIFE_S = {"root": 365 * DAY, "targets": 180 * DAY, "snapshot": 30 * DAY, "timestamp": 7 * DAY}
KEYS_MAX = 16
_KINDS: dict[str, type] = {"root": Root, "targets": Targets, "snapshot": Snapshot, "timestamp": Timestamp}


@dataclass
class Roles:
    """All current metadata, and which of it a change has touched. `extra` are keys that sign besides a role's own."""

    root: Metadata[Root]
    timestamp: Metadata[Timestamp]
    snapshot: Metadata[Snapshot]
    targets: Metadata[Targets]
    owners: dict[str, Metadata[Targets]]
    changed: set[str] = field(default_factory=set)
    extra: dict[str, list[str]] = field(default_factory=dict)

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


class Repository:
    """One repository in a store, and the keys that sign it. One process at a time writes it."""

    def __init__(self, store: Store, keys: KeyFolder, clock: Callable[[], float] = time.time) -> None:
        self.store, self.keys, self._clock = store, keys, clock

    def found(self) -> bool:
        """Make the repository with one key a role, where there is none; whether it was made now."""
        if self.store.size(metadata_path("timestamp")) is not None:
            return False
        # Without a timestamp nobody ever read it, unless it is an old one that lost it.
        if any(self.store.size(metadata_path(name)) is not None for name in ("2.snapshot", "2.root")):
            raise ConfigError(f"the repository's {metadata_path('timestamp')} is missing: restore it")
        root = Root(consistent_snapshot=True)
        delegations = Delegations({}, {})
        roles = Roles(
            Metadata(root), Metadata(Timestamp()), Metadata(Snapshot()), Metadata(Targets(delegations=delegations)), {}
        )
        for role in TOP:
            root.add_key(self.keys.generate(), role)
            roles.named(role).signed.version = 0
        roles.changed = set(TOP)
        self._write(roles)
        return True

    def load(self) -> Roles:
        """The current metadata; raises ConfigError where it is damaged, UnavailableError where it cannot be read."""
        root, version = self._read("root", 1), 2
        while self.store.size(metadata_path(f"{version}.root")) is not None:
            root, version = self._read("root", version), version + 1
        timestamp = self._read("timestamp", None)
        snapshot = self._read("snapshot", timestamp.signed.snapshot_meta.version)
        versions = {name.removesuffix(".json"): meta.version for name, meta in snapshot.signed.meta.items()}
        owners = {name: self._read(name, n) for name, n in versions.items() if name != "targets"}
        return Roles(root, timestamp, snapshot, self._read("targets", versions["targets"]), owners)

    def change(self, edit: Callable[[Roles], None]) -> Roles:
        """Let `edit` change roles and name them in `changed`; sign and write them. Raises as `edit` does, and RefusedError
        for a role whose threshold the keys here do not meet: then nothing counts that was written."""
        roles = self.load()
        edit(roles)
        if roles.changed:
            self._write(roles)
        return roles

    def refresh(self) -> list[str]:
        """Sign anew whatever has less than half of its life left; the roles renewed. Those whose keys are kept elsewhere
        are left to their owners."""
        now, due = self._now(), []
        roles = self.load()
        for role in ("root", "targets", *roles.owners, "snapshot", "timestamp"):
            left = (roles.named(role).signed.expires - now).total_seconds()
            if left < _life(role) / 2 and self.can_sign(roles, role):
                due.append(role)
        if due:
            roles.changed = set(due)
            self._write(roles)
        return due

    def can_sign(self, roles: Roles, role: str) -> bool:
        """Whether enough of a role's keys are here."""
        trusted = roles.trusts(role)
        return sum(self.keys.signer(k) is not None for k in trusted.keyids) >= trusted.threshold

    def rotate(self, role: str, keys: int = 1, threshold: int = 1) -> list[str]:
        """Give a role new keys, of which `threshold` must sign; the ids of the keys replaced, which are removed here."""
        if not 1 <= threshold <= keys <= KEYS_MAX:
            raise RefusedError(
                f"a role has 1..{KEYS_MAX} keys and a threshold of 1..as many, not {threshold} of {keys}"
            )
        before = self.load()
        before.named(role)
        delegator = "root" if role in TOP else "targets"
        if not self.can_sign(before, delegator):
            raise RefusedError(
                f"only {delegator} gives {role} other keys, and too few of its keys are in {self.keys.folder}"
            )
        old, new = list(before.trusts(role).keyids), [self.keys.generate() for _ in range(keys)]
        if role not in TOP:
            self.change(lambda roles: _delegate_anew(roles, role, new, threshold))
        elif role == "root":
            self.change(lambda roles: _root_anew(roles, role, new, threshold, extra=old))
        else:
            # First signed by old and new keys, then the root that names the new ones: whichever of the two a reader
            # has, the role verifies.
            self.change(lambda roles: _touch(roles, role, [key.keyid for key in new]))
            self.change(lambda roles: _root_anew(roles, role, new, threshold))
        for keyid in old:
            self.keys.forget(keyid)
        return old

    def _read(self, role: str, version: int | None) -> Metadata[Any]:
        path = metadata_path(role if version is None else f"{version}.{role}")
        try:
            found: Metadata[Any] = Metadata.from_bytes(read_whole(self.store, path, METADATA_BYTES))
        except (UnknownError, RepositoryError) as error:
            raise ConfigError(f"the repository's {path} is missing or damaged: {error}; restore it") from None
        if not isinstance(found.signed, _KINDS.get(role, Targets)):
            raise ConfigError(f"the repository's {path} is of type {found.signed.type}: restore it")
        return found

    def _write(self, roles: Roles) -> None:
        """Everything changed, in the order in which a reader may find it."""
        owners = sorted(roles.changed - set(TOP))
        if owners or roles.changed & {"targets", "snapshot", "timestamp"}:
            roles.changed |= {"snapshot", "timestamp"}
        signed = {}
        for role in ("root", *owners, "targets", "snapshot", "timestamp"):
            if role in roles.changed:
                signed[role] = self._signed(roles, role)
        # A new root last but for the first: what it refers to must be there already.
        order = sorted(signed, key=lambda role: (role == "timestamp", role == "root"))
        for role in [r for r in order if r != "timestamp"]:
            self.store.put(metadata_path(f"{roles.named(role).signed.version}.{role}"), signed[role])
        if "timestamp" in signed:
            self.store.put(metadata_path("timestamp"), signed["timestamp"])

    def _signed(self, roles: Roles, role: str) -> bytes:
        metadata = roles.named(role)
        metadata.signed.version += 1
        metadata.signed.expires = self._now() + dt.timedelta(seconds=_life(role))
        if role == "snapshot":
            metadata.signed.meta = {
                f"{name}.json": MetaFile(roles.named(name).signed.version) for name in ("targets", *roles.owners)
            }
        elif role == "timestamp":
            metadata.signed.snapshot_meta = MetaFile(roles.snapshot.signed.version)
        metadata.signatures.clear()
        for keyid in dict.fromkeys((*roles.trusts(role).keyids, *roles.extra.get(role, ()))):
            if (signer := self.keys.signer(keyid)) is not None:
                metadata.sign(signer, append=True)
        delegator = roles.root if role in TOP else roles.targets
        try:
            delegator.signed.verify_delegate(role, metadata.signed_bytes, metadata.signatures)
        except UnsignedMetadataError:
            trusted = roles.trusts(role)
            here = sum(self.keys.signer(k) is not None for k in trusted.keyids)
            raise RefusedError(
                f"role {role} needs {trusted.threshold} signatures, {here} of its keys are in {self.keys.folder}"
            ) from None
        return metadata.to_bytes()

    def _now(self) -> dt.datetime:
        return dt.datetime.fromtimestamp(int(self._clock()), dt.timezone.utc)


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


def _life(role: str) -> int:
    return LIFE_S.get(role, LIFE_S["targets"])


def _touch(roles: Roles, role: str, extra: Iterable[str] = ()) -> None:
    roles.changed.add(role)
    roles.extra[role] = list(extra)


def _root_anew(roles: Roles, role: str, keys: list[Any], threshold: int, extra: Iterable[str] = ()) -> None:
    root = roles.root.signed
    for keyid in list(root.roles[role].keyids):
        root.revoke_key(keyid, role)
    for key in keys:
        root.add_key(key, role)
    root.roles[role].threshold = threshold
    _touch(roles, "root", extra)


def _delegate_anew(roles: Roles, role: str, keys: list[Any], threshold: int) -> None:
    targets = roles.targets.signed
    delegated = roles.trusts(role)
    for keyid in list(delegated.keyids):
        targets.revoke_key(keyid, role)
    for key in keys:
        targets.add_key(key, role)
    delegated.threshold = threshold
    roles.changed |= {"targets", role}
