"""What systemd is told (sd_notify(3)): ready, what we wait for, alive. Datagrams to the socket that it names, if any."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Awaitable, Callable


def notify(**facts: str) -> None:
    """Send assignments such as READY="1" or STATUS="serving". What cannot be sent is lost: nothing depends on it."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address[:1] not in ("/", "@"):
        return
    # One line each, whatever is in a reason that came from outside.
    text = "\n".join(f"{name}={' '.join(value.split())[:200]}" for name, value in facts.items())
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as wire:
        wire.connect("\0" + address[1:] if address[0] == "@" else address)
        wire.sendall(text.encode())


def watchdog_s() -> float:
    """The pause within which systemd wants to hear of us, 0 where it does not (sd_watchdog_enabled(3))."""
    meant = os.environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
    micro = os.environ.get("WATCHDOG_USEC", "")
    return int(micro) / 1e6 if meant and micro.isdigit() else 0.0


async def pulse(alive: Callable[[], Awaitable[bool]]) -> None:
    """For ever: tell systemd that we are alive, as long as `alive()` says so. A loop that hangs is silent."""
    pause_s = watchdog_s() / 3
    while pause_s:
        if await alive():
            notify(WATCHDOG="1")
        await asyncio.sleep(pause_s)
