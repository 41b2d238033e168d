"""Enrolling without a hand: a token that an installer left is used once network and time are there, and then destroyed.

`join/` in the state directory holds `token` (one line) and, where it was given, `name`. It is looked for as long as the
process runs, so a new token needs no restart: neither in the place of a refused one, nor for a board that is to join anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable
from pathlib import Path

from bmoe.protocol.errors import BmoeError, ConfigError, UnavailableError
from bmoe.protocol.join_token import parse_token
from bmoe.protocol.threads import in_thread
from edge_agent import clock
from edge_agent.identity import Identity, identity_file, load_identity
from edge_agent.logs import event
from edge_agent.shred import shred
from edge_agent.systemd import notify

log = logging.getLogger("bmoe.agent")

LOOK_S = 1.0
WAIT_S = (2.0, 30.0)  # the first pause while network or time are missing, and the longest
REFUSED_S = (60.0, 3600.0)  # the same once the gateway has refused the token: it will hardly think again
TOKEN_BYTES = 4096
Stamp = tuple[int, int]


def token_file(state: Path) -> Path:
    """Where an installer leaves the token."""
    return state / "join" / "token"


def name_file(state: Path) -> Path:
    """Where it leaves the name that the device is to have, if there is one."""
    return state / "join" / "name"


async def identity_of(state: Path, stop: asyncio.Event) -> Identity | None:
    """Who this device is, enrolled first where a token waits; None if `stop` was set before. Raises ConfigError."""
    if os.path.exists(identity_file(state)):
        _finish(state)
    elif os.path.exists(token_file(state)):
        notify(READY="1", STATUS="not enrolled yet: asking the gateway")
        await _until_enrolled(state, stop, lambda reason: notify(STATUS=f"not enrolled: {reason}"))
        if not os.path.exists(identity_file(state)):
            return None
    return load_identity(state)


async def joined_anew(state: Path, stop: asyncio.Event) -> None:
    """Return once this device, which serves as who it is, has joined anew: by a further token that was left, or by hand.

    A token that is refused changes nothing.
    """
    before = _stamp(identity_file(state))
    while not stop.is_set() and _stamp(identity_file(state)) == before:
        if os.path.exists(token_file(state)) and not _used(state):
            await _until_enrolled(state, stop, lambda reason: None, before=before)
        else:
            await _pause(LOOK_S, stop)


async def wait_for_time(identity: Identity, state: Path, stop: asyncio.Event) -> None:
    """Return once the clock may be right, or `stop` is set. Asks the gateway only where the clock is surely wrong."""
    told = False
    while not stop.is_set():
        try:
            return await in_thread(lambda: clock.check(state, identity.url, identity.ca))
        except BmoeError as error:
            if not told:
                log.warning(event("clock_wrong", reason=error))
                notify(READY="1", STATUS=f"waiting for the time: {error}")
                told = True
        await _pause(WAIT_S[0], stop)


async def _until_enrolled(
    state: Path, stop: asyncio.Event, tell: Callable[[str], None], before: Stamp | None = None
) -> None:
    """Try the token that waits until this device has joined, by it or by hand.

    `before` is the mark of the identity that it replaces, if there is one: then no token is needed.
    """
    said, pause_s, tried = "", WAIT_S[0], b""
    watched = (token_file(state), identity_file(state))
    while not stop.is_set() and _stamp(identity_file(state)) == before:
        if before is not None and not os.path.exists(token_file(state)):
            return
        token = b""
        try:
            token = _read(token_file(state))
            return await _enrol(state, token, force=before is not None)
        except (UnavailableError, OSError) as error:
            kind, line, limits = type(error).__name__, event("enrolment_waits", reason=error), WAIT_S
        except BmoeError as error:
            kind, line, limits = type(error).__name__, event("enrolment_refused", reason=error), REFUSED_S
        again = kind == said and token == tried
        pause_s = min(2 * pause_s, limits[1]) if again else limits[0]
        if not again:  # one line for each cause, however long it lasts
            log.warning(line)
            tell(str(line.facts["reason"]))
        said, tried = kind, token
        await _pause(min(pause_s, WAIT_S[0]) if kind == "ClockError" else pause_s, stop, *watched)


async def _enrol(state: Path, token: bytes, *, force: bool) -> None:
    from edge_agent.join import join  # what it needs of `cryptography` a board that has joined need not hold

    name = _read(name_file(state)).decode(errors="replace").strip() or None
    text = token.decode(errors="replace")

    def check(url: str, ca: Path) -> None:
        # What is signed from now on is judged by time. The gateway has the last word on it, over the floor too: that
        # comes of the clock of whoever wrote the card.
        clock.check_gateway(url, ca)
        if clock.now_s() < clock.floor_s(state):
            clock.save(state)

    identity = await in_thread(lambda: join(state, text, name=name, gateway=None, force=force, check=check))
    forget(state)
    log.info(event("enrolled", name=identity.name, owner=identity.owner, gateway=identity.url))


def _finish(state: Path) -> None:
    """Do what an end right after joining left undone: destroy the token that was used, and the request that holds it."""
    with contextlib.suppress(BmoeError):
        _shred(load_identity(state).folder / "request.json")
    if _used(state):
        forget(state)


def _used(state: Path) -> bool:
    """Whether the token that waits is the one that this device has joined with: one that cannot be destroyed, say."""
    with contextlib.suppress(BmoeError):
        return load_identity(state).folder.name == parse_token(_read(token_file(state)).decode("latin-1")).token.hex()
    return False


def forget(state: Path) -> None:
    """Destroy the token that was used, and the name beside it."""
    for path in (token_file(state), name_file(state)):
        _shred(path)
    with contextlib.suppress(OSError):
        token_file(state).parent.rmdir()


def _shred(path: Path) -> None:
    try:
        shred(path)
    except OSError as error:
        log.warning(event("token_not_destroyed", file=path, reason=error.strerror or error))


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(TOKEN_BYTES)
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None


async def _pause(seconds: float, stop: asyncio.Event, *watched: Path) -> None:
    """Wait; less long when `stop` is set or one of the watched files changes."""
    before = [_stamp(path) for path in watched]
    end = asyncio.get_running_loop().time() + seconds
    while not stop.is_set() and [_stamp(path) for path in watched] == before:
        left = end - asyncio.get_running_loop().time()
        if left <= 0:
            return
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(stop.wait(), min(LOOK_S, left))


def _stamp(path: Path) -> Stamp | None:
    """What changes with a file, None while there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns
