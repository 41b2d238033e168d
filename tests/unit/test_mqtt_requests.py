"""Requests over MQTT, without a broker: one answer each, an error for whatever is none, no flood that starves others."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any, TypeVar

import pytest

from bmoe.protocol.errors import BmoeError, InputError, MessageError, RefusedError, UnavailableError
from bmoe.protocol.messages import Member
from coordinator import mqtt_requests, recent
from coordinator.bodies import Bodies
from coordinator.intake import LARGE_BYTES
from coordinator.mqtt_history import reply_to
from coordinator.mqtt_requests import DEVICE_RUNNING, DEVICE_WAITING, REFUSALS_SENT, MqttRequests, id_of, owner_of
from coordinator.recent import DEVICE_BYTES, DEVICE_COUNT, KEEP_S, TOTAL_BYTES, Recent, request_key

T = TypeVar("T")


class Gateway:
    """What requests end in: a gate that is opened when the test says so, and a link whose messages are kept."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str, bytes]] = []
        self.told: list[tuple[str, dict[str, Any]]] = []
        self.open, self.up = asyncio.Event(), asyncio.Event()
        self.open.set()
        self.up.set()
        self.error: BaseException | None = None
        self.payload_max = 1 << 20
        self.news = asyncio.Event()
        self.known: dict[str, dict[str, Any] | None] = {}
        self.noted: list[str] = []
        self.bodies, self.put_aside = Bodies(1 << 30), 0
        self.requests = MqttRequests(
            self.answer, self, self.status, lambda device: f"owner-of-{device}", self, self.bodies, self.aside
        )

    def status(self, error: BmoeError) -> int:
        return 400 if isinstance(error, InputError) else 503

    async def aside(self, work: Callable[[], T]) -> T:
        self.put_aside += 1
        return await asyncio.to_thread(work)

    async def earlier(self, tenant: str, client_id: str, where: str) -> tuple[bool, bytes | None]:
        assert tenant == f"owner-of-{where.split(' ')[0]}"
        values = self.known.get(where)
        return where in self.known, None if values is None else json.dumps(values).encode()

    def sent(self, request: str) -> None:
        self.noted.append(request)

    async def answer(self, device: str, model: str, body: bytes, where: str) -> tuple[bytes, str]:
        key = request_key(id_of(body), model, body) if id_of(body) else b""
        assert where == reply_to(device, key)
        self.asked.append((device, model, body))
        await self.open.wait()
        if self.error is not None:
            raise self.error
        values = {"id": id_of(body), "model_name": model, "turn": len(self.asked), "outputs": "x" * (len(body) // 4)}
        return json.dumps({**values, "parameters": {"request": "aa"}}).encode(), "aa"

    def publish(self, topic: str, payload: bytes, qos: int = 0, retain: bool = False) -> asyncio.Future[None]:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if not self.up.is_set():
            future.set_exception(UnavailableError("the link is down"))
        elif len(payload) > self.payload_max:
            future.set_exception(MessageError(f"a payload of {len(payload)} bytes exceeds {self.payload_max}"))
        else:
            assert (qos, retain) == (1, False)
            self.told.append((topic, json.loads(payload)))
            self.news.set()
            future.set_result(None)
        return future

    async def wait_up(self, timeout_s: float) -> None:
        await self.up.wait()

    async def ask(self, device: str, body: bytes, model: str = "wearable") -> None:
        self.requests.take(device, model, body)
        await self.quiet()

    async def quiet(self) -> None:
        """All that can go on without us has gone on."""
        for _ in range(8):
            await asyncio.sleep(0)

    def replies(self, device: str) -> list[dict[str, Any]]:
        return [values for topic, values in self.told if topic == f"bmoe/v1/{device}/reply"]


def body(client_id: str, **more: Any) -> bytes:
    return json.dumps({"id": client_id, "inputs": [], **more}).encode()


async def test_a_request_is_answered_on_its_own_devices_topic() -> None:
    gateway = Gateway()
    await gateway.ask("pi-1", body("a"))
    await gateway.ask("pi-2", b'{"inputs": []}', "fashion")
    assert gateway.asked == [("pi-1", "wearable", body("a")), ("pi-2", "fashion", b'{"inputs": []}')]
    assert gateway.replies("pi-1")[0]["id"] == "a" and gateway.replies("pi-2")[0]["model_name"] == "fashion"


async def test_a_request_that_comes_twice_is_run_once_and_told_the_same() -> None:
    gateway = Gateway()
    gateway.open.clear()
    await gateway.ask("pi-1", body("a"))
    await gateway.ask("pi-1", body("a"))  # while it is in work: the one answer serves both
    gateway.open.set()
    await gateway.quiet()
    assert len(gateway.asked) == len(gateway.told) == 1
    await gateway.ask("pi-1", body("a"))  # afterwards: the same answer again, for the first may have been lost
    assert len(gateway.asked) == 1 and gateway.told[0] == gateway.told[1]


async def test_only_the_same_device_id_model_and_bytes_are_the_same_request() -> None:
    gateway = Gateway()
    for device, model, payload in (
        ("pi-1", "wearable", body("a")),
        ("pi-2", "wearable", body("a")),
        ("pi-1", "fashion", body("a")),
        ("pi-1", "wearable", body("a", parameters={})),
        ("pi-1", "wearable", b"{}"),
        ("pi-1", "wearable", b"{}"),  # without an id, two readings may be alike
    ):
        await gateway.ask(device, payload, model)
    assert len(gateway.asked) == 6 == len(gateway.told)


async def test_what_failed_is_told_and_may_be_tried_again() -> None:
    gateway = Gateway()
    gateway.error = UnavailableError("no verdict on task 00")
    await gateway.ask("pi-1", body("a"))
    assert gateway.replies("pi-1") == [{"id": "a", "error": "no verdict on task 00", "status": 503}]
    gateway.error = None
    await gateway.ask("pi-1", body("a"))
    assert len(gateway.asked) == 2 and gateway.replies("pi-1")[1]["turn"] == 2


@pytest.mark.parametrize("payload", [b'{"id"', b'"id"', b'{"id": 1}', b'{"id": "' + b"x" * 129 + b'"}', b'\xff"id"'])
async def test_a_bad_id_or_body_gets_an_error_and_harms_nobody(payload: bytes) -> None:
    gateway = Gateway()
    gateway.error = MessageError("the body must be a JSON object")  # as the gateway says where the body has no id
    await gateway.ask("pi-1", payload)
    [reply] = gateway.replies("pi-1")
    assert reply["status"] == 400 and reply["error"]


async def test_a_fault_of_ours_is_told_without_details() -> None:
    gateway = Gateway()
    gateway.error = ZeroDivisionError("in line 7")
    await gateway.ask("pi-1", body("a"))
    assert gateway.replies("pi-1") == [
        {"id": "a", "error": "internal error; the gateway's log has the details", "status": 503}
    ]


async def test_a_flood_waits_for_itself_alone() -> None:
    gateway = Gateway()
    gateway.open.clear()
    for number in range(1000):
        gateway.requests.take("flood", "wearable", body(f"f{number}"))
    await gateway.ask("pi-1", body("a"))
    assert [device for device, _, _ in gateway.asked].count("flood") == DEVICE_RUNNING
    assert gateway.asked[-1][0] == "pi-1"
    refused = gateway.replies("flood")
    assert len(refused) == REFUSALS_SENT and refused[0]["status"] == 429 and refused[0]["id"] == f"f{DEVICE_WAITING}"
    gateway.open.set()
    await gateway.quiet()
    while len(gateway.replies("flood")) < REFUSALS_SENT + DEVICE_WAITING:
        await gateway.quiet()
    assert len(gateway.asked) == DEVICE_WAITING + 1  # what was refused is not run later
    await gateway.ask("flood", body("later"))
    assert gateway.replies("flood")[-1]["id"] == "later"


async def test_large_bodies_fill_a_devices_queue_by_their_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mqtt_requests, "DEVICE_BYTES", 1000)
    gateway = Gateway()
    gateway.open.clear()
    await gateway.ask("pi-1", b" " * 2000)  # one is always taken: the gateway's own limit on bodies judges it
    await gateway.ask("pi-1", b" ")
    assert len(gateway.asked) == 1 and gateway.replies("pi-1")[0]["status"] == 429
    gateway.open.set()
    await gateway.quiet()
    await gateway.ask("pi-1", b" ")
    assert len(gateway.asked) == 2


async def test_bodies_over_mqtt_and_http_share_one_account() -> None:
    """Those over MQTT once had one of their own, so that both together could hold far more than `bodies_bytes`."""
    gateway = Gateway()
    gateway.bodies = gateway.requests._bodies = Bodies(4000)
    gateway.open.clear()
    await gateway.ask("pi-1", b" " * 1500)
    with pytest.raises(UnavailableError, match="bodies of 1500 bytes"), gateway.bodies.held("owner-of-pi-1") as count:
        count(600)
    with gateway.bodies.held("somebody") as count:
        count(2000)
        await gateway.ask("pi-2", b" " * 600)
    [refused] = gateway.replies("pi-2")
    assert refused["status"] == 503 and "bodies of 3500 bytes are in work" in refused["error"]
    gateway.open.set()
    await gateway.quiet()
    await gateway.ask("pi-2", b" " * 600)
    assert [device for device, _, _ in gateway.asked] == ["pi-1", "pi-2"]
    gateway.bodies.add("owner-of-pi-1", 2000)  # all of it is given back


async def test_a_large_body_is_parsed_aside_so_that_it_holds_up_nobody() -> None:
    gateway = Gateway()
    await gateway.ask("pi-1", body("small"))
    assert gateway.put_aside == 0
    gateway.news.clear()
    gateway.requests.take("pi-1", "wearable", body("large", filler="x" * (2 * LARGE_BYTES)))
    await asyncio.wait_for(gateway.news.wait(), 5)
    assert gateway.put_aside == 1 and gateway.replies("pi-1")[1]["id"] == "large"


async def test_what_an_earlier_run_answered_or_has_in_work_is_not_run_again() -> None:
    gateway = Gateway()
    where = {i: reply_to("pi-1", request_key(i, "wearable", body(i))) for i in "ab"}
    gateway.known = {where["a"]: {"id": "a", "parameters": {"request": "bb"}}, where["b"]: None}
    for client_id in "abac":
        await gateway.ask("pi-1", body(client_id))
    assert [payload for _, _, payload in gateway.asked] == [body("c")]
    assert [reply["id"] for reply in gateway.replies("pi-1")] == ["a", "a", "c"]

    async def finished() -> tuple[str, bytes, str]:
        return "pi-1", b'{"id": "b"}', "cc"

    gateway.requests.tell(finished())  # the earlier run's
    await gateway.quiet()
    assert gateway.replies("pi-1")[-1]["id"] == "b" and gateway.noted == ["aa", "cc"]


async def test_an_answer_waits_for_a_broken_link() -> None:
    gateway = Gateway()
    gateway.up.clear()
    await gateway.ask("pi-1", body("a"))
    assert len(gateway.asked) == 1 and not gateway.told
    gateway.up.set()
    await asyncio.wait_for(gateway.news.wait(), 5)
    assert gateway.replies("pi-1")[0]["id"] == "a"


async def test_an_answer_that_no_message_holds_becomes_an_error() -> None:
    gateway = Gateway()
    gateway.payload_max = 300
    await gateway.ask("pi-1", body("a", filler="x" * 4000))
    [reply] = gateway.replies("pi-1")
    assert reply["id"] == "a" and "exceeds 300; ask for fewer rows" in reply["error"]


async def test_a_stop_ends_what_hangs_and_refuses_what_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mqtt_requests, "STOP_S", 0.05)
    gateway = Gateway()
    gateway.open.clear()
    await gateway.ask("pi-1", body("a"))
    stopping = asyncio.ensure_future(gateway.requests.stop())
    await gateway.quiet()
    await gateway.ask("pi-2", body("b"))
    await asyncio.wait_for(stopping, 5)
    assert gateway.replies("pi-2")[0]["error"] == "the gateway is stopping" and not gateway.replies("pi-1")


def test_a_devices_tenant_is_its_owner_and_strangers_have_none() -> None:
    def member(name: str, role: str) -> Member:
        return Member(
            ledger=bytes(16), epoch=0, author="registrar", seq=1, member=name, role=role, public_key=bytes(32),
            owner="ada", batch="", spki=bytes(32), issued_ms=1,
        )  # fmt: skip

    members = {"pi-1": member("pi-1", "agent"), "validator-1": member("validator-1", "validator")}
    assert owner_of(members, "pi-1") == "ada"
    for name in ("stranger", "validator-1"):
        with pytest.raises(RefusedError, match="not enrolled as a device"):
            owner_of(members, name)


# The memory of recent requests.


def test_memory_is_bounded_for_each_device_and_for_all() -> None:
    memory, reply = Recent(), b"r" * 1000
    for number in range(3 * DEVICE_COUNT):
        key = request_key(str(number), "m", b"")
        assert memory.begin("pi-1", key, 0.0) == (True, None)
        memory.done("pi-1", key, reply)
    assert memory.begin("pi-1", key, 1.0) == (False, reply)
    assert memory.begin("pi-1", request_key("0", "m", b""), 1.0) == (True, None)  # long forgotten
    memory.begin("pi-2", key, 1.0)
    memory.done("pi-2", key, b"x" * (DEVICE_BYTES + 1))
    assert memory.begin("pi-2", key, 1.0)[1] is not None  # one large reply is kept, alone
    assert memory.begin("pi-2", request_key("next", "m", b""), 1.0) == (True, None)
    assert memory.begin("pi-2", key, 1.0) == (True, None)


def test_all_devices_together_push_out_who_holds_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recent, "TOTAL_BYTES", 10_000)
    memory = Recent()
    for device, size in (("small", 10), ("large", 6000), ("other", 5000)):
        memory.begin(device, b"k", 0.0)
        memory.done(device, b"k", b"x" * size)
    found = {device: memory.begin(device, b"k", 1.0)[0] for device in ("small", "large", "other")}
    assert found == {"small": False, "large": True, "other": False}
    assert TOTAL_BYTES >= 16 * DEVICE_BYTES


def test_memory_ends_with_time() -> None:
    memory = Recent()
    memory.begin("pi-1", b"k", 0.0)
    memory.done("pi-1", b"k", b"reply")
    assert memory.begin("pi-1", b"k", KEEP_S) == (False, b"reply")
    assert memory.begin("pi-1", b"k", KEEP_S + 1) == (True, None)
