"""Run a whole mesh inside the test's process: real servers on real ports, an echo engine behind each tier."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from headrace.batcher.__main__ import RunningBatcher, batcher
from headrace.batcher.settings import Settings as BatcherSettings
from headrace.batcher.text.tokens import ByteTokenizer, Tokenizer
from headrace.client import Client, connect
from headrace.router.__main__ import router
from headrace.router.settings import Settings as RouterSettings
from headrace.v1 import generation_pb2 as pb
from headrace.worker.__main__ import Worker, engine_loop, with_faults, worker
from headrace.worker.engine.echo import EchoEngine
from headrace.worker.engine.interface import Engine
from headrace.worker.settings import Settings as WorkerSettings

PATIENCE = 90.0  # seconds; the limit of every wait, far beyond what a busy machine needs


@dataclass(frozen=True)
class TierParts:
    """One tier of a test mesh, for tests to inspect."""

    engine: Engine
    worker: Worker
    batcher: RunningBatcher

    @property
    def left_behind(self) -> dict[str, int]:
        """Return the non-zero counts of what an idle tier must not hold."""
        pool = self.batcher.coalescer.pool
        load = self.worker.streams.load()
        counts = {
            "queued": len(self.batcher.coalescer.queue),
            "intake": self.batcher.intake.waiting,
            "live": len(self.batcher.coalescer.live),
            "in flight": sum(link.outstanding for link in pool),
            "handles": sum(len(link.in_flight.jobs()) for link in pool),
            "batcher requests": self.batcher.server.requests.in_flight,
            "worker sequences": self.worker.streams.in_flight,
            "kv tokens": load.kv_tokens_total - load.kv_tokens_free,
        }
        return {name: count for name, count in counts.items() if count}


@dataclass(frozen=True)
class Mesh:
    """A running mesh and a client of its router."""

    client: Client
    port: int
    tiers: Mapping[str, TierParts]

    @property
    def left_behind(self) -> dict[str, dict[str, int]]:
        """Return what each tier still holds; empty if the mesh is idle."""
        return {name: parts.left_behind for name, parts in self.tiers.items() if parts.left_behind}


def echo_engine() -> EchoEngine:
    """Return the usual engine of tests, without model and delay."""
    return EchoEngine()


@asynccontextmanager
async def running_mesh(
    *names: str,
    engine: Callable[[], Engine] = echo_engine,
    tokenizer: Tokenizer | None = None,
    batcher_settings: Mapping[str, Any] | None = None,
    router_settings: Mapping[str, Any] | None = None,
    worker_settings: Mapping[str, Any] | None = None,
    client_options: Mapping[str, Any] | None = None,
    host: str = "127.0.0.1",
) -> AsyncGenerator[Mesh, None]:
    """Run a mesh with tiers of these *names*, smallest first; by default "small" and "large".

    client_options   arguments of `connect` for its client
    host             by which its services call each other
    """
    names = names or ("small", "large")
    async with AsyncExitStack() as stack:
        tiers: dict[str, TierParts] = {}
        for name in names:
            tier_engine = engine()
            running = await stack.enter_async_context(running_worker(tier_engine, **(worker_settings or {})))
            tier_batcher = await stack.enter_async_context(
                batcher(
                    BatcherSettings(
                        port=0,
                        tier=name,
                        workers=f"{host}:{running.server.port}",
                        fake=True,
                        **{"drain_seconds": 2.0, **(batcher_settings or {})},
                    ),
                    tokenizer or ByteTokenizer(),
                    f"{name}-batcher",
                )
            )
            tiers[name] = TierParts(tier_engine, running, tier_batcher)
        gateway = await stack.enter_async_context(
            router(
                RouterSettings(
                    port=0,
                    tiers=",".join(
                        f"{name}={host}:{parts.batcher.server.port}" for name, parts in tiers.items()
                    ),
                    **{"drain_seconds": 2.0, "poll_seconds": 0.1, **(router_settings or {})},
                )
            )
        )
        client = await stack.enter_async_context(
            connect(f"127.0.0.1:{gateway.port}", **(client_options or {}))
        )
        mesh = Mesh(client, gateway.port, tiers)
        await eventually(lambda: gateway.health.ready)
        await eventually(lambda: all(parts.batcher.server.health.ready for parts in tiers.values()))
        await until_healthy(client)
        yield mesh


@asynccontextmanager
async def running_worker(engine: Engine, **settings: Any) -> AsyncGenerator[Worker, None]:
    """Run a worker with *engine*."""
    given = WorkerSettings(port=0, engine="echo", **{"drain_seconds": 2.0, **settings})
    async with worker(given, lambda: with_faults(engine_loop(engine, given), given), "worker") as running:
        yield running


def transformers_tokenizer(path: Path, cache: Path) -> Any:
    """Load the tokenizer of a .gguf file as transformers does.

    A batcher keeps it in *cache*: transformers takes ten seconds to read it from the file.
    """
    from transformers import AutoTokenizer

    from headrace.models.tokenizers.files import read_tokenizer

    kept: Any = AutoTokenizer
    return kept.from_pretrained(cache / "tokenizers" / read_tokenizer(path, cache).fingerprint)


async def until_healthy(client: Client, *tiers: bool) -> None:
    """Wait until the router reports its tiers, smallest first, as healthy as in *tiers*; by default all."""
    async with asyncio.timeout(PATIENCE):
        while True:
            seen = [tier.healthy for tier in (await client.list_tiers()).tiers]
            if seen == (list(tiers) or [True] * len(seen)):
                return
            await asyncio.sleep(0.02)


async def eventually(condition: Callable[[], object], *, timeout: float = PATIENCE) -> None:
    """Wait until *condition* holds; fail after *timeout* seconds."""
    async with asyncio.timeout(timeout):
        while not condition():
            await asyncio.sleep(0.005)


@dataclass
class Answer:
    """A whole answer. The order of its events was checked against the contract."""

    accepted: pb.Accepted = field(default_factory=pb.Accepted)
    text: str = ""
    reasoning: str = ""
    calls: list[pb.ToolCall] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    details: list[pb.TokenLogprobs] = field(default_factory=list)
    prompt: list[pb.TokenLogprobs] = field(default_factory=list)
    deltas: int = 0
    tokens: int = 0
    finish: pb.Finish = field(default_factory=pb.Finish)


async def collect(client: Client, request: pb.GenerateRequest, *, timeout: float | None = PATIENCE) -> Answer:
    """Read one answer to its end and assert what the contract promises of every stream."""
    answer = Answer()
    seen: list[str] = []
    async with aclosing(client.generate(request, timeout=timeout)) as stream:
        async for response in stream:
            event = response.WhichOneof("event") or "nothing"
            assert "finish" not in seen, "an event followed finish"
            assert (event == "accepted") == (not seen), "accepted is the first event and only that"
            seen.append(event)
            if event == "accepted":
                answer.accepted = response.accepted
            elif event == "delta":
                delta = response.delta
                expected = len(request.resume.token_ids) + answer.tokens
                assert delta.offset == expected, f"offset {delta.offset}, expected {expected}"
                if request.stream.include_token_ids:
                    assert len(delta.token_ids) == delta.token_count
                delta.text.encode()
                answer.deltas += 1
                answer.tokens += delta.token_count
                answer.text += delta.text
                answer.reasoning += delta.reasoning
                _add_calls(answer.calls, delta)
                answer.ids += delta.token_ids
                answer.logprobs += delta.logprobs
                answer.details += delta.tokens
            elif event == "prompt_tokens":
                assert "delta" not in seen, "the prompt comes before the answer"
                assert response.prompt_tokens.offset == len(answer.prompt)
                assert response.prompt_tokens.tokens
                answer.prompt += response.prompt_tokens.tokens
            elif event == "finish":
                answer.finish = response.finish
    assert seen[-1:] == ["finish"], f"the stream ended without finish: {seen}"
    return answer


def _add_calls(calls: list[pb.ToolCall], delta: pb.Delta) -> None:
    for part in delta.tool_calls:
        assert bool(part.id) == bool(part.name), "the first part of a call has its id and its name"
        if part.id:
            assert not calls or part.index > 0, "the first call has index 0"
            calls.append(pb.ToolCall(id=part.id, name=part.name))
        elif not calls:  # of an answer that is resumed within a call
            calls.append(pb.ToolCall())
        calls[-1].arguments += part.arguments


def prompt(text: str, **sampling: Any) -> pb.GenerateRequest:
    """Return a request with a raw prompt that asks for token ids."""
    return pb.GenerateRequest(
        prompt=text, sampling=pb.Sampling(**sampling), stream=pb.StreamOptions(include_token_ids=True)
    )
