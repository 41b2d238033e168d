"""The coordinator's process: `python -m coordinator.service --state DIR`. Started and watched by `bmoe up`."""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from pathlib import Path

import structlog
import uvicorn

from bmoe.protocol.errors import BmoeError
from coordinator.api import build_api
from coordinator.config import load_settings
from coordinator.embedded.ports import read_ports
from coordinator.embedded.ready import notify_ready
from coordinator.gateway import Gateway
from coordinator.logs import set_up_logs

log = structlog.get_logger("service")


async def serve(state: Path) -> None:
    """Run until SIGTERM or SIGINT, or until the ledger can no longer be followed."""
    settings = load_settings(state=state)
    ports = read_ports(state)
    gateway = Gateway(settings, ports)
    await gateway.start()
    config = uvicorn.Config(
        build_api(gateway),
        host=settings.api_host,
        port=ports["api"],
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=5,
        lifespan="off",
    )
    server = uvicorn.Server(config)
    serving = asyncio.ensure_future(_serve_api(server))
    loop = asyncio.get_running_loop()
    stopping = loop.create_future()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, _set, stopping)
    while not server.started and not serving.done():  # noqa: ASYNC110 (uvicorn tells it by no event)
        await asyncio.sleep(0.01)
    notify_ready(port=ports["api"])
    log.info("serving", host=settings.api_host, port=ports["api"], models=gateway.catalogue.names())
    await asyncio.wait([serving, stopping, gateway.dead], return_when=asyncio.FIRST_COMPLETED)
    server.should_exit = True
    await asyncio.gather(serving, return_exceptions=True)
    await gateway.stop()
    if gateway.dead.done():
        gateway.dead.result()


async def _serve_api(server: uvicorn.Server) -> None:
    """uvicorn without its own signal handling: this process answers signals itself."""
    await server._serve()


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 after a clean stop, 2 for settings that cannot work, 1 for anything else."""
    parser = argparse.ArgumentParser(prog="coordinator.service", description=__doc__)
    parser.add_argument("--state", type=Path, required=True)
    arguments = parser.parse_args(argv)
    set_up_logs("coordinator")
    try:
        asyncio.run(serve(arguments.state))
    except BmoeError as error:
        log.error("stopped", error=str(error))
        return 1
    return 0


def _set(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


if __name__ == "__main__":
    sys.exit(main())
