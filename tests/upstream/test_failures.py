"""Before an answer begins, failures are retried and other URLs are used. Then they are typed errors."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack

import pytest

from headrace import errors
from headrace.cli.launch.mesh import reserved_ports
from headrace.upstream import asking
from tests.harness import eventually
from tests.upstream.fake import (
    DONE,
    ROLE,
    Exchange,
    Script,
    delta,
    event,
    fake_upstream,
    finish,
    refuses,
    says,
)
from tests.upstream.tier import answer_of, ask, running_upstream


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pause briefly between rounds."""
    monkeypatch.setattr(asking, "FIRST_PAUSE", 0.01)


async def _stalls(exchange: Exchange) -> None:
    await exchange.until_gone()


async def _stalls_after_the_role(exchange: Exchange) -> None:
    await exchange.head()
    await exchange.chunk(ROLE)
    await exchange.until_gone()


async def _dribbles_comments(exchange: Exchange) -> None:
    await exchange.head()
    while not exchange.gone:
        await exchange.chunk(b": working\n\n")
        await asyncio.sleep(0.01)


async def _resets(exchange: Exchange) -> None:
    exchange.reset()


async def _resets_after_the_headers(exchange: Exchange) -> None:
    await exchange.head()
    exchange.reset()


async def _sends_headers_without_end(exchange: Exchange) -> None:
    await exchange.send(b"HTTP/1.1 200 OK\r\n")
    while not exchange.gone:
        await exchange.send(b"x-filler: " + b"x" * 1000 + b"\r\n")
        await asyncio.sleep(0)


async def _sends_a_long_header(exchange: Exchange) -> None:
    await exchange.send(b"HTTP/1.1 200 OK\r\nx-long: " + b"x" * 100_000 + b"\r\n\r\n")


async def _sends_no_http(exchange: Exchange) -> None:
    await exchange.send(b"SSH-2.0-OpenSSH_9.2\r\n")
    exchange.close()


async def _page(exchange: Exchange) -> None:
    await exchange.reply(200, b"<html>Welcome!</html>", "text/html; charset=utf-8")


async def _huge_object(exchange: Exchange) -> None:
    await exchange.head(kind="application/json")
    while not exchange.gone:
        await exchange.chunk(b" " * 65536)


_REDIRECT = refuses(307, location="http://elsewhere.example/v1/chat/completions")

# What a URL does, the error that the caller gets, and a part of its message.
FAULTS: dict[str, tuple[Script, type[errors.HeadraceError], str]] = {
    "a 500": (refuses(500, "engine died"), errors.NoWorkers, "500"),
    "a 503": (refuses(503), errors.NoWorkers, "503"),
    "an HTML error page": (
        lambda exchange: exchange.reply(502, b"<html><h1>Bad gateway</h1></html>", "text/html"),
        errors.NoWorkers,
        "502",
    ),
    "a 429": (refuses(429, "slow down"), errors.Overloaded, "slow down"),
    "no response": (_stalls, errors.NoWorkers, "no token within"),
    "no token": (_stalls_after_the_role, errors.NoWorkers, "no token within"),
    "comments only": (_dribbles_comments, errors.NoWorkers, "no token within"),
    "a reset": (_resets, errors.NoWorkers, ""),
    "a reset after the headers": (_resets_after_the_headers, errors.NoWorkers, ""),
    "headers without end": (_sends_headers_without_end, errors.NoWorkers, "not valid HTTP"),
    "a long header": (_sends_a_long_header, errors.NoWorkers, "not valid HTTP"),
    "another protocol": (_sends_no_http, errors.NoWorkers, "not valid HTTP"),
    "a page": (_page, errors.NoWorkers, "text/html"),
    "a huge object": (_huge_object, errors.NoWorkers, "more than"),
    "a redirect": (_REDIRECT, errors.NoWorkers, "redirects"),
    "broken JSON": (says(b"data: {broken\n\n"), errors.NoWorkers, "not JSON"),
    "a huge event": (says(b"data: " + b"x" * (2 << 20)), errors.NoWorkers, "bytes"),
    "an error event": (says(event({"error": {"message": "out of memory"}})), errors.NoWorkers, "500"),
    "DONE at once": (says(DONE), errors.NoWorkers, ""),
    "an empty stream": (says(), errors.NoWorkers, ""),
    "a wrong key": (refuses(401, "bad key"), errors.NoWorkers, "401"),
    "an unknown model": (refuses(404, "no such model"), errors.NoWorkers, "404"),
}
# Other faults are found without waiting, and a busy machine needs time for an answer.
_STALLS = {"no response", "no token", "comments only"}
_each_fault = pytest.mark.parametrize("fault", FAULTS)


def _patience(fault: str) -> float:
    return 1.0 if fault in _STALLS else 60.0


@_each_fault
async def test_a_failure_before_the_first_token_is_an_error_that_lets_the_router_go_on(fault: str) -> None:
    script, kind, message = FAULTS[fault]
    async with fake_upstream() as fake, running_upstream(fake, first_token_seconds=_patience(fault)) as tier:
        fake.usual = script

        with pytest.raises(kind) as raised:
            await answer_of(tier, ask())

        assert type(raised.value) is kind
        assert message in str(raised.value)
        await fake.idle()
        await eventually(lambda: not tier.left_behind)


@_each_fault
async def test_another_url_answers_instead(fault: str) -> None:
    async with AsyncExitStack() as stack:
        first, second = [await stack.enter_async_context(fake_upstream()) for _ in range(2)]
        tier = await stack.enter_async_context(
            running_upstream(first, second, first_token_seconds=_patience(fault), probe_seconds=60)
        )
        await eventually(lambda: len(tier.running.urls.usable(time.monotonic())) == 2)
        first.usual = FAULTS[fault][0]

        answer = await answer_of(tier, ask())

        assert answer.text == "Hello you"
        assert (len(first.seen), len(second.seen)) == (1, 1)
        assert first.seen[0].body == second.seen[0].body


@pytest.mark.parametrize(
    "fault", ["a 500", "a 503", "a 429", "no response", "a reset", "broken JSON", "an empty stream"]
)
async def test_what_may_pass_is_tried_again(fault: str, count: Callable[..., float]) -> None:
    _, kind, _ = FAULTS[fault]
    before = count("headrace.upstream.retries", tier="large", error=kind.reason)
    async with (
        fake_upstream() as fake,
        running_upstream(fake, retries=3, first_token_seconds=0.3, probe_seconds=60) as tier,
    ):
        fake.scripts.extend([FAULTS[fault][0]] * 2)

        answer = await answer_of(tier, ask())

        assert answer.text == "Hello you"
        assert len(fake.seen) == 3
        assert count("headrace.upstream.retries", tier="large", error=kind.reason) == before + 2


@pytest.mark.parametrize("fault", ["a wrong key", "an unknown model", "a page", "a redirect"])
async def test_what_an_operator_has_to_correct_is_not_tried_again(fault: str) -> None:
    async with fake_upstream() as fake, running_upstream(fake, retries=3) as tier:
        fake.usual = FAULTS[fault][0]

        with pytest.raises(errors.NoWorkers):
            await answer_of(tier, ask())

        assert len(fake.seen) == 1


async def test_retries_end_after_their_number_with_the_delay_that_is_known() -> None:
    async with fake_upstream() as fake, running_upstream(fake, retries=2) as tier:
        fake.usual = refuses(500)

        with pytest.raises(errors.NoWorkers) as raised:
            await answer_of(tier, ask())

        assert len(fake.seen) == 3
        assert raised.value.retry_after is not None
        assert raised.value.retry_after > 0


async def test_a_mistake_of_the_caller_is_reported_and_not_repeated() -> None:
    async with AsyncExitStack() as stack:
        first, second = [await stack.enter_async_context(fake_upstream()) for _ in range(2)]
        tier = await stack.enter_async_context(running_upstream(first, second, retries=3))
        first.usual = second.usual = refuses(400, "temperature must be at most 2", "invalid_request_error")

        with pytest.raises(errors.InvalidRequest, match="temperature must be"):
            await answer_of(tier, ask())

        assert len(first.seen) + len(second.seen) == 1


async def test_half_a_surrogate_pair_is_a_mistake_of_the_caller() -> None:
    async with fake_upstream() as fake, running_upstream(fake, api="vllm") as tier:
        with pytest.raises(errors.InvalidRequest, match="surrogate"):
            await answer_of(tier, ask(json_schema='{"type": "object", "title": "\\ud800"}'))

        assert not fake.seen


async def test_a_request_that_cannot_be_translated_never_leaves() -> None:
    request = ask()
    request.resume.token_ids.append(1)
    async with fake_upstream() as fake, running_upstream(fake) as tier:
        with pytest.raises(errors.InvalidRequest) as raised:
            await answer_of(tier, request)

        assert raised.value.field == "resume.token_ids"
        assert not fake.seen


async def test_retry_after_is_waited_for_by_all_requests() -> None:
    async with fake_upstream() as fake, running_upstream(fake, retries=1) as tier:
        fake.scripts.append(refuses(429, retry_after="1"))
        times: list[float] = []

        async def timed(exchange: Exchange) -> None:
            times.append(time.monotonic())
            await says(delta("x"), DONE)(exchange)

        fake.usual = refuses(500)
        began = time.monotonic()
        first = asyncio.create_task(answer_of(tier, ask()))
        await eventually(lambda: next(iter(tier.running.urls)).blocked_until > time.monotonic())
        fake.usual = timed
        with pytest.raises(errors.Overloaded) as raised:
            await answer_of(tier, ask(), timeout=0.5)
        with pytest.raises(errors.UpstreamLost):
            await first

        assert raised.value.retry_after is not None
        assert 0 < raised.value.retry_after <= 1
        assert all(moment - began >= 1 for moment in times)
        assert len(times) == 1


@pytest.mark.parametrize(("seconds", "timeout"), [("5", 2.0), ("3600", 600.0)])
async def test_a_longer_delay_than_the_request_can_wait_is_passed_on_at_once(
    seconds: str, timeout: float
) -> None:
    async with fake_upstream() as fake, running_upstream(fake, retries=3) as tier:
        fake.usual = refuses(429, retry_after=seconds)

        with pytest.raises(errors.Overloaded) as raised:
            await answer_of(tier, ask(), timeout=timeout)

        assert raised.value.retry_after == pytest.approx(float(seconds), rel=0.2)
        assert len(fake.seen) == 1


async def test_a_busy_url_is_left_alone_while_another_serves() -> None:
    async with AsyncExitStack() as stack:
        first, second = [await stack.enter_async_context(fake_upstream()) for _ in range(2)]
        tier = await stack.enter_async_context(running_upstream(first, second))
        await eventually(lambda: len(tier.running.urls.usable(time.monotonic())) == 2)
        first.usual = refuses(429, retry_after="60")
        for _ in range(3):
            await answer_of(tier, ask())

        assert (len(first.seen), len(second.seen)) == (1, 3)
        assert tier.running.server.health.ready


async def test_the_breaker_opens_after_failures_and_closes_after_one_request() -> None:
    async with (
        fake_upstream() as fake,
        running_upstream(fake, breaker_failures=3, breaker_seconds=0.3) as tier,
    ):
        (url,) = tier.running.urls
        fake.usual = refuses(500, "engine died")
        for _ in range(3):
            with pytest.raises(errors.NoWorkers):
                await answer_of(tier, ask())
        with pytest.raises(errors.NoWorkers, match=r"several requests failed, the last one: .* answered 500"):
            await answer_of(tier, ask())
        assert len(fake.seen) == 3, "the last request was not sent"
        await eventually(lambda: not tier.running.server.health.ready)

        fake.usual = says(delta("Hi"), event({"choices": [{"finish_reason": "stop", "delta": {}}]}), DONE)
        await eventually(lambda: tier.running.server.health.ready)
        answer = await answer_of(tier, ask())

        assert answer.text == "Hi"
        assert url.breaker.state(time.monotonic()).value == "closed"


async def test_only_one_request_tries_a_url_whose_breaker_was_open() -> None:
    async with (
        fake_upstream() as fake,
        running_upstream(fake, breaker_failures=1, breaker_seconds=0.2) as tier,
    ):
        fake.usual = refuses(500)
        with pytest.raises(errors.NoWorkers):
            await answer_of(tier, ask())
        fake.usual = _stalls
        (url,) = tier.running.urls
        await eventually(lambda: url.breaker.state(time.monotonic()).value == "half open")
        probe = asyncio.create_task(answer_of(tier, ask()))
        await eventually(lambda: fake.answering == 1)

        with pytest.raises(errors.NoWorkers):
            await answer_of(tier, ask())

        assert fake.answering == 1
        probe.cancel()
        await asyncio.wait([probe])
        await fake.idle()
        fake.usual = says(delta("Hi"), event({"choices": [{"finish_reason": "stop", "delta": {}}]}), DONE)
        assert (await answer_of(tier, ask())).text == "Hi", "a probe whose caller left allows another"


async def test_repeated_faults_of_one_request_do_not_open_the_breaker() -> None:
    async with fake_upstream() as fake, running_upstream(fake, breaker_failures=2, retries=5) as tier:
        fake.scripts.extend([refuses(500)] * 5)

        assert (await answer_of(tier, ask())).text == "Hello you"


@pytest.mark.parametrize(
    "answer",
    [
        (event({"choices": [{"delta": {"content": "Hm"}}]}), finish("content_filter")),
        (delta(tool_calls=[{"index": 0, "id": "a", "function": {"name": "other", "arguments": "{}"}}]),),
    ],
    ids=["filtered", "a call of an unknown tool"],
)
async def test_an_unusable_answer_of_a_working_service_does_not_open_the_breaker(
    answer: tuple[bytes, ...],
) -> None:
    async with fake_upstream() as fake, running_upstream(fake, breaker_failures=1) as tier:
        fake.usual = says(*answer, DONE)
        for _ in range(2):
            with pytest.raises(errors.Unavailable) as raised:
                await answer_of(tier, ask())
            assert "unusable" in raised.value.fields

        assert len(fake.seen) == 2


async def test_requests_that_are_not_sent_do_not_count_against_the_limit_of_the_minute() -> None:
    async with (
        fake_upstream() as fake,
        running_upstream(fake, max_concurrent=1, queue_limit=0, requests_per_minute=2) as tier,
    ):
        fake.usual = _stalls
        held = asyncio.create_task(answer_of(tier, ask()))
        await eventually(lambda: fake.answering == 1)
        for _ in range(5):
            with pytest.raises(errors.Overloaded, match="in flight"):
                await answer_of(tier, ask())
        held.cancel()
        await asyncio.wait([held])
        await eventually(lambda: not tier.left_behind)
        fake.usual = says(delta("Hi"), finish(), DONE)

        assert (await answer_of(tier, ask())).text == "Hi"


async def test_requests_return_to_the_preferred_url_when_it_recovers() -> None:
    async with AsyncExitStack() as stack:
        first, second = [await stack.enter_async_context(fake_upstream()) for _ in range(2)]
        tier = await stack.enter_async_context(running_upstream(first, second))
        await eventually(lambda: len(tier.running.urls.usable(time.monotonic())) == 2)
        first.die()
        for _ in range(3):
            assert (await answer_of(tier, ask())).text == "Hello you"
        assert len(second.seen) == 3
        assert tier.running.server.health.ready

        await first.listen()
        await eventually(lambda: len(tier.running.urls.usable(time.monotonic())) == 2)
        await answer_of(tier, ask())

        assert len(first.seen) == 1


async def test_a_url_that_refuses_connections_is_tried_again_within_the_request() -> None:
    async with fake_upstream() as fake, running_upstream(fake, retries=8) as tier:
        fake.die()
        waiting = asyncio.create_task(answer_of(tier, ask()))
        await eventually(lambda: next(iter(tier.running.urls)).last_error)
        await fake.listen()

        assert (await waiting).text == "Hello you"


async def _closed_port() -> str:
    with reserved_ports(1) as (port,):
        return f"http://127.0.0.1:{port}/v1"


async def _unknown_name() -> str:
    return "http://no-such-name.invalid/v1"


@pytest.mark.parametrize("where", [_closed_port, _unknown_name])
async def test_a_url_that_was_never_reachable_is_reported_with_its_problem(
    where: Callable[[], Awaitable[str]],
) -> None:
    url = await where()
    async with running_upstream(url, ready=False) as tier:
        await eventually(lambda: "not checked" not in next(iter(tier.running.urls)).problem)
        with pytest.raises(errors.NoWorkers, match=r"cannot be used .*http://") as raised:
            await answer_of(tier, ask())

        assert raised.value.retry_after == 1.0
        assert not tier.running.server.health.ready
