"""Which SuperNodes may come: the keys that enrolled devices sent, registered with the SuperLink by flwr's own command."""

from __future__ import annotations

import asyncio
import json
import os
from dataclasses import asdict, dataclass

import structlog
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from bmoe.protocol.errors import MessageError
from bmoe.protocol.files import write_durably
from bmoe.protocol.schema import is_name
from coordinator.flower.layout import CONNECTION, FlowerLayout, flower_program

log = structlog.get_logger("flower")
COMMAND_S = 60.0


@dataclass(frozen=True)
class Node:
    """A device's SuperNode: the id that the SuperLink gave it, and its public key in OpenSSH's form."""

    node: int
    key: str


def check_supernode_key(text: object) -> str:
    """A P-384 public key in OpenSSH's one spelling; raises MessageError for anything else."""
    if not isinstance(text, str) or len(text) > 1000:
        raise MessageError("public_key must be a P-384 key in OpenSSH's form")
    try:
        key = serialization.load_ssh_public_key(text.encode())
    except (ValueError, TypeError) as error:
        raise MessageError(f"public_key cannot be read: {str(error)[:100]}") from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name != "secp384r1":
        raise MessageError("public_key must be a P-384 key")
    forms = serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    return key.public_bytes(*forms).decode()


def ask_for(layout: FlowerLayout, device: str, key: str) -> bool:
    """Note that an enrolled device wants a SuperNode of that key; whether it is registered already."""
    known = read_nodes(layout).get(device)
    if known is not None and known.key == key:
        return True
    path = layout.keys / f"{device}.pub"
    try:
        if path.read_text() == key:
            return False
    except FileNotFoundError:
        pass
    write_durably(path, key.encode(), mode=0o600)
    return False


def read_nodes(layout: FlowerLayout) -> dict[str, Node]:
    """The SuperNodes registered, by device; none where the file is absent or damaged: they are registered anew."""
    try:
        return {name: Node(int(v["node"]), str(v["key"])) for name, v in json.loads(layout.nodes.read_bytes()).items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


async def register_all(layout: FlowerLayout) -> None:
    """Register every key that waits, one after the other; forget those of devices that sent another or were revoked."""
    known = read_nodes(layout)
    for device in [name for name in known if not (layout.keys / f"{name}.pub").exists()]:
        await _flwr(layout, "unregister", str(known.pop(device).node), CONNECTION)
        await asyncio.to_thread(_write, layout, known)
        log.info("supernode_unregistered", device=device)
    for path in sorted(layout.keys.glob("*.pub")):
        device, key = path.stem, path.read_text()
        before = known.get(device)
        if not is_name(device) or (before is not None and before.key == key):
            continue
        if before is not None:
            await _flwr(layout, "unregister", str(before.node), CONNECTION)
        said = await _flwr(layout, "register", str(path.resolve()), CONNECTION, "--name", device)
        node = said.get("node-id")
        if type(node) is not int and not str(node).isdigit():
            log.warning("supernode_refused", device=device, said=str(said)[:300])
            continue
        known[device] = Node(int(str(node)), key)
        await asyncio.to_thread(_write, layout, known)
        log.info("supernode_registered", device=device, node=known[device].node)


def forget(layout: FlowerLayout, device: str) -> None:
    """A device is out of service: its SuperNode is unregistered soon."""
    (layout.keys / f"{device}.pub").unlink(missing_ok=True)


def _write(layout: FlowerLayout, known: dict[str, Node]) -> None:
    values = {name: asdict(found) for name, found in known.items()}
    write_durably(layout.nodes, json.dumps(values).encode(), 0o600)


async def _flwr(layout: FlowerLayout, *arguments: str) -> dict[str, object]:
    """`flwr supernode ...`: the object that it prints, or {"error": its words}."""
    process = await asyncio.create_subprocess_exec(
        flower_program("flwr"), "supernode", *arguments, "--format", "json", env={**os.environ, **layout.environment()},
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    try:
        out, _ = await asyncio.wait_for(process.communicate(), COMMAND_S)
    except asyncio.TimeoutError:
        process.kill()
        await process.wait()
        return {"error": f"no answer within {COMMAND_S:g} s"}
    try:
        found = json.loads(out)
        return found if isinstance(found, dict) else {"error": str(found)[:300]}
    except ValueError:
        return {"error": out.decode(errors="replace")[-300:]}
