"""The parts of an image that are looked into, kept on disk while the image streams by; zeros take no room."""

from __future__ import annotations

import os
import tempfile
from types import TracebackType

from bmoe.protocol.errors import LimitError, UnavailableError

BLOCK = 64 * 1024
SPOOL_BYTES = 2 << 30
_ZEROS = bytes(BLOCK)


class Spool:
    """Bytes at their offsets in the image, in a file without a name; what was never put reads as zeros."""

    def __init__(self, limit: int = SPOOL_BYTES) -> None:
        self._file = tempfile.TemporaryFile(prefix="bmoe-flash-", buffering=0)  # noqa: SIM115 - closed by __exit__
        self._limit, self._held = limit, 0

    def put(self, offset: int, data: bytes | memoryview) -> None:
        """Keep `data`; raises LimitError when more than the limit is not zero, UnavailableError on a full disk."""
        for begin in range(0, len(data), BLOCK):
            block = bytes(data[begin : begin + BLOCK])
            if block == _ZEROS[: len(block)]:
                continue
            self._held += len(block)
            if self._held > self._limit:
                raise LimitError(f"the image's boot partitions hold more than {self._limit >> 20} MiB: not looked into")
            try:
                while block:
                    done = os.pwrite(self._file.fileno(), block, offset + begin)
                    block, begin = block[done:], begin + done
            except OSError as error:
                raise UnavailableError(
                    f"{tempfile.gettempdir()} cannot take what is looked into: {error.strerror}; TMPDIR names another place"
                ) from None

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes at `offset`."""
        data = os.pread(self._file.fileno(), size, offset)
        return data + bytes(size - len(data))

    def __enter__(self) -> Spool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
