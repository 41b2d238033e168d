"""What root writes into the directory of an agent that has no right of root: through no link of the agent's, and given to it.

The agent can put anything into its own directory, links to root's files above all. So nothing here opens by a path that
leads through it: each step is taken from the folder before, and a link ends it.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


def put(state: Path, name: str, data: bytes, mode: int = 0o600) -> None:
    """Write a file below `state` durably and in one step, for whoever owns `state`; folders in `name` are made.

    Raises OSError, at a link in the place of a folder too.
    """
    *folders, file = name.split("/")
    temporary = f".{file}.new"
    with _opened(state, folders) as (at, owner):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary, dir_fd=at)
        handle = os.open(temporary, _NEW, mode, dir_fd=at)
        with os.fdopen(handle, "wb") as opened:
            os.fchmod(handle, mode)
            _give(handle, owner)
            opened.write(data)
            opened.flush()
            os.fsync(handle)
        os.replace(temporary, file, src_dir_fd=at, dst_dir_fd=at)
        os.fsync(at)


def drop(state: Path, name: str) -> None:
    """Remove a file below `state`, if it is there; raises OSError."""
    *folders, file = name.split("/")
    with contextlib.suppress(FileNotFoundError), _opened(state, folders, make=False) as (at, _):
        os.unlink(file, dir_fd=at)
        os.fsync(at)


def hand_over(state: Path) -> None:
    """Give what root left below `state` to the owner of `state`; raises OSError. Nothing to do for anybody but root.

    systemd does it once, when the directory itself is still root's, and never again.
    """
    with _opened(state, []) as (top, owner):
        if os.geteuid() != 0 or owner.st_uid == 0:
            return
        for _, folders, files, at in os.fwalk(".", dir_fd=top, follow_symlinks=False):
            for name in (*folders, *files):
                with contextlib.suppress(OSError):  # a link, or gone meanwhile
                    handle = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=at)
                    try:
                        _give(handle, owner)
                    finally:
                        os.close(handle)


@contextlib.contextmanager
def _opened(state: Path, folders: Sequence[str], make: bool = True) -> Iterator[tuple[int, os.stat_result]]:
    """The folder below `state`, open, and what `state` itself is."""
    at = os.open(state, _FOLDER)
    try:
        owner = os.fstat(at)
        for folder in folders:
            if make:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(folder, 0o700, dir_fd=at)
                    os.fsync(at)
            inner = os.open(folder, _FOLDER | os.O_NOFOLLOW, dir_fd=at)
            os.close(at)
            at = inner
            _give(at, owner)
        yield at, owner
    finally:
        os.close(at)


def _give(handle: int, owner: os.stat_result) -> None:
    """Give an open file or folder of root's away; one with a second name may be another's."""
    found = os.fstat(handle)
    alone = stat.S_ISDIR(found.st_mode) or (stat.S_ISREG(found.st_mode) and found.st_nlink == 1)
    if os.geteuid() == 0 and found.st_uid == 0 and owner.st_uid != 0 and alone:
        os.fchown(handle, owner.st_uid, owner.st_gid)
