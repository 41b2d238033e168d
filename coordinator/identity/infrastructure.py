"""The keys and certificates of our own processes: made on first use, renewed at start once past half their life."""

from __future__ import annotations

import datetime
import ipaddress
import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from bmoe.protocol.errors import ConfigError
from bmoe.protocol.files import write_durably
from bmoe.protocol.keys import Signer
from coordinator.embedded.nats_server import TlsFiles
from coordinator.embedded.nkey_file import nkey_public
from coordinator.embedded.state_dir import private_dir
from coordinator.identity.authority import UNREADABLE, Authority, load_or_create_key, self_signed_client, spki_digest

SERVER = "bmoe-server"
GUARD = "registrar-guard"
ADMIN = "bmoe-admin"
_ALWAYS = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class BrokerKeys:
    """Public nkeys that the broker's configuration names, and the seed files behind them."""

    issuer: str
    callout: str
    system: str
    folder: Path

    def seed(self, name: str) -> Path:
        """The seed file of "issuer", "callout" or "system"."""
        return self.folder / f"{name}.nk"


@dataclass(frozen=True)
class Identity:
    """What lies in `state`/identity, opened."""

    folder: Path
    authority: Authority
    registrar: Signer
    broker_keys: BrokerKeys

    def tls(self, name: str) -> TlsFiles:
        """Certificate and key of one of our processes ("bmoe-server" is the servers'), and the CA.

        "registrar-guard" is what the registrar shows to Mosquitto: a certificate of its own making.
        """
        pki = self.folder / "pki"
        return TlsFiles(pki / f"{name}.pem", pki / f"{name}.key", self.folder / "ca.pem")

    def spki(self, name: str) -> bytes:
        """SPKI digest of one of our processes' TLS key."""
        key = load_or_create_key(self.tls(name).key).public_key()
        return spki_digest(key)


def open_identity(state: Path) -> Identity:
    """Open `state`/identity, making what keys are missing. Raises ConfigError for files that cannot be used."""
    folder = private_dir(state / "identity")
    private_dir(folder / "pki")
    keys = BrokerKeys(
        issuer=nkey_public(folder / "issuer.nk", "account"),
        callout=nkey_public(folder / "callout.nk", "user"),
        system=nkey_public(folder / "system.nk", "user"),
        folder=folder,
    )
    return Identity(folder, Authority.open(folder), Signer.load_or_create(folder / "registrar.key"), keys)


def prepare_identity(state: Path, validators: Sequence[str], hosts: Iterable[str] = ()) -> Identity:
    """Open `state`/identity and issue every certificate of our own that is missing or past its half life.

    `hosts` are names and addresses, besides this machine's own, that agents dial. Call it before the servers start:
    they read their certificates once. Raises ConfigError for files that cannot be used.
    """
    identity = open_identity(state)
    ensure_certificate(identity, SERVER, sorted({*_ALWAYS, socket.gethostname(), *hosts}))
    for name in ("coordinator", "registrar", ADMIN, *validators):
        ensure_certificate(identity, name, None)
    guard = identity.tls(GUARD)
    if not guard.cert.exists():
        write_durably(guard.cert, self_signed_client("registrar", load_or_create_key(guard.key)))
    return identity


def ensure_certificate(
    identity: Identity, name: str, hosts: Sequence[str] | None, now: datetime.datetime | None = None
) -> bool:
    """Issue `name`'s certificate unless a good one lies there; True if it was issued. The key stays the same."""
    now = now or datetime.datetime.now(datetime.timezone.utc)
    files = identity.tls(name)
    key = load_or_create_key(files.key).public_key()
    if _good(identity.authority, files.cert, key, hosts, now):
        return False
    try:
        pem = identity.authority.issue_infrastructure(name, key, hosts, now)
    except ValueError as error:
        raise ConfigError(f"cannot certify {name} for {', '.join(hosts or ())}: {error}") from error
    write_durably(files.cert, pem)
    return True


def _good(
    authority: Authority,
    path: Path,
    key: ec.EllipticCurvePublicKey,
    hosts: Sequence[str] | None,
    now: datetime.datetime,
) -> bool:
    try:
        found = x509.load_pem_x509_certificate(path.read_bytes())
    except UNREADABLE:
        return False
    begin, end = found.not_valid_before_utc, found.not_valid_after_utc
    young = begin <= now < begin + (end - begin) / 2
    return young and found.public_key() == key and authority.issued(found) and _hosts(found) == set(hosts or ())


def _hosts(certificate: x509.Certificate) -> set[str]:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return set()
    addresses = names.get_values_for_type(x509.IPAddress)
    return {*names.get_values_for_type(x509.DNSName), *(str(ipaddress.ip_address(str(a))) for a in addresses)}
