"""The files of TLS are verified when they are read, and read again when they change."""

from __future__ import annotations

import logging
import ssl
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509

from headrace.cli.launch.certificates import AUTHORITY_DAYS, CA, issue
from headrace.tls.files import BadTls, TlsFiles, TlsReader
from tests.certificates import Certificates, issued, replace


class Clock:
    """A clock that stands still until it is moved."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def certificates(tmp_path: Path) -> Certificates:
    return issued(tmp_path / "tls", ["router"])


def files_of(certificates: Certificates, **others: Any) -> TlsFiles:
    return TlsFiles(**{**certificates.client("router"), **others})


def test_the_files_are_looked_at_once_per_interval(certificates: Certificates) -> None:
    clock = Clock()
    reader = TlsReader(files_of(certificates), check_seconds=1.0, clock=clock)
    first = reader.current()
    replace(certificates.ca, certificates.ca.read_bytes() + b"\n")

    clock.now += 0.9
    assert reader.current() is first
    clock.now += 0.2
    assert reader.current() is not first
    assert reader.current().ca == certificates.ca.read_bytes()


def test_unchanged_files_are_not_read_again(certificates: Certificates) -> None:
    reader = TlsReader(files_of(certificates), check_seconds=0.0)

    assert reader.current() is reader.current()


def test_a_symbolic_link_that_points_elsewhere_is_a_change(tmp_path: Path) -> None:
    """As Kubernetes replaces the files of a secret."""
    issued(tmp_path / "1", ["router"])
    issued(tmp_path / "2", ["router"])
    link = tmp_path / "data"
    link.symlink_to(tmp_path / "1")
    reader = TlsReader(files_of(Certificates(link)), check_seconds=0.0)
    before = reader.current()

    (tmp_path / "new").symlink_to(tmp_path / "2")
    (tmp_path / "new").replace(link)

    assert before.cert == (tmp_path / "1" / "router.pem").read_bytes()
    assert reader.current().cert == (tmp_path / "2" / "router.pem").read_bytes()


def test_files_that_do_not_fit_are_reported_once_and_the_last_good_ones_stay(
    certificates: Certificates, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    reader = TlsReader(files_of(certificates), check_seconds=0.0)
    good = reader.current()
    other = issued(tmp_path / "other", ["router"])
    old_key = certificates.client("router")["key"]

    with caplog.at_level(logging.INFO):
        replace(old_key, other.client("router")["key"].read_bytes())
        assert all(reader.current() is good for _ in range(5))
        assert [record.message for record in caplog.records] == ["new certificate files not used"]
        replace(certificates.client("router")["cert"], other.client("router")["cert"].read_bytes())
        assert reader.current() is not good

    assert [record.message for record in caplog.records][1:] == ["certificate files changed"]


def test_a_replacement_in_two_steps_is_not_reported(
    certificates: Certificates, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    reader = TlsReader(files_of(certificates), check_seconds=0.0)
    other = issued(tmp_path / "other", ["router"])

    with caplog.at_level(logging.WARNING):
        replace(certificates.client("router")["key"], other.client("router")["key"].read_bytes())
        reader.current()
        replace(certificates.client("router")["cert"], other.client("router")["cert"].read_bytes())
        reader.current()

    assert not caplog.records


def test_a_file_that_is_missing_for_a_while_changes_nothing(certificates: Certificates) -> None:
    reader = TlsReader(files_of(certificates), check_seconds=0.0)
    good, data = reader.current(), certificates.ca.read_bytes()

    certificates.ca.unlink()
    assert reader.current() is good
    certificates.ca.write_bytes(data)
    assert reader.current().ca == data


def broken(certificates: Certificates, how: str) -> TlsFiles:
    cert, key = certificates.client("router")["cert"], certificates.client("router")["key"]
    match how:
        case "missing":
            return files_of(certificates, ca=certificates.folder / "none.pem")
        case "no authority":
            certificates.ca.write_text("nothing")
        case "not ASCII":
            certificates.ca.write_bytes("Főtanúsítvány".encode())
        case "no key":
            return files_of(certificates, key=None)
        case "no certificate":
            cert.write_text("nothing")
        case "other key":
            key.write_bytes(issued(certificates.folder / "other", ["x"]).client("x")["key"].read_bytes())
        case "passphrase":
            key.write_bytes(encrypted(key.read_bytes()))
    return files_of(certificates)


def encrypted(key: bytes) -> bytes:
    from cryptography.hazmat.primitives import serialization

    return serialization.load_pem_private_key(key, password=None).private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"secret"),
    )


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", "cannot read .*none.pem: No such file"),
        ("no authority", "ca.pem contains no certificates in PEM format"),
        ("not ASCII", "ca.pem contains no certificates in PEM format"),
        ("no key", "a certificate needs its private key"),
        ("no certificate", "router.pem and .*router.key cannot be used: .*not in PEM format"),
        ("other key", "the key is not that of the certificate"),
        ("passphrase", "the key has a passphrase"),
    ],
)
def test_files_that_cannot_be_used_are_named_with_the_cause(
    certificates: Certificates, how: str, message: str
) -> None:
    with pytest.raises(BadTls, match=message):
        TlsReader(broken(certificates, how))


def test_the_authority_of_a_folder_outlives_what_it_issues(tmp_path: Path) -> None:
    issue(tmp_path, ["router"], days=1)
    issue(tmp_path, ["router"], days=30)
    ca, cert = (x509.load_pem_x509_certificate((tmp_path / name).read_bytes()) for name in (CA, "router.pem"))

    assert ca.not_valid_after_utc > cert.not_valid_after_utc
    with pytest.raises(ValueError, match="expires in"):
        issue(tmp_path, ["router"], days=2 * AUTHORITY_DAYS)


def test_authorities_may_have_comments_in_any_language(certificates: Certificates) -> None:
    data = "# Főtanúsítvány\n".encode() + certificates.ca.read_bytes()
    certificates.ca.write_bytes(data)

    assert TlsReader(files_of(certificates)).current().ca == data


def test_keys_are_readable_for_their_owner_only(certificates: Certificates) -> None:
    assert certificates.client("router")["key"].stat().st_mode & 0o077 == 0
    assert certificates.folder.stat().st_mode & 0o077 == 0


def test_the_authority_of_a_folder_issues_further_certificates(certificates: Certificates) -> None:
    """So that `headrace certs` renews: what trusted the authority before still does."""
    ca, old = certificates.ca.read_bytes(), certificates.client("router")["cert"].read_bytes()

    issued(certificates.folder, ["router", "worker"])

    assert certificates.ca.read_bytes() == ca
    assert certificates.client("router")["cert"].read_bytes() != old
    context = ssl.create_default_context(cafile=str(certificates.ca))
    context.load_cert_chain(certificates.client("worker")["cert"], certificates.client("worker")["key"])
