"""One supervisor per state directory: a lock while it lives, and an end to what a killed one left running."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
from pathlib import Path

from bmoe.protocol.errors import ConfigError, UnavailableError

# Every child carries its state directory in its environment, and so do the processes it starts. A pid file can be
# missing (killed before it was written) or name a stranger (the pid was used again); the environment cannot.
MARK = "BMOE_SUPERVISED_STATE"
TERM_SECONDS = 5.0
KILL_SECONDS = 5.0


def private_dir(path: Path) -> Path:
    """Make `path` with mode 0700, or tighten it where it exists. Raises ConfigError where that is not possible."""
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.chmod(0o700)
    except OSError as error:
        raise ConfigError(f"cannot use directory {path}: {error.strerror}") from error
    return path.resolve()


def lock_state(state_dir: Path) -> int:
    """Take the directory for this process. Returns the handle whose closing (or our death) gives it back.

    Raises ConfigError naming the holder's pid where another supervisor has it.
    """
    path = private_dir(state_dir) / "lock"
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.pread(handle, 32, 0).decode("ascii", "replace").strip() or "unknown"
        os.close(handle)
        raise ConfigError(
            f"{state_dir} is in use by the supervisor with pid {holder}: stop it, or choose another state directory"
        ) from error
    os.ftruncate(handle, 0)
    os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
    return handle


def leftovers(state_dir: Path) -> list[int]:
    """Pids of this user's processes that were started for `state_dir` by a supervisor. Call while holding the lock."""
    pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    return [pid for pid in pids if pid != os.getpid() and _is_marked(pid, state_dir)]


def _is_marked(pid: int, state_dir: Path) -> bool:
    wanted = f"{MARK}={state_dir.resolve()}".encode()
    with contextlib.suppress(OSError):  # another user's process, or gone meanwhile
        return wanted in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return False


def end_leftovers(state_dir: Path) -> list[int]:
    """End what a killed supervisor left running on `state_dir`; returns the pids. Blocks at most about 10 s."""
    ended = leftovers(state_dir)
    for pid in ended:
        _end(pid, state_dir)
    return ended


def _end(pid: int, state_dir: Path) -> None:
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        if not _is_marked(pid, state_dir):  # the handle is pinned now; make sure it pins the process we meant
            return
        for number, seconds in ((signal.SIGTERM, TERM_SECONDS), (signal.SIGKILL, KILL_SECONDS)):
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(handle, number)
            if select.select([handle], [], [], seconds)[0]:
                return
        raise UnavailableError(f"process {pid} still holds {state_dir} and does not die, not even on SIGKILL")
    finally:
        os.close(handle)
