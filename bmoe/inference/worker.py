"""The child process that runs ONNX experts: `python -m bmoe.inference.worker`, started by the runner alone.

Standard input is a stream socket to the runner (framing.py); standard output and error are its log. One request at a
time. It may be killed at any moment and holds nothing worth keeping. Once its imports are done it gives itself a limit
of memory: a tensor too large is then a failed allocation here, not a machine out of memory.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import socket
import sys
from collections import OrderedDict
from collections.abc import Sequence
from io import BufferedRWPair

import numpy as np

from bmoe.inference import framing, providers, sessions
from bmoe.protocol.errors import BmoeError, InferenceError

PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 38
MAX_LOG_BYTES = 1 << 20
MAX_MESSAGE_CHARS = 500
ALIGNMENT = 64
PIECE_BYTES = 1 << 16
Reply = tuple[int, list[bytes]]


class Cache:
    """The loaded experts by digest, the longest unused one first."""

    def __init__(
        self,
        max_sessions: int,
        max_bytes: int,
        variant: str = "",
        threads: int = 1,
        wanted: Sequence[str] = sessions.PROVIDERS,
    ) -> None:
        self.experts: OrderedDict[bytes, sessions.Expert] = OrderedDict()
        self.max_sessions = max_sessions
        self.max_bytes = max_bytes
        self.ways = (variant, threads, wanted)
        self.seen: set[bytes] = set()

    def answer(self, kind: int, digest: bytes, parts: Sequence[np.ndarray] | None) -> Reply:
        """Carry out one request. Raises BmoeError, MemoryError."""
        if parts is None:
            raise MemoryError
        if kind == framing.LOAD:
            self.load(digest, os.fsdecode(parts[0].tobytes()))
            return framing.LOADED, []
        if digest not in self.experts:
            return framing.ABSENT, []
        self.experts.move_to_end(digest)
        return framing.DONE, sessions.run_expert(self.experts[digest], parts)

    def load(self, digest: bytes, path: str) -> None:
        """Open an expert's session unless it is open, in place of the one longest unused; raises ModelError."""
        if digest in self.experts:
            return
        while len(self.experts) >= self.max_sessions:
            self.experts.popitem(last=False)
        self.seen.add(digest)
        self.experts[digest] = sessions.open_expert(sessions.read_model(path, digest, self.max_bytes), *self.ways)


def reply_to(cache: Cache, kind: int, digest: bytes, parts: Sequence[np.ndarray] | None) -> Reply:
    """The reply to one request, errors included."""
    try:
        return cache.answer(kind, digest, parts)
    except MemoryError:
        # Whether a task fits must not depend on the experts used before it, and unloading them is not enough: the
        # heap stays in pieces (measured).
        if cache.seen - {digest}:
            return framing.WORN, []
        text = f"the expert needs more memory than the {cache.max_bytes >> 20} MB it may use"
        return error_reply(InferenceError(text))
    except BmoeError as error:
        return error_reply(error)


def error_reply(error: BmoeError) -> Reply:
    """What the runner is told of an error: its kind, and one short line."""
    kind = next(kind for kind, known in framing.ERRORS.items() if isinstance(error, known))
    text = " ".join(str(error).split())[:MAX_MESSAGE_CHARS]
    return kind, [text.encode(errors="backslashreplace")]


def aligned(size: int) -> np.ndarray:
    """`size` bytes at a fixed alignment: vector code sums in another order where the alignment differs."""
    raw = np.empty(size + ALIGNMENT, np.uint8)
    start = -raw.__array_interface__["data"][0] % ALIGNMENT
    return raw[start : start + size]


def read_request(stream: BufferedRWPair) -> tuple[int, bytes, list[np.ndarray] | None] | None:
    """Kind, digest and further parts of one request (None if they do not fit), or None once the runner is gone."""
    head = stream.read(framing.HEAD.size)
    if len(head) < framing.HEAD.size:
        return None
    kind, count = framing.HEAD.unpack(head)
    first, *others = framing.part_sizes(stream.read(8 * count), sys.maxsize)
    digest = stream.read(first)
    try:
        parts = [aligned(size) for size in others]
    except MemoryError:
        skip(stream, sum(others))
        return kind, digest, None
    if any(stream.readinto(part.data) < part.size for part in parts):
        return None
    return kind, digest, parts


def skip(stream: BufferedRWPair, size: int) -> None:
    """Read so many bytes and forget them."""
    while size > 0 and (piece := stream.read(min(size, PIECE_BYTES))):
        size -= len(piece)


def serve(stream: BufferedRWPair, cache: Cache) -> None:
    """Answer requests until the runner closes its end."""
    provider = providers.present(cache.ways[2], sessions.onnxruntime.get_available_providers())[0]
    send(stream, framing.READY, [sessions.onnxruntime.__version__.encode(), provider.encode()])
    while (request := read_request(stream)) is not None:
        send(stream, *reply_to(cache, *request))
        del request  # waiting for the next one, hold nothing of this


def send(stream: BufferedRWPair, kind: int, parts: Sequence[bytes]) -> None:
    """Write one frame."""
    stream.writelines(framing.encode(kind, parts))
    stream.flush()


def die_with_parent(parent: int) -> None:
    """Be killed when the thread that started us ends, however it ends; exit if it has already."""
    libc = ctypes.CDLL(None)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(0)


def limit_resources(max_bytes: int, bounded: bool = True) -> None:
    """Bound what the experts may add to the memory in use now. RLIMIT_AS would count code mapped but never touched.

    Not `bounded` where a GPU's driver maps far more than it uses: there the service's own limit must do.
    """
    with open("/proc/self/status") as status:
        used = next(int(line.split()[1]) << 10 for line in status if line.startswith("VmData"))
    for what, limit in (
        *([(resource.RLIMIT_DATA, used + max_bytes)] if bounded else []),
        (resource.RLIMIT_FSIZE, MAX_LOG_BYTES),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(what)[1]
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(what, (limit, limit))
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("500")  # if the machine does run out, this process is the one to lose


def main() -> None:
    """Serve the runner on stdin and stdout until it ends."""
    parent, memory_mb, max_sessions, nice = map(int, sys.argv[1:5])
    for ignored in (signal.SIGINT, signal.SIGTERM):  # sent to the whole group; the runner decides
        signal.signal(ignored, signal.SIG_IGN)
    die_with_parent(parent)
    os.nice(nice)
    variant, threads, wanted = sys.argv[5], int(sys.argv[6]), sys.argv[7].split(",")
    limit_resources(memory_mb << 20, all(name in providers.BOUNDED for name in wanted))
    stream = socket.socket(fileno=0).makefile("rwb", PIECE_BYTES)
    assert isinstance(stream, BufferedRWPair)
    with contextlib.suppress(OSError):  # the runner is gone
        serve(stream, Cache(max_sessions, memory_mb << 20, variant, threads, wanted))
    os._exit(0)  # nothing here needs the interpreter's slow farewell


if __name__ == "__main__":
    main()
