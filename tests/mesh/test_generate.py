"""The API of the mesh, over real servers with echo engines."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

from headrace.client import chat, connect
from headrace.v1 import generation_pb2 as pb
from headrace.worker.engine.echo import EchoEngine
from tests.harness import PATIENCE, Mesh, collect, eventually, prompt, running_mesh


async def test_an_answer_is_accepted_streamed_and_finished(mesh: Mesh) -> None:
    answer = await collect(mesh.client, prompt("hello there"))

    assert answer.text == "hello there"
    assert answer.finish.reason == pb.FINISH_REASON_STOP
    assert answer.accepted.prompt_tokens == len("hello there")
    assert answer.finish.usage.completion_tokens == len("hello there")
    assert 0 <= answer.accepted.score <= 1


async def test_a_chat_is_answered_like_a_prompt(mesh: Mesh) -> None:
    answer = await collect(mesh.client, chat("hello", system="be brief"))

    assert answer.text == "hello"


async def test_an_easy_prompt_goes_to_the_small_tier_and_a_hard_one_to_the_large(mesh: Mesh) -> None:
    easy = await collect(mesh.client, chat("Hi!"))
    hard = await collect(mesh.client, chat("Write a Python function that implements a binary search tree."))

    assert (easy.accepted.tier, hard.accepted.tier) == ("small", "large")
    assert easy.accepted.score < hard.accepted.score


async def test_a_requested_tier_overrides_the_score(mesh: Mesh) -> None:
    request = chat("Hi!")
    request.routing.tier = "large"

    assert (await collect(mesh.client, request)).accepted.tier == "large"


async def test_characters_of_several_tokens_arrive_in_one_delta(mesh: Mesh) -> None:
    text = "naïve – 火星 🚀 e\u0301"
    request = prompt(text)
    request.stream.flush_tokens = 1

    answer = await collect(mesh.client, request)  # checks that each delta is valid UTF-8

    assert answer.text == text
    assert answer.tokens == len(text.encode())


async def test_a_stop_text_across_token_borders_ends_the_answer_before_it(mesh: Mesh) -> None:
    answer = await collect(mesh.client, prompt("one two three", stop=["o th", "zzz"]))

    assert answer.text == "one tw"
    assert answer.finish.reason == pb.FINISH_REASON_STOP_SEQUENCE
    assert answer.finish.stop_sequence == "o th"


async def test_max_tokens_ends_the_answer_and_eos_can_be_ignored(mesh: Mesh) -> None:
    answer = await collect(mesh.client, prompt("abc", max_tokens=8, ignore_eos=True))

    assert answer.tokens == 8
    assert answer.text.startswith("abc")
    assert answer.finish.reason == pb.FINISH_REASON_LENGTH


async def test_the_seed_in_use_is_reported_and_the_callers_own_is_kept(mesh: Mesh) -> None:
    drawn = await collect(mesh.client, prompt("a"))
    given = await collect(mesh.client, prompt("a", seed=7))

    assert drawn.accepted.seed != 0
    assert given.accepted.seed == 7


async def test_an_answer_resumes_after_the_tokens_that_were_delivered(mesh: Mesh) -> None:
    request = prompt("ab – cd", seed=1)
    whole = await collect(mesh.client, request)
    for cut in range(len(whole.ids) + 1):
        again = prompt("ab – cd", seed=1)
        again.resume.token_ids.extend(whole.ids[:cut])
        again.resume.attempt = 1
        rest = await collect(mesh.client, again)

        assert rest.ids == whole.ids[cut:]
        assert whole.text.endswith(rest.text)
        assert rest.finish.usage.replayed_tokens == cut


async def test_router_and_batcher_answer_alike(mesh: Mesh) -> None:
    async with connect(f"127.0.0.1:{mesh.tiers['small'].batcher.server.port}") as behind:
        answer = await collect(behind, prompt("same"))

    assert answer.text == "same"
    assert answer.accepted.tier == "small"
    assert not answer.accepted.HasField("score")


async def test_concurrent_streams_are_neither_lost_nor_mixed_up(mesh: Mesh) -> None:
    texts = [f"request number {number} says {'x' * (number % 17)}" for number in range(64)]

    answers = await asyncio.gather(*(collect(mesh.client, prompt(text)) for text in texts))

    assert [answer.text for answer in answers] == texts
    await eventually(lambda: not mesh.left_behind)


async def test_logprobs_come_one_per_token(mesh: Mesh) -> None:
    answer = await collect(mesh.client, prompt("abc", logprobs=True))

    assert len(answer.logprobs) == answer.tokens


async def test_flush_tokens_sets_the_size_of_later_deltas(mesh: Mesh) -> None:
    request = prompt("x" * 100)
    request.stream.flush_tokens = 25
    request.stream.flush_interval.FromSeconds(10)

    answer = await collect(mesh.client, request)

    assert answer.text == "x" * 100
    assert answer.deltas <= 1 + 100 // 25


async def test_tokens_of_a_few_steps_come_together_unless_the_caller_chooses_otherwise() -> None:
    async with running_mesh(
        "only", engine=lambda: EchoEngine(step_seconds=0.001), worker_settings={"delivery_seconds": 1.0}
    ) as mesh:
        request = prompt("x" * 50)
        together = await collect(mesh.client, request)
        request.stream.flush_tokens = 1
        single = await collect(mesh.client, request)

    assert together.text == single.text == "x" * 50
    assert together.deltas < 5
    assert single.deltas > 25


async def test_explain_reports_the_tier_that_generate_uses(mesh: Mesh) -> None:
    for text in ("Hi!", "Prove that there are infinitely many primes, step by step."):
        explained = await mesh.client.explain(chat(text))
        answer = await collect(mesh.client, chat(text))

        assert explained.tier == answer.accepted.tier
        assert explained.score == answer.accepted.score
        assert [candidate.tier.name for candidate in explained.candidates] == ["small", "large"]


async def test_list_tiers_reports_model_limits_and_health(mesh: Mesh) -> None:
    tiers = (await mesh.client.list_tiers()).tiers

    assert [(tier.name, tier.model, tier.healthy) for tier in tiers] == [
        ("small", "echo", True),
        ("large", "echo", True),
    ]
    assert all(tier.limits.context_length == 4096 for tier in tiers)


async def test_a_cancelled_answer_leaves_nothing_behind(mesh: Mesh) -> None:
    async with aclosing(mesh.client.generate(prompt("x" * 500), timeout=PATIENCE)) as stream:
        await anext(stream)


async def test_text_held_back_until_the_end_survives_the_loss_of_the_finish(mesh: Mesh) -> None:
    for request in (prompt("xyo", stop=["oz"]), prompt("xyo", stop=["oz"], max_tokens=3)):
        async with aclosing(mesh.client.generate(request, timeout=PATIENCE)) as stream:
            events = [response async for response in stream]
        with_tokens = [event.delta for event in events if event.delta.token_count]
        kept_back = [event.delta.text for event in events if event.HasField("delta")][len(with_tokens) :]

        assert "".join(delta.text for delta in with_tokens) == "xy"
        assert kept_back == ["o"]
        request.resume.token_ids.extend(b"xyo")
        assert (await collect(mesh.client, request)).text == "o"


async def test_a_stop_token_ends_the_answer_and_is_not_delivered(mesh: Mesh) -> None:
    request = prompt("one, two; three", stop_token_ids=[ord(";"), ord("!")], ignore_eos=True)

    answer = await collect(mesh.client, request)

    assert answer.text == "one, two"
    assert answer.finish.reason == pb.FINISH_REASON_STOP
    assert answer.finish.usage.completion_tokens == len("one, two")
