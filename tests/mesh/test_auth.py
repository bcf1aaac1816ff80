"""Who may call what, over real servers: each RPC of each service, by each kind of caller."""

from __future__ import annotations

import asyncio
import pkgutil
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, asynccontextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from headrace import errors, statuses, v1
from headrace.bearer import MAX_TOKEN, BadToken
from headrace.channel import open_channel
from headrace.client import Client, chat, connect
from headrace.router.__main__ import router
from headrace.router.settings import Settings as RouterSettings
from headrace.v1 import generation_pb2 as pb
from headrace.v1 import multiplex_pb2 as wire
from headrace.v1.generation_service_pb2_grpc import GenerationServiceStub
from headrace.worker.engine.echo import EchoEngine
from tests.harness import PATIENCE, Mesh, collect, eventually, prompt, running_mesh
from tests.issuer import AUDIENCE, ISSUER, SigningKey, jwks
from tests.security import RPCS, Callers, bearer, verdict, verdicts

HEALTH = "/grpc.health.v1.Health/"
LIST_TIERS = "/headrace.v1.RoutingService/ListTiers"
FEEDBACK = "/headrace.v1.RoutingService/Feedback"
CALLS = (
    "/headrace.v1.GenerationService/",
    "/headrace.v1.RoutingService/",
    "/headrace.v1.TokenizerService/",
)
WORKER = "/headrace.v1.WorkerService/"
QUOTAS = "/headrace.v1.QuotaService/"  # offered by routers with --quota-peers
OPERATIONS = ("/headrace.v1.AdminService/", "/grpc.reflection.", "/grpc.channelz.")

SCOPES = {
    "caller": ("generate",),
    "rater": ("feedback",),
    "admin": ("admin",),
    "router": ("router",),
    "batcher": ("batcher",),
}


@pytest.fixture(scope="module")
def callers(tmp_path_factory: pytest.TempPathFactory) -> Callers:
    made = Callers(tmp_path_factory.mktemp("auth") / "callers.toml")
    for name, scopes in SCOPES.items():
        made.add(name, scopes=scopes)
    made.add("search", max_priority=3)
    made.add("gateway", tenant="*", max_priority=9)
    made.add("operator", scopes=("generate", "admin"))
    return made


@pytest.fixture(scope="module")
async def mesh(callers: Callers) -> AsyncGenerator[Mesh, None]:
    """A mesh whose router serves callers with tokens only; the other services also serve anonymous ones."""
    inside = {"auth_tokens": callers.path, "auth_anonymous": "allow"}
    async with running_mesh(
        "only",
        engine=lambda: EchoEngine(step_seconds=0.01),
        router_settings={"auth_tokens": callers.path},
        batcher_settings=inside,
        worker_settings=inside,
        client_options={"token": callers.tokens["caller"]},
    ) as running:
        yield running


def port_of(mesh: Mesh, service: str) -> int:
    parts = mesh.tiers["only"]
    return {"router": mesh.port, "batcher": parts.batcher.server.port, "worker": parts.worker.server.port}[
        service
    ]


def needed(service: str, method: str) -> str:
    """The scope that a method needs; "" for none, "-" if the service does not offer it."""
    if method.startswith(HEALTH):
        return ""
    if method.startswith(OPERATIONS):
        return "admin"
    if method.startswith(QUOTAS):
        return "-"
    if service == "worker":
        return "batcher" if method.startswith(WORKER) else "-"
    if method.startswith(WORKER):
        return "-"
    if service == "batcher":
        return "router"
    return "feedback" if method == FEEDBACK else "generate"


def expected(service: str, method: str, scopes: tuple[str, ...], refusal: str) -> str:
    scope = needed(service, method)
    if scope == "-":
        return "UNIMPLEMENTED"
    return "ok" if not scope or scope in scopes else refusal


def test_every_rpc_of_headrace_is_called() -> None:
    """So that a new one is not forgotten."""
    modules = [import_module(f"headrace.v1.{found.name}") for found in pkgutil.iter_modules(v1.__path__)]
    services = [
        service
        for module in modules
        if module.__name__.endswith("_pb2")
        for service in module.DESCRIPTOR.services_by_name.values()
    ]

    assert {rpc for rpc in RPCS if rpc.startswith("/headrace.")} == {
        f"/{service.full_name}/{method.name}" for service in services for method in service.methods
    }


@pytest.mark.parametrize("service", ["router", "batcher", "worker"])
@pytest.mark.parametrize("caller", SCOPES)
async def test_a_caller_may_call_what_its_scopes_permit(
    mesh: Mesh, callers: Callers, service: str, caller: str
) -> None:
    seen = await verdicts(port_of(mesh, service), bearer(callers.tokens[caller]))

    assert seen == {rpc: expected(service, rpc, SCOPES[caller], "FORBIDDEN") for rpc in RPCS} | {
        # A batcher makes no routing decision.
        rpc: "UNIMPLEMENTED"
        for rpc in (FEEDBACK, "/headrace.v1.RoutingService/Explain")
        if service == "batcher" and caller == "router"
    }


@pytest.mark.parametrize("service", ["router", "batcher", "worker"])
async def test_wrong_credentials_are_refused_even_where_anonymous_callers_are_served(
    mesh: Mesh, service: str
) -> None:
    seen = await verdicts(port_of(mesh, service), bearer("hr_wrong"))

    assert seen == {rpc: expected(service, rpc, (), "CREDENTIALS_INVALID") for rpc in RPCS}


@pytest.mark.parametrize(
    ("service", "scopes"), [("router", ()), ("batcher", ("router",)), ("worker", ("batcher",))]
)
async def test_a_caller_without_credentials_may_do_what_anonymous_ones_may(
    mesh: Mesh, service: str, scopes: tuple[str, ...]
) -> None:
    seen = await verdicts(port_of(mesh, service))

    wanted = {rpc: expected(service, rpc, scopes, "CREDENTIALS_REQUIRED") for rpc in RPCS}
    if service == "batcher":
        wanted |= dict.fromkeys((FEEDBACK, "/headrace.v1.RoutingService/Explain"), "UNIMPLEMENTED")
    assert seen == wanted


async def test_a_server_beyond_loopback_without_credentials_serves_health_only(mesh: Mesh) -> None:
    batcher = f"127.0.0.1:{port_of(mesh, 'batcher')}"
    async with running_router(host="0.0.0.0", tiers=f"only={batcher}") as port:
        seen = await verdicts(port)

    assert {rpc for rpc, found in seen.items() if found == "ok"} == {
        rpc for rpc in RPCS if rpc.startswith(HEALTH)
    }
    assert {found for rpc, found in seen.items() if not rpc.startswith((HEALTH, WORKER, QUOTAS))} == {
        "CREDENTIALS_REQUIRED"
    }


async def test_reflection_can_be_opened_to_all_callers_that_are_served(mesh: Mesh, callers: Callers) -> None:
    batcher = f"127.0.0.1:{port_of(mesh, 'batcher')}"
    settings = {"auth_tokens": callers.path, "auth_reflection": "open"}
    async with running_router(tiers=f"only={batcher}", **settings) as port:
        seen = await verdicts(port, bearer(callers.tokens["rater"]))
        without = await verdicts(port)

    reflection = [rpc for rpc in RPCS if "reflection" in rpc]
    assert [seen[rpc] for rpc in reflection] == ["ok", "ok"]
    assert [without[rpc] for rpc in reflection] == ["CREDENTIALS_REQUIRED"] * 2
    assert seen["/grpc.channelz.v1.Channelz/GetServers"] == "FORBIDDEN"


async def test_the_error_names_the_missing_scope_and_not_the_token(mesh: Mesh, callers: Callers) -> None:
    async with open_channel(f"127.0.0.1:{mesh.port}") as channel:
        error = await verdict(
            channel, "/headrace.v1.AdminService/Inspect", metadata=bearer(callers.tokens["search"])
        )

    assert isinstance(error, errors.Forbidden)
    assert error.fields["scope"] == "admin"
    assert "search" in error.message
    assert callers.tokens["search"] not in f"{error.message} {error.fields}"


@pytest.mark.parametrize(
    "metadata",
    [
        [("authorization", "Basic dXNlcjpwYXNz")],
        [("authorization", "Bearer")],
        [("authorization", "Bearer ")],
        [("authorization", "Bearer a b")],
        [("authorization", "Bearer " + "x" * (MAX_TOKEN + 1))],
        [("authorization", "")],
    ],
)
async def test_an_authorization_that_is_no_bearer_token_is_refused(
    mesh: Mesh, metadata: list[tuple[str, str]]
) -> None:
    async with open_channel(f"127.0.0.1:{mesh.port}") as channel:
        error = await verdict(channel, LIST_TIERS, metadata=metadata)

    assert isinstance(error, errors.CredentialsInvalid)


async def test_two_authorizations_are_refused_even_if_both_are_right(mesh: Mesh, callers: Callers) -> None:
    twice = bearer(callers.tokens["caller"]) * 2
    async with open_channel(f"127.0.0.1:{mesh.port}") as channel:
        error = await verdict(channel, LIST_TIERS, metadata=twice)

    assert isinstance(error, errors.CredentialsInvalid)


@pytest.mark.parametrize("multiplex", [False, True])
async def test_a_request_is_accounted_to_the_tenant_of_its_caller(
    mesh: Mesh, callers: Callers, count: Callable[..., float], multiplex: bool
) -> None:
    refused_before = count("headrace.tenant.requests", tenant="search", outcome="refused")
    options: dict[str, Any] = {"token": callers.tokens["search"], "multiplex": multiplex}
    async with connect(f"127.0.0.1:{mesh.port}", **options) as client:
        assert await seen_by_batcher(mesh, client, prompt("x")) == ("search", 3), "5 is above its limit"
        assert await seen_by_batcher(mesh, client, request(tenant="search", priority=9)) == ("search", 3)
        assert await seen_by_batcher(mesh, client, request(priority=1)) == ("search", 1)
        with pytest.raises(errors.Forbidden, match="'stranger'") as caught:
            await collect(client, request(tenant="stranger"))
        assert caught.value.field == "routing.tenant"
        assert count("headrace.tenant.requests", tenant="stranger") == 0, (
            "nobody can count against another one"
        )
        assert count("headrace.tenant.requests", tenant="search", outcome="refused") > refused_before
    async with connect(f"127.0.0.1:{mesh.port}", token=callers.tokens["gateway"]) as client:
        assert await seen_by_batcher(mesh, client, request(tenant="other", priority=9)) == ("other", 9)


async def test_explain_and_feedback_are_of_the_caller_s_tenant(mesh: Mesh, callers: Callers) -> None:
    async with (
        connect(f"127.0.0.1:{mesh.port}", token=callers.tokens["search"]) as client,
        connect(f"127.0.0.1:{mesh.port}", token=callers.tokens["rater"]) as rater,
    ):
        assert (await client.explain(chat("hi"))).tier == "only"
        with pytest.raises(errors.Forbidden):
            await client.explain(request(tenant="other"))
        request_id = (await collect(client, prompt("x"))).accepted.request_id
        with pytest.raises(errors.UnknownRequest):
            await rater.feedback(request_id, ok=True)
        with pytest.raises(errors.Forbidden, match="'search'"):
            await rater.feedback(request_id, ok=True, tenant="search")
        assert (await client.feedback(request_id, ok=True)).tier == "only"
        assert (await client.feedback(request_id, ok=True, tenant="search")).tier == "only"


@pytest.mark.parametrize(("caller", "seen"), [("search", False), ("gateway", True), ("operator", True)])
async def test_a_tenant_does_not_see_what_others_have_used(
    mesh: Mesh, callers: Callers, caller: str, seen: bool
) -> None:
    async with connect(f"127.0.0.1:{mesh.port}", token=callers.tokens[caller]) as client:
        listed = await client.list_tiers(timeout=PATIENCE)

    assert [tier.name for tier in listed.tiers] == ["only"]
    assert listed.HasField("bill") is seen


async def test_a_token_works_without_a_restart_and_is_withdrawn_without_one(
    mesh: Mesh, tmp_path: Path
) -> None:
    """Also on a stream that was opened while the token was valid."""
    live = Callers(tmp_path / "callers.toml")
    token = live.add("early")
    batcher = f"127.0.0.1:{port_of(mesh, 'batcher')}"
    async with (
        running_router(tiers=f"only={batcher}", auth_tokens=live.path) as port,
        connect(f"127.0.0.1:{port}", token=token, multiplex=True) as early,
    ):
        assert (await collect(early, prompt("one"))).text == "one"
        live.path.write_text("")
        late_token = live.add("late")
        async with connect(f"127.0.0.1:{port}", token=late_token, multiplex=True) as late:
            async with asyncio.timeout(PATIENCE):
                while await refused(late):
                    await asyncio.sleep(0.05)
        with pytest.raises(errors.CredentialsInvalid):
            await collect(early, prompt("two"))


async def test_jwts_are_accepted_and_end_with_the_key_that_signed_them(mesh: Mesh, tmp_path: Path) -> None:
    """Also on a stream that was opened before."""
    key, next_key = SigningKey("one"), SigningKey("two")
    path = tmp_path / "jwks.json"
    path.write_bytes(jwks(key))
    settings = {"auth_jwks": str(path), "auth_issuer": ISSUER, "auth_audience": AUDIENCE}
    batcher = f"127.0.0.1:{port_of(mesh, 'batcher')}"
    async with (
        running_router(tiers=f"only={batcher}", **settings) as port,
        connect(f"127.0.0.1:{port}", token=key.token(tenant="jwt"), multiplex=True) as client,
    ):
        assert await seen_by_batcher(mesh, client, request(priority=9)) == ("jwt", 5)
        async with open_channel(f"127.0.0.1:{port}") as channel:
            for token, reason in (
                (key.token(aud="other"), "CREDENTIALS_INVALID"),
                (next_key.token(), "CREDENTIALS_INVALID"),
                ("hr_opaque", "CREDENTIALS_INVALID"),
                (key.token(scope="openid"), "FORBIDDEN"),
            ):
                error = await verdict(channel, LIST_TIERS, metadata=bearer(token))
                assert error is not None
                assert error.reason == reason
        path.write_bytes(jwks(next_key))
        async with asyncio.timeout(PATIENCE):
            while not await refused(client):
                await asyncio.sleep(0.05)


async def test_a_client_sends_its_new_token_on_an_open_stream(mesh: Mesh, tmp_path: Path) -> None:
    live = Callers(tmp_path / "callers.toml")
    file = tmp_path / "token"
    file.write_text(live.add("first") + "\n")
    batcher = f"127.0.0.1:{port_of(mesh, 'batcher')}"
    async with (
        running_router(tiers=f"only={batcher}", auth_tokens=live.path) as port,
        connect(f"127.0.0.1:{port}", token_file=file, multiplex=True) as client,
    ):
        assert (await collect(client, prompt("one"))).text == "one"
        live.path.write_text("")
        file.write_text(live.add("second") + "\n")
        async with asyncio.timeout(PATIENCE):
            while await seen_or_refused(mesh, client) != "second":
                await asyncio.sleep(0.05)


async def test_a_stream_may_carry_the_requests_of_several_callers(mesh: Mesh, callers: Callers) -> None:
    """As a gateway's does, which passes on its callers' tokens."""
    async with connect(f"127.0.0.1:{mesh.port}", token=callers.tokens["caller"], multiplex=True) as client:
        theirs = dict(bearer(callers.tokens["search"]))
        assert await seen_by_batcher(mesh, client, prompt("x"), theirs) == ("search", 3)
        assert await seen_by_batcher(mesh, client, prompt("x")) == ("caller", 5)
        with pytest.raises(errors.CredentialsInvalid):
            await seen_by_batcher(mesh, client, prompt("x"), {"authorization": "Bearer wrong"})


async def test_credentials_of_a_request_on_a_stream_count_in_any_spelling(
    mesh: Mesh, callers: Callers
) -> None:
    """Else a caller whose key has upper-case letters would act as the owner of the stream."""
    hello = wire.MultiplexHello(caller_id="test", epoch=1)
    metadata = {"Authorization": "Bearer wrong"}
    opened = wire.OpenRequest(handle=1, request=prompt("x"), metadata=metadata)
    async with open_channel(f"127.0.0.1:{mesh.port}") as channel:
        stream: Any = GenerationServiceStub(channel).Multiplex(metadata=bearer(callers.tokens["caller"]))
        await stream.write(wire.MultiplexRequest(hello=hello, open=[opened]))
        events: list[wire.MultiplexEvent] = []
        async with asyncio.timeout(PATIENCE):
            while not events:
                events += (await stream.read()).events
        stream.cancel()

    assert isinstance(statuses.from_status(events[0].error), errors.CredentialsInvalid)


@pytest.mark.parametrize("multiplex", [False, True])
async def test_a_request_with_wrong_credentials_is_counted_as_refused(
    mesh: Mesh, callers: Callers, count: Callable[..., float], multiplex: bool
) -> None:
    wrong = {"authorization": "Bearer wrong"}
    before = count("headrace.requests.refused", error="CREDENTIALS_INVALID")
    async with connect(
        f"127.0.0.1:{mesh.port}", token=callers.tokens["caller"], multiplex=multiplex
    ) as client:
        with pytest.raises(errors.CredentialsInvalid):
            await seen_by_batcher(mesh, client, prompt("x"), wrong)

    assert count("headrace.requests.refused", error="CREDENTIALS_INVALID") == before + 1


async def test_a_token_is_not_sent_to_another_machine_without_tls() -> None:
    for options in ({"token": "secret"}, {"token": "secret", "multiplex": True}):
        with pytest.raises(BadToken, match="use TLS") as caught:
            async with connect("router.example:50051", **options):
                pass
        assert "secret" not in str(caught.value)
    async with connect("router.example:50051", token="secret", plaintext_token=True):
        pass
    async with connect("127.0.0.1:1", token="secret"):
        pass


def request(*, tenant: str = "", priority: int | None = None) -> pb.GenerateRequest:
    made = prompt("x")
    made.routing.tenant = tenant
    if priority is not None:
        made.routing.priority = priority
    return made


@asynccontextmanager
async def running_router(**settings: Any) -> AsyncGenerator[int, None]:
    """Run a router; return its port when it is ready."""
    async with router(
        RouterSettings(**{"port": 0, "drain_seconds": 2.0, "poll_seconds": 0.1, **settings})
    ) as running:
        await eventually(lambda: running.health.ready)
        yield running.port


async def seen_by_batcher(
    mesh: Mesh, client: Client, asked: pb.GenerateRequest, metadata: dict[str, str] | None = None
) -> tuple[str, int]:
    """Send a request, and return the tenant and the priority with which it reaches the batcher."""
    long = pb.GenerateRequest()
    long.CopyFrom(asked)
    long.sampling.max_tokens, long.sampling.ignore_eos = 1000, True
    live = mesh.tiers["only"].batcher.coalescer.live
    async with aclosing(client.generate(long, timeout=PATIENCE, metadata=metadata)) as stream:
        accepted = (await anext(stream)).accepted
        (job,) = (job for job in live if job.request_id == accepted.request_id)
        found = job.tenant, job.priority
    await eventually(lambda: not live)
    return found


async def seen_or_refused(mesh: Mesh, client: Client) -> str:
    try:
        return (await seen_by_batcher(mesh, client, prompt("x")))[0]
    except errors.CredentialsInvalid:
        return ""


async def refused(client: Client) -> bool:
    try:
        await collect(client, prompt("x"))
    except errors.CredentialsInvalid:
        return True
    return False
