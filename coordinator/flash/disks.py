"""The machine's disks as the kernel shows them under /sys and /proc, and every reason why one is not written to.

All is read below a root folder, so that tests show it trees of their own. Nothing here opens a device.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from bmoe.protocol.errors import ConfigError, RefusedError
from bmoe.protocol.text import plain

SYSTEM_MOUNTS = ("/", "/usr", "/var", "/home", "/boot", "/boot/efi", "/boot/firmware")
SECTOR = 512
_NAME = re.compile(r"[A-Za-z0-9!_-]{1,32}")


@dataclass(frozen=True)
class Disk:
    """One block device. `number` is its major:minor; `mounts` are those of the disk and all that is on it; `sequence` is
    the kernel's count of media (Linux 5.15 and later, else ""): another card in the same reader has another; `twins` are
    further disks of the same serial number, such as the other slots of a reader."""

    path: str
    name: str
    number: str
    bytes: int
    model: str
    serial: str
    removable: bool
    read_only: bool
    whole: bool
    mounts: tuple[str, ...]
    swaps: tuple[str, ...]
    holders: tuple[str, ...]
    sector: int = SECTOR
    sequence: str = ""
    twins: tuple[str, ...] = ()

    @property
    def identity(self) -> str:
        """What the user confirms with: the serial number, with the name where others have the same; or name and size."""
        if not self.serial:
            return f"{self.name}-{self.bytes}"
        return f"{self.serial}-{self.name}" if self.twins else self.serial

    def describe(self) -> str:
        """One line for people."""
        return f"{self.path}: {self.model or 'unnamed'}, {self.bytes / 1e9:.1f} GB, serial {self.serial or 'none'}"


def find_disk(path: Path, root: Path = Path("/")) -> Disk:
    """The disk behind a device file; raises ConfigError where there is none."""
    path = Path("/dev") / path
    name = (root / path.relative_to("/")).resolve().name
    folder = root / "sys/class/block" / name
    if not _NAME.fullmatch(name) or not folder.exists():
        raise ConfigError(f"{path} is no disk of this machine; there are: {', '.join(_names(root)) or 'none'}")
    device = folder.resolve()
    parts = [device, *(p for p in device.iterdir() if (p / "partition").exists())]
    mounted, swaps = _mounts(root), _swaps(root)
    numbers = {_read(part / "dev"): part.name for part in parts}
    serial = _serial(device)
    return Disk(
        path=str(path),
        name=name,
        number=_read(device / "dev"),
        bytes=int(_read(device / "size") or 0) * SECTOR,
        model=" ".join(
            filter(None, (_shown(device / "device/vendor"), _shown(device / "device/model") or _mmc(device)))
        ),
        serial=serial,
        removable=_removable(device),
        read_only=_read(device / "ro") == "1",
        whole=not (device / "partition").exists(),
        mounts=tuple(sorted(where for number, where in mounted if number in numbers)),
        swaps=tuple(sorted(set(swaps) & {part.name for part in parts})),
        holders=tuple(
            sorted(h.name for part in parts if (part / "holders").is_dir() for h in (part / "holders").iterdir())
        ),
        sector=int(_read(device / "queue/logical_block_size") or SECTOR),
        sequence=_read(device / "diskseq"),
        twins=tuple(
            n for n in _names(root) if serial and n != name and _serial((folder.parent / n).resolve()) == serial
        ),
    )


def check_disk(disk: Disk, image_bytes: int) -> None:
    """Raise RefusedError with the first reason, the gravest first, why this disk must not be written to."""
    system = [where for where in disk.mounts if where in SYSTEM_MOUNTS]
    for holds, reason in (
        (not disk.whole, "is a partition: give the whole disk"),
        (system, f"is a disk of this system: {', '.join(system)} is on it"),
        (disk.swaps, f"is a disk of this system: it swaps on {', '.join(disk.swaps)}"),
        (disk.holders, f"is held by {', '.join(disk.holders)} (LVM, RAID or encryption)"),
        (disk.mounts, f"is mounted on {', '.join(disk.mounts)}: unmount it first"),
        (not disk.removable, "is not removable: only SD cards and USB disks are written to"),
        (disk.read_only, "is read-only: look for the lock on the card's edge"),
        (not disk.bytes, "has no medium in it"),
        (
            disk.sector != SECTOR,
            f"has sectors of {disk.sector} bytes: the partition tables of images count in {SECTOR}",
        ),
        (disk.bytes < image_bytes, f"has {disk.bytes} bytes, the image needs {image_bytes}"),
    ):
        if holds:
            raise RefusedError(f"{disk.path} {reason}")


def confirm(disk: Disk, given: str) -> None:
    """Raise RefusedError unless the user named this very disk."""
    if given.strip() != disk.identity:
        raise RefusedError(f"{disk.path} is {disk.identity!r}, confirmed was {given[:80]!r}: nothing was written")


def check_again(before: Disk, root: Path, image_bytes: int) -> None:
    """Look at a confirmed disk once more, since minutes may have passed: raises RefusedError where it is another one now,
    or may not be written to any more."""
    now = find_disk(Path(before.path), root)
    for what in ("number", "identity", "model", "bytes", "sequence"):
        if getattr(now, what) != getattr(before, what):
            raise RefusedError(
                f"{before.path} is not the disk that was looked at: its {what} was {getattr(before, what)!r}, is "
                f"{getattr(now, what)!r}: nothing was written"
            )
    check_disk(now, image_bytes)


def _names(root: Path) -> list[str]:
    folder = root / "sys/class/block"
    return sorted(p.name for p in folder.glob("*") if not (p / "partition").exists() and not _virtual(p.resolve()))


def _virtual(device: Path) -> bool:
    return "/devices/virtual/" in f"{device}/"


def _removable(device: Path) -> bool:
    """An SD card, or what the kernel calls removable, or any disk on USB; never what is soldered or virtual."""
    if _virtual(device):
        return False
    kind = _read(device / "device/type")
    if kind in ("SD", "MMC"):  # an eMMC is an MMC: soldered, and boots the machine it is in
        return kind == "SD"
    return _read(device / "removable") == "1" or bool(re.search(r"/usb\d+/", f"{device}/"))


def _serial(device: Path) -> str:
    """The disk's own serial number, or that of the USB device it hangs on."""
    own = _shown(device / "device/serial")
    if own:
        return own
    for parent in device.parents:
        if parent.name.startswith("usb") or not parent.name:
            return ""
        if (parent / "idVendor").exists():
            return _shown(parent / "serial")
    return ""


def _mmc(device: Path) -> str:
    return _shown(device / "device/name")


def _mounts(root: Path) -> list[tuple[str, str]]:
    """(major:minor, mount point) of every mount; proc(5), mountinfo. A mount is also known by its source's device."""
    found = []
    for line in _read(root / "proc/self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        fields, source = before.split(), after.split()
        if len(fields) < 5 or len(source) < 2:
            continue
        where = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), fields[4])
        found.append((fields[2], where))
        if source[1].startswith("/dev/"):  # btrfs and overlays have numbers of their own
            number = _read(root / "sys/class/block" / Path(source[1]).name / "dev")
            found.append((number or fields[2], where))
    return sorted(set(found))


def _swaps(root: Path) -> list[str]:
    return [Path(line.split()[0]).name for line in _read(root / "proc/swaps").splitlines()[1:] if line.split()]


def _shown(path: Path) -> str:
    """What a disk says of itself: it may say anything, and it is shown on a terminal."""
    return plain(_read(path), 100)


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(1 << 20).decode("utf-8", "replace").strip()
    except OSError:
        return ""
