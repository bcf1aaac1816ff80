"""Gathered deltas are the same answer in fewer messages."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from headrace.flushing import Flusher
from headrace.upstream.gathering import Gathering
from headrace.v1 import generation_pb2 as pb

_KIND = st.sampled_from(["text", "reasoning", "call", "nothing"])


def made(kinds: list[str]) -> list[pb.Delta]:
    """Deltas of these kinds, one token each."""
    deltas, calls = [], -1
    for offset, kind in enumerate(kinds):
        delta = pb.Delta(offset=offset, token_count=1)
        if kind == "call":
            new = calls < 0 or offset % 3 == 0
            calls += new
            name = {"id": f"call-{calls}", "name": "f"} if new else {}
            delta.tool_calls.append(pb.ToolCallDelta(index=calls, arguments=f"{offset},", **name))
        elif kind != "nothing":
            setattr(delta, kind, f"{offset} ")
        deltas.append(delta)
    return deltas


def story(deltas: list[pb.Delta]) -> list[tuple[str, str]]:
    """What a reader sees: each kind of content in its order, joined."""
    parts: list[tuple[str, str]] = []
    for delta in deltas:
        found = [("reasoning", delta.reasoning), ("text", delta.text)]
        found += [(f"call {part.index} {part.id}", part.arguments) for part in delta.tool_calls]
        for kind, value in found:
            known = parts and (parts[-1][0] == kind or (kind.endswith(" ") and parts[-1][0].startswith(kind)))
            if value and known:
                parts[-1] = (parts[-1][0], parts[-1][1] + value)
            elif value:
                parts.append((kind, value))
    return parts


@given(kinds=st.lists(_KIND, max_size=40), tokens=st.integers(1, 8), flushes=st.sets(st.integers(0, 40)))
def test_nothing_is_lost_or_moved(kinds: list[str], tokens: int, flushes: set[int]) -> None:
    gathering, sent = Gathering(Flusher(tokens=tokens)), []
    for place, delta in enumerate(made(kinds)):
        sent += gathering.add(delta, now=0.0)
        if place in flushes:
            sent += gathering.flush()
    sent += gathering.flush()

    assert story(sent) == story(made(kinds))
    offset = 0
    for delta in sent:
        assert delta.offset == offset
        assert delta.token_count <= tokens
        offset += delta.token_count
    assert offset == len(kinds)


def test_the_first_token_is_sent_at_once_and_later_ones_are_gathered() -> None:
    gathering = Gathering(Flusher(tokens=3, seconds=0.1))
    first, *others = made(["text"] * 5)

    assert gathering.add(first, now=1.0) == [first]
    assert gathering.add(others[0], now=2.0) == []
    assert gathering.flush_at == 2.1
    assert gathering.add(others[1], now=2.0) == []
    (joined,) = gathering.add(others[2], now=2.0)
    assert (joined.offset, joined.token_count, joined.text) == (1, 3, "1 2 3 ")
