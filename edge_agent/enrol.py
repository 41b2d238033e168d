"""Enrolling without a hand: a token that an installer left is used once network and time are there, and then destroyed.

`join/` in the state directory holds `token` (one line) and, where it was given, `name`. It is taken up at each start and
while waiting, so a new token in the place of a refused one needs no restart.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from pathlib import Path

from bmoe.protocol.errors import BmoeError, ConfigError, InputError, RefusedError, UnavailableError
from bmoe.protocol.join_token import parse_token
from bmoe.protocol.threads import in_thread
from edge_agent import clock
from edge_agent.identity import Identity, identity_file, load_identity
from edge_agent.logs import event
from edge_agent.systemd import notify

log = logging.getLogger("bmoe.agent")

LOOK_S = 1.0
WAIT_S = (2.0, 30.0)  # the first pause while network or time are missing, and the longest
REFUSED_S = (60.0, 3600.0)  # the same once the gateway has refused the token: it will hardly think again
TOKEN_BYTES = 4096


def token_file(state: Path) -> Path:
    """Where an installer leaves the token."""
    return state / "join" / "token"


def name_file(state: Path) -> Path:
    """Where it leaves the name that the device is to have, if there is one."""
    return state / "join" / "name"


async def identity_of(state: Path, stop: asyncio.Event) -> Identity | None:
    """Who this device is, enrolled first where a token waits; None if `stop` was set before. Raises ConfigError.

    A device that is enrolled and finds a further token joins anew; if that is refused it stays who it was.
    """
    if identity_file(state).exists():
        await _once_more(state)
    elif token_file(state).exists():
        await _until_enrolled(state, stop)
        if not identity_file(state).exists():
            return None
    return load_identity(state)


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


async def _until_enrolled(state: Path, stop: asyncio.Event) -> None:
    said, pause_s, tried = "", WAIT_S[0], b""
    notify(READY="1", STATUS="not enrolled yet: asking the gateway")
    while not stop.is_set():
        token = _read(token_file(state))
        try:
            return await _enrol(state, token, force=False)
        except UnavailableError as error:
            kind, line, limits = type(error).__name__, event("enrolment_waits", reason=error), WAIT_S
        except (RefusedError, InputError, ConfigError) as error:
            kind, line, limits = type(error).__name__, event("enrolment_refused", reason=error), REFUSED_S
        again = kind == said and token == tried
        pause_s = min(2 * pause_s, limits[1]) if again else limits[0]
        if not again:  # one line for each cause, however long it lasts
            log.warning(line)
            notify(STATUS=f"not enrolled: {line.facts['reason']}")
        said, tried = kind, token
        await _pause(min(pause_s, WAIT_S[0]) if kind == "ClockError" else pause_s, stop, token_file(state))


async def _once_more(state: Path) -> None:
    path = token_file(state)
    if not path.exists():
        return
    try:
        token = _read(path)
        if identity_file(state).parent / parse_token(token.decode(errors="replace")).token.hex() == _folder(state):
            forget(state)  # this very join was done; the end came before its token was destroyed
        else:
            await _enrol(state, token, force=True)
    except BmoeError as error:
        log.warning(event("enrolment_refused", reason=error, still=load_identity(state).name))


async def _enrol(state: Path, token: bytes, *, force: bool) -> None:
    from edge_agent.join import join  # what it needs of `cryptography` a board that has joined need not hold

    name = _read(name_file(state)).decode(errors="replace").strip() or None
    text = token.decode(errors="replace")
    # A clock that is certainly behind needs no gateway to be told so; another one is held against the gateway's, because
    # what is signed from now on is judged by time.
    clock.check_floor(state)
    identity = await in_thread(
        lambda: join(state, text, name=name, gateway=None, force=force, check=clock.check_gateway)
    )
    forget(state)
    log.info(event("enrolled", name=identity.name, owner=identity.owner, gateway=identity.url))


def forget(state: Path) -> None:
    """Destroy the token that was used, and the name beside it."""
    for path in (token_file(state), name_file(state)):
        shred(path)
    with contextlib.suppress(OSError):
        token_file(state).parent.rmdir()


def shred(path: Path) -> None:
    """Overwrite a file and remove it. Flash memory may keep old blocks: that is why tokens are short-lived and used once."""
    with contextlib.suppress(OSError):
        with path.open("r+b") as file:
            file.write(bytes(path.stat().st_size))
            file.flush()
            os.fsync(file.fileno())
        path.unlink()


def _folder(state: Path) -> Path | None:
    with contextlib.suppress(ConfigError):
        return load_identity(state).folder
    return None


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(TOKEN_BYTES)
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None


async def _pause(seconds: float, stop: asyncio.Event, watched: Path | None = None) -> None:
    """Wait; less long when `stop` is set or the watched file changes."""
    before = _stamp(watched)
    end = asyncio.get_running_loop().time() + seconds
    while not stop.is_set() and _stamp(watched) == before:
        left = end - asyncio.get_running_loop().time()
        if left <= 0:
            return
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(stop.wait(), min(LOOK_S, left))


def _stamp(path: Path | None) -> tuple[int, int] | None:
    try:
        found = path.stat() if path is not None else None
    except OSError:
        return None
    return (found.st_ino, found.st_mtime_ns) if found is not None else None
