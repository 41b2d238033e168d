"""Hostile ends of a running fleet: broken HTTP over raw sockets, garbage from an enrolled device. Others are served on."""

from __future__ import annotations

import asyncio
import random

import psutil
import pytest
from fault_tools import kill_in_gateway, until
from live_fleet import Board, LiveFleet

from bmoe.ledger.rules.commitments import commit_rows
from bmoe.protocol.messages import Output, open_message, seal_message, tensor_specs
from bmoe.protocol.tensors import Tensor
from bmoe.protocol.tls import mutual_tls
from bmoe.protocol.topics import topic
from coordinator.embedded.ports import read_ports

pytestmark = pytest.mark.asyncio(loop_scope="session")
INFER = b"POST /v2/models/wearable/infer HTTP/1.1\r\nHost: gateway\r\n"
# Story, bytes, and the status lines that may answer; None where the connection may also end without a word.
BROKEN_HTTP: tuple[tuple[str, bytes, tuple[bytes | None, ...]], ...] = (
    ("no HTTP at all", b"\x16\x03\x01\x00\xff\x00\r\n\r\n", (b"400", None)),
    ("two different lengths", INFER + b"Content-Length: 2\r\nContent-Length: 50\r\n\r\n{}", (b"400", None)),
    ("length and chunks", INFER + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", (b"400", None)),
    ("a chunk of -1", INFER + b"Transfer-Encoding: chunked\r\n\r\n-1\r\n{}\r\n0\r\n\r\n", (b"400", None)),
    ("an unknown encoding", INFER + b"Transfer-Encoding: chunked, x\r\n\r\n2\r\n{}\r\n0\r\n\r\n", (b"400", b"501", None)),
    ("a length of -1", INFER + b"Content-Length: -1\r\n\r\n", (b"400", None)),
    ("a length beyond all bounds", INFER + b"Content-Length: 999999999999999999999\r\n\r\n", (b"400", b"413", None)),
    ("a terabyte announced", INFER + b"Content-Length: 1099511627776\r\n\r\n{}", (b"413",)),
    ("a head without end", INFER + b"X: " + b"a" * 300_000, (b"400", b"431", None)),
    ("ten thousand headers", INFER + b"X: a\r\n" * 10_000 + b"\r\n", (b"400", b"431", None)),
    ("a header with a line break", INFER + b"Authorization: Bearer \x0b\x00x\r\nContent-Length: 2\r\n\r\n{}", (b"4", None)),
    ("a path of slashes and dots", b"GET /../../etc/passwd HTTP/1.1\r\nHost: g\r\n\r\n", (b"404", b"400")),
    ("no body that is JSON", INFER + b"Content-Length: 9\r\n\r\n[[[[[[[[[", (b"400",)),
    ("a head longer than the body", INFER + b"Inference-Header-Content-Length: 90\r\nContent-Length: 2\r\n\r\n{}", (b"400",)),
    ("a bomb that is none", INFER + b"Content-Encoding: gzip\r\nContent-Length: 3\r\n\r\nabc", (b"400",)),
)  # fmt: skip
RSS_GROWTH = 96 << 20


async def told(port: int, data: bytes, context: object = None) -> bytes | None:
    """What the server answers before it closes or waits for more, at most for 2 s; None for not a word."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
    try:
        writer.write(data)
        await writer.drain()
        return await asyncio.wait_for(reader.readline(), 2) or None
    except (ConnectionError, TimeoutError, asyncio.TimeoutError):
        return None
    finally:
        writer.transport.abort()


def gateway_memory(fleet: LiveFleet) -> int:
    """The resident bytes of all processes of the gateway, its inference workers included."""
    marked = f"{fleet.fleet.state}"
    found = 0
    for process in psutil.process_iter():
        try:
            if any(marked in part for part in process.cmdline()) or marked in process.environ().get("BMOE_STATE", ""):
                found += process.memory_info().rss
        except psutil.Error:
            continue
    return found


async def test_broken_http_costs_its_sender_one_status_and_nobody_else_anything(fleet: LiveFleet) -> None:
    ports = read_ports(fleet.fleet.state)
    before = gateway_memory(fleet)
    assert before > 50 << 20
    context = mutual_tls(fleet.layout.ca)
    context.check_hostname = False
    answers = await asyncio.gather(*(told(ports["api"], data) for _, data, _ in BROKEN_HTTP))
    for (story, _, allowed), line in zip(BROKEN_HTTP, answers, strict=True):
        status = None if line is None else line.split(b" ")[1]
        fits = any(status is None if a is None else status is not None and status.startswith(a) for a in allowed)
        assert fits, f"{story}: {line!r}"
    at_fleet = (data.replace(b"/v2/models/wearable/infer", b"/v1/enrol") for _, data, _ in BROKEN_HTTP)
    for line in await asyncio.gather(*(told(ports["fleet"], data, context) for data in at_fleet)):
        assert line is None or line.split(b" ")[1][:1] == b"4" or line.split(b" ")[1] == b"501", line
    await fleet.answers_right()
    assert gateway_memory(fleet) - before < RSS_GROWTH


async def test_garbage_from_an_enrolled_device_is_named_in_the_log_and_changes_nothing(fleet: LiveFleet) -> None:
    noise, before = random.Random(7), gateway_memory(fleet)
    async with fleet.board("babbler") as board:
        sizes = (0, 1, 100, 70_000, 1 << 20)
        for channel in ("output", "refusal", "status", "health", "complaint", "request/wearable", "request/none"):
            for size in sizes:
                await board.send(noise.randbytes(size), channel=channel)
        await board.send(b"[" * 200_000, channel="request/wearable")
        await fleet.rejected("babbler", "expected a COSE_Sign1")
    await fleet.answers_right()
    assert not fleet.log_lines("coordinator", "request_failed")
    assert not fleet.log_lines("coordinator", "handler_failed")
    assert gateway_memory(fleet) - before < RSS_GROWTH


async def test_what_a_device_leaves_retained_is_judged_anew_by_each_coordinator_and_changes_nothing(
    fleet: LiveFleet,
) -> None:
    """The broker gives it to whoever subscribes, so it is the first thing that a coordinator hears after its start."""
    async with fleet.board("hoarder") as board:
        output = unasked(board)
        left = {"output": output, "status": b"\xff" * 100, "health": b"\xa0", "request/wearable": b"{}"}
        for channel, payload in left.items():
            await board.peer.link.publish(topic("hoarder", channel), payload, qos=1, retain=True)
        await fleet.refused("hoarder", output, "the task is unknown or long closed")
        await kill_in_gateway(fleet.fleet, "coordinator")
        await until(lambda: _answers(fleet), 20, "a coordinator that answers again")
        await until(lambda: _said_twice(fleet), 5, "what was left is refused again")
        for channel in left:
            await board.peer.link.publish(topic("hoarder", channel), b"", qos=1, retain=True)
    assert not fleet.log_lines("coordinator", "handler_failed")
    facts = await fleet.unharmed()
    accused = [open_message(Output, e.first).header.author for e in facts.equivocations]
    assert "hoarder" not in accused and not facts.outputs_of("hoarder")


def unasked(board: Board) -> bytes:
    """A signed output for a task that never was."""
    tensor, salt = Tensor("probabilities", "float32", (1, 6), bytes(24)), bytes(16)
    header = Output(
        **board.stamp().common(), task=bytes(16), expert=bytes(32), input_root=bytes(32), rows=1,
        outputs=tensor_specs([tensor]), output_root=commit_rows(board.name, salt, [tensor], 1), provider="CPU", duration_us=1,
    )  # fmt: skip
    return seal_message(board.identity.signer, header, [salt, tensor.data])


async def _said_twice(fleet: LiveFleet) -> bool:
    lines = [fleet.log_lines("coordinator", event) for event in ("output_refused", "message_refused")]
    return all(sum(line["agent"] == "hoarder" for line in found) >= 2 for found in lines)


async def _answers(fleet: LiveFleet) -> bool:
    return fleet.is_right(await fleet.ask())


async def test_a_device_that_floods_its_topic_with_one_message_fills_no_log(fleet: LiveFleet) -> None:
    async with fleet.board("squawker") as board:
        for _ in range(300):
            await board.send(b"squawk")
        await fleet.rejected("squawker", "expected a COSE_Sign1")
        await fleet.answers_right()
    lines = [line for line in fleet.log_lines("coordinator", "message_refused") if line.get("agent") == "squawker"]
    assert 1 <= len(lines) <= 20, len(lines)
