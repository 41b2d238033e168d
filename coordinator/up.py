"""`bmoe up`: one machine becomes a gateway. Makes what is missing, starts five processes in order, watches them.

broker -> ledger engine -> registrar -> validator -> coordinator. All state lies in one directory; a start after a
clean stop, a kill or a power cut is the same code.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import signal
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import structlog

from bmoe.ledger.rules.quorum import quorum_of
from bmoe.ledger.rules.trust import Trust, format_trust, validator_key
from bmoe.ledger.stream import LedgerAccess, LedgerStream
from bmoe.protocol.errors import BmoeError, ConfigError
from bmoe.protocol.figures import hand_on
from bmoe.protocol.files import write_durably
from bmoe.protocol.keys import Signer
from bmoe.protocol.state_format import check_format
from coordinator.cli.admin import ADMIN
from coordinator.config import GatewaySettings
from coordinator.disk import Disks
from coordinator.embedded.ledger_stream import ensure_checkpoint_stream, ensure_ledger_stream
from coordinator.embedded.mosquitto import acl_file, crl_file, prepare_mosquitto
from coordinator.embedded.nats_server import Server, prepare_broker, prepare_ledger
from coordinator.embedded.ports import Listen, claim_ports
from coordinator.embedded.state_dir import private_dir
from coordinator.embedded.supervisor import Child, Event, Supervisor
from coordinator.engines import Engines
from coordinator.flower.layout import FlowerLayout, has_flower
from coordinator.flower.superlink import superlink_child
from coordinator.identity.guard import NOBODY, write_lists
from coordinator.identity.infrastructure import GUARD, SERVER, Identity, prepare_identity
from coordinator.logs import set_up_logs
from coordinator.models.publish import model_folder, publish
from coordinator.process_figures import ProcessFigures
from coordinator.state_layout import STATE_FORMAT, StateLayout

log = structlog.get_logger("up")
VALIDATORS = ("validator-1",)
COORDINATOR = "coordinator"
BUILT_IN_OWNER = "bmoe"
# Each reads the whole ledger before it is ready, and a ledger only grows.
READY_S = 600.0
FLOWER_LOOK_S = 1.0
FLOWER_AGAIN_S = 60.0
# One thread each: on a small machine OpenMP's spinning costs far more than it brings.
CHILD_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def run_gateway(settings: GatewaySettings, say: Callable[[str], None]) -> None:
    """Run until SIGINT or SIGTERM; raises ConfigError or UnavailableError when the gateway cannot come up."""
    private_dir(settings.state)
    private_dir(settings.state / "logs")
    asyncio.run(_run(settings, say))


async def _run(settings: GatewaySettings, say: Callable[[str], None]) -> None:
    loop = asyncio.get_running_loop()
    stopping: asyncio.Future[None] = loop.create_future()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, _set, stopping)
    set_up_logs("up", settings.log_level, settings.log_format)
    starting = asyncio.ensure_future(_serve(settings, say, stopping))
    await asyncio.wait([starting, stopping], return_when=asyncio.FIRST_COMPLETED)
    if not starting.done():
        done, _ = await asyncio.wait([starting], timeout=1)
        if not done:
            starting.cancel()
    await asyncio.gather(starting, return_exceptions=stopping.done())


async def _serve(settings: GatewaySettings, say: Callable[[str], None], stopping: asyncio.Future[None]) -> None:
    layout, processes = StateLayout(settings.state), ProcessFigures()

    def tell(event: Event) -> None:
        processes.note(event)
        if not (event.kind == "log" and engines.alarm(event.child, event.detail)):
            _tell(event)

    supervisor = Supervisor(settings.state, tell)
    engines = Engines(lambda name: settings.state / name, supervisor.restart, log.warning)
    written = (layout.root, layout.signing_key.parent, layout.evidence.parent, layout.ledger)
    disks = Disks(written, settings.disk_reserve_mb, log.warning)
    async with (
        supervisor,
        _beside(hand_on(layout.figures("up"), processes.figures)),
        _beside(disks.watch()),
        _beside(engines.mend(settings.disk_reserve_mb)),
    ):
        check_format(layout.root, STATE_FORMAT, layout.trust, unmarked=0)
        identity = prepare_identity(
            settings.state, VALIDATORS, (settings.host, settings.api_host, *settings.public_hosts)
        )
        prepare_trust(layout, identity.registrar.public_key)
        write_durably(
            layout.reach,
            json.dumps(
                {"host": settings.dial_host, "api_host": settings.api_dial_host, "api_scheme": settings.api_scheme}
            ).encode(),
        )
        ports = await start_gateway(settings, layout, identity, supervisor)
        carrying = _beside(carry_releases(settings, layout, identity, supervisor))
        say(f"gateway is up: API {settings.api_scheme}://{settings.api_host}:{ports['api']}  state {settings.state}")
        say(f"figures for Prometheus: http://{settings.metrics_host}:{ports['metrics']}/metrics")
        say(f"a token for a board: bmoe token create --owner NAME --state {settings.state}")
        if not has_flower():
            say("releases go out over HTTPS alone; for Flower: pip install 'bmoe[federation]'")
        async with carrying:
            await stopping
        say("stopping")


@contextlib.asynccontextmanager
async def _beside(work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Run something within the block."""
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])


async def start_gateway(
    settings: GatewaySettings, layout: StateLayout, identity: Identity, supervisor: Supervisor
) -> dict[str, int]:
    """Start every process in order and publish the configured models; the ports by name."""
    ports = claim_ports(
        settings.state,
        {
            "api": Listen(settings.api_host, settings.api_port or None),
            "fleet": Listen(settings.host, settings.fleet_port or None),
            "metrics": Listen(settings.metrics_host, settings.metrics_port or None),
        },
    )
    broker = prepare_agents_broker(settings, identity)
    ledger = prepare_ledger(settings.state, identity.tls(SERVER), identity.tls(COORDINATOR), validators=VALIDATORS)
    await supervisor.start(broker.child)
    await supervisor.start(ledger.child)
    await _make_streams(layout, ledger.ports["client"])
    ports |= {"broker.mqtt": broker.ports["mqtt"], "ledger.client": ledger.ports["client"]}
    await supervisor.start(
        _child(settings, "registrar", ("-m", "coordinator.identity.registrar", "--state", str(settings.state)))
    )
    await asyncio.gather(
        asyncio.to_thread(_publish_models, settings),
        *(supervisor.start(_validator(settings, name, ports)) for name in VALIDATORS),
    )
    await supervisor.start(_child(settings, COORDINATOR, ("-m", "coordinator.service", "--state", str(settings.state))))
    return ports


async def carry_releases(
    settings: GatewaySettings, layout: StateLayout, identity: Identity, supervisor: Supervisor
) -> None:
    """Once a rollout wants Flower, start the SuperLink and the process beside it; for ever waiting where it is absent."""
    flower = FlowerLayout(layout.flower)
    while not (has_flower() and flower.wanted.exists()):  # noqa: ASYNC110 (another process has no event)
        await asyncio.sleep(FLOWER_LOOK_S)

    def superlink() -> Child:
        wanted = {"superlink": Listen(), "supernodes": Listen(settings.host, settings.supernodes_port or None)}
        port = claim_ports(settings.state, wanted)["superlink"]
        flower.prepare(port, layout.ca)
        log_file = (layout.logs() / "superlink.log").resolve()
        return superlink_child(flower, port, identity.tls(SERVER), log_file)

    def host() -> Child:
        return _child(settings, "flower", ("-m", "coordinator.flower.host", "--state", str(settings.state)))

    for child in (superlink, host):
        await _insist(supervisor, child)


async def _insist(supervisor: Supervisor, child: Callable[[], Child]) -> None:
    """Start a child that the gateway can do without, however often it takes: releases go over HTTPS meanwhile."""
    while True:
        try:
            await supervisor.start(child())
            return
        except BmoeError as error:
            log.error("flower_not_started", error=str(error), again_s=FLOWER_AGAIN_S)
            await asyncio.sleep(FLOWER_AGAIN_S)


def prepare_agents_broker(settings: GatewaySettings, identity: Identity) -> Server:
    """Claim the broker's ports and write its configuration; raises ConfigError where it could not run."""
    return _BROKERS[settings.broker](settings, identity)


def _prepare_nats(settings: GatewaySettings, identity: Identity) -> Server:
    """The agents' broker on NATS, whose every connection is put to the registrar."""
    keys = identity.broker_keys
    return prepare_broker(
        settings.state,
        identity.tls(SERVER),
        identity.tls(COORDINATOR),
        callout_issuer=keys.issuer,
        callout_user=keys.callout,
        system_user=keys.system,
        mqtt=Listen(settings.host, settings.mqtt_port or None),
    )


def _prepare_mosquitto(settings: GatewaySettings, identity: Identity) -> Server:
    """The agents' broker on Mosquitto, as its last run's lists left it; the registrar then brings them up to date."""
    state = settings.state
    private_dir(state / "broker")
    if not (acl_file(state).exists() and crl_file(state).exists()):
        write_lists(state, identity.authority, NOBODY)
    return prepare_mosquitto(
        state,
        settings.mosquitto,
        identity.tls(SERVER),
        identity.tls(COORDINATOR),
        identity.tls(GUARD).cert,
        mqtt=Listen(settings.host, settings.mqtt_port or None),
    )


_BROKERS = {"nats": _prepare_nats, "mosquitto": _prepare_mosquitto}


def prepare_trust(layout: StateLayout, registrar: bytes) -> Trust:
    """Found a ledger on this machine's keys, once; raises ConfigError when the keys are no longer those it names."""
    Signer.load_or_create(layout.signing_key)
    keys = {}
    for name in VALIDATORS:
        private_dir(layout.validator(name))
        keys[name] = Signer.load_or_create(layout.validator(name) / "validator.key").public_key
    validators = tuple(validator_key(name, key) for name, key in keys.items())
    if layout.trust.exists():
        trust = layout.load_trust()
        if (trust.registrar, trust.validators) != (registrar, validators):
            raise ConfigError(f"the keys under {layout.root} are not those that {layout.trust} names: restore them")
        return trust
    ledger = secrets.token_bytes(16)
    origin = f"bmoe.ledger/{ledger.hex()[:16]}/0"
    trust = Trust(ledger, 0, origin, registrar, validators, quorum_of(len(validators)))
    write_durably(layout.trust, format_trust(trust).encode())
    return trust


async def _make_streams(layout: StateLayout, port: int) -> None:
    access = LedgerAccess("127.0.0.1", port, layout.ca, layout.certificate(ADMIN), layout.key(ADMIN))
    stream = await LedgerStream.connect(access, ADMIN)
    try:
        await ensure_ledger_stream(stream.client)
        await ensure_checkpoint_stream(stream.client)
    finally:
        await stream.close()


def _publish_models(settings: GatewaySettings) -> None:
    """Stage each model's files by digest, then have the registrar enter its releases; a repeat changes nothing."""
    for given in settings.models:
        publish(settings.state, model_folder(given), BUILT_IN_OWNER)


def _validator(settings: GatewaySettings, name: str, ports: dict[str, int]) -> Child:
    arguments = {
        "state": settings.state,
        "name": name,
        "ledger-port": ports["ledger.client"],
        "gateway": f"https://{_bracketed(settings.dial_host)}:{ports['fleet']}",
        "mqtt-host": settings.dial_host,
        "mqtt-port": ports["broker.mqtt"],
        "spot-start": max(settings.spot_start, settings.spot_floor),
        "spot-floor": settings.spot_floor,
    }
    flags = [text for key, value in arguments.items() for text in (f"--{key}", str(value))]
    return _child(settings, name, ("-m", "bmoe.ledger.validator", *flags))


def _child(settings: GatewaySettings, name: str, arguments: tuple[str, ...]) -> Child:
    environment = dict(CHILD_ENVIRONMENT)
    for field in GatewaySettings.model_fields:
        value = getattr(settings, field)
        if value is None:
            continue
        environment[f"BMOE_{field.upper()}"] = _spelled(value)
    return Child(
        name=name,
        argv=(sys.executable, *arguments),
        log=(settings.state / "logs" / f"{name}.log").resolve(),
        env=environment,
        ready_within=READY_S,
    )


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _spelled(value: object) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(f'"{v}"' for v in value) + "]"
    return str(value)


def _tell(event: Event) -> None:
    """What happens to the processes goes to our log, refused broker publishes among it."""
    if event.kind == "log":
        log.warning("server_alarm", server=event.child, line=event.detail)
    elif event.kind in ("exited", "restarting", "leftover"):
        log.warning(f"process_{event.kind}", name=event.child, pid=event.pid, code=event.code, detail=event.detail)
    else:
        log.info(f"process_{event.kind}", name=event.child, pid=event.pid)


def _set(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
