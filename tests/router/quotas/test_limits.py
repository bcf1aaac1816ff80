"""The file of limits: which limits a tenant has, and what is said about a file that cannot be used."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest

from headrace.router.quotas.limits import BadQuotas, Limits, Rules

FILE = """
[default]
requests_per_minute = 60

[classes.gold]
requests_per_minute = 6000
tokens_per_minute = 2_000_000
cost_per_day = 20.5
max_priority = 7

[tenants.acme]
class = "gold"
concurrent_streams = 3

[tenants.""]
requests_per_minute = 5
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "quotas.toml"
    path.write_text(FILE)
    return path


def test_a_tenant_has_its_own_limits_or_those_of_its_class_or_the_default_ones(path: Path) -> None:
    rules = Rules(path)
    gold = Limits("gold", 6000, 2_000_000, math.inf, 20.5, 7)

    assert rules.limits("acme", "") == Limits("gold", 6000, 2_000_000, 3, 20.5, 7)
    assert rules.limits("acme", "bronze").concurrent_streams == 3, "the file knows the tenant"
    assert rules.limits("other", "gold") == gold
    assert rules.limits("other", "") == Limits("default", 60)
    assert rules.limits("other", "default") == Limits("default", 60)
    assert rules.limits("other", "unknown") == Limits("default", 60)
    assert rules.limits("", "").requests_per_minute == 5


def test_a_class_of_credentials_that_is_not_listed_is_reported_once(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Such as a misspelled one, whose tenants would have other limits than intended without a word."""
    rules = Rules(path)
    for tenant in ("one", "two"):
        assert rules.limits(tenant, "glod").requests_per_minute == 60
    rules.limits("one", "gold"), rules.limits("one", "")

    assert [record.__dict__["class"] for record in caplog.records] == ["glod"]


def test_json_has_the_same_names(tmp_path: Path) -> None:
    path = tmp_path / "quotas.json"
    path.write_text(json.dumps({"default": {"cost_per_day": 1}, "tenants": {"a": {"concurrent_streams": 0}}}))
    rules = Rules(path)

    assert rules.limits("a", "") == Limits(concurrent_streams=0, cost_per_day=1)
    assert rules.limit_cost


def test_without_a_file_nothing_is_limited() -> None:
    assert not Rules().limits("a", "").apply


def test_all_problems_of_a_file_are_listed_at_once(tmp_path: Path) -> None:
    path = tmp_path / "quotas.toml"
    path.write_text(
        """
        surprise = 1
        [default]
        requests_per_minute = -1
        max_priority = 10
        [classes.a]
        tokens_per_minute = "many"
        concurrent_streams = true
        rate = 3
        [classes.c]
        requests_per_minute = 0.5
        cost_per_day = 1e300
        [tenants.t]
        class = "b"
        [tenants.u]
        class = ["a"]
        """
    )
    with pytest.raises(BadQuotas) as caught:
        Rules(path)

    for problem in (
        "'surprise' is not",
        "default: requests_per_minute is '-1'",
        "default: max_priority is '10'",
        "classes.a: tokens_per_minute is",
        "classes.a: concurrent_streams is 'True'",
        "classes.a: 'rate' is not a limit",
        "classes.c: requests_per_minute is '0.5'",
        "classes.c: cost_per_day is",
        "tenants.t: there is no class 'b'",
        "tenants.u: there is no class",
    ):
        assert problem in str(caught.value)


@pytest.mark.parametrize("text", ["[default", "default = 3", "[tenants]\na = 1\n", "classes = []"])
def test_a_file_that_is_not_tables_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "quotas.toml"
    path.write_text(text)
    with pytest.raises(BadQuotas, match=r"quotas\.toml"):
        Rules(path)


def test_a_file_that_is_missing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadQuotas, match="cannot be read"):
        Rules(tmp_path / "none.toml")


def test_a_changed_file_is_read_again_and_a_bad_one_changes_nothing(path: Path) -> None:
    rules = Rules(path)
    assert not rules.refresh()

    path.write_text("[default]\nrequests_per_minute = 7\n")
    assert rules.refresh()
    assert rules.limits("acme", "").requests_per_minute == 7

    path.write_text("[default]\nrequests_per_minute = 'x'\n")
    assert not rules.refresh()
    assert rules.limits("acme", "").requests_per_minute == 7

    # As Kubernetes replaces a ConfigMap.
    other = path.with_name("next")
    other.write_text("[default]\nrequests_per_minute = 8\n")
    os.replace(other, path)
    assert rules.refresh()
    assert rules.limits("acme", "").requests_per_minute == 8
