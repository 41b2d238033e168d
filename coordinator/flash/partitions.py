"""Partition tables of disk images, MBR and GPT, read from the first bytes alone. Pure, and bounded whatever they say.

Sources: UEFI specification 2.10, chapter 5 (protective MBR, GPT header and entries, CRCs); the classic MBR layout.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from itertools import pairwise
from uuid import UUID

from bmoe.protocol.errors import ImageError

SECTOR = 512
HEAD_BYTES = 1 << 20  # holds the MBR, the GPT header and up to 8 K of its entries
ENTRIES_MAX = 1024
FAT_TYPES = frozenset({0x01, 0x04, 0x06, 0x0B, 0x0C, 0x0E, 0xEF})
EXTENDED = frozenset({0x05, 0x0F, 0x85})
PROTECTIVE, EFI = 0xEE, 0xEF
_EFI_GUID = UUID("c12a7328-f81f-11d2-ba4b-00a0c93ec93b")
_FAT_GUIDS = frozenset({_EFI_GUID, UUID("ebd0a0a2-b9e5-4433-87c0-68b6b72699c7")})  # the second: basic data


@dataclass(frozen=True)
class Partition:
    """One partition, in bytes from the image's begin; `fat` says that its type is one of FAT's, `efi` that it is that of the
    EFI system partition."""

    number: int
    offset: int
    size: int
    fat: bool
    efi: bool = False

    @property
    def end(self) -> int:
        """The first byte behind it."""
        return self.offset + self.size


def partitions(head: bytes) -> list[Partition]:
    """The partitions that an image's first `HEAD_BYTES` name, by offset; logical ones left out. Raises ImageError."""
    if len(head) < SECTOR or head[510:512] != b"\x55\xaa":
        raise ImageError("the image has no partition table: expected a whole disk's image, .img, that begins with one")
    found = _mbr(head)
    protective = any(kind == PROTECTIVE for kind, _ in found)
    table = _gpt(head) if protective else [p for kind, p in found if kind not in EXTENDED]
    table.sort(key=lambda partition: partition.offset)
    for before, after in pairwise(table):
        if after.offset < before.end:
            raise ImageError(f"the image's partitions {before.number} and {after.number} overlap")
    if not table:
        raise ImageError("the image's partition table is empty")
    return table


def _mbr(head: bytes) -> list[tuple[int, Partition]]:
    found = []
    for index in range(4):
        entry = head[446 + 16 * index : 462 + 16 * index]
        kind, (start, count) = entry[4], struct.unpack("<II", entry[8:16])
        if kind and count:
            found.append((kind, Partition(index + 1, start * SECTOR, count * SECTOR, kind in FAT_TYPES, kind == EFI)))
    if any(partition.offset == 0 and kind != PROTECTIVE for kind, partition in found):
        raise ImageError("a partition begins at the image's first byte, where its table is")
    return found


def _gpt(head: bytes) -> list[Partition]:
    header = head[SECTOR : 2 * SECTOR]
    if header[:8] != b"EFI PART" or len(header) < SECTOR:
        raise ImageError("the image's MBR promises a GPT, and there is none")
    size, crc = struct.unpack("<II", header[12:20])
    if not 92 <= size <= SECTOR or zlib.crc32(header[:16] + bytes(4) + header[20:size]) != crc:
        raise ImageError("the image's GPT header is damaged: its checksum is wrong")
    entries_lba, count, width, entries_crc = struct.unpack("<QIII", header[72:92])
    if not 1 <= count <= ENTRIES_MAX or width not in (128, 256, 512):
        raise ImageError(f"the image's GPT has {count} entries of {width} bytes: at most {ENTRIES_MAX} are read")
    begin, length = entries_lba * SECTOR, count * width
    if begin < 2 * SECTOR or begin + length > len(head):
        raise ImageError(f"the image's GPT entries lie at byte {begin}, beyond its first {len(head)}")
    raw = head[begin : begin + length]
    if zlib.crc32(raw) != entries_crc:
        raise ImageError("the image's GPT entries are damaged: their checksum is wrong")
    found = []
    for index in range(count):
        entry = raw[index * width : index * width + 128]
        first, last = struct.unpack("<QQ", entry[32:48])
        if any(entry[:16]):
            if last < first or first * SECTOR < begin + length:
                raise ImageError(f"the image's GPT entry {index + 1} spans sectors {first} to {last}")
            kind, size = UUID(bytes_le=entry[:16]), (last - first + 1) * SECTOR
            found.append(Partition(index + 1, first * SECTOR, size, kind in _FAT_GUIDS, kind == _EFI_GUID))
    return found
