"""Names in FAT folders: short ones of eight and three, long ones in entries before them, and their checksum. Pure."""

from __future__ import annotations

import re
import struct
from collections.abc import Set
from dataclasses import dataclass

from bmoe.protocol.errors import ImageError, LimitError

ENTRY = 32
LONG = 0x0F
CHARS = 13  # UTF-16 units in one long entry
_PLAIN = re.compile(r"[A-Za-z0-9._+@ -]{1,200}")
_NOT_SHORT = re.compile(rb"[^A-Z0-9_$%'@~`!(){}^#&-]")


@dataclass(frozen=True)
class Entry:
    """One name of a folder. `at` is the byte of its short entry within the folder."""

    at: int
    name: str
    short: bytes
    attributes: int
    cluster: int
    size: int

    @property
    def dos(self) -> str:
        """The short name as it is typed."""
        base, ext = self.short[:8].decode("latin-1").rstrip(), self.short[8:].decode("latin-1").rstrip()
        return f"{base}.{ext}" if ext else base

    @property
    def shown(self) -> bool:
        """Whether it is a file or folder, and neither the label nor `.` or `..`."""
        return not self.attributes & 0x08 and self.short[:1] != b"."


def parse_entries(content: bytes) -> list[Entry]:
    """The entries of a folder's content, up to its end mark. A long name whose checksum is wrong does not count."""
    found: list[Entry] = []
    parts: dict[int, bytes] = {}
    checksum = -1
    for at in range(0, len(content) - ENTRY + 1, ENTRY):
        raw = content[at : at + ENTRY]
        if raw[0] == 0:
            break
        if raw[0] == 0xE5:
            parts = {}
        elif raw[11] & 0x3F == LONG:
            if raw[0] & 0x40:
                parts = {}
            parts[raw[0] & 0x1F], checksum = raw[1:11] + raw[14:26] + raw[28:32], raw[13]
        else:
            found.append(_parsed(at, raw, parts if checksum == name_checksum(raw[:11]) else {}))
            parts = {}
    return found


def _parsed(at: int, raw: bytes, parts: dict[int, bytes]) -> Entry:
    high, low, size = struct.unpack("<H4xHI", raw[20:32])
    short = bytes(raw[:11])
    entry = Entry(at, "", short, raw[11], high << 16 | low, size)
    whole = sorted(parts) == list(range(1, len(parts) + 1)) and bool(parts)
    text = b"".join(parts[number] for number in sorted(parts)).decode("utf-16-le", "replace") if whole else ""
    return Entry(at, text.split("\0")[0] or entry.dos, short, raw[11], entry.cluster, size)


def name_checksum(short: bytes) -> int:
    """The checksum by which long entries belong to a short one."""
    total = 0
    for byte in short:
        total = ((total & 1) << 7 | total >> 1) + byte & 0xFF
    return total


def short_name_for(name: str, taken: Set[bytes]) -> bytes:
    """Eleven bytes that no other entry of the folder has; raises ImageError for a name that we do not write."""
    if not _PLAIN.fullmatch(name) or name.strip(". ") != name:
        raise ImageError(f"a file on a boot partition is named by plain letters, digits and ._+@-, found {name[:80]!r}")
    base, _, ext = name.upper().rpartition(".") if "." in name else (name.upper(), "", "")
    plain_base = _NOT_SHORT.sub(b"", base.encode())
    plain_ext = _NOT_SHORT.sub(b"", ext.encode())[:3]
    whole = plain_base[:8].ljust(8) + plain_ext.ljust(3)
    if len(base) <= 8 and len(ext) <= 3 and plain_base == base.encode() and whole not in taken:
        return whole
    for number in range(1, 1_000_000):
        tail = b"~%d" % number
        short = (plain_base[: 8 - len(tail)] + tail).ljust(8) + plain_ext.ljust(3)
        if short not in taken:
            return short
    raise LimitError(f"no short name is left for {name!r}")


def directory_entries(name: str, short: bytes) -> bytes:
    """The long entries that come before a short one, the last part first."""
    units = name.encode("utf-16-le")
    if len(units) % (2 * CHARS):
        units += b"\0\0"
    units += b"\xff" * (-len(units) % (2 * CHARS))
    pieces = [units[i : i + 2 * CHARS] for i in range(0, len(units), 2 * CHARS)]
    checksum = name_checksum(short)
    raw = b""
    for number, piece in reversed(list(enumerate(pieces, 1))):
        order = number | (0x40 if number == len(pieces) else 0)
        raw += struct.pack("<B10sBBB12sH4s", order, piece[:10], LONG, 0, checksum, piece[10:22], 0, piece[22:])
    return raw
