"""The parcel of a version: everything that an agent's updater reads, laid out as files, for Flower to carry."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from bmoe.protocol.files import write_durably
from bmoe.storage.publication import fetch
from bmoe.storage.repository import Repository

# One message of Flower's carries so much: large enough for most experts, small enough for a board's memory.
PIECE_BYTES = 8 << 20


@dataclass(frozen=True)
class Parcel:
    """Small files (metadata, receipts) by path, and blobs in the order in which the updater reads them: SHA-256, size."""

    small: Mapping[str, Path]
    blobs: tuple[tuple[str, int], ...]
    folder: Path

    @property
    def sizes(self) -> dict[str, int]:
        """The size of each blob."""
        return dict(self.blobs)


def make_parcel(
    files: Mapping[str, bytes], blobs: Mapping[str, int], repository: Repository, out: Path, folder: Path
) -> Parcel:
    """Write the small files under `out`; blobs that do not lie in `folder` are brought there from the repository.

    Raises UnavailableError where that cannot be read, UnknownError where it lacks a blob.
    """
    small = {}
    for name, data in files.items():
        small[name] = out / name.replace("/", "_")
        write_durably(small[name], data, mode=0o600)
    for sha256, size in blobs.items():
        path = folder / sha256
        if not path.is_file() or path.stat().st_size != size:
            fetch(repository, sha256, folder)
    return Parcel(small, tuple(blobs.items()), folder)


def sweep(out: Path, kept: Collection[str]) -> None:
    """Remove the small files of rollouts that have ended: the folders under `out` whose names are not kept."""
    for folder in out.iterdir() if out.is_dir() else ():
        if folder.name not in kept:
            shutil.rmtree(folder, ignore_errors=True)


def pieces(parcel: Parcel, have: Mapping[str, int], room: int = PIECE_BYTES) -> list[list[object]]:
    """[path, file, offset, length] of what to push next to an agent that has so many bytes of each blob.

    The small files always; then blobs in their order, each from where the agent's copy ends, as far as the room goes.
    """
    found: list[list[object]] = [
        [name, str(path.resolve()), 0, path.stat().st_size] for name, path in parcel.small.items()
    ]
    for sha256, size in parcel.blobs:
        begin = have.get(sha256, 0)
        length = min(size - begin, room)
        if length > 0:
            found.append([f"blobs/{sha256}", str((parcel.folder / sha256).resolve()), begin, length])
            room -= length
        if room <= 0:
            break
    return found
