"""A board's side of enrolment, and a ledger that takes every entry: for the tests of the registrar."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from bmoe.ledger.rules.entries import Entry
from bmoe.protocol.errors import UnavailableError
from bmoe.protocol.keys import Signer
from bmoe.protocol.messages import Enrolment, Member, open_message, seal_message
from coordinator.identity.directory import Directory


def make_csr(key: Any = None, subject: str = "") -> str:
    """A certificate request in PEM; its subject is what nobody should believe."""
    names = [x509.NameAttribute(x509.NameOID.COMMON_NAME, subject)] if subject else []
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name(names))
    return (
        builder.sign(key or ec.generate_private_key(ec.SECP256R1()), hashes.SHA256())
        .public_bytes(Encoding.PEM)
        .decode()
    )


@dataclasses.dataclass
class Board:
    """Keys of a board and the enrolment request that it sends; `change` spoils single fields of it."""

    name: str = "pi-1"
    signer: Signer = dataclasses.field(default_factory=Signer.generate)
    csr: str = dataclasses.field(default_factory=make_csr)

    def request(self, token: bytes, secret: bytes, /, **change: Any) -> dict[str, Any]:
        """The JSON body of POST /v1/enrol; header fields go into the signed Enrolment, the rest into the body."""
        fields = {field.name for field in dataclasses.fields(Enrolment)}
        header: dict[str, Any] = {
            "ledger": bytes(16), "epoch": 0, "author": self.name, "seq": 0, "public_key": self.signer.public_key,
            "csr_digest": digest_of(self.csr), "token": token,
        }  # fmt: skip
        header |= {key: value for key, value in change.items() if key in fields}
        sealed = seal_message(change.get("signer", self.signer), Enrolment(**header))
        body = {
            "token": token.hex(), "secret": secret.hex(), "name": self.name, "csr": self.csr,
            "enrolment": base64.b64encode(sealed).decode(), "board": "test",
        }  # fmt: skip
        return body | {key: value for key, value in change.items() if key not in fields and key != "signer"}


def digest_of(csr: str) -> bytes:
    """SHA-256 over a request's DER."""
    return hashlib.sha256(x509.load_pem_x509_csr(csr.encode()).public_bytes(Encoding.DER)).digest()


class WillingLedger:
    """A LedgerPort that enters every member at once, until it is told to be away."""

    def __init__(self, directory: Directory, registrar: Signer) -> None:
        self.ledger, self.epoch = b"L" * 16, 3
        self.entered: list[Member] = []
        self.away = False
        self._directory, self._registrar = directory, registrar

    async def enter(self, *kinds: tuple[type[Entry], dict[str, Any]]) -> int:
        """Take Member statements that the registrar signed."""
        if self.away:
            raise UnavailableError("the ledger is away")
        for _, fields in kinds:
            sealed = open_message(Member, fields["statement"])
            sealed.verify(self._registrar.public_key)
            self.entered.append(sealed.header)
            self._directory.enrolled(sealed.header, fields["statement"])
        return len(self.entered)
