"""Receipts in the demonstration: one exported, checked in another process, and refused with one bit flipped."""

from __future__ import annotations

import asyncio
import random
import time
from pathlib import Path

from benchmarks.fleet import LocalFleet
from benchmarks.processes import finish, program, spawn, tail
from bmoe.protocol.errors import UnavailableError
from bmoe.protocol.files import write_durably

RECEIPT_WITHIN_S = 20.0
AUDIT_WITHIN_S = 20.0
RETRY_S = 0.2


async def export(fleet: LocalFleet, request: str, file: Path) -> None:
    """Write the receipt of an answer, once a quorum of validators has cosigned it; UnavailableError if they do not."""
    deadline = time.monotonic() + RECEIPT_WITHIN_S
    client = fleet.client()
    try:
        while True:
            try:
                receipt = await asyncio.to_thread(client.receipt, request)
                break
            except UnavailableError:
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(RETRY_S)
    finally:
        client.close()
    write_durably(file, receipt)


async def audit(fleet: LocalFleet, file: Path) -> tuple[int, str]:
    """`bmoe audit` in a process of its own, offline: its exit status and its first line."""
    log = fleet.logs / f"audit-{file.stem}.log"
    child = await spawn("audit", (program("bmoe"), "audit", str(file), "--trust", str(fleet.trust)), log)
    status = await finish(child, AUDIT_WITHIN_S)
    return status, next(iter(tail(log, 200).splitlines()), "nothing printed")


def flip_bit(data: bytes, dice: random.Random) -> tuple[bytes, int]:
    """The same bytes with one bit inverted, and which: counted from the first byte's lowest."""
    bit = dice.randrange(8 * len(data))
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed), bit
