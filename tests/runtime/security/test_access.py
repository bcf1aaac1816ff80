"""The table of scopes."""

from __future__ import annotations

import pytest

from headrace.runtime.security.access import required_scope


@pytest.mark.parametrize("service", ["router", "batcher", "worker"])
@pytest.mark.parametrize(
    "method",
    [
        "/headrace.v1.AdminService/Inspect",
        "/headrace.v1.AdminService/Later",
        "/headrace.v2.GenerationService/Generate",
        "/grpc.channelz.v1.Channelz/GetServers",
        "/grpc.health.v1.HealthAndMore/Check",
        "/other.Service/Method",
        "",
    ],
)
def test_what_the_table_does_not_list_is_for_administrators(service: str, method: str) -> None:
    assert required_scope(service, method) == "admin"  # type: ignore[arg-type]


def test_budgets_are_shared_between_routers_only() -> None:
    lease = "/headrace.v1.QuotaService/Lease"

    assert required_scope("router", lease) == "router"
    assert required_scope("batcher", lease) == "admin"
