"""Requests wait to be tokenised as in the queue: bounded, in its order, and no longer than necessary."""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace import deadline, errors
from headrace.batcher.intake.intake import LONG_BYTES
from headrace.batcher.intake.limits import GREEDY_BELOW, RequestLimits
from headrace.batcher.text.tokens import ByteTokenizer
from headrace.channel import open_channel
from headrace.client import chat, connect
from headrace.v1 import admin_service_pb2 as admin
from headrace.v1 import generation_pb2 as pb
from headrace.v1.admin_service_pb2_grpc import AdminServiceStub
from headrace.worker.engine.echo import EchoEngine
from tests.harness import PATIENCE, Answer, collect, eventually, prompt, running_mesh
from tests.tier import Tier, running_tier

THREADS = 2  # of the lane of short prompts


class GatedTokenizer(ByteTokenizer):
    """Tokenises nothing until its gate is opened, and records the texts in order.

    slow   selects the texts that wait at the gate
    """

    bound = None  # every prompt reaches `encode_text`
    quick_text_bytes = quick_chat_bytes = 0  # on a thread

    def __init__(self, slow: Callable[[str], bool] = lambda text: True) -> None:
        super().__init__()
        self.texts: list[str] = []
        self._slow = slow
        self._gate = threading.Event()

    def encode_text(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        self.texts.append(text)
        if self._slow(text):
            self._gate.wait(PATIENCE)
        return super().encode_text(text)

    def open(self) -> None:
        self._gate.set()


@asynccontextmanager
async def gated(
    tokenizer: GatedTokenizer, engine: EchoEngine | None = None, **settings: Any
) -> AsyncGenerator[Tier, None]:
    """Run a tier with a gated tokenizer; the gate is opened at the end at the latest."""
    async with running_tier([engine or EchoEngine()], tokenizer=tokenizer, **settings) as tier:
        try:
            yield tier
        finally:
            tokenizer.open()


def asking(tier: Tier, text: str, timeout: float | None = PATIENCE, **routing: Any) -> asyncio.Task[Answer]:
    asked = prompt(text, max_tokens=2)
    asked.routing.CopyFrom(pb.Routing(**routing))
    return asyncio.create_task(collect(tier.client, asked, timeout=timeout))


async def block_threads(tier: Tier, tokenizer: GatedTokenizer) -> list[asyncio.Task[Answer]]:
    """Send requests until each thread for short prompts is busy."""
    readers = []
    for number in range(THREADS):
        readers.append(asking(tier, f"first {number}"))
        await eventually(lambda: len(tokenizer.texts) == len(readers))
    return readers


async def results(tasks: Sequence[asyncio.Task[Answer]]) -> list[Answer | BaseException]:
    return await asyncio.gather(*tasks, return_exceptions=True)


def intake_of(tier: Tier) -> Any:
    return tier.batcher.intake


async def test_a_burst_beyond_the_limit_is_rejected_before_anything_is_tokenised() -> None:
    tokenizer = GatedTokenizer()
    async with gated(tokenizer, EchoEngine(max_running=2), queue_limit=4) as tier:
        (link,) = tier.batcher.coalescer.pool
        fit = 4 + link.free_slots(0.0)
        burst = [asking(tier, f"prompt {number}") for number in range(300)]
        await eventually(lambda: sum(task.done() for task in burst) >= 300 - fit)

        rejected = [task for task in burst if task.done()]
        assert len(rejected) == 300 - fit
        assert len(tokenizer.texts) == THREADS, "no rejection waited for a prompt to be tokenised"
        assert intake_of(tier).waiting == fit
        for outcome in await results(rejected):
            assert type(outcome) is errors.Overloaded
            assert outcome.reason == "QUEUE_FULL"
            assert outcome.retry_after is not None
        tokenizer.open()
        taken = [task for task in burst if task not in rejected]
        assert all(isinstance(outcome, Answer) for outcome in await results(taken))
        await eventually(lambda: not intake_of(tier).waiting)


class QuickTokenizer(GatedTokenizer):
    """Encodes texts of up to 100 bytes on the event loop; longer ones wait at the gate."""

    quick_text_bytes = 100

    def __init__(self) -> None:
        super().__init__(lambda text: len(text) > 100)
        self.on_the_loop: list[str] = []

    def encode_text(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        if threading.current_thread() is threading.main_thread():
            self.on_the_loop.append(text)
        return super().encode_text(text)


async def test_short_prompts_are_tokenised_on_the_event_loop_unless_others_wait() -> None:
    tokenizer = QuickTokenizer()
    async with gated(tokenizer) as tier:
        long = "x" * 101
        readers = [asking(tier, long)]
        await eventually(lambda: intake_of(tier).waiting == 1)
        assert (await asking(tier, "overtakes nobody")).tokens == 2
        readers += [asking(tier, long) for _ in range(2)]
        await eventually(lambda: intake_of(tier).waiting == 3)
        readers.append(asking(tier, "waits for its turn"))
        await eventually(lambda: intake_of(tier).waiting == 4)
        tokenizer.open()
        assert all(isinstance(outcome, Answer) for outcome in await results(readers))
        await eventually(lambda: not intake_of(tier).waiting)

    assert tokenizer.on_the_loop == ["overtakes nobody"]
    assert "waits for its turn" in tokenizer.texts[-2:]  # two threads


async def test_a_resumed_answer_holds_a_place_while_it_is_decoded() -> None:
    tokenizer = QuickTokenizer()
    async with gated(tokenizer) as tier:
        asked = prompt("short", max_tokens=3)
        asked.resume.token_ids.extend(b"s")
        assert (await collect(tier.client, asked)).tokens == 2

    assert tokenizer.on_the_loop == []


async def test_short_prompts_beyond_the_limit_are_rejected_and_not_tokenised() -> None:
    tokenizer = QuickTokenizer()
    async with gated(tokenizer, EchoEngine(max_running=1, step_seconds=0.01), queue_limit=2) as tier:
        coalescer = tier.batcher.coalescer
        busy = prompt("x", max_tokens=1000, ignore_eos=True)
        running = [asyncio.create_task(collect(tier.client, busy)) for _ in range(2)]
        await eventually(lambda: len(coalescer.live) == 2 and not coalescer.queue)
        running += [asyncio.create_task(collect(tier.client, busy)) for _ in range(2)]
        await eventually(lambda: len(coalescer.queue) == 2)

        with pytest.raises(errors.Overloaded):
            await asking(tier, "late")
        assert "late" not in tokenizer.texts
        for task in running:
            task.cancel()
        await eventually(lambda: not coalescer.live)


async def test_tenants_take_turns_at_the_tokenizer() -> None:
    tokenizer = GatedTokenizer()
    async with gated(tokenizer) as tier:
        readers = await block_threads(tier, tokenizer)
        readers += [asking(tier, f"flood {number}", tenant="flood") for number in range(40)]
        await eventually(lambda: intake_of(tier).waiting == THREADS + 40)
        readers += [asking(tier, f"quiet {number}", tenant="quiet") for number in range(4)]
        await eventually(lambda: intake_of(tier).waiting == THREADS + 44)
        tokenizer.open()
        await results(readers)

    places = [place for place, text in enumerate(tokenizer.texts) if text.startswith("quiet")]
    assert max(places) < 20, "the four prompts of the quiet tenant do not wait for the forty of the other"


async def test_prompts_are_tokenised_by_priority_and_then_by_deadline() -> None:
    tokenizer = GatedTokenizer()
    async with gated(tokenizer) as tier:
        readers = await block_threads(tier, tokenizer)
        for text, priority, timeout in (
            ("low", 1, 60.0),
            ("late", 5, 80.0),
            ("soon", 5, 40.0),
            ("high", 9, 80.0),
        ):
            readers.append(asking(tier, text, timeout, priority=priority))
        await eventually(lambda: intake_of(tier).waiting == THREADS + 4)
        tokenizer.open()
        await results(readers)

    assert sorted(tokenizer.texts[THREADS : THREADS + 2]) == ["high", "soon"]  # two threads
    assert sorted(tokenizer.texts[THREADS + 2 :]) == ["late", "low"]


async def test_a_request_whose_deadline_passes_fails_then_and_is_not_tokenised(
    count: Callable[..., float], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = count("headrace.requests", error="DEADLINE_QUEUE")
    tokenizer = GatedTokenizer()
    async with gated(tokenizer) as tier:
        readers = await block_threads(tier, tokenizer)
        monkeypatch.setattr(deadline, "DEADLINE_MARGIN", 57.0)  # only the batcher notices, after 3 s
        with pytest.raises(errors.DeadlineInQueue, match="tokenised"):
            await asking(tier, "late", 60.0)
        monkeypatch.undo()

        assert "late" not in tokenizer.texts
        assert intake_of(tier).waiting == THREADS
        assert count("headrace.requests", error="DEADLINE_QUEUE") == before + 1
        tokenizer.open()
        assert all(isinstance(outcome, Answer) for outcome in await results(readers))
    assert "late" not in tokenizer.texts


async def test_a_cancelled_request_releases_its_place_and_is_not_tokenised() -> None:
    tokenizer = GatedTokenizer()
    async with gated(tokenizer) as tier:
        readers = await block_threads(tier, tokenizer)
        gone = asking(tier, "gone")
        await eventually(lambda: intake_of(tier).waiting == THREADS + 1)
        gone.cancel()
        await eventually(lambda: intake_of(tier).waiting == THREADS)
        running = readers.pop()
        running.cancel()  # its thread cannot be stopped
        await eventually(lambda: intake_of(tier).waiting == THREADS - 1)
        tokenizer.open()
        await results(readers)
        with suppress(asyncio.CancelledError):
            await running
        await eventually(lambda: not intake_of(tier).bytes)
    assert "gone" not in tokenizer.texts


async def test_a_request_of_higher_priority_sheds_one_at_the_intake_or_in_the_queue() -> None:
    tokenizer = GatedTokenizer(lambda text: text.startswith("slow"))
    engine = EchoEngine(max_running=1, step_seconds=0.01)
    async with gated(tokenizer, engine, queue_limit=2) as tier:
        coalescer, intake = tier.batcher.coalescer, intake_of(tier)
        (link,) = coalescer.pool
        busy = prompt("x", max_tokens=1000, ignore_eos=True)
        running = []
        while link.free_slots(0.0):
            running.append(asyncio.create_task(collect(tier.client, busy)))
            await eventually(lambda: len(coalescer.live) == len(running) and not coalescer.queue)
        queued = asking(tier, "queued", priority=2)
        await eventually(lambda: len(coalescer.queue) == 1)
        slow = asking(tier, "slow", priority=3)
        await eventually(lambda: intake.waiting == 1)

        with pytest.raises(errors.Overloaded) as rejected:
            await asking(tier, "late", priority=1)
        assert rejected.value.reason == "QUEUE_FULL"
        higher = [asking(tier, "slow too", priority=8)]
        with pytest.raises(errors.Shed):
            await queued
        await eventually(lambda: intake.waiting == 2)
        # A prompt on a thread cannot be shed; one that waits for a thread can.
        with pytest.raises(errors.Overloaded):
            await asking(tier, "late", priority=9)
        tokenizer.open()
        await eventually(lambda: len(coalescer.queue) == 2)
        higher.append(asking(tier, "highest", priority=9))
        with pytest.raises(errors.Shed):
            await slow
        for task in (*running, *higher):
            task.cancel()
        await eventually(lambda: not (coalescer.live or intake.waiting))


async def test_a_prompt_that_waits_for_a_thread_is_shed_for_a_tenant_with_fewer() -> None:
    tokenizer = GatedTokenizer()
    async with gated(tokenizer, EchoEngine(max_running=1), queue_limit=4) as tier:
        (link,) = tier.batcher.coalescer.pool
        fit = 4 + link.free_slots(0.0)
        flood = [asking(tier, f"flood {number}", tenant="flood") for number in range(fit)]
        await eventually(lambda: intake_of(tier).waiting == fit)
        quiet = asking(tier, "quiet", tenant="quiet")
        await eventually(lambda: any(task.done() for task in flood))

        assert intake_of(tier).waiting == fit
        tokenizer.open()
        assert isinstance(await quiet, Answer)
        outcomes = await results(flood)
        assert sum(isinstance(outcome, errors.Shed) for outcome in outcomes) == 1
        assert sum(isinstance(outcome, Answer) for outcome in outcomes) == fit - 1


async def test_long_and_huge_prompts_do_not_delay_shorter_ones() -> None:
    """Each size has its own threads: with all long and huge prompts stuck, shorter ones are tokenised."""
    tokenizer = GatedTokenizer(lambda text: text.startswith("stuck"))
    async with gated(tokenizer, intake_bytes=1 << 24) as tier:
        huge = [asking(tier, "stuck " + "x" * (10 * LONG_BYTES)) for _ in range(3)]
        await eventually(lambda: intake_of(tier).waiting == 3)
        with pytest.raises(errors.ContextTooLong):
            await asking(tier, "long " + "y" * LONG_BYTES)
        long = [asking(tier, "stuck " + "x" * LONG_BYTES) for _ in range(3)]
        await eventually(lambda: intake_of(tier).waiting == 6 and len(tokenizer.texts) == 3)
        assert (await asking(tier, "short")).tokens == 2
        assert [text[:5] for text in tokenizer.texts] == ["stuck", "long ", "stuck", "short"]
        tokenizer.open()
        assert {type(outcome) for outcome in await results([*huge, *long])} == {errors.ContextTooLong}


async def test_long_prompts_are_bounded_in_bytes_and_short_ones_are_not() -> None:
    tokenizer = GatedTokenizer(lambda text: text.startswith("x"))
    async with gated(tokenizer, intake_bytes=4 * LONG_BYTES) as tier:
        text = "x" * (LONG_BYTES + 100)
        flood = [asking(tier, text, tenant="flood") for _ in range(3)]
        await eventually(lambda: intake_of(tier).waiting == 3)

        with pytest.raises(errors.Overloaded, match="bytes of long prompts") as rejected:
            await asking(tier, text, tenant="flood")
        assert rejected.value.reason == "QUEUE_FULL"
        assert rejected.value.retry_after is not None
        assert (await asking(tier, "short", tenant="flood")).tokens == 2
        # Another tenant has a share: the last request of the flood is shed.
        quiet = asking(tier, text, tenant="quiet")
        await eventually(lambda: any(task.done() for task in flood))
        assert intake_of(tier).bytes <= 4 * LONG_BYTES
        tokenizer.open()
        outcomes = await results([*flood, quiet])
        assert [type(outcome) for outcome in outcomes].count(errors.Shed) == 1
        assert isinstance(outcomes[-1], errors.ContextTooLong)  # tokenised, and longer than the context
        await eventually(lambda: not intake_of(tier).bytes)


async def test_a_single_prompt_may_exceed_the_bound_in_bytes() -> None:
    engine = EchoEngine(context_length=1 << 20, kv_blocks=1 << 17)
    async with running_tier([engine], intake_bytes=1) as tier:
        assert (await asking(tier, "x" * (2 * LONG_BYTES))).tokens == 2


class CountingTokenizer(ByteTokenizer):
    """Records the length of each text that it tokenises."""

    def __init__(self) -> None:
        super().__init__()
        self.encoded: list[int] = []

    def encode_text(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        self.encoded.append(len(text))
        return super().encode_text(text)


@pytest.mark.parametrize(
    "asked",
    [
        prompt("x" * 1_500_000),
        prompt("ż" * 700_000),
        chat("x" * 1_500_000),
        chat([("system", "s" * 100), ("user", "hi"), ("assistant", "a"), ("user", "x" * 5000)]),
    ],
    ids=["prompt", "not ASCII", "chat", "long chat"],
)
async def test_a_prompt_too_long_by_its_bytes_is_rejected_by_every_tier_and_tokenised_by_none(
    asked: pb.GenerateRequest,
) -> None:
    tokenizer = CountingTokenizer()
    async with running_mesh("small", "large", tokenizer=tokenizer) as mesh:
        with pytest.raises(errors.ContextTooLong, match="at least") as rejected:
            await collect(mesh.client, asked)

        assert tokenizer.encoded == []
        assert rejected.value.field == "input"
        assert int(rejected.value.fields["prompt_tokens_at_least"]) >= 4096
        await eventually(lambda: not mesh.left_behind)


class WordTokenizer(CountingTokenizer):
    """Returns a token per word or run of spaces of any length, so that bytes prove nothing."""

    bound = None

    def encode_text(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        self.encoded.append(len(text))
        return [97] * len(re.findall(r"\S+|\s+", text))


async def test_only_the_head_of_a_text_many_times_longer_than_the_context_is_tokenised() -> None:
    tokenizer = WordTokenizer()
    async with running_tier([EchoEngine(context_length=256)], tokenizer=tokenizer) as tier:
        for long in (prompt("ab " * 100_000), chat([("user", "cd " * 100_000), ("user", "ab " * 100_000)])):
            with pytest.raises(errors.ContextTooLong):
                await collect(tier.client, long)
            assert tokenizer.encoded.pop() < 20 * 256
            assert not tokenizer.encoded
        # A text of many characters and few tokens is tokenised completely, and served.
        assert (await collect(tier.client, prompt("ab" * 100_000))).tokens == 1
        assert tokenizer.encoded[-1] == 200_000


async def test_a_prompt_that_may_fit_is_tokenised_and_judged_by_its_tokens() -> None:
    """The size of the whole request proves nothing: its other fields produce no tokens."""
    tokenizer = CountingTokenizer()
    async with running_mesh("only", tokenizer=tokenizer) as mesh:
        fits = prompt("x" * 4095, max_tokens=1, stop=["s" * 256] * 16)
        assert (await collect(mesh.client, fits)).tokens == 1
        # The echo engine's tokenizer encodes only the last turn.
        assert (await collect(mesh.client, chat([("user", "x" * 5000), ("user", "hi")]))).text == "hi"


async def test_resume_ids_are_checked_before_the_prompt_is_tokenised() -> None:
    tokenizer = CountingTokenizer()
    async with running_tier([EchoEngine()], tokenizer=tokenizer) as tier:
        for ids, error in (([97] * 4096, errors.ContextTooLong), ([999_999], errors.InvalidSampling)):
            with pytest.raises(error) as rejected:
                await collect(tier.client, pb.GenerateRequest(prompt="x", resume=pb.Resume(token_ids=ids)))
            assert rejected.value.field == "resume.token_ids"
    assert tokenizer.encoded == []


async def test_requests_at_the_intake_are_in_metrics_and_the_debug_endpoint(
    count: Callable[..., float],
) -> None:
    before = count("headrace.queue.depth", tier="t", stage="tokenizer")
    waited = count("headrace.queue.wait", tier="t", stage="tokenizer", outcome="ok")
    tokenizer = GatedTokenizer()
    async with gated(tokenizer) as tier:
        readers = await block_threads(tier, tokenizer)
        readers.append(asking(tier, "third"))
        await eventually(lambda: intake_of(tier).waiting == 3)

        assert count("headrace.queue.depth", tier="t", stage="tokenizer") == before + 3
        (listed,) = (await tier.client.list_tiers()).tiers
        assert listed.load.queued == 3
        async with open_channel(f"127.0.0.1:{tier.batcher.server.port}") as channel:
            state = (await AdminServiceStub(channel).Inspect(admin.InspectRequest())).batcher
        assert state.tokenizing == 3
        assert state.tokenizing_bytes == intake_of(tier).bytes > 0
        tokenizer.open()
        await results(readers)
        await eventually(lambda: not intake_of(tier).waiting)
    assert count("headrace.queue.depth", tier="t", stage="tokenizer") == before
    assert count("headrace.queue.wait", tier="t", stage="tokenizer", outcome="ok") == waited + 3


async def test_a_draining_batcher_completes_requests_at_the_intake() -> None:
    tokenizer = GatedTokenizer()
    async with AsyncExitStack() as stack:
        tier = await stack.enter_async_context(running_tier([EchoEngine()], tokenizer=tokenizer))
        port = tier.batcher.server.port
        async with connect(f"127.0.0.1:{port}", retries=0) as client:
            texts = ("first", "second", "third")
            readers = [asyncio.create_task(collect(client, prompt(text))) for text in texts]
            await eventually(lambda: intake_of(tier).waiting == 3)
            leaving = asyncio.create_task(stack.aclose())
            await eventually(lambda: tier.batcher.server.requests.draining)
            tokenizer.open()

            assert [(await reader).text for reader in readers] == ["first", "second", "third"]
            await leaving


async def test_a_deadline_that_the_tokenizer_cannot_meet_is_rejected_immediately() -> None:
    tokenizer = GatedTokenizer(lambda text: text.startswith("slow"))
    async with gated(tokenizer) as tier:
        lane = intake_of(tier)._lanes[0]
        lane._seconds.add(30.0)  # as if prompts had taken that long
        stuck = [asking(tier, f"slow {number}") for number in range(THREADS)]
        await eventually(lambda: len(tokenizer.texts) == THREADS)

        with pytest.raises(errors.TtftUnattainable, match="tokenised"):
            await asking(tier, "x", timeout=3.0)
        tokenizer.open()
        await results(stuck)


LIMITS = RequestLimits(tier="t", model="m", context_length=100, vocabulary=256, max_tokens=50)


@given(
    temperature=st.none() | st.floats(0, 10, width=32),
    max_tokens=st.none() | st.integers(1, 2**32 - 1),
    tokens=st.integers(1, 99),
)
def test_sampling_is_completed_within_the_limits_of_the_tier(
    temperature: float | None, max_tokens: int | None, tokens: int
) -> None:
    made = LIMITS.sampling(pb.Sampling(temperature=temperature, max_tokens=max_tokens), tokens, pb.Sampling())

    assert made.HasField("seed")
    assert 1 <= made.max_tokens <= min(50, 100 - tokens)
    if temperature is None:
        assert not made.HasField("temperature")
    elif temperature < GREEDY_BELOW:
        assert made.temperature == 0
    else:
        assert made.temperature == temperature
