"""A certificate authority for tests: P-256, one folder, no trust beyond the test."""

from __future__ import annotations

import datetime
import ipaddress
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

FAR_END = "10.231.77.1"  # of lossy_wire.py


@dataclass(frozen=True)
class Authority:
    """Key and certificate of a test authority; `ca` is its PEM file and `folder` takes what it issues."""

    folder: Path
    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate

    @property
    def ca(self) -> Path:
        """PEM file of the authority's certificate."""
        return self.folder / "ca.crt"


def make_authority(folder: Path, name: str = "test authority") -> Authority:
    """A fresh authority that keeps its files in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    certificate = _builder(subject, subject, key, is_ca=True).sign(key, hashes.SHA256())
    authority = Authority(folder, key, certificate)
    authority.ca.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    return authority


def issue(authority: Authority, name: str, *, server: bool = False, days: float = 1) -> tuple[Path, Path]:
    """Certificate and key files of subject CN=`name`, good for so many days; a server's is also valid for localhost,
    127.0.0.1, ::1 and the far end of a lossy wire."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    builder = _builder(subject, authority.certificate.subject, key, is_ca=False, days=days)
    if server:
        addresses = [x509.IPAddress(ipaddress.ip_address(text)) for text in ("127.0.0.1", "::1", FAR_END)]
        builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost"), *addresses]), False)
    certificate = builder.sign(authority.key, hashes.SHA256())
    cert_file, key_file = authority.folder / f"{name}.crt", authority.folder / f"{name}.key"
    cert_file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    key_file.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return cert_file, key_file


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, *, is_ca: bool, days: float = 1
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.timezone.utc)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=is_ca, path_length=None), critical=True)
    )
