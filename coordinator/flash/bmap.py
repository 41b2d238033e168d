"""Block maps (FILE.bmap): which blocks of an image mean something, with a SHA-256 for each range. Pure, bounded.

Source: bmaptool's format 2.0 and 1.x (docs of the Yocto project's bmaptool).
"""

from __future__ import annotations

import hashlib
import hmac
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path

from bmoe.protocol.errors import ImageError

BMAP_BYTES = 8 << 20
RANGES_MAX = 200_000
_CHECKSUM = re.compile(rb"(<BmapFileChecksum>\s*)([0-9a-f]{64})(\s*</BmapFileChecksum>)")


@dataclass(frozen=True)
class Range:
    """Bytes `begin` to `end` of the image, and their SHA-256 in hexadecimal, empty where the map has none."""

    begin: int
    end: int
    sha256: str


@dataclass(frozen=True)
class Bmap:
    """A block map. Ranges are in order and apart."""

    image_bytes: int
    ranges: tuple[Range, ...]


def find_bmap(image: Path) -> Bmap | None:
    """The map beside an image: FILE.bmap, or that without .xz, .zst, .gz. Raises ImageError for a damaged one."""
    for path in (image.with_name(image.name + ".bmap"), image.with_name(image.stem + ".bmap")):
        if path.is_file():
            with path.open("rb") as file:
                data = file.read(BMAP_BYTES + 1)
            try:
                return parse_bmap(data)
            except ImageError as error:
                raise ImageError(f"{path}: {error}") from None
    return None


def parse_bmap(data: bytes) -> Bmap:
    """A block map from its XML; raises ImageError."""
    if len(data) > BMAP_BYTES:
        raise ImageError(f"a block map has at most {BMAP_BYTES} bytes")
    if b"<!DOCTYPE" in data or b"<!ENTITY" in data or b"\0" in data:  # no way to make a small file large
        raise ImageError("a block map has no document type and no entities")
    _check_own_checksum(data)
    try:
        root = ElementTree.fromstring(data)
        image, block = int(_text(root, "ImageSize")), int(_text(root, "BlockSize"))
        kind = root.findtext("ChecksumType", "sha256").strip()
        spans = [((r.text or "").strip(), r.get("chksum", "")) for r in root.iterfind("./BlockMap/Range")]
    except (ElementTree.ParseError, ValueError, LookupError, RecursionError) as error:
        raise ImageError(f"the block map cannot be read: {str(error)[:100]}") from None
    if kind != "sha256" or not 512 <= block <= 1 << 20 or not 0 < image < 1 << 48 or not 0 < len(spans) <= RANGES_MAX:
        raise ImageError(
            f"the block map is not for SHA-256, or its sizes are not sane: {kind[:20]!r}, {block}, {image}"
        )
    return Bmap(image, _ranges(spans, block, image))


def _ranges(spans: list[tuple[str, str]], block: int, image: int) -> tuple[Range, ...]:
    found: list[Range] = []
    for text, checksum in spans:
        match = re.fullmatch(r"\s*(\d{1,15})(?:\s*-\s*(\d{1,15}))?\s*", text)
        if match is None or (checksum and not re.fullmatch(r"[0-9a-f]{64}", checksum)):
            raise ImageError(f"the block map has a range that is none: {text[:40]!r}")
        first, last = int(match[1]), int(match[2] or match[1])
        begin, end = first * block, min((last + 1) * block, image)
        if last < first or begin >= image or (found and begin < found[-1].end):
            raise ImageError(f"the block map's range {text[:40]!r} is out of order or outside the image")
        found.append(Range(begin, end, checksum))
    return tuple(found)


def _check_own_checksum(data: bytes) -> None:
    match = _CHECKSUM.search(data)
    if match is None:
        if b"<BmapFileChecksum" in data:
            raise ImageError("the block map's own checksum is none: it is damaged")
        return
    blank = data[: match.start(2)] + b"0" * 64 + data[match.end(2) :]
    if not hmac.compare_digest(hashlib.sha256(blank).hexdigest().encode(), match[2]):
        raise ImageError("the block map's own checksum is wrong: it is damaged")


def _text(root: ElementTree.Element, name: str) -> str:
    found = root.findtext(name)
    if found is None:
        raise ImageError(f"the block map cannot be read: it has no {name}")
    return found.strip()[:30]


class RangeCheck:
    """Checks each range's SHA-256 as the image streams by, and that nothing but zeros lies between them."""

    def __init__(self, bmap: Bmap) -> None:
        self._ranges = bmap.ranges
        self._index = 0
        self._digest = hashlib.sha256()

    def feed(self, offset: int, chunk: bytes) -> None:
        """Take the next bytes of the image, which begin at `offset`. Raises ImageError at a wrong range, and where the map
        leaves out what is not zero, as it does when it was made of another image."""
        at, end = offset, offset + len(chunk)
        while at < end:
            current = self._ranges[self._index] if self._index < len(self._ranges) else None
            if current is None or at < current.begin:
                stop = end if current is None else min(end, current.begin)
                if chunk[at - offset : stop - offset] != bytes(stop - at):
                    raise ImageError(
                        f"the block map leaves out bytes of {at} to {stop} that are not zero: it is another image's"
                    )
                at = stop
                continue
            stop = min(end, current.end)
            self._digest.update(chunk[at - offset : stop - offset])
            at = stop
            if at == current.end:
                self._next(current)

    def _next(self, done: Range) -> None:
        if done.sha256 and self._digest.hexdigest() != done.sha256:
            raise ImageError(f"bytes {done.begin} to {done.end} of the image are not those of its block map")
        self._index += 1
        self._digest = hashlib.sha256()
