"""Which SuperNodes may come: the keys that enrolled devices sent, registered with the SuperLink by flwr's own command."""

from __future__ import annotations

import asyncio
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import structlog
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from bmoe.protocol.errors import MessageError
from bmoe.protocol.files import write_durably
from bmoe.protocol.schema import is_name
from coordinator.flower.layout import CONNECTION, FlowerLayout, flower_program

log = structlog.get_logger("flower")
COMMAND_S = 60.0
# A device that sends another key again and again costs the gateway a command of a second or two each time.
KEY_AGAIN_S = 60.0
# The word of `flwr supernode list` for one that was unregistered.
GONE = "unregistered"


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
        if path.read_text() == key or abs(time.time() - path.stat().st_mtime) < KEY_AGAIN_S:
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


async def register_all(layout: FlowerLayout) -> bool:
    """Register every key that waits, one after the other, and unregister those of devices that sent another or are gone.

    Whether all of it was done: the SuperLink may be away, and has what it was not told of as before.
    """
    known, done = read_nodes(layout), True
    wanted = {path.stem: path for path in sorted(layout.keys.glob("*.pub")) if is_name(path.stem)}
    for device, node in list(known.items()):
        if device in wanted and _key(wanted[device]) == node.key:
            continue
        if not await _unregister(layout, device, node):
            done = False
            wanted.pop(device, None)  # one device has one SuperNode
            continue
        del known[device]
        await asyncio.to_thread(_write, layout, known)
    for device, path in wanted.items():
        if device not in known and (key := _key(path)):
            registered = await _register(layout, device, path, key)
            if registered is None:
                done = False
                continue
            known[device] = registered
            await asyncio.to_thread(_write, layout, known)
    return done


def _key(path: Path) -> str:
    """The key that a device sent, "" once it is revoked."""
    try:
        return path.read_text()
    except FileNotFoundError:
        return ""


async def _unregister(layout: FlowerLayout, device: str, node: Node) -> bool:
    """Whether the SuperLink takes this node no more; what it does not know at all counts as such."""
    said = await _flwr(layout, "unregister", str(node.node), CONNECTION)
    if said.get("success") is not True:
        listed = (await _flwr(layout, "list", CONNECTION)).get("nodes")
        rows = [row for row in listed if isinstance(row, dict)] if isinstance(listed, list) else None
        if rows is None or any(r.get("node-id") == str(node.node) and r.get("status") != GONE for r in rows):
            log.warning("supernode_not_unregistered", device=device, node=node.node, said=str(said)[:300])
            return False
    log.info("supernode_unregistered", device=device, node=node.node)
    return True


async def _register(layout: FlowerLayout, device: str, path: Path, key: str) -> Node | None:
    said = await _flwr(layout, "register", str(path.resolve()), CONNECTION, "--name", device)
    number = said.get("node-id")
    if type(number) is not int and not str(number).isdigit():
        log.warning("supernode_refused", device=device, said=str(said)[:300])
        return None
    node = Node(int(str(number)), key)
    log.info("supernode_registered", device=device, node=node.node)
    return node


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
        return {"error": f"no answer within {COMMAND_S:g} s"}
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    try:
        found = json.loads(out)
        return found if isinstance(found, dict) else {"error": str(found)[:300]}
    except ValueError:
        return {"error": out.decode(errors="replace")[-300:]}
