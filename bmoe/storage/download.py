"""Parts of an update on a board's disk: resumed where a download broke off, believed only whole and of the right digest."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from bmoe.protocol.errors import InputError, RefusedError, UnavailableError
from bmoe.protocol.files import sync_folder
from bmoe.storage.installed import experts_folder, pinned, updates_folder
from bmoe.storage.targets import blob_path
from bmoe.storage.update_source import Source

# Left free for the outbox and the log, which matter more than an update.
SPARE_BYTES = 16 << 20
READ_BYTES = 1 << 20
STALE_S = 7 * 24 * 3600
# Beside a part whose first copy was not what it should be, though nobody can say who spoiled it.
SPOILED = ".spoiled"


def parts_folder(state: Path) -> Path:
    """Where parts lie until they are checked."""
    return updates_folder(state) / "parts"


def progress(state: Path, sizes: Mapping[str, int]) -> dict[str, int]:
    """How many bytes of each file, by SHA-256 in hex, are here: a push goes on from there."""
    return {sha256: _have(state, sha256, size) for sha256, size in sizes.items()}


def check_room(state: Path, sizes: Mapping[str, int]) -> None:
    """Raise UnavailableError unless the disk takes what is missing and keeps something to spare.

    What was begun of other updates goes first, then experts of no version installed or kept, the longest unused first.
    """
    needed = sum(size - _have(state, sha256, size) for sha256, size in sizes.items())
    if not needed:
        return
    needed += SPARE_BYTES
    free = shutil.disk_usage(state).free
    may_go = [(path, path.stat().st_size) for path in _droppable(state, sizes)] if needed > free else []
    if needed > free + sum(size for _, size in may_go):  # then nothing goes: it would be for nothing
        raise UnavailableError(f"the disk is full: {needed} bytes are needed, {free} are free")
    for path, size in may_go:
        if needed <= free:
            break
        _drop(path)
        free += size


def obtain(source: Source, state: Path, sha256: str, size: int) -> Path:
    """The file of that digest and size: from the disk if it is there, its missing rest from the source.

    Raises InputError, and forgets what came, for bytes of another digest; UnavailableError, and keeps it, where it broke
    off or the disk is full. Bytes of another digest of which some came before are fetched once more from the start: a power
    cut may have spoiled those.
    """
    ready = experts_folder(state) / f"{sha256}.onnx"
    if _is(ready, sha256, size):
        return ready
    if ready.exists():
        _drop(ready)  # damaged: no task can use it
    path = parts_folder(state) / sha256
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        if file.tell() > size:
            file.truncate(0)
            file.seek(0)
        before = file.tell()
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
        _blame(path.with_name(sha256 + SPOILED), before, f"{sha256[:16]}: what came has SHA-256 {found}")
    return path


def _blame(mark: Path, before: int, fact: str) -> None:
    """Raise for a file of another digest of which `before` bytes had come earlier: theirs, or perhaps our disk's fault."""
    if before and not mark.exists():
        mark.touch()
        raise UnavailableError(f"{fact}, {before} bytes of it from an earlier try: fetched anew from the start")
    mark.unlink(missing_ok=True)
    raise InputError(f"{fact}: it was tampered with, or damaged")


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
    for path in list(parts_folder(state).glob("*")):
        if path.name.removesuffix(SPOILED) in finished or path.stat().st_mtime < stale:
            _drop(path)


def digest_of(path: Path) -> str:
    """The SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(READ_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _droppable(state: Path, sizes: Mapping[str, int]) -> Iterator[Path]:
    """What may go to make room, in the order in which it goes. An agent fetches an expert again for which a task comes."""
    yield from [path for path in parts_folder(state).glob("*") if path.name.removesuffix(SPOILED) not in sizes]
    kept = {*pinned(state), *sizes}
    experts = [path for path in experts_folder(state).glob("*.onnx") if path.stem not in kept]
    yield from sorted(experts, key=lambda path: path.stat().st_mtime)


def _drop(path: Path) -> None:
    path.unlink(missing_ok=True)
    if path.suffix == ".onnx":
        path.with_suffix(".release").unlink(missing_ok=True)


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
