"""Disk images like those of Raspberry Pi OS and Ubuntu, small and made here: partition table, FAT, a root file system.

Written apart from coordinator/flash/fat.py, after the specification, so that the one checks the other.
"""

from __future__ import annotations

import functools
import gzip
import os
import shutil
import struct
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

SECTOR = 512
MIB = 1 << 20
TOOLS = Path(__file__).resolve().parents[2] / ".test-tools"
BOOT_AT = 4 * MIB
KERNEL = gzip.compress(bytes(56) + b"ARM\x64" + bytes(960), mtime=0)
CMDLINE = (
    b"console=serial0,115200 console=tty1 root=PARTUUID=b40eb40e-02 rootfstype=ext4 fsck.repair=yes rootwait quiet\n"
)
PLAIN = {
    "cmdline.txt": CMDLINE,
    "config.txt": b"arm_64bit=1\n[all]\nenable_uart=1\n" * 40,
    "kernel8.img": KERNEL,
    "bcm2712-rpi-5-b.dtb": b"\xd0\r\xfe\xed" + bytes(3000),
    "overlays/README": b"The overlays of this image.\n",
}
CLOUD = {
    "user-data": b"#cloud-config\n# An empty example, as the image brings it.\n",
    "meta-data": b"dsmode: local\ninstance_id: rpios-image\n",
    "network-config": b"network:\n  version: 2\n",
}
BOOKWORM = PLAIN | {"cmdline.txt": CMDLINE[:-1] + b" init=/usr/lib/raspberrypi-sys-mods/firstboot\n"}
EFI = {"EFI/grub.cfg": b"search.fs_uuid 2b4b3e5c root\n", "EFI/BOOTAA64.EFI": b"MZ" + bytes(3000)}
CLOUD_INIT = b"/lib/systemd/system/cloud-init-local.service\n"
SYSTEMS = {
    # name: (label, files, bits)
    "bookworm": ("bootfs", BOOKWORM, 32),
    "first-trixie": ("bootfs", PLAIN | {"cmdline.txt": CMDLINE[:-1] + b" resize\n"}, 16),
    "trixie": ("bootfs", PLAIN | CLOUD, 16),
    "debian": ("", EFI, 16),  # a cloud image: an EFI system partition without a label, and cloud-init in the root
    "ubuntu": ("system-boot", PLAIN | CLOUD | {"current/cmdline.txt": CMDLINE}, 16),
}


@dataclass(frozen=True)
class Made:
    """A finished image, and where its parts lie, in bytes."""

    path: Path
    boot: tuple[int, int]
    root: tuple[int, int]


def tool(name: str) -> str | None:
    """A program of the system, or of those that `make test-tools` unpacks."""
    folders = [*os.environ.get("PATH", "").split(os.pathsep), "/sbin", "/usr/sbin", *_unpacked()]
    return shutil.which(name, path=os.pathsep.join(folders))


def _unpacked() -> list[str]:
    return [str(TOOLS / folder) for folder in ("bin", "sbin", "usr/bin", "usr/sbin")]


def make_image(path: Path, system: str = "first-trixie", machine: int = 0xB7, gpt: bool = False) -> Made:
    """An image of `system`; its programs are for the ELF machine `machine`, 0xB7 being AArch64."""
    head, fat, root = _parts(system, machine, gpt)
    root_at = BOOT_AT + len(fat)
    with path.open("wb") as file:
        file.write(head)
        _put_sparse(file, BOOT_AT, fat)
        _put_sparse(file, root_at, root)
        file.truncate(root_at + len(root) + (MIB if gpt else 0))
    return Made(path, (BOOT_AT, root_at), (root_at, root_at + len(root)))


@functools.cache
def _parts(system: str, machine: int, gpt: bool) -> tuple[bytes, bytes, bytes]:
    """Head, boot partition and root file system, made once for all tests."""
    label, files, bits = SYSTEMS[system]
    fat, root = make_fat(label, files, bits), _root_file_system(machine)
    sizes = (len(fat), BOOT_AT + len(fat), len(root))
    return (_gpt_head(*sizes) if gpt else _mbr_head(*sizes, bits)), fat, root


def _put_sparse(file: object, at: int, data: bytes) -> None:
    zeros = bytes(65536)
    for begin in range(0, len(data), 65536):
        block = data[begin : begin + 65536]
        if block != zeros[: len(block)]:
            file.seek(at + begin)  # type: ignore[attr-defined]
            file.write(block)  # type: ignore[attr-defined]


def _mbr_head(boot: int, root_at: int, root: int, bits: int) -> bytes:
    head = bytearray(SECTOR)
    head[440:444] = bytes.fromhex("0eb40eb4")
    for index, (kind, at, size) in enumerate([(12 if bits == 32 else 14, BOOT_AT, boot), (0x83, root_at, root)]):
        entry = struct.pack("<B3sB3sII", 0, b"\xfe\xff\xff", kind, b"\xfe\xff\xff", at // SECTOR, size // SECTOR)
        head[446 + 16 * index : 462 + 16 * index] = entry
    head[510:] = b"\x55\xaa"
    return bytes(head)


def _gpt_head(boot: int, root_at: int, root: int) -> bytes:
    import zlib
    from uuid import UUID

    kinds = (UUID("c12a7328-f81f-11d2-ba4b-00a0c93ec93b"), UUID("0fc63daf-8483-4772-8e79-3d69d8477de4"))
    entries = bytearray(128 * 128)
    for index, (kind, at, size) in enumerate(zip(kinds, (BOOT_AT, root_at), (boot, root), strict=True)):
        spans = struct.pack("<QQ", at // SECTOR, (at + size) // SECTOR - 1)
        entries[128 * index : 128 * index + 48] = kind.bytes_le + UUID(int=index + 1).bytes_le + spans
    last = (root_at + root + MIB) // SECTOR - 1
    fields = struct.pack("<QQQQ16sQIII", 1, last, 34, last - 33, bytes(16), 2, 128, 128, zlib.crc32(entries))
    header = b"EFI PART" + struct.pack("<IIII", 0x10000, 92, 0, 0) + fields
    header = header[:16] + struct.pack("<I", zlib.crc32(header)) + header[20:]
    mbr = bytearray(SECTOR)
    mbr[446:462] = struct.pack("<B3sB3sII", 0, b"\0\2\0", 0xEE, b"\xff\xff\xff", 1, min(last, 0xFFFFFFFF))
    mbr[510:] = b"\x55\xaa"
    return bytes(mbr) + header.ljust(SECTOR, b"\0") + bytes(entries)


def elf(machine: int) -> bytes:
    """The head of a program."""
    return b"\x7fELF\2\1\1" + bytes(9) + struct.pack("<HHI", 3, machine, 1) + bytes(1000)


@functools.cache
def _root_file_system(machine: int) -> bytes:
    """ext4 where its tools are, else blocks with the same programs in them."""
    mkfs = tool("mkfs.ext4")
    if mkfs is None:
        files = (*[elf(machine)] * 3, CLOUD_INIT)
        return (bytes(8192) + b"".join(file.ljust(4096, b"\0") for file in files)).ljust(2 * MIB, b"\0")
    with tempfile.TemporaryDirectory() as work:
        folder, made = Path(work) / "tree/usr/bin", Path(work) / "root"
        folder.mkdir(parents=True)
        for name in ("true", "sh", "python3"):
            (folder / name).write_bytes(elf(machine))
        (folder / "cloud-init.list").write_bytes(CLOUD_INIT)
        quiet = [mkfs, "-q", "-F", "-O", "^has_journal,^inline_data", "-d", str(Path(work) / "tree"), str(made), "2M"]
        subprocess.run(quiet, check=True, capture_output=True, timeout=30)
        return made.read_bytes()


# FAT.


def make_fat(label: str, files: dict[str, bytes], bits: int, size: int = 0) -> bytes:
    """A FAT16 or FAT32 of one sector a cluster, with files of the root and of folders below it."""
    size = size or (36 * MIB if bits == 32 else 4 * MIB)
    total = size // SECTOR
    reserved, root_sectors = (32, 0) if bits == 32 else (4, 32)
    table = -(-(total * bits // 8) // SECTOR)
    data_at = reserved + 2 * table + root_sectors
    clusters = total - data_at
    volume = _Volume(bytearray(size), bits, reserved, table, data_at)
    tree: dict[str, dict[str, bytes]] = {"": {}}
    for path, content in files.items():
        folder, _, name = path.rpartition("/")
        tree.setdefault(folder, {})[name] = content
    first = volume.store(bytes(SECTOR * 8)) if bits == 32 else 0
    entries = _short(label.ljust(11).encode(), 8, 0, 0) if label else b""
    for number, (folder, inside) in enumerate(sorted(tree.items()), 90):
        block = b"".join(
            _named(name, n, 0x20, volume.store(c), len(c)) for n, (name, c) in enumerate(inside.items(), 1)
        )
        if folder:
            start = volume.store(bytes(SECTOR * 4))
            dots = _short(b".          ", 16, start, 0) + _short(b"..         ", 16, 0, 0)
            volume.fill(start, dots + block)
            entries += _named(folder, number, 0x10, start, 0)
        else:
            entries += block
    if bits == 32:
        volume.fill(first, entries)
    else:
        at = (reserved + 2 * table) * SECTOR
        volume.raw[at : at + len(entries)] = entries
    volume.finish(label, total, clusters, first)
    return bytes(volume.raw)


@dataclass
class _Volume:
    raw: bytearray
    bits: int
    reserved: int
    table: int
    data_at: int
    following: int = 2

    def store(self, content: bytes) -> int:
        """The first cluster of content laid down in a row, 0 for none."""
        count = -(-len(content) // SECTOR)
        if not count:
            return 0
        first, self.following = self.following, self.following + count
        last = (1 << self.bits) - 1 if self.bits == 16 else 0x0FFFFFFF
        for cluster in range(first, first + count):
            self._link(cluster, cluster + 1 if cluster + 1 < first + count else last)
        self.fill(first, content)
        return first

    def fill(self, first: int, content: bytes) -> None:
        at = (self.data_at + first - 2) * SECTOR
        self.raw[at : at + len(content)] = content

    def _link(self, cluster: int, value: int) -> None:
        width = self.bits // 8
        for copy in range(2):
            at = (self.reserved + copy * self.table) * SECTOR + cluster * width
            self.raw[at : at + width] = value.to_bytes(width, "little")

    def finish(self, label: str, total: int, clusters: int, root: int) -> None:
        wide = self.bits == 32
        small = total if total < 65536 and not wide else 0
        boot = b"\xeb\x58\x90mkfs.fat" + struct.pack(
            "<HBHBHHBHHHII", SECTOR, 1, self.reserved, 2, 0 if wide else 512, small, 0xF8, 0 if wide else self.table,
            32, 8, 0, 0 if small else total,
        )  # fmt: skip
        name = (label or "NO NAME").ljust(11).encode()
        if wide:
            boot += struct.pack("<IHHIHH12x", self.table, 0, 0, root, 1, 6) + b"\x80\0\x29\1\2\3\4" + name + b"FAT32   "
            free = clusters - (self.following - 2)
            info = (
                b"RRaA" + bytes(480) + b"rrAa" + struct.pack("<II", free, self.following) + bytes(12) + b"\0\0\x55\xaa"
            )
            self.raw[SECTOR : 2 * SECTOR] = self.raw[7 * SECTOR : 8 * SECTOR] = info
        else:
            boot += b"\x80\0\x29\1\2\3\4" + name + b"FAT16   "
        boot = boot.ljust(510, b"\0") + b"\x55\xaa"
        self.raw[:SECTOR] = boot
        if wide:
            self.raw[6 * SECTOR : 7 * SECTOR] = boot
        self._link(0, 0x0FFFFFF8 if wide else 0xFFF8)
        self._link(1, 0x0FFFFFFF if wide else 0xFFFF)


def _short(name: bytes, attributes: int, first: int, size: int) -> bytes:
    date = 45 << 9 | 10 << 5 | 1
    return struct.pack(
        "<11sBBBHHHHHHHI", name, attributes, 0, 0, 0, date, date, first >> 16, 0, date, first & 0xFFFF, size
    )


def _named(name: str, number: int, attributes: int, first: int, size: int) -> bytes:
    """A long name over a short one that says nothing."""
    short = f"X{number:06}~".encode() + b"   "
    checksum = 0
    for byte in short:
        checksum = ((checksum >> 1) | (checksum & 1) << 7) + byte & 255
    units = [*name.encode("utf-16-le"), *(b"\0\0" if len(name) % 13 else b"")]
    units += [255] * (-len(units) % 26)
    pieces = [bytes(units[i : i + 26]) for i in range(0, len(units), 26)]
    out = b""
    for index in range(len(pieces), 0, -1):
        p = pieces[index - 1]
        order = index | (64 if index == len(pieces) else 0)
        out += bytes([order]) + p[:10] + bytes([15, 0, checksum]) + p[10:22] + bytes(2) + p[22:]
    return out + _short(short, attributes, first, size)
