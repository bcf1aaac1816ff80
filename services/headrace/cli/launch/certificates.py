"""Issue certificates for a mesh by an authority of our own: for a laptop, a test, or a small installation.

A certificate has its role in a SPIFFE URI, such as `spiffe://headrace/router`, and the names and addresses at
which its server is called. Keys are of the curve P-256. Files are in PEM format; those with keys are readable
for their owner only.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from headrace.channel import split
from headrace.runtime.security.peers import role_in

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec

CA = "ca.pem"
_CA_KEY = "ca.key"
CLIENT = "admin"  # the role of the person who runs the mesh
SERVICES = ("gateway", "router", "batcher", "worker")
ROLES = (*SERVICES, CLIENT)
DOMAIN = "spiffe://headrace/"
HOSTS = ("localhost", "127.0.0.1", "::1")
AUTHORITY_DAYS = 3650.0  # of an authority that is kept
_EARLIER = datetime.timedelta(hours=1)  # for clocks that are late


def cert_file(folder: Path, name: str) -> Path:
    """Return the file of a certificate that `issue` wrote."""
    return folder / f"{name}.pem"


def key_file(folder: Path, name: str) -> Path:
    """Return the file of a key that `issue` wrote."""
    return folder / f"{name}.key"


def shared_folder(cache: Path, target: str) -> Path:
    """Return where the certificates of a mesh at *target*, on this machine, are found while it runs."""
    return cache / "tls" / (split(target)[1] or "none")


@dataclass(frozen=True)
class Authority:
    """A certificate authority with its private key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey


def issue(
    folder: Path,
    names: Sequence[str] = ROLES,
    *,
    hosts: Sequence[str] = HOSTS,
    days: float = 7.0,
    domain: str = DOMAIN,
    keep_authority: bool = True,
) -> list[Path]:
    """Write a certificate and a key for each of *names*, and the authority's; return the certificates.

    names            each a role, or a role and a suffix, such as batcher-small
    hosts            names and IP addresses at which the servers are called. Only the certificates of services
                     contain them: no other one can be used by a server
    days             until the certificates expire
    domain           what precedes the name in the certificate's URI
    keep_authority   whether the authority's key is kept, or used if it is there, so that later calls issue
                     certificates of the same authority

    Raises OSError, and ValueError for an authority that cannot be used.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    authority = _read_authority(folder, days) if keep_authority else None
    if authority is None:
        # One that is kept signs further certificates, so it outlives the first ones.
        authority = _new_authority(max(days, AUTHORITY_DAYS) if keep_authority else days)
        _write(folder / CA, _pem(authority.certificate))
        if keep_authority:
            _write_key(folder / _CA_KEY, authority.key)
    written = []
    for name in names:
        key, certificate = _sign(authority, f"{domain}{name}", hosts, days)
        _write_key(key_file(folder, name), key)
        _write(cert_file(folder, name), _pem(certificate))
        written.append(cert_file(folder, name))
    return written


def _new_authority(days: float) -> Authority:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    number = x509.random_serial_number()
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"Headrace authority {number:x}"[:64])])
    certificate = (
        _builder(days)
        .subject_name(name)
        .issuer_name(name)
        .serial_number(number)
        .public_key(key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    return Authority(certificate, key)


def _sign(
    authority: Authority, uri: str, hosts: Sequence[str], days: float
) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    name = uri.rpartition("/")[2]
    uses = [ExtendedKeyUsageOID.CLIENT_AUTH]
    names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(uri)]
    if role_in(name) in SERVICES:
        uses.append(ExtendedKeyUsageOID.SERVER_AUTH)
        names += map(_host_name, hosts)
    certificate = (
        _builder(days)
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name[:64])]))
        .issuer_name(authority.certificate.subject)
        .serial_number(x509.random_serial_number())
        .public_key(key.public_key())
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(uses), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key()), critical=False
        )
        .sign(authority.key, hashes.SHA256())
    )
    return key, certificate


def _builder(days: float) -> x509.CertificateBuilder:
    from cryptography import x509

    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .not_valid_before(now - _EARLIER)
        .not_valid_after(now + datetime.timedelta(days=days))
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    from cryptography import x509

    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _host_name(host: str) -> x509.GeneralName:
    from cryptography import x509

    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _read_authority(folder: Path, days: float) -> Authority | None:
    from cryptography import x509
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    try:
        key = serialization.load_pem_private_key((folder / _CA_KEY).read_bytes(), password=None)
        certificate = x509.load_pem_x509_certificate((folder / CA).read_bytes())
    except FileNotFoundError:
        return None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
        raise ValueError(f"{folder / _CA_KEY} is not the key of {folder / CA}")
    left = certificate.not_valid_after_utc - datetime.datetime.now(datetime.UTC)
    if left < datetime.timedelta(days=days):
        raise ValueError(
            f"the authority in {folder / CA} expires in {left.days} days, before its certificates: issue "
            "certificates with a new one in another folder, and add it to the files that services trust"
        )
    return Authority(certificate, key)


def _pem(certificate: x509.Certificate) -> bytes:
    from cryptography.hazmat.primitives import serialization

    return certificate.public_bytes(serialization.Encoding.PEM)


def _write_key(path: Path, key: ec.EllipticCurvePrivateKey) -> None:
    from cryptography.hazmat.primitives import serialization

    _write(
        path,
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        ),
        mode=0o600,
    )


def _write(path: Path, data: bytes, *, mode: int = 0o644) -> None:
    """Replace a file at once: a process that reads it again sees the old or the new contents."""
    new = path.with_name(f".{path.name}.new")
    new.unlink(missing_ok=True)
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(data)
    new.replace(path)
