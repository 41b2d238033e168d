"""Ports chosen once and remembered, so that agents find the gateway again after a restart."""

from __future__ import annotations

import contextlib
import errno
import json
import random
import socket
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from bmoe.protocol.errors import ConfigError, UnavailableError
from bmoe.protocol.files import write_durably

FILE = "ports.json"
LOWEST = 10240
TRIES = 200


@dataclass(frozen=True)
class Listen:
    """Where a server shall listen: an IP address to bind, and a port (None: choose a free one and remember it)."""

    host: str = "127.0.0.1"
    port: int | None = None


def claim_ports(state_dir: Path, wanted: Mapping[str, Listen]) -> dict[str, int]:
    """The port of each name in `wanted`: the fixed one, else the remembered one, else a free one.

    The result is durable in `state_dir`/ports.json when this returns. Call it while nothing of ours runs on the ports.
    Raises ConfigError where a port is taken by another process or not usable, naming it and the way out.
    """
    path = state_dir / FILE
    remembered = _read(path)
    chosen = {name: listen.port or remembered.get(name) for name, listen in wanted.items()}
    taken = {port for port in [*chosen.values(), *remembered.values()] if port}
    result: dict[str, int] = {}
    for name, listen in wanted.items():
        port = chosen[name]
        if port is None:
            port = _choose(listen.host, taken)
        else:
            _require_free(name, listen, port, path)
        if port in result.values():
            raise ConfigError(f"port {port} is wanted twice, also for {name}: give each its own")
        taken.add(port)
        result[name] = port
    if remembered | result != remembered:
        write_durably(path, json.dumps(remembered | result, indent=1, sort_keys=True).encode() + b"\n", 0o600)
    return result


def read_ports(state_dir: Path) -> dict[str, int]:
    """The ports in use under `state_dir`, by name; raises ConfigError when it was never brought up or is damaged."""
    ports = _read(state_dir / FILE)
    if not ports:
        raise ConfigError(f"{state_dir} holds no {FILE}: bring the gateway up first (bmoe up)")
    return ports


def _read(path: Path) -> dict[str, int]:
    try:
        data = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: repair it, or delete it and tell the agents") from error
    if not isinstance(data, dict) or not all(type(port) is int and 0 < port < 65536 for port in data.values()):
        raise ConfigError(f"{path} must map names to ports 1..65535: repair it, or delete it and tell the agents")
    return data


def _require_free(name: str, listen: Listen, port: int, path: Path) -> None:
    if not 0 < port < 65536:
        raise ConfigError(f"port {port} for {name} is out of range: choose one of 1..65535")
    reason = _why_not(listen.host, port)
    if reason is None:
        return
    if listen.port is not None:
        remedy = "choose another port in the settings"
    else:
        remedy = f'end that process, set a fixed port, or delete "{name}" from {path} (agents then need the new one)'
    raise ConfigError(f"cannot listen on {listen.host} port {port} for {name}: {reason}; {remedy}")


def _choose(host: str, taken: Iterable[int]) -> int:
    # Not from the ephemeral range that bind(0) gives: while our server is down, any outgoing connection may take such a
    # port, and a client that retries over loopback can even connect to itself.
    candidates = [port for port in range(LOWEST, _first_ephemeral()) if port not in set(taken)]
    for port in random.sample(candidates, min(TRIES, len(candidates))):
        reason = _why_not(host, port)
        if reason is None:
            return port
        if reason != _TAKEN:
            raise ConfigError(f"cannot listen on {host}: {reason}")
    raise UnavailableError(f"no free port found on {host} in {LOWEST}..{_first_ephemeral() - 1}: set fixed ports")


def _first_ephemeral() -> int:
    with contextlib.suppress(OSError, ValueError, IndexError):
        first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
        if first > LOWEST + TRIES:
            return first
    return 32768


_TAKEN = "it is taken by another process"


def _why_not(host: str, port: int) -> str | None:
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST
        )[0]
        with socket.socket(family, kind, proto) as probe:
            # As the servers do themselves: a connection of the last run in TIME_WAIT is no obstacle, a listener is.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except socket.gaierror:
        return f"{host!r} is not an IP address"
    except OSError as error:
        return _TAKEN if error.errno == errno.EADDRINUSE else str(error.strerror)
    return None
