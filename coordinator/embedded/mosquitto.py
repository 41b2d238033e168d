"""Mosquitto as the agents' broker of an embedded gateway: its configuration out of firmware_configs/mosquitto/.

Who may connect and speak stands in two files beside it, which the registrar writes (coordinator/identity/guard.py).
"""

from __future__ import annotations

import os
import pwd
import re
import shutil
import subprocess
from functools import partial
from pathlib import Path

from bmoe.protocol.errors import ConfigError
from bmoe.protocol.files import write_durably
from coordinator.embedded.nats_server import Listeners, Server, TlsFiles, check_files, serving, template
from coordinator.embedded.ports import Listen, claim_ports
from coordinator.embedded.state_dir import private_dir
from coordinator.embedded.supervisor import Child

MINIMUM_VERSION = (2, 0, 11)
# Debian installs daemons where a user's PATH does not look.
FOLDERS = ("/usr/sbin", "/usr/local/sbin")
ALARM = re.compile(rb"Error|Warning|not authorised|protocol error|malformed|oversize|: \S+ 128 \S")
_UNSPELLABLE = re.compile(r"[\x00-\x1f]|^\s|\s$")


def config_file(state: Path) -> Path:
    """The configuration that the running broker was started with; its path also tells its process."""
    return (state / "broker").resolve() / "mosquitto.conf"


def acl_file(state: Path) -> Path:
    """Who may say and hear what; read at start and at SIGHUP."""
    return state / "broker" / "acl"


def crl_file(state: Path) -> Path:
    """The certificates that are accepted no longer; read at start and at SIGHUP."""
    return state / "broker" / "revoked.crl"


def prepare_mosquitto(
    state: Path,
    program: str,
    tls: TlsFiles,
    probe: TlsFiles,
    registrar: Path,
    *,
    mqtt: Listen = Listen(),  # noqa: B008
) -> Server:
    """Claim ports and write the broker's configuration. Ports: "mqtt" for agents, "client" for the registrar.

    `tls` is the server's own certificate, `probe` any client's that readiness is tried with, `registrar` the one
    certificate that may end sessions. `acl_file` and `crl_file` must be there. Raises ConfigError for settings, files
    or ports that cannot work.
    """
    check_files("broker", tls, probe)
    for path in (registrar, acl_file(state), crl_file(state)):
        if not path.is_file():
            raise ConfigError(f"broker: {path} is missing")
    binary = find_mosquitto(program)
    ports = claim_ports(state, {"broker.mqtt": mqtt, "broker.client": Listen()})
    folder = private_dir(state / "broker")
    values = {
        "user": _user(),
        "mqtt_host": mqtt.host,
        "mqtt_port": str(ports["broker.mqtt"]),
        "registrar_port": str(ports["broker.client"]),
        "registrar_ca": _spelled(registrar),
        "acl": _spelled(acl_file(state)),
        "crl": _spelled(crl_file(state)),
        "folder": _spelled(folder),
        "cert": _spelled(tls.cert),
        "key": _spelled(tls.key),
        "ca": _spelled(tls.ca),
    }
    text = template("mosquitto", "mosquitto.conf").substitute(values)
    write_durably(config_file(state), text.encode(), 0o600)
    log = folder / "output.log"
    where: Listeners = {"mqtt": (mqtt.host, ports["broker.mqtt"])}
    child = Child(
        name="broker",
        argv=(str(binary), "-c", str(config_file(state))),
        log=log,
        ready=partial(serving, "", where, probe),
        server_log=log,
        alarm=ALARM,
    )
    return Server(child, {"mqtt": ports["broker.mqtt"], "client": ports["broker.client"]})


def find_mosquitto(program: str) -> Path:
    """The `mosquitto` program, by name or path. Raises ConfigError when it is missing or too old."""
    found = shutil.which(program) or shutil.which(program, path=os.pathsep.join(FOLDERS))
    if found is None:
        raise ConfigError(f"{program} is not installed: install Mosquitto, or name its path in the setting `mosquitto`")
    try:
        shown = subprocess.run([found, "-h"], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"{found} cannot be run: {error}") from error
    match = re.search(r"mosquitto version (\d+)\.(\d+)\.(\d+)", shown.stdout)
    if match is None or tuple(map(int, match.groups())) < MINIMUM_VERSION:
        wanted, said = ".".join(map(str, MINIMUM_VERSION)), (shown.stdout + shown.stderr).strip()[:120]
        raise ConfigError(f"{found} says {said!r}, expected mosquitto version >= {wanted}")
    return Path(found)


def _user() -> str:
    """Started by root, Mosquitto would become a user who cannot read the state directory."""
    return f"user {pwd.getpwuid(0).pw_name}" if os.geteuid() == 0 else ""


def _spelled(path: Path) -> str:
    """A path as the configuration takes it: to the end of the line, blanks and all."""
    text = str(path.resolve())
    if _UNSPELLABLE.search(text):
        raise ConfigError(f"{text!r} holds characters that Mosquitto's configuration cannot")
    return text
