"""The processes of a mesh report what happened, in the same words."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass

import pytest

from headrace import errors
from headrace.cli.launch.mesh import MeshSpec, reserved_ports
from headrace.cli.launch.mesh import mesh as processes
from headrace.client import Client, chat, connect
from headrace.metrics.catalogue import METRICS
from headrace.runtime.serving.bind_check import bind_error
from headrace.v1 import generation_pb2 as pb
from headrace.worker.engine.echo import EchoEngine
from tests.harness import PATIENCE, collect, eventually, prompt, running_mesh
from tests.scraping import Scrape, scrape

# The label that tells the services apart, and those of Prometheus' text format.
OTHER_LABELS = {"service_name", "le"}


def to_no_tier() -> pb.GenerateRequest:
    request = prompt("x")
    request.routing.tier = "none"
    return request


@dataclass(frozen=True)
class Scraped:
    """A mesh of processes with endpoints."""

    client: Client
    ports: Mapping[str, int]

    async def scrape(self, name: str) -> Scrape:
        return await asyncio.to_thread(scrape, self.ports[name])


@pytest.fixture(scope="module")
async def scraped(tmp_path_factory: pytest.TempPathFactory) -> AsyncGenerator[Scraped, None]:
    folder = tmp_path_factory.mktemp("metrics")
    with reserved_ports(1) as (first,):
        while any(bind_error("127.0.0.1", first + place) for place in range(8)):
            first += 8
    spec = MeshSpec(
        cache=folder,
        log_dir=folder / "logs",
        fake=True,
        fake_step_seconds=0.001,
        processes=1,
        metrics_port=first,
    )
    async with processes(spec) as running, connect(running.address) as client:
        ports = {
            process.name: int(process.environment["HEADRACE_METRICS_PORT"]) for process in running.processes
        }
        yield Scraped(client, ports)


async def test_every_process_reports_its_part_of_a_request(scraped: Scraped) -> None:
    request = chat("hello " * 10, max_tokens=20)
    request.routing.tier, request.routing.tenant = "small", "acme"
    tier = {"headrace_tier": "small", "gen_ai_request_model": "echo"}
    ended = {**tier, "headrace_outcome": "ok", "headrace_finish_reason": "length"}
    conventional = {**tier, "gen_ai_operation_name": "chat", "gen_ai_provider_name": "headrace"}
    scored = {"headrace_tier": "small", "headrace_route_cause": "score"}
    counted: list[tuple[str, str, dict[str, str], float]] = []
    for process in ("router", "batcher-small"):
        counted += [
            (process, "headrace_requests_total", ended, 1),
            (process, "headrace_tokens_delivered_total", tier, 20),
            (process, "gen_ai_server_request_duration_seconds_count", conventional, 1),
            (process, "gen_ai_server_time_to_first_token_seconds_count", conventional, 1),
            (process, "rpc_server_call_duration_seconds_count", {"rpc_status_code": "OK"}, 1),
        ]
    counted += [
        ("router", "rpc_client_call_duration_seconds_count", {"rpc_system_name": "grpc"}, 1),
        ("router", "headrace_routed_total", scored, 1),
        ("router", "headrace_tenant_requests_total", {"headrace_tenant": "acme"}, 1),
        ("router", "headrace_tenant_tokens_total", {"headrace_token_kind": "completion"}, 20),
        ("batcher-small", "headrace_batch_size_count", {"headrace_tier": "small"}, 1),
        ("worker-small", "headrace_tokens_generated_total", {"headrace_tier": "small"}, 20),
        ("worker-small", "headrace_sequences_ended_total", {"headrace_finish_reason": "length"}, 1),
        ("worker-large", "headrace_tokens_generated_total", {}, 0),
    ]

    async def values() -> list[float]:
        now = {name: await scraped.scrape(name) for name in scraped.ports}
        return [now[process].value(name, **labels) for process, name, labels, _ in counted]

    before = await values()
    wanted = [value + grown for value, (_, _, _, grown) in zip(before, counted, strict=True)]
    answer = await collect(scraped.client, request)

    assert answer.tokens == 20
    # A process counts a call after it sent its last message.
    patience = asyncio.get_running_loop().time() + PATIENCE
    while (now := await values()) != wanted and asyncio.get_running_loop().time() < patience:
        await asyncio.sleep(0.05)
    assert now == wanted


async def test_the_processes_and_their_peers_are_counted(scraped: Scraped) -> None:
    router, batcher = await scraped.scrape("router"), await scraped.scrape("batcher-large")

    assert router.value("headrace_batchers", headrace_tier="large", headrace_state="ready") == 1
    assert router.value("headrace_batchers", headrace_state="not_ready") == 0
    assert batcher.value("headrace_workers", headrace_tier="large", headrace_state="ready") == 1
    for name in scraped.ports:
        process = await scraped.scrape(name)
        assert process.value("target_info", service_name=f"headrace-{name.partition('-')[0]}") == 1
        assert process.value("process_cpu_time_seconds_total") > 0


async def test_a_name_has_the_same_labels_from_each_service_and_only_declared_ones(scraped: Scraped) -> None:
    await collect(scraped.client, chat("hello", max_tokens=20))
    with pytest.raises(errors.UnknownTier):
        await collect(scraped.client, to_no_tier())
    declared = {}
    for metric in METRICS:
        labels = {name.replace(".", "_") for name in metric.attribute_names}
        for suffix in ("_bucket", "_sum", "_count") if metric.kind == "histogram" else ("",):
            declared[metric.prometheus_name + suffix] = labels, metric.services

    for name in scraped.ports:
        for series, found in (await scraped.scrape(name)).series.items():
            if series == "target_info":
                continue
            labels, services = declared[series]
            assert name.partition("-")[0] in services
            for own, _ in found:
                assert set(own) - OTHER_LABELS <= labels


@pytest.mark.parametrize(
    ("process", "name", "labels"),
    [
        ("router", "headrace_failovers_total", {"error_type": "BATCHER_LOST"}),
        ("router", "headrace_requests_refused_total", {"error_type": "TENANT_QUOTA"}),
        ("batcher-small", "headrace_failovers_total", {"error_type": "WORKER_LOST"}),
        ("batcher-small", "headrace_requests_refused_total", {"error_type": "SHED"}),
        ("worker-small", "headrace_sequences_ended_total", {"headrace_outcome": "failed"}),
    ],
)
async def test_rare_events_have_a_series_before_the_first_one(
    scraped: Scraped, process: str, name: str, labels: dict[str, str]
) -> None:
    found = (await scraped.scrape(process)).series[name]

    assert next(value for own, value in found if labels.items() <= own.items()) == 0


async def test_a_mistake_of_the_caller_is_no_failure(count: Callable[..., float]) -> None:
    invalid = count("headrace.requests", outcome="invalid", error="UNKNOWN_TIER")
    failed = count("headrace.requests", outcome="failed")
    async with running_mesh() as mesh:
        with pytest.raises(errors.UnknownTier):
            await collect(mesh.client, to_no_tier())

    await eventually(
        lambda: count("headrace.requests", outcome="invalid", error="UNKNOWN_TIER") == invalid + 1
    )
    assert count("headrace.requests", outcome="failed") == failed


async def test_tokens_after_a_stop_sequence_are_wasted(count: Callable[..., float]) -> None:
    """The worker does not know stop sequences, so it continues until it is cancelled."""
    before = count("headrace.tokens.wasted", cause="over_generation")
    async with running_mesh(engine=lambda: EchoEngine(step_seconds=0.0001)) as mesh:
        for _ in range(20):
            await collect(mesh.client, prompt("abc" * 100, max_tokens=300, stop=["b"]))
            if count("headrace.tokens.wasted", cause="over_generation") > before:
                return
    pytest.fail("the worker generated nothing in excess")
