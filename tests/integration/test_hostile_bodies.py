"""Bombs in bodies and floods of garbage, measured at the coordinator itself: what it holds, what it logs, whom it hears."""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import ssl
from pathlib import Path

import httpx
import pytest
from fault_tools import gateway_pid, until
from live_fleet import PATIENCE_S, LiveFleet

from bmoe.protocol.messages import Health, seal_message
from coordinator.embedded.ports import read_ports
from coordinator.fleet import WARNINGS_A_MINUTE

pytestmark = pytest.mark.asyncio(loop_scope="session")

MB = 1 << 20
# What the coordinator may grow by while it is being hurt. Bodies are 16 MiB at most, large ones are parsed one at a time,
# and JSON is up to twelve times as large in memory.
GROWTH_BYTES = 240 * MB
INFER = "/v2/models/wearable/infer"


def memory(pid: int, line: str) -> int:
    """VmRSS or VmHWM (the most that it ever held) of a process, in bytes."""
    found = next(row for row in Path(f"/proc/{pid}/status").read_text().splitlines() if row.startswith(line))
    return int(found.split()[1]) << 10


class Peak:
    """`with Peak(pid) as peak:` the most memory that a process holds within the block, beyond what it held before."""

    def __init__(self, pid: int) -> None:
        self._pid = pid

    def __enter__(self) -> Peak:
        Path(f"/proc/{self._pid}/clear_refs").write_text("5")  # the peak counts from here (proc(5))
        self._before = memory(self._pid, "VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        self.grown = memory(self._pid, "VmHWM") - self._before


def nested_lists() -> bytes:
    """15 MiB that become five million empty lists."""
    return b'{"inputs":[{"name":"window","shape":[1],"datatype":"FP32","data":[' + b"[]," * (5 * MB) + b"[]]}]}"


BOMBS: dict[str, tuple[bytes, dict[str, str]]] = {
    "five million lists": (nested_lists(), {}),
    "lists fifteen million deep": (b"[" * (15 * MB), {}),
    "seven million numbers": (nested_lists().replace(b"[]", b"0"), {}),
    "one long text among numbers": (
        json.dumps({"inputs": [{"name": "window", "shape": [2], "datatype": "FP32", "data": ["x" * MB, 1]}]}).encode(),
        {},
    ),
    "200 MB of zeros in 200 kB": (gzip.compress(bytes(200 * MB), 1), {"content-encoding": "gzip"}),
    "half a gzip stream": (gzip.compress(b"{}")[:-4], {"content-encoding": "gzip"}),
    "a head longer than its body": (bytes(MB), {"inference-header-content-length": "99999999"}),
}


@pytest.mark.parametrize("story", BOMBS)
async def test_a_bomb_in_a_body_costs_bounded_memory_and_one_line(fleet: LiveFleet, story: str) -> None:
    content, headers = BOMBS[story]
    with Peak(gateway_pid(fleet.fleet, "coordinator")) as peak:
        async with httpx.AsyncClient(base_url=fleet.fleet.url, timeout=60) as client:
            reply = await client.post(INFER, content=content, headers=headers)
    error = reply.json()["error"]
    assert reply.status_code in (400, 413) and "\n" not in error and len(error) < 1000, reply.text[:300]
    assert peak.grown < GROWTH_BYTES, f"{peak.grown / MB:.0f} MiB"
    await fleet.answers_right()


async def test_garbage_to_every_topic_of_a_device_is_named_a_few_times_and_serves_nobody(fleet: LiveFleet) -> None:
    async with fleet.board("spammer") as board:
        honest = Health(
            **board.stamp().common(), time_ms=1, known=(12,), cpu_percent=1, temperature_mc=1, memory_free_mb=1,
            throttled=0, queued=0, answered=0, refused=0, unreported=0,
        )  # fmt: skip
        sealed = seal_message(board.identity.signer, honest)
        garbage = (
            b"\x00",
            b"{}",
            b"\xd2\x84" + b"\x5b" + b"\xff" * 8,
            sealed[:-1],
            sealed + b"\x40",
            os.urandom(6 * MB),
        )

        async def heard() -> bool:
            return "queued" in await fleet.gateway.agent(board.name)

        with Peak(gateway_pid(fleet.fleet, "coordinator")) as peak:
            for channel in ("output", "refusal", "status", "health", "complaint", "request/wearable"):
                for payload in garbage:
                    await board.send(payload, channel=channel)
            sent = [board.peer.link.publish(f"bmoe/v1/{board.name}/output", b"flood", qos=1) for _ in range(600)]
            await asyncio.gather(*sent)
            await board.send(sealed, channel="health")  # good, and behind all of it
            await until(heard, PATIENCE_S, "the one good message behind the flood is heard")
        await fleet.answers_right()
        lines = [f for f in fleet.log_lines("coordinator", "message_refused") if f.get("agent") == board.name]
        assert 0 < len(lines) <= WARNINGS_A_MINUTE, len(lines)
        assert all("\n" not in f["error"] and len(f["error"]) < 500 for f in lines)
        assert peak.grown < GROWTH_BYTES, f"{peak.grown / MB:.0f} MiB"
    await fleet.unharmed()


async def test_garbage_to_the_fleets_https_is_one_line_of_json(fleet: LiveFleet) -> None:
    context = ssl.create_default_context(cafile=str(fleet.layout.ca))
    url = f"https://127.0.0.1:{read_ports(fleet.fleet.state)['fleet']}"
    bodies = (b"", b"[" * 60_000, b"null", b'{"token": "\\ud800"}', b'{"csr": 1e999}', os.urandom(1000), bytes(70_000))
    async with httpx.AsyncClient(base_url=url, verify=context, timeout=PATIENCE_S) as client:
        for body in bodies[:3]:
            reply = await client.post("/v1/enrol", content=body)
            assert reply.status_code in (400, 429) and reply.json()["error"], reply.text
        for body in bodies:
            reply = await client.post("/v1/renew", content=body)
            assert reply.status_code == 403 and reply.json()["error"]
        for path in ("/v1/blobs/..%2f..%2fetc%2fpasswd", "/v1/blobs/" + "0" * 5000, "/v1/releases/%00", "/%2e%2e/"):
            assert (await client.get(path)).status_code in (403, 404, 414)
