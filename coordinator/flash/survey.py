"""The first reading of an image: whole, sound and for this processor? What does its boot partition hold?

Nothing has been written by then, so that a damaged download costs nobody a card.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable
from dataclasses import dataclass

from bmoe.protocol.errors import BmoeError, ImageError
from coordinator.boards import Board
from coordinator.flash.architecture import Programs
from coordinator.flash.bmap import Bmap, RangeCheck, find_bmap
from coordinator.flash.fat import Fat
from coordinator.flash.partitions import HEAD_BYTES, Partition, partitions
from coordinator.flash.source import Source
from coordinator.flash.spool import Spool

Progress = Callable[[int, int], None]
NOCLOUD = "CIDATA"  # the label of a file system that cloud-init looks for, whatever else is on it
CLOUD_INIT = b"cloud-init-local.service"  # what dpkg keeps of a package names its files


@dataclass(frozen=True)
class Survey:
    """What is known of an image. `raw_sha256` is that of the unpacked image, `processor` "" where nothing told it, `label`
    that of the boot partition, which it does not have yet where `relabel`."""

    image_bytes: int
    raw_sha256: str
    file_sha256: str
    partitions: tuple[Partition, ...]
    boot: Partition
    label: str
    method: str
    processor: str
    bmap: Bmap | None
    relabel: bool = False


def survey(source: Source, board: Board, spool: Spool, sha256: str | None, progress: Progress) -> Survey:
    """Read the image once. Raises ImageError with the first thing that is wrong with it, and what reading raises."""
    bmap = find_bmap(source.path)
    check = RangeCheck(bmap) if bmap else None
    digest, programs, offset = hashlib.sha256(), Programs(), 0
    table: list[Partition] = []
    cloud_init = False
    for chunk in source.chunks():
        if offset == 0:
            table = partitions(chunk[:HEAD_BYTES])
        digest.update(chunk)
        programs.feed(chunk)
        cloud_init = cloud_init or CLOUD_INIT in chunk
        if check:
            check.feed(offset, chunk)
        for partition in table:
            begin, end = max(partition.offset, offset), min(partition.end, offset + len(chunk))
            if partition.fat and begin < end:
                spool.put(begin, memoryview(chunk)[begin - offset : end - offset])
        offset += len(chunk)
        progress(source.read_bytes, source.file_bytes)
    progress(source.file_bytes, source.file_bytes)
    _whole(source, sha256, table, offset, bmap)
    boot, fat, relabel = _boot_partition(board, table, spool)
    processor = programs.processor(_kernel_head(fat))
    if processor and processor != board.arch:
        raise ImageError(f"{source.path.name} is for {processor}, {board.title} runs {board.arch}")
    if relabel and not cloud_init:
        raise ImageError(
            f"{source.path.name} holds no cloud-init, by which its first boot would be reached: of Debian's own images "
            "those called generic and genericcloud have it"
        )
    return Survey(
        offset, digest.hexdigest(), source.file_sha256, tuple(table), boot, NOCLOUD if relabel else fat.label,
        "cloud-init" if relabel else _method(board, fat), processor, bmap, relabel,
    )  # fmt: skip


def _whole(source: Source, sha256: str | None, table: list[Partition], size: int, bmap: Bmap | None) -> None:
    if sha256 is not None and source.file_sha256 != sha256:
        raise ImageError(f"{source.path} has the SHA-256 {source.file_sha256}, expected {sha256}: download it again")
    if bmap is not None and bmap.image_bytes != size:
        raise ImageError(f"{source.path} unpacks to {size} bytes, its block map is for {bmap.image_bytes}")
    for partition in table:
        if partition.end > size:
            raise ImageError(
                f"{source.path} is cut short: partition {partition.number} ends at byte {partition.end}, "
                f"the image at {size}"
            )


def _boot_partition(board: Board, table: list[Partition], spool: Spool) -> tuple[Partition, Fat, bool]:
    """The partition that takes the files, and whether it must be labelled: Debian's images have none that is, but an EFI
    system partition."""
    seen: list[str] = []
    efi: list[tuple[Partition, Fat]] = []
    for partition in table:
        if not partition.fat:
            continue
        try:
            fat = Fat(spool, partition.offset, partition.size)
            label = fat.label
        except BmoeError as error:
            seen.append(f"partition {partition.number}: {error}")
            continue
        if label in board.image.boot_labels:
            return partition, fat, False
        if partition.efi:
            efi.append((partition, fat))
        seen.append(f"partition {partition.number} is labelled {label!r}")
    if "debian" in board.image.families and len(efi) == 1:
        return *efi[0], True
    wanted = " or ".join(board.image.boot_labels)
    raise ImageError(
        f"the image has no FAT partition labelled {wanted}, where {board.title} looks at its first boot "
        f"({'; '.join(seen) or 'it has no FAT partition at all'}): is it for this board?"
    )


def _kernel_head(fat: Fat) -> bytes | None:
    for name in ("kernel8.img", "kernel_2712.img", "vmlinuz"):
        head = fat.head(name, 64 * 1024)
        if head is not None:
            return _gunzipped(head) if head[:2] == b"\x1f\x8b" else head
    return None


def _gunzipped(head: bytes) -> bytes:
    try:
        return zlib.decompressobj(31).decompress(head, 4096)
    except zlib.error:
        return b""


def _method(board: Board, fat: Fat) -> str:
    """How the image wants to be told: cloud-init where its files are there, firstrun.sh where only a cmdline.txt is."""
    methods = board.image.first_boot
    if "cloud-init" in methods and any(map(fat.exists, ("user-data", "meta-data", "network-config"))):
        return "cloud-init"
    if "firstrun" in methods and fat.exists("cmdline.txt"):
        return "firstrun"
    if "cloud-init" in methods and fat.label.lower() == "cidata":
        return "cloud-init"
    raise ImageError(
        "the boot partition has neither user-data nor cmdline.txt: no way is known to reach its first boot"
    )
