"""The validator's process: flags to settings, logging, signals, and one clear line for whatever stops it.

Exit codes: 0 told to stop, 1 failed, 2 settings, 3 the ledger forked.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import uvloop

from bmoe.ledger.ending import end
from bmoe.ledger.replica import RETRY_S, Settings, Validator
from bmoe.ledger.rules.trust import parse_anchor
from bmoe.ledger.spotcheck import Rates
from bmoe.ledger.stream import LedgerAccess, LedgerStream
from bmoe.protocol.collector import keep_what_is_loaded
from bmoe.protocol.errors import BmoeError, ConfigError, LedgerForkError, UnavailableError
from bmoe.protocol.keys import Signer
from bmoe.protocol.oneline import OneLine

log = logging.getLogger("bmoe.validator")

READY_FD = "BMOE_READY_FD"
FAILED, BAD_SETTINGS, FORKED = 1, 2, 3


def main(argv: Sequence[str] | None = None) -> int:
    """Run a validator until a signal or an error ends it; the exit code."""
    arguments = _parser().parse_args(argv)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(OneLine("%(asctime)s level=%(levelname)s %(name)s %(message)s"))
    logging.basicConfig(level=arguments.log_level, handlers=[handler])
    try:
        uvloop.run(_run(_settings(arguments)))
    except LedgerForkError as error:
        return _say(f"validator halted: {error}", FORKED)
    except ConfigError as error:
        return _say(f"validator cannot start: {error}", BAD_SETTINGS)
    except BmoeError as error:
        return _say(f"validator stopped: {error}", FAILED)
    return 0


def _say(line: str, code: int) -> int:
    print(" ".join(line.split()), file=sys.stderr, flush=True)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bmoe.ledger.validator", description="Verify and cosign one ledger.")
    parser.add_argument("--state", type=Path, required=True, help="state directory; this validator's is below it")
    parser.add_argument("--name", required=True, help="validator-1, ...")
    parser.add_argument("--genesis", type=Path, help="trust.json or a JSON of ledger, epoch, origin, registrar")
    parser.add_argument("--ledger-host", default="127.0.0.1")
    parser.add_argument("--ledger-port", type=int, required=True)
    parser.add_argument("--ca", type=Path)
    parser.add_argument("--certificate", type=Path)
    parser.add_argument("--key", type=Path)
    parser.add_argument("--signing-key", type=Path)
    parser.add_argument("--gateway", help="https://host:port of evidence, releases and blobs")
    parser.add_argument("--mqtt-host", default="127.0.0.1")
    parser.add_argument("--mqtt-port", type=int, help="broker to hear complaints on")
    parser.add_argument("--spot-start", type=float, default=Rates.start, help="chance of a check for a new fleet")
    parser.add_argument("--spot-floor", type=float, default=Rates.floor, help="chance that it never falls below")
    parser.add_argument("--memory-mb", type=int, default=512)
    parser.add_argument("--log-level", default="INFO", choices=("DEBUG", "INFO", "WARNING", "ERROR"))
    return parser


def _settings(arguments: argparse.Namespace) -> Settings:
    state, name = arguments.state, arguments.name
    folder, pki = state / name, state / "identity" / "pki"
    genesis = arguments.genesis or state / "trust.json"
    try:
        anchor = parse_anchor(genesis.read_bytes())
    except OSError as error:
        raise ConfigError(f"{genesis}: {error.strerror}") from error
    if not 0 < arguments.spot_floor <= arguments.spot_start <= 1:
        raise ConfigError("spot checks need 0 < --spot-floor <= --spot-start <= 1")
    return Settings(
        name=name,
        folder=folder,
        anchor=anchor,
        signer=Signer.load(arguments.signing_key or folder / "validator.key"),
        access=LedgerAccess(
            arguments.ledger_host,
            arguments.ledger_port,
            arguments.ca or state / "identity" / "ca.pem",
            arguments.certificate or pki / f"{name}.pem",
            arguments.key or pki / f"{name}.key",
        ),
        gateway=arguments.gateway,
        mqtt=(arguments.mqtt_host, arguments.mqtt_port) if arguments.mqtt_port else None,
        rates=Rates(arguments.spot_start, arguments.spot_floor),
        memory_mb=arguments.memory_mb,
        figures=state / "figures" / f"{name}.json",
    )


async def _run(settings: Settings) -> None:
    stop, ready = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    stopping = asyncio.create_task(stop.wait())
    running = asyncio.create_task(_serve(settings, ready))
    telling = asyncio.create_task(_tell_ready(ready))
    try:
        await asyncio.wait([stopping, running], return_when=asyncio.FIRST_COMPLETED)
        if running.done():
            running.result()
    finally:
        await end(stopping, running, telling)


async def _serve(settings: Settings, ready: asyncio.Event) -> None:
    stream = await _connect(settings)
    try:
        await Validator(settings, stream).run(ready)
    finally:
        await stream.close()


async def _connect(settings: Settings) -> LedgerStream:
    while True:
        try:
            return await LedgerStream.connect(settings.access, settings.name)
        except UnavailableError as error:
            log.warning("waiting for the engine error=%s", error)
            await asyncio.sleep(RETRY_S)


async def _tell_ready(ready: asyncio.Event) -> None:
    """One JSON line on the pipe that a supervisor left us, if any (see coordinator.embedded.ready)."""
    await ready.wait()
    keep_what_is_loaded()
    handle = os.environ.pop(READY_FD, None)
    if handle is not None:
        with os.fdopen(int(handle), "wb", buffering=0) as pipe:
            pipe.write(json.dumps({"ready": True}).encode() + b"\n")


if __name__ == "__main__":
    sys.exit(main())
