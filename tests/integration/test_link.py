"""The link against a real nats-server over mutual TLS: acknowledged, cut, refused, flooded, and left alone."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import pytest
from certs import make_authority
from mqtt_broker import Broker, free_port

from bmoe.protocol.errors import ConfigError, MessageError, UnavailableError
from bmoe.protocol.link import Link, LinkSettings, Will


class Peer:
    """A link and what it has told, with waiting for more."""

    def __init__(self, settings: LinkSettings, will: Callable[[], Will] | None = None) -> None:
        self.messages: list[tuple[str, bytes]] = []
        self.downs: list[str] = []
        self.news = asyncio.Event()
        self.link = Link(settings, on_message=self._message, on_up=self.news.set, on_down=self._down, will=will)

    def _message(self, topic: str, payload: bytes) -> None:
        self.messages.append((topic, payload))
        self.news.set()

    def _down(self, reason: str) -> None:
        self.downs.append(reason)
        self.news.set()

    async def until(self, condition: Callable[[], bool], timeout_s: float = 10) -> None:
        async def wait() -> None:
            while not condition():
                self.news.clear()
                await self.news.wait()

        await asyncio.wait_for(wait(), timeout_s)


@pytest.fixture
async def broker(tmp_path: Path) -> AsyncIterator[Broker]:
    broker = Broker(tmp_path, make_authority(tmp_path / "ca"))
    await broker.start()
    yield broker
    broker.kill()


@pytest.fixture
async def peers(broker: Broker) -> AsyncIterator[Callable[..., Peer]]:
    made: list[Peer] = []

    def make(name: str, **options: object) -> Peer:
        will = options.pop("will", None)
        made.append(Peer(replace(broker.settings(name), **options), will))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for peer in made:
        await peer.link.stop()


async def up(*peers: Peer) -> None:
    for peer in peers:
        await peer.link.start()
        await peer.link.wait_up(10)


@pytest.mark.parametrize("size", [0, 1, 200_000, 4 << 20])
async def test_an_acknowledged_message_arrives_whole(peers: Callable[..., Peer], size: int) -> None:
    one, two = peers("one"), peers("two")
    two.link.subscribe("bmoe/v1/one/output")
    await up(one, two)
    payload = os.urandom(size)
    await asyncio.wait_for(one.link.publish("bmoe/v1/one/output", payload, qos=1), 10)
    await two.until(lambda: bool(two.messages))
    assert two.messages == [("bmoe/v1/one/output", payload)]


async def test_many_small_messages_in_one_tls_record_are_all_read(peers: Callable[..., Peer]) -> None:
    one, two = peers("one"), peers("two")
    two.link.subscribe("bmoe/v1/one/output")
    await up(one, two)
    sent = [one.link.publish("bmoe/v1/one/output", b"%d" % i, qos=i % 2) for i in range(900)]
    await asyncio.wait_for(asyncio.gather(*sent), 10)
    await two.until(lambda: len(two.messages) == 900)
    assert sorted(int(payload) for _, payload in two.messages) == list(range(900))


async def test_a_killed_broker_fails_what_is_on_the_way_and_the_link_comes_back_by_itself(
    broker: Broker, peers: Callable[..., Peer]
) -> None:
    one, two = peers("one"), peers("two")
    two.link.subscribe("bmoe/v1/one/output")
    await up(one, two)
    assert broker.process is not None
    broker.process.send_signal(19)  # SIGSTOP: it takes bytes and answers nothing
    unanswered = one.link.publish("bmoe/v1/one/output", b"lost", qos=1)
    broker.kill()
    with pytest.raises(UnavailableError, match="connection lost"):
        await asyncio.wait_for(unanswered, 10)
    await one.until(lambda: bool(one.downs))
    with pytest.raises(UnavailableError, match="link is down"):
        await one.link.publish("bmoe/v1/one/output", b"while down", qos=1)
    with pytest.raises(UnavailableError, match="Connection refused"):
        await one.link.wait_up(0.5)

    await broker.start()
    await one.link.wait_up(10)
    await two.link.wait_up(10)
    await asyncio.wait_for(one.link.publish("bmoe/v1/one/output", b"again", qos=1), 10)
    await two.until(lambda: bool(two.messages))
    assert two.messages == [("bmoe/v1/one/output", b"again")], "the subscription is renewed, nothing old is sent again"


async def test_abrupt_death_leaves_the_last_will_and_a_clean_stop_leaves_the_farewell(
    broker: Broker, peers: Callable[..., Peer]
) -> None:
    watcher = peers("two")
    watcher.link.subscribe("bmoe/v1/one/status")
    await up(watcher)
    settings = broker.settings("one")
    files = map(str, (settings.ca, settings.certificate, settings.key))
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-c", DYING, str(broker.port), *files, stdout=asyncio.subprocess.PIPE
    )
    assert child.stdout is not None
    assert await child.stdout.readline() == b"up\n"
    child.kill()
    await child.wait()
    await watcher.until(lambda: [p for _, p in watcher.messages] == [b"online", b"lost"])

    one = peers("one", will=lambda: Will("bmoe/v1/one/status", b"lost"))
    await up(one)
    await one.link.stop(Will("bmoe/v1/one/status", b"stopping"))
    await watcher.until(lambda: len(watcher.messages) == 3)
    late = peers("two")
    await watcher.link.stop()
    late.link.subscribe("bmoe/v1/one/status")
    await up(late)
    await late.until(lambda: bool(late.messages))
    assert [p for _, p in late.messages] == [b"stopping"], "retained, and no will followed it"


DYING = """
import asyncio, sys
from pathlib import Path
from bmoe.protocol.link import Link, LinkSettings, Will
async def main():
    settings = LinkSettings("127.0.0.1", int(sys.argv[1]), "one", *map(Path, sys.argv[2:5]))
    link = Link(settings, on_message=print, will=lambda: Will("bmoe/v1/one/status", b"lost"))
    await link.start()
    await link.wait_up(10)
    await link.publish("bmoe/v1/one/status", b"online", qos=1, retain=True)
    print("up", flush=True)
    await asyncio.sleep(60)
asyncio.run(main())
"""


async def test_refusals_say_who_refused_what(broker: Broker, tmp_path: Path) -> None:
    stranger = make_authority(tmp_path / "stranger", "stranger")
    unknown = broker.settings("three")
    cases = {
        "broker refused: not authorised": unknown,
        "alert": broker.settings("one", stranger),
        "certificate of 127.0.0.1:.* is refused": replace(broker.settings("one"), ca=stranger.ca),
        "Connection refused": replace(broker.settings("one"), port=free_port()),
    }
    for expected, settings in cases.items():
        peer = Peer(settings)
        await peer.link.start()
        with pytest.raises(UnavailableError, match=expected):
            await peer.link.wait_up(1)
        assert len(peer.downs) == 1, f"one reason is told once, not at every attempt: {peer.downs}"
        await peer.link.stop()
    missing = Link(replace(unknown, key=tmp_path / "no.key"), on_message=lambda t, p: None)
    with pytest.raises(ConfigError, match=r"no\.key"):
        await missing.start()


async def test_a_refused_subscription_is_a_reason_not_to_be_up(peers: Callable[..., Peer]) -> None:
    deaf = peers("deaf")
    deaf.link.subscribe("bmoe/v1/one/output")
    await deaf.link.start()
    with pytest.raises(UnavailableError, match="refused a subscription"):
        await deaf.link.wait_up(1)


async def test_a_server_name_that_is_not_in_the_certificate_is_refused(broker: Broker) -> None:
    peer = Peer(replace(broker.settings("one"), host="127.0.0.2"))
    await peer.link.start()
    with pytest.raises(UnavailableError, match=r"certificate of 127\.0\.0\.2"):
        await peer.link.wait_up(1)
    await peer.link.stop()


async def test_what_is_on_the_way_is_bounded_in_number_and_bytes(broker: Broker, peers: Callable[..., Peer]) -> None:
    one = peers("one", inflight_max=10, inflight_bytes=100_000)
    await up(one)
    sent = [one.link.publish("bmoe/v1/one/output", b"x", qos=1) for _ in range(11)]
    with pytest.raises(UnavailableError, match="10 messages"):
        await sent[10]
    await asyncio.gather(*sent[:10])
    large = [one.link.publish("bmoe/v1/one/output", bytes(60_000), qos=1) for _ in range(2)]
    with pytest.raises(UnavailableError, match="60000 bytes"):
        await large[1]
    await large[0]
    with pytest.raises(MessageError, match="exceeds the broker's"):
        await one.link.publish("bmoe/v1/one/output", bytes(8 << 20), qos=1)
    assert one.link.connected, "an oversized payload would have made the broker cut the connection"


async def test_a_host_that_swallows_packets_does_not_block_the_loop(broker: Broker) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(1)  # the kernel accepts, nobody shakes hands
        peer = Peer(replace(broker.settings("one"), port=silent.getsockname()[1], connect_timeout_s=0.3))
        await peer.link.start()
        longest, before = 0.0, time.monotonic()
        while not peer.downs:
            await asyncio.sleep(0.005)
            longest, before = max(longest, time.monotonic() - before), time.monotonic()
        assert "does not answer" in peer.downs[0] or "timed out" in peer.downs[0]
        assert longest < 0.2
        started = time.monotonic()
        await peer.link.stop()
        assert time.monotonic() - started < 0.1, "a stop does not wait for the dial"


async def test_a_broker_that_stops_answering_is_given_up(broker: Broker, peers: Callable[..., Peer]) -> None:
    one = peers("one", keepalive_s=2, connect_timeout_s=1.0)
    await up(one)
    assert broker.process is not None
    broker.process.send_signal(19)
    stat = Path(f"/proc/{broker.process.pid}/stat")
    while stat.read_text().rpartition(")")[2].split()[0] != "T":  # noqa: ASYNC110 (a signal tells nobody when it has arrived)
        await asyncio.sleep(0.01)
    unanswered = one.link.publish("bmoe/v1/one/output", b"x", qos=1)
    with pytest.raises(UnavailableError, match=r"does not answer|acknowledged nothing"):
        await asyncio.wait_for(unanswered, 10)
    broker.process.send_signal(18)
    await one.until(lambda: one.link.connected)


async def test_an_idle_link_costs_next_to_nothing(peers: Callable[..., Peer]) -> None:
    one = peers("one", keepalive_s=2)
    await up(one)
    before = time.process_time()
    await asyncio.sleep(3.2)  # the broker cuts a silent connection after 3
    assert time.process_time() - before < 0.1
    assert one.link.connected and not one.downs, "kept alive by its pings"
