"""Prometheus and a collector, both real, observe a mesh of real processes.

Prometheus (Debian's) scrapes every process and evaluates the queries of dashboards, alerts and autoscalers.
rotel receives the spans over OTLP and sends them on to a sink.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
import urllib.parse
import urllib.request
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from headrace import errors
from headrace.cli.demo.otlp_receiver import Receiver, Span, is_complete, otlp_receiver
from headrace.cli.launch.mesh import MeshSpec, mesh, reserved_ports
from headrace.client import Client, chat, connect
from headrace.runtime.serving.bind_check import bind_error
from tests.deploy import tools
from tests.deploy.queries import RULES, all_queries
from tests.harness import PATIENCE, collect

HOST = "127.0.0.1"
PROCESSES = 6  # a gateway, a router, and a batcher and a worker of each of two tiers
ROUNDS, PER_ROUND = 3, 4
QUOTAS = "[tenants.greedy]\nrequests_per_minute = 1\n"
SILENT = {
    "HeadraceTelemetrySilent": "all services have metrics",
    "HeadraceGatewayErrorRateHigh": "no request over HTTP failed",
    "HeadraceDeadlinesMissed": "no request passed its deadline",
    "service: Drafts A": "no draft was checked",
    "share of HTTP requests to upstreams that were rejected for their number": "it has no upstream",
}
# They depend on how busy this machine is.
TIMES = {"HeadraceTimeToFirstTokenHigh", "HeadraceQueueWaitLong", "HeadraceEventLoopLag"}


@dataclass(frozen=True)
class Observed:
    """A mesh that has answered requests, and its observers."""

    prometheus: str  # its URL
    sink: Receiver  # behind rotel

    async def api(self, path: str, **parameters: str) -> Any:
        """Return the data of a call of Prometheus' API."""
        url = f"{self.prometheus}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        return json.loads(await asyncio.to_thread(get, url))["data"]

    async def values(self, query: str) -> list[float]:
        """Return the current values of a query."""
        data = await self.api("query", query=query)
        return [float(series["value"][1]) for series in data["result"]]

    async def becomes(self, query: str, value: float) -> None:
        """Wait until a query has one value."""
        async with asyncio.timeout(PATIENCE):
            while await self.values(query) != [value]:
                await asyncio.sleep(0.2)


def get(url: str) -> str:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(url, timeout=30) as response:
        return str(response.read().decode())


@asynccontextmanager
async def program(*command: str | Path, log: Path) -> AsyncGenerator[None, None]:
    """Run a program while the block runs."""
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            *map(str, command), stdout=output, stderr=asyncio.subprocess.STDOUT
        )
    try:
        yield
        assert process.returncode is None, f"see {log}"
    finally:
        if process.returncode is None:
            process.terminate()
        await asyncio.wait_for(process.wait(), PATIENCE)


def free_metrics_ports() -> int:
    """Return the first of as many free ports as the mesh has processes."""
    with reserved_ports(1) as (first,):
        pass
    while any(bind_error(HOST, first + place) for place in range(PROCESSES)):
        first += PROCESSES
    return first


def write_configuration(folder: Path, ports: Sequence[int]) -> Path:
    """Write Prometheus' configuration, with the rules of the component."""
    (folder / "rules.yaml").write_text(yaml.safe_dump(yaml.safe_load(RULES.read_text())["spec"]))
    configuration = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": ["rules.yaml"],
        "scrape_configs": [
            {"job_name": "headrace", "static_configs": [{"targets": [f"{HOST}:{port}" for port in ports]}]}
        ],
    }
    file = folder / "prometheus.yaml"
    file.write_text(yaml.safe_dump(configuration))
    return file


async def send(client: Client, tier: str) -> None:
    request = chat("hello " * 10, max_tokens=20)
    request.routing.tier, request.routing.tenant = tier, "acme"
    await collect(client, request)


def send_by_http(gateway: str) -> None:
    """Stream an answer from the gateway."""
    message = {"role": "user", "content": "hello " * 10}
    body = {"model": "small", "messages": [message], "max_tokens": 20, "stream": True, "user": "webshop"}
    response = httpx.post(f"{gateway}/v1/chat/completions", json=body, timeout=PATIENCE, trust_env=False)
    assert response.text.endswith("data: [DONE]\n\n"), response.text


async def refused(client: Client) -> None:
    """Exceed the limit of a tenant."""
    request = chat("hello", max_tokens=1)
    request.routing.tenant = "greedy"
    with pytest.raises(errors.TenantQuota):
        for _ in range(3):
            await collect(client, request)


@pytest.fixture(scope="module")
async def observed(tmp_path_factory: pytest.TempPathFactory) -> AsyncGenerator[Observed, None]:
    prometheus, rotel = tools.need("prometheus"), tools.need("rotel")
    folder = tmp_path_factory.mktemp("observed")
    (folder / "quotas.toml").write_text(QUOTAS)
    first = free_metrics_ports()
    configuration = write_configuration(folder, range(first, first + PROCESSES))
    with reserved_ports(3) as found:
        grpc_port, http_port, api_port = found
    async with otlp_receiver() as sink:
        collector = f"http://{HOST}:{grpc_port}"
        spec = MeshSpec(
            cache=folder,
            log_dir=folder / "logs",
            fake=True,
            fake_step_seconds=0.001,
            processes=1,
            gateway_port=0,
            metrics_port=first,
            environment={
                **{
                    name: collector if name.endswith("_ENDPOINT") else value
                    for name, value in sink.environment.items()
                },
                "HEADRACE_TRACE_CONTEXT": "ignore",  # the spans of this process are not exported
                "HEADRACE_PRICES": "small=1/2,large=10/20",
                "HEADRACE_QUOTAS": str(folder / "quotas.toml"),
            },
        )
        collecting = program(
            *(rotel, "start", "--exporter", "otlp", "--otlp-exporter-endpoint", sink.endpoint),
            *("--otlp-exporter-protocol", "grpc", "--batch-timeout", "200ms"),
            *("--otlp-grpc-endpoint", f"{HOST}:{grpc_port}", "--otlp-http-endpoint", f"{HOST}:{http_port}"),
            log=folder / "rotel.log",
        )
        scraping = program(
            *(prometheus, f"--config.file={configuration}", f"--storage.tsdb.path={folder / 'data'}"),
            f"--web.listen-address={HOST}:{api_port}",
            log=folder / "prometheus.log",
        )
        async with collecting, mesh(spec) as running, scraping, connect(running.address) as client:
            seen = Observed(f"http://{HOST}:{api_port}", sink)
            await until_ready(seen)
            # A rate needs a series that grows after it was scraped.
            for done in range(1, ROUNDS + 1):
                for number in range(PER_ROUND):
                    await send(client, ("small", "large")[number % 2])
                await refused(client)
                await asyncio.to_thread(send_by_http, running.gateway)
                await seen.becomes(
                    'sum(headrace_tenant_requests_total{headrace_tenant="acme",headrace_outcome="ok"})',
                    done * PER_ROUND,
                )
                # The gateway is scraped at another time than the router.
                await seen.becomes("sum(headrace_http_time_to_first_token_seconds_count)", done)
            yield seen


async def until_ready(observed: Observed) -> None:
    """Wait until Prometheus has scraped every process."""
    async with asyncio.timeout(PATIENCE):
        while True:
            try:
                if await observed.values('sum(up{job="headrace"})') == [PROCESSES]:
                    return
            except OSError:  # it starts
                pass
            await asyncio.sleep(0.2)


def left_side(query: str) -> str:
    """Return a query with the variables of a dashboard or component filled in, and without thresholds."""
    for variable, value in {
        "$namespace": ".*",
        "$tier": ".*",
        "$__rate_interval": "2m",
        '"TIER"': '"small"',
    }.items():
        query = query.replace(variable, value)
    return re.sub(r" (?:>|==) [\d.]+(?![\w.])", "", query)


async def test_every_query_of_dashboards_alerts_and_autoscalers_has_a_value(
    observed: Observed,
) -> None:
    """Alerts are asked for the value that they compare; what has none is listed with its reason."""
    empty, infinite = set(), set()
    for query in all_queries():
        values = await observed.values(left_side(query.text))
        if not values:
            empty.add(query.place)
        elif not all(map(math.isfinite, values)):
            infinite.add(query.place)

    assert empty == set(SILENT)
    assert infinite == set()


async def test_prometheus_evaluates_the_alerts_of_a_healthy_mesh(observed: Observed) -> None:
    rules = [rule for group in (await observed.api("rules"))["groups"] for rule in group["rules"]]

    assert {rule["health"] for rule in rules} <= {"ok", "unknown"}  # unknown: not evaluated so far
    assert {rule["name"] for rule in rules if rule["state"] != "inactive"} <= TIMES


async def test_figures_are_those_of_the_requests(observed: Observed) -> None:
    router = 'service_name="headrace-router"'
    (answers,) = await observed.values(f'sum(headrace_requests_total{{{router},headrace_outcome="ok"}})')
    (delivered,) = await observed.values(f"sum(headrace_tokens_delivered_total{{{router}}})")
    (billed,) = await observed.values('sum(headrace_tenant_tokens_total{headrace_token_kind="completion"})')
    (refusals,) = await observed.values('sum(headrace_quota_refusals_total{headrace_quota_mode="enforced"})')

    (over_http,) = await observed.values(
        'http_server_request_duration_seconds_count{http_response_status_code="200"}'
    )

    assert over_http == ROUNDS
    assert answers >= ROUNDS * (PER_ROUND + 1)  # and those of the greedy tenant within its limit
    assert delivered == billed > 0
    assert refusals >= ROUNDS


async def test_traces_are_whole_behind_the_collector(observed: Observed) -> None:
    sent = ROUNDS * PER_ROUND

    def whole(spans: Sequence[Span]) -> set[str]:
        services: dict[str, set[str]] = {}
        for span in spans:
            services.setdefault(span.trace_id, set()).add(span.service)
        everywhere = {"headrace-router", "headrace-batcher", "headrace-worker"}
        return {trace for trace, seen in services.items() if seen == everywhere and is_complete(spans, trace)}

    await observed.sink.wait_for(lambda spans: len(whole(spans)) >= sent, PATIENCE)

    links = {link for span in observed.sink.spans for link in span.links}
    assert links <= {span.span_id for span in observed.sink.spans}
