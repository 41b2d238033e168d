"""The agent as a process: one per state directory, ended cleanly by SIGTERM and SIGINT."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import signal
from collections.abc import Iterator
from pathlib import Path

from bmoe.protocol.errors import ConfigError
from bmoe.protocol.state_format import check_format
from edge_agent import logs
from edge_agent.agent import Agent, Steps
from edge_agent.config import AgentSettings
from edge_agent.identity import identity_file, load_identity

STATE_FORMAT = 1


async def serve(settings: AgentSettings, steps: Steps = Steps()) -> None:  # noqa: B008
    """Run an agent until a signal; raises ConfigError when this device has not joined or another process serves it."""
    logs.set_up(settings.log_level, settings.log_format)
    identity = load_identity(settings.state)
    with only_one(settings.state):
        check_format(settings.state, STATE_FORMAT, identity_file(settings.state), unmarked=STATE_FORMAT)
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        await Agent(settings, identity, steps=steps).run(stop)


@contextlib.contextmanager
def only_one(state: Path, file: str = "lock", program: str = "bmoe-agent") -> Iterator[None]:
    """Hold the state directory: two processes would sign two outputs for one task. Freed by the kernel at any death."""
    with open(state / file, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(f"another {program} runs on {state}") from None
        yield
