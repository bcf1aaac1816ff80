"""Details of tokens reach the caller complete and once, whatever happens to workers."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import aclosing
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry import trace

from headrace import errors
from headrace.batcher.inbox import Inbox
from headrace.batcher.job import Job
from headrace.batcher.token_details import MAX_ENTRIES, prompt_parts
from headrace.batcher.waiting.prefixes import block_names
from headrace.batcher.waiting.prompt_details import PromptDetailsMemory, details_bytes
from headrace.deadline import NEVER
from headrace.flushing import Flusher
from headrace.v1 import generation_pb2 as pb
from headrace.v1 import worker_service_pb2 as wire
from tests.batcher.detail_worker import DetailWorker, detailed_tier, logprob_at, top_at, top_tokens
from tests.harness import PATIENCE, Answer, collect, eventually, prompt

TEXT = "what a worker sends"
IDS = list(TEXT.encode())


def described(id: int, logprob: float | None, top: tuple[list[int], list[float]]) -> pb.TokenLogprobs:
    def one(id: int, logprob: float | None) -> pb.TokenLogprob:
        return pb.TokenLogprob(id=id, logprob=logprob, text=bytes([id]))

    return pb.TokenLogprobs(token=one(id, logprob), top=[one(*pair) for pair in zip(*top, strict=True)])


def expected_prompt(ids: list[int], most: int) -> list[pb.TokenLogprobs]:
    rest = [
        described(id, logprob_at(ids, place), top_at(ids, place, most))
        for place, id in enumerate(ids)
        if place
    ]
    return [described(ids[0], None, ([], [])), *rest]


def expected_answer(ids: list[int], most: int, *, begin: int = 0) -> list[pb.TokenLogprobs]:
    both, half = ids + ids, len(ids)
    places = range(half + begin, 2 * half)
    return [described(both[at], logprob_at(both, at), top_at(both, at, most)) for at in places]


def asked(
    text: str = TEXT, *, top: int | None = 2, prompt_top: int | None = 3, **more: Any
) -> pb.GenerateRequest:
    request = prompt(text, **more)
    if top is not None:
        request.sampling.top_logprobs = top
    if prompt_top is not None:
        request.sampling.prompt_logprobs = prompt_top
    return request


def check(answer: Answer, *, top: int | None = 2, prompt_top: int | None = 3) -> None:
    """Assert that the whole answer to TEXT has exactly the details that were requested."""
    assert answer.text == TEXT
    assert answer.ids == IDS
    assert answer.prompt == ([] if prompt_top is None else expected_prompt(IDS, prompt_top))
    assert answer.details == ([] if top is None else expected_answer(IDS, top))


@pytest.mark.parametrize("top", [None, 0, 20])
@pytest.mark.parametrize("prompt_top", [None, 0, 20])
async def test_a_caller_receives_the_details_that_it_requests(
    top: int | None, prompt_top: int | None
) -> None:
    async with detailed_tier(DetailWorker()) as tier:
        answer = await collect(tier.client, asked(top=top, prompt_top=prompt_top))

    check(answer, top=top, prompt_top=prompt_top)
    assert answer.logprobs == [], "which is another field"


async def test_log_probabilities_alone_and_with_details_are_the_same_numbers() -> None:
    async with detailed_tier(DetailWorker()) as tier:
        plain = await collect(tier.client, prompt(TEXT, logprobs=True))
        both = await collect(tier.client, asked(logprobs=True))

    assert plain.logprobs == both.logprobs == [one.token.logprob for one in both.details]
    assert plain.details == []


async def test_a_worker_lost_at_any_message_changes_nothing() -> None:
    """Messages are parts of the prompt, then of the answer; the last loss is before the finish."""
    parts, pieces = math.ceil((len(IDS) - 1) / 3), math.ceil(len(IDS) / 3)
    dies: list[int] = []
    workers = DetailWorker(dies=dies), DetailWorker(dies=dies)
    async with detailed_tier(*workers) as tier:
        for at in range(parts + pieces + 1):
            await eventually(lambda: len(tier.batcher.coalescer.pool.ready()) == 2)
            dies.append(at)
            answer = await collect(tier.client, asked())

            check(answer)
            assert not dies
            last = max((worker.submitted[-1] for worker in workers if worker.submitted), key=_attempt)
            assert last.attempt == 1 or at == parts + pieces
            # gRPC may drop the messages just before the loss, so that the batcher has less than was sent.
            if at < parts or last.resume_ids:
                repeats = last.sampling.HasField("prompt_logprobs")
                assert repeats == (at < parts), "only a whole prompt is not repeated"
            for worker in workers:
                worker.submitted.clear()


async def test_parts_of_a_prompt_do_not_end_the_suspicion_that_it_kills_workers() -> None:
    dies = [2, 3]
    async with detailed_tier(*(DetailWorker(dies=dies) for _ in range(3))) as tier:
        with pytest.raises(errors.PoisonRequest):
            await collect(tier.client, asked())


def _attempt(sequence: wire.Sequence) -> int:
    return sequence.attempt


@pytest.mark.parametrize("repeats", [1, 4])
async def test_repeated_tokens_of_a_prompt_are_dropped(repeats: int) -> None:
    async with detailed_tier(DetailWorker(repeats=repeats)) as tier:
        check(await collect(tier.client, asked()))


async def test_a_prompt_of_one_token_has_no_log_probability() -> None:
    worker = DetailWorker()
    async with detailed_tier(worker) as tier:
        answer = await collect(tier.client, asked("a", prompt_top=5))

    assert answer.prompt == [described(97, None, ([], []))]
    assert not worker.submitted[0].sampling.HasField("prompt_logprobs")


async def test_a_prompt_with_details_is_no_sign_that_its_worker_has_evicted_some() -> None:
    text = "a prompt of several blocks " * 20
    async with detailed_tier(DetailWorker(piece=256)) as tier:
        coalescer = tier.batcher.coalescer
        (link,) = coalescer.pool
        earlier = block_names(list(text.encode()))

        await collect(tier.client, prompt(text))
        cached = coalescer.prefixes.cached_tokens(earlier, link.target)
        for request in (prompt(text.upper()), asked(text.upper())):
            await collect(tier.client, request)

        assert cached == coalescer.prefixes.cached_tokens(earlier, link.target) > 0


async def test_a_resumed_answer_has_no_details_of_its_prompt() -> None:
    worker = DetailWorker()
    request = asked()
    request.resume.token_ids.extend(IDS[:4])
    async with detailed_tier(worker) as tier:
        answer = await collect(tier.client, request)

    assert answer.prompt == []
    assert answer.details == expected_answer(IDS, 2, begin=4)
    assert not worker.submitted[0].sampling.HasField("prompt_logprobs")


async def test_tokens_after_a_stop_text_have_no_details() -> None:
    async with detailed_tier(DetailWorker(piece=8)) as tier:
        answer = await collect(tier.client, asked(stop=["wor"]))

    assert answer.text == "what a "
    assert [one.token.id for one in answer.details] == list(b"what a wor"), "the stop text has tokens"
    assert len(answer.details) == answer.finish.usage.completion_tokens


async def test_details_are_the_same_however_the_answer_is_split_into_events() -> None:
    async with detailed_tier(DetailWorker(piece=1)) as tier:
        for tokens in (1, 2, 1000):
            request = asked()
            request.stream.flush_tokens = tokens
            check(await collect(tier.client, request))


async def test_details_survive_a_reader_that_is_behind() -> None:
    """Its answer is paused, and continued from the next token."""
    async with detailed_tier(DetailWorker(piece=1), max_unread_tokens=6) as tier:
        check(await collect(tier.client, asked()))


async def test_events_are_small_however_long_the_prompt_is() -> None:
    text = "a long prompt " * 300
    async with detailed_tier(DetailWorker(piece=4096)) as tier:
        request = asked(text, top=20, prompt_top=20)
        request.stream.flush_tokens = 1024
        async with aclosing(tier.client.generate(request, timeout=PATIENCE)) as stream:
            events = [event async for event in stream]

    parts = [event.prompt_tokens for event in events if event.HasField("prompt_tokens")]
    assert sum(len(part.tokens) for part in parts) == len(text)
    for tokens in [part.tokens for part in parts] + [event.delta.tokens for event in events]:
        assert sum(1 + len(one.top) for one in tokens) <= MAX_ENTRIES + 1, "the first token comes in addition"
    assert max(event.ByteSize() for event in events) < 64 << 10


@pytest.mark.parametrize(("field", "feature"), [("top_logprobs", "top"), ("prompt_logprobs", "prompt")])
async def test_a_tier_rejects_details_that_not_all_workers_support(field: str, feature: str) -> None:
    able, unable = DetailWorker(), DetailWorker(features=["logprobs"])
    async with detailed_tier(able, unable) as tier:
        with pytest.raises(errors.InvalidSampling, match=f"not all workers .* support {feature}") as caught:
            await collect(tier.client, prompt(TEXT, **{field: 0}))
        assert (await collect(tier.client, prompt(TEXT, logprobs=True))).logprobs

    assert caught.value.field == f"sampling.{field}"
    assert caught.value.fields == {"feature": field}


# What a worker may send wrongly, and whether it is the worker's fault: if not, its other sequences continue.


Damage = Callable[[wire.SequenceDelta], None]


def _prompt(change: Callable[[wire.PromptLogprobs], object]) -> Damage:
    def damage(delta: wire.SequenceDelta) -> None:
        if delta.HasField("prompt") and delta.prompt.offset > 1:
            change(delta.prompt)

    return damage


def _answer(change: Callable[[wire.SequenceDelta], object]) -> Damage:
    def damage(delta: wire.SequenceDelta) -> None:
        if delta.logprobs and delta.offset > 1:
            change(delta)

    return damage


def _without_last_part(delta: wire.SequenceDelta) -> None:
    if delta.prompt.offset + len(delta.prompt.logprobs) == len(IDS):
        delta.ClearField("prompt")


def _set(values: Any, value: float) -> None:
    values[-1] = value


VIOLATIONS = {
    "a gap in the prompt": _prompt(lambda part: setattr(part, "offset", part.offset + 1)),
    "beyond the prompt": _prompt(lambda part: part.logprobs.extend([0.0] * 99)),
    "a place without top": _prompt(lambda part: part.top.pop()),
    "too many in top": _prompt(lambda part: part.top[0].ids.append(1)),
    "top without log-probability": _prompt(lambda part: part.top[0].logprobs.pop()),
    "an unknown token": _prompt(lambda part: _set(part.top[0].ids, 258)),
    "an incomplete prompt": _without_last_part,
    "a token without top": _answer(lambda delta: delta.top.pop()),
    "no top": _answer(lambda delta: delta.ClearField("top")),
    "an empty top": _answer(lambda delta: delta.top[0].Clear()),
    "an unknown token in the answer": _answer(lambda delta: _set(delta.top[0].ids, 9999)),
}
FAULTS = {
    "NaN in the prompt": _prompt(lambda part: _set(part.logprobs, math.nan)),
    "NaN in top of the prompt": _prompt(lambda part: _set(part.top[0].logprobs, math.nan)),
    "NaN": _answer(lambda delta: _set(delta.logprobs, math.nan)),
    "NaN in top": _answer(lambda delta: _set(delta.top[-1].logprobs, math.nan)),
    "infinity": _answer(lambda delta: _set(delta.logprobs, math.inf)),
    "minus infinity": _answer(lambda delta: _set(delta.logprobs, -math.inf)),
    "minus infinity in top": _answer(lambda delta: _set(delta.top[-1].logprobs, -math.inf)),
    "minus infinity in the prompt": _prompt(lambda part: _set(part.logprobs, -math.inf)),
    "more than certain": _answer(lambda delta: _set(delta.logprobs, 0.5)),
}


async def test_details_of_the_wrong_shape_lose_the_worker_and_not_the_answer() -> None:
    workers = DetailWorker(), DetailWorker()
    async with detailed_tier(*workers) as tier:
        pool = tier.batcher.coalescer.pool
        for kind, change in VIOLATIONS.items():
            await eventually(lambda: len(pool.ready()) == 2)
            streams = sum(link.epoch for link in pool)

            def damage(delta: wire.SequenceDelta, change: Damage = change) -> None:
                before = delta.SerializeToString()
                change(delta)
                if delta.SerializeToString() != before:  # once
                    for worker in workers:
                        worker.damage = lambda delta: None

            for worker in workers:
                worker.damage = damage
            check(await collect(tier.client, asked()))
            await eventually(lambda: len(pool.ready()) == 2)
            assert sum(link.epoch for link in pool) == streams + 1, kind


async def test_log_probabilities_that_are_not_finite_fail_only_their_sequence() -> None:
    bad = DetailWorker()
    async with detailed_tier(bad) as tier:
        (link,) = tier.batcher.coalescer.pool
        epoch = link.epoch
        for kind, bad.damage in FAULTS.items():
            bad.submitted.clear()
            with pytest.raises(errors.SequenceFault, match="not a finite number"):
                await collect(tier.client, asked())
            assert (await collect(tier.client, prompt("a neighbour"))).text == "a neighbour"
            assert len(bad.submitted) == 3, f"{kind}: the request is tried twice"
        bad.damage = FAULTS["minus infinity"]
        with pytest.raises(errors.SequenceFault, match="not a finite number"):
            await collect(tier.client, prompt(TEXT, logprobs=True))
        assert link.epoch == epoch, "its stream continues"


# Pure functions.


def job(tokens: int, **sampling: Any) -> Job:
    return Job(
        request_id="r",
        prompt_ids=list(range(tokens)),
        resume_ids=[],
        sampling=pb.Sampling(seed=1, max_tokens=9, **sampling),
        arrived=0.0,
        deadline=NEVER,
        priority=5,
        attempt=0,
        inbox=Inbox(Flusher()),
        span=trace.INVALID_SPAN,
    )


@given(
    tokens=st.integers(2, 60),
    most=st.sampled_from([0, 1, 20]),
    attempts=st.lists(st.lists(st.integers(1, 60), min_size=1, max_size=8), min_size=1, max_size=4),
)
def test_parts_of_any_attempts_join_to_one_prompt(tokens: int, most: int, attempts: list[list[int]]) -> None:
    """Each attempt starts over and ends anywhere; each part is delivered once, in order."""
    ids = list(range(tokens))
    at = 1
    seen: list[float] = []
    for sizes in attempts:
        first = 1
        for size in sizes:
            places = range(first, min(first + size, tokens))
            message = wire.PromptLogprobs(
                offset=first,
                logprobs=[logprob_at(ids, place) for place in places],
                top=[top_tokens(ids, place, most) for place in places] if most else [],
            )
            for part in prompt_parts(message, at, prompt_tokens=tokens, most=most, vocabulary=0):
                assert part.offset == at
                assert len(part.logprobs) * (1 + most) <= max(MAX_ENTRIES, 1 + most)
                assert len(part.top) == (len(part.logprobs) if most else 0)
                seen += part.logprobs
                at += len(part.logprobs)
            first = places.stop
    assert seen == [logprob_at(ids, place) for place in range(1, at)]
    assert at == max(min(1 + sum(sizes), tokens) for sizes in attempts)


def test_the_memory_of_prompts_in_flight_is_bounded_and_a_single_one_always_fits() -> None:
    one = job(100, prompt_logprobs=20)
    one.request_prompt_details()
    memory = PromptDetailsMemory(limit=details_bytes(one) + 1)
    with memory.held(job(100)):
        assert memory.bytes == 0, "a request without details takes none"
    with memory.held(one):
        with pytest.raises(errors.Overloaded, match="prompt_logprobs") as caught, memory.held(one):
            pass
        assert caught.value.retry_after
        small = job(2, prompt_logprobs=0)
        small.request_prompt_details()
        with pytest.raises(errors.Overloaded), memory.held(small):
            pass
    memory.limit = 1
    with memory.held(one):
        pass
    assert memory.bytes == 0


def test_a_prompt_whose_details_are_requested_uses_no_cache() -> None:
    one = job(100, prompt_logprobs=0)
    one.blocks = (1, 2, 3)
    one.request_prompt_details()
    assert not one.usable_blocks
    one.add_prompt_part(wire.PromptLogprobs(offset=1, logprobs=[0.0] * 99))
    assert one.usable_blocks == (1, 2, 3), "the details are complete"
