"""The ServerApp: one run for as long as the gateway is up. It carries what the coordinator hands it over a Unix socket.

A line of JSON each way. In: {"id", "node", "rollout", "sizes", "parts": [[path, file, offset, length]]}: push one message to
one node; or {"end": true}. Out: {"id", "reply": {...}} or {"id", "error": why}, and {"nodes": [ids]} whenever those
online have changed.
It decides nothing and remembers nothing: when it dies, the coordinator pushes again what is still lacking.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

from bmoe.protocol.errors import UnavailableError
from bmoe.protocol.niceness import give_way
from coordinator.flower.superlink import NICE

RETRY_S = 0.5
PULL_S = 0.5
NODES_S = 2.0
LINE_MAX = 4 << 20
# A node that is not there any more: the reply never comes, and the message is not delivered later.
TTL_S = 600.0
MESSAGE = "query.release"
PR_SET_PDEATHSIG = 1

app = ServerApp()


class _Post:
    """The socket to the coordinator, line by line."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        # Through the folder's descriptor: a Unix socket's path is short, and a state directory's may be long.
        handle = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            self._socket.connect(f"/proc/self/fd/{handle}/{path.name}")
        except OSError:
            self._socket.close()
            raise
        finally:
            os.close(handle)
        self._buffer = b""
        self._telling = threading.Lock()

    def lines(self, timeout_s: float) -> list[dict[str, Any]]:
        """What has come, after at most a moment; raises UnavailableError when the coordinator has gone."""
        if not select.select([self._socket], [], [], timeout_s)[0]:
            return []
        data = self._socket.recv(1 << 20)
        if not data or len(self._buffer) > LINE_MAX:
            raise UnavailableError("the coordinator has hung up")
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        return [json.loads(line) for line in lines]

    def tell(self, values: dict[str, Any]) -> None:
        with self._telling:
            self._socket.sendall(json.dumps(values).encode() + b"\n")

    def close(self) -> None:
        self._socket.close()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Serve one coordinator after another, until one says that another bridge serves it, or the SuperLink ends the run."""
    # Flower waits for what a SuperLink that is gone no longer sends, and its process would never end.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    give_way(NICE)
    path = Path(str(context.run_config["socket"]))
    while True:
        try:
            post = _Post(path)
        except OSError:  # the coordinator is being started again
            time.sleep(RETRY_S)
            continue
        try:
            return _serve(grid, post)
        except (UnavailableError, OSError):
            pass
        finally:
            post.close()


def _serve(grid: Grid, post: _Post) -> None:
    """Until the coordinator says that it is the end; raises UnavailableError or OSError when it has gone without a word."""
    nodes: list[int] | None = None
    looked = 0.0
    over, pushing = threading.Event(), threading.Lock()
    try:
        while True:
            for job in post.lines(NODES_S):
                if job.get("end"):
                    return
                arguments = (grid, post, job, over, pushing)
                threading.Thread(target=_carry, args=arguments, name=f"job-{job['id']}", daemon=True).start()
            if (now := time.monotonic()) - looked >= NODES_S:
                looked = now
                if (online := sorted(grid.get_node_ids())) != nodes:
                    nodes = online
                    post.tell({"nodes": nodes})
    finally:
        over.set()


def _carry(grid: Grid, post: _Post, job: dict[str, Any], over: threading.Event, pushing: threading.Lock) -> None:
    """Push one message, and wait for its reply.

    In a thread of its own: Flower waits for minutes for a reply that a node has begun to send, and others cannot wait
    for a node that was switched off just then, or that never means to send the rest.
    """
    try:
        with pushing:  # one piece in memory at a time
            (message,) = grid.push_messages([_message(job)])
        if not message:
            return post.tell({"id": job["id"], "error": "the node is not online"})
        while not over.wait(PULL_S):
            for reply in grid.pull_messages([message]):
                return post.tell({"id": job["id"], **_read(reply)})
    except Exception as error:  # whatever it is, the coordinator must hear of it and try again
        with contextlib.suppress(OSError):
            post.tell({"id": job["id"], "error": str(error)[:300] or type(error).__name__})


def _message(job: dict[str, Any]) -> Message:
    data = [_slice(Path(file), offset, length) for _, file, offset, length in job["parts"]]
    record = ConfigRecord(
        {
            "rollout": str(job["rollout"]),
            "sizes": json.dumps(job["sizes"]),
            "paths": [str(path) for path, *_ in job["parts"]],
            "offsets": [int(offset) for _, _, offset, _ in job["parts"]],
            "data": data,
        }
    )
    return Message(
        RecordDict({"release": record}), dst_node_id=int(job["node"]), message_type=MESSAGE, ttl=TTL_S,
        group_id=str(job["rollout"]),
    )  # fmt: skip


def _slice(file: Path, offset: int, length: int) -> bytes:
    with file.open("rb") as stream:
        stream.seek(offset)
        return stream.read(length)


def _read(reply: Message) -> dict[str, Any]:
    if reply.has_error():
        return {"error": f"Flower error {reply.error.code}: {str(reply.error.reason)[:200]}"}
    record = reply.content["reply"]
    return {"reply": json.loads(str(record["json"]))}
