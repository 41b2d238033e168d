"""Hostile bytes for flashing: profiles, partition tables, FAT file systems, block maps and archives that strangers made."""

from __future__ import annotations

import functools
import gzip
import hashlib
import lzma
import tempfile
from collections.abc import Sequence
from pathlib import Path

from image_maker import PLAIN, make_fat, make_image
from target import MEGABYTE, Target, in_file

from bmoe.protocol.errors import ConfigError, ImageError, LimitError
from bmoe.storage.packaged import packaged
from coordinator.boards import check_board
from coordinator.flash.bmap import parse_bmap
from coordinator.flash.fat import Fat
from coordinator.flash.partitions import partitions
from coordinator.flash.source import open_source, zstd

FRONT = 96 * 1024  # the boot sector, both tables, the root folder and the first files


class _Image:
    def __init__(self, data: bytes) -> None:
        self._data = data

    def read(self, offset: int, size: int) -> bytes:
        return self._data[offset : offset + size].ljust(size, b"\0")


def _profile(data: bytes) -> None:
    check_board(in_file("rpi5.toml", data))


def _table(data: bytes) -> None:
    partitions(data)


def _fat(data: bytes) -> None:
    fat = Fat(_Image(data), 0, 4 * MEGABYTE)
    for name in fat.names():
        fat.read(name)
    fat.write("bmoe/token", b"t" * 600)
    list(fat.changes())


def _bmap(data: bytes) -> None:
    parse_bmap(data)


def _archive(data: bytes) -> None:
    for _ in open_source(in_file("any.img.xz", data)).chunks():
        pass


@functools.cache
def _heads() -> Sequence[bytes]:
    with tempfile.TemporaryDirectory() as folder:
        images = [make_image(Path(folder) / f"{gpt}.img", gpt=gpt).path for gpt in (False, True)]
        return [image.read_bytes()[: 20 * 1024] for image in images]


def _maps() -> Sequence[bytes]:
    ranges = f'<Range chksum="{hashlib.sha256(b"x").hexdigest()}">0-3</Range><Range>7</Range>'
    return [
        f"<bmap><ImageSize>99999</ImageSize><BlockSize>4096</BlockSize><BlockMap>{ranges}</BlockMap></bmap>".encode()
    ]


IMAGE = (ImageError, LimitError)
TARGETS = (
    Target("board-profile", _profile, lambda: [(packaged("firmware_configs", "boards") / "rpi5.toml").read_bytes()],
           (ConfigError,)),
    Target("partition-table", _table, _heads, (ImageError,)),
    Target("fat", _fat, lambda: [make_fat("bootfs", PLAIN, 16)[:FRONT]], IMAGE, memory=24 * MEGABYTE),
    Target("block-map", _bmap, _maps, (ImageError,)),
    Target("image-archive", _archive, lambda: [pack(b"image" * 99) for pack in (lzma.compress, gzip.compress, zstd.compress)],
           IMAGE, memory=48 * MEGABYTE),
)  # fmt: skip
