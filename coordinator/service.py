"""The coordinator's process: `python -m coordinator.service --state DIR`. Started and watched by `bmoe up`."""

from __future__ import annotations

import argparse
import asyncio
import signal
import ssl
import sys
from pathlib import Path

import structlog
import uvloop

from bmoe.protocol.collector import keep_what_is_loaded
from bmoe.protocol.errors import BmoeError, ConfigError
from coordinator.api import build_api, take_mqtt_requests
from coordinator.config import GatewaySettings, load_settings
from coordinator.embedded.ports import read_ports
from coordinator.embedded.ready import notify_ready
from coordinator.exposition import metrics_app, registry_of
from coordinator.gateway import Gateway
from coordinator.identity.infrastructure import SERVER
from coordinator.logs import set_up_logs
from coordinator.metrics import Reading
from coordinator.serving import serving
from coordinator.state_layout import StateLayout

log = structlog.get_logger("service")
SCRAPERS_MAX = 16


async def serve(state: Path) -> None:
    """Run until SIGTERM or SIGINT, or until the ledger can no longer be followed."""
    settings = load_settings(state=state)
    ports = read_ports(state)
    gateway = Gateway(settings, ports)
    await gateway.start()
    requests = take_mqtt_requests(gateway)
    loop = asyncio.get_running_loop()
    stopping: asyncio.Future[None] = loop.create_future()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, _set, stopping)
    try:
        api = build_api(gateway)
        metrics = metrics_app(registry_of(lambda: Reading(gateway)))
        async with (
            serving(metrics, settings.metrics_host, ports["metrics"], connections=SCRAPERS_MAX, each=SCRAPERS_MAX),
            serving(
                api,
                settings.api_host,
                ports["api"],
                connections=settings.requests_waiting + 64,
                each=settings.connections_per_address,
                context=api_tls(settings),
            ) as port,
        ):
            keep_what_is_loaded()
            notify_ready(port=port)
            log.info("serving", host=settings.api_host, port=port, models=gateway.catalogue.names())
            await asyncio.wait([stopping, gateway.dead], return_when=asyncio.FIRST_COMPLETED)
    finally:
        await requests.stop()
        await gateway.stop()
    if gateway.dead.done():
        gateway.dead.result()


def api_tls(settings: GatewaySettings) -> ssl.SSLContext | None:
    """The API's TLS, None where it is spoken to in the clear. Raises ConfigError for files that cannot be used."""
    if settings.api_scheme == "http":
        return None
    layout = StateLayout(settings.state)
    certificate = settings.api_certificate or layout.certificate(SERVER)
    key = settings.api_key or layout.key(SERVER)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(certificate, key)
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        raise ConfigError(f"TLS files {certificate}, {key} cannot be used: {error}") from error
    return context


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 after a clean stop, 2 for settings that cannot work, 1 for anything else."""
    parser = argparse.ArgumentParser(prog="coordinator.service", description=__doc__)
    parser.add_argument("--state", type=Path, required=True)
    arguments = parser.parse_args(argv)
    set_up_logs("coordinator")
    try:
        settings = load_settings(state=arguments.state)
        set_up_logs("coordinator", settings.log_level, settings.log_format)
        uvloop.run(serve(arguments.state))
    except BmoeError as error:
        log.error("stopped", error=str(error))
        return 1
    return 0


def _set(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


if __name__ == "__main__":
    sys.exit(main())
