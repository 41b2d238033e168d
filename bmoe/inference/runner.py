"""Runs ONNX experts in one killable child process, so that native code neither blocks nor takes down its parent.

What an agent, a referee and a validator run experts with. The parent imports neither numpy nor onnxruntime.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bmoe.inference import framing
from bmoe.inference.providers import CPU, ENVIRONMENT
from bmoe.protocol.errors import BmoeError, ConfigError, InferenceError, InputError, UnavailableError
from bmoe.protocol.tensors import Tensor

# Not part of a task's time: on a slow board these alone take seconds, and killing them would only start them again.
START_TIMEOUT_S = 60.0
LOAD_TIMEOUT_S = 60.0
ANSWER_TIMEOUT_S = 10.0
LOG_TAIL_BYTES = 600
CONTROL_BYTES = 1 << 16
PACKAGE_ROOT = Path(__file__).resolve().parents[2]
# What a reply of a broken worker raises while it is read: end of stream, reset, and each way of being no frame.
BROKEN = (EOFError, OSError, ValueError, LookupError, struct.error, InputError)


@dataclass(frozen=True)
class ExpertFile:
    """An expert on disk: the SHA-256 of its ONNX file, and where that file is."""

    digest: bytes
    path: Path

    def __str__(self) -> str:
        return f"expert {self.digest.hex()[:12]}"


@dataclass(frozen=True)
class RunResult:
    """Outputs in the session's order, the time in onnxruntime alone, and the execution provider that computed them."""

    outputs: tuple[Tensor, ...]
    duration_us: int
    provider: str


class _Worker:
    """One life of the child process."""

    def __init__(self, python: str, settings: Sequence[int | str]) -> None:
        ours, theirs = socket.socketpair()
        self.log = os.memfd_create("bmoe-inference-log")
        self.link = ours
        self.streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self.provider = CPU
        try:
            self.process = subprocess.Popen(
                [python, "-m", "bmoe.inference.worker", str(os.getpid()), *map(str, settings)],
                stdin=theirs.fileno(), stdout=self.log, stderr=self.log, cwd="/", env=child_environment(),
                start_new_session=True,  # a terminal's Ctrl-C is for the parent to act on
            )  # fmt: skip
        except OSError as error:
            ours.close()
            os.close(self.log)
            raise UnavailableError(f"the inference worker cannot be started: {error}") from None
        finally:
            theirs.close()

    async def open(self) -> None:
        """Wait until the child is ready. Raises ConfigError if it is not within START_TIMEOUT_S."""
        if self.streams is not None:
            return
        self.streams = await asyncio.open_connection(sock=self.link)
        try:
            kind, parts = await self.exchange([], START_TIMEOUT_S, CONTROL_BYTES)
            if kind != framing.READY:
                raise ValueError(f"a first frame of kind {kind}")
            self.provider = parts[1].decode()
        except BROKEN as error:
            cause = await self.end()
            raise ConfigError(f"the inference worker did not start: {error or type(error).__name__}; {cause}") from None

    async def exchange(self, request: Sequence[bytes], timeout_s: float, max_bytes: int) -> tuple[int, list[bytes]]:
        """Send a request, read its reply. Raises TimeoutError, having killed the child, or one of BROKEN."""
        assert self.streams is not None
        reader, writer = self.streams
        expired = False

        def expire() -> None:
            nonlocal expired
            expired = True
            self.process.kill()

        timer = asyncio.get_running_loop().call_later(timeout_s, expire)
        try:
            writer.writelines(request)
            await writer.drain()
            reply = await _read_frame(reader, max_bytes)
        except BROKEN:
            if not expired:
                raise
        finally:
            timer.cancel()
        if expired:  # even if the reply was just in time: the child is dead
            raise TimeoutError
        return reply

    def kill(self) -> None:
        """Make an end of it without waiting; whoever does wait uses `end`."""
        self.process.kill()
        if self.streams is not None:
            self.streams[1].transport.abort()
        else:
            self.link.close()

    async def end(self) -> str:
        """Kill, wait until the kernel has taken the process back, and say how it died."""
        self.kill()
        status = await asyncio.get_running_loop().run_in_executor(None, self.process.wait)
        said = ""
        if self.log >= 0:
            size = os.fstat(self.log).st_size
            said = os.pread(self.log, LOG_TAIL_BYTES, max(0, size - LOG_TAIL_BYTES)).decode(errors="replace")
            os.close(self.log)
            self.log = -1
        return _cause_of_death(status) + (f": {' '.join(said.split())}" if said else "")


class Runner:
    """Runs experts one at a time, first come first served, in a child process that is replaced whenever it dies.

    `memory_mb` bounds what experts, their inputs and outputs use together in the child; `max_sessions` how many stay
    loaded; `nice` is added to the child's niceness; `variant` is another way to compute, of `sessions.VARIANTS`;
    `threads` compute one task; `providers` are execution providers in the order of preference, the CPU's coming last;
    `python` the child's interpreter, ours by default. The child dies with the thread that runs the event loop.
    """

    def __init__(
        self,
        *,
        memory_mb: int = 512,
        max_sessions: int = 16,
        nice: int = 0,
        variant: str = "",
        threads: int = 1,
        providers: Sequence[str] = (CPU,),
        python: str = "",
    ) -> None:
        if memory_mb < 1 or max_sessions < 1:
            raise ConfigError(f"memory_mb and max_sessions must be at least 1, got {memory_mb} and {max_sessions}")
        self._settings = (memory_mb, max_sessions, nice, variant, threads, ",".join(providers))
        self._python = python
        self._max_bytes = memory_mb << 20
        self._lock = asyncio.Lock()
        self._worker: _Worker | None = None
        self._ending: list[_Worker] = []
        self._closed = False
        self._due = 0.0
        self.provider = CPU

    @property
    def pid(self) -> int | None:
        """The child's process id, None while there is none."""
        return self._worker.process.pid if self._worker else None

    async def start(self) -> None:
        """Start the child ahead of the first task. Raises ConfigError, UnavailableError."""
        async with self._lock:
            await self._ready_worker()

    async def answers(self) -> bool:
        """Whether the child answers, or is at work within its time."""
        if self._lock.locked():  # it is killed when its time is over; one that even that does not end is stuck
            return time.monotonic() < self._due + ANSWER_TIMEOUT_S
        nobody = ExpertFile(b"", Path())
        try:
            async with self._lock:
                kind, _ = await self._call(nobody, framing.encode(framing.RUN, [nobody.digest]), ANSWER_TIMEOUT_S)
        except BmoeError:
            return False
        return kind == framing.ABSENT

    async def load(self, expert: ExpertFile, *, timeout_s: float = LOAD_TIMEOUT_S) -> None:
        """Load an expert ahead of its first task. Raises ModelError, InferenceError as `run` does."""
        async with self._lock:
            await self._load(expert, timeout_s)

    async def run(self, expert: ExpertFile, inputs: Sequence[Tensor], *, timeout_s: float) -> RunResult:
        """One run of an expert, loaded first where need be.

        `timeout_s` bounds the run alone, not the wait for earlier tasks, a restart or the loading. A caller that is
        cancelled while its task runs costs the others a restart.
        Raises ModelError for a file that is not the expert or cannot be served, InputError for inputs it does not take,
        InferenceError where it takes too long, needs too much memory, crashes or fails, UnavailableError once closed.
        """
        if timeout_s <= 0:
            raise InferenceError(f"{expert}: no time left to run it ({timeout_s * 1000:.0f} ms)")
        parts = [expert.digest]
        for tensor in inputs:
            parts += [framing.tensor_head(tensor.name, tensor.dtype, tensor.dims), tensor.data]
        size = sum(map(len, parts))
        if size > self._max_bytes:
            raise InferenceError(f"{expert}: inputs of {size} bytes exceed the {self._settings[0]} MB it may use")
        request = framing.encode(framing.RUN, parts)
        async with self._lock:
            kind, reply = await self._call(expert, request, timeout_s)
            for _ in range(2):  # not loaded; then, loaded beside others, it may need a worker of its own
                if kind == framing.ABSENT:
                    await self._load(expert, LOAD_TIMEOUT_S)
                    kind, reply = await self._call(expert, request, timeout_s)
            try:
                return _result(kind, reply)
            except BROKEN as error:
                self._abandon()
                raise InferenceError(f"{expert}: the worker's reply is malformed ({error}); restarted") from None

    async def close(self) -> None:
        """End the child; a task that runs fails with InferenceError, those that wait with UnavailableError."""
        self._closed = True
        self._abandon()
        async with self._lock:
            await self._end_all()

    async def __aenter__(self) -> Runner:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _load(self, expert: ExpertFile, timeout_s: float) -> None:
        request = framing.encode(framing.LOAD, [expert.digest, os.fsencode(os.path.abspath(expert.path))])
        kind, _ = await self._call(expert, request, timeout_s)
        if kind == framing.ABSENT:
            await self._call(expert, request, timeout_s)

    async def _call(self, expert: ExpertFile, request: Sequence[bytes], timeout_s: float) -> tuple[int, list[bytes]]:
        """Ask the child; errors it replies with are raised, and whatever leaves it unusable replaces it."""
        worker = await self._ready_worker()
        self._due = time.monotonic() + timeout_s
        try:
            kind, reply = await worker.exchange(request, timeout_s, self._max_bytes)
        except TimeoutError:
            await self._replace(worker)
            raise InferenceError(f"{expert} exceeded {timeout_s * 1000:.0f} ms; worker killed and restarted") from None
        except BROKEN as error:
            cause = await self._replace(worker)
            detail = "" if isinstance(error, (EOFError, OSError)) else f" ({error})"
            raise InferenceError(f"{expert}: the worker died{detail}, {cause}; restarted") from None
        except BaseException:  # cancelled: the reply nobody awaits now would be taken for that to the next request
            self._abandon()
            raise
        if kind == framing.WORN:
            await self._replace(worker)
            return framing.ABSENT, []
        if kind in framing.ERRORS:
            raise framing.ERRORS[kind](f"{expert}: {b' '.join(reply).decode(errors='replace')}")
        return kind, reply

    async def _ready_worker(self) -> _Worker:
        self._due = time.monotonic() + START_TIMEOUT_S
        if self._worker is not None and self._worker.process.poll() is not None:
            self._abandon(restart=False)
        await self._end_all()
        if self._closed:
            raise UnavailableError("the runner is closed")
        worker = self._worker = self._worker or _Worker(self._python or sys.executable, self._settings)
        try:
            await worker.open()
        except BaseException:
            self._abandon(restart=False)
            raise
        self.provider = worker.provider
        return worker

    async def _replace(self, worker: _Worker) -> str:
        """Put a new child in the place of a broken one, and say how that died."""
        self._abandon()
        return await worker.end()

    def _abandon(self, restart: bool = True) -> None:
        """Kill the child, and start the next at once, so that its imports are done before the next task comes."""
        if self._worker is None:
            return
        self._worker.kill()
        self._ending.append(self._worker)
        self._worker = None
        if restart and not self._closed:
            with contextlib.suppress(UnavailableError):  # the next task tries again, and says so
                self._worker = _Worker(self._python or sys.executable, self._settings)

    async def _end_all(self) -> None:
        while self._ending:
            worker = self._ending[-1]
            await worker.end()
            self._ending.remove(worker)


def child_environment() -> dict[str, str]:
    """What the child needs of ours, and nothing else: no secrets, no home."""
    kept = {name: os.environ[name] for name in ("LD_LIBRARY_PATH", "PYTHONHOME", "PYTHONPATH") if name in os.environ}
    if PACKAGE_ROOT.name not in ("site-packages", "dist-packages"):  # a checkout that nobody installed
        kept["PYTHONPATH"] = os.pathsep.join(filter(None, [str(PACKAGE_ROOT), kept.get("PYTHONPATH")]))
    single = {name: "1" for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS")} | ENVIRONMENT
    return kept | single | {"ORT_DISABLE_TELEMETRY": "1", "PYTHONSAFEPATH": "1"}


async def _read_frame(reader: asyncio.StreamReader, max_bytes: int) -> tuple[int, list[bytes]]:
    kind, count = framing.HEAD.unpack(await reader.readexactly(framing.HEAD.size))
    sizes = framing.part_sizes(await reader.readexactly(8 * count), max_bytes)
    return kind, [await reader.readexactly(size) for size in sizes]


def _result(kind: int, reply: Sequence[bytes]) -> RunResult:
    """The result in a DONE frame. Raises one of BROKEN."""
    if kind != framing.DONE:
        raise ValueError(f"a reply of kind {kind}")
    (duration_us,) = framing.DURATION.unpack(reply[0])
    outputs = [
        Tensor(*framing.parse_tensor_head(head), data) for head, data in zip(reply[2::2], reply[3::2], strict=True)
    ]
    return RunResult(tuple(outputs), duration_us, reply[1].decode())


def _cause_of_death(status: int) -> str:
    if status >= 0:
        return f"exited with status {status}"
    names = {number.value: number.name for number in signal.Signals}
    return f"killed by {names.get(-status, f'signal {-status}')}"
