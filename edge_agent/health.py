"""What a board can tell of itself: from /proc and /sys alone, and nothing that it cannot read."""

from __future__ import annotations

import platform
from dataclasses import dataclass, field
from pathlib import Path

# Keys of the Health header, so that `known` can name what was read.
CPU_PERCENT, TEMPERATURE_MC, MEMORY_FREE_MB, THROTTLED = 8, 9, 10, 11
COUNTERS = (12, 13, 14, 15)
THROTTLED_FILE = "sys/devices/platform/soc/soc:firmware/get_throttled"  # Raspberry Pi firmware, in hexadecimal


def board(root: Path = Path("/")) -> str:
    """The board's model as its firmware names it, else the processor's architecture and the system's."""
    for name in ("proc/device-tree/model", "sys/class/dmi/id/product_name"):
        text = _read(root / name).replace("\0", "").strip()
        if text and text.isprintable():
            return text[:128]
    return f"{platform.machine()} {platform.system()}"[:128]


def memory_mb(root: Path = Path("/")) -> int:
    """The board's memory in MB, 0 when it cannot be read."""
    return _meminfo(root, "MemTotal") or 0


@dataclass
class Gauge:
    """Reads the board's state; CPU use is that since the reading before."""

    root: Path = Path("/")
    temperature: str = "/sys/class/thermal/thermal_zone0/temp"
    _before: tuple[int, int] | None = field(default=None, init=False)

    def read(self) -> dict[int, int]:
        """Health header key -> value, of what could be read: percent, thousandths of a degree C, MB, firmware bits."""
        found = {
            CPU_PERCENT: self._cpu_percent(),
            TEMPERATURE_MC: _number(_read(self.root / self.temperature.lstrip("/"))),
            MEMORY_FREE_MB: _meminfo(self.root, "MemAvailable"),
            THROTTLED: _number(_read(self.root / THROTTLED_FILE), base=16),
        }
        return {key: value for key, value in found.items() if value is not None and 0 <= value < 2**53}

    def _cpu_percent(self) -> int | None:
        line = _read(self.root / "proc/stat").split("\n", 1)[0].split()
        if len(line) < 6 or line[0] != "cpu" or not all(part.isdigit() for part in line[1:9]):
            return None
        ticks = [int(part) for part in line[1:9]]  # guest time, behind these, is part of user time already
        idle, total = ticks[3] + ticks[4], sum(ticks)
        before, self._before = self._before, (idle, total)
        if before is None or total <= before[1]:
            return None
        return min(100, max(0, round(100 * (1 - (idle - before[0]) / (total - before[1])))))


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(65536).decode(errors="replace")
    except OSError:
        return ""


def _number(text: str, base: int = 10) -> int | None:
    try:
        return int(text.strip(), base)
    except ValueError:
        return None


def _meminfo(root: Path, name: str) -> int | None:
    for line in _read(root / "proc/meminfo").splitlines():
        if line.startswith(name + ":"):
            kilobytes = _number(line.split()[1]) if len(line.split()) > 1 else None
            return None if kilobytes is None else kilobytes // 1024
    return None
