"""The guard of a Mosquitto broker, kept by the registrar: who may come in, what each may say, and who must leave.

Mosquitto asks nobody. It reads a list of revoked certificates and an access list, again at SIGHUP, and lets every other
certificate of the CA in. So the registrar writes both, hears in the broker's log who has connected, and ends a session
that must not be by connecting under its client id, which only the registrar's own listener allows.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bmoe.protocol.connection import Connection, LinkSettings
from bmoe.protocol.errors import BmoeError, UnavailableError
from bmoe.protocol.files import write_durably
from bmoe.protocol.link import Link
from coordinator.embedded.mosquitto import acl_file, config_file, crl_file
from coordinator.identity.acl import BARRIER, LOGS, REGISTRAR, acl_text
from coordinator.identity.admission import DEVICE_SUFFIXES
from coordinator.identity.authority import Authority
from coordinator.identity.directory import Directory
from coordinator.identity.issued import Issued

CONNECT_S = 15.0
ANSWER_S = 5.0
Report = Callable[..., Any]
Refused = Callable[[str], "str | None"]
_CONNECTED = re.compile(r"New client connected from (\S+?)(?::\d+)? as (\S+) \(.*u'([^']+)'\)")
_TAKEN = re.compile(r"Client (\S+) already connected, closing old connection")
_RELOADING = "Reloading config"


@dataclass(frozen=True)
class Lists:
    """What Mosquitto is to know: the text of its access list, and the serial numbers of revoked certificates."""

    acl: bytes
    revoked: list[int]


def lists_of(directory: Directory, issued: Issued) -> Lists:
    """The lists that follow from who is enrolled, who is revoked, and which certificates there are."""
    validators = [known.name for known in directory.everyone() if known.role == "validator"]
    revoked = [name for name, _ in directory.revocations()]
    return Lists(acl_text(validators, issued.sessions(directory), revoked).encode(), issued.denied(directory))


NOBODY = Lists(acl_text((), (), ()).encode(), [])


def write_lists(state: Path, authority: Authority, lists: Lists) -> bool:
    """Make both files say so, durably; True if one said something else before, so that Mosquitto must read them."""
    changed = False
    if _content(acl_file(state)) != lists.acl:
        write_durably(acl_file(state), lists.acl, 0o600)
        changed = True
    if authority.listed_as_revoked(_content(crl_file(state))) != lists.revoked:
        write_durably(crl_file(state), authority.revocation_list(lists.revoked), 0o600)
        changed = True
    return changed


class Guard:
    """Guards one broker. `refused(name)` says why a name may not have a session, or None."""

    def __init__(
        self,
        state: Path,
        authority: Authority,
        directory: Directory,
        issued: Issued,
        settings: LinkSettings,
        refused: Refused,
        report: Report,
    ) -> None:
        self._state, self._authority, self._directory, self._issued = state, authority, directory, issued
        self._settings, self._refused, self._report = settings, refused, report
        self._link = Link(settings, on_message=self._on_log, on_up=self._on_up, on_down=self._on_down)
        for level in "ENI":
            self._link.subscribe(f"{LOGS}/{level}", 1)
        self._turn = asyncio.Lock()
        self._live: dict[str, str] = {}  # client id -> its certificate's name, as far as was heard
        # Revoked names that can have no session any more, with the sessions ended that `drop` has not told yet.
        self._ended: dict[str, int] = {}
        self._dropping = asyncio.Lock()
        self._taken: list[str] = []
        self._unread = True  # the lists may be newer than what the broker has read
        self._reloaded = asyncio.Event()
        self._kicks: set[asyncio.Task[None]] = set()
        self._on_renewed: Callable[[], None] = lambda: None
        self._was_up = False

    @contextlib.asynccontextmanager
    async def opened(self, on_renewed: Callable[[], None]) -> AsyncIterator[Guard]:
        """Stand guard within the block; UnavailableError if there is no broker within 15 s."""
        self._on_renewed = on_renewed
        await self._link.start()
        try:
            await self._link.wait_up(CONNECT_S)
            yield self
        finally:
            for task in self._kicks:
                task.cancel()
            await self._link.stop()

    async def apply(self) -> None:
        """Have the broker know whom to deny; it does when this returns. Raises UnavailableError."""
        async with self._turn:
            lists = lists_of(self._directory, self._issued)
            if await asyncio.to_thread(write_lists, self._state, self._authority, lists) or self._unread:
                self._unread = True
                await self._reload()
                self._unread = False

    async def drop(self, name: str, reason: str) -> int:
        """End the sessions of `name`, which is denied already; how many there were. Raises UnavailableError."""
        async with self._dropping:  # a sweep may have come first: what it ended is told here
            ended = self._ended.get(name, 0) + await self._drop(name, reason)
            self._ended[name] = 0
            return ended

    async def sweep(self) -> int:
        """End every session that must not be; how many there were. Raises UnavailableError."""
        await self.apply()
        ended = 0
        for name, reason in self._directory.revocations():
            async with self._dropping:
                if name not in self._ended:
                    self._ended[name] = await self._drop(name, reason)
                    ended += self._ended[name]
        for client_id, name in list(self._live.items()):
            reason_now = self._refused(name.partition(":")[0])
            if reason_now is not None and name not in self._ended:
                ended += await self._end((client_id,), reason_now)
        return ended

    async def _drop(self, name: str, reason: str) -> int:
        await self.apply()
        return await self._end((name, *(f"{name}:{suffix}" for suffix in DEVICE_SUFFIXES)), reason)

    async def _end(self, client_ids: Iterable[str], reason: str) -> int:
        """Take each client id over: the broker then closes the session that had it, and publishes its last will."""
        async with self._turn:
            self._taken.clear()
            for client_id in client_ids:
                await self._take(client_id)
            await self._passed()
            ended = list(self._taken)
        for client_id in ended:
            self._live.pop(client_id, None)
            self._report("session_ended", device=client_id.partition(":")[0], client_id=client_id, reason=reason)
        return len(ended)

    async def _take(self, client_id: str) -> None:
        connection = Connection(replace(self._settings, client_id=client_id), None, lambda topic, payload: None)
        try:
            await connection.open()
            connection.disconnect()
            await asyncio.wait({connection.over}, timeout=1)
        finally:
            connection.lose("done")

    async def _reload(self) -> None:
        self._reloaded.clear()
        os.kill(process_of(config_file(self._state)), signal.SIGHUP)
        try:
            async with asyncio.timeout(ANSWER_S):
                await self._reloaded.wait()
        except TimeoutError:
            raise UnavailableError(f"the broker has not read its lists again within {ANSWER_S:g} s") from None
        await self._passed()

    async def _passed(self) -> None:
        """Wait for a receipt: what the broker did and logged before it is done then, and heard."""
        try:
            await asyncio.wait_for(self._link.publish(BARRIER, b"", qos=1), ANSWER_S)
        except asyncio.TimeoutError:
            raise UnavailableError(f"the broker gave no receipt within {ANSWER_S:g} s") from None

    def _on_log(self, topic: str, payload: bytes) -> None:
        line = payload.decode("utf-8", "replace")
        if found := _CONNECTED.search(line):
            self._on_connected(*found.groups())
        elif found := _TAKEN.search(line):
            self._taken.append(found[1])
        elif _RELOADING in line:
            self._reloaded.set()

    def _on_connected(self, address: str, client_id: str, name: str) -> None:
        if name == REGISTRAR:
            return
        self._live[client_id] = name
        device = name.partition(":")[0]
        reason = self._refused(device)
        if reason is None:
            return
        self._report("connect_refused", device=device, client_id=client_id, address=address, reason=reason)
        task = asyncio.get_running_loop().create_task(self._refuse(client_id, reason))
        self._kicks.add(task)
        task.add_done_callback(self._kicks.discard)

    async def _refuse(self, client_id: str, reason: str) -> None:
        try:
            await self._end((client_id,), reason)
        except BmoeError as error:
            self._report("kick_failed", device=client_id, reason=str(error))

    def _on_up(self) -> None:
        if self._was_up:
            self._report("broker_connection_renewed", user=REGISTRAR)
        self._was_up = True
        self._live.clear()
        self._ended.clear()
        self._on_renewed()

    def _on_down(self, reason: str) -> None:
        self._report("broker_connection_failed", user=REGISTRAR, reason=reason)


def process_of(config: Path) -> int:
    """The process that was started with this configuration; raises UnavailableError where there is none."""
    wanted = b"\0-c\0" + os.fsencode(config) + b"\0"
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if wanted in (entry / "cmdline").read_bytes() and entry.stat().st_uid == os.getuid():
                    return int(entry.name)
    raise UnavailableError(f"no broker runs with {config}")


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""
