"""The geometry of a FAT file system, and its allocation table in memory: chains, free clusters, what has changed."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from bmoe.protocol.errors import ImageError, LimitError

TABLE_BYTES = 64 << 20


@dataclass(frozen=True)
class Geometry:
    """What the boot sector says, in sectors from the file system's begin if not named otherwise."""

    bits: int
    sector_bytes: int
    cluster_sectors: int
    reserved: int
    tables: int
    table_sectors: int
    root_at: int
    root_sectors: int
    data_at: int
    clusters: int
    root_cluster: int
    information_sector: int
    boot_copy: int
    label: str

    @property
    def cluster_bytes(self) -> int:
        """Bytes of one cluster."""
        return self.cluster_sectors * self.sector_bytes

    @property
    def table_at(self) -> int:
        """Byte at which the first table begins."""
        return self.reserved * self.sector_bytes

    @property
    def table_bytes(self) -> int:
        """Bytes of one table."""
        return self.table_sectors * self.sector_bytes

    def sectors(self, cluster: int) -> range:
        """The sectors of a cluster."""
        first = self.data_at + (cluster - 2) * self.cluster_sectors
        return range(first, first + self.cluster_sectors)


def parse_geometry(boot: bytes, size: int) -> Geometry:
    """What a boot sector says of a file system of `size` bytes; raises ImageError for what FAT does not allow."""
    width, per_cluster, reserved, tables, root_entries, small = struct.unpack("<HBHBHH", boot[11:21])
    (short_table,) = struct.unpack("<H", boot[22:24])
    (large,) = struct.unpack("<I", boot[32:36])
    (long_table,) = struct.unpack("<I", boot[36:40])
    total, table = small or large, short_table or long_table
    sane = width in (512, 1024, 2048, 4096) and per_cluster in (1, 2, 4, 8, 16, 32, 64, 128)
    if boot[510:512] != b"\x55\xaa" or not sane or not reserved or tables not in (1, 2) or not table:
        raise ImageError("the boot partition holds no FAT file system")
    root_sectors = -(-root_entries * 32 // width)
    root_at = reserved + tables * table
    data_at = root_at + root_sectors
    if total * width > size or data_at >= total:
        raise ImageError(f"the boot partition's FAT says {total * width} bytes, its partition has {size}")
    clusters = (total - data_at) // per_cluster
    bits = 12 if clusters < 4085 else 16 if clusters < 65525 else 32
    if short_table == 0 and root_entries == 0:
        bits = 32  # as Linux decides: some makers of small images break the specification's count
    if table * width > TABLE_BYTES or (clusters + 2) * bits > table * width * 8:
        raise ImageError(f"the boot partition's FAT of {table} sectors does not fit its {clusters} clusters")
    flags, _, root_cluster, information, copy = struct.unpack("<HHIHH", boot[40:52]) if bits == 32 else (0,) * 5
    if flags & 0x80:
        raise ImageError("the boot partition's FAT is not mirrored: not supported")
    if bits == 32 and not 2 <= root_cluster < clusters + 2:
        raise ImageError("the boot partition's FAT has its root folder nowhere")
    label = boot[71:82] if bits == 32 else boot[43:54]
    return Geometry(
        bits, width, per_cluster, reserved, tables, table, root_at, root_sectors, data_at, clusters, root_cluster,
        information if 0 < information < reserved else 0, copy if 0 < copy < reserved else 0,
        label.decode("ascii", "replace").strip("\0 "),
    )  # fmt: skip


class Table:
    """The allocation table: which cluster follows which."""

    def __init__(self, geometry: Geometry, raw: bytes) -> None:
        self._geometry, self._raw, self._before = geometry, bytearray(raw), raw
        self._last = {12: 0xFFF, 16: 0xFFFF, 32: 0x0FFFFFFF}[geometry.bits]
        self._touched: set[int] = set()
        self.hint = 2
        self._search = 2  # no cluster below is free
        self.free = self._count_free()

    @property
    def is_changed(self) -> bool:
        """Whether anything was allocated or released."""
        return bool(self._touched)

    def chain(self, first: int) -> Iterator[int]:
        """The clusters that follow from `first`, none of them kept, since there may be many. Raises ImageError where
        they leave the table, or never end."""
        cluster, passed = first, 0
        while cluster < self._last - 7:
            if not 2 <= cluster < self._geometry.clusters + 2 or passed > self._geometry.clusters:
                raise ImageError("the boot partition's FAT is damaged: a chain of clusters leads nowhere")
            following, passed = self._get(cluster), passed + 1
            yield cluster
            cluster = following

    def allocate(self, count: int) -> list[int]:
        """A new chain of `count` clusters; raises LimitError where so many are not free."""
        if count > self.free:
            width = self._geometry.cluster_bytes
            raise LimitError(f"the boot partition has {self.free * width} bytes free, {count * width} are wanted")
        found: list[int] = []
        while len(found) < count:
            if self._get(self._search) == 0:
                found.append(self._search)
            self._search += 1
        for cluster, following in zip(found, [*found[1:], self._last], strict=False):
            self._set(cluster, following)
        self.free -= count
        self.hint = max(self.hint, found[-1]) if found else self.hint
        return found

    def release(self, first: int) -> None:
        """Make a chain's clusters free; raises ImageError as `chain` does."""
        for cluster in self.chain(first) if first else ():
            self._set(cluster, 0)
            self._search = min(self._search, cluster)
            self.free += 1

    def extend(self, first: int) -> int:
        """Add one cluster to a chain, and say which."""
        *_, last = self.chain(first)
        [added] = self.allocate(1)
        self._set(last, added)
        return added

    def changed_sectors(self) -> Iterator[tuple[int, bytes]]:
        """(sector, content) of each changed sector of each copy of the table."""
        width = self._geometry.sector_bytes
        for number in sorted(self._touched):
            content = bytes(self._raw[number * width : (number + 1) * width])
            if content == self._before[number * width : (number + 1) * width]:
                continue
            for copy in range(self._geometry.tables):
                yield self._geometry.reserved + copy * self._geometry.table_sectors + number, content

    def _count_free(self) -> int:
        end = self._geometry.clusters + 2
        if self._geometry.bits == 12:
            return sum(self._get(cluster) == 0 for cluster in range(2, end))
        entries = np.frombuffer(self._raw, "<u4" if self._geometry.bits == 32 else "<u2", end)[2:]
        return int(np.count_nonzero((entries & self._last) == 0))

    def _get(self, cluster: int) -> int:
        if self._geometry.bits == 32:
            return int.from_bytes(self._raw[4 * cluster : 4 * cluster + 4], "little") & 0x0FFFFFFF
        if self._geometry.bits == 16:
            return int.from_bytes(self._raw[2 * cluster : 2 * cluster + 2], "little")
        pair = int.from_bytes(self._raw[cluster * 3 // 2 : cluster * 3 // 2 + 2], "little")
        return pair >> 4 if cluster & 1 else pair & 0xFFF

    def _set(self, cluster: int, value: int) -> None:
        bits, raw = self._geometry.bits, self._raw
        at = cluster * bits // 8
        if bits == 32:  # the upper four bits are not ours
            value |= raw[at + 3] >> 4 << 28
        if bits == 12:
            pair = int.from_bytes(raw[at : at + 2], "little")
            value = (pair & 0x000F) | value << 4 if cluster & 1 else (pair & 0xF000) | value
        length = 4 if bits == 32 else 2
        raw[at : at + length] = value.to_bytes(length, "little")
        width = self._geometry.sector_bytes
        self._touched.update({at // width, (at + length - 1) // width})
