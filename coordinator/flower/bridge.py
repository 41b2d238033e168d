"""The ServerApp: one run for as long as the gateway is up. It carries what the coordinator hands it over a Unix socket.

A line of JSON each way. In: {"id", "node", "rollout", "sizes", "parts": [[path, file, offset, length]]}: push one message to
one node. Out: {"id", "reply": {...}} or {"id", "error": why}, and {"nodes": [ids]} whenever those online have changed.
It decides nothing and remembers nothing: when it dies, the coordinator pushes again what is still lacking.
"""

from __future__ import annotations

import json
import os
import select
import socket
import time
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

from bmoe.protocol.errors import UnavailableError

RETRY_S = 0.5
PULL_S = 0.25
NODES_S = 2.0
LINE_MAX = 4 << 20
# A node that is not there any more: the reply never comes, and the message is not delivered later.
TTL_S = 600.0
MESSAGE = "query.release"

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
        self._socket.sendall(json.dumps(values).encode() + b"\n")

    def close(self) -> None:
        self._socket.close()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Serve one coordinator after another, until the SuperLink ends the run."""
    path = Path(str(context.run_config["socket"]))
    while True:
        try:
            post = _Post(path)
        except OSError:  # the coordinator is being started again
            time.sleep(RETRY_S)
            continue
        try:
            _serve(grid, post)
        except (UnavailableError, OSError):
            pass
        finally:
            post.close()


def _serve(grid: Grid, post: _Post) -> None:
    waiting: dict[str, int] = {}
    nodes: list[int] = []
    pulled = looked = 0.0
    while True:
        for job in post.lines(PULL_S if waiting else NODES_S):
            try:
                (message,) = grid.push_messages([_message(job)])
            except Exception as error:  # whatever it is, the coordinator must hear of it and try again
                post.tell({"id": job.get("id"), "error": str(error)[:300] or type(error).__name__})
                continue
            if message:
                waiting[message] = job["id"]
            else:
                post.tell({"id": job["id"], "error": "the node is not online"})
        now = time.monotonic()
        if waiting and now - pulled >= PULL_S:
            pulled = now
            for reply in grid.pull_messages(list(waiting)):
                job_id = waiting.pop(reply.metadata.reply_to_message_id, None)
                if job_id is not None:
                    post.tell({"id": job_id, **_read(reply)})
        if now - looked >= NODES_S:
            looked = now
            online = sorted(grid.get_node_ids())
            if online != nodes:
                nodes = online
                post.tell({"nodes": nodes})


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
