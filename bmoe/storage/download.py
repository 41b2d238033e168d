"""Parts of an update on a board's disk: resumed where a download broke off, believed only whole and of the right digest."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from bmoe.protocol.errors import InputError, RefusedError, UnavailableError
from bmoe.protocol.files import sync_folder
from bmoe.storage.installed import experts_folder, updates_folder
from bmoe.storage.targets import blob_path
from bmoe.storage.update_source import Source

# Left free for the outbox and the log, which matter more than an update.
SPARE_BYTES = 16 << 20
READ_BYTES = 1 << 20
STALE_S = 7 * 24 * 3600


def parts_folder(state: Path) -> Path:
    """Where parts lie until they are checked."""
    return updates_folder(state) / "parts"


def progress(state: Path, sizes: Mapping[str, int]) -> dict[str, int]:
    """How many bytes of each file, by SHA-256 in hex, are here: a push goes on from there."""
    return {sha256: _have(state, sha256, size) for sha256, size in sizes.items()}


def check_room(state: Path, sizes: Mapping[str, int]) -> None:
    """Raise UnavailableError unless the disk takes what is missing and keeps something to spare.

    What was begun of other updates goes first.
    """
    missing = sum(size - _have(state, sha256, size) for sha256, size in sizes.items())
    if missing and missing + SPARE_BYTES > shutil.disk_usage(state).free:
        _drop(path for path in parts_folder(state).glob("*") if path.name not in sizes)
        free = shutil.disk_usage(state).free
        if missing + SPARE_BYTES > free:
            raise UnavailableError(f"the disk is full: {missing + SPARE_BYTES} bytes are needed, {free} are free")


def obtain(source: Source, state: Path, sha256: str, size: int) -> Path:
    """The file of that digest and size: from the disk if it is there, its missing rest from the source.

    Raises InputError, and forgets what came, for bytes of another digest; UnavailableError, and keeps it, where it broke
    off or the disk is full.
    """
    ready = experts_folder(state) / f"{sha256}.onnx"
    if _is(ready, sha256, size):
        return ready
    path = parts_folder(state) / sha256
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        if file.tell() > size:
            file.truncate(0)
            file.seek(0)
        try:
            _append(source, file.fileno(), blob_path(sha256), file.tell(), size)
        finally:
            os.fsync(file.fileno())
    have = path.stat().st_size
    if have < size:
        raise UnavailableError(f"{sha256[:16]}: {have} of {size} bytes came; the rest is asked for next time")
    found = digest_of(path)
    if found != sha256:
        path.unlink()
        raise InputError(f"{sha256[:16]}: what came has SHA-256 {found}: it was tampered with, or damaged")
    return path


def install(state: Path, path: Path, sha256: str, release: bytes) -> None:
    """Move a checked expert to where tasks find it, with its release; durable, and harmless if done twice."""
    folder = experts_folder(state)
    folder.mkdir(parents=True, exist_ok=True)
    # As edge_agent/experts.py has it: a file is believed with its release beside it.
    beside = folder / f".{sha256}.release"
    beside.write_bytes(release)
    with beside.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(beside, folder / f"{sha256}.release")
    ready = folder / f"{sha256}.onnx"
    if path != ready:
        os.replace(path, ready)
    sync_folder(folder)


def tidy(state: Path, done: Iterable[str]) -> None:
    """Drop parts that an update is done with, and those that no update has gone on with for a week."""
    finished, stale = set(done), time.time() - STALE_S
    _drop(p for p in parts_folder(state).glob("*") if p.name in finished or p.stat().st_mtime < stale)


def digest_of(path: Path) -> str:
    """The SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(READ_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _drop(paths: Iterable[Path]) -> None:
    for path in list(paths):
        path.unlink(missing_ok=True)


def _append(source: Source, handle: int, path: str, have: int, size: int) -> None:
    if have >= size:
        return
    for chunk in source.stream(path, have, size):
        have += len(chunk)
        if have > size:
            os.ftruncate(handle, 0)
            raise RefusedError(f"{path} has more than the {size} bytes that the repository states")
        view = memoryview(chunk)
        while view:
            view = view[os.write(handle, view) :]


def _have(state: Path, sha256: str, size: int) -> int:
    for path in (experts_folder(state) / f"{sha256}.onnx", parts_folder(state) / sha256):
        if path.is_file() and path.stat().st_size <= size:
            return path.stat().st_size
    return 0


def _is(path: Path, sha256: str, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size and digest_of(path) == sha256
