"""The cache of what emulation fetches once: folders made aside, whole or not there, by one maker at a time."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from bmoe.protocol.errors import ConfigError, UnavailableError

CACHE = "BMOE_EMULATE_CACHE"
Say = Callable[[str], None]


def cache_folder() -> Path:
    """Where all is kept: BMOE_EMULATE_CACHE, or ~/.cache/bmoe/emulate."""
    given = os.environ.get(CACHE)
    if given:
        return Path(given).resolve()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").resolve() / "bmoe" / "emulate"


def kept(name: str, make: Callable[[Path], None], say: Say = lambda line: None) -> Path:
    """The cache's folder of that name; where it is not there, `make` fills a folder beside, which is then renamed.

    A half-made one is never seen under its name, not after a power cut either, and a second maker waits for the first.
    Raises ConfigError for a cache that somebody else can write, UnavailableError for one that cannot be written, and
    what `make` raises.
    """
    cache = cache_folder()
    folder = cache / name
    try:
        if cache.is_dir():
            _check_owner(cache)
        if folder.is_dir():
            return folder
        cache.mkdir(parents=True, exist_ok=True)
        with _alone(cache / "lock", say):
            if not folder.is_dir():
                _make(folder, make)
    except OSError as error:
        raise UnavailableError(f"the cache {cache} cannot be used: {error.strerror or error}") from error
    return folder


def _check_owner(cache: Path) -> None:
    """Its programs are run as this user. Root takes another's folder: a container's volume is one."""
    found = cache.stat()
    if os.geteuid() not in (0, found.st_uid) and found.st_uid != 0:
        raise ConfigError(
            f"the cache {cache} belongs to uid {found.st_uid}, who could run programs as you: name another"
        )
    if found.st_mode & stat.S_IWOTH:
        raise ConfigError(f"the cache {cache} can be written by anybody, who could run programs as you: chmod o-w")


@contextlib.contextmanager
def _alone(path: Path, say: Say) -> Iterator[None]:
    """Hold the cache; the kernel frees it at any death."""
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another process is filling the cache of emulated boards: waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        for abandoned in path.parent.glob(".making-*"):  # whoever made them is dead, or held the lock
            shutil.rmtree(abandoned, ignore_errors=True)
        yield


def _make(folder: Path, make: Callable[[Path], None]) -> None:
    making = Path(tempfile.mkdtemp(prefix=".making-", dir=folder.parent))
    try:
        make(making)
        os.sync()  # or a power cut leaves the name and none of its thousands of files
        os.rename(making, folder)
    except BaseException:
        shutil.rmtree(making, ignore_errors=True)
        raise
