"""Following a server's own log through its rotations, and the last lines of a log for an error message."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import BinaryIO

MAX_READ = 256 * 1024  # bytes a poll
MAX_LINES = 50  # alarms a poll; a flood of refused publishes must not flood our log too
MAX_LINE = 1024  # characters of one alarm
# Of nats-server.
ALARM = re.compile(rb"\[(?:ERR|WRN|FTL)\]|Violation")


class LogTail:
    """The lines that match `alarm` and were added to `path` since the last poll. What is there already is not told."""

    def __init__(self, path: Path, alarm: re.Pattern[bytes] = ALARM) -> None:
        self._path, self._alarm = path, alarm
        self._file: BinaryIO | None = None
        self._rest = b""
        if self._reopen():
            assert self._file is not None
            self._file.seek(0, os.SEEK_END)

    def poll(self) -> list[str]:
        """New alarms, at most 50, the last naming the number left out."""
        data = self._read()
        if self._rotated() and self._reopen():  # the old file was read to its end first
            data += self._read()
        *lines, self._rest = (self._rest + data).split(b"\n")
        self._rest = self._rest[-MAX_READ:]
        alarms = [line.decode("utf-8", "replace")[:MAX_LINE] for line in lines if self._alarm.search(line)]
        if len(alarms) > MAX_LINES:
            alarms[MAX_LINES - 1 :] = [f"... and {len(alarms) - MAX_LINES + 1} more lines, see {self._path}"]
        return alarms

    def close(self) -> None:
        """Give the file handle back."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _read(self) -> bytes:
        if self._file is None and not self._reopen():
            return b""
        assert self._file is not None
        behind = os.fstat(self._file.fileno()).st_size - self._file.tell()
        if behind < 0:  # cut by `rotate`
            self._file.seek(0)
        elif behind > MAX_READ:
            self._file.seek(-MAX_READ, os.SEEK_END)
            self._rest = b""
        return self._file.read(MAX_READ)

    def _rotated(self) -> bool:
        try:
            return self._file is not None and os.fstat(self._file.fileno()).st_ino != self._path.stat().st_ino
        except FileNotFoundError:
            return False

    def _reopen(self) -> bool:
        try:
            file = self._path.open("rb")
        except OSError:
            return False
        self.close()
        self._file = file
        return True


def last_lines(path: Path, count: int = 12) -> str:
    """The last `count` lines of a log, empty where there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 8192))
            return "\n".join(file.read(8192).decode("utf-8", "replace").splitlines()[-count:])
    except OSError:
        return ""


def rotate(path: Path, limit: int) -> None:
    """Move the content of a log that outgrew `limit` bytes to `path`.1. The writers append (O_APPEND) and keep their
    handle, hence copy and truncate; a line written in between is lost, which a log may."""
    try:
        if path.stat().st_size > limit:
            shutil.copy(path, path.with_name(path.name + ".1"))
            os.truncate(path, 0)
    except OSError:
        return  # gone, or a full disk: the next poll tries again
