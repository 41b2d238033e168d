"""What the tests of faults share: clients that never stop asking, and the gateway's own processes to be hurt."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from ledger_check import LedgerFacts

from benchmarks.fleet import GATEWAY, LocalFleet
from benchmarks.mosquitto import chosen
from benchmarks.processes import command, descendants
from bmoe.client import Answer, Client
from bmoe.protocol.errors import BmoeError, UnavailableError

MODEL, INPUT, SHAPE = "wearable", "window", (1, 6, 100)
CALL_S = 20.0  # the client's own patience: a call that takes so long is a call that hangs
PAUSE_S = 0.1  # of a client between two calls
POLL_S = 0.05  # where another process's state tells by no event
MARKS = {
    "coordinator": "coordinator.service",
    "registrar": "coordinator.identity.registrar",
    "validator-1": "bmoe.ledger.validator",
    "broker": "/broker/nats.conf" if chosen() == "nats" else "/broker/mosquitto.conf",
    "ledger": "/ledger/nats.conf",
}


@dataclass(frozen=True)
class Call:
    """One call of a client: when it began and ended (seconds, monotonic), and what came of it."""

    wait: str
    began: float
    ended: float
    answer: Answer | None
    error: BaseException | None


class Load:
    """`async with Load(fleet) as load:` clients that ask again and again, in turn for "committed" and "decided"."""

    def __init__(self, fleet: LocalFleet, clients: int = 3, waits: tuple[str, ...] = ("committed", "decided")) -> None:
        self._url, self._clients, self._waits = fleet.url, clients, waits
        self.calls: list[Call] = []
        self.in_flight = 0
        self._moved = asyncio.Condition()
        self._stopping = False

    async def __aenter__(self) -> Load:
        self._pool = ThreadPoolExecutor(self._clients)
        self._tasks = [asyncio.create_task(self._ask(number)) for number in range(self._clients)]
        return self

    async def __aexit__(self, *_: object) -> None:
        """Every call under way is waited for: none is ever abandoned, so none can hide that it hangs."""
        self._stopping = True
        await asyncio.gather(*self._tasks)
        self._pool.shutdown()

    @property
    def answers(self) -> list[Answer]:
        return [call.answer for call in self.calls if call.answer is not None]

    async def more(self, count: int, within_s: float) -> None:
        """Wait for `count` answers to calls that begin from now on."""
        now = time.monotonic()

        def enough() -> bool:
            return sum(call.answer is not None and call.began >= now for call in self.calls) >= count

        try:
            async with self._moved:
                await asyncio.wait_for(self._moved.wait_for(enough), within_s)
        except asyncio.TimeoutError:
            last = [repr(call.error) for call in self.calls[-3:]]
            raise AssertionError(f"no {count} new answers within {within_s:g} s; the last calls: {last}") from None

    async def flying(self, count: int) -> None:
        """Wait for a moment when so many calls are under way."""
        async with self._moved:
            await self._moved.wait_for(lambda: self.in_flight >= count)

    def check(self, facts: LedgerFacts, longest_s: float = CALL_S) -> None:
        """Every call ended in time, with an answer or a clear error, and every answer is what the ledger says."""
        for call in self.calls:
            assert call.ended - call.began < longest_s, f"a call took {call.ended - call.began:.1f} s: {call}"
            assert call.error is None or isinstance(call.error, UnavailableError), repr(call.error)
            if call.answer is None:
                assert str(call.error)
            else:  # "decided" as well: what was promised is entered, whoever died meanwhile
                facts.expect(call.answer)

    async def _ask(self, number: int) -> None:
        random = np.random.default_rng(number)
        client, turn = Client(self._url, timeout_s=CALL_S), number
        while not self._stopping:
            wait, turn = self._waits[turn % len(self._waits)], turn + 1
            window = random.standard_normal(SHAPE).astype(np.float32)
            await self._changed(+1)
            call = await asyncio.get_running_loop().run_in_executor(self._pool, _call, client, window, wait)
            self.calls.append(call)
            await self._changed(-1)
            await asyncio.sleep(PAUSE_S)
        client.close()

    async def _changed(self, more: int) -> None:
        async with self._moved:
            self.in_flight += more
            self._moved.notify_all()


def _call(client: Client, window: np.ndarray, wait: str) -> Call:
    began = time.monotonic()
    answer, error = None, None
    try:
        answer = client.infer(MODEL, {INPUT: window}, wait=wait)
    except BaseException as raised:
        error = raised
    return Call(wait, began, time.monotonic(), answer, error)


def gateway_pid(fleet: LocalFleet, name: str) -> int:
    """The process of `bmoe up` that MARKS names."""
    pids = [pid for pid in descendants(fleet.pids()[GATEWAY]) if MARKS[name] in command(pid)]
    assert len(pids) == 1, f"{name}: {len(pids)} processes run"
    return pids[0]


async def kill_in_gateway(fleet: LocalFleet, name: str, moment: Awaitable[None] | None = None) -> None:
    """kill -9 one of the gateway's processes, at once when `moment` is there, and see it end; `bmoe up` restarts it."""
    pid = gateway_pid(fleet, name)
    ended = asyncio.ensure_future(end_of(pid, CALL_S))
    if moment is not None:
        await moment
    os.kill(pid, signal.SIGKILL)
    await ended


async def end_of(pid: int, within_s: float = 5.0) -> None:
    """Wait for the end of any process, whoever is its parent."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(handle, ended.set)
    try:
        await asyncio.wait_for(ended.wait(), within_s)
    except asyncio.TimeoutError:
        raise AssertionError(f"process {pid} still lives after {within_s:g} s: {command(pid)}") from None
    finally:
        loop.remove_reader(handle)
        os.close(handle)


async def until(holds: Callable[[], Awaitable[bool]], within_s: float, what: str) -> None:
    """Ask another process until it says so; an UnavailableError of its is a no."""
    deadline = time.monotonic() + within_s
    while True:
        try:
            if await holds():
                return
        except BmoeError:
            pass
        assert time.monotonic() < deadline, f"{what}: not within {within_s:g} s"
        await asyncio.sleep(POLL_S)


class Gateway:
    """Questions to the gateway, off the loop and on connections of their own."""

    def __init__(self, fleet: LocalFleet) -> None:
        self._fleet = fleet

    async def ask(self, method: str, *arguments: Any) -> Any:
        """A method of bmoe.client.Client."""

        def ask() -> Any:
            client = self._fleet.client()
            try:
                return getattr(client, method)(*arguments)
            finally:
                client.close()

        return await asyncio.to_thread(ask)

    async def agent(self, name: str) -> dict[str, Any]:
        """One agent's row: standing, online, load."""
        return next(row for row in await self.ask("fleet") if row["agent"] == name)
