"""The gateway's certificate authority: one P-256 key, certificates for devices (30 days) and for our own servers.

It writes every subject and alternative name itself and copies none from a request, because the ledger server maps a
certificate's whole subject to a user. Profile: RFC 5280 (key identifiers, key usage), so that OpenSSL's strict mode
accepts what it issues.
"""

from __future__ import annotations

import datetime
import hashlib
import ipaddress
from collections.abc import Iterable
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from bmoe.protocol.errors import ConfigError, MessageError
from bmoe.protocol.files import write_durably
from bmoe.protocol.schema import is_name

CA_DAYS = 3650
DEVICE_DAYS = 30
INFRASTRUCTURE_DAYS = 365
# Boards without a battery-backed clock start in the past, often at the time of their image's build or last shutdown.
BACKDATE = datetime.timedelta(days=1)
MAX_CSR_BYTES = 4096
CA_NAME = "bmoe gateway CA"


def spki_digest(public_key: ec.EllipticCurvePublicKey) -> bytes:
    """SHA-256 of a TLS key's SubjectPublicKeyInfo: what a Member statement pins."""
    return hashlib.sha256(public_key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).digest()


# What reading a file that should hold a certificate can raise; InvalidVersion is no ValueError.
UNREADABLE = (OSError, ValueError, x509.InvalidVersion)


def check_csr(pem: str) -> x509.CertificateSigningRequest:
    """A certificate request whose signer holds its P-256 key; subject and extensions are not looked at.

    Raises MessageError for anything else.
    """
    if len(pem) > MAX_CSR_BYTES:
        raise MessageError(f"a certificate request has at most {MAX_CSR_BYTES} characters, found {len(pem)}")
    try:
        csr = x509.load_pem_x509_csr(pem.encode())
        key = csr.public_key()
        if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
            raise MessageError("a certificate request must be for a P-256 key")
        valid = csr.is_signature_valid
    except (ValueError, TypeError, UnsupportedAlgorithm, InvalidSignature, x509.InvalidVersion) as error:
        raise MessageError(f"not a certificate request in PEM: {error or type(error).__name__}") from None
    if not valid:
        raise MessageError("the certificate request is not signed by its own key")
    return csr


def csr_digest(csr: x509.CertificateSigningRequest) -> bytes:
    """SHA-256 of the request's DER: what an Enrolment header pins."""
    return hashlib.sha256(csr.public_bytes(Encoding.DER)).digest()


class Authority:
    """The key and certificate of the gateway's CA."""

    def __init__(self, key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate) -> None:
        self.certificate = certificate
        self._key = key

    @classmethod
    def open(cls, folder: Path) -> Authority:
        """The CA kept in `folder` as ca.key (0600) and ca.pem; made durably when there is none.

        Raises ConfigError for files that are damaged or do not belong together, and for a clock outside their time.
        """
        key = load_or_create_key(folder / "ca.key")
        path = folder / "ca.pem"
        if not path.exists():
            write_durably(path, _self_signed(key, _now()).public_bytes(Encoding.PEM))
        try:
            certificate = x509.load_pem_x509_certificate(path.read_bytes())
        except UNREADABLE as error:
            raise ConfigError(f"CA certificate {path} cannot be used: {error}: restore it") from error
        if certificate.public_key() != key.public_key():
            raise ConfigError(f"{path} is not of the key beside it: restore both from one backup")
        begin, end, now = certificate.not_valid_before_utc, certificate.not_valid_after_utc, _now()
        if not begin <= now <= end:  # whatever is certified then, nobody would accept it
            raise ConfigError(
                f"this machine's clock says {now:%Y-%m-%d %H:%M}, and {path} is valid from {begin:%Y-%m-%d} to "
                f"{end:%Y-%m-%d}: set the clock"
            )
        return cls(key, certificate)

    @property
    def pem(self) -> bytes:
        """The CA certificate in PEM."""
        return self.certificate.public_bytes(Encoding.PEM)

    @property
    def pin(self) -> bytes:
        """SHA-256 of the CA certificate's DER: what a join token carries."""
        return self.certificate.fingerprint(hashes.SHA256())

    def issue_device(
        self, csr: x509.CertificateSigningRequest, name: str, now: datetime.datetime | None = None, session: str = ""
    ) -> bytes:
        """A client certificate in PEM, subject CN=`name`, for the key of a request that `check_csr` passed; 30 days.

        With `session`, of a further session of that device: CN=`name`:`session`.
        """
        if not is_name(name):
            raise MessageError(f"a device is named by 1..64 characters a-z 0-9 -, found {name!r}")
        key = csr.public_key()
        assert isinstance(key, ec.EllipticCurvePublicKey)
        subject = f"{name}:{session}" if session else name
        return self._issue(subject, key, DEVICE_DAYS, now or _now(), [ExtendedKeyUsageOID.CLIENT_AUTH], None)

    def issue_infrastructure(
        self,
        name: str,
        key: ec.EllipticCurvePublicKey,
        hosts: Iterable[str] | None = None,
        now: datetime.datetime | None = None,
    ) -> bytes:
        """A certificate in PEM for one of our own processes, a year; with `hosts` (names, addresses) also a server's."""
        usages = [ExtendedKeyUsageOID.CLIENT_AUTH]
        if hosts is not None:
            usages.append(ExtendedKeyUsageOID.SERVER_AUTH)
        names = None if hosts is None else x509.SubjectAlternativeName([_general_name(host) for host in hosts])
        return self._issue(name, key, INFRASTRUCTURE_DAYS, now or _now(), usages, names)

    def revocation_list(self, serials: Iterable[int]) -> bytes:
        """A CRL in PEM that lists these serial numbers. It is good for as long as the CA: each new one replaces it."""
        builder = x509.CertificateRevocationListBuilder().issuer_name(self.certificate.subject)
        builder = builder.last_update(_now() - BACKDATE).next_update(self.certificate.not_valid_after_utc)
        for serial in serials:
            entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(_now())
            builder = builder.add_revoked_certificate(entry.build())
        return builder.sign(self._key, hashes.SHA256()).public_bytes(Encoding.PEM)

    def listed_as_revoked(self, pem: bytes) -> list[int] | None:
        """The serial numbers, ascending, in a CRL of ours; None for anything else."""
        try:
            found = x509.load_pem_x509_crl(pem)
        except UNREADABLE:
            return None
        ours = found.is_signature_valid(self._key.public_key())
        return sorted(revoked.serial_number for revoked in found) if ours else None

    def issued(self, certificate: x509.Certificate) -> bool:
        """Whether this CA signed the certificate."""
        try:
            certificate.verify_directly_issued_by(self.certificate)
        except (ValueError, TypeError, InvalidSignature):
            return False
        return True

    def _issue(
        self,
        name: str,
        key: ec.EllipticCurvePublicKey,
        days: int,
        now: datetime.datetime,
        usages: list[x509.ObjectIdentifier],
        names: x509.SubjectAlternativeName | None,
    ) -> bytes:
        builder = _builder(name, self.certificate.subject, key, now - BACKDATE, now + datetime.timedelta(days=days))
        builder = (
            builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
        )
        if names is not None:
            builder = builder.add_extension(names, critical=False)
        return builder.sign(self._key, hashes.SHA256()).public_bytes(Encoding.PEM)


def load_or_create_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """The P-256 key in `path` (PEM, 0600), made durably when there is none; raises ConfigError for any other content."""
    if not path.exists():
        made = ec.generate_private_key(ec.SECP256R1())
        write_durably(path, made.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), mode=0o600)
    try:
        key = load_pem_private_key(path.read_bytes(), None)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"key {path} cannot be used: {error}: restore it") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise ConfigError(f"key {path} is not a P-256 key: restore it")
    return key


def self_signed_client(name: str, key: ec.EllipticCurvePrivateKey) -> bytes:
    """A certificate in PEM for a client whom one server is to know by this very certificate, under no authority."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    end = _now() + datetime.timedelta(days=CA_DAYS)
    builder = _builder(name, subject, key.public_key(), _now() - BACKDATE, end)
    return (
        builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False)
        .sign(key, hashes.SHA256())
        .public_bytes(Encoding.PEM)
    )


def _self_signed(key: ec.EllipticCurvePrivateKey, now: datetime.datetime) -> x509.Certificate:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, CA_NAME)])
    end = now + datetime.timedelta(days=CA_DAYS)
    builder = _builder(CA_NAME, subject, key.public_key(), now - BACKDATE, end)
    return (
        builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs_certificates=True), critical=True)
        .sign(key, hashes.SHA256())
    )


def _builder(
    name: str, issuer: x509.Name, key: ec.EllipticCurvePublicKey, begin: datetime.datetime, end: datetime.datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(end)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _key_usage(signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.timezone.utc)
