"""The CA and the certificates of our own: made once, kept through a crash, renewed in time, accepted by strict TLS."""

from __future__ import annotations

import base64
import datetime
import ssl
import stat
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from identity_helpers import make_csr

from bmoe.protocol.errors import ConfigError, MessageError
from coordinator.identity.authority import Authority, check_csr, load_or_create_key, spki_digest
from coordinator.identity.infrastructure import SERVER, ensure_certificate, prepare_identity

DAY = datetime.timedelta(days=1)
NOW = datetime.datetime.now(datetime.timezone.utc)


def test_ca_is_made_once_and_kept(tmp_path: Path) -> None:
    first = Authority.open(tmp_path)
    assert Authority.open(tmp_path).pin == first.pin
    assert stat.S_IMODE((tmp_path / "ca.key").stat().st_mode) == 0o600
    life = first.certificate.not_valid_after_utc - first.certificate.not_valid_before_utc
    assert life == datetime.timedelta(days=3651)


def test_ca_killed_between_key_and_certificate_is_finished_with_the_same_key(tmp_path: Path) -> None:
    key = load_or_create_key(tmp_path / "ca.key")
    assert Authority.open(tmp_path).certificate.public_key() == key.public_key()


@pytest.mark.parametrize("name", ["ca.key", "ca.pem"])
def test_damaged_ca_is_refused_and_not_replaced(tmp_path: Path, name: str) -> None:
    Authority.open(tmp_path)
    (tmp_path / name).write_bytes(b"spoiled")
    with pytest.raises(ConfigError, match="restore"):
        Authority.open(tmp_path)
    assert (tmp_path / name).read_bytes() == b"spoiled"


def test_ca_key_of_another_gateway_is_noticed(tmp_path: Path) -> None:
    Authority.open(tmp_path / "a")
    Authority.open(tmp_path / "b")
    (tmp_path / "a" / "ca.key").write_bytes((tmp_path / "b" / "ca.key").read_bytes())
    with pytest.raises(ConfigError, match="not of the key beside it"):
        Authority.open(tmp_path / "a")


def test_device_certificate_is_backdated_for_boards_without_a_clock_and_ends_in_30_days(tmp_path: Path) -> None:
    pem = Authority.open(tmp_path).issue_device(check_csr(make_csr(subject="CN=coordinator")), "pi-1", NOW)
    certificate = x509.load_pem_x509_certificate(pem)
    assert certificate.not_valid_before_utc == (NOW - DAY).replace(microsecond=0)
    assert certificate.not_valid_after_utc == (NOW + 30 * DAY).replace(microsecond=0)
    assert certificate.subject.rfc4514_string() == "CN=pi-1"
    with pytest.raises(x509.ExtensionNotFound):
        certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [x509.ExtendedKeyUsageOID.CLIENT_AUTH]


def test_device_certificate_cannot_certify_others(tmp_path: Path) -> None:
    authority = Authority.open(tmp_path)
    certificate = x509.load_pem_x509_certificate(authority.issue_device(check_csr(make_csr()), "pi-1"))
    assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert authority.issued(certificate)
    assert not Authority.open(tmp_path / "other").issued(certificate)


def test_own_certificates_are_issued_once_and_renewed_past_half_their_life_with_the_same_key(tmp_path: Path) -> None:
    identity = prepare_identity(tmp_path, ["validator-1"], ["gateway.example", "192.0.2.7"])
    before = identity.tls("validator-1").cert.read_bytes(), identity.spki("validator-1")
    prepare_identity(tmp_path, ["validator-1"], ["gateway.example", "192.0.2.7"])
    assert identity.tls("validator-1").cert.read_bytes() == before[0]
    assert not ensure_certificate(identity, "validator-1", None, NOW + 180 * DAY)
    assert ensure_certificate(identity, "validator-1", None, NOW + 184 * DAY)
    assert identity.tls("validator-1").cert.read_bytes() != before[0]
    assert identity.spki("validator-1") == before[1]


def test_server_certificate_names_what_agents_dial_and_follows_a_new_name(tmp_path: Path) -> None:
    identity = prepare_identity(tmp_path, [], ["192.0.2.7"])
    found = x509.load_pem_x509_certificate(identity.tls(SERVER).cert.read_bytes())
    names = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert "localhost" in names.get_values_for_type(x509.DNSName)
    assert {"127.0.0.1", "192.0.2.7"} <= {str(a) for a in names.get_values_for_type(x509.IPAddress)}
    before = identity.tls(SERVER).cert.read_bytes()
    prepare_identity(tmp_path, [], ["192.0.2.7", "gateway.example"])
    assert identity.tls(SERVER).cert.read_bytes() != before


def test_certificate_torn_by_a_crash_is_issued_again(tmp_path: Path) -> None:
    identity = prepare_identity(tmp_path, [])
    identity.tls("coordinator").cert.write_bytes(b"-----BEGIN CERT")
    prepare_identity(tmp_path, [])
    again = x509.load_pem_x509_certificate(identity.tls("coordinator").cert.read_bytes())
    assert identity.authority.issued(again) and spki_digest(again.public_key()) == identity.spki("coordinator")


def of_no_version(pem: bytes) -> bytes:
    """The certificate with another version number in it: what the library says to it is no ValueError."""
    der = ssl.PEM_cert_to_DER_cert(pem.decode())
    return ssl.DER_cert_to_PEM_cert(der.replace(b"\xa0\x03\x02\x01\x02", b"\xa0\x03\x02\x01\x06", 1)).encode()


def test_files_of_a_version_that_is_none_are_damaged_files_like_any_other(tmp_path: Path) -> None:
    identity = prepare_identity(tmp_path, [])
    own = identity.tls("coordinator").cert
    own.write_bytes(of_no_version(own.read_bytes()))
    prepare_identity(tmp_path, [])
    assert identity.authority.issued(x509.load_pem_x509_certificate(own.read_bytes())), "issued again"
    ca = tmp_path / "identity" / "ca.pem"
    ca.write_bytes(of_no_version(ca.read_bytes()))
    with pytest.raises(ConfigError, match=r"ca\.pem cannot be used: 6 is not a valid X509 version: restore it"):
        prepare_identity(tmp_path, [])


def test_a_request_of_a_version_that_is_none_is_refused(tmp_path: Path) -> None:
    lines = make_csr().splitlines()
    der = base64.b64decode("".join(lines[1:-1]))
    odd = base64.b64encode(der.replace(b"\x02\x01\x00", b"\x02\x01\x07", 1)).decode()
    with pytest.raises(MessageError, match="not a certificate request in PEM: 7 is not a valid CSR version"):
        check_csr("\n".join([lines[0], odd, lines[-1]]))


def test_key_of_another_curve_is_refused(tmp_path: Path) -> None:
    key = ec.generate_private_key(ec.SECP384R1())
    (tmp_path / "k").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    with pytest.raises(ConfigError, match="P-256"):
        load_or_create_key(tmp_path / "k")


def test_strict_verification_accepts_both_ends_of_a_handshake(tmp_path: Path) -> None:
    identity = prepare_identity(tmp_path, [])
    files, client_files = identity.tls(SERVER), identity.tls("coordinator")
    server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    for context, own in ((server, files), (client, client_files)):
        context.load_cert_chain(own.cert, own.key)
        context.load_verify_locations(own.ca)
        context.verify_flags |= ssl.VERIFY_X509_STRICT
    server.verify_mode = ssl.CERT_REQUIRED
    ends = [ssl.MemoryBIO() for _ in range(4)]
    a = server.wrap_bio(ends[0], ends[1], server_side=True)
    b = client.wrap_bio(ends[2], ends[3], server_hostname="localhost")
    for _ in range(6):
        for end in (b, a):
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                pass
        ends[0].write(ends[3].read())
        ends[2].write(ends[1].read())
    assert a.getpeercert()["subject"] == ((("commonName", "coordinator"),),)  # type: ignore[index]
