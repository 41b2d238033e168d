"""The frame of a benchmark's command line: bounds of its load, an end at Ctrl-C that stops everything, exit statuses."""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

from bmoe.protocol.errors import BmoeError, ConfigError

LOAD_BOUNDS = "expected 2..64 agents, 1..50 rounds, 2..512 clients, 0.5 s or more"


def bearable(given: argparse.Namespace) -> bool:
    """Whether agents, rounds, clients and seconds are within LOAD_BOUNDS."""
    return 2 <= given.agents <= 64 and 1 <= given.rounds <= 50 and given.seconds >= 0.5 and 2 <= given.clients <= 512


def run_command(name: str, work: Callable[[], Awaitable[int]]) -> int:
    """The exit status of the work: its own, 130 when it is interrupted, 2 for a ConfigError, 1 for any other of ours."""
    try:
        return asyncio.run(_stoppable(work))
    except (KeyboardInterrupt, asyncio.CancelledError):
        print(f"{name}: interrupted; everything is stopped", file=sys.stderr)
        return 130
    except BmoeError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1


async def _stoppable(work: Callable[[], Awaitable[int]]) -> int:
    task = asyncio.current_task()
    assert task is not None
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    return await work()


def write_results(path: Path, title: str, text: str, line: str) -> None:
    """Keep a run's tables, and the line for machines, as a page of docs/results."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"# {title}\n\n{text.rstrip()}\n\n```text\n{line}\n```\n", encoding="utf-8")
