"""Child processes of a benchmark: started so that none outlives us, logged to files, measured through /proc."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bmoe.protocol.errors import ConfigError, UnavailableError
from coordinator.embedded import launch

ROOT = Path(__file__).resolve().parents[1]
# One thread each: on a small machine OpenMP's spinning costs far more than it brings.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
TICKS = os.sysconf("SC_CLK_TCK")
TAIL_LINES = 12
WIDEST = 220
LINE_BYTES = 64 * 1024


def program(name: str) -> str:
    """An installed command of this environment; raises ConfigError when it is not installed."""
    path = Path(sys.executable).parent / name
    if not path.is_file():
        raise ConfigError(f"{path} is missing: install the checkout first (pip install -e '.[dev]')")
    return str(path)


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Ours without BMOE_* settings of the caller's shell, one thread each, and the checkout importable."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("BMOE_")}
    return kept | ENVIRONMENT | {"PYTHONPATH": str(ROOT)} | dict(extra or {})


@dataclass
class Running:
    """One child: its process, its log, and whether its end is wanted."""

    name: str
    process: asyncio.subprocess.Process
    log: Path
    expected: bool = False

    @property
    def alive(self) -> bool:
        """Whether it still runs, as far as the event loop knows."""
        return self.process.returncode is None

    def send(self, number: signal.Signals) -> None:
        """Signal it, if it still runs; from here on its end is no fault."""
        self.expected = True
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)

    async def stop(self, patience_s: float) -> None:
        """SIGTERM, and SIGKILL after `patience_s`; returns when it is gone."""
        self.send(signal.SIGTERM)
        try:
            await asyncio.wait_for(self.process.wait(), patience_s)
        except asyncio.TimeoutError:
            self.send(signal.SIGKILL)
            await self.process.wait()


async def spawn(
    name: str,
    argv: Sequence[str],
    log: Path,
    stdout: int | None = None,
    stdin: int = asyncio.subprocess.DEVNULL,
    limit: int = LINE_BYTES,
    extra: Mapping[str, str] | None = None,
) -> Running:
    """Start `argv` (argv[0] an absolute path) in a session of its own; it is killed when this process dies.

    Its output is appended to `log`; `stdout` and `stdin` may be asyncio.subprocess.PIPE instead, `limit` is its longest
    line. Call it in the main thread: the kernel ties the child's life to the thread that forked it.
    """
    with open(log, "ab") as file:  # noqa: ASYNC230 (a local file, before anything waits)
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-I", "-S", launch.__file__, str(os.getpid()), *argv,
            stdin=stdin,
            stdout=file if stdout is None else stdout,
            stderr=file,
            env=environment(extra),
            limit=limit,
            start_new_session=True,  # a terminal's Ctrl-C is for us to act on, in our order
        )  # fmt: skip
    return Running(name, process, log)


async def end_family(child: Running, patience_s: float) -> None:
    """SIGTERM, SIGKILL after `patience_s`, and SIGKILL for whatever it had started and left behind."""
    family = {pid: command(pid) for pid in descendants(child.process.pid)} if child.alive else {}
    await child.stop(patience_s)
    for pid, line in family.items():
        if line and command(pid) == line:  # the same process still, not another with its number
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


async def finish(child: Running, timeout_s: float) -> int:
    """Wait for a child that ends by itself; its exit status. Raises UnavailableError, having killed it, when it does not."""
    try:
        await asyncio.wait_for(child.process.wait(), timeout_s)
    except asyncio.TimeoutError:
        raise UnavailableError(f"{child.name} did not end within {timeout_s:g} s; log {child.log}") from None
    finally:
        child.send(signal.SIGKILL)
    status = child.process.returncode
    assert status is not None
    return status


def tail(log: Path, lines: int = TAIL_LINES) -> str:
    """The last lines of a log, each cut to a bearable width."""
    try:
        text = log.read_bytes()[-64 * 1024 :].decode(errors="replace")
    except OSError:
        return ""
    return "\n".join(line[:WIDEST] for line in text.rstrip().splitlines()[-lines:])


@dataclass(frozen=True)
class Usage:
    """What one kind of process has used: how many there are, CPU seconds so far, and proportional memory in MiB."""

    count: int = 0
    cpu_s: float = 0.0
    pss_mb: float = 0.0

    def __add__(self, other: Usage) -> Usage:
        return Usage(self.count + other.count, self.cpu_s + other.cpu_s, self.pss_mb + other.pss_mb)


def parent_of(pid: int) -> int:
    """The id of a process's parent; 0 when the process is gone."""
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return 0


def descendants(pid: int) -> list[int]:
    """`pid` and all its living descendants."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, ValueError, IndexError):
                children.setdefault(parent_of(int(entry.name)), []).append(int(entry.name))
    found, queue = [], [pid]
    while queue:
        found.append(queue.pop())
        queue += children.get(found[-1], [])
    return found


def usage(pid: int) -> Usage:
    """Of one process, without its children: CPU seconds (user and system, ended children not) and Pss in MiB."""
    try:
        cpu_s = cpu_seconds(Path(f"/proc/{pid}/stat"))
        found = re.search(r"^Pss:\s+(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
        return Usage(1, cpu_s, int(found[1]) / 1024 if found else 0.0)
    except (OSError, IndexError, ValueError):
        return Usage()


def cpu_seconds(stat: Path) -> float:
    """User and system time that a `stat` file under /proc tells, a process's or a thread's; raises OSError when gone."""
    fields = stat.read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def command(pid: int) -> str:
    """The command line, blanks between its arguments; empty when the process is gone."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    return ""
