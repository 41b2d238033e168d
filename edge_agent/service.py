"""The agent as a process: one per state directory, ended cleanly by SIGTERM and SIGINT."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import signal
from collections.abc import Iterator
from pathlib import Path

from bmoe.protocol.errors import ConfigError, UnavailableError
from bmoe.protocol.state_format import check_format
from edge_agent import logs
from edge_agent.agent import Agent
from edge_agent.config import AgentSettings
from edge_agent.enrol import identity_of, joined_anew, token_file, wait_for_time
from edge_agent.identity import Identity, identity_file, load_identity
from edge_agent.systemd import notify, pulse
from edge_agent.tasks import Steps

STATE_FORMAT = 1


async def serve(settings: AgentSettings, steps: Steps = Steps()) -> None:  # noqa: B008
    """Run an agent until a signal, anew as often as it joins anew. Raises ConfigError when this device has neither joined
    nor a token to join with, or another process serves it; UnavailableError where a later start may find all well."""
    logs.set_up(settings.log_level, settings.log_format)
    state = settings.state
    if not token_file(state).exists():
        load_identity(state)  # says what to do, before anything is written
    with only_one(state):
        check_format(state, STATE_FORMAT, identity_file(state), unmarked=STATE_FORMAT)
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, _end, stop)
        while not stop.is_set():
            identity = await _prepared(state, stop)
            if identity is not None and not stop.is_set():
                await _serve_as(identity, settings, steps, stop)


def _end(stop: asyncio.Event) -> None:
    notify(STOPPING="1", STATUS="stopping")
    stop.set()


async def _serve_as(identity: Identity, settings: AgentSettings, steps: Steps, stop: asyncio.Event) -> None:
    """One life of the agent: until `stop`, or until this device has joined anew and is perhaps another."""
    ended = asyncio.Event()
    stopped, joined = asyncio.ensure_future(stop.wait()), asyncio.ensure_future(joined_anew(settings.state, stop))
    for end in (stopped, joined):
        end.add_done_callback(lambda _: ended.set())
    try:
        await Agent(settings, identity, steps=steps).run(ended)
        if joined.done():
            joined.result()  # a fault of ours: not to be begun again at once
    except ConfigError as error:
        # A full disk, or a processor that took too long to begin: status 2 would have systemd never try again.
        raise UnavailableError(str(error)) from None
    finally:
        stopped.cancel()
        joined.cancel()
        await asyncio.gather(stopped, joined, return_exceptions=True)


async def _prepared(state: Path, stop: asyncio.Event) -> Identity | None:
    """Enrolled, and with a clock that may be right: however long that takes, systemd hears that we live."""
    living = asyncio.ensure_future(pulse(_alive))
    try:
        identity = await identity_of(state, stop)
        if identity is not None:
            await wait_for_time(identity, state, stop)
        return identity
    finally:
        living.cancel()


async def _alive() -> bool:
    return True


@contextlib.contextmanager
def only_one(state: Path, file: str = "lock", program: str = "bmoe-agent") -> Iterator[None]:
    """Hold the state directory: two processes would sign two outputs for one task. Freed by the kernel at any death."""
    with open(state / file, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(f"another {program} runs on {state}") from None
        yield
