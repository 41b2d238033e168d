"""A FAT file system in an image, read and changed without mounting it: files of the root and of folders below it.

FAT12, FAT16 and FAT32 with long names. Changes are kept in memory and come out as (offset, bytes) of whole sectors, so
that a plan can be shown before anything is written. Source: Microsoft's FAT specification 1.03; docs/decisions/0015.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

from bmoe.protocol.errors import ImageError, LimitError
from coordinator.flash.fat_names import Entry, directory_entries, parse_entries, short_name_for
from coordinator.flash.fat_table import Geometry, Table, parse_geometry

FILE_BYTES = 256 << 20
FOLDER_BYTES = 2 << 20  # the specification's own limit: 65,536 entries of 32 bytes
ENTRY = 32
FOLDER = 0x10


class Readable(Protocol):
    """Random access to an image."""

    def read(self, offset: int, size: int) -> bytes: ...


@dataclass(frozen=True)
class _Folder:
    """Where a folder's entries lie: a chain of clusters, or the fixed root of FAT12 and FAT16 (first 0)."""

    first: int


class Fat:
    """One FAT file system at `offset` of an image. Raises ImageError for what is none, or is damaged."""

    def __init__(self, image: Readable, offset: int, size: int) -> None:
        self._image, self._offset = image, offset
        self.geometry: Geometry = parse_geometry(image.read(offset, 512), size)
        raw = image.read(offset + self.geometry.table_at, self.geometry.table_bytes)
        self._table = Table(self.geometry, raw)
        self._changed: dict[int, bytes] = {}  # sector number -> content
        self._root = _Folder(self.geometry.root_cluster)

    @property
    def label(self) -> str:
        """The volume's label: that of the root folder, else that of the boot sector."""
        for entry in self._entries(self._root):
            if entry.attributes & 0x0F == 0x08:
                return entry.short.decode("ascii", "replace").strip()
        return self.geometry.label

    def free_bytes(self) -> int:
        """Room for further files."""
        return self._table.free * self.geometry.cluster_bytes

    def names(self, path: str = "") -> list[str]:
        """The names in a folder, empty for one that is not there."""
        folder = self._folder(path.split("/")) if path else self._root
        return [] if folder is None else [e.name for e in self._entries(folder) if e.shown]

    def exists(self, path: str) -> bool:
        """Whether there is a file or a folder of that path, as FAT compares: without regard to case."""
        return self._find(path) is not None

    def read(self, path: str, limit: int = 1 << 20) -> bytes | None:
        """A file's content, None where there is none; raises LimitError beyond `limit`, ImageError for a damaged one."""
        entry = self._find(path)
        if entry is None or entry.attributes & FOLDER:
            return None
        if entry.size > limit:
            raise LimitError(f"{path} of the boot partition has {entry.size} bytes, more than the {limit} looked at")
        return self._content(entry, entry.size, path)

    def head(self, path: str, size: int) -> bytes | None:
        """The first bytes of a file, None where there is none."""
        entry = self._find(path)
        return None if entry is None or entry.attributes & FOLDER else self._content(entry, min(size, entry.size), path)

    def write(self, path: str, data: bytes, stamp: tuple[int, int] = (0x21, 0)) -> None:
        """Put a file, with its folders, in place of one of that name. `stamp` is FAT's date and time.

        Raises LimitError where there is no room.
        """
        if len(data) > FILE_BYTES:
            raise LimitError(f"{path} has {len(data)} bytes; at most {FILE_BYTES} are put on a boot partition")
        folder, name = self._made(path, stamp)
        found = self._lookup(folder, name)
        if found is not None and found.attributes & FOLDER:
            raise ImageError(f"{path} is a folder on the boot partition")
        if found is not None:
            self._table.release(found.cluster)
        first = self._store(data)
        if found is None:
            self._add(folder, name, first, len(data), 0x20, stamp)
        else:
            self._update(folder, found, first, len(data), stamp)

    def set_label(self, label: str, stamp: tuple[int, int] = (0x21, 0)) -> None:
        """Name the file system, in its root folder and in the boot sector with its copy. Raises LimitError for no room."""
        name = label.ljust(11).encode("ascii")
        found = next((entry for entry in self._entries(self._root) if entry.attributes & 0x0F == 0x08), None)
        if found is None:
            self._enter(self._root, _entry(name, 0, 0, 0x08, stamp))
        else:
            self._put_bytes(self._sectors(self._root), found.at, name)
        at = 71 if self.geometry.bits == 32 else 43
        for sector in (0, self.geometry.boot_copy) if self.geometry.boot_copy else (0,):
            if self._sector(sector)[at - 5] == 0x29:  # else the sector is of a time before labels
                self._put_bytes([sector], at, name)

    def changes(self) -> Iterator[tuple[int, bytes]]:
        """What differs from the image, as (offset in the image, whole sectors)."""
        changed = dict(self._changed)
        for sector, content in self._table.changed_sectors():
            changed[sector] = content
        information = self.geometry.information_sector
        if information and self._table.is_changed:
            raw = bytearray(self._sector(information))
            if raw[:4] == b"RRaA" and raw[484:488] == b"rrAa":
                struct.pack_into("<II", raw, 488, self._table.free, self._table.hint)
                changed[information] = bytes(raw)
        for sector in sorted(changed):
            yield self._offset + sector * self.geometry.sector_bytes, changed[sector]

    # Folders.

    def _find(self, path: str) -> Entry | None:
        *folders, name = path.split("/")
        folder = self._folder(folders)
        return None if folder is None else self._lookup(folder, name)

    def _folder(self, names: list[str]) -> _Folder | None:
        folder = self._root
        for name in names:
            entry = self._lookup(folder, name)
            if entry is None or not entry.attributes & FOLDER:
                return None
            folder = _Folder(entry.cluster)
        return folder

    def _lookup(self, folder: _Folder, name: str) -> Entry | None:
        wanted = name.lower()
        return next((e for e in self._entries(folder) if e.shown and wanted in (e.name.lower(), e.dos.lower())), None)

    def _entries(self, folder: _Folder) -> list[Entry]:
        return parse_entries(b"".join(self._sector(sector) for sector in self._sectors(folder)))

    def _sectors(self, folder: _Folder) -> list[int]:
        """The sectors that hold a folder's entries, in order."""
        if folder.first == 0:
            return list(range(self.geometry.root_at, self.geometry.root_at + self.geometry.root_sectors))
        sectors: list[int] = []
        for cluster in self._table.chain(folder.first):
            sectors += self.geometry.sectors(cluster)
            if len(sectors) * self.geometry.sector_bytes > FOLDER_BYTES:
                raise ImageError(f"a folder of the boot partition has more than {FOLDER_BYTES} bytes, or never ends")
        return sectors

    def _made(self, path: str, stamp: tuple[int, int]) -> tuple[_Folder, str]:
        """The folder that holds `path`, made where it was missing, and the last name."""
        *folders, name = path.split("/")
        folder = self._root
        for part in folders:
            entry = self._lookup(folder, part)
            if entry is None:
                folder = self._make_folder(folder, part, stamp)
            elif entry.attributes & FOLDER:
                folder = _Folder(entry.cluster)
            else:
                raise ImageError(f"{part} of {path} is a file on the boot partition, not a folder")
        return folder, name

    def _make_folder(self, parent: _Folder, name: str, stamp: tuple[int, int]) -> _Folder:
        first = self._store(bytes(self.geometry.cluster_bytes))
        up = 0 if parent == self._root else parent.first
        dots = b"".join(_entry(short, first if short[1:2] == b" " else up, 0, FOLDER, stamp) for short in _DOTS)
        self._put_bytes(self._sectors(_Folder(first)), 0, dots)
        self._add(parent, name, first, 0, FOLDER, stamp)
        return _Folder(first)

    def _add(self, folder: _Folder, name: str, first: int, size: int, attributes: int, stamp: tuple[int, int]) -> None:
        """Enter a new name."""
        short = short_name_for(name, {e.short for e in self._entries(folder)})
        self._enter(folder, directory_entries(name, short) + _entry(short, first, size, attributes, stamp))

    def _enter(self, folder: _Folder, raw: bytes) -> None:
        """Put entries into the first gap that is long enough."""
        sectors = self._sectors(folder)
        content = b"".join(map(self._sector, sectors))
        at = _gap(content, len(raw))
        if at is None:
            at = _end(content)
            sectors = self._grown(folder, sectors, at + len(raw))
        if _end(content) < at + len(raw) < len(content):  # what lay behind the end mark is not to be seen now
            raw += bytes(ENTRY)
        self._put_bytes(sectors, at, raw)

    def _grown(self, folder: _Folder, sectors: list[int], size: int) -> list[int]:
        """A folder's sectors after it was made long enough."""
        if folder.first == 0:
            raise LimitError("the boot partition's root folder is full: an image with FAT32 has room for more files")
        while len(sectors) * self.geometry.sector_bytes < size:
            cluster = self._table.extend(folder.first)
            for sector in self.geometry.sectors(cluster):
                self._changed[sector] = bytes(self.geometry.sector_bytes)
                sectors.append(sector)
        return sectors

    def _update(self, folder: _Folder, entry: Entry, first: int, size: int, stamp: tuple[int, int]) -> None:
        sectors = self._sectors(folder)
        content = bytearray(b"".join(map(self._sector, sectors)))
        raw = content[entry.at : entry.at + ENTRY]
        struct.pack_into("<HHHHI", raw, 20, first >> 16, stamp[1], stamp[0], first & 0xFFFF, size)
        self._put_bytes(sectors, entry.at, bytes(raw))

    # Bytes.

    def _content(self, entry: Entry, size: int, path: str) -> bytes:
        wanted = -(-size // self.geometry.cluster_bytes)
        clusters = list(islice(self._table.chain(entry.cluster), wanted)) if entry.cluster else []
        if len(set(clusters)) < wanted:
            raise ImageError(f"{path} of the boot partition is damaged: not all of its {size} bytes are there")
        sectors = (sector for cluster in clusters for sector in self.geometry.sectors(cluster))
        return b"".join(map(self._sector, sectors))[:size]

    def _store(self, data: bytes) -> int:
        """Put data into free clusters; the first one, 0 for no data. Raises LimitError."""
        width = self.geometry.cluster_bytes
        chain = self._table.allocate(-(-len(data) // width))
        for index, cluster in enumerate(chain):
            block = data[index * width : (index + 1) * width].ljust(width, b"\0")
            for number, sector in enumerate(self.geometry.sectors(cluster)):
                begin = number * self.geometry.sector_bytes
                self._changed[sector] = block[begin : begin + self.geometry.sector_bytes]
        return chain[0] if chain else 0

    def _put_bytes(self, sectors: list[int], at: int, raw: bytes) -> None:
        width = self.geometry.sector_bytes
        for number in range(at // width, (at + len(raw) - 1) // width + 1):
            content = bytearray(self._sector(sectors[number]))
            begin = max(at, number * width)
            end = min(at + len(raw), (number + 1) * width)
            content[begin - number * width : end - number * width] = raw[begin - at : end - at]
            self._changed[sectors[number]] = bytes(content)

    def _sector(self, number: int) -> bytes:
        width = self.geometry.sector_bytes
        kept = self._changed.get(number)
        return self._image.read(self._offset + number * width, width) if kept is None else kept


_DOTS = (b".          ", b"..         ")


def _entry(short: bytes, first: int, size: int, attributes: int, stamp: tuple[int, int]) -> bytes:
    date, time = stamp
    head = struct.pack(
        "<11sBBBHHHHHHH", short, attributes, 0, 0, time, date, date, first >> 16, time, date, first & 0xFFFF
    )
    return head + struct.pack("<I", size)


def _gap(content: bytes, size: int) -> int | None:
    """Where the first run of unused entries of `size` bytes begins within a folder's content."""
    begin, at = None, 0
    while at < len(content):
        mark = content[at]
        if mark == 0:  # nothing behind this entry is used
            begin = at if begin is None else begin
            return begin if len(content) - begin >= size else None
        begin = (at if begin is None else begin) if mark == 0xE5 else None
        at += ENTRY
        if begin is not None and at - begin >= size:
            return begin
    return None


def _end(content: bytes) -> int:
    """The first unused entry, or the content's end."""
    used = (at for at in range(0, len(content), ENTRY) if content[at] == 0)
    return next(used, len(content))
