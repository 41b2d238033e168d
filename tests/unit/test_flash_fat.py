"""The FAT writer: against a maker written apart from it, against mtools, under random work, and on hostile bytes."""

from __future__ import annotations

import struct
import subprocess
import tracemalloc
import zlib
from pathlib import Path
from uuid import UUID

import pytest
from flash_helpers import check_fat
from hypothesis import given, settings
from hypothesis import strategies as st
from image_maker import BOOKWORM, PLAIN, SECTOR, make_fat, tool

from bmoe.protocol.errors import BmoeError, ImageError, LimitError
from coordinator.flash.fat import Fat
from coordinator.flash.fat_names import parse_entries, short_name_for
from coordinator.flash.partitions import partitions

SMALL = make_fat("bootfs", PLAIN, 16)
LARGE = make_fat("bootfs", PLAIN, 32)
NAMES = st.text("abcXYZ019._-", min_size=1, max_size=20).filter(lambda n: n.strip(". ") == n)


class Bytes:
    """An image in memory."""

    def __init__(self, data: bytes) -> None:
        self.data = bytearray(data)

    def read(self, offset: int, size: int) -> bytes:
        return bytes(self.data[offset : offset + size]).ljust(size, b"\0")

    def apply(self, fat: Fat) -> None:
        for offset, data in fat.changes():
            self.data[offset : offset + len(data)] = data


@pytest.mark.parametrize(("files", "bits"), [(PLAIN, 16), (BOOKWORM, 32)])
def test_what_another_wrote_is_read(files: dict[str, bytes], bits: int) -> None:
    fat = Fat(Bytes(raw := make_fat("bootfs", files, bits)), 0, len(raw))
    assert fat.label == "bootfs" and {path: fat.read(path) for path in files} == files
    assert fat.read("CMDLINE.TXT") == files["cmdline.txt"], "FAT has no case"
    assert fat.read("nothing") is None and fat.read("overlays") is None and fat.names("overlays") == ["README"]
    with pytest.raises(LimitError):
        fat.read("config.txt", limit=10)


def sound(image: Bytes) -> Fat:
    """Both tables alike, no cluster in two chains, none lost, and the counter of free ones true."""
    fat = Fat(image, 0, len(image.data))
    geometry, seen = fat.geometry, set()

    def walk(path: str) -> None:
        for name in fat.names(path):
            inner = f"{path}/{name}".lstrip("/")
            entry = fat._find(inner)
            assert entry is not None
            chain = list(fat._table.chain(entry.cluster)) if entry.cluster else []
            assert not seen & set(chain) and len(chain) == len(set(chain))
            seen.update(chain)
            if entry.attributes & 0x10:
                walk(inner)

    walk("")
    root = fat._table.chain(geometry.root_cluster) if geometry.root_cluster else []
    assert geometry.clusters - fat._table.free == len(seen | set(root))
    begin, size = geometry.table_at, geometry.table_bytes
    assert image.data[begin : begin + size] == image.data[begin + size : begin + 2 * size]
    return fat


@settings(max_examples=12, deadline=None)
@given(st.lists(st.tuples(NAMES, st.booleans(), st.integers(0, 3000)), max_size=12))
def test_whatever_is_written_in_whatever_order_is_read_back_and_the_file_system_stays_sound(
    work: list[tuple[str, bool, int]],
) -> None:
    image, wanted = Bytes(SMALL), dict(PLAIN)
    for number, (name, deep, size) in enumerate(work):
        path = f"bmoe/{name}" if deep else name
        if not deep and (name.lower() in ("bmoe", "overlays") or _other_case(wanted, path)):
            continue
        path = _other_case(wanted, path) or path
        fat = Fat(image, 0, len(SMALL))
        wanted[path] = bytes([number + 1]) * size
        fat.write(path, wanted[path])
        image.apply(fat)
    fat = sound(image)
    assert {path: fat.read(path) for path in wanted} == wanted


def _other_case(wanted: dict[str, bytes], path: str) -> str | None:
    return next((known for known in wanted if known.lower() == path.lower()), None)


def test_a_folder_grows_and_a_full_root_of_fat16_is_one_clear_line(tmp_path: Path) -> None:
    image = Bytes(SMALL)
    fat = Fat(image, 0, len(SMALL))
    for number in range(25):
        fat.write(f"bmoe/wheels/{'a rather long name of a wheel ' * 5}{number}.whl", b"x")
    image.apply(fat)
    assert len(sound(image).names("bmoe/wheels")) == 25
    (tmp_path / "part").write_bytes(image.data)
    check_fat(tmp_path / "part")
    with pytest.raises(LimitError, match="root folder is full"):
        for number in range(50):
            fat.write(f"{'a rather long name of a file ' * 6}{number}.txt", b"x")


def test_more_than_there_is_room_for_is_one_clear_line_and_changes_nothing() -> None:
    image = Bytes(SMALL)
    fat = Fat(image, 0, len(SMALL))
    with pytest.raises(LimitError, match="bytes free"):
        fat.write("big", bytes(5 << 20))
    assert list(fat.changes()) == []


@pytest.mark.skipif(tool("mcopy") is None or tool("mkfs.fat") is None, reason="dosfstools and mtools: make test-tools")
@pytest.mark.parametrize(("kilobytes", "bits"), [(1024, 12), (16384, 16), (40960, 32)])
def test_a_file_system_by_dosfstools_is_changed_and_mtools_reads_it(kilobytes: int, bits: int, tmp_path: Path) -> None:
    part, out = tmp_path / "part", tmp_path / "out"
    make = [tool("mkfs.fat"), "-C", "-F", str(bits), "-n", "CIDATA", str(part), str(kilobytes)]
    subprocess.run([str(word) for word in make], check=True, capture_output=True, timeout=30)
    image = Bytes(part.read_bytes())
    fat = Fat(image, 0, len(image.data))
    assert (fat.geometry.bits, fat.label) == (bits, "CIDATA")
    content = bytes(range(256)) * 99
    for path in ("user-data", "bmoe/token", "bmoe/wheels/onnxruntime-1.32.0-cp313-cp313-manylinux_2_28_aarch64.whl"):
        fat.write(path, content)
    fat.set_label("BMOE")
    image.apply(fat)
    part.write_bytes(image.data)
    check_fat(part)
    if blkid := tool("blkid"):
        told = subprocess.run([blkid, "-p", "-o", "value", "-s", "LABEL", str(part)], capture_output=True, timeout=30)
        assert told.stdout == b"BMOE\n"
    for path in ("user-data", "bmoe/token", "bmoe/wheels/onnxruntime-1.32.0-cp313-cp313-manylinux_2_28_aarch64.whl"):
        copy = [str(tool("mcopy")), "-n", "-o", "-i", str(part), f"::{path}", str(out)]
        subprocess.run(copy, check=True, capture_output=True, timeout=30)
        assert out.read_bytes() == content


def test_short_names_are_apart_and_of_allowed_letters() -> None:
    taken: set[bytes] = set()
    for name in ("user-data", "user-data2", "meta-data", "cmdline.txt", "bmoe", "a.b.c.whl", "A", "token", "+++.txt"):
        short = short_name_for(name, taken)
        assert len(short) == 11 and short not in taken and short == short.upper()
        taken.add(short)
    for bad in ("", "a/b", "ends.", " x", "new\nline", "\N{SNOWMAN}", "x" * 201):
        with pytest.raises(ImageError):
            short_name_for(bad, taken)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 40 * SECTOR), st.binary(min_size=1, max_size=64))
def test_a_damaged_file_system_is_read_or_refused_and_never_worse(at: int, damage: bytes) -> None:
    image = Bytes(SMALL)
    image.data[at : at + len(damage)] = damage
    try:
        fat = Fat(image, 0, len(SMALL))
        for name in fat.names():
            fat.read(name)
        fat.write("bmoe/token", b"t")
        assert fat.read("bmoe/token") == b"t", "what was written is what is read"
        assert all(begin >= 0 and begin + len(data) <= len(SMALL) for begin, data in fat.changes())
    except BmoeError as refusal:
        assert "\n" not in str(refusal)


def test_a_chain_that_bites_its_tail_is_refused() -> None:
    image = Bytes(SMALL)
    entry = Fat(image, 0, len(SMALL))._find("config.txt")
    assert entry is not None
    at = 4 * SECTOR + 2 * (entry.cluster + 1)
    image.data[at : at + 2] = entry.cluster.to_bytes(2, "little")
    with pytest.raises(ImageError, match=r"config\.txt of the boot partition is damaged"):
        Fat(image, 0, len(SMALL)).read("config.txt")


@pytest.mark.parametrize("first", [b"config.txt", b"overlays"])
def test_a_chain_without_end_costs_no_memory(first: bytes) -> None:
    """Whoever makes an image decides how many clusters it has: what is followed is not kept."""
    image = Bytes(SMALL)
    entry = Fat(image, 0, len(SMALL))._find(first.decode())
    assert entry is not None
    for number in range(2, 8000):  # one chain through all of the file system, back to its begin
        at = 4 * SECTOR + 2 * number
        image.data[at : at + 2] = (number + 1 if number < 7999 else entry.cluster).to_bytes(2, "little")
    fat = Fat(image, 0, len(SMALL))
    tracemalloc.start()
    with pytest.raises(ImageError):
        fat.write(first.decode() if first == b"config.txt" else "overlays/x", b"")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < (4 << 20)


def test_what_lies_behind_the_end_of_a_folder_stays_unseen() -> None:
    """A folder ends at its first empty entry, whatever is behind: a new name in that place must not show it."""
    image = Bytes(SMALL)
    geometry = Fat(image, 0, len(SMALL)).geometry
    at = image.data.find(bytes(96), geometry.root_at * SECTOR) // 32 * 32 + 32
    image.data[at + 32 : at + 640] = b"GHOST   TXT\x20".ljust(32, b"\1") * 19
    before = Fat(image, 0, len(SMALL)).names()
    fat = Fat(image, 0, len(SMALL))
    fat.write("new", b"x")
    image.apply(fat)
    assert sorted(Fat(image, 0, len(SMALL)).names()) == sorted([*before, "new"])


@settings(deadline=None)
@given(st.binary(max_size=2048))
def test_any_bytes_are_a_folder_or_none(content: bytes) -> None:
    found = parse_entries(content)
    assert [entry.at for entry in found] == sorted({entry.at for entry in found}) and all(entry.name for entry in found)


def gpt(*spans: tuple[int, int], width: int = 128, at: int = 2, spoil: bool = False) -> bytes:
    """The head of an image with a GPT of such entries (first and last sector), its checksums right unless spoilt."""
    kind = UUID("c12a7328-f81f-11d2-ba4b-00a0c93ec93b").bytes_le
    entries = b"".join((kind + bytes(16) + struct.pack("<QQ", *span)).ljust(width, b"\0") for span in spans)
    fields = struct.pack("<QQQQ16sQIII", 1, 99, 34, 9, bytes(16), at, len(spans), width, zlib.crc32(entries) ^ spoil)
    header = b"EFI PART" + struct.pack("<IIII", 0x10000, 92, 0, 0) + fields
    header = header[:16] + struct.pack("<I", zlib.crc32(header)) + header[20:]
    mbr = bytes(446) + b"\0\0\0\0\xee\0\0\0\1\0\0\0\xff\xff\xff\xff" + bytes(48) + b"\x55\xaa"
    return (mbr + header.ljust(SECTOR, b"\0") + entries).ljust(64 * SECTOR, b"\0")


HOSTILE_TABLES = [
    (gpt((100, 200), (150, 300)), "partitions 1 and 2 overlap"),
    (gpt((100, 200), (100, 200)), "partitions 1 and 2 overlap"),
    (gpt((200, 100)), "entry 1 spans sectors 200 to 100"),
    (gpt((0, 100)), "entry 1 spans sectors 0 to 100"),
    (gpt((2, 100)), "entry 1 spans sectors 2 to 100"),
    (gpt((100, 200), spoil=True), "entries are damaged"),
    (gpt((100, 200), at=1), "entries lie at byte 512"),
    (gpt((100, 200), at=1 << 60), "entries lie at byte"),
    (gpt((100, 200), width=192), "entries of 192 bytes"),
    (gpt(), "has 0 entries"),
]


@pytest.mark.parametrize(("head", "said"), HOSTILE_TABLES)
def test_a_hostile_partition_table_is_one_line(head: bytes, said: str) -> None:
    with pytest.raises(ImageError, match=said):
        partitions(head)


def test_a_partition_of_all_the_sectors_there_can_be_ends_behind_any_image() -> None:
    [partition] = partitions(gpt((100, 2**64 - 1)))
    assert (partition.number, partition.offset, partition.end) == (1, 100 * SECTOR, 2**64 * SECTOR)


HOSTILE_FATS = [
    (11, (513).to_bytes(2, "little"), "holds no FAT"),
    (13, b"\3", "holds no FAT"),
    (14, bytes(2), "holds no FAT"),
    (16, b"\x09", "holds no FAT"),
    (32, (1 << 31).to_bytes(4, "little"), r"FAT says \d+ bytes, its partition has"),
    (36, (1).to_bytes(4, "little"), "does not fit its"),
    (40, b"\x80", "is not mirrored"),
    (44, (1 << 30).to_bytes(4, "little"), "its root folder nowhere"),
    (44, bytes(4), "its root folder nowhere"),
]


@pytest.mark.parametrize(("at", "lie", "said"), HOSTILE_FATS)
def test_a_boot_sector_that_lies_is_one_line(at: int, lie: bytes, said: str) -> None:
    image = Bytes(LARGE)
    image.data[at : at + len(lie)] = lie
    with pytest.raises(ImageError, match=said):
        Fat(image, 0, len(LARGE))


def test_an_image_that_ends_within_its_gpt_header_promises_one_and_has_none() -> None:
    mbr = bytes(446) + bytes([0, 0, 0, 0, 0xEE, 0, 0, 0]) + (1).to_bytes(4, "little") * 2 + bytes(48) + b"\x55\xaa"
    with pytest.raises(ImageError, match="promises a GPT, and there is none"):
        partitions(mbr + b"EFI PART" + bytes(6))


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=512), st.binary(max_size=600), st.booleans())
def test_any_bytes_are_a_partition_table_or_one_error(mbr: bytes, behind: bytes, gpt: bool) -> None:
    protective = bytes(446) + b"\0\0\0\0\xee\0\0\0\1\0\0\0\xff\xff\xff\xff" + bytes(48)
    head = (protective if gpt else mbr.ljust(510, b"\0")[:510]) + b"\x55\xaa" + (b"EFI PART" if gpt else b"") + behind
    tracemalloc.start()
    try:
        partitions(head.ljust(4096, b"\0"))
    except ImageError as error:
        assert "\n" not in str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 2 << 20
