"""Enrolment: who is let in, and the attacks that are not: borrowed keys, swapped requests, taken and reserved names."""

from __future__ import annotations

import asyncio
import base64
import datetime
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding
from identity_helpers import Board, WillingLedger, make_csr

from bmoe.protocol.errors import BmoeError, InputError, RefusedError, UnavailableError
from bmoe.protocol.keys import Signer
from coordinator.identity.authority import Authority, check_csr, spki_digest
from coordinator.identity.directory import Directory
from coordinator.identity.enrol import Enroller, read_request
from coordinator.identity.tokens import TokenStore

NOW = 1_800_000_000


class Gateway:
    """The registrar's parts around one enroller, on a ledger that takes every entry."""

    def __init__(self, folder: Path) -> None:
        self.registrar = Signer.generate()
        self.directory = Directory()
        self.ledger = WillingLedger(self.directory, self.registrar)
        self.tokens = TokenStore(folder / "tokens.db")
        self.authority = Authority.open(folder)
        self.enroller = Enroller(
            self.authority, self.registrar, self.tokens, self.directory, self.ledger, clock=lambda: NOW
        )

    def token(self, name: str | None = None, owner: str = "acme") -> tuple[bytes, bytes]:
        return self.tokens.create(name, owner, "batch-7", 60, NOW * 1000)

    def enrol(self, body: dict[str, Any]) -> Any:
        return asyncio.run(self.enroller.enrol(read_request(body)))


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[Gateway]:
    gateway = Gateway(tmp_path)
    yield gateway
    gateway.tokens.close()


def test_board_gets_a_certificate_for_its_key_and_a_place_on_the_ledger(gateway: Gateway) -> None:
    board = Board(csr=make_csr(subject="coordinator"))
    enrolled = gateway.enrol(board.request(*gateway.token()))
    certificate = x509.load_pem_x509_certificate(enrolled.certificate)
    assert certificate.subject.rfc4514_string() == "CN=pi-1"
    assert certificate.public_key() == check_csr(board.csr).public_key()
    [member] = gateway.ledger.entered
    assert (member.member, member.role, member.owner, member.batch) == ("pi-1", "agent", "acme", "batch-7")
    assert (member.ledger, member.epoch, member.public_key) == (b"L" * 16, 3, board.signer.public_key)
    assert member.spki == spki_digest(check_csr(board.csr).public_key())  # type: ignore[arg-type]


SMALL_ORDER = (0).to_bytes(32, "little")
P384, ED25519 = ec.generate_private_key(ec.SECP384R1()), ed25519.Ed25519PrivateKey.generate()


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"public_key": SMALL_ORDER}, "small order"),
        ({"public_key": (1).to_bytes(32, "little")}, "small order"),
        ({"signer": Signer.generate()}, "bad signature"),
        ({"public_key": Signer.generate().public_key}, "bad signature"),
        ({"csr": make_csr()}, "another certificate request"),
        ({"token": b"another1"}, "another token"),
        ({"ledger": b"L" * 16}, "must be zero"),
        ({"name": "pi-2"}, "names 'pi-2'"),
        ({"name": 7}, "names '7'"),
        ({"csr": make_csr(P384)}, "P-256"),
        ({"csr": "no PEM at all"}, "not a certificate request"),
        ({"csr": "x" * 5000}, "at most 4096"),
        ({"csr": None}, "csr must be text"),
        ({"secret": "AB" * 16}, "lower-case hex"),
        ({"secret": "ab"}, "16 bytes"),
        ({"enrolment": "!!!"}, "base64"),
        ({"enrolment": "AAAA"}, "COSE_Sign1"),
        ({"board": "b" * 129}, "board"),
    ],
)
def test_inconsistent_request_is_refused_before_its_token_is_looked_at(
    gateway: Gateway, change: dict[str, Any], fault: str
) -> None:
    token = gateway.token()
    with pytest.raises(InputError, match=fault):
        read_request(Board().request(*token, **change))
    assert [row.state for row in gateway.tokens.list(NOW * 1000)] == ["open"]


def test_request_that_its_own_key_did_not_sign_is_refused() -> None:
    spoiled = (
        x509.load_pem_x509_csr(make_csr(subject="pi-1").encode()).public_bytes(Encoding.DER).replace(b"pi-1", b"pi-2")
    )
    body = base64.encodebytes(spoiled).decode()
    with pytest.raises(InputError, match="signed by its own key"):
        check_csr(f"-----BEGIN CERTIFICATE REQUEST-----\n{body}-----END CERTIFICATE REQUEST-----\n")


@pytest.mark.parametrize("name", ["coordinator", "registrar-2", "validator-1", "bmoe-admin", "bmoex"])
def test_reserved_names_are_refused_and_cost_no_token(gateway: Gateway, name: str) -> None:
    with pytest.raises(RefusedError, match="reserved"):
        gateway.enrol(Board(name).request(*gateway.token()))
    assert [row.state for row in gateway.tokens.list(NOW * 1000)] == ["open"]
    assert not gateway.ledger.entered


def test_taken_name_belongs_to_its_first_key(gateway: Gateway) -> None:
    first = Board()
    gateway.enrol(first.request(*gateway.token()))
    with pytest.raises(RefusedError, match="taken by another signing key"):
        gateway.enrol(Board().request(*gateway.token()))
    with pytest.raises(RefusedError, match="enrolled as pi-1 already"):
        gateway.enrol(Board("pi-2", first.signer).request(*gateway.token()))
    again = Board("pi-1", first.signer)  # flashed anew, its signing key kept: a new TLS key takes the old one's place
    gateway.enrol(again.request(*gateway.token()))
    assert [m.spki for m in gateway.ledger.entered][-1] == spki_digest(check_csr(again.csr).public_key())  # type: ignore[arg-type]


def test_two_boards_of_one_name_at_once_are_not_both_let_in(gateway: Gateway) -> None:
    async def race() -> list[Any]:
        bodies = [Board().request(*gateway.token()) for _ in range(2)]
        calls = [gateway.enroller.enrol(read_request(body)) for body in bodies]
        return await asyncio.gather(*calls, return_exceptions=True)

    outcomes = asyncio.run(race())
    assert [type(outcome) for outcome in outcomes if isinstance(outcome, BmoeError)] == [RefusedError]
    assert len(gateway.ledger.entered) == 1


def test_lost_reply_is_repeated_without_a_second_entry(gateway: Gateway) -> None:
    body = Board().request(*gateway.token())
    first, second = gateway.enrol(body), gateway.enrol(body)
    assert (first.name, first.statement) == (second.name, second.statement)
    assert len(gateway.ledger.entered) == 1


def test_no_certificate_while_the_ledger_is_away_and_the_token_is_not_lost(gateway: Gateway) -> None:
    body = Board().request(*gateway.token())
    gateway.ledger.away = True
    with pytest.raises(UnavailableError):
        gateway.enrol(body)
    gateway.ledger.away = False
    assert gateway.enrol(body).name == "pi-1"


def test_revoked_board_cannot_come_back_under_its_name(gateway: Gateway) -> None:
    board = Board()
    gateway.enrol(board.request(*gateway.token()))
    gateway.directory.revoked("pi-1", "stolen")
    with pytest.raises(RefusedError, match="stolen"):
        gateway.enrol(board.request(*gateway.token()))


def test_bound_token_names_a_board_that_was_given_no_name(gateway: Gateway) -> None:
    token = gateway.token("pi-9")
    assert gateway.enrol(Board("some-host").request(*token, name=None)).name == "pi-9"
    with pytest.raises(RefusedError, match="for pi-8, not for pi-1"):
        gateway.enrol(Board().request(*gateway.token("pi-8")))


def test_renewal_is_for_the_enrolled_tls_key_alone(gateway: Gateway) -> None:
    board = Board()
    gateway.enrol(board.request(*gateway.token()))
    known = gateway.directory.find("pi-1")
    assert known is not None
    certificate = x509.load_pem_x509_certificate(gateway.enroller.renew(known, board.csr))
    assert certificate.subject.rfc4514_string() == "CN=pi-1"
    assert certificate.not_valid_after_utc > datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(days=29)
    with pytest.raises(RefusedError, match="new token"):
        gateway.enroller.renew(known, make_csr())
