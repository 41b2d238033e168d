"""A whole fleet of real processes on this machine: `bmoe up`, and agents that join with tokens, honest or not.

Shared by the demonstration, the tests and the benchmarks. Everything lies under one directory:
state/ (the gateway's), agents/NAME/, logs/NAME.log. Nothing outlives the process that made the fleet.

    async with LocalFleet(folder, specs(10, liars={3, 5, 7}, attack="collude", seed=1)) as fleet:
        await fleet.start()
        fleet.client().infer(...)
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import mosquitto
from benchmarks.processes import Running, Usage, command, descendants, finish, parent_of, program, spawn, tail, usage
from bmoe.client import Client
from bmoe.protocol.errors import ConfigError, UnavailableError
from coordinator.cli.admin import Admin
from coordinator.cli.commands import api_url, client_of

GATEWAY = "gateway"
WORKER = "bmoe.inference.worker"
UP_WITHIN_S = 60.0
JOIN_WITHIN_S = 30.0
ONLINE_WITHIN_S = 60.0
AGENT_PATIENCE_S = 5.0
GATEWAY_PATIENCE_S = 20.0
POLL_S = 0.05


@dataclass(frozen=True)
class AgentSpec:
    """One agent to be: its name, who owns it, how it cheats (None: it is honest), and further flags of its command."""

    name: str
    owner: str
    attack: str | None = None
    flags: tuple[str, ...] = ()


def specs(count: int, liars: Collection[int] = (), attack: str = "collude", seed: int = 0) -> list[AgentSpec]:
    """`count` agents, each of an owner of its own; those whose index is in `liars` cheat, all with one seed."""
    names = [f"edge-{i + 1:02d}" for i in range(count)]
    flags = ("--seed", str(seed))
    return [
        AgentSpec(name, f"owner-{i + 1:02d}", attack, flags) if i in liars else AgentSpec(name, f"owner-{i + 1:02d}")
        for i, name in enumerate(names)
    ]


@dataclass
class LocalFleet:
    """One gateway and its agents. Leaving the context stops every process; files stay, they are the caller's.

    `failed` is set to an UnavailableError as soon as a process ends that nobody asked to.
    """

    root: Path
    agents: Sequence[AgentSpec] = ()
    gateway_flags: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    broker: str = field(default_factory=mosquitto.chosen)
    running: dict[str, Running] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.state, self.logs = self.root / "state", self.root / "logs"
        self.environment = {**mosquitto.settings(self.broker), **self.environment}
        self._watching: set[asyncio.Task[None]] = set()
        self._specs = {spec.name: spec for spec in self.agents}

    async def __aenter__(self) -> LocalFleet:
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        for folder in (self.state, self.logs, self.root / "agents"):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()
        if self.failed.done():
            self.failed.exception()  # looked at, or asyncio complains

    @property
    def trust(self) -> Path:
        """The policy file that an auditor is given."""
        return self.state / "trust.json"

    @property
    def url(self) -> str:
        """The inference API's address."""
        return api_url(self.state)

    def client(self, token: str | None = None) -> Client:
        """A new client of the gateway."""
        return client_of(None, self.state, token, None)

    async def start(self) -> None:
        """Gateway, joins, agents; returns when all are online. Raises BmoeError with what failed."""
        await self.start_gateway()
        await self.start_agents(self.agents)
        await self.wait_online(len(self.agents))

    async def start_gateway(self) -> None:
        """`bmoe up`; returns when the API is ready to infer. Raises UnavailableError when it does not come up."""
        argv = (program("bmoe"), "up", "--state", str(self.state), *self.gateway_flags)
        child = await self._spawn(GATEWAY, argv)
        await self._until(self._ready, UP_WITHIN_S, lambda: f"the gateway is not ready\n{self._gateway_tails()}", child)

    async def start_agents(self, agents: Iterable[AgentSpec]) -> None:
        """Join and run agents, as many joins at once as there are processors. They need not be online on return."""
        turn = asyncio.Semaphore(os.cpu_count() or 1)

        async def one(spec: AgentSpec) -> None:
            async with turn:
                await self.join(spec)
                await self.run(spec)

        await asyncio.gather(*(one(spec) for spec in agents))

    async def join(self, spec: AgentSpec) -> None:
        """`bmoe-agent join` with a new token of the spec's owner; raises UnavailableError with its last words."""
        self._specs[spec.name] = spec
        body = {"name": spec.name, "owner": spec.owner, "batch": "local", "ttl_s": 3600}
        reply = await asyncio.to_thread(lambda: Admin(self.state).call("POST", "/v1/admin/tokens", body))
        argv = (program("bmoe-agent"), "join", reply["token"], "--state", str(self.folder(spec.name)))
        child = await spawn(f"{spec.name} join", argv, self.log(spec.name))
        status = await finish(child, JOIN_WITHIN_S)
        if status != 0:
            raise UnavailableError(f"{spec.name} could not join (status {status})\n{tail(child.log)}")

    async def run(self, spec: AgentSpec) -> None:
        """Start an agent that has joined: `bmoe-agent run`, or the dishonest one."""
        state = ("--state", str(self.folder(spec.name)))
        if spec.attack is None:
            argv = (program("bmoe-agent"), "run", *state, *spec.flags)
        else:
            argv = (sys.executable, "-m", "benchmarks.dishonest", "--attack", spec.attack, *state, *spec.flags)
        await self._spawn(spec.name, argv)

    async def wait_online(self, count: int, within_s: float = ONLINE_WITHIN_S) -> None:
        """Return once `count` agents are online; raises UnavailableError naming who is missing."""
        online: set[str] = set()
        with_client = self.client()

        async def enough() -> bool:
            """Whether so many are online now, noting who has been."""
            rows = await asyncio.to_thread(with_client.fleet)
            online.update(row["agent"] for row in rows if row["online"])
            return sum(row["online"] for row in rows) >= count

        def missing() -> str:
            names = sorted(set(self._specs) - online)
            tails = [f"{name}:\n{tail(self.log(name))}" for name in names[:2]]
            return "\n".join([f"{len(online)} of {count} agents came online; missing: {', '.join(names)}", *tails])

        try:
            await self._until(enough, within_s, missing)
        finally:
            with_client.close()

    async def kill(self, name: str) -> None:
        """SIGKILL a process (an agent's name, or "gateway") and wait for its end."""
        child = self.running[name]
        child.send(signal.SIGKILL)
        await child.process.wait()

    async def restart(self, name: str) -> None:
        """Start again what was killed or stopped, on the same state; for the gateway, wait until it is ready."""
        if self.running[name].alive:
            await self.running[name].stop(AGENT_PATIENCE_S)
        if name == GATEWAY:
            await self.start_gateway()
        else:
            await self.run(self._specs[name])

    async def stop(self) -> None:
        """End every process, agents first, so that their farewells still find the broker."""
        agents = [child for name, child in self.running.items() if name != GATEWAY]
        await asyncio.gather(*(child.stop(AGENT_PATIENCE_S) for child in agents))
        if GATEWAY in self.running:
            await self.running[GATEWAY].stop(GATEWAY_PATIENCE_S)
        await asyncio.gather(*self._watching, return_exceptions=True)

    def pids(self) -> dict[str, int]:
        """Process ids by name, of those that run."""
        return {name: child.process.pid for name, child in self.running.items() if child.alive}

    def folder(self, name: str) -> Path:
        """An agent's state directory."""
        return self.root / "agents" / name

    def log(self, name: str) -> Path:
        """The log of one process that this fleet started."""
        return self.logs / f"{name}.log"

    def members(self) -> dict[int, str]:
        """Every process of the fleet by its id, and its kind: agent, agent worker, and each of the gateway's."""
        return {
            member: _kind(name, command(member), command(parent_of(member)))
            for name, pid in self.pids().items()
            for member in descendants(pid)
        }

    def usage(self) -> dict[str, Usage]:
        """CPU and memory by kind of process."""
        kinds: dict[str, Usage] = {}
        for member, kind in self.members().items():
            kinds[kind] = kinds.get(kind, Usage()) + usage(member)
        return kinds

    async def _spawn(self, name: str, argv: Sequence[str]) -> Running:
        child = self.running[name] = await spawn(name, argv, self.log(name), extra=self.environment)
        watching = asyncio.ensure_future(self._watch(child))
        self._watching.add(watching)
        watching.add_done_callback(self._watching.discard)
        return child

    async def _watch(self, child: Running) -> None:
        status = await child.process.wait()
        if not child.expected and not self.failed.done():
            words = self._gateway_tails() if child.name == GATEWAY else tail(child.log)
            self.failed.set_exception(UnavailableError(f"{child.name} ended with status {status}\n{words}"))

    async def _ready(self) -> bool:
        def ask() -> bool:
            try:
                with contextlib.closing(self.client()) as client:
                    return client.ready()
            except (ConfigError, UnavailableError):  # no ports.json yet, or nobody listens yet
                return False

        return await asyncio.to_thread(ask)

    async def _until(
        self, done: Any, within_s: float, complaint: Callable[[], str], child: Running | None = None
    ) -> None:
        """Ask `done()` until it says True; raises UnavailableError on time-out or when a process has ended."""
        deadline = time.monotonic() + within_s
        while not await done():
            if self.failed.done():
                self.failed.result()
            if child is not None and not child.alive:
                raise UnavailableError(f"{child.name} ended with status {child.process.returncode}: {complaint()}")
            if time.monotonic() > deadline:
                raise UnavailableError(f"{complaint()}\n(waited {within_s:g} s)")
            await asyncio.sleep(POLL_S)

    def _gateway_tails(self) -> str:
        """The last words of the gateway and of whichever of its processes spoke last."""
        logs = sorted((self.state / "logs").glob("*.log"), key=lambda path: path.stat().st_mtime)[-2:]
        return "\n".join(f"{path}:\n{tail(path)}" for path in [self.log(GATEWAY), *logs])


def _kind(name: str, line: str, parent: str) -> str:
    """What a process is, from its owner among ours, its command line and its parent's."""
    if name != GATEWAY:
        return "agent worker" if WORKER in line else "agent"
    if WORKER in line and "bmoe.ledger.validator" in parent:
        return "validator worker"
    table = (
        (WORKER, "gateway worker"),
        ("coordinator.service", "coordinator"),
        ("coordinator.identity.registrar", "registrar"),
        ("bmoe.ledger.validator", "validator"),
        ("/broker/nats.conf", "nats broker"),
        ("/broker/mosquitto.conf", "mosquitto"),
        ("/ledger/nats.conf", "nats ledger"),
    )
    return next((kind for mark, kind in table if mark in line), "bmoe up")
