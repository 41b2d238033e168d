"""The bridge with one node that begins to answer and never ends: Flower waits for it for minutes, the others must not."""

from __future__ import annotations

import json
import socket
import threading
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr")

from coordinator.flower import bridge
from coordinator.flower.bridge import _Post, _serve

SLOW, PROMPT = 1, 2


class Pool:
    """What the bridge asks of Flower's Grid, with two nodes: one answers at once, the other has begun to."""

    def __init__(self) -> None:
        self.ended = threading.Event()

    def get_node_ids(self) -> list[int]:
        return [SLOW, PROMPT]

    def push_messages(self, messages: list[int]) -> list[str]:
        return [str(node) for node in messages]

    def pull_messages(self, message_ids: list[str]) -> list[str]:
        if message_ids == [str(SLOW)]:
            self.ended.wait()  # as flwr's own does for minutes, while objects of a reply are missing
            return []
        return message_ids


class Coordinator:
    """The other end of the bridge's socket."""

    def __init__(self, folder: Path) -> None:
        self._server = socket.socket(socket.AF_UNIX)
        self._server.bind(str(folder / "bridge.sock"))
        self._server.listen()

    def called(self) -> None:
        self._peer, _ = self._server.accept()
        self._peer.settimeout(10)
        self._lines = self._peer.makefile()

    def say(self, **values: Any) -> None:
        self._peer.sendall(json.dumps(values).encode() + b"\n")

    def hear(self) -> dict[str, Any]:
        return dict(json.loads(self._lines.readline()))


def test_a_node_that_begins_a_reply_and_never_ends_it_holds_up_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A message can be made within a run of Flower's alone.
    monkeypatch.setattr(bridge, "_message", lambda job: job["node"])
    monkeypatch.setattr(bridge, "_read", lambda reply: {"reply": {"state": "installed"}})
    monkeypatch.setattr(bridge, "PULL_S", 0.01)
    pool, coordinator = Pool(), Coordinator(tmp_path)
    post = _Post(tmp_path / "bridge.sock")
    coordinator.called()
    serving = threading.Thread(target=_serve, args=(pool, post), daemon=True)
    serving.start()
    job = {"rollout": "ab", "sizes": {}, "parts": []}
    try:
        coordinator.say(id=1, node=SLOW, **job)
        coordinator.say(id=2, node=PROMPT, **job)
        heard = [coordinator.hear(), coordinator.hear()]
        assert {"id": 2, "reply": {"state": "installed"}} in heard and {"nodes": [SLOW, PROMPT]} in heard
        coordinator.say(id=3, node=PROMPT, **job)
        assert coordinator.hear()["id"] == 3
        coordinator.say(end=True)
        serving.join(10)
        assert not serving.is_alive(), "another bridge serves the coordinator"
    finally:
        pool.ended.set()
        post.close()
