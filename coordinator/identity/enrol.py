"""Enrolment: what a board sends is examined, its token redeemed, its membership entered on the ledger, then answered.

The order matters to one who dies in between: the token is used up first, durably and for these very bytes, so that
the same board can repeat and nobody else can; the answer comes last, so that no certificate precedes its entry.
"""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from bmoe.ledger.rules.entries import Entry, MemberEntry
from bmoe.protocol.errors import LedgerError, MessageError, RefusedError
from bmoe.protocol.keys import Signer, check_public_key
from bmoe.protocol.messages import Enrolment, Member, open_message, seal_message
from bmoe.protocol.schema import is_name
from bmoe.protocol.text import plain
from coordinator.identity.admission import DEVICE_SUFFIXES
from coordinator.identity.authority import Authority, check_csr, csr_digest, spki_digest
from coordinator.identity.directory import Directory, Known
from coordinator.identity.tokens import ID_BYTES, SECRET_BYTES, Grant, TokenStore

RESERVED = ("coordinator", "registrar", "validator", "bmoe")
NO_LEDGER = bytes(16)


class LedgerPort(Protocol):
    """The ledger as enrolment needs it."""

    ledger: bytes
    epoch: int

    async def enter(self, *kinds: tuple[type[Entry], dict[str, Any]]) -> int:
        """Append entries; returns their position once they are durable and the directory has heard of them."""
        ...


@dataclass(frozen=True)
class Applicant:
    """An enrolment request that is consistent in itself: possession of both keys is proved, bound to the token.

    `given` is the name that the operator at the board insists on; `name` else only a proposal.
    """

    name: str
    given: str | None
    public_key: bytes
    csr: x509.CertificateSigningRequest
    csr_digest: bytes
    spki: bytes
    token: bytes
    secret: bytes
    board: str


@dataclass(frozen=True)
class Enrolled:
    """What an accepted board gets."""

    name: str
    certificate: bytes
    owner: str
    statement: bytes


def read_request(body: Any) -> Applicant:
    """Examine the JSON of POST /v1/enrol; raises InputError naming the fault. Pure: no token is looked at."""
    if not isinstance(body, dict):
        raise MessageError("expected a JSON object")
    token = _hex(body, "token", ID_BYTES)
    secret = _hex(body, "secret", SECRET_BYTES)
    csr = check_csr(_text(body, "csr", 4096))
    digest = csr_digest(csr)
    header = _proof(body, token, digest)
    given = body.get("name")
    if given is not None and given != header.author:
        raise MessageError(f"the request names {str(given)[:80]!r}, its enrolment is signed as {header.author!r}")
    key = csr.public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    board = plain(_text(body, "board", 128), 128) if "board" in body else ""
    return Applicant(header.author, given, header.public_key, csr, digest, spki_digest(key), token, secret, board)


def _proof(body: dict[str, Any], token: bytes, digest: bytes) -> Enrolment:
    try:
        raw = base64.b64decode(_text(body, "enrolment", 8192), validate=True)
    except ValueError as error:  # binascii.Error is one; text that is not ASCII raises another
        raise MessageError(f"enrolment must be base64: {error}") from None
    sealed = open_message(Enrolment, raw)
    header = sealed.header
    check_public_key(header.public_key)
    sealed.verify(header.public_key)
    if header.csr_digest != digest:
        raise MessageError("the enrolment is signed for another certificate request")
    if header.token != token:
        raise MessageError("the enrolment is signed for another token")
    if (header.ledger, header.epoch, header.seq) != (NO_LEDGER, 0, 0):
        raise MessageError("an enrolment precedes any ledger: ledger, epoch and seq must be zero")
    return header


def read_shown_token(body: dict[str, Any]) -> tuple[bytes, bytes, str | None]:
    """Token, secret and device name of a question about a token; raises MessageError."""
    name = body.get("name")
    if name is not None and not is_name(name):
        raise MessageError("name must be null or 1..64 characters a-z 0-9 -")
    return _hex(body, "token", ID_BYTES), _hex(body, "secret", SECRET_BYTES), name


def check_name(name: str, public_key: bytes, directory: Directory) -> Known | None:
    """The present membership under `name`, if any; raises RefusedError where the name or key is not theirs to take."""
    if name.startswith(RESERVED):
        raise RefusedError(f"names that begin with {', '.join(RESERVED)} are reserved, found {name}")
    reason = directory.revocation(name)
    if reason is not None:
        raise RefusedError(f"{name} is revoked ({reason}): enrol the board under a new name, with a new key")
    known = directory.find(name)
    if known is not None and known.public_key != public_key:
        raise RefusedError(f"the name {name} is taken by another signing key: choose another name")
    other = directory.name_of_key(public_key)
    if other not in (None, name):
        raise RefusedError(f"this signing key is enrolled as {other} already")
    return known


class Enroller:
    """Admits applicants, one at a time."""

    def __init__(
        self,
        authority: Authority,
        registrar: Signer,
        tokens: TokenStore,
        directory: Directory,
        ledger: LedgerPort,
        clock: Callable[[], float] = time.time,
        note: Callable[[bytes], None] = lambda pem: None,
    ) -> None:
        """`note` is told of each device's certificate before anybody gets it."""
        self._authority, self._registrar, self._tokens = authority, registrar, tokens
        self._directory, self._ledger, self._clock, self._note = directory, ledger, clock, note
        self._turn = asyncio.Lock()  # two boards of one name must not both pass the check before either is entered

    async def enrol(self, applicant: Applicant) -> Enrolled:
        """Raises RefusedError, or UnavailableError where the ledger is away; the same request may then be repeated."""
        async with self._turn:
            now_ms = int(self._clock() * 1000)
            shown = (applicant.token, applicant.secret, applicant.given, applicant.csr_digest, applicant.public_key)
            grant = self._tokens.check(*shown, now_ms)  # first, so that a stranger learns nothing about names
            name = grant.name or applicant.name
            known = check_name(name, applicant.public_key, self._directory)  # a refused name costs no token
            self._tokens.redeem(*shown, now_ms)
            if known is None or (known.spki, known.owner) != (applicant.spki, grant.owner):
                member = Known(name, "agent", grant.owner, applicant.public_key, applicant.spki)
                known = await self._enter(member, grant.batch, now_ms)
        certificate = self._issue(applicant.csr, name, "")
        return Enrolled(name, certificate, known.owner, known.statement)

    def examine(self, token: bytes, secret: bytes, name: str | None) -> Grant:
        """What a token is good for now, which costs it nothing; raises RefusedError as `enrol` would for a new device."""
        grant = self._tokens.check(token, secret, name, b"", b"", int(self._clock() * 1000))
        wanted = grant.name or name
        if wanted is not None:
            check_name(wanted, b"", self._directory)  # a new device has a key that nobody has seen
        return grant

    async def _enter(self, member: Known, batch: str, now_ms: int) -> Known:
        statement = certify(self._registrar, self._ledger, member, batch, now_ms)
        await self._ledger.enter((MemberEntry, {"statement": statement}))
        known = self._directory.find(member.name)
        if known is None or known.statement != statement:
            raise LedgerError(f"the ledger did not accept {member.name}: its log has a rejected entry with the reason")
        return known

    def renew(self, known: Known, pem: str, session: str = "") -> bytes:
        """A new certificate for the TLS key that `known` enrolled with, for itself or for a further session of it.

        Raises RefusedError for another key, and MessageError for a session that no device may have.
        """
        csr = check_csr(pem)
        key = csr.public_key()
        assert isinstance(key, ec.EllipticCurvePublicKey)
        if spki_digest(key) != known.spki:
            raise RefusedError(
                f"{known.name} renews with the TLS key that it enrolled with: a new key needs a new token"
            )
        if session and (known.role != "agent" or session not in DEVICE_SUFFIXES):
            raise MessageError(f"a device's further sessions are {', '.join(DEVICE_SUFFIXES)}, found {session[:20]!r}")
        if known.role == "agent":
            return self._issue(csr, known.name, session)
        return self._authority.issue_infrastructure(known.name, key)

    def _issue(self, csr: x509.CertificateSigningRequest, name: str, session: str) -> bytes:
        pem = self._authority.issue_device(csr, name, session=session)
        self._note(pem)
        return pem


def certify(registrar: Signer, ledger: LedgerPort, member: Known, batch: str, now_ms: int) -> bytes:
    """The registrar's sealed Member statement."""
    statement = Member(
        ledger=ledger.ledger, epoch=ledger.epoch, author="registrar", seq=now_ms, member=member.name, role=member.role,
        public_key=member.public_key, owner=member.owner, batch=batch, spki=member.spki, issued_ms=now_ms,
    )  # fmt: skip
    return seal_message(registrar, statement)


def _text(body: dict[str, Any], field: str, limit: int) -> str:
    value = body.get(field)
    if not isinstance(value, str) or len(value) > limit:
        raise MessageError(f"{field} must be text of at most {limit} characters")
    return value


def _hex(body: dict[str, Any], field: str, length: int) -> bytes:
    value = _text(body, field, 2 * length)
    try:
        raw = bytes.fromhex(value)
    except ValueError:
        raw = b""
    if len(raw) != length or raw.hex() != value:
        raise MessageError(f"{field} must be {length} bytes in lower-case hex")
    return raw
