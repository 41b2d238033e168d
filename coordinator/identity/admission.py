"""The one decision about a connection: which certificate, under which client id, may do what. Pure.

The checks, each with its own reason: 1 a certificate the CA vouches for; 2 in its time; 3 enrolled; 4 with the key
that enrolled; 5 not revoked; and for the broker: 6 MQTT; 7 client id = certificate name, or that and a known suffix;
8 a role that speaks there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from bmoe.protocol.errors import MessageError, RefusedError
from bmoe.protocol.topics import DOWN, REQUEST, ROOT, UP
from coordinator.identity.authority import spki_digest
from coordinator.identity.directory import Directory, Known

SUBSCRIPTIONS_MAX = 16
# A device's further sessions: few, so that no device holds the broker's connections.
DEVICE_SUFFIXES = ("pub", "sub", "source")


@dataclass(frozen=True)
class CertificateFacts:
    """What counts of a certificate that TLS has verified already. Times in seconds since 1970.

    `session` is "" for a device itself, and a suffix for the certificate of a further session, CN=NAME:SUFFIX.
    """

    name: str
    spki: bytes
    begin_s: int
    end_s: int
    session: str = ""


@dataclass(frozen=True)
class Permissions:
    """NATS subjects that a connection may publish and subscribe, and how many subscriptions it may hold (-1: any)."""

    publish: tuple[str, ...]
    subscribe: tuple[str, ...]
    subscriptions: int = -1


def facts_of(certificate: x509.Certificate) -> CertificateFacts:
    """The facts of a P-256 certificate whose subject is one common name; raises MessageError for any other."""
    names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    key = certificate.public_key()
    if len(names) != 1 or len(list(certificate.subject)) != 1 or not isinstance(names[0].value, str):
        raise MessageError(f"a certificate's subject must be one CN, found {certificate.subject.rfc4514_string()!r}")
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise MessageError("a certificate must be for a P-256 key")
    begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    name, _, session = names[0].value.partition(":")
    return CertificateFacts(name, spki_digest(key), int(begin.timestamp()), int(end.timestamp()), session)


def identify(facts: CertificateFacts | None, directory: Directory, now_s: float) -> Known:
    """Whose certificate it is (checks 1 to 5); raises RefusedError with the reason why it is nobody's."""
    if facts is None:
        raise RefusedError("no client certificate")
    if not facts.begin_s <= now_s <= facts.end_s:
        state = "expired" if now_s > facts.end_s else "not valid yet"
        raise RefusedError(f"the certificate of {facts.name} is {state}")
    known = directory.find(facts.name)
    if known is None:
        raise RefusedError(f"{facts.name} is not enrolled")
    reason = directory.revocation(facts.name)
    if reason is not None:
        raise RefusedError(f"{facts.name} is revoked: {reason}")
    if known.spki != facts.spki:
        raise RefusedError(f"{facts.name} has enrolled again with another TLS key")
    return known


def check_certificate(
    facts: CertificateFacts | None, client_id: str, connection: str, directory: Directory, now_s: float
) -> Permissions:
    """What a connection of kind `connection` ("mqtt", "nats", ...) may do on the broker, or RefusedError."""
    known = identify(facts, directory, now_s)
    if connection != "mqtt":
        raise RefusedError(f"{known.name} may connect by MQTT only, not by {connection or 'an unnamed protocol'}")
    assert facts is not None
    _check_client_id(known, client_id, facts.session)
    return permissions_of(known.role, known.name)


def permissions_of(role: str, name: str) -> Permissions:
    """What a role may do under a name; raises RefusedError for one that has no part on the broker."""
    permissions = _BY_ROLE.get(role)
    if permissions is None:
        raise RefusedError(f"{name} ({role}) has no part on the broker")
    return permissions(name)


def _check_client_id(known: Known, client_id: str, session: str) -> None:
    if session and client_id != f"{known.name}:{session}":
        raise RefusedError(f"client id {client_id[:80]!r} is not the certificate's {known.name}:{session}")
    name, colon, suffix = client_id.partition(":")
    if name != known.name or (colon and known.role == "agent" and suffix not in DEVICE_SUFFIXES):
        forms = f", nor that and :{', :'.join(DEVICE_SUFFIXES)}" if known.role == "agent" else ""
        raise RefusedError(f"client id {client_id[:80]!r} is not the certificate's name {known.name!r}{forms}")


def _subjects(device: str, channels: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{ROOT.replace('/', '.')}.{device}.{channel}" for channel in channels)


_REQUESTS = (f"{REQUEST}.*",)
_BY_ROLE: dict[str, Callable[[str], Permissions]] = {
    "agent": lambda name: Permissions(_subjects(name, (*UP, *_REQUESTS)), _subjects(name, DOWN), SUBSCRIPTIONS_MAX),
    "coordinator": lambda name: Permissions(
        _subjects("*", DOWN), _subjects("*", ("output", "refusal", "status", "health", "installed", *_REQUESTS))
    ),
    "validator": lambda name: Permissions((), _subjects("*", ("complaint", "status"))),
}
