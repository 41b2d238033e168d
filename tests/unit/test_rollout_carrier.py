"""Over what a release is brought: Flower while a bridge is there or may still come, HTTPS where none does."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from bmoe.ledger.rules.entries import Rollout
from coordinator.embedded.state_dir import private_dir
from coordinator.flower.layout import FlowerLayout
from coordinator.flower.post import Post
from coordinator.rollout import carrier as module
from coordinator.rollout.carrier import Carrier
from coordinator.rollout.parcel import Parcel

PATIENCE_S = 0.3
ROLLOUT = Rollout(
    ledger=bytes(16), epoch=0, author="coordinator", seq=1, time_ms=5, rollout=b"r" * 16, model="toy", version=2,
    wave=("pi-1",), stage="canary", reason="",
)  # fmt: skip


class Gateway:
    """The coordinator's end, with what it has told agents; a bridge is a caller at its socket."""

    def __init__(self, folder: Path) -> None:
        self.layout, self.told = FlowerLayout(folder), []
        self.post: Post | None = None
        self.parcel = Parcel({}, (("a" * 64, 5),), folder)
        self.carrier = Carrier(self.layout, lambda: self.post, self._tell, self._parcel, PATIENCE_S)

    def _tell(self, agent: str, rollout: Rollout, carrier: str) -> None:
        self.told.append((agent, carrier))

    async def _parcel(self, rollout: Rollout) -> Parcel:
        return self.parcel

    async def listen(self) -> None:
        self.post = Post(self.layout)
        await self.post.start()

    async def bridge(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        assert self.post is not None
        reader, writer = await asyncio.open_unix_connection(str(self.layout.socket))
        async with asyncio.timeout(5):
            while not self.post.connected:  # noqa: ASYNC110 (the other end of a socket)
                await asyncio.sleep(0.01)
        return reader, writer

    def bring(self) -> None:
        self.carrier.bring(ROLLOUT, ["pi-1"], "auto")


@pytest.fixture
async def gateway(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Gateway]:
    monkeypatch.setattr(module, "TELL_AGAIN_S", 0.0)
    monkeypatch.setattr(module, "IDLE_S", 0.2)
    private_dir(tmp_path / "flower")
    made = Gateway(tmp_path / "flower")
    yield made
    made.carrier.forget(ROLLOUT.rollout)
    if made.post is not None:
        await made.post.stop()


async def later(gateway: Gateway, seconds: float) -> None:
    """Looks, as the driver has them, for some time."""
    for _ in range(round(seconds / 0.05)):
        await asyncio.sleep(0.05)
        gateway.bring()


async def test_a_superlink_that_never_comes_up_costs_its_patience_and_then_it_goes_over_https(gateway: Gateway) -> None:
    gateway.bring()
    assert gateway.told == [], "nobody is told anything before there is an address"
    await gateway.listen()  # the ports are claimed, and the SuperLink dies again and again
    gateway.bring()
    assert gateway.told == [("pi-1", "flower")], "its SuperNode starts while the SuperLink does"
    await later(gateway, 2 * PATIENCE_S)
    assert gateway.told[-1] == ("pi-1", "https")


async def test_a_superlink_that_dies_is_waited_for_and_one_that_stays_dead_is_not(gateway: Gateway) -> None:
    await gateway.listen()
    _, writer = await gateway.bridge()
    await later(gateway, 2 * PATIENCE_S)
    assert {carrier for _, carrier in gateway.told} == {"flower"}, "as long as there is a bridge"
    writer.close()
    await later(gateway, PATIENCE_S / 2)
    assert gateway.told[-1] == ("pi-1", "flower"), "it may be back in a moment"
    await later(gateway, PATIENCE_S)
    assert gateway.told[-1] == ("pi-1", "https")
    await gateway.bridge()
    gateway.bring()
    assert gateway.told[-1] == ("pi-1", "flower"), "back again"


async def test_that_a_bridge_was_away_while_nobody_asked_says_nothing(gateway: Gateway) -> None:
    await gateway.listen()
    gateway.bring()
    await asyncio.sleep(2 * PATIENCE_S)  # no rollout for days
    gateway.bring()
    assert gateway.told[-1] == ("pi-1", "flower")


async def test_without_flower_everything_goes_over_https_at_once(gateway: Gateway) -> None:
    gateway.carrier = Carrier(gateway.layout, lambda: None, gateway._tell, gateway._parcel, 0.0)
    gateway.bring()
    assert gateway.told == [("pi-1", "https")]


async def test_a_push_goes_on_from_where_the_agents_copy_ends(gateway: Gateway) -> None:
    await gateway.listen()
    reader, writer = await gateway.bridge()
    gateway.layout.nodes.write_text(json.dumps({"pi-1": {"node": 7, "key": "k"}}))
    await _say(gateway, writer, {"nodes": [7]})
    gateway.bring()
    first = json.loads(await asyncio.wait_for(reader.readline(), 5))
    assert [part[2:] for part in first["parts"]] == [[0, 5]] and first["node"] == 7
    writer.write(json.dumps({"id": first["id"], "reply": {"state": "lacking", "have": {"a" * 64: 3}}}).encode() + b"\n")
    second = json.loads(await asyncio.wait_for(reader.readline(), 5))
    assert [part[2:] for part in second["parts"]] == [[3, 2]], "no push begins again from zero"


async def test_a_board_to_which_flower_brings_nothing_again_and_again_fetches_over_https(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "AGAIN_S", 0.01)
    await gateway.listen()
    reader, writer = await gateway.bridge()
    gateway.layout.nodes.write_text(json.dumps({"pi-1": {"node": 7, "key": "k"}}))
    await _say(gateway, writer, {"nodes": [7]})
    for _ in range(module.FAILURES):
        await _until_told(gateway, "flower")
        job = json.loads(await asyncio.wait_for(reader.readline(), 5))
        writer.write(json.dumps({"id": job["id"], "error": "its ClientApp has not started in time"}).encode() + b"\n")
        await asyncio.sleep(0.05)
    await _until_told(gateway, "https")


async def _until_told(gateway: Gateway, carrier: str) -> None:
    async with asyncio.timeout(5):
        gateway.bring()
        while gateway.told[-1][1] != carrier:
            await asyncio.sleep(0.02)
            gateway.bring()


@pytest.mark.parametrize(
    "line", [b"\n", b"[]\n", b'{"nodes": 7}\n', b'{"nodes": ["x", {}]}\n', b'{"id": 1}\n', b"\xff\n"]
)
async def test_a_bridge_that_talks_nonsense_is_hung_up_on_and_harms_nobody(gateway: Gateway, line: bytes) -> None:
    await gateway.listen()
    reader, writer = await gateway.bridge()
    pushed = asyncio.create_task(gateway.post.push({"node": 1}, 5))  # type: ignore[union-attr]
    await asyncio.wait_for(reader.readline(), 5)
    writer.write(line)
    assert await asyncio.wait_for(reader.read(), 5) == b"", "hung up"
    with pytest.raises(Exception, match="has gone"):
        await pushed
    await gateway.bridge()


async def _say(gateway: Gateway, writer: asyncio.StreamWriter, values: dict[str, Any]) -> None:
    assert gateway.post is not None
    writer.write(json.dumps(values).encode() + b"\n")
    async with asyncio.timeout(5):
        while gateway.post.nodes != frozenset(values["nodes"]):  # noqa: ASYNC110 (the other end of a socket)
            await asyncio.sleep(0.01)


def test_a_socket_of_an_earlier_run_is_no_obstacle(tmp_path: Path) -> None:
    layout = FlowerLayout(tmp_path)
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(layout.socket))

    async def again() -> None:
        post = Post(layout)
        await post.start()
        assert layout.socket.stat().st_mode & 0o777 == 0o600
        await post.stop()

    asyncio.run(again())
