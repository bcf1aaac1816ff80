"""Issue the certificates that cert-manager's CSI driver would put into the volumes of pods."""

from __future__ import annotations

import datetime
import functools
import ipaddress
from collections.abc import Mapping
from pathlib import Path
from string import Template
from typing import Any

DRIVER = "csi.cert-manager.io/"
DAY = datetime.timedelta(days=1)


@functools.cache
def authority() -> tuple[Any, Any]:
    """Return the certificate and the key of an authority."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec

    key, name, now = ec.generate_private_key(ec.SECP256R1()), _name("headrace-ca"), _now()
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(now - DAY).not_valid_after(now + DAY)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    return builder.sign(key, hashes.SHA256()), key


def issue(attributes: Mapping[str, str], account: str, namespace: str, folder: Path) -> None:
    """Write the files of a volume with these attributes, for a pod of a service account.

    The address of this machine is added to the names, as nothing here resolves those of Services.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    def values(name: str) -> list[str]:
        text = Template(attributes[DRIVER + name]).substitute(
            SERVICE_ACCOUNT_NAME=account, POD_NAMESPACE=namespace
        )
        return text.split(",")

    assert values("issuer-name") == ["headrace"]
    signer, signing_key = authority()
    key, now = ec.generate_private_key(ec.SECP256R1()), _now()
    names: list[x509.GeneralName] = [x509.DNSName(name) for name in values("dns-names")]
    names += [x509.UniformResourceIdentifier(uri) for uri in values("uri-sans")]
    names.append(x509.IPAddress(ipaddress.ip_address("127.0.0.1")))
    builder = x509.CertificateBuilder(
        signer.subject, _name(account), key.public_key(), x509.random_serial_number()
    )
    builder = builder.not_valid_before(now - DAY).not_valid_after(now + DAY)
    builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    certificate = builder.sign(signing_key, hashes.SHA256())
    pem = serialization.Encoding.PEM
    (folder / attributes[f"{DRIVER}certificate-file"]).write_bytes(certificate.public_bytes(pem))
    (folder / attributes[f"{DRIVER}ca-file"]).write_bytes(signer.public_bytes(pem))
    (folder / attributes[f"{DRIVER}privatekey-file"]).write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )


def _name(text: str) -> Any:
    from cryptography import x509

    return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, text)])


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)
