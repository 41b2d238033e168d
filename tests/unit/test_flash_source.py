"""Reading images: archives that unpack to far more than they are, block maps by friend and foe, and bounded memory."""

from __future__ import annotations

import errno
import gzip
import hashlib
import lzma
import os
import re
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from flash_helpers import flashed
from hypothesis import given, settings
from hypothesis import strategies as st
from image_maker import make_image

from bmoe.protocol.errors import BmoeError, ImageError, LimitError, RefusedError, UnavailableError
from coordinator.flash import source as sources
from coordinator.flash import spool as spools
from coordinator.flash import write
from coordinator.flash.architecture import Programs
from coordinator.flash.bmap import Bmap, Range, RangeCheck, parse_bmap
from coordinator.flash.source import open_source, zstd
from coordinator.flash.spool import Spool

PACK = {"xz": lzma.compress, "zst": zstd.compress, "gz": gzip.compress}
BLOCK = 4096


def _packed_zeros(kind: str) -> bytes:
    """Eight streams in a row: packing one and repeating it is quicker than packing all."""
    return PACK[kind](bytes(6 << 20)) * 8


@pytest.mark.parametrize("kind", list(PACK))
def test_an_archive_of_nothing_but_zeros_is_read_in_small_pieces(kind: str, tmp_path: Path) -> None:
    """48 MiB out of some kilobytes: what is in memory at a time is bounded by us, not by who packed it."""
    path = tmp_path / f"bomb.img.{kind}"
    path.write_bytes(_packed_zeros(kind))
    tracemalloc.start()
    total = sum(len(chunk) for chunk in open_source(path).chunks())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total == 48 << 20 and peak < 32 << 20


@pytest.mark.parametrize("kind", list(PACK))
def test_what_follows_an_archive_is_another_stream_or_padding_and_never_ignored(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"odd.img.{kind}"
    for ending, whole in ((b"", True), (bytes(512), True), (b"garbage", False), (bytes(4) + b"garbage", False)):
        path.write_bytes(PACK[kind](b"image") + ending)
        if whole:
            assert b"".join(open_source(path).chunks()) == b"image"
            continue
        with pytest.raises(ImageError, match=r"odd\.img\.\w+ is (damaged|cut short)"):
            list(open_source(path).chunks())


def test_a_parallel_packers_frame_to_be_skipped_is_skipped_wherever_it_lies(tmp_path: Path) -> None:
    skipped, path = b"\x50\x2a\x4d\x18\x04\0\0\0size", tmp_path / "parallel.img.zst"
    for content in (
        skipped + zstd.compress(b"image"),
        zstd.compress(b"im") + skipped + zstd.compress(b"age") + skipped,
    ):
        path.write_bytes(content)
        assert b"".join(open_source(path).chunks()) == b"image"


def test_an_image_beyond_all_cards_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "IMAGE_BYTES", 1 << 20)
    path = tmp_path / "bomb.img.gz"
    path.write_bytes(gzip.compress(bytes(2 << 20)))
    with pytest.raises(LimitError, match="unpacks to more than"):
        list(open_source(path).chunks())


def test_an_archive_that_wants_more_memory_than_it_may_have_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "XZ_MEMORY", 4 << 20)
    path = tmp_path / "greedy.img.xz"
    path.write_bytes(lzma.compress(bytes(1 << 20), preset=9))
    with pytest.raises(ImageError, match="is damaged"):
        list(open_source(path).chunks())


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(list(PACK)), st.binary(max_size=200))
def test_any_bytes_behind_an_archives_head_are_unpacked_or_one_error(
    tmp_path_factory: pytest.TempPathFactory, kind: str, data: bytes
) -> None:
    path = tmp_path_factory.mktemp("any") / f"any.img.{kind}"
    path.write_bytes(PACK[kind](b"x")[:12] + data)
    try:
        list(open_source(path).chunks())
    except BmoeError as error:
        assert "\n" not in str(error)


def test_the_spool_keeps_what_is_not_zero_and_no_more_than_its_limit() -> None:
    with Spool(limit=1 << 20) as spool:
        spool.put(5 << 40, b"deep")
        spool.put(0, bytes(64 << 20))
        assert spool.read(5 << 40, 6) == b"deep\0\0" and spool.read(1 << 20, 3) == bytes(3)
        with pytest.raises(LimitError, match="hold more than 1 MiB"):
            spool.put(0, b"\1" * (2 << 20))


def test_a_full_disk_under_the_spool_is_one_line_that_says_where(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what a disk took only in part is written on."""
    real, calls = os.pwrite, []

    def full(handle: int, data: bytes, offset: int) -> int:
        calls.append(offset)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(handle, data[:100], offset)

    with Spool() as spool:
        monkeypatch.setattr(spools.os, "pwrite", full)
        spool.put(7, b"x" * 150)
        assert spool.read(7, 150) == b"x" * 150
        with pytest.raises(UnavailableError, match=r"No space left on device; TMPDIR names another place"):
            spool.put(0, b"y")


def test_programs_are_counted_wherever_their_file_system_put_them() -> None:
    programs = Programs()
    programs.feed(bytes(3 << 10) + b"\x7fELF\2\1\1" + bytes(9) + b"\2\0\xb7\0" + bytes(1004))
    programs.feed(b"\x7fELF\2\1\1" + bytes(9) + b"\1\0\x28\0" + bytes(2000))  # a kernel module counts for nothing
    assert programs.counts == {"aarch64": 1}
    assert Programs().processor(bytes(56) + b"ARM\x64") == "aarch64" and Programs().processor(None) == ""


# Block maps.


def bmap_of(image: Path, mapped: list[tuple[int, int]]) -> bytes:
    """A map as bmaptool writes it, for ranges of blocks, the last included."""
    data = image.read_bytes()
    digests = [hashlib.sha256(data[a * BLOCK : (b + 1) * BLOCK]).hexdigest() for a, b in mapped]
    ranges = "".join(f'<Range chksum="{d}">{a}-{b}</Range>' for (a, b), d in zip(mapped, digests, strict=True))
    body = (
        f'<?xml version="1.0" ?><bmap version="2.0"><ImageSize>{len(data)}</ImageSize><BlockSize>{BLOCK}</BlockSize>'
        f"<BlocksCount>{len(data) // BLOCK}</BlocksCount><MappedBlocksCount>0</MappedBlocksCount>"
        f"<ChecksumType>sha256</ChecksumType><BmapFileChecksum>{'0' * 64}</BmapFileChecksum>"
        f"<BlockMap>{ranges}</BlockMap></bmap>"
    ).encode()
    return body.replace(b"0" * 64, hashlib.sha256(body).hexdigest().encode(), 1)


def test_with_a_block_map_the_card_is_the_same_where_it_means_something(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make_image(tmp_path / "system.img", "trixie")
    plain, mapped = tmp_path / "1.img", tmp_path / "2.img"
    flashed(monkeypatch, made.path, plain)
    (tmp_path / "system.img.bmap").write_bytes(bmap_of(made.path, used(made.path)))
    said, facts = flashed(monkeypatch, made.path, mapped)
    assert any("with a block map" in line for line in said) and facts["verified"]
    assert mapped.read_bytes() == plain.read_bytes()


def used(image: Path) -> list[tuple[int, int]]:
    """The blocks that are not zero, as ranges."""
    data = image.read_bytes()
    blocks = [i for i in range(len(data) // BLOCK) if any(data[i * BLOCK : (i + 1) * BLOCK])]
    ranges = [(i, i) for i in blocks[:1]]
    for block in blocks[1:]:
        ranges[-1:] = [(ranges[-1][0], block)] if block == ranges[-1][1] + 1 else [ranges[-1], (block, block)]
    return ranges


def test_a_block_map_that_leaves_out_what_the_image_holds_is_another_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Heeded, it would leave what was on the card before in the middle of a file system; it may have no checksums at all."""
    made = make_image(tmp_path / "system.img")
    whole = bmap_of(made.path, used(made.path)[:-1])
    for data in (whole, re.sub(rb' chksum="[0-9a-f]+"|<BmapFileChecksum>.*</BmapFileChecksum>', b"", whole)):
        (tmp_path / "system.img.bmap").write_bytes(data)
        with pytest.raises(ImageError, match="leaves out bytes"):
            flashed(monkeypatch, made.path, tmp_path / "card.img")


@pytest.mark.parametrize("checked", [True, False])
def test_with_a_block_map_too_all_that_was_written_is_read_back(
    checked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A map may be one range from the first byte on, and may have no checksums: that is no leave to look away."""
    made, real = make_image(tmp_path / "system.img"), write._sync
    data = bmap_of(made.path, [(0, made.path.stat().st_size // BLOCK - 1)])
    if not checked:
        data = re.sub(rb' chksum="[0-9a-f]+"|<BmapFileChecksum>.*</BmapFileChecksum>', b"", data)
    (tmp_path / "system.img.bmap").write_bytes(data)

    def worn(handle: int) -> None:
        os.pwrite(handle, b"\x5a", made.root[0] + 5000)
        real(handle)

    monkeypatch.setattr(write, "_sync", worn)
    with pytest.raises(RefusedError, match="does not give back what was written"):
        flashed(monkeypatch, made.path, tmp_path / "card.img")


def test_a_block_map_for_an_image_of_another_size_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_image(tmp_path / "system.img")
    data = bmap_of(made.path, used(made.path)).replace(b"<ImageSize>10485760", b"<ImageSize>10489856")
    (tmp_path / "system.img.bmap").write_bytes(re.sub(rb"<BmapFileChecksum>.*</BmapFileChecksum>", b"", data))
    with pytest.raises(ImageError, match="unpacks to 10485760 bytes, its block map is for 10489856"):
        flashed(monkeypatch, made.path, tmp_path / "card.img")


def test_an_image_that_is_not_its_block_maps_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_image(tmp_path / "system.img")
    (tmp_path / "system.img.bmap").write_bytes(bmap_of(made.path, [(0, 2)]))
    data = bytearray(made.path.read_bytes())
    data[5000] ^= 1
    made.path.write_bytes(data)
    with pytest.raises(ImageError, match="are not those of its block map"):
        flashed(monkeypatch, made.path, tmp_path / "card.img")


GOOD = bmap_of(Path(__file__), [(0, 0)])
DIGEST = GOOD[GOOD.index(b"<BmapFileChecksum>") : GOOD.index(b"<BlockMap>")]
HOSTILE: list[tuple[bytes, str]] = [
    (GOOD.replace(b"<BlockSize>4096", b"<BlockSize>4097"), "own checksum is wrong"),
    (re.sub(rb"<BmapFileChecksum>[0-9a-f]+", b"<BmapFileChecksum>none", GOOD), "own checksum is none"),
    (GOOD.replace(b">0-0<", b">0-0</Range><Range>0<").replace(DIGEST, b""), "out of order or outside"),
    (GOOD.replace(b">0-0<", b">9-9<").replace(DIGEST, b""), "out of order or outside"),
    (GOOD.replace(b">0-0<", b">5-1<").replace(DIGEST, b""), "out of order or outside"),
    (b"<!DOCTYPE b [<!ENTITY a 'aaaa'>]><bmap>&a;</bmap>", "no document type"),
    (b"<bmap><ImageSize>1e9</ImageSize></bmap>", "cannot be read"),
    (b"<bmap>" * 3000, "cannot be read"),
    (b"", "cannot be read"),
]


@pytest.mark.parametrize(("data", "said"), HOSTILE)
def test_a_hostile_block_map_is_one_line(data: bytes, said: str) -> None:
    with pytest.raises(ImageError, match=said):
        parse_bmap(data)


@settings(deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes_are_a_block_map_or_one_error(data: bytes) -> None:
    with pytest.raises(ImageError):
        parse_bmap(data)


@settings(deadline=None)
@given(st.lists(st.tuples(st.text("0123456789- ", max_size=12), st.text("0a", max_size=2)), max_size=5))
def test_ranges_of_a_block_map_are_in_order_apart_and_inside_or_refused(spans: list[tuple[str, str]]) -> None:
    ranges = "".join(f'<Range chksum="{c}">{t}</Range>' for t, c in spans)
    xml = f"<bmap><ImageSize>100000</ImageSize><BlockSize>4096</BlockSize><BlockMap>{ranges}</BlockMap></bmap>"
    try:
        found = parse_bmap(xml.encode()).ranges
    except ImageError:
        return
    edges = [edge for span in found for edge in (span.begin, span.end)]
    assert edges == sorted(edges) and edges[-1] <= 100_000


@settings(deadline=None)
@given(st.lists(st.integers(1, 5000), min_size=1, max_size=8))
def test_a_range_is_checked_however_the_image_falls_into_pieces(sizes: list[int]) -> None:
    data = bytes(range(1, 251)) * 20 + bytes(4000) + bytes(range(1, 251)) * 24
    spans = tuple(
        Range(a, b, hashlib.sha256(data[a:b]).hexdigest()) for a, b in ((0, 100), (100, 5000), (9000, len(data)))
    )
    check: Any = RangeCheck(Bmap(len(data), spans))
    offset = 0
    for size in [*sizes, len(data)]:
        check.feed(offset, data[offset : offset + size])
        offset += size
    assert check._index == 3
