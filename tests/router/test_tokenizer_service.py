"""A router passes tokenizer calls on to a batcher of the tier or model that they name."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from headrace import errors
from headrace.client import Client, connect
from headrace.router.__main__ import router
from headrace.router.answering.pins import tiers_of
from headrace.router.settings import Settings
from headrace.router.state.tiers import Tier
from headrace.runtime.serving.server import serving
from headrace.v1 import tokenizer_service_pb2 as tokens_pb
from headrace.v1.generation_service_pb2_grpc import add_GenerationServiceServicer_to_server
from headrace.v1.routing_service_pb2_grpc import add_RoutingServiceServicer_to_server
from headrace.v1.tokenizer_service_pb2_grpc import (
    TokenizerServiceServicer,
    add_TokenizerServiceServicer_to_server,
)
from tests.harness import until_healthy
from tests.router.fake_batchers import FakeBatcher, serving_fake


class FakeTokenizer(FakeBatcher, TokenizerServiceServicer):
    """A fake batcher that counts characters, unless it fails.

    fails     raised in place of each response
    asked     the calls' choices of a tokenizer, and their metadata
    """

    def __init__(
        self, model: str = "echo", fails: errors.HeadraceError | None = None, **options: Any
    ) -> None:
        super().__init__(model=model, **options)
        self.fails = fails
        self.asked: list[tuple[str, str]] = []
        self.metadata: list[dict[str, Any]] = []

    async def Tokenize(self, request: tokens_pb.TokenizeRequest, context: Any) -> Any:
        raise errors.InvalidRequest("it only counts")

    async def Detokenize(self, request: tokens_pb.DetokenizeRequest, context: Any) -> Any:
        return tokens_pb.DetokenizeResponse(text=bytes(request.token_ids).decode())

    async def GetTokenizer(self, request: tokens_pb.GetTokenizerRequest, context: Any) -> Any:
        return tokens_pb.GetTokenizerResponse(chat_template=f"template of {self.model}")

    async def CountTokens(self, request: tokens_pb.CountTokensRequest, context: Any) -> Any:
        self.asked.append((request.tokenizer.tier, request.tokenizer.model))
        self.metadata.append(dict(context.invocation_metadata()))
        if self.fails is not None:
            raise self.fails
        used = tokens_pb.TokenizerUsed(tier=self.tier, model=self.model, context_length=9)
        return tokens_pb.CountTokensResponse(tokens=len(request.prompt), tokenizer=used)


@asynccontextmanager
async def serving_tokenizer(fake: FakeTokenizer) -> AsyncGenerator[str, None]:
    def register(server: grpc.aio.Server) -> None:
        add_GenerationServiceServicer_to_server(fake, server)
        add_RoutingServiceServicer_to_server(fake, server)
        add_TokenizerServiceServicer_to_server(fake, server)

    async with serving(register, (), host="127.0.0.1", port=0, drain_seconds=0, ready=lambda: True) as server:
        yield f"127.0.0.1:{server.port}"


@asynccontextmanager
async def routing(
    settings: dict[str, Any] | None = None, **tiers: FakeTokenizer | list[FakeTokenizer] | str
) -> AsyncGenerator[Client, None]:
    """Run a router in front of these batchers; a string is the address of a running server."""
    async with AsyncExitStack() as stack:
        targets = []
        for name, fakes in tiers.items():
            if isinstance(fakes, str):
                targets.append(f"{name}={fakes}")
                continue
            made = fakes if isinstance(fakes, list) else [fakes]
            addresses = [await stack.enter_async_context(serving_tokenizer(fake)) for fake in made]
            targets.append(f"{name}={'+'.join(addresses)}")
        given = {"drain_seconds": 0, "poll_seconds": 0.05, **(settings or {})}
        gate = await stack.enter_async_context(router(Settings(port=0, tiers=",".join(targets), **given)))
        client = await stack.enter_async_context(connect(f"127.0.0.1:{gate.port}", retries=0))
        await until_healthy(client)
        yield client


def count(tier: str = "", model: str = "") -> tokens_pb.CountTokensRequest:
    choice = tokens_pb.TokenizerChoice(tier=tier, model=model)
    return tokens_pb.CountTokensRequest(prompt="four", tokenizer=choice)


async def test_a_call_goes_to_the_tier_or_the_model_that_it_names() -> None:
    small, large, huge = FakeTokenizer("s", tier="own"), FakeTokenizer("l"), FakeTokenizer("l")
    async with routing(small=small, large=large, huge=huge) as client:
        used = [
            (await client.count_tokens(asked)).tokenizer
            for asked in (
                count("small"),
                count("huge"),
                count(model="s"),
                count(model="l"),
                count("huge", "l"),
            )
        ]
        choice = tokens_pb.TokenizerChoice(tier="large")
        text = await client.detokenize(tokens_pb.DetokenizeRequest(token_ids=[72, 105], tokenizer=choice))
        with pytest.raises(errors.InvalidRequest, match="it only counts"):
            await client.tokenize(tokens_pb.TokenizeRequest(prompt="x", tokenizer=choice))
        with pytest.raises(errors.UnknownTier, match="the tiers are small, large, huge") as no_tier:
            await client.count_tokens(count("medium"))
        with pytest.raises(errors.UnknownModel, match="models of small, large, huge are l, s") as no_model:
            await client.count_tokens(count(model="x"))
        with pytest.raises(errors.UnknownModel, match="models of small are s"):
            await client.count_tokens(count("small", "l"))
        with pytest.raises(
            errors.InvalidRequest, match=r"one of small, large, huge, or .* one of l, s"
        ) as unclear:
            await client.count_tokens(count())

    assert (text.text, text.tokenizer.tier) == ("Hi", "large")
    assert [(one.tier, one.model) for one in used] == [
        ("small", "s"),
        ("huge", "l"),
        ("small", "s"),
        ("large", "l"),
        ("huge", "l"),
    ]
    assert small.asked == [("", ""), ("", "s")], "the router's names of tiers are its own"
    assert no_tier.value.field == unclear.value.field == "tokenizer.tier"
    assert no_model.value.field == "tokenizer.model"


async def test_no_name_is_needed_with_one_tier_or_one_model() -> None:
    async with routing(only=FakeTokenizer("m")) as client:
        assert (await client.count_tokens(count())).tokens == 4
    async with routing(small=FakeTokenizer("m"), large=FakeTokenizer("m")) as client:
        assert (await client.count_tokens(count())).tokenizer.tier == "small"


@pytest.mark.parametrize(
    "failure",
    [
        errors.NoWorkers("none"),
        errors.Draining("stopping"),
        errors.Overloaded("full"),
        errors.Unimplemented("an older batcher"),
        errors.UnknownModel("being replaced"),
    ],
)
async def test_another_batcher_answers_if_one_cannot(failure: errors.HeadraceError) -> None:
    failing = [FakeTokenizer("m", fails=failure), FakeTokenizer("m", fails=failure)]
    works = FakeTokenizer("m")
    async with routing(tier=[failing[0], works], other=failing[1]) as client:
        for _ in range(30):  # a batcher is drawn at random for each
            assert (await client.count_tokens(count(model="m"))).tokens == 4
        with pytest.raises(type(failure)):
            await client.count_tokens(count("other"))

    assert len(works.asked) == 30
    assert failing[0].asked


async def test_a_tier_without_a_tokenizer_says_so() -> None:
    """As of a service outside of the mesh, whose server may not know the method at all."""
    outside = FakeBatcher(model="frontier", text_only=True)
    async with serving_fake(outside) as address, routing(small=FakeTokenizer("m"), large=address) as client:
        with pytest.raises(errors.Unimplemented, match="tier 'large' has no tokenizer"):
            await client.count_tokens(count("large"))
        assert (await client.count_tokens(count("small"))).tokens == 4


async def test_an_error_about_the_request_is_not_tried_elsewhere() -> None:
    fakes = [FakeTokenizer(fails=errors.InvalidRequest("the template refuses it", field="chat"))] * 2
    async with routing(tier=fakes) as client:
        with pytest.raises(errors.InvalidRequest, match="refuses it"):
            await client.count_tokens(count())
        with pytest.raises(errors.EmptyInput):
            await client.count_tokens(tokens_pb.CountTokensRequest(prompt=""))

    assert len(fakes[0].asked) == 1


async def test_a_tier_without_a_healthy_batcher_is_an_error_that_may_pass() -> None:
    fake = FakeTokenizer("m")
    async with routing(only=fake, other=FakeTokenizer("m")) as client:
        fake.healthy = False
        await until_healthy(client, False, True)
        with pytest.raises(errors.NoWorkers):
            await client.count_tokens(count("only"))
        assert (await client.count_tokens(count())).tokenizer.tier == "other"
    with pytest.raises(errors.NoWorkers, match="the model of a is not known yet"):
        tiers_of(tokens_pb.TokenizerChoice(model="m"), [Tier("a", [])])


async def test_a_router_behind_a_router_is_asked_by_model_and_its_tier_has_the_outer_name() -> None:
    small, large = FakeTokenizer("s"), FakeTokenizer("l")
    async with AsyncExitStack() as stack:
        addresses = [await stack.enter_async_context(serving_tokenizer(fake)) for fake in (small, large)]
        inner = await stack.enter_async_context(
            router(Settings(port=0, tiers=f"a={addresses[0]},b={addresses[1]}", drain_seconds=0))
        )
        client = await stack.enter_async_context(routing(outer=f"127.0.0.1:{inner.port}"))
        response = await client.count_tokens(count("outer", "l"))
        with pytest.raises(errors.InvalidRequest, match="one of a, b"):
            await client.count_tokens(count("outer"))
        with pytest.raises(errors.NoWorkers, match="has passed 5 routers"):
            await client.count_tokens(count("outer", "l"), metadata={"headrace-hops": "5"})

    assert (response.tokenizer.tier, response.tokenizer.model) == ("outer", "l")
    assert large.asked == [("", "l")]


async def test_a_call_counts_as_a_request_of_its_tenant_and_nothing_else(tmp_path: Path) -> None:
    quotas = tmp_path / "quotas.toml"
    quotas.write_text("[default]\nrequests_per_minute = 2\ntokens_per_minute = 1\n")
    async with routing({"quotas": quotas}, only=FakeTokenizer()) as client:
        for _ in range(2):
            await client.count_tokens(count())
        with pytest.raises(errors.TenantQuota) as refused:
            await client.count_tokens(count())

    assert refused.value.fields["limit"] == "requests_per_minute"


async def test_the_callers_metadata_is_sent_and_its_credentials_replace_the_clients() -> None:
    fake = FakeTokenizer()
    async with serving_tokenizer(fake) as address, connect(address, token="mine") as client:
        await client.count_tokens(count(), metadata={"authorization": "Bearer theirs", "x-a": "b"})
        await client.count_tokens(count())
        await client.list_tiers(metadata={"x-a": "b"})
        with pytest.raises(errors.InvalidRequest, match="cannot be sent"):
            await client.list_tiers(metadata={"X-A": "b"})

    assert fake.metadata[0]["authorization"] == "Bearer theirs"
    assert fake.metadata[0]["x-a"] == "b"
    assert fake.metadata[1]["authorization"] == "Bearer mine"


async def test_the_template_is_that_of_the_tier_that_is_named() -> None:
    async with routing(small=FakeTokenizer("s"), large=FakeTokenizer("l")) as client:
        choice = tokens_pb.TokenizerChoice(tier="large")
        response = await client.get_tokenizer(tokens_pb.GetTokenizerRequest(tokenizer=choice))

    assert response.chat_template == "template of l"
    assert response.tokenizer.tier == "large"
