"""Reading a repository as its keeper: nothing is believed of the store but what the right keys signed, and nothing older
than what was signed from here. Otherwise whoever can write to the store has the keeper sign what he put there.

What the keeper remembers lies beside its keys: `root.json`, the first root, and `newest.json`, the newest timestamp.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import Metadata, Root, Snapshot, Targets, Timestamp

from bmoe.protocol.errors import ConfigError, InputError
from bmoe.protocol.files import write_durably
from bmoe.storage.blobs import Store, read_whole
from bmoe.storage.repository_roles import Roles
from bmoe.storage.targets import METADATA_BYTES, metadata_path

KINDS: dict[str, Any] = {"root": Root, "targets": Targets, "snapshot": Snapshot, "timestamp": Timestamp}


@dataclass(frozen=True)
class Memory:
    """What a keeper knows of its repository by itself; of one that it has not seen yet, nothing."""

    folder: Path

    def first_root(self) -> bytes | None:
        """The first root, as it was made here."""
        return self._read("root.json")

    def newest(self) -> int:
        """The version of the newest timestamp signed here, 0 where none is known."""
        data = self._read("newest.json")
        try:
            return 0 if data is None else int(json.loads(data)["timestamp"])
        except (ValueError, LookupError, TypeError, RecursionError):
            raise ConfigError(f"{self.folder / 'newest.json'} is damaged: remove it to go on without it") from None

    def keep_root(self, data: bytes) -> None:
        """Remember the first root."""
        write_durably(self.folder / "root.json", data, 0o600)

    def keep_newest(self, version: int) -> None:
        """Remember the newest timestamp, once it is in the store."""
        write_durably(self.folder / "newest.json", json.dumps({"timestamp": version}).encode(), 0o600)

    def _read(self, name: str) -> bytes | None:
        try:
            return (self.folder / name).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ConfigError(f"{self.folder / name} cannot be read: {error.strerror}") from None


def load(store: Store, memory: Memory, lenient: str = "") -> Roles:
    """The current metadata, verified. Raises ConfigError where it is damaged, older than what was signed here, or not
    signed as it should be; UnavailableError where it cannot be read.

    For the role `lenient`, whose keys are being changed, signatures by the root before the newest do as well: a crash may
    have come between the two.
    """
    reading = _Reading(store)
    newest = memory.newest()  # before the timestamp, which another process may replace meanwhile
    roots = _roots(reading, memory.first_root())
    by = {name: [root.signed for root in roots[-2 if name == lenient else -1 :]] for name in KINDS}
    timestamp = reading.verified("timestamp", None, by["timestamp"])
    if timestamp.signed.version < newest:
        raise ConfigError(
            f"the repository's timestamp is version {timestamp.signed.version}, but {newest} was signed here: restore the"
            f" newest, or remove {memory.folder / 'newest.json'} to go on from this one"
        )
    snapshot = reading.verified("snapshot", timestamp.signed.snapshot_meta.version, by["snapshot"])
    versions = {name.removesuffix(".json"): meta.version for name, meta in snapshot.signed.meta.items()}
    targets = reading.verified("targets", versions.pop("targets", 0), by["targets"])
    owners = {name: reading.verified(name, number, [targets.signed]) for name, number in versions.items()}
    return Roles(roots[-1], timestamp, snapshot, targets, owners, read=reading.files)


def _roots(reading: _Reading, first: bytes | None) -> list[Metadata[Root]]:
    """Every root, each signed by itself and as the one before says. `first` is what the first one must be."""
    roots = [reading.verified("root", 1, [])]
    if first is not None and reading.files[metadata_path("1.root")] != first:
        raise ConfigError("the repository's first root is another than the one made here: restore the repository")
    while reading.store.size(metadata_path(f"{len(roots) + 1}.root")) is not None:
        roots.append(reading.verified("root", len(roots) + 1, [roots[-1].signed]))
    return roots


@dataclass
class _Reading:
    store: Store
    files: dict[str, bytes] = field(default_factory=dict)

    def verified(self, role: str, version: int | None, delegators: Sequence[Any]) -> Metadata[Any]:
        """A role's metadata, signed as one of these says; a root by itself as well."""
        path = metadata_path(role if version is None else f"{version}.{role}")
        try:
            data = self.files[path] = read_whole(self.store, path, METADATA_BYTES)
            found: Metadata[Any] = Metadata.from_bytes(data)
            signed: Any = found.signed
            if not isinstance(signed, KINDS.get(role, Targets)) or (version or signed.version) != signed.version:
                raise InputError(f"it is {signed.type} version {signed.version}")
            for needed in (delegators, [signed] if role == "root" else []):
                by = [d.get_verification_result(role, found.signed_bytes, found.signatures) for d in needed]
                if by and not any(by):
                    raise InputError(f"of the right keys {len(by[-1].signed)} signed it, {by[-1].threshold} must")
        except (InputError, RepositoryError, ValueError) as error:
            raise ConfigError(f"the repository's {path} is missing or damaged: {error}; restore it") from None
        return found
