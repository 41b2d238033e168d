"""The parcel of a version: everything that an agent's updater reads, laid out as files, for Flower to carry."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from bmoe.protocol.errors import UnavailableError
from bmoe.protocol.files import write_durably
from bmoe.storage.blobs import Store
from bmoe.storage.targets import blob_path

# One message of Flower's carries so much: large enough for most experts, small enough for a board's memory.
PIECE_BYTES = 8 << 20


@dataclass(frozen=True)
class Parcel:
    """Small files (metadata, receipts) by path, and blobs in the order in which the updater reads them: SHA-256, size."""

    small: Mapping[str, Path]
    blobs: tuple[tuple[str, int], ...]
    files: Mapping[str, Path]

    @property
    def sizes(self) -> dict[str, int]:
        """The size of each blob."""
        return dict(self.blobs)


def make_parcel(files: Mapping[str, bytes], blobs: Mapping[str, int], store: Store, out: Path, folder: Path) -> Parcel:
    """Write the small files under `out`, and those blobs that do not lie in `folder` already, from the store.

    Raises UnavailableError where the store cannot be read, UnknownError where it lacks a blob.
    """
    small, found = {}, {}
    for name, data in files.items():
        small[name] = out / name.replace("/", "_")
        write_durably(small[name], data, mode=0o600)
    for sha256, size in blobs.items():
        found[sha256] = folder / sha256
        if not found[sha256].is_file() or found[sha256].stat().st_size != size:
            found[sha256] = _fetched(store, out / "blobs" / sha256, sha256, size)
    return Parcel(small, tuple(blobs.items()), found)


def _fetched(store: Store, path: Path, sha256: str, size: int) -> Path:
    if not path.is_file() or path.stat().st_size != size:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        with part.open("wb") as file:
            for chunk in store.stream(blob_path(sha256)):
                file.write(chunk)
        part.replace(path)
    if path.stat().st_size != size:
        raise UnavailableError(f"blob {sha256[:16]} has {path.stat().st_size} bytes in the repository, not {size}")
    return path


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
            found.append([f"blobs/{sha256}", str(parcel.files[sha256].resolve()), begin, length])
            room -= length
        if room <= 0:
            break
    return found
