"""The decision about a connection, case by case, and the tokens in which the broker is told of it."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import nkeys
import pytest
from certs import make_authority
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from identity_helpers import make_csr

from bmoe.protocol.errors import ConfigError, MessageError, RefusedError
from bmoe.protocol.keys import verify_ed25519
from bmoe.protocol.messages import Member
from coordinator.identity.admission import CertificateFacts, check_certificate, facts_of, identify
from coordinator.identity.authority import Authority, check_csr, spki_digest
from coordinator.identity.callout import Callout
from coordinator.identity.directory import Directory
from coordinator.identity.failures import ADDRESSES_MAX, Failures
from coordinator.identity.jwt import Issuer, read_claims

NOW = 1_800_000_000
SPKI = b"s" * 32


def member(name: str, role: str, spki: bytes = SPKI) -> Member:
    return Member(
        ledger=bytes(16), epoch=0, author="registrar", seq=1, member=name, role=role,
        public_key=name.encode().ljust(32, b"k"), owner="acme", batch="", spki=spki, issued_ms=1,
    )  # fmt: skip


@pytest.fixture
def directory() -> Directory:
    directory = Directory()
    roles = {
        "pi-1": "agent",
        "pi-2": "agent",
        "gone": "agent",
        "coordinator": "coordinator",
        "validator-1": "validator",
    }
    for name, role in roles.items():
        directory.enrolled(member(name, role), b"")
    directory.revoked("gone", "stolen")
    directory.administrator("bmoe-admin", SPKI)
    return directory


def facts(name: str, spki: bytes = SPKI, begin: int = NOW - 10, end: int = NOW + 10) -> CertificateFacts:
    return CertificateFacts(name, spki, begin, end)


@pytest.mark.parametrize(
    ("certificate", "client_id", "kind", "reason"),
    [
        (None, "pi-1", "mqtt", "no client certificate"),
        (facts("stranger"), "stranger", "mqtt", "stranger is not enrolled"),
        (facts("gone"), "gone", "mqtt", "gone is revoked: stolen"),
        (facts("pi-1", end=NOW - 1), "pi-1", "mqtt", "of pi-1 is expired"),
        (facts("pi-1", begin=NOW + 1), "pi-1", "mqtt", "of pi-1 is not valid yet"),
        (facts("pi-1", spki=b"o" * 32), "pi-1", "mqtt", "pi-1 has enrolled again with another TLS key"),
        (facts("pi-1"), "pi-2", "mqtt", "client id 'pi-2' is not the certificate's name 'pi-1'"),
        (facts("pi-1"), "pi-1:2", "mqtt", "client id 'pi-1:2' is not"),
        (facts("pi-1"), "pi-1:", "mqtt", "client id 'pi-1:' is not"),
        (facts("pi-1"), "pi-2:pub", "mqtt", "nor that and :pub, :sub, :source"),
        (facts("pi-1"), "pi-1:pub:pub", "mqtt", "client id 'pi-1:pub:pub' is not"),
        (facts("pi-1"), "", "mqtt", "client id '' is not"),
        (facts("coordinator"), "coordinator-2", "mqtt", "client id 'coordinator-2' is not"),
        (facts("pi-1"), "", "nats", "pi-1 may connect by MQTT only, not by nats"),
        (facts("coordinator"), "", "websocket", "coordinator may connect by MQTT only"),
        (facts("bmoe-admin"), "bmoe-admin", "mqtt", "has no part on the broker"),
    ],
)
def test_refusals_name_the_reason(
    directory: Directory, certificate: CertificateFacts | None, client_id: str, kind: str, reason: str
) -> None:
    with pytest.raises(RefusedError, match=reason):
        check_certificate(certificate, client_id, kind, directory, NOW)


def test_device_may_speak_as_itself_alone(directory: Directory) -> None:
    granted = check_certificate(facts("pi-1"), "pi-1", "mqtt", directory, NOW)
    assert granted.publish == tuple(
        f"bmoe.v1.pi-1.{channel}"
        for channel in ("output", "refusal", "status", "health", "complaint", "installed", "request.*")
    )
    assert granted.subscribe == tuple(f"bmoe.v1.pi-1.{c}" for c in ("task", "notice", "reply", "update"))
    assert granted.subscriptions == 16


def test_device_may_hold_three_further_sessions_under_its_name(directory: Directory) -> None:
    for suffix in ("pub", "sub", "source"):
        granted = check_certificate(facts("pi-1"), f"pi-1:{suffix}", "mqtt", directory, NOW)
        assert granted == check_certificate(facts("pi-1"), "pi-1", "mqtt", directory, NOW)


def test_coordinator_and_validator_hear_all_and_cannot_speak_for_devices(directory: Directory) -> None:
    coordinator = check_certificate(facts("coordinator"), "coordinator:2", "mqtt", directory, NOW)
    assert coordinator.publish == tuple(f"bmoe.v1.*.{c}" for c in ("task", "notice", "reply", "update"))
    heard = ("output", "refusal", "status", "health", "installed", "request.*")
    assert coordinator.subscribe == tuple(f"bmoe.v1.*.{channel}" for channel in heard)
    validator = check_certificate(facts("validator-1"), "validator-1", "mqtt", directory, NOW)
    assert (validator.publish, validator.subscribe) == ((), ("bmoe.v1.*.complaint", "bmoe.v1.*.status"))


def test_revocation_outlives_a_later_enrolment(directory: Directory) -> None:
    directory.enrolled(member("gone", "agent"), b"")
    with pytest.raises(RefusedError, match="stolen"):
        identify(facts("gone"), directory, NOW)
    assert not directory.revoked("gone", "again")
    assert directory.revoked("pi-1", "lost")


def test_certificate_with_more_than_a_common_name_is_nobodys(tmp_path: Path) -> None:
    authority = Authority.open(tmp_path)
    good = x509.load_pem_x509_certificate(authority.issue_device(check_csr(make_csr()), "pi-1"))
    assert facts_of(good).name == "pi-1"
    names = [x509.NameAttribute(oid, "pi-1") for oid in (x509.NameOID.COMMON_NAME, x509.NameOID.ORGANIZATION_NAME)]
    foreign = make_authority(tmp_path / "foreign")
    builder = x509.CertificateBuilder().subject_name(x509.Name(names)).issuer_name(x509.Name(names[:1]))
    builder = builder.public_key(foreign.key.public_key()).serial_number(1)
    builder = builder.not_valid_before(good.not_valid_before_utc).not_valid_after(good.not_valid_after_utc)
    with pytest.raises(MessageError, match="must be one CN"):
        facts_of(builder.sign(foreign.key, hashes.SHA256()))


def issuer() -> Issuer:
    return Issuer(nkeys.encode_seed(bytes(range(32)), nkeys.PREFIX_BYTE_ACCOUNT))


def claims(token: str) -> dict[str, Any]:
    return read_claims(token.encode())


def test_minted_token_has_the_form_that_nats_verifies() -> None:
    made = issuer()
    token = made.mint("UUSER", "NSERVER", {"type": "authorization_response", "error": "no"}, now_s=NOW)
    header, body, signature = (base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)) for part in token.split("."))
    assert json.loads(header) == {"typ": "JWT", "alg": "ed25519-nkey"}
    found = json.loads(body)
    assert (found["iss"], found["sub"], found["aud"], found["iat"]) == (made.public, "UUSER", "NSERVER", NOW)
    assert found["nats"] == {"type": "authorization_response", "error": "no", "version": 2}
    assert len(base64.b32decode(found["jti"] + "=" * (-len(found["jti"]) % 8))) == 32
    raw = base64.b32decode(made.public + "=" * (-len(made.public) % 8))[1:33]
    assert verify_ed25519(raw, signature, token.rpartition(".")[0].encode())
    assert "=" not in token


@pytest.mark.parametrize("token", [b"", b"a.b", b"a.!!!.c", b"a.W10.c", b"a." + b"x" * 70_000 + b".c", b"a.e30"])
def test_unreadable_request_is_one_error(token: bytes) -> None:
    with pytest.raises(MessageError):
        read_claims(token)


def test_seed_file_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "issuer.nk").write_bytes(b"nonsense")
    with pytest.raises(ConfigError, match="no NATS seed"):
        Issuer.load(tmp_path / "issuer.nk")


class Asked:
    """A callout and the broker's side of it: requests as nats-server 2.15 words them."""

    def __init__(self, folder: Path) -> None:
        self.authority = Authority.open(folder)
        csr = check_csr(make_csr())
        self.pem = self.authority.issue_device(csr, "pi-1").decode()
        self.directory = Directory()
        self.directory.enrolled(member("pi-1", "agent", spki_digest(csr.public_key())), b"")  # type: ignore[arg-type]
        self.reports: list[tuple[str, dict[str, Any]]] = []
        self.callout = Callout(issuer(), self.directory, lambda event, **facts: self.reports.append((event, facts)))

    def answer(self, **nats: Any) -> dict[str, Any]:
        request = {
            "server_id": {"id": "NSERVER"},
            "user_nkey": "UUSER",
            "client_info": {"host": "192.0.2.9", "kind": "Client", "type": "mqtt", "mqtt_id": "pi-1"},
            "client_tls": {"verified_chains": [[self.pem]]},
        } | nats
        return claims(self.callout.answer(issuer().mint("A", "x", request, now_s=NOW).encode()).decode())


def test_callout_grants_a_session_that_ends_with_the_certificate(tmp_path: Path) -> None:
    asked = Asked(tmp_path)
    answer = asked.answer()
    assert (answer["sub"], answer["aud"]) == ("UUSER", "NSERVER")
    user = claims(answer["nats"]["jwt"])
    end = x509.load_pem_x509_certificate(asked.pem.encode()).not_valid_after_utc
    assert (user["sub"], user["aud"], user["name"], user["exp"]) == ("UUSER", "FLEET", "pi-1", int(end.timestamp()))
    assert user["nats"]["pub"]["allow"][0] == "bmoe.v1.pi-1.output"
    assert user["nats"]["allowed_connection_types"] == ["MQTT"]
    assert not asked.reports


def test_callout_logs_names_and_reason_of_a_refusal(tmp_path: Path) -> None:
    asked = Asked(tmp_path)
    answer = asked.answer(client_info={"host": "192.0.2.9", "type": "mqtt", "mqtt_id": "pi-2"})
    assert "jwt" not in answer["nats"] and "client id 'pi-2'" in answer["nats"]["error"]
    [(event, facts)] = asked.reports
    assert event == "connect_refused"
    assert (facts["device"], facts["client_id"], facts["address"]) == ("pi-1", "pi-2", "192.0.2.9")
    assert "client id" in facts["reason"]


@pytest.mark.parametrize(
    "tls",
    [None, {}, {"verified_chains": []}, {"verified_chains": None}, {"verified_chains": [[]]},
     {"verified_chains": [["nonsense"]]}, {"verified_chains": 7}, "x"],
)  # fmt: skip
def test_callout_without_a_verified_certificate_refuses(tmp_path: Path, tls: Any) -> None:
    answer = Asked(tmp_path).answer(client_tls=tls)
    assert "certificate" in answer["nats"]["error"] and "jwt" not in answer["nats"]


def test_callout_never_believes_a_certificate_that_the_broker_did_not_verify(tmp_path: Path) -> None:
    asked = Asked(tmp_path)
    assert asked.answer(client_tls={"certs": [asked.pem]})["nats"]["error"] == "no client certificate"


def test_callout_gives_an_empty_answer_to_what_it_cannot_read(tmp_path: Path) -> None:
    asked = Asked(tmp_path)
    assert asked.callout.answer(b"nonsense") == b""
    assert asked.callout.answer(issuer().mint("A", "x", {"user_nkey": "U"}, now_s=NOW).encode()) == b""
    assert [event for event, _ in asked.reports] == ["callout_request_unreadable"] * 2


def test_failures_are_counted_by_address_forgotten_in_a_minute_and_bounded() -> None:
    now = [0.0]
    failures = Failures(clock=lambda: now[0])
    for _ in range(9):
        failures.add("192.0.2.1")
    assert not failures.too_many("192.0.2.1")
    failures.add("192.0.2.1")
    assert failures.too_many("192.0.2.1") and not failures.too_many("192.0.2.2")
    now[0] = 60.0
    assert not failures.too_many("192.0.2.1")
    for number in range(ADDRESSES_MAX + 1):
        failures.add(str(number))
    assert len(failures._times) == ADDRESSES_MAX
