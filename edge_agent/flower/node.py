"""`python -m edge_agent.flower.node --state DIR`: the SuperNode of one update, from the notice to its end.

It makes its own key once, has the gateway register it under this device's certificate, and keeps `flower-supernode`
running until there is a result, or nothing has come for a while. The SuperLink refuses a key that it still takes to be
online, up to a minute after a power cut: such a SuperNode ends at once, and is started again until it is taken.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib.util
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from bmoe.protocol.errors import BmoeError, ConfigError, UnavailableError
from bmoe.protocol.files import write_durably
from bmoe.protocol.tls import mutual_tls
from edge_agent import logs
from edge_agent.fleet import FleetClient
from edge_agent.identity import Identity, load_identity
from edge_agent.logs import event
from edge_agent.wanted import FOLDER, Wanted, read_result, read_wanted

log = logging.getLogger("bmoe.agent")
LOOK_S = 0.5
AGAIN_S = 5.0
# After the result, so long for its reply to be on its way; without one, so long for anything to come. A SuperNode that is
# ended while it sends counts as online for a minute, in which its SuperLink refuses it.
LINGER_S = 10.0
IDLE_S = 600.0
REGISTERED_S = 300.0
PR_SET_PDEATHSIG = 1


def has_flower() -> bool:
    """Whether this interpreter has flwr, without importing it."""
    return importlib.util.find_spec("flwr") is not None


def main(argv: list[str] | None = None) -> int:
    """Exit status 0 once there is a result, 1 where none came."""
    parser = argparse.ArgumentParser(prog="edge_agent.flower.node", description=__doc__)
    parser.add_argument("--state", type=Path, required=True)
    state = parser.parse_args(argv).state
    logs.set_up("info", "text")
    _die_with_parent()
    try:
        wanted = read_wanted(state)
        if wanted is None:
            raise ConfigError(f"{state / FOLDER} says of no version that it is wanted")
        identity = load_identity(state)
        public = supernode_key(state)
        _registered(identity, public, key_path(state))
        return 0 if _serve(state, identity, wanted) else 1
    except (BmoeError, OSError) as error:
        log.error(event("supernode_failed", reason=error))
        return 1


def supernode_key(state: Path) -> str:
    """The public key of our SuperNode in OpenSSH's form; the private one is made on first use and stays here."""
    path, key = key_path(state), None
    with contextlib.suppress(FileNotFoundError, ValueError, TypeError, UnsupportedAlgorithm):
        key = serialization.load_ssh_private_key(path.read_bytes(), None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        key = ec.generate_private_key(ec.SECP384R1())
        forms = serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
        write_durably(path, key.private_bytes(*forms), mode=0o600)
    public = serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    return key.public_key().public_bytes(*public).decode()


def key_path(state: Path) -> Path:
    """Where the SuperNode's private key lies."""
    return state / FOLDER / "supernode.key"


def _registered(identity: Identity, public: str, key: Path) -> None:
    """Return once the gateway has registered our key; raises UnavailableError when it does not in time.

    A SuperLink takes a key once only. One that it took, and of which the gateway has no note since it was killed just
    then, is refused for ever: the next try comes with another.
    """
    fleet = FleetClient(identity.url, lambda: mutual_tls(identity.ca, identity.certificate, identity.key))
    body = json.dumps({"public_key": public}).encode()
    deadline = time.monotonic() + REGISTERED_S
    reason = ""
    while time.monotonic() < deadline:
        try:
            if fleet.post_json("/v1/supernode", body).get("registered") is True:
                return
            reason = ""
        except UnavailableError as error:
            reason = str(error)
        time.sleep(1.0)
    if not reason:
        key.unlink(missing_ok=True)
    raise UnavailableError(
        f"the gateway has not registered our SuperNode within {REGISTERED_S:g} s: {reason or 'it waits'}"
    )


def _serve(state: Path, identity: Identity, wanted: Wanted) -> bool:
    """Keep a SuperNode running until there is a result; whether there is one."""
    active = time.monotonic()
    seen = _activity(state)
    while True:
        child = _start(state, identity, wanted)
        began = time.monotonic()
        try:
            while child.poll() is None:
                time.sleep(LOOK_S)
                if (now := _activity(state)) != seen:
                    seen, active = now, time.monotonic()
                if read_wanted(state) != wanted:
                    return False  # another version is wanted by now: another process of ours brings it
                found = read_result(state, wanted)
                if found is not None and found.state != "failed" and time.monotonic() - active > LINGER_S:
                    return True
                if time.monotonic() - active > IDLE_S:
                    break
        finally:
            _end(child)
        if time.monotonic() - active > IDLE_S:
            raise UnavailableError(f"nothing came over Flower for {IDLE_S:g} s")
        log.warning(event("supernode_ended", code=child.returncode, after_s=round(time.monotonic() - began)))
        time.sleep(AGAIN_S)


def _start(state: Path, identity: Identity, wanted: Wanted) -> subprocess.Popen[bytes]:
    home = state / FOLDER / "flwr"
    home.mkdir(parents=True, exist_ok=True)
    bin_folder = Path(sys.executable).parent
    environment = {
        # A SuperNode finds the commands that it starts by PATH, and a service's PATH names no venv.
        **os.environ, "PATH": f"{bin_folder}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
        "FLWR_HOME": str(home.resolve()), "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1",
        "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1",
    }  # fmt: skip
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    argv = [
        str(bin_folder / "flower-supernode"), "--superlink", wanted.superlink,
        "--root-certificates", str(identity.ca.resolve()),
        "--auth-supernode-private-key", str(key_path(state).resolve()),
        "--node-config", f"state={json.dumps(str(state.resolve()))}", "--host", "127.0.0.1", "--port", str(port),
    ]  # fmt: skip
    return subprocess.Popen(argv, env=environment, stdin=subprocess.DEVNULL, preexec_fn=_die_with_parent, cwd=home)


def _end(child: subprocess.Popen[bytes]) -> None:
    if child.poll() is None:
        child.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(10)
    if child.poll() is None:
        child.kill()
        child.wait()


def _activity(state: Path) -> float:
    """When something last came into the inbox, or a result was written."""
    latest = 0.0
    for path in (state / "updates").rglob("*"):
        if "flwr" not in path.parts:
            with contextlib.suppress(OSError):
                latest = max(latest, path.stat().st_mtime)
    return latest


def _die_with_parent() -> None:
    """End in good order when whoever started us dies, however it does."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    sys.exit(main())
