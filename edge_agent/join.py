"""Joining a gateway: keys made here, the CA checked against the token's pin, the registrar's answer checked, all kept.

What a crash or a lost reply leaves: the keys and the very request are on disk before the token is sent, so the same
token may be sent again and the registrar, seeing the same certificate request, gives the same answer. Only the last
write, of identity.json, makes the device enrolled.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import re
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from bmoe.protocol.errors import BmoeError, ConfigError, MessageError
from bmoe.protocol.files import write_durably
from bmoe.protocol.join_token import JoinToken, check_url, parse_token
from bmoe.protocol.keys import Signer
from bmoe.protocol.messages import Enrolment, Member, seal_message
from bmoe.protocol.schema import is_name
from bmoe.protocol.tls import mutual_tls
from edge_agent.fleet import FleetClient, pinned
from edge_agent.health import board
from edge_agent.identity import Identity, from_facts, identity_file, load_identity
from edge_agent.shred import shred


def join(
    state: Path,
    token_text: str,
    *,
    name: str | None,
    gateway: str | None,
    force: bool,
    check: Callable[[str, Path], None] = lambda url, ca: None,
) -> Identity:
    """Enrol this device with a one-time token; returns its identity, which is durable by then.

    `gateway` overrules the token's address; `check(url, ca)` is asked once the gateway's CA is known, and what it raises
    keeps the token unused. Raises ConfigError, MessageError, RefusedError, UnavailableError.
    """
    token = parse_token(token_text)
    url = check_url(gateway) if gateway else token.url
    if name is not None and not is_name(name):
        raise ConfigError(f"a device's name has 1..64 characters a-z 0-9 and inner '-', found {name!r}")
    previous = _previous(state)
    if identity_file(state).exists() and not force:
        known = previous.name if previous else "something that cannot be read any more"
        raise ConfigError(f"this device has joined already, as {known}; --force makes it join anew")
    folder = identity_file(state).parent / token.token.hex()
    _private(folder)
    try:
        csr = _keys(folder, previous)
        request = _request(folder, token, name, previous.name if previous else None, csr)
    except (ValueError, x509.InvalidVersion) as error:
        raise ConfigError(
            f"what was made in {folder} for this token is damaged: {error}: delete that folder and join with a new token"
        ) from None

    unverified = FleetClient(url, _trust_nobody)
    ca = pinned(unverified.get("/v1/ca", 64 * 1024), token.pin)
    write_durably(folder / "ca.pem", ca)
    check(url, folder / "ca.pem")
    verified = FleetClient(url, lambda: mutual_tls(folder / "ca.pem"))
    return _keep(state, folder, url, verified.post_json("/v1/enrol", request))


def _keys(folder: Path, previous: Identity | None) -> bytes:
    """Make what is missing of the TLS key, the signing key and the certificate request; returns the request (PEM).

    A device that joins anew keeps its signing key: name and standing belong to that key.
    """
    if previous is not None and not (folder / "signing.key").exists():
        write_durably(folder / "signing.key", previous.signer.private_key.private_bytes_raw(), mode=0o600)
    if not (folder / "tls.key").exists():
        made = ec.generate_private_key(ec.SECP256R1())
        pem = made.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        write_durably(folder / "tls.key", pem, mode=0o600)
    Signer.load_or_create(folder / "signing.key")
    if not (folder / "device.csr").exists():
        key = load_pem_private_key((folder / "tls.key").read_bytes(), None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        # The subject is not ours to choose: the gateway writes it itself.
        csr = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, hashes.SHA256())
        write_durably(folder / "device.csr", csr.public_bytes(Encoding.PEM))
    return (folder / "device.csr").read_bytes()


def _request(folder: Path, token: JoinToken, name: str | None, previous: str | None, csr: bytes) -> bytes:
    """The one request that this device sends for this token: made once, then sent unchanged. A name that the operator
    gave is insisted on; else we only propose one, and the token may be for another."""
    path = folder / "request.json"
    if path.exists():
        sent = _sent(path)
        if name is not None and name != sent["name"]:
            first = f"--name {sent['name']}" if sent["name"] else "no --name"
            raise ConfigError(f"this token was sent already with {first}: repeat it so")
        return path.read_bytes()
    signer = Signer.load(folder / "signing.key")
    proposal = name or previous or suggested_name(signer.key_id)
    der = x509.load_pem_x509_csr(csr).public_bytes(Encoding.DER)
    proof = Enrolment(
        ledger=bytes(16), epoch=0, author=proposal, seq=0, public_key=signer.public_key,
        csr_digest=hashlib.sha256(der).digest(), token=token.token,
    )  # fmt: skip
    body = {
        "token": token.token.hex(),
        "secret": token.secret.hex(),
        "name": name,
        "csr": csr.decode(),
        "enrolment": base64.b64encode(seal_message(signer, proof)).decode(),
        "board": board()[:128],
    }
    data = json.dumps(body).encode()
    write_durably(path, data, mode=0o600)
    return data


def _sent(path: Path) -> dict[str, Any]:
    """The request that was made for this token; raises ConfigError when it is damaged."""
    try:
        sent = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read ({str(error)[:100]}): ask for a new token") from None
    if not isinstance(sent, dict) or not isinstance(sent.get("name"), (str, type(None))):
        raise ConfigError(f"{path} is damaged: ask for a new token")
    return sent


def suggested_name(key_id: bytes) -> str:
    """A name for a device whose operator gave none: its host's, made plain, and four digits of its key."""
    host = re.sub(r"[^a-z0-9]+", "-", socket.gethostname().split(".")[0].lower()).strip("-")[:40]
    return f"{host or 'device'}-{key_id[:2].hex()}"


def _keep(state: Path, folder: Path, url: str, reply: dict[str, Any]) -> Identity:
    """Check the gateway's answer and make it durable, identity.json last."""
    facts = {key: reply.get(key) for key in ("name", "owner", "ledger", "epoch", "registrar", "members", "broker")}
    facts |= {"folder": folder.name, "url": url}
    try:
        identity = from_facts(facts, folder)
        certificate = x509.load_pem_x509_certificate(str(reply["certificate"]).encode())
    except (KeyError, ValueError, TypeError, x509.InvalidVersion) as error:
        raise MessageError(f"the gateway's answer lacks something or has it wrong: {error!r}") from None
    _check_certificate(identity, certificate)
    _check_own_statement(identity, certificate)
    write_durably(identity.certificate, certificate.public_bytes(Encoding.PEM))
    write_durably(identity_file(state), json.dumps(facts, indent=1).encode())
    with contextlib.suppress(OSError):  # else at the next start
        shred(folder / "request.json")  # holds the token's secret, spent by now
    for other in folder.parent.iterdir():  # the identity before, and what attempts left that were refused
        if other != folder and re.fullmatch(r"[0-9a-f]{16}", other.name):
            shutil.rmtree(other, ignore_errors=True)
    return identity


def _check_certificate(identity: Identity, certificate: x509.Certificate) -> None:
    expected = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, identity.name)])
    if certificate.subject != expected:
        raise MessageError(f"the certificate is for {certificate.subject.rfc4514_string()}, not CN={identity.name}")
    if _spki(certificate.public_key()) != _own_spki(identity):
        raise MessageError("the certificate is for another key than ours")
    try:
        certificate.verify_directly_issued_by(x509.load_pem_x509_certificate(identity.ca.read_bytes()))
    except Exception:  # ValueError, TypeError, InvalidSignature: each means the same
        raise MessageError("the certificate is not issued by the gateway's CA") from None


def _check_own_statement(identity: Identity, certificate: x509.Certificate) -> None:
    """Among the registrar's statements must be one on us, with our two keys; else no verdict would count us."""
    own = [m for m in identity.members if m.member == identity.name]
    if not own:
        raise MessageError(f"the registrar's statements name {[m.member for m in identity.members]}, not us")
    found: Member = own[-1]
    expected = ("agent", identity.signer.public_key, identity.owner, hashlib.sha256(_own_spki(identity)).digest())
    if (found.role, found.public_key, found.owner, found.spki) != expected:
        raise MessageError("the registrar's statement on us does not name our keys, role and owner")


def _own_spki(identity: Identity) -> bytes:
    key = load_pem_private_key(identity.key.read_bytes(), None)
    return _spki(key.public_key())


def _spki(key: Any) -> bytes:
    return bytes(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo))


def _trust_nobody() -> Any:
    """For the one request whose answer, the CA, is checked against the token's pin instead."""
    import ssl

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


def _private(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.chmod(folder, 0o700)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be used as the identity's folder: {error.strerror}") from None


def _previous(state: Path) -> Identity | None:
    try:
        return load_identity(state)
    except BmoeError:
        return None
