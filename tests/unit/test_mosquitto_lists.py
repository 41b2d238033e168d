"""What Mosquitto is told of whom to let in and what each may say: the same as the callout tells NATS."""

from __future__ import annotations

import datetime
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from identity_helpers import make_csr

from bmoe.protocol.errors import ConfigError, RefusedError
from bmoe.protocol.messages import Member
from bmoe.protocol.topics import DOWN, UP
from bmoe.storage.packaged import packaged
from coordinator.embedded.mosquitto import acl_file, crl_file, find_mosquitto
from coordinator.identity.acl import BARRIER, LOGS, acl_text
from coordinator.identity.admission import check_certificate, facts_of, permissions_of
from coordinator.identity.authority import Authority, check_csr, spki_digest
from coordinator.identity.directory import Directory
from coordinator.identity.guard import lists_of, write_lists
from coordinator.identity.issued import Issued

ACL = acl_text(["validator-1"], [("pi-1", "pub")], ["gone"])
CHANNELS = (*UP, *DOWN, "request/wearable")


def may(user: str, access: str, topic: str, text: str = ACL) -> bool:
    """Mosquitto's own order (mosquitto.conf(5), acl_file): what denies a user, what allows it, then the patterns."""
    rules: list[tuple[str, str]] = []
    current = ""
    for line in text.splitlines():
        word, _, rest = line.partition(" ")
        if word == "user":
            current = rest
        elif word == "pattern" or (word == "topic" and current == user):
            kind, _, wanted = rest.replace("%u", user).partition(" ")
            rules.append((kind, wanted))
    if any(kind == "deny" and matches(wanted, topic) for kind, wanted in rules):
        return False
    return any(kind == access and matches(wanted, topic) for kind, wanted in rules)


def matches(wanted: str, topic: str) -> bool:
    """A topic filter against a topic (MQTT 3.1.1, section 4.7)."""
    ours, theirs = wanted.split("/"), topic.split("/")
    if ours[-1] == "#":
        ours, theirs = ours[:-1], theirs[: len(ours) - 1]
    return len(ours) == len(theirs) and all(o in ("+", t) for o, t in zip(ours, theirs, strict=True))


def member(name: str, key: ec.EllipticCurvePrivateKey, role: str = "agent") -> Member:
    return Member(
        ledger=bytes(16), epoch=0, author="registrar", seq=1, member=name, role=role,
        public_key=name.encode().ljust(32, b"k"), owner="acme", batch="", spki=spki_digest(key.public_key()),
        issued_ms=1,
    )  # fmt: skip


class Book:
    """A CA, its list of certificates, and a directory, with boards that have enrolled."""

    def __init__(self, folder: Path) -> None:
        self.state = folder
        (folder / "broker").mkdir()
        self.authority = Authority.open(folder)
        self.now = datetime.datetime.now(datetime.timezone.utc)
        self.issued = Issued(folder / "issued.db", lambda: self.now.timestamp())
        self.directory = Directory()

    def enrol(self, name: str, key: ec.EllipticCurvePrivateKey, session: str = "") -> int:
        """Enter the board and certify it; the certificate's serial number."""
        self.directory.enrolled(member(name, key), b"")
        pem = self.authority.issue_device(check_csr(make_csr(key)), name, session=session)
        self.issued.note(pem)
        return x509.load_pem_x509_certificate(pem).serial_number

    def denied(self) -> list[int]:
        return lists_of(self.directory, self.issued).revoked


@pytest.fixture
def book(tmp_path: Path) -> Book:
    return Book(tmp_path)


@pytest.fixture
def key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


@pytest.mark.parametrize(
    ("user", "role"), [("pi-1", "agent"), ("coordinator", "coordinator"), ("validator-1", "validator")]
)
def test_each_role_may_do_on_mosquitto_what_the_callout_grants_on_nats(user: str, role: str) -> None:
    granted = permissions_of(role, user)
    for device in ("pi-1", "pi-2"):
        for channel in CHANNELS:
            name = f"bmoe/v1/{device}/{channel}"
            subject = name.replace("/", ".")
            for access, rules in (("write", granted.publish), ("read", granted.subscribe)):
                wanted = any(matches(rule.replace(".", "/").replace("*", "+"), name) for rule in rules)
                assert may(user, access, name) == wanted, (user, access, subject)


def test_a_device_says_nothing_in_anothers_name_and_hears_nothing_of_it() -> None:
    for channel in CHANNELS:
        for access in ("write", "read"):
            assert not may("pi-1", access, f"bmoe/v1/pi-2/{channel}")
    assert not may("pi-1", "read", f"{LOGS}/N") and not may("pi-1", "write", BARRIER)


def test_a_further_session_speaks_for_its_device_and_for_no_other() -> None:
    assert may("pi-1:pub", "write", "bmoe/v1/pi-1/request/wearable")
    assert may("pi-1:pub", "read", "bmoe/v1/pi-1/reply")
    assert not may("pi-1:pub", "write", "bmoe/v1/pi-2/request/wearable")
    assert not may("pi-1:sub", "read", "bmoe/v1/pi-1/reply"), "no certificate, so no part of the list"


def test_a_revoked_device_may_say_only_that_it_is_gone() -> None:
    allowed = [(a, c) for a in ("write", "read") for c in CHANNELS if may("gone", a, f"bmoe/v1/gone/{c}")]
    assert allowed == [("write", "status")]


def test_the_list_for_an_operators_own_mosquitto_grants_the_same() -> None:
    shipped = (packaged("firmware_configs", "mosquitto") / "acl").read_text(encoding="utf-8")
    for user in ("pi-1", "coordinator", "validator-1", "registrar", "pi-1:pub"):
        for device in ("pi-1", "pi-2"):
            for channel in CHANNELS:
                for access in ("write", "read"):
                    name = f"bmoe/v1/{device}/{channel}"
                    wanted = may(user, access, name) and user != "pi-1:pub"
                    assert may(user, access, name, shipped) == wanted, (user, access, name)


def test_revoking_a_name_lists_every_certificate_that_it_holds(book: Book, key: ec.EllipticCurvePrivateKey) -> None:
    held = [book.enrol("pi-1", key), book.enrol("pi-1", key), book.enrol("pi-1", key, "source")]
    book.enrol("pi-2", ec.generate_private_key(ec.SECP256R1()))
    assert book.denied() == []
    book.directory.revoked("pi-1", "stolen")
    lists = lists_of(book.directory, book.issued)
    assert lists.revoked == sorted(held)
    assert b"user pi-1:source" not in lists.acl and b"user pi-1\n" in lists.acl


def test_a_board_that_enrols_with_a_new_key_is_denied_under_the_old_one(
    book: Book, key: ec.EllipticCurvePrivateKey
) -> None:
    old = book.enrol("pi-1", key)
    book.enrol("pi-1", ec.generate_private_key(ec.SECP256R1()))
    assert book.denied() == [old]


def test_a_certificate_that_has_ended_takes_no_place_in_the_list(book: Book, key: ec.EllipticCurvePrivateKey) -> None:
    book.enrol("pi-1", key)
    book.directory.revoked("pi-1", "stolen")
    assert len(book.denied()) == 1
    book.now += datetime.timedelta(days=31)
    assert book.denied() == []


def test_what_was_issued_is_known_to_the_next_registrar(book: Book, key: ec.EllipticCurvePrivateKey) -> None:
    serial = book.enrol("pi-1", key)
    book.issued.close()
    book.issued = Issued(book.state / "issued.db", lambda: book.now.timestamp())
    book.directory.revoked("pi-1", "stolen")
    assert book.denied() == [serial]


def test_the_lists_are_written_when_they_change_and_not_again(book: Book, key: ec.EllipticCurvePrivateKey) -> None:
    serial = book.enrol("pi-1", key)

    def written() -> bool:
        return write_lists(book.state, book.authority, lists_of(book.directory, book.issued))

    assert written() and not written()
    book.directory.revoked("pi-1", "stolen")
    assert written() and not written()
    crl = x509.load_pem_x509_crl(crl_file(book.state).read_bytes())
    assert [revoked.serial_number for revoked in crl] == [serial]
    assert crl.next_update_utc == book.authority.certificate.not_valid_after_utc
    assert (acl_file(book.state).stat().st_mode | crl_file(book.state).stat().st_mode) & 0o077 == 0


def test_a_revocation_list_that_is_damaged_or_a_strangers_is_replaced(book: Book, tmp_path: Path) -> None:
    lists = lists_of(book.directory, book.issued)
    write_lists(book.state, book.authority, lists)
    (tmp_path / "foreign").mkdir()
    for planted in (b"", b"-----BEGIN X509 CRL-----\n", Authority.open(tmp_path / "foreign").revocation_list([])):
        crl_file(book.state).write_bytes(planted)
        assert write_lists(book.state, book.authority, lists)
        assert book.authority.listed_as_revoked(crl_file(book.state).read_bytes()) == []


def test_a_damaged_list_of_certificates_is_named(tmp_path: Path) -> None:
    (tmp_path / "issued.db").write_bytes(b"not a database, and long enough to be looked at as one" * 40)
    with pytest.raises(ConfigError, match=r"issued\.db cannot be used"):
        Issued(tmp_path / "issued.db")


def test_a_certificate_of_a_further_session_is_for_that_session_alone(
    book: Book, key: ec.EllipticCurvePrivateKey
) -> None:
    book.directory.enrolled(member("pi-1", key), b"")
    pem = book.authority.issue_device(check_csr(make_csr(key)), "pi-1", session="source")
    facts = facts_of(x509.load_pem_x509_certificate(pem))
    assert (facts.name, facts.session) == ("pi-1", "source")
    now = book.now.timestamp()
    assert check_certificate(facts, "pi-1:source", "mqtt", book.directory, now)
    for other in ("pi-1", "pi-1:pub", "pi-2:source"):
        with pytest.raises(RefusedError, match="client id"):
            check_certificate(facts, other, "mqtt", book.directory, now)


@pytest.mark.parametrize(
    ("says", "fault"),
    [
        ("mosquitto version 2.0.10", "expected mosquitto version >= 2.0.11"),
        ("something else", "expected mosquitto version >= 2.0.11"),
        (None, "is not installed"),
    ],
)
def test_a_mosquitto_that_is_missing_or_too_old_is_named_before_it_runs(
    tmp_path: Path, says: str | None, fault: str
) -> None:
    program = tmp_path / "mosquitto"
    if says is not None:
        program.write_text(f"#!/bin/sh\necho '{says}'\n")
        program.chmod(0o755)
    with pytest.raises(ConfigError, match=fault):
        find_mosquitto(str(program))
