"""The raw image of a vendor: an MBR, a FAT boot partition, an ext4 root; made under fakeroot by `python image.py FOLDER`."""

from __future__ import annotations

import hashlib
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from debian import BOOT_LABEL, make_root
from host_tools import HostTools

from coordinator.emulate.sysroot import cache_folder

MIB = 1 << 20
START_MB, BOOT_MB, ROOT_MB = 4, 320, 1400


def make_image() -> Path:
    """debian.img, with vmlinuz and initrd beside it to boot it; made once for each state of these scripts, in the cache."""
    scripts = b"".join(Path(__file__).with_name(name).read_bytes() for name in ("image.py", "debian.py", "probe.py"))
    folder = cache_folder() / f"boot-image-{hashlib.sha256(scripts).hexdigest()[:16]}"
    image = folder / "debian.img"
    if not image.exists():
        tools = HostTools()
        command = [sys.executable, str(Path(__file__).resolve()), str(folder)]
        if os.geteuid() != 0:  # owners of files are then those of the image, not ours
            command = [tools.path("fakeroot"), *command]
        subprocess.run(command, check=True, timeout=900, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    return image


def main(folder: Path) -> int:
    """Make it."""
    tools, work = HostTools(), folder / ".making"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    root, kernel, initrd = make_root(work)
    boot, system, image = work / "boot.fat", work / "root.ext4", work / "debian.img"
    with boot.open("wb") as file:
        file.truncate(BOOT_MB * MIB)
    tools.run("mkfs.vfat", "-F", "32", "-n", BOOT_LABEL, boot)
    tools.run("mcopy", "-i", boot, kernel, "::vmlinuz")
    tools.run("mcopy", "-i", boot, initrd, "::initrd")
    options = "lazy_itable_init=0,lazy_journal_init=0"
    tools.run("mkfs.ext4", "-q", "-F", "-L", "rootfs", "-E", options, "-d", root, system, f"{ROOT_MB}M")
    with image.open("wb") as file:
        file.write(partition_table())
        file.truncate((START_MB + BOOT_MB + ROOT_MB) * MIB)
    for part, at in ((boot, START_MB), (system, START_MB + BOOT_MB)):
        subprocess.run(
            ["dd", f"if={part}", f"of={image}", "bs=1M", f"seek={at}", "conv=notrunc,sparse", "status=none"], check=True
        )
    for made, name in ((kernel, "vmlinuz"), (initrd, "initrd"), (image, "debian.img")):
        os.replace(made, folder / name)
    shutil.rmtree(work)
    return 0


def partition_table() -> bytes:
    """An MBR with two primary partitions: FAT32 (0x0c) and Linux (0x83), in sectors of 512 bytes."""
    table = bytearray(512)
    struct.pack_into("<I", table, 440, 0x626D6F65)
    for number, (kind, start, size) in enumerate(((0x0C, START_MB, BOOT_MB), (0x83, START_MB + BOOT_MB, ROOT_MB))):
        entry = struct.pack("<B3sB3sII", 0, b"\xfe\xff\xff", kind, b"\xfe\xff\xff", start * 2048, size * 2048)
        table[446 + 16 * number : 462 + 16 * number] = entry
    table[510:512] = b"\x55\xaa"
    return bytes(table)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
