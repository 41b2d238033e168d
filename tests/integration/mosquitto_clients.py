"""The real mosquitto_pub and mosquitto_sub, unmodified, as a device's owner would run them."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from benchmarks.mosquitto import find
from benchmarks.processes import program
from bmoe.protocol.errors import ConfigError


def client(name: str) -> tuple[str, dict[str, str]]:
    """The program and the environment that it needs; skips the test where it is not installed."""
    try:
        path, variables = find(name)
    except ConfigError as error:
        pytest.skip(str(error))
    return path, {**os.environ, **variables}


async def options(state: Path, session: str) -> list[str]:
    """What `bmoe-agent mosquitto` prints for the device that joined in `state`."""
    argv = (program("bmoe-agent"), "mosquitto", session, "--state", str(state))
    process = await asyncio.create_subprocess_exec(*argv, stdout=asyncio.subprocess.PIPE)
    said, _ = await process.communicate()
    assert process.returncode == 0
    return said.decode().split()


async def publish(connect: list[str], topic: str, body: bytes, qos: int = 1) -> None:
    """mosquitto_pub with the body on its standard input."""
    path, environment = client("mosquitto_pub")
    process = await asyncio.create_subprocess_exec(
        path, *connect, "-t", topic, "-q", str(qos), "-s",
        stdin=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, env=environment,
    )  # fmt: skip
    _, said = await asyncio.wait_for(process.communicate(body), 20)
    assert process.returncode == 0, said.decode()


class Subscriber:
    """`async with Subscriber(options, topic) as heard: await heard.line()`: mosquitto_sub, one line a message."""

    def __init__(self, connect: list[str], topic: str, qos: int = 1) -> None:
        self._connect, self._topic, self._qos = connect, topic, qos

    async def __aenter__(self) -> Subscriber:
        path, environment = client("mosquitto_sub")
        # By lines, or it says only at its end that it is subscribed.
        argv = ("stdbuf", "-oL", path, *self._connect, "-t", self._topic, "-q", str(self._qos), "-d")
        self._process = await asyncio.create_subprocess_exec(
            *argv, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT, env=environment, limit=1 << 22
        )
        try:
            while not (said := await self._said()).startswith("Subscribed"):
                assert said, "mosquitto_sub ended before it was subscribed"
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._process.returncode is None:
            self._process.terminate()
        await self._process.wait()

    async def line(self) -> str:
        """The next message's payload."""
        while (said := await self._said()).startswith("Client "):
            pass
        assert said, "mosquitto_sub ended"
        return said

    async def _said(self) -> str:
        assert self._process.stdout is not None
        return (await asyncio.wait_for(self._process.stdout.readline(), 20)).decode().rstrip("\n")
