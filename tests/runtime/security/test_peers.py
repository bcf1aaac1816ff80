"""The role of a peer follows from the names in its certificate, within the domains that are trusted."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace import errors
from headrace.cli.launch.certificates import cert_file, issue
from headrace.runtime.security.access import required_scope
from headrace.runtime.security.caller_guard import Accepted, CallerGuard
from headrace.runtime.security.guard import Peer
from headrace.runtime.security.identity import ALL_SCOPES, Identity
from headrace.runtime.security.peers import CALLER_SCOPES, SCOPES, Domains, OwnCertificate, Peers
from headrace.tls.files import TlsFiles, TlsReader
from tests.certificates import Certificates, issued

MESH = "spiffe://cluster.local/ns/headrace/sa/"
GENERATE = "/headrace.v1.GenerationService/Generate"
INSPECT = "/headrace.v1.AdminService/Inspect"
HEALTH = "/grpc.health.v1.Health/Check"


@pytest.mark.parametrize(
    ("uri", "role"),
    [
        (MESH + "router", "router"),
        (MESH + "headrace-router", "router"),
        (MESH + "batcher-small", "batcher"),
        (MESH + "worker-large-2", "worker"),
        (MESH + "admin", "admin"),
        (MESH + "headrace-admin", "admin"),
        (MESH + "admin-dashboard", None),
        (MESH + "routers", None),
        (MESH + "router-", None),
        (MESH + "Router", None),
        (MESH + "", None),
        (MESH + "x/router", None),
        ("spiffe://cluster.local/ns/other/sa/router", None),
        ("spiffe://router", None),
        ("https://cluster.local/ns/headrace/sa/router", None),
        ("router", None),
        ("", None),
    ],
)
def test_the_role_is_the_last_segment_of_a_uri_of_the_mesh(uri: str, role: str | None) -> None:
    assert Domains(uris=frozenset({MESH})).role([uri], []) == role


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("router.headrace.svc", "router"),
        ("batcher-small.headrace.svc", "batcher"),
        ("Worker.Headrace.SVC", "worker"),
        ("router.other.svc", None),
        ("router.headrace.svc.evil", None),
        ("evil.router.headrace.svc", None),
        ("router", None),
        ("", None),
    ],
)
def test_without_uris_the_role_is_the_first_label_of_a_name_of_the_mesh(name: str, role: str | None) -> None:
    assert Domains(suffixes=frozenset({".headrace.svc"})).role([], [name]) == role


def test_names_do_not_count_where_uris_do() -> None:
    """Anybody may obtain a certificate for a name that resolves to its own pod."""
    domains = Domains(uris=frozenset({MESH}), suffixes=frozenset({".headrace.svc"}))

    assert domains.role([], ["router.headrace.svc"]) is None


@given(st.text(max_size=40), st.text(max_size=40))
def test_no_text_is_a_role_without_trusted_domains(uri: str, name: str) -> None:
    assert Domains().role([uri, "spiffe://headrace/router"], [name, "router.headrace.svc"]) is None


@given(st.lists(st.text(alphabet="spife:/.-routerbatchwk", max_size=30), max_size=4))
def test_a_role_needs_the_trusted_start(uris: list[str]) -> None:
    if Domains(uris=frozenset({MESH})).role(uris, []) is not None:
        assert any(uri.startswith(MESH) for uri in uris)


def test_the_own_certificate_names_the_trusted_domains(tmp_path: Path) -> None:
    issue(
        tmp_path, ["batcher-small", "caller"], domain=MESH, hosts=["batcher-small.headrace.svc", "10.0.0.7"]
    )

    own = OwnCertificate.read(cert_file(tmp_path, "batcher-small").read_bytes())
    caller = OwnCertificate.read(cert_file(tmp_path, "caller").read_bytes())

    assert Domains.around(own.uris, own.names) == Domains(
        uris=frozenset({MESH}), suffixes=frozenset({".headrace.svc"})
    )
    assert caller.uris == (MESH + "caller",)
    assert not caller.names, "a caller's certificate is of no use to a server"
    assert Domains.around(caller.uris, caller.names) == Domains()
    assert OwnCertificate.read(b"no certificate") == OwnCertificate()


def test_a_certificate_without_role_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Otherwise nobody would know why all peers are refused."""
    reader = TlsReader(TlsFiles(**issued(tmp_path, ["edge"]).client("edge")))

    Peers(reader).domains()

    assert [record.message.partition(":")[0] for record in caplog.records] == ["no peer has a role"]


def test_listed_domains_are_read_and_others_refused() -> None:
    assert Domains.parse([MESH, " .headrace.svc ", ""]) == Domains(
        frozenset({MESH}), frozenset({".headrace.svc"})
    )
    for wrong in ("spiffe://cluster.local", "spiffe://", "headrace.svc", ".headrace svc", "https://x/y/"):
        with pytest.raises(ValueError, match="neither the start of a SPIFFE URI"):
            Domains.parse([wrong])


@pytest.mark.parametrize("service", ["router", "batcher", "worker"])
@pytest.mark.parametrize(
    "method", [INSPECT, "/grpc.channelz.v1.Channelz/GetServers", "/grpc.reflection.v1.X/Y", "/a/b", "", "/"]
)
def test_what_is_not_listed_is_for_administrators(service: str, method: str) -> None:
    assert required_scope(service, method) == "admin"  # type: ignore[arg-type]


@pytest.fixture
def certificates(tmp_path: Path) -> Certificates:
    return issued(tmp_path, ["router"])


def guard(certificates: Certificates, service: str, listed: Domains | None = None) -> CallerGuard:
    reader = TlsReader(TlsFiles(**certificates.client("router")), check_seconds=0.0)
    return CallerGuard(service, Accepted(peers=Peers(reader, listed)))  # type: ignore[arg-type]


def peer(uri: str) -> Peer:
    return Peer("ipv4:10.0.0.7:1", {"x509_pem_cert": (b"...",), "peer_uri": (uri.encode(),)})


async def test_the_identity_has_the_name_and_the_scopes_of_its_role(certificates: Certificates) -> None:
    identity = await guard(certificates, "batcher").identify(GENERATE, (), peer("spiffe://headrace/router"))

    assert (identity.name, identity.scopes) == ("spiffe://headrace/router", SCOPES["router"])
    assert SCOPES["admin"] == ALL_SCOPES


async def test_other_certificates_may_only_call_routers(certificates: Certificates) -> None:
    other = peer("spiffe://elsewhere/router")
    identity = await guard(certificates, "router").identify(GENERATE, (), other)

    assert identity == Identity(
        name="spiffe://elsewhere/router",
        scopes=CALLER_SCOPES,
        tenant="spiffe://elsewhere/router",
        max_priority=5,
    )
    for service in ("router", "batcher", "worker"):
        with pytest.raises(errors.Forbidden):
            await guard(certificates, service).identify(INSPECT, (), other)
        await guard(certificates, service).identify(HEALTH, (), other)
    with pytest.raises(errors.Forbidden, match=r"spiffe://elsewhere/router may not call .*scope router"):
        await guard(certificates, "batcher").identify(GENERATE, (), other)


@pytest.mark.parametrize("unfit", ["spiffe://elsewhere/" + "x" * 300, "two\nlines", "\0others"])
async def test_a_tenant_is_a_name_of_the_certificate_that_is_fit_for_one(
    certificates: Certificates, unfit: str
) -> None:
    """Batchers refuse longer names, and the names that quotas use themselves are not printable."""
    named = peer(unfit)
    with_another = Peer(named.address, {**named.certificate, "x509_common_name": (b"search",)})

    found = [
        (await guard(certificates, "router").identify(GENERATE, (), one)) for one in (named, with_another)
    ]

    assert [one.tenant for one in found] == ["a certificate without a name", "search"]


async def test_callers_without_a_certificate_are_served_health_only(certificates: Certificates) -> None:
    nobody = Peer("ipv4:10.0.0.7:1")
    for service in ("router", "batcher", "worker"):
        await guard(certificates, service).identify(HEALTH, (), nobody)
        with pytest.raises(errors.CredentialsRequired, match="use a client certificate"):
            await guard(certificates, service).identify(GENERATE, (), nobody)


async def test_listed_domains_replace_those_of_the_own_certificate(certificates: Certificates) -> None:
    listed = guard(certificates, "batcher", Domains.parse(["spiffe://elsewhere/"]))

    await listed.identify(GENERATE, (), peer("spiffe://elsewhere/router"))
    with pytest.raises(errors.Forbidden):
        await listed.identify(GENERATE, (), peer("spiffe://headrace/router"))


async def test_the_trusted_domains_follow_the_own_certificate(certificates: Certificates) -> None:
    batcher = guard(certificates, "batcher")
    await batcher.identify(GENERATE, (), peer("spiffe://headrace/router"))

    issue(certificates.folder, ["router"], domain="spiffe://renamed/")

    await batcher.identify(GENERATE, (), peer("spiffe://renamed/router"))
    with pytest.raises(errors.Forbidden):
        await batcher.identify(GENERATE, (), peer("spiffe://headrace/router"))
