"""The process beside the SuperLink, a child of `bmoe up`: the door for SuperNodes, their keys, and the app's run.

Started as `python -m coordinator.flower.host --state DIR` once a first rollout has asked for it.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import os
import signal
import sys
from pathlib import Path

import structlog

from bmoe.protocol.errors import BmoeError, ConfigError
from bmoe.protocol.figures import hand_on
from bmoe.protocol.niceness import give_way
from coordinator.config import load_settings
from coordinator.embedded.ports import read_ports
from coordinator.embedded.ready import notify_ready
from coordinator.flower.layout import CONNECTION, FlowerLayout, flower_program
from coordinator.flower.proxy import Proxy
from coordinator.flower.register import register_all
from coordinator.flower.superlink import healthy
from coordinator.identity.https import server_tls
from coordinator.identity.infrastructure import SERVER, open_identity
from coordinator.logs import set_up_logs
from coordinator.serving import serving
from coordinator.state_layout import StateLayout

log = structlog.get_logger("flower")
LOOK_S = 0.5
AGAIN_S = 2.0
AGAIN_MAX_S = 60.0
NODES_MAX = 1024
EACH = 64
NICE = 5


async def serve(state: Path) -> None:
    """Until SIGTERM."""
    settings, layout = load_settings(state=state), StateLayout(state)
    flower, ports = FlowerLayout(layout.flower), read_ports(state)
    if not {"superlink", "supernodes"} <= set(ports):
        raise ConfigError(f"{layout.ports} names no ports of the SuperLink: bring the gateway up first")
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    proxy = Proxy(ports["superlink"], layout.ca)
    context = server_tls(open_identity(state).tls(SERVER))
    limits = {"connections": NODES_MAX, "each": EACH}
    async with serving(proxy, settings.host, ports["supernodes"], context=context, **limits) as port:
        notify_ready(port=port)
        figures = hand_on(layout.figures("flower"), proxy.figures)
        duties = {
            asyncio.create_task(work)
            for work in (_register(flower), _run_app(flower, ports["superlink"], layout.ca), figures)
        }
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait({stopping, *duties}, return_when=asyncio.FIRST_COMPLETED)
        failed = [duty for duty in duties if duty.done()]
        for task in (stopping, *duties):
            task.cancel()
        await asyncio.gather(*duties, return_exceptions=True)
        await proxy.close()
        for task in failed:
            task.result()


async def _register(flower: FlowerLayout) -> None:
    """Whenever a device has sent a key, or was revoked; what the SuperLink did not do is asked for again."""
    clock, seen, due, pause = asyncio.get_running_loop().time, -1, math.inf, AGAIN_S
    while True:
        now = flower.keys.stat().st_mtime_ns
        if now != seen or clock() >= due:
            pause = AGAIN_S if now != seen else min(2 * pause, AGAIN_MAX_S)
            seen = now
            due = math.inf if await register_all(flower) else clock() + pause
        await asyncio.sleep(LOOK_S)


async def _run_app(flower: FlowerLayout, port: int, ca: Path) -> None:
    """Keep one run of the app going: a run ends with the SuperLink, or when that was away for long."""
    pause = AGAIN_S
    while True:
        while not await asyncio.to_thread(healthy, port, ca):  # noqa: ASYNC110 (another process has no event)
            await asyncio.sleep(LOOK_S)
        argv = (
            flower_program("flwr"), "run", str(flower.app.resolve()), CONNECTION, "--stream",
            "--run-config", f'socket="{flower.socket.resolve()}"',
        )  # fmt: skip
        process = await asyncio.create_subprocess_exec(
            *argv, env={**os.environ, **flower.environment()}, stdin=asyncio.subprocess.DEVNULL
        )
        began = asyncio.get_running_loop().time()
        try:
            code = await process.wait()
        finally:
            if process.returncode is None:
                process.terminate()
                await process.wait()
        pause = AGAIN_S if asyncio.get_running_loop().time() - began > AGAIN_MAX_S else min(2 * pause, AGAIN_MAX_S)
        log.warning("flower_run_ended", code=code, again_s=pause)
        await asyncio.sleep(pause)


def main(argv: list[str] | None = None) -> int:
    """Exit status 0 after a clean stop, 1 for a fault."""
    parser = argparse.ArgumentParser(prog="coordinator.flower.host", description=__doc__)
    parser.add_argument("--state", type=Path, required=True)
    state = parser.parse_args(argv).state
    set_up_logs("flower")
    give_way(NICE)
    try:
        settings = load_settings(state=state)
        set_up_logs("flower", settings.log_level, settings.log_format)
        asyncio.run(serve(state))
    except BmoeError as error:
        log.error("stopped", error=str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
