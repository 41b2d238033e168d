"""Who this device is, on disk: one folder a join, and identity.json, written last, that says which one counts."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bmoe.protocol.errors import ConfigError, InputError, MessageError
from bmoe.protocol.join_token import check_url
from bmoe.protocol.keys import Signer, check_public_key
from bmoe.protocol.messages import Member, open_message
from bmoe.protocol.schema import is_name

MEMBERS_MAX = 256


@dataclass(frozen=True)
class Identity:
    """An enrolled device: its name, its ledger, whom it believes (registrar), where to connect, and its keys."""

    name: str
    owner: str
    ledger: bytes
    epoch: int
    registrar: bytes
    url: str
    broker_host: str
    broker_port: int
    folder: Path
    members: tuple[Member, ...]
    signer: Signer

    @property
    def ca(self) -> Path:
        """The gateway's CA, PEM."""
        return self.folder / "ca.pem"

    @property
    def certificate(self) -> Path:
        """Our TLS certificate, PEM; replaced at renewal."""
        return self.folder / "device.pem"

    def certificate_of(self, session: str) -> Path:
        """The certificate of a further session on the broker, PEM; our own for ""."""
        return self.folder / f"session-{session}.pem" if session else self.certificate

    @property
    def key(self) -> Path:
        """Our TLS key, PEM."""
        return self.folder / "tls.key"

    @property
    def csr(self) -> Path:
        """The certificate request for that key, PEM."""
        return self.folder / "device.csr"


def identity_file(state: Path) -> Path:
    """The file whose presence means that the device is enrolled."""
    return state / "identity" / "identity.json"


def load_identity(state: Path) -> Identity:
    """The identity kept under `state`; raises ConfigError when there is none or it is damaged."""
    path = identity_file(state)
    try:
        facts = json.loads(path.read_bytes())
        return from_facts(facts, path.parent / str(facts["folder"]))
    except FileNotFoundError as missing:
        if missing.filename != str(path):
            raise ConfigError(f"{missing.filename} is missing: restore it or join again with --force") from None
        raise ConfigError(f"this device has not joined a gateway (no {path}): run `bmoe-agent join TOKEN`") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError, InputError) as error:
        raise ConfigError(f"{path} cannot be used ({error!r}): restore it or join again with --force") from None


def from_facts(facts: dict[str, Any], folder: Path) -> Identity:
    """An identity from identity.json's object; everything in it is checked. Raises MessageError, KeyError, ValueError."""
    name, host, port = facts["name"], facts["broker"]["host"], facts["broker"]["port"]
    ledger, registrar = bytes.fromhex(facts["ledger"]), check_public_key(bytes.fromhex(facts["registrar"]))
    if not is_name(name) or not is_name(facts["owner"]):
        raise MessageError(f"name and owner must be names, found {name!r} and {facts['owner']!r}")
    if len(ledger) != 16 or type(facts["epoch"]) is not int or facts["epoch"] < 0:
        raise MessageError("ledger must be 16 bytes in hex, epoch a number")
    if type(host) is not str or not host or type(port) is not int or not 0 < port < 65536:
        raise MessageError(f"broker must have a host and a port, found {host!r} and {port!r}")
    return Identity(
        name=name,
        owner=facts["owner"],
        ledger=ledger,
        epoch=facts["epoch"],
        registrar=registrar,
        url=check_url(facts["url"]),
        broker_host=host,
        broker_port=port,
        folder=folder,
        members=tuple(certified(facts["members"], registrar, ledger)),
        signer=Signer.load(folder / "signing.key"),
    )


def certified(statements: Any, registrar: bytes, ledger: bytes) -> Iterable[Member]:
    """The Member statements in a list of base64 texts, each signed by the registrar of this ledger.

    Raises EnvelopeError, MessageError for the first that is not: a fleet server that serves one such is not ours.
    """
    if type(statements) is not list or len(statements) > MEMBERS_MAX:
        raise MessageError(f"members must be a list of at most {MEMBERS_MAX} statements")
    for statement in statements:
        if type(statement) is not str:
            raise MessageError("a member statement must be base64 text")
        try:
            raw = base64.b64decode(statement, validate=True)
        except ValueError:
            raise MessageError("a member statement is not base64") from None
        sealed = open_message(Member, raw)
        sealed.verify(registrar)
        if sealed.header.ledger != ledger:
            raise MessageError(f"the statement on {sealed.header.member} is of ledger {sealed.header.ledger.hex()}")
        check_public_key(sealed.header.public_key)
        yield sealed.header
