"""Start, watch, restart and stop the processes of one machine. They die with us; their state is ours alone."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import sys
import threading
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from bmoe.protocol.errors import BmoeError, ConfigError, UnavailableError
from coordinator.embedded import launch
from coordinator.embedded.logtail import ALARM, LogTail, last_lines, rotate
from coordinator.embedded.ready import READY_FD, read_ready
from coordinator.embedded.state_dir import MARK, end_leftovers, lock_state

FIRST_DELAY = 0.2  # seconds before the first restart; doubles up to MAX_DELAY
MAX_DELAY = 5.0
STEADY_SECONDS = 30.0  # a child that lived this long starts again at FIRST_DELAY
POLL_SECONDS = 0.5
LOG_LIMIT = 16 * 1024 * 1024  # bytes of a child's own output before it moves to .1


@dataclass(frozen=True)
class Child:
    """One process to keep alive.

    `argv[0]` is an absolute path. `env` is added to ours. `log` takes stdout and stderr. `ready` returns once the
    process serves, with facts or None; without it the process must call `notify_ready` (coordinator.embedded.ready).
    `server_log` is the log whose lines that match `alarm` become events. Times are in seconds.
    """

    name: str
    argv: tuple[str, ...]
    log: Path
    env: Mapping[str, str] = field(default_factory=dict)
    ready: Callable[[], Awaitable[Mapping[str, Any] | None]] | None = None
    server_log: Path | None = None
    alarm: re.Pattern[bytes] = ALARM
    ready_within: float = 20.0
    grace: float = 10.0


@dataclass(frozen=True)
class Event:
    """What happened to a child. `code` is its exit code (-9: killed by signal 9), `facts` what it said when ready."""

    child: str
    kind: Literal["started", "ready", "exited", "restarting", "log", "leftover"]
    pid: int | None = None
    code: int | None = None
    detail: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class _Slot:
    child: Child
    first: asyncio.Future[Mapping[str, Any]]
    task: asyncio.Task[None] | None = None
    tail: LogTail | None = None
    process: asyncio.subprocess.Process | None = None


class Supervisor:
    """`async with Supervisor(state_dir, on_event) as supervisor: await supervisor.start(child)`.

    Entering locks the directory (ConfigError naming the holder) and ends what a killed supervisor left; leaving stops
    the children in reverse order. Claim ports and render configurations inside the block.
    """

    def __init__(self, state_dir: Path, on_event: Callable[[Event], None] = lambda event: None) -> None:
        self.state_dir = state_dir
        self._on_event = on_event
        self._slots: dict[str, _Slot] = {}
        self._lock: int | None = None
        self._tending: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Supervisor:
        self._lock = lock_state(self.state_dir)
        try:
            for pid in await asyncio.to_thread(end_leftovers, self.state_dir):
                self._emit(Event("supervisor", "leftover", pid, detail="ended a process of an earlier, killed run"))
        except BaseException:
            self._unlock()
            raise
        self._tending = asyncio.create_task(self._tend_logs())
        return self

    async def __aexit__(self, *_: object) -> None:
        try:
            await self.stop()
        finally:
            self._unlock()

    async def start(self, child: Child) -> Mapping[str, Any]:
        """Start `child` and return its facts once it is ready; from then on it is restarted whenever it exits.

        Raises UnavailableError with the tail of its log where it exits or stays unready at this first start.
        """
        if self._lock is None:
            raise ConfigError("the supervisor holds no state directory: use it as `async with Supervisor(...)`")
        if threading.current_thread() is not threading.main_thread():
            # The kernel sends the parent-death signal when the *thread* that forked ends, not the process.
            raise ConfigError("children must be started from the main thread: run the event loop there")
        if child.name in self._slots:
            raise ConfigError(f"a child named {child.name} is running already")
        slot = _Slot(child, asyncio.get_running_loop().create_future())
        slot.tail = LogTail(child.server_log, child.alarm) if child.server_log else None
        self._slots[child.name] = slot
        slot.task = asyncio.create_task(self._keep(slot), name=f"keep {child.name}")
        try:
            return await slot.first
        except BaseException:
            await self._stop_slot(self._slots.pop(child.name))
            raise

    async def stop(self) -> None:
        """SIGTERM to each child in reverse order of start, SIGKILL after its grace. May be called twice."""
        while self._slots:
            _, slot = self._slots.popitem()
            await self._stop_slot(slot)
        if self._tending is not None:
            self._tending.cancel()
            await asyncio.wait([self._tending])
            self._tending = None

    def restart(self, name: str) -> None:
        """End a child that runs; it is started again as after any exit."""
        slot = self._slots.get(name)
        if slot is not None and slot.process is not None:
            with contextlib.suppress(ProcessLookupError):
                slot.process.send_signal(signal.SIGTERM)

    def pids(self) -> dict[str, int]:
        """The pid of each child that runs now."""
        return {name: slot.process.pid for name, slot in self._slots.items() if slot.process is not None}

    async def _keep(self, slot: _Slot) -> None:
        loop = asyncio.get_running_loop()
        delay = FIRST_DELAY
        while True:
            begun = loop.time()
            try:
                detail = await self._live(slot)
            except Exception as error:  # whatever it was, `start` must hear of it, and later the watch must go on
                if not slot.first.done():
                    slot.first.set_exception(ConfigError(str(error)) if isinstance(error, OSError) else error)
                    return
                detail = str(error) if isinstance(error, BmoeError) else repr(error)
            if loop.time() - begun >= STEADY_SECONDS:
                delay = FIRST_DELAY
            self._emit(Event(slot.child.name, "restarting", detail=f"{detail}; next start in {delay:.1f} s"))
            await asyncio.sleep(delay)
            delay = min(2 * delay, MAX_DELAY)

    async def _live(self, slot: _Slot) -> str:
        """One life of the child, from start to exit; being cancelled ends it. Returns how it ended."""
        child = slot.child
        read_fd, write_fd = os.pipe()
        try:
            process = slot.process = await self._spawn(child, write_fd)
        except BaseException:
            os.close(read_fd)
            raise
        finally:
            os.close(write_fd)
        self._emit(Event(child.name, "started", process.pid))
        try:
            facts = await _until_ready(child, process, read_fd)
            self._emit(Event(child.name, "ready", process.pid, facts=facts))
            if not slot.first.done():
                slot.first.set_result(facts)
            return f"exited with code {await process.wait()}"
        finally:
            code = await _end(process, child.grace)
            slot.process = None
            self._emit(Event(child.name, "exited", process.pid, code))

    async def _spawn(self, child: Child, write_fd: int) -> asyncio.subprocess.Process:
        launcher = (sys.executable, "-I", "-S", launch.__file__, str(os.getpid()))
        marks = {MARK: str(self.state_dir.resolve()), READY_FD: str(write_fd)}
        log = os.open(child.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            return await asyncio.create_subprocess_exec(
                *launcher,
                *child.argv,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **child.env, **marks},
                pass_fds=(write_fd,),
                start_new_session=True,  # Ctrl-C reaches us alone, and we stop the children in order
            )
        finally:
            os.close(log)

    async def _stop_slot(self, slot: _Slot) -> None:
        if slot.task is not None:
            slot.task.cancel()
            await asyncio.wait([slot.task])
        self._tell_alarms(slot)
        if slot.tail is not None:
            slot.tail.close()
        if slot.first.done() and not slot.first.cancelled():
            slot.first.exception()  # retrieved, or asyncio would complain about it

    async def _tend_logs(self) -> None:
        while True:
            await asyncio.sleep(POLL_SECONDS)
            for slot in list(self._slots.values()):
                self._tell_alarms(slot)
                rotate(slot.child.log, LOG_LIMIT)

    def _tell_alarms(self, slot: _Slot) -> None:
        for line in slot.tail.poll() if slot.tail else ():
            self._emit(Event(slot.child.name, "log", detail=line))

    def _emit(self, event: Event) -> None:
        try:
            self._on_event(event)
        except Exception as error:  # a fault in telling must not end the watching
            context = {"message": f"on_event failed for {event}", "exception": error}
            asyncio.get_running_loop().call_exception_handler(context)

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


async def _until_ready(child: Child, process: asyncio.subprocess.Process, read_fd: int) -> Mapping[str, Any]:
    """The facts of the child once it serves. Raises UnavailableError when it exits first or takes too long."""
    if child.ready is None:
        telling: asyncio.Future[Mapping[str, Any] | None] = asyncio.ensure_future(read_ready(read_fd))
    else:
        os.close(read_fd)
        telling = asyncio.ensure_future(child.ready())
    dying = asyncio.ensure_future(process.wait())
    try:
        waiting: set[asyncio.Future[Any]] = {telling, dying}
        await asyncio.wait(waiting, timeout=child.ready_within, return_when=asyncio.FIRST_COMPLETED)
        if dying.done():
            raise _unready(child, f"exited with code {dying.result()} before it was ready")
        if not telling.done():
            raise _unready(child, f"was not ready within {child.ready_within:g} s")
        return telling.result() or {}
    finally:
        telling.cancel()
        dying.cancel()
        await asyncio.gather(telling, dying, return_exceptions=True)


def _unready(child: Child, what: str) -> UnavailableError:
    logs = [path for path in (child.log, child.server_log) if path is not None]
    tails = "".join(f"\n--- end of {path}\n{text}" for path in logs if (text := last_lines(path)))
    return UnavailableError(f"{child.name} {what}{tails or f'; {child.log} is empty'}")


async def _end(process: asyncio.subprocess.Process, grace: float) -> int:
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(grace):
                return await process.wait()
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
    return await process.wait()
