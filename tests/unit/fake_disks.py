"""A machine's /sys, /proc and /dev as files: the disks that a test wants there to be."""

from __future__ import annotations

from pathlib import Path

SECTOR = 512


class Machine:
    """A root folder. Each disk is a folder of /sys/devices, with the links and files that the kernel shows."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._mounts: list[str] = []
        self._next = 0
        for folder in ("sys/class/block", "proc/self", "dev"):
            (root / folder).mkdir(parents=True)
        self.swaps()

    def disk(self, name: str, bus: str, size: int, **files: str) -> Path:
        """A disk below the bus's path, such as `pci0000:00/usb1/1-2`; `files` are relative to it, '.' spelled '__'."""
        device = self.root / "sys/devices" / bus / "block" / name
        device.mkdir(parents=True)
        defaults = {"size": str(size // SECTOR), "removable": "0", "ro": "0", "dev": self._number()}
        for file, content in (defaults | {k.replace("__", "/"): v for k, v in files.items()}).items():
            self._write(device / file, content)
        self._link(name, device)
        return device

    def part(self, disk: Path, name: str) -> Path:
        """A partition of a disk."""
        part = disk / name
        for file, content in (("partition", "1"), ("dev", self._number()), ("size", "2048"), ("ro", "0")):
            self._write(part / file, content)
        (part / "holders").mkdir()
        self._link(name, part)
        return part

    def mount(self, part: Path, where: str) -> None:
        """As /proc/self/mountinfo shows it."""
        number = (part / "dev").read_text().strip()
        spelled = where.replace(" ", "\\040")
        self._mounts.append(f"{len(self._mounts) + 20} 1 {number} / {spelled} rw - ext4 /dev/{part.name} rw\n")
        (self.root / "proc/self/mountinfo").write_text("".join(self._mounts))

    def swaps(self, *names: str) -> None:
        """As /proc/swaps shows them."""
        rows = "".join(f"/dev/{name}  partition 1 0 -2\n" for name in names)
        (self.root / "proc/swaps").write_text("Filename Type Size Used Priority\n" + rows)

    def _number(self) -> str:
        self._next += 1
        return f"8:{self._next}"

    def _link(self, name: str, device: Path) -> None:
        (self.root / "sys/class/block" / name).symlink_to(device)
        (self.root / "dev" / name).write_text("")

    @staticmethod
    def _write(path: Path, content: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content + "\n")


USB = "pci0000:00/0000:00:14.0/usb1/1-2/1-2:1.0/host6/target6:0:0/6:0:0:0"


def card(machine: Machine, size: int = 32 << 30, name: str = "sda", **files: str) -> Path:
    """An SD card in a USB reader, with one partition."""
    device = machine.disk(name, USB, size, removable="1", device__vendor="Generic", device__model="SD Reader", **files)
    reader = machine.root / "sys/devices/pci0000:00/0000:00:14.0/usb1/1-2"
    machine._write(reader / "idVendor", "05e3")
    machine._write(reader / "serial", "000000001206")
    machine.part(device, f"{name}1")
    return device
