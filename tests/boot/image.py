"""Raw images as vendors publish them: an MBR, a FAT boot partition, an ext4 root; made under fakeroot by this as a script."""

from __future__ import annotations

import hashlib
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from debian import LAYOUTS, Layout, configure, make_root
from host_tools import HostTools

from coordinator.emulate.cache import kept

MIB = 1 << 20
START_MB, BOOT_MB, ROOT_MB = 4, 320, 1400
WITHIN_S = 900


def make_images() -> Path:
    """A folder with NAME.img of each layout, vmlinuz and initrd to boot them; made once for each state of these scripts."""
    scripts = b"".join(Path(__file__).with_name(name).read_bytes() for name in ("image.py", "debian.py", "probe.py"))
    tools = HostTools()

    def make(folder: Path) -> None:
        # Owners of files are those of the image, whoever we are.
        command = [*tools.fakeroot(), sys.executable, str(Path(__file__).resolve()), str(folder)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        subprocess.run(command, check=True, timeout=WITHIN_S, env=environment)

    return kept(f"boot-images-{hashlib.sha256(scripts).hexdigest()[:16]}", make, print)


def main(folder: Path) -> int:
    """Make them."""
    tools, work = HostTools(), folder / "work"
    work.mkdir()
    base, kernel, initrd = make_root(work)
    for layout in LAYOUTS:
        _make_image(layout, tools, work, folder, (base, kernel, initrd))
    for made, name in ((kernel, "vmlinuz"), (initrd, "initrd")):
        os.replace(made, folder / name)
    shutil.rmtree(work)
    return 0


def _make_image(layout: Layout, tools: HostTools, work: Path, folder: Path, parts: tuple[Path, Path, Path]) -> None:
    base, kernel, initrd = parts
    root, boot, system = (work / f"{layout.name}.{kind}" for kind in ("root", "fat", "ext4"))
    configure(base, layout, root)
    with boot.open("wb") as file:
        file.truncate(BOOT_MB * MIB)
    tools.run("mkfs.vfat", "-F", "32", "-n", layout.label, boot)
    for name, text in layout.boot.items():
        (work / name).write_text(text)
    for path, name in ((kernel, layout.kernel), (initrd, layout.initrd), *((work / n, n) for n in layout.boot)):
        tools.run("mcopy", "-i", boot, path, f"::{name}")
    options = "lazy_itable_init=0,lazy_journal_init=0"
    tools.run("mkfs.ext4", "-q", "-F", "-L", "rootfs", "-E", options, "-d", root, system, f"{ROOT_MB}M")
    image = folder / f"{layout.name}.img"
    with image.open("wb") as file:
        file.write(partition_table())
        file.truncate((START_MB + BOOT_MB + ROOT_MB) * MIB)
    for part, at in ((boot, START_MB), (system, START_MB + BOOT_MB)):
        subprocess.run(
            ["dd", f"if={part}", f"of={image}", "bs=1M", f"seek={at}", "conv=notrunc,sparse", "status=none"], check=True
        )
        part.unlink()


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
