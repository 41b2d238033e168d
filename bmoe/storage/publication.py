"""Publishing and withdrawing a model's version in a repository, and what a reader needs of it.

Publishing: blobs first, then the metadata that names them. Whether a version may be used the ledger says, not this.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuf.api.metadata import TargetFile

from bmoe.protocol.errors import InputError, LimitError, UnavailableError, UnknownError
from bmoe.protocol.files import sync_folder
from bmoe.storage.blobs import read_whole
from bmoe.storage.manifest import MAX_FILE_BYTES, MAX_MANIFEST_BYTES, Model, manifest_digest, parse_manifest
from bmoe.storage.repository import Repository
from bmoe.storage.repository_roles import Roles, delegation
from bmoe.storage.targets import (
    OWNER_PREFIX,
    blob_path,
    is_target,
    manifest_target,
    metadata_path,
    origin_target,
    part_targets,
)

PARTS = (".onnx", ".npz")


@dataclass(frozen=True)
class Published:
    """A version in the repository: its owner, its manifest's SHA-256 and its statement of origin's, in hex."""

    model: str
    version: int
    owner: str
    manifest: str
    origin: str


def publish(
    repository: Repository, owner: str, model: Model, manifest: bytes, blobs: Path, origin: bytes, draft: bool = False
) -> str:
    """Put a version into the repository; the role that signed it. The files of `blobs` are named by their SHA-256.

    Raises RefusedError for a model of another owner's, UnsignedError where keys kept elsewhere must sign. Doing it again
    changes nothing.
    """
    parts = part_targets(model)
    for _, sha256 in parts.values():
        repository.store.put_file(blob_path(sha256), blobs / sha256)
    digest, origin_digest = manifest_digest(manifest).hex(), hashlib.sha256(origin).hexdigest()
    for name, data in ((digest, manifest), (origin_digest, origin)):
        repository.store.put(blob_path(name), data)
    wanted = {path: _target(path, size, sha256) for path, (size, sha256) in parts.items()}
    path = manifest_target(model.name, model.version)
    wanted[path] = _target(path, len(manifest), digest, {"origin": origin_digest})
    path = origin_target(model.name, model.version)
    wanted[path] = _target(path, len(origin), origin_digest)
    role = ""

    def edit(roles: Roles) -> None:
        nonlocal role
        role = delegation(roles, owner, model.name, repository.keys.generate)
        targets = roles.owners[role].signed.targets
        if {path: targets.get(path) for path in wanted} != wanted:
            targets.update(wanted)
            roles.changed.add(role)

    repository.change(edit, draft)
    return role


def withdraw(repository: Repository, model: str, version: int, digests: Sequence[str], draft: bool = False) -> None:
    """Take a version out of the metadata, and with it the parts of these SHA-256; the blobs stay, for auditors.

    Doing it again, or for a version that was never there, changes nothing. Raises as `publish` does.
    """

    def edit(roles: Roles) -> None:
        """Drop the version's targets, and those of its parts that no other version needs."""
        gone = {manifest_target(model, version), origin_target(model, version)}
        needed: set[str] = set()
        for other in versions(roles):
            if other.model == model and other.version != version:
                needed.update(part_targets(read_version(repository, roles, model, other.version)[1]))
        for name, owner in roles.owners.items():
            targets = owner.signed.targets
            for path in list(targets):
                orphan = path.startswith(f"{model}/") and path.endswith(PARTS) and path not in needed
                if path in gone or orphan or targets[path].hashes["sha256"] in digests:
                    del targets[path]
                    roles.changed.add(name)

    repository.change(edit, draft)


def versions(roles: Roles) -> list[Published]:
    """Every version in the repository, by model and number."""
    found = []
    for role, metadata in roles.owners.items():
        for path, target in metadata.signed.targets.items():
            if is_target(path) and path.endswith("/model.json"):
                model, version, _ = path.split("/")
                origin = target.custom["origin"] if target.custom else ""
                facts = (role.removeprefix(OWNER_PREFIX), target.hashes["sha256"], origin)
                found.append(Published(model, int(version), *facts))
    return sorted(found, key=lambda p: (p.model, p.version))


def read_version(repository: Repository, roles: Roles, model: str, version: int) -> tuple[Published, Model]:
    """A version and its manifest; raises UnknownError where the repository has none such."""
    for found in versions(roles):
        if (found.model, found.version) == (model, version):
            return found, parse_manifest(read_blob(repository, found.manifest, MAX_MANIFEST_BYTES))
    raise UnknownError(f"{model} version {version} is not in the repository")


def read_blob(repository: Repository, sha256: str, limit: int) -> bytes:
    """A small blob of the store's, checked; raises UnknownError, LimitError, InputError where it is of another digest."""
    data = read_whole(repository.store, blob_path(sha256), limit)
    _check_digest(sha256, hashlib.sha256(data).hexdigest())
    return data


def _check_digest(sha256: str, found: str) -> None:
    if found != sha256:
        raise InputError(f"the store's blob {sha256} has SHA-256 {found}: it was tampered with")


@dataclass(frozen=True)
class Bundle:
    """All that an updater reads of a version: metadata by path, and the size of each blob by SHA-256 in hex."""

    metadata: dict[str, bytes]
    blobs: dict[str, int]


def bundle(repository: Repository, model: str, version: int) -> Bundle:
    """What to push for a version; raises UnknownError where the repository has none such."""
    roles = repository.load()
    found, manifest = read_version(repository, roles, model, version)
    # As they were read: a timestamp of the next moment would name a snapshot that is not among them.
    metadata = {path: roles.read[path] for path in _metadata_paths(roles, found)}
    blobs = {sha256: size for size, sha256 in part_targets(manifest).values()}
    for path in (manifest_target(model, version), origin_target(model, version)):
        target = roles.owners[OWNER_PREFIX + found.owner].signed.targets[path]
        blobs[target.hashes["sha256"]] = target.length
    return Bundle(metadata, blobs)


def fetch(repository: Repository, sha256: str, folder: Path, limit: int = MAX_FILE_BYTES) -> None:
    """Bring a blob from the store into a folder, under its SHA-256. What breaks off is gone on with while it gets on.

    Raises UnknownError where the store has none, InputError where what it has is of another digest, LimitError for more
    than `limit` bytes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".", delete=False) as file:
        try:
            for chunk in _chunks(repository, blob_path(sha256)):
                digest.update(chunk)
                file.write(chunk)
                if file.tell() > limit:
                    raise LimitError(f"the store's blob {sha256} has more than {limit} bytes")
            _check_digest(sha256, digest.hexdigest())
            file.flush()
            os.fsync(file.fileno())
            os.replace(file.name, folder / sha256)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise
    sync_folder(folder)


def _chunks(repository: Repository, path: str) -> Iterator[bytes]:
    done = -1
    have = 0
    while True:
        try:
            for chunk in repository.store.stream(path, have):
                have += len(chunk)
                yield chunk
            return
        except UnavailableError:
            if have <= done or not have:
                raise
            done = have


def _metadata_paths(roles: Roles, found: Published) -> Iterator[str]:
    for version in range(1, roles.root.signed.version + 1):
        yield metadata_path(f"{version}.root")
    yield metadata_path("timestamp")
    for role in ("snapshot", "targets", OWNER_PREFIX + found.owner):
        yield metadata_path(f"{roles.named(role).signed.version}.{role}")


def _target(path: str, size: int, sha256: str, custom: dict[str, Any] | None = None) -> TargetFile:
    return TargetFile(size, {"sha256": sha256}, path, {"custom": custom} if custom else None)
