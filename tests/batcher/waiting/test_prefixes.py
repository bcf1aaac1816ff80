"""A tenant shares cached prefixes with its own requests only, unless the operator shares them."""

from __future__ import annotations

import pytest

from headrace.batcher.waiting.prefixes import BLOCK, PrefixIndex, block_names, scope_of, scoped
from headrace.v1 import generation_pb2 as pb
from headrace.worker.engine.echo import EchoEngine
from tests.harness import collect, prompt
from tests.tier import Tier, running_tier

SECRET = "the merger of Aldebaran and Betelgeuse closes on Friday at noon, for 4.2 billion" * 3


async def cached(tier: Tier, text: str, tenant: str) -> int:
    asked: pb.GenerateRequest = prompt(text, max_tokens=4)
    asked.routing.tenant = tenant
    return (await collect(tier.client, asked)).finish.usage.cached_tokens


@pytest.mark.parametrize(("first", "second"), [("a", "b"), ("a", ""), ("", "b"), ("a", "a ")])
async def test_a_tenant_cannot_probe_what_another_one_has_asked(first: str, second: str) -> None:
    async with running_tier([EchoEngine()]) as tier:
        assert await cached(tier, SECRET, first) == 0
        assert await cached(tier, SECRET[:100] + "?" * 100, second) == 0, "a guess that is half right"
        assert await cached(tier, SECRET, first) > 0, "its own prompt is cached"
        assert await cached(tier, SECRET, second) == 96, "only its own guess, in blocks of 16"


async def test_tenants_share_prefixes_if_the_operator_enables_it() -> None:
    async with running_tier([EchoEngine()], share_prefixes=True) as tier:
        assert await cached(tier, SECRET, "a") == 0
        assert await cached(tier, SECRET, "b") > 0


def test_no_worker_is_preferred_for_the_cached_prefixes_of_another_tenant() -> None:
    names, prefixes = block_names(range(4 * BLOCK)), PrefixIndex()
    own, other = (scoped(names, scope_of(tenant)) for tenant in ("a", "b"))
    prefixes.expect(own, "worker")

    assert prefixes.cached_tokens(own, "worker") == 3 * BLOCK
    assert prefixes.cached_tokens(other, "worker") == prefixes.cached_tokens(names, "worker") == 0


def test_a_scope_hides_the_tenants_name_and_is_the_same_at_every_batcher() -> None:
    assert scope_of("acme") == scope_of("acme") != scope_of("acme2")
    assert b"acme" not in scope_of("acme")
    assert scope_of("") == b""
