"""Image files as a stream of raw bytes: plain, xz, zstd or gzip, with bounded memory however they were made."""

from __future__ import annotations

import hashlib
import lzma
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from bmoe.protocol.errors import ConfigError, ImageError, LimitError

if sys.version_info >= (3, 14):  # the standard library has it from there on
    from compression import zstd
else:
    from backports import zstd

CHUNK = 4 << 20
READ = 256 << 10
IMAGE_BYTES = 256 << 30
XZ_MEMORY = 512 << 20
ZSTD_WINDOW_LOG = 27  # 128 MiB, what the zstd program takes without being asked for more
# The second of zstd's is a frame to be skipped, which parallel packers begin with.
MAGIC = (
    (rb"\xfd7zXZ\0", "xz"),
    (rb"\x28\xb5\x2f\xfd", "zst"),
    (rb"[\x50-\x5f]\x2a\x4d\x18", "zst"),
    (rb"\x1f\x8b", "gz"),
)


class Decompressor(Protocol):
    """What lzma and zstd give, and `_Gzip` makes of zlib."""

    eof: bool
    needs_input: bool
    unused_data: bytes

    def decompress(self, data: bytes, max_length: int) -> bytes: ...


class _Gzip:
    """zlib in the shape of the others."""

    def __init__(self) -> None:
        self._inner = zlib.decompressobj(31)

    @property
    def eof(self) -> bool:
        return self._inner.eof

    @property
    def needs_input(self) -> bool:
        return not self._inner.unconsumed_tail and not self._inner.eof

    @property
    def unused_data(self) -> bytes:
        return self._inner.unused_data

    def decompress(self, data: bytes, max_length: int) -> bytes:
        return self._inner.decompress(self._inner.unconsumed_tail + data, max_length)


def _zstd() -> Any:
    return zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: ZSTD_WINDOW_LOG})


_KINDS: dict[str, Callable[[], Any]] = {
    "xz": lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=XZ_MEMORY),
    "zst": _zstd,
    "gz": _Gzip,
}
_BROKEN = (lzma.LZMAError, zlib.error, zstd.ZstdError)


@dataclass
class Source:
    """One image file. After `chunks` has ended, `file_sha256` is that of the file as it lies."""

    path: Path
    kind: str
    file_bytes: int
    file_sha256: str = ""
    read_bytes: int = 0

    def chunks(self) -> Iterator[bytes]:
        """The raw image, in pieces of `CHUNK` bytes, the last perhaps shorter.

        Raises ImageError for an archive that is damaged or cut short, LimitError for an image beyond all cards.
        """
        self.read_bytes = 0
        digest = hashlib.sha256()
        pieces = _plain if self.kind == "img" else self._unpacked
        total, waiting = 0, bytearray()
        for piece in pieces(self._read(digest)):
            total += len(piece)
            if total > IMAGE_BYTES:
                raise LimitError(f"{self.path} unpacks to more than {IMAGE_BYTES >> 30} GiB")
            waiting += piece
            while len(waiting) >= CHUNK:
                yield bytes(waiting[:CHUNK])
                del waiting[:CHUNK]
        self.file_sha256 = digest.hexdigest()
        if waiting:
            yield bytes(waiting)

    def _read(self, digest: Any) -> Iterator[bytes]:
        try:
            with self.path.open("rb") as file:
                while data := file.read(READ):
                    digest.update(data)
                    self.read_bytes += len(data)
                    yield data
        except OSError as error:
            raise ConfigError(f"{self.path} cannot be read: {error.strerror}") from None

    def _unpacked(self, blocks: Iterator[bytes]) -> Iterator[bytes]:
        """Unpack every stream of the file; several in a row are one image, as their own programs have it."""
        data = next(blocks, b"")
        try:
            while data:
                inner: Decompressor = _KINDS[self.kind]()
                while not inner.eof:
                    if piece := inner.decompress(data, READ):
                        yield piece
                    data = b""
                    if inner.needs_input and not inner.eof and not (data := next(blocks, b"")):
                        raise ImageError(f"{self.path} is cut short: the .{self.kind} archive ends before its end mark")
                data = _next_stream(inner.unused_data, blocks)
        except _BROKEN as error:
            raise ImageError(
                f"{self.path} is damaged: no .{self.kind} archive that can be unpacked ({error})"
            ) from None


def _next_stream(rest: bytes, blocks: Iterator[bytes]) -> bytes:
    """What follows a stream, without the zeros that may pad it; empty at the file's end."""
    while not (rest := rest.lstrip(b"\0")):
        block = next(blocks, None)
        if block is None:
            break
        rest = block
    return rest


def _plain(blocks: Iterator[bytes]) -> Iterator[bytes]:
    return blocks


def open_source(path: Path) -> Source:
    """The image file, its kind by its first bytes; raises ConfigError for one that is not there."""
    try:
        with path.open("rb") as file:
            head = file.read(8)
        size = path.stat().st_size
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    if head[:4] == b"PK\3\4":
        raise ImageError(f"{path} is a .zip: unpack it; .img, .xz, .zst and .gz are written as they are")
    kind = next((name for magic, name in MAGIC if re.match(magic, head)), "img")
    if kind == "img" and path.suffix in (".xz", ".zst", ".gz"):
        raise ImageError(f"{path} is damaged: no {path.suffix} archive by its first bytes")
    if not size:
        raise ImageError(f"{path} is empty")
    return Source(path, kind, size)


def expected_sha256(path: Path, given: str | None) -> str | None:
    """The SHA-256 that the image file must have: given, or from FILE.sha256 beside it; None where neither is there.

    Raises ConfigError for one that is no SHA-256.
    """
    if given is not None:
        if not re.fullmatch(r"[0-9a-fA-F]{64}", given):
            raise ConfigError(f"--sha256 takes 64 hexadecimal digits, found {given[:80]!r}")
        return given.lower()
    beside = path.with_name(path.name + ".sha256")
    if not beside.is_file():
        return None
    with beside.open("rb") as file:
        text = file.read(64 * 1024).decode("ascii", "replace")
    lines = [line.split() for line in text.splitlines() if line.strip()]
    named = [words[0] for words in lines if len(words) == 1 or words[-1].lstrip("*").rsplit("/", 1)[-1] == path.name]
    if len(named) != 1 or not re.fullmatch(r"[0-9a-fA-F]{64}", named[0]):
        raise ConfigError(f"{beside} names no SHA-256 for {path.name}: remove it, or give --sha256")
    return named[0].lower()
