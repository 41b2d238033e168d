"""The signed repository: TUF metadata over the releases of gates and experts, one delegated role an owner.

A change is made in memory, signed, and written so that a reader and a crash find the old state or the new one: blobs,
then each role's next version under a name of its own, then `timestamp.json`, which alone says what counts. What a crash
leaves behind is never referred to, and is written over by the next change. What keys kept elsewhere must sign is a draft,
which is signed there and accepted here.
Source: The Update Framework Specification 1.0.31, sections 4 (formats) and 6 (writing consistent snapshots).
"""

from __future__ import annotations

import datetime as dt
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tuf.api.exceptions import UnsignedMetadataError
from tuf.api.metadata import Delegations, Key, Metadata, MetaFile, Root, Snapshot, Targets, Timestamp

from bmoe.protocol.errors import ConfigError, LimitError, RefusedError
from bmoe.storage.blobs import Store
from bmoe.storage.repository_drafts import keys_of, new_keys, place, still_counts
from bmoe.storage.repository_keys import KeyFolder
from bmoe.storage.repository_read import Memory, load
from bmoe.storage.repository_roles import ONLINE, TOP, Roles, delegate_anew, root_anew, touch
from bmoe.storage.targets import METADATA_BYTES, metadata_path

DAY = 24 * 3600
LIFE_S = {"root": 365 * DAY, "targets": 180 * DAY, "snapshot": 30 * DAY, "timestamp": 7 * DAY}
KEYS_MAX = 16


class UnsignedError(RefusedError):
    """A change that keys kept elsewhere must sign; nothing counts that was written.

    `drafts` are the metadata of each role that is not signed at every change, with the signatures there are; `signers` the
    ids of the keys that may sign each of them.
    """

    def __init__(self, message: str, drafts: dict[str, bytes], signers: dict[str, list[str]]) -> None:
        super().__init__(message)
        self.drafts, self.signers = drafts, signers


class Repository:
    """One repository in a store, and the keys that sign it. One process at a time writes it."""

    def __init__(self, store: Store, keys: KeyFolder, clock: Callable[[], float] = time.time) -> None:
        self.store, self.keys, self._clock = store, keys, clock
        self.memory = Memory(keys.folder)

    def found(self) -> bool:
        """Make the repository with one key a role, where there is none; whether it was made now."""
        if self.store.size(metadata_path("timestamp")) is not None:
            if self.memory.first_root() is None:
                self.memory.keep_root(self.load().read[metadata_path("1.root")])
            return False
        # Without a timestamp nobody ever read it, unless it is an old one that lost it.
        known = any(self.store.size(metadata_path(name)) is not None for name in ("2.snapshot", "2.root"))
        if known or self.memory.newest():
            raise ConfigError(
                f"the repository's {metadata_path('timestamp')} is missing: restore it, or copy all of the repository to"
                " where it is to be"
            )
        root = Root(consistent_snapshot=True)
        delegations = Delegations({}, {})
        roles = Roles(
            Metadata(root), Metadata(Timestamp()), Metadata(Snapshot()), Metadata(Targets(delegations=delegations)), {}
        )
        for role in TOP:
            root.add_key(self.keys.generate(), role)
            roles.named(role).signed.version = 0
        roles.changed = set(TOP)
        signed = self._signed_all(roles)
        self.memory.keep_root(signed["root"])
        self._put(roles, signed)
        return True

    def load(self, lenient: str = "") -> Roles:
        """The current metadata, as `repository_read.load` has it."""
        return load(self.store, self.memory, lenient)

    def change(self, edit: Callable[[Roles], None], draft: bool = False, lenient: str = "") -> Roles:
        """Let `edit` change roles and name them in `changed`; sign and write them. Raises as `edit` does, and UnsignedError
        where keys kept elsewhere must sign: with `draft` the keys that `edit` made are kept for when they have."""
        roles = self.load(lenient)
        try:
            edit(roles)
            if roles.changed:
                self._put(roles, self._signed_all(roles))
        except UnsignedError:
            if not draft:
                self.keys.forget_made()
            raise
        finally:
            self.keys.keep_made()  # of whatever else went wrong nobody knows whether it took effect
        return roles

    def refresh(self) -> tuple[list[str], dict[str, float]]:
        """Sign anew whatever has less than half of its life left: the roles renewed, and those whose keys are kept
        elsewhere, with the days that they have left."""
        roles = self.load()
        due = self._due(roles)
        here = [role for role in due if self.can_sign(roles, role)]
        if here:
            roles.changed = set(here)
            self._put(roles, self._signed_all(roles))
        return here, {role: round(left / DAY, 1) for role, left in due.items() if role not in here}

    def renewals(self) -> tuple[dict[str, bytes], dict[str, list[str]]]:
        """Drafts and signers of the roles that are due and whose keys are kept elsewhere."""
        roles = self.load()
        roles.changed = {role for role in self._due(roles) if not self.can_sign(roles, role)}
        return self._drafts(roles, {role: self._sign(roles, role) for role in self._order(roles)})

    def accept(self, documents: Mapping[str, bytes]) -> list[str]:
        """Take drafts that were signed elsewhere; the ids of the keys that no role has any more, which are removed here.

        Raises RefusedError for what is not the next version of a role, or not signed as it must be: then nothing changes.
        """
        before = self.load()
        rest = {role: data for role, data in documents.items() if role != "root"}
        if "root" in documents and still_counts(before, rest):
            # What the new root names is signed by new keys as well before it: whichever of the two roots a reader has, all
            # that counts verifies.
            self._take(rest, new_keys(before, documents["root"], ONLINE))
            self._take({"root": documents["root"]})
        else:
            self._take(documents)
        gone = sorted(keys_of(before) - keys_of(self.load()))
        for keyid in gone:
            self.keys.forget(keyid)
        return gone

    def _take(self, documents: Mapping[str, bytes], extra: Mapping[str, Sequence[str]] | None = None) -> None:
        roles = self.load()
        place(self.store, roles, documents, self._now())
        for role, keyids in (extra or {}).items():
            touch(roles, role, keyids)
        self._put(roles, self._signed_all(roles, documents))

    def can_sign(self, roles: Roles, role: str) -> bool:
        """Whether enough of a role's keys are here."""
        return self._here(roles, role) >= roles.trusts(role).threshold

    def rotate(
        self, role: str, keys: int = 1, threshold: int = 1, public: Sequence[Key] = (), draft: bool = False
    ) -> list[str]:
        """Give a role new keys, of which `threshold` must sign; the ids of the keys replaced, which are removed here.

        `public` are keys kept elsewhere, in place of new ones made here. Raises UnsignedError as `change` does.
        """
        count = len(public) or keys
        if not 1 <= threshold <= count <= KEYS_MAX or len({key.keyid for key in public}) != len(public):
            raise RefusedError(
                f"a role has 1..{KEYS_MAX} keys and a threshold of 1..as many, not {threshold} of {count}"
            )
        if public and role in ONLINE:
            raise RefusedError(f"{role} is signed at every change: its keys must be in {self.keys.folder}")
        before = self.load(role)
        before.named(role)
        new = list(public) or [self.keys.generate() for _ in range(keys)]
        old = list(before.trusts(role).keyids)
        ids = [key.keyid for key in new]
        if role not in TOP:
            self.change(lambda roles: delegate_anew(roles, role, new, threshold), draft)
        elif role == "root":
            self.change(lambda roles: root_anew(roles, role, new, threshold, extra=old), draft)
        elif self.can_sign(before, "root") and self.can_sign(before, role) and not public:
            # As `accept` does: by old and new keys first, then the root.
            self.change(lambda roles: touch(roles, role, ids), lenient=role)
            self.change(lambda roles: root_anew(roles, role, new, threshold))
        else:

            def at_once(roles: Roles) -> None:
                """Where the role's own keys are lost or elsewhere, or root's are: both change together."""
                touch(roles, role, [*ids, *old])
                root_anew(roles, role, new, threshold)

            self.change(at_once, draft, lenient=role)
        gone = [keyid for keyid in old if keyid not in ids]
        for keyid in gone:
            self.keys.forget(keyid)
        return gone

    def _due(self, roles: Roles) -> dict[str, float]:
        """Roles with less than half of their life left, and the seconds that they have."""
        now = self._now()
        left = {role: (roles.named(role).signed.expires - now).total_seconds() for role in (*TOP, *roles.owners)}
        return {role: left_s for role, left_s in left.items() if left_s < _life(role) / 2}

    def _here(self, roles: Roles, role: str) -> int:
        return sum(self.keys.signer(keyid) is not None for keyid in roles.trusts(role).keyids)

    def _order(self, roles: Roles) -> list[str]:
        """The roles changed, in the order in which one names the other."""
        owners = sorted(roles.changed - set(TOP))
        if owners or roles.changed & {"targets", *ONLINE}:
            roles.changed |= set(ONLINE)
        return [role for role in ("root", *owners, "targets", *ONLINE) if role in roles.changed]

    def _signed_all(self, roles: Roles, ready: Mapping[str, bytes] | None = None) -> dict[str, bytes]:
        """Everything changed, signed; raises UnsignedError. What is `ready` is taken as it is."""
        signed = {role: (ready or {}).get(role) or self._sign(roles, role) for role in self._order(roles)}
        for role, data in signed.items():
            try:
                roles.delegator(role).verify_delegate(
                    role, roles.named(role).signed_bytes, roles.named(role).signatures
                )
            except UnsignedMetadataError:
                trusted = roles.trusts(role)
                raise UnsignedError(
                    f"role {role} needs {trusted.threshold} signatures, {self._here(roles, role)} of its keys are in"
                    f" {self.keys.folder}",
                    *self._drafts(roles, signed),
                ) from None
            if len(data) > METADATA_BYTES:
                raise LimitError(
                    f"{role} would have {len(data)} bytes, at most {METADATA_BYTES} are read: withdraw some"
                )
        return signed

    def _sign(self, roles: Roles, role: str) -> bytes:
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
        return metadata.to_bytes()

    def _drafts(self, roles: Roles, signed: Mapping[str, bytes]) -> tuple[dict[str, bytes], dict[str, list[str]]]:
        drafts = {role: data for role, data in signed.items() if role not in ONLINE}
        # A root that changes is signed by the keys it had as well.
        return drafts, {r: list(dict.fromkeys((*roles.trusts(r).keyids, *roles.extra.get(r, ())))) for r in drafts}

    def _put(self, roles: Roles, signed: Mapping[str, bytes]) -> None:
        """Write what was signed, in the order in which a reader may find it."""
        # A new root last but for the first: what it refers to must be there already.
        order: list[Any] = sorted(signed, key=lambda role: (role == "timestamp", role == "root"))
        for role in [r for r in order if r != "timestamp"]:
            self.store.put(metadata_path(f"{roles.named(role).signed.version}.{role}"), signed[role])
        if "timestamp" in signed:
            self.store.put(metadata_path("timestamp"), signed["timestamp"])
            self.memory.keep_newest(roles.timestamp.signed.version)

    def _now(self) -> dt.datetime:
        return dt.datetime.fromtimestamp(int(self._clock()), dt.timezone.utc)


def _life(role: str) -> int:
    return LIFE_S.get(role, LIFE_S["targets"])
