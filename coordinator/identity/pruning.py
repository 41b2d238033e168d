"""Which blobs nobody needs any more: files of versions withdrawn long ago, and files that no version ever had.

A file is only ever named here if every manifest that might need it could be read: what is not known to be needless stays.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path

from bmoe.ledger.rules.state import State
from bmoe.protocol.files import sync_folder
from bmoe.storage.blobs import Store
from bmoe.storage.manifest import Model, parts
from bmoe.storage.targets import blob_path
from coordinator.identity.blobs import is_hex_digest

DAY_S = 24 * 3600


def needless(
    state: State, manifest: Callable[[str], Model], origins: Iterable[str], found: Iterable[str], before_ms: int
) -> set[str]:
    """Of the blobs found, by SHA-256 in hex, those that only versions withdrawn before `before_ms` have, or none.

    `manifest(sha256)` reads a manifest and raises where it cannot: then nothing is named. `origins` are statements of
    origin that the repository names.
    """
    needed = set(origins)
    for key, version in state.versions.items():
        mark = state.withdrawn_versions.get(key)
        if mark is not None and mark.time_ms < before_ms:
            continue
        digest = version.manifest.hex()
        needed |= {digest, *(part.sha256 for part in parts(manifest(digest)))}
        needed |= {part.hex() for part in (*version.experts, version.gate) if part}
    return {digest for digest in found if is_hex_digest(digest)} - needed


def old_blobs(folder: Path, days: float) -> dict[str, int]:
    """Size by name of the files in a folder of blobs that have not been touched for so long: what is being published now
    is on no ledger yet."""
    before = time.time() - days * DAY_S
    listed = {path.name: path.lstat() for path in folder.iterdir() if path.is_file()}
    return {name: status.st_size for name, status in listed.items() if status.st_mtime < before}


def remove(names: Iterable[str], folder: Path, store: Store) -> None:
    """Remove blobs from where they are served and from the store."""
    for name in names:
        store.remove(blob_path(name))
        (folder / name).unlink(missing_ok=True)
    sync_folder(folder)
