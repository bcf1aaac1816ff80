"""What routers and operators see of an upstream: health, limits, state, metrics and spans. Never the key."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import json_format
from grpc_health.v1 import health_pb2, health_pb2_grpc
from opentelemetry import trace
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from headrace import errors
from headrace.channel import open_channel
from headrace.runtime.serving.server import StartFailed
from headrace.runtime.telemetry.prometheus import Text
from headrace.v1 import admin_service_pb2 as admin
from headrace.v1 import tokenizer_service_pb2 as tokens
from headrace.v1.admin_service_pb2_grpc import AdminServiceStub
from tests.harness import eventually
from tests.upstream.fake import MODEL, Exchange, Script, fake_upstream, refuses
from tests.upstream.tier import UpstreamTier, answer_of, ask, running_upstream

KEY = "sk-secret-0123456789abcdef"


def lists(*models: dict[str, object]) -> Script:
    """Return a script that lists models."""
    return lambda exchange: exchange.reply(200, {"object": "list", "data": list(models)})


async def inspected(tier: UpstreamTier) -> admin.UpstreamState:
    """Return what the debug endpoint reports."""
    async with open_channel(f"127.0.0.1:{tier.running.server.port}") as channel:
        return (await AdminServiceStub(channel).Inspect(admin.InspectRequest())).upstream


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    """Return a file with a key."""
    path = tmp_path / "key"
    path.write_text(KEY + "\n")
    path.chmod(0o600)
    return path


async def test_the_tier_is_described_as_that_of_a_batcher() -> None:
    async with fake_upstream() as fake:
        fake.models = lists({"id": "other", "max_model_len": 1}, {"id": MODEL, "max_model_len": 8192})
        async with running_upstream(fake, max_concurrent=7, queue_limit=9, max_tokens=55) as tier:
            (listed,) = (await tier.client.list_tiers()).tiers

            assert (listed.name, listed.model, listed.healthy) == ("large", MODEL, True)
            assert listed.limits.context_length == 8192
            assert listed.limits.max_tokens == 55
            assert (listed.limits.max_running, listed.limits.queue_limit) == (7, 9)
            assert listed.load.workers == 1


async def test_a_context_length_that_is_set_counts_more_than_the_listed_one() -> None:
    async with fake_upstream() as fake:
        fake.models = lists({"id": MODEL, "max_model_len": 8192})
        async with running_upstream(fake, context_length=100) as tier:
            (listed,) = (await tier.client.list_tiers()).tiers

            assert listed.limits.context_length == 100


async def _page(exchange: Exchange) -> None:
    await exchange.reply(200, b"<html>", "text/html")


@pytest.mark.parametrize(
    "models",
    [refuses(404), refuses(405), refuses(429), _page, lists(), lists({"id": 7}, {"id": MODEL})],
    ids=["404", "405", "429", "a page", "no model", "odd entries"],
)
async def test_a_service_without_a_list_of_models_is_reachable(models: Script) -> None:
    async with fake_upstream() as fake:
        fake.models = models
        async with running_upstream(fake) as tier:
            assert (await answer_of(tier, ask())).text == "Hello you"


@pytest.mark.parametrize(
    ("models", "problem"),
    [
        (refuses(401), "--api-key-file"),
        (refuses(403), "--api-key-file"),
        (refuses(500), "HTTP 500"),
        (refuses(301, location="https://www.example.org/models"), "redirects to www.example.org"),
    ],
    ids=["401", "403", "500", "301"],
)
async def test_a_url_that_does_not_serve_is_reported_with_the_reason(models: Script, problem: str) -> None:
    async with fake_upstream() as fake:
        fake.models = models
        async with running_upstream(fake, ready=False) as tier:
            (url,) = tier.running.urls
            await eventually(lambda: "not checked" not in url.problem)
            (listed,) = (await tier.client.list_tiers()).tiers
            state = await inspected(tier)

            assert not listed.healthy
            assert problem in listed.unhealthy_reason
            assert fake.url in listed.unhealthy_reason
            assert problem in state.urls[0].problem
            with pytest.raises(errors.NoWorkers, match=problem):
                await answer_of(tier, ask())
            assert not fake.seen

            fake.models = refuses(404)
            await eventually(lambda: tier.running.server.health.ready)
            assert (await answer_of(tier, ask())).text == "Hello you"


async def test_a_request_that_succeeded_counts_more_than_a_check_that_failed() -> None:
    async with fake_upstream() as fake, running_upstream(fake, probe_seconds=0.05) as tier:
        (url,) = tier.running.urls
        await answer_of(tier, ask())
        checks = len(fake.checks)
        fake.models = refuses(500)
        await eventually(lambda: len(fake.checks) >= checks + 1)
        await answer_of(tier, ask())
        await eventually(lambda: url.problem)  # without further requests, the checks decide


async def test_readiness_follows_the_upstream() -> None:
    async with (
        fake_upstream() as fake,
        running_upstream(fake) as tier,
        open_channel(f"127.0.0.1:{tier.running.server.port}") as channel,
    ):
        stub: Any = health_pb2_grpc.HealthStub(channel)
        readiness = health_pb2.HealthCheckRequest(service="readiness")
        liveness = health_pb2.HealthCheckRequest(service="liveness")
        assert (await stub.Check(readiness)).status == health_pb2.HealthCheckResponse.SERVING
        fake.die()
        await eventually(lambda: not tier.running.server.health.ready)

        assert (await stub.Check(readiness)).status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert (await stub.Check(liveness)).status == health_pb2.HealthCheckResponse.SERVING
        await fake.listen()
        await eventually(lambda: tier.running.server.health.ready)


async def test_what_an_upstream_does_not_have_is_unimplemented() -> None:
    async with fake_upstream() as fake, running_upstream(fake) as tier:
        with pytest.raises(errors.Unimplemented, match="router"):
            await tier.client.explain(ask())
        with pytest.raises(errors.Unimplemented, match="outside of the mesh"):
            await tier.client.tokenize(tokens.TokenizeRequest(prompt="hi"))
        with pytest.raises(errors.Unimplemented):
            await tier.client.feedback("id", ok=True)


async def test_the_debug_endpoint_shows_requests_and_urls() -> None:
    async with AsyncExitStack() as stack:
        first, second = [await stack.enter_async_context(fake_upstream()) for _ in range(2)]
        tier = await stack.enter_async_context(running_upstream(first, second))
        await eventually(lambda: len(tier.running.urls.usable(time.monotonic())) == 2)

        async def busy(exchange: Exchange) -> None:
            await exchange.reply(429, {"error": {"message": "busy"}}, retry_after="60")

        first.usual = busy
        await answer_of(tier, ask())
        state = await inspected(tier)

        assert (state.tier, state.model, state.in_flight) == ("large", MODEL, 0)
        assert [url.url for url in state.urls] == [first.url, second.url]
        assert [url.ready for url in state.urls] == [True, True]
        assert [url.breaker for url in state.urls] == ["closed", "closed"]
        assert 0 < state.urls[0].blocked.seconds <= 60


async def test_an_attempt_is_a_span_and_counted_by_its_status(
    spans: InMemorySpanExporter, count: Callable[..., float]
) -> None:
    labels = {"http_method": "POST", "server": "127.0.0.1"}
    name = "http.client.request.duration"
    good, bad = count(name, http_status="200", **labels), count(name, http_status="500", **labels)
    async with fake_upstream() as fake, running_upstream(fake, retries=1) as tier:
        fake.scripts.append(refuses(500))
        await answer_of(tier, ask())

        found = [span for span in spans.get_finished_spans() if span.name == f"chat {MODEL}"]
        failed, answered = (dict(span.attributes or {}) for span in found)
        assert [span.kind for span in found] == [trace.SpanKind.CLIENT] * 2
        assert failed["http.response.status_code"] == 500
        assert failed["error.type"] == "NO_WORKERS"
        assert answered["http.response.status_code"] == 200
        assert "error.type" not in answered
        assert answered["gen_ai.request.model"] == MODEL
        assert (answered["server.address"], answered["server.port"]) == ("127.0.0.1", fake.port)
        server = next(s for s in spans.get_finished_spans() if s.kind is trace.SpanKind.SERVER)
        assert all(span.parent and span.parent.span_id == server.context.span_id for span in found)
        assert count(name, http_status="200", **labels) == good + 1
        assert count(name, http_status="500", error="NO_WORKERS", **labels) == bad + 1
        assert count("headrace.upstream.urls", tier="large", state="ready") == 1
        assert count("headrace.upstream.time_to_first_byte", tier="large", server="127.0.0.1") >= 1


@pytest.mark.parametrize("sent", [False, True])
async def test_the_trace_context_is_sent_only_if_that_is_set(sent: bool, spans: InMemorySpanExporter) -> None:
    async with fake_upstream() as fake, running_upstream(fake, upstream_trace=sent) as tier:
        await answer_of(tier, ask())

        traceparent = fake.seen[0].headers.get("traceparent")
        (attempt,) = [span for span in spans.get_finished_spans() if span.name == f"chat {MODEL}"]
        expected = f"00-{attempt.context.trace_id:032x}-{attempt.context.span_id:016x}-"
        assert (traceparent or "")[:-2] == (expected if sent else "")


async def test_the_key_is_sent_and_replaced_when_its_file_changes(key_file: Path) -> None:
    async with fake_upstream() as fake, running_upstream(fake, api_key_file=key_file) as tier:
        await answer_of(tier, ask())
        assert fake.seen[0].headers["authorization"] == f"Bearer {KEY}"
        assert fake.checks[0].headers["authorization"] == f"Bearer {KEY}"

        new = key_file.with_suffix(".new")
        new.write_text("sk-new")
        os.replace(new, key_file)
        await eventually(lambda: fake.checks[-1].headers["authorization"] == "Bearer sk-new")
        await answer_of(tier, ask())

        assert fake.seen[-1].headers["authorization"] == "Bearer sk-new"


async def test_a_new_key_makes_a_rejected_one_good_at_once(key_file: Path) -> None:
    async def checks_key(exchange: Exchange) -> None:
        good = exchange.seen.headers.get("authorization") == "Bearer sk-new"
        await (lists({"id": MODEL}) if good else refuses(401))(exchange)

    async with fake_upstream() as fake:
        fake.models = checks_key
        async with running_upstream(fake, ready=False, api_key_file=key_file, probe_seconds=3600) as tier:
            await eventually(lambda: "rejects the key" in next(iter(tier.running.urls)).problem)
            await asyncio.to_thread(key_file.write_text, "sk-new")
            await eventually(lambda: tier.running.server.health.ready)


@pytest.mark.parametrize("content", ["", "two words", "ключ", "a\nb"])
async def test_a_file_without_a_key_stops_the_start_and_shows_nothing(content: str, tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text(content)

    with pytest.raises(StartFailed, match="--api-key-file") as raised:
        async with running_upstream("http://127.0.0.1:1/v1", api_key_file=path):
            pass

    assert not content or content not in str(raised.value)


async def test_a_key_that_others_may_read_and_plaintext_are_warned_about(
    key_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    await asyncio.to_thread(key_file.chmod, 0o644)
    async with running_upstream("http://model.invalid/v1", ready=False, api_key_file=key_file):
        pass

    messages = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert "every user of this machine may read the file of the key" in messages
    assert any("without TLS" in message for message in messages)


async def test_the_key_is_in_no_error_log_span_metric_or_state(
    key_file: Path, spans: InMemorySpanExporter, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever an upstream repeats of what it received."""
    caplog.set_level(logging.DEBUG)

    async def repeats(exchange: Exchange) -> None:
        received = dict(exchange.seen.headers)
        message = {"error": {"message": f"Incorrect key {KEY}", "type": KEY, "code": KEY, "param": KEY}}
        number = len(fake.seen) % 6
        if number == 0:
            await exchange.reply(401, {**message, **received})
        elif number == 1:
            await exchange.reply(500, json.dumps(received).encode(), "text/html")
        elif number == 2:
            await exchange.reply(429, message, **{"x_key": KEY, "retry_after": KEY})
        elif number == 3:
            await exchange.reply(400, message)
        elif number == 4:
            await exchange.stream(b"data: " + json.dumps(message).encode() + b"\n\n")
        else:
            await exchange.reply(302, message, location=f"http://u:{KEY}@elsewhere.example/?key={KEY}")

    async with fake_upstream() as fake, running_upstream(fake, api_key_file=key_file, retries=1) as tier:
        (url,) = tier.running.urls
        fake.usual = repeats
        failures = []
        for _ in range(12):
            with pytest.raises(errors.HeadraceError) as raised:
                await answer_of(tier, ask())
            failures.append(f"{raised.value!r} {raised.value.fields} {raised.value.field}")
        fake.models = repeats
        checked = len(fake.checks)
        await eventually(lambda: len(fake.checks) > checked + 2)
        state = await inspected(tier)
        (listed,) = (await tier.client.list_tiers()).tiers

        recorded = spans.get_finished_spans()
        seen = [
            *failures,
            *(f"{record.getMessage()} {vars(record)}" for record in caplog.records),
            *(f"{s.name} {s.attributes} {s.status.description} {s.events}" for s in recorded),
            Text({}, {}).current().decode(),
            json_format.MessageToJson(state),
            str(listed),
            repr(vars(url)),
            repr(tier.running),
        ]
        assert len(fake.seen) > 12
        assert [text for text in seen if KEY in text] == []


async def test_grpc_errors_of_an_upstream_have_their_details() -> None:
    async with fake_upstream() as fake, running_upstream(fake) as tier:
        fake.usual = refuses(429, retry_after="7")
        with pytest.raises(errors.Overloaded) as raised:
            await answer_of(tier, ask())

        assert raised.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert raised.value.retry_after == pytest.approx(7, rel=0.2)
