"""A ledger server, what validators ask the gateway for, a fleet that writes, and validators as processes."""

from __future__ import annotations

import asyncio
import contextlib
import http.server
import json
import os
import signal
import ssl
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nats
import pytest
from certs import Authority
from ledger_fixtures import TOY, TOY_ONNX, Fleet, OpenTask, Signed, toy

from bmoe.ledger.follower import Follower
from bmoe.ledger.receipts import read_reply
from bmoe.ledger.rules.checkpoint import parse_checkpoint, parse_note
from bmoe.ledger.rules.entries import BY_REFEREE
from bmoe.ledger.rules.frames import parse_frame
from bmoe.ledger.rules.receipt import merge_receipts
from bmoe.ledger.rules.state import State
from bmoe.ledger.rules.trust import format_trust
from bmoe.ledger.stream import LedgerAccess, LedgerStream, message_id
from bmoe.protocol.errors import UnavailableError, UnknownError
from coordinator.embedded.ledger_stream import ensure_checkpoint_stream, ensure_ledger_stream
from coordinator.embedded.nats_server import TlsFiles, prepare_ledger
from coordinator.embedded.supervisor import Child, Supervisor

PATIENCE = 15.0
VALIDATORS = ("validator-1", "validator-2")


@dataclass
class Kept:
    """What the gateway serves over mutual TLS: path -> bytes."""

    files: dict[str, bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    port: int = 0


@contextlib.contextmanager
def serving(authority: Authority) -> Iterator[Kept]:
    """An HTTPS gateway of evidence and blobs, as validators see it."""
    kept = Kept()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = kept.files.get(self.path)
            kept.asked.append(self.path)
            self.send_response(200 if body is not None else 404)
            body = body if body is not None else b'{"error": "not kept"}'
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(authority.ca))
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_cert_chain(authority.folder / "gateway.crt", authority.folder / "gateway.key")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    kept.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield kept
    finally:
        server.shutdown()
        server.server_close()


@dataclass
class Site:
    """One ledger server, a fleet that writes to it, and a follower that recomputes what is on it."""

    folder: Path
    authority: Authority
    port: int
    supervisor: Supervisor
    kept: Kept
    fleet: Fleet
    writers: dict[str, LedgerStream] = field(default_factory=dict)
    last: dict[str, int] = field(default_factory=dict)
    leaves: list[bytes] = field(default_factory=list)
    sent: int = 0
    follower: Follower | None = None

    def access(self, name: str) -> LedgerAccess:
        folder = self.authority.folder
        return LedgerAccess("127.0.0.1", self.port, self.authority.ca, folder / f"{name}.crt", folder / f"{name}.key")

    async def flush(self) -> None:
        """Send every frame that the fleet has written since; the engine orders them among the validators' own."""
        for data in self.fleet.messages[self.sent :]:
            frame = parse_frame(data)
            author = frame.header.author
            position = await self.writers[author].append(
                author, data, message_id(frame.digest), self.last.get(author, 0)
            )  # fmt: skip
            self.last[author], self.sent = position, self.sent + 1

    async def sees(self, predicate: Callable[[State], bool]) -> State:
        """Wait until a reader who recomputes everything finds this true."""
        assert self.follower is not None
        state = self.follower.state
        try:
            await self.follower.changed(lambda: predicate(state), PATIENCE)
        except asyncio.TimeoutError:
            pytest.fail(f"not seen within {PATIENCE} s; size {state.size}, claims {state.claims}")
        assert predicate(state)
        return state

    def keep(self, task: OpenTask) -> None:
        """Keep a task's input as evidence, as the coordinator must before it enters the verdict."""
        self.kept.files[f"/v1/evidence/{task.task.hex()}"] = self.fleet.task_message(task, "agent-1")

    async def decide(
        self, wrong: dict[str, float], referee: bool = False, **options: Any
    ) -> tuple[OpenTask, list[Signed]]:
        """A task that three agents answer, some off by a constant, and its verdict on the ledger."""
        fleet = self.fleet
        task = fleet.open_task()
        self.keep(task)
        outputs = [fleet.output(a, task, toy(task.x) + wrong.get(a, 0.0)) for a in fleet.agents[:3]]
        if referee:
            options |= {"referee": fleet.output("coordinator", task), "accepted": BY_REFEREE, "policy": "referee"}
        fleet.decide(task, outputs, **options)
        await self.flush()
        return task, outputs

    def arguments(self, name: str) -> list[str]:
        folder = self.authority.folder
        return [
            "--state", str(self.folder), "--name", name, "--ledger-port", str(self.port), "--ca", str(folder / "ca.crt"),
            "--certificate", str(folder / f"{name}.crt"), "--key", str(folder / f"{name}.key"),
            "--gateway", f"https://127.0.0.1:{self.kept.port}", "--spot-start", "1", "--spot-floor", "1",
        ]  # fmt: skip

    async def start(self, name: str) -> None:
        """A validator's own process, under the supervisor."""
        command = (sys.executable, "-m", "bmoe.ledger.validator", *self.arguments(name))
        env = {"PYTHONPATH": os.getcwd()}
        await self.supervisor.start(Child(name, command, self.folder / f"{name}.log", env=env))

    async def ask(self, validator: str, **question: Any) -> str:
        asked = json.dumps({"wait_ms": 2000, **question}).encode()
        client = self.writers["coordinator"].client
        return read_reply((await client.request(f"ledger.receipt.{validator}", asked, timeout=3)).data)

    async def whole_receipt(self, **question: Any) -> str:
        """One receipt with every validator's cosignature."""
        first = await self.ask(VALIDATORS[0], **question)
        return merge_receipts([first, await self.ask(VALIDATORS[1], size=size_of(first), **question)])


@contextlib.asynccontextmanager
async def site(folder: Path, authority: Authority, *validators: str) -> AsyncIterator[Site]:
    """The ledger founded, and these validators' processes ready."""
    # By the real clock: the validators are real processes, and a task dated far ahead of their ticks is refused.
    fleet = Fleet(validator_count=len(VALIDATORS), now_ms=time.time_ns() // 1_000_000)
    folder.mkdir(exist_ok=True)
    (folder / "trust.json").write_text(format_trust(fleet.trust))
    for name in VALIDATORS:
        (folder / name).mkdir()
        (folder / name / "validator.key").write_bytes(fleet.signers[name].private_key.private_bytes_raw())
    tls = {n: TlsFiles(authority.folder / f"{n}.crt", authority.folder / f"{n}.key", authority.ca)
           for n in ("gateway", "coordinator")}  # fmt: skip
    async with contextlib.AsyncExitStack() as stack:
        supervisor = await stack.enter_async_context(Supervisor(folder))
        server = prepare_ledger(folder, tls["gateway"], tls["coordinator"], validators=VALIDATORS)
        await supervisor.start(server.child)
        kept = stack.enter_context(serving(authority))
        kept.files[f"/v1/blobs/{TOY.hex()}"] = TOY_ONNX
        made = Site(folder, authority, server.ports["client"], supervisor, kept, fleet)
        await make_streams(made)
        for name in ("coordinator", "registrar"):
            made.writers[name] = await LedgerStream.connect(made.access(name), name)
            stack.push_async_callback(made.writers[name].close)
        fleet.found()
        await made.flush()
        state = State(fleet.ledger, fleet.epoch, fleet.registrar.public_key)
        made.follower = Follower(
            made.writers["coordinator"],
            state,
            recompute=True,
            on_applied=lambda _, applied: made.leaves.extend(applied.leaves),
        )
        made.follower.start()
        stack.push_async_callback(made.follower.stop)
        await asyncio.gather(*[made.start(name) for name in validators])
        yield made


async def make_streams(made: Site) -> None:
    access = made.access("bmoe-admin")
    admin = await nats.connect(f"tls://127.0.0.1:{made.port}", tls=access.tls(), tls_handshake_first=True)
    await ensure_ledger_stream(admin)
    await ensure_checkpoint_stream(admin)
    await admin.close()


async def retried(call: Callable[[], Any], beyond: int = 0) -> Any:
    """Ask until there is a receipt of a size beyond: a killed process is on its way back, or a tick is."""
    deadline = asyncio.get_running_loop().time() + PATIENCE
    while True:
        try:
            text = await call()
            if size_of(text) > beyond:
                return text
        except (nats.errors.Error, UnavailableError, UnknownError):
            if asyncio.get_running_loop().time() > deadline:
                raise
        await asyncio.sleep(0.1)


def size_of(receipt: str) -> int:
    """The size of a receipt's checkpoint."""
    return parse_checkpoint(parse_note(receipt.partition("\n\n")[2]).text).size


async def launch(made: Site, name: str) -> asyncio.subprocess.Process:
    """A validator's process without a supervisor."""
    command = [sys.executable, "-X", "faulthandler", "-m", "bmoe.ledger.validator", *made.arguments(name)]
    return await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE)


async def ended(process: asyncio.subprocess.Process) -> tuple[int | None, str]:
    """Exit code and stderr of a process that must end by itself."""
    telling = asyncio.ensure_future(process.communicate())
    done, _ = await asyncio.wait({telling}, timeout=PATIENCE)
    if not done:
        process.send_signal(signal.SIGABRT)
    _, told = await telling
    assert done, f"did not end within {PATIENCE} s: {told.decode()}"
    return process.returncode, told.decode()


@contextlib.asynccontextmanager
async def running(made: Site, name: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """A validator's process that SIGTERM must end with code 0."""
    process = await launch(made, name)
    try:
        yield process
        process.terminate()
        code, told = await ended(process)
        assert code == 0, told
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()
