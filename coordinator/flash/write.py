"""Writes an image to a disk or a file: the first block last, synced, and read back before it is called done."""

from __future__ import annotations

import bisect
import contextlib
import fcntl
import hashlib
import os
import stat
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bmoe.protocol.errors import BmoeError, ConfigError, ImageError, RefusedError
from bmoe.protocol.files import sync_folder
from coordinator.flash.disks import Disk
from coordinator.flash.source import CHUNK, Source
from coordinator.flash.survey import Progress, Survey

HELD_BYTES = 1 << 20  # the partition table is in it: without it a card that was half written boots nowhere
BLKGETSIZE64, BLKFLSBUF, BLKRRPART, BLKGETDISKSEQ = 0x80081272, 0x1261, 0x125F, 0x80081280  # include/uapi/linux/fs.h
Patch = tuple[int, bytes]
_ZEROS = bytes(CHUNK)


@dataclass(frozen=True)
class Written:
    """What came of it. `bytes_written` leaves out what a block map or a file's holes made unnecessary."""

    image_bytes: int
    bytes_written: int
    raw_sha256: str
    patches: int


@contextmanager
def opened(target: Path, disk: Disk | None) -> Iterator[int]:
    """The target's descriptor, exclusively ours. A file is made, and removed again if writing fails; a disk is then left
    without its first MiB, so that nothing boots from it.

    Raises RefusedError for a disk that somebody holds or that is not the one looked at, ConfigError otherwise.
    """
    made = disk is None
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_EXCL | (os.O_CREAT if made else 0)
    try:
        handle = os.open(target, flags, 0o600)
    except FileExistsError:
        raise ConfigError(f"{target} is there already: nothing is overwritten") from None
    except OSError as error:
        if made:
            raise ConfigError(f"{target} cannot be made: {error.strerror}") from None
        busy = "somebody has it open: unmount it, and close what uses it" if error.errno == 16 else error.strerror
        raise RefusedError(f"{target} cannot be opened for writing alone: {busy}") from None
    try:
        if disk is not None:
            _same_disk(handle, disk)
        yield from _undone_if_broken(handle, target, disk)
    finally:
        os.close(handle)
    if made:
        sync_folder(target.parent)


def _undone_if_broken(handle: int, target: Path, disk: Disk | None) -> Iterator[int]:
    try:
        yield handle
    except BaseException:
        with contextlib.suppress(BmoeError, OSError):  # what it failed of is told, and the disk may be gone
            if disk is None:
                target.unlink(missing_ok=True)
            else:
                _write_at(handle, bytes(HELD_BYTES), 0)
                _sync(handle)
        raise


def write_image(
    handle: int, source: Source, survey: Survey, patches: Sequence[Patch], sparse: bool, progress: dict[str, Progress]
) -> Written:
    """Write and verify. `sparse`: the target reads as zeros where nothing is written. `progress` by phase.

    Raises ImageError when the image changed since it was looked at, RefusedError when the target does not take or give back
    what it is given.
    """
    if not sparse:  # what booted from this card before must not boot from the half of something else
        _write_at(handle, bytes(min(HELD_BYTES, survey.image_bytes)), 0)
        _sync(handle)
    sent = _stream(handle, source, survey, sparse, progress["write"])
    if sent.raw_sha256 != survey.raw_sha256:
        raise ImageError(f"{source.path} changed while it was written: nothing on the target can be used")
    if sparse:
        os.ftruncate(handle, survey.image_bytes)
    _sync(handle)
    _verify(handle, survey, sent, progress["verify"])
    front = bytearray(sent.held)
    for offset, data in patches:
        if offset < len(front):
            front[offset : offset + len(data)] = data
        else:
            _write_at(handle, data, offset)
    _sync(handle)
    _write_at(handle, bytes(front), 0)
    _sync(handle)
    for offset, data in [(0, bytes(front)), *patches]:
        if _read_at(handle, len(data), offset) != data:
            raise RefusedError(
                f"the target does not give back byte {offset} on: it is worn out, or smaller than it says"
            )
    return Written(survey.image_bytes, sent.written + len(sent.held), survey.raw_sha256, len(patches))


@dataclass(frozen=True)
class _Sent:
    """What was streamed: the first MiB, held back; digests of the whole image and of what must read back; bytes written."""

    held: bytes
    raw_sha256: str
    wanted_sha256: str
    written: int


def _stream(handle: int, source: Source, survey: Survey, sparse: bool, progress: Progress) -> _Sent:
    digest, wanted, held, offset, written = hashlib.sha256(), hashlib.sha256(), b"", 0, 0
    for chunk in source.chunks():
        digest.update(chunk)
        begin = 0
        if offset == 0:
            held, begin = chunk[:HELD_BYTES], min(HELD_BYTES, len(chunk))
        if offset + len(chunk) > survey.image_bytes:
            break  # it grew; the digest will say so
        for first, last in _wanted(survey, offset + begin, offset + len(chunk)):
            piece = chunk[first - offset : last - offset]
            wanted.update(piece)
            if not (sparse and piece == _ZEROS[: len(piece)]):
                _write_at(handle, piece, first)
                written += len(piece)
        offset += len(chunk)
        progress(offset, survey.image_bytes)
    return _Sent(held, digest.hexdigest(), wanted.hexdigest(), written)


def _wanted(survey: Survey, begin: int, end: int) -> Iterator[tuple[int, int]]:
    """The parts of [begin, end) that are written: all, or with a block map what it names and all up to the boot
    partition's end, whose free blocks must read as the image has them once files are put there."""
    if survey.bmap is None or begin >= end:
        yield from [(begin, end)] if begin < end else []
        return
    if begin < survey.boot.end:
        yield begin, min(end, survey.boot.end)
    ranges = survey.bmap.ranges
    begin = max(begin, survey.boot.end)
    for index in range(bisect.bisect_right(ranges, begin, key=lambda span: span.end), len(ranges)):
        if ranges[index].begin >= end:
            return
        yield max(ranges[index].begin, begin), min(ranges[index].end, end)


def _verify(handle: int, survey: Survey, sent: _Sent, progress: Progress) -> None:
    """Read back everything that was written, holes of a file with it."""
    digest = hashlib.sha256()
    for begin, end in _wanted(survey, len(sent.held), survey.image_bytes):
        for offset in range(begin, end, CHUNK):
            digest.update(_read_at(handle, min(CHUNK, end - offset), offset))
            progress(offset, survey.image_bytes)
    progress(survey.image_bytes, survey.image_bytes)
    if digest.hexdigest() != sent.wanted_sha256:
        raise RefusedError("the target does not give back what was written: it is worn out, or smaller than it says")


def _read_at(handle: int, size: int, offset: int) -> bytes:
    try:
        return os.pread(handle, size, offset)
    except OSError as error:
        raise RefusedError(f"the target cannot be read at byte {offset}: {error.strerror}") from None


def _write_at(handle: int, data: bytes | memoryview, offset: int) -> None:
    view = memoryview(data)
    while view:
        try:
            done = os.pwrite(handle, view, offset)
        except OSError as error:
            raise RefusedError(f"the target refused byte {offset}: {error.strerror}") from None
        view, offset = view[done:], offset + done


def _sync(handle: int) -> None:
    """Have it on the medium, and forget it here, so that what is read next comes from there."""
    try:
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        if stat.S_ISBLK(os.fstat(handle).st_mode):
            fcntl.ioctl(handle, BLKFLSBUF, 0)
    except OSError as error:
        raise RefusedError(f"the target lost what was written: {error.strerror}") from None


def _same_disk(handle: int, disk: Disk) -> None:
    """That what was opened is what was looked at; another card may have come in between."""
    status = os.fstat(handle)
    number = f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
    if not stat.S_ISBLK(status.st_mode) or number != disk.number:
        raise RefusedError(f"{disk.path} is not the disk that was looked at: found {number}, expected {disk.number}")
    for request, wanted, what in (
        (BLKGETSIZE64, str(disk.bytes), "bytes"),
        (BLKGETDISKSEQ, disk.sequence, "as its number"),
    ):
        found = str(struct.unpack("Q", fcntl.ioctl(handle, request, bytes(8)))[0]) if wanted else ""
        if found != wanted:
            raise RefusedError(
                f"{disk.path} has {found} {what} now, {wanted} when it was looked at: was the card changed?"
            )


def reread_table(handle: int) -> None:
    """Have the kernel read the new partition table; a disk whose old partitions are in use is left as it is."""
    try:
        fcntl.ioctl(handle, BLKRRPART, 0)
    except OSError:
        return
