"""Writes an image to a disk or a file: the first block last, synced, and read back before it is called done."""

from __future__ import annotations

import fcntl
import hashlib
import os
import stat
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bmoe.protocol.errors import ConfigError, ImageError, RefusedError
from coordinator.flash.disks import Disk
from coordinator.flash.source import CHUNK, Source
from coordinator.flash.survey import Progress, Survey

HELD_BYTES = 1 << 20  # the partition table is in it: without it a card that was half written boots nowhere
BLKGETSIZE64, BLKFLSBUF, BLKRRPART = 0x80081272, 0x1261, 0x125F  # include/uapi/linux/fs.h
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
    """The target's descriptor, exclusively ours. A file is made, and removed again if writing fails.

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
        yield handle
    except BaseException:
        if made:
            target.unlink(missing_ok=True)
        raise
    finally:
        os.close(handle)


def write_image(
    handle: int, source: Source, survey: Survey, patches: Sequence[Patch], sparse: bool, progress: dict[str, Progress]
) -> Written:
    """Write and verify. `sparse`: the target reads as zeros where nothing is written. `progress` by phase.

    Raises ImageError when the image changed since it was looked at, or when the target does not give back what it took.
    """
    if not sparse:  # what booted from this card before must not boot from the half of something else
        _write_at(handle, bytes(min(HELD_BYTES, survey.image_bytes)), 0)
        _sync(handle)
    held, digest, written = _stream(handle, source, survey, sparse, progress["write"])
    if digest.hexdigest() != survey.raw_sha256:
        raise ImageError(f"{source.path} changed while it was written: nothing on the target can be used")
    if sparse:
        os.ftruncate(handle, survey.image_bytes)
    _sync(handle)
    _verify(handle, survey, held, progress["verify"])
    front = bytearray(held)
    for offset, data in patches:
        if offset < len(front):
            front[offset : offset + len(data)] = data
        else:
            _write_at(handle, data, offset)
    _sync(handle)
    _write_at(handle, bytes(front), 0)
    _sync(handle)
    for offset, data in [(0, bytes(front)), *patches]:
        if os.pread(handle, len(data), offset) != data:
            raise ImageError(
                f"the target does not give back what was written at byte {offset}: it is worn out or a fake"
            )
    return Written(survey.image_bytes, written, survey.raw_sha256, len(patches))


def _stream(
    handle: int, source: Source, survey: Survey, sparse: bool, progress: Progress
) -> tuple[bytes, hashlib._Hash, int]:
    digest, held, offset, written = hashlib.sha256(), b"", 0, 0
    for chunk in source.chunks():
        digest.update(chunk)
        begin = 0
        if offset == 0:
            held, begin = chunk[:HELD_BYTES], min(HELD_BYTES, len(chunk))
        if offset + len(chunk) > survey.image_bytes:
            break  # it grew; the digest will say so
        for first, last in _wanted(survey, offset + begin, offset + len(chunk)):
            piece = memoryview(chunk)[first - offset : last - offset]
            if not (sparse and piece == _ZEROS[: len(piece)]):
                _write_at(handle, piece, first)
                written += len(piece)
        offset += len(chunk)
        progress(offset, survey.image_bytes)
    return held, digest, written + len(held)


def _wanted(survey: Survey, begin: int, end: int) -> Iterator[tuple[int, int]]:
    """The parts of [begin, end) that are written: all, or with a block map what it names and all up to the boot
    partition's end, whose free blocks must read as the image has them once files are put there."""
    if survey.bmap is None or begin >= end:
        yield from [(begin, end)] if begin < end else []
        return
    if begin < survey.boot.end:
        yield begin, min(end, survey.boot.end)
    for span in survey.bmap.ranges:
        first, last = max(span.begin, begin, survey.boot.end), min(span.end, end)
        if first < last:
            yield first, last


def _verify(handle: int, survey: Survey, held: bytes, progress: Progress) -> None:
    """Read everything back: against the image's own digest, or range by range of the block map."""
    if survey.bmap is not None:
        _verify_ranges(handle, survey, progress)
        progress(survey.image_bytes, survey.image_bytes)
        return
    digest = hashlib.sha256(held)
    for offset in range(len(held), survey.image_bytes, CHUNK):
        data = os.pread(handle, min(CHUNK, survey.image_bytes - offset), offset)
        digest.update(data)
        progress(offset + len(data), survey.image_bytes)
    if digest.hexdigest() != survey.raw_sha256:
        raise ImageError("the target does not give back what was written: it is worn out, or smaller than it says")


def _verify_ranges(handle: int, survey: Survey, progress: Progress) -> None:
    assert survey.bmap is not None
    for span in survey.bmap.ranges:
        if span.begin < HELD_BYTES or not span.sha256:
            continue
        digest = hashlib.sha256()
        for offset in range(span.begin, span.end, CHUNK):
            digest.update(os.pread(handle, min(CHUNK, span.end - offset), offset))
            progress(offset, survey.image_bytes)
        if digest.hexdigest() != span.sha256:
            raise ImageError(
                f"the target does not give back bytes {span.begin} to {span.end}: it is worn out or a fake"
            )


def _write_at(handle: int, data: bytes | memoryview, offset: int) -> None:
    view = memoryview(data)
    while view:
        try:
            done = os.pwrite(handle, view, offset)
        except OSError as error:
            raise ImageError(f"the target refused byte {offset}: {error.strerror}") from None
        view, offset = view[done:], offset + done


def _sync(handle: int) -> None:
    """Have it on the medium, and forget it here, so that what is read next comes from there."""
    try:
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        if stat.S_ISBLK(os.fstat(handle).st_mode):
            fcntl.ioctl(handle, BLKFLSBUF, 0)
    except OSError as error:
        raise ImageError(f"the target lost what was written: {error.strerror}") from None


def _same_disk(handle: int, disk: Disk) -> None:
    """That what was opened is what was looked at; another card may have come in between."""
    status = os.fstat(handle)
    number = f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
    if not stat.S_ISBLK(status.st_mode) or number != disk.number:
        raise RefusedError(f"{disk.path} is not the disk that was looked at: found {number}, expected {disk.number}")
    (size,) = struct.unpack("Q", fcntl.ioctl(handle, BLKGETSIZE64, bytes(8)))
    if size != disk.bytes:
        raise RefusedError(
            f"{disk.path} has {size} bytes now, {disk.bytes} when it was looked at: was the card changed?"
        )


def reread_table(handle: int) -> None:
    """Have the kernel read the new partition table; a disk whose old partitions are in use is left as it is."""
    try:
        fcntl.ioctl(handle, BLKRRPART, 0)
    except OSError:
        return
