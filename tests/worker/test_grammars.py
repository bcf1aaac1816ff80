"""Grammars that arrive at a worker: checked before they are compiled, and never the worker's fault."""

from __future__ import annotations

from typing import Any

import pytest

from headrace import errors, statuses
from headrace.batcher.links.failover import is_worker_fault
from headrace.grammars.problems import MAX_GRAMMAR
from headrace.v1 import generation_pb2 as pb
from headrace.v1 import worker_service_pb2 as wire
from headrace.worker.engine.echo import EchoEngine
from tests.harness import running_worker
from tests.worker.engine.grammar.cases import PERSON, is_person, regex
from tests.worker.peer import Peer, dialled, sequence, submit

AMBIGUOUS = 'start: s\ns: s s s | "a" s | "b" s | "a" | ""'


def restricted(handle: int, text: str, grammar: str, **sampling: Any) -> wire.Sequence:
    one = sequence(handle, text, **sampling)
    one.grammar = grammar
    return one


async def ended(peer: Peer, *handles: int) -> dict[int, wire.SequenceDelta]:
    """Wait for the last deltas of sequences, and return them."""
    found: dict[int, wire.SequenceDelta] = {}
    while not found.keys() >= {*handles}:
        response = await peer.read("step")
        found |= {
            delta.handle: delta for delta in response.step.deltas if delta.HasField("error") or delta.finish
        }
    return found


def answer(peer: Peer, handle: int) -> bytes:
    return bytes(id for delta in peer.deltas() if delta.handle == handle for id in delta.token_ids)


async def test_an_answer_follows_the_grammar_of_its_sequence_also_if_it_is_resumed() -> None:
    async with running_worker(EchoEngine()) as worker, dialled(worker.server.port) as peer:
        welcome = await peer.hello()
        assert "structured" in welcome.model.features
        await peer.call.write(submit(restricted(1, "bob 42", PERSON, max_tokens=200)))
        await ended(peer, 1)
        whole = answer(peer, 1)
        resumed = restricted(2, "bob 42", PERSON, max_tokens=200)
        resumed.resume_ids.extend(whole[:9])
        await peer.call.write(submit(resumed))
        await ended(peer, 2)

    assert is_person(whole)
    assert answer(peer, 2) == whole[9:]


@pytest.mark.parametrize(
    ("grammar", "resumed", "message"),
    [
        ("start: /(/", b"", "unclosed group"),
        ("start: @missing", b"", "missing"),
        (regex("[a-z]+"), b"42", "satisfy the grammar"),
        (AMBIGUOUS, b"", "items"),
    ],
    ids=["syntax", "reference", "resumed", "limit"],
)
async def test_a_grammar_that_fails_is_the_callers_fault_and_its_neighbours_are_unharmed(
    grammar: str, resumed: bytes, message: str
) -> None:
    async with running_worker(EchoEngine()) as worker, dialled(worker.server.port) as peer:
        await peer.hello()
        bad = restricted(1, "a" * 600, grammar, max_tokens=900)
        bad.resume_ids.extend(resumed)
        await peer.call.write(
            submit(bad, sequence(2, "a neighbour"), restricted(3, "another", regex("[a-z]+")))
        )
        ends = await ended(peer, 1, 2, 3)

    error = statuses.from_status(ends[1].error)
    assert isinstance(error, errors.InvalidSampling)
    assert message in error.message
    assert error.field == "sampling.structured"
    assert not is_worker_fault(error)
    assert {ends[handle].finish for handle in (2, 3)} == {pb.FINISH_REASON_STOP}
    assert (answer(peer, 2), answer(peer, 3)) == (b"a neighbour", b"another")


class Plain(EchoEngine):
    """An engine without grammars."""

    def __init__(self) -> None:
        super().__init__()
        self.grammars = None
        features = tuple(name for name in self._model.features if name != "structured")
        object.__setattr__(self._model, "features", features)


@pytest.mark.parametrize(
    ("engine", "grammar", "sampling", "message"),
    [
        (EchoEngine, "x" * (MAX_GRAMMAR + 1), {}, f"more than {MAX_GRAMMAR} bytes"),
        (EchoEngine, "é" * (MAX_GRAMMAR - 1), {}, f"more than {MAX_GRAMMAR} bytes"),
        (EchoEngine, regex("a"), {"ignore_eos": True}, "ignore_eos"),
        (Plain, regex("a"), {}, "does not support"),
    ],
    ids=["long", "long in bytes", "ignore_eos", "unsupported"],
)
async def test_what_can_be_known_of_a_grammar_is_checked_before_the_sequence_is_admitted(
    engine: type[EchoEngine], grammar: str, sampling: dict[str, Any], message: str
) -> None:
    async with running_worker(engine()) as worker, dialled(worker.server.port) as peer:
        await peer.hello()
        await peer.call.write(submit(restricted(1, "hello", grammar, **sampling), sequence(2)))
        await ended(peer, 2)

    verdict = peer.verdicts()[1]
    assert verdict.state == wire.ADMISSION_STATE_REFUSED
    error = statuses.from_status(verdict.error)
    assert isinstance(error, errors.InvalidSampling)
    assert message in error.message
    assert error.field == "sampling.structured"
