"""Events are found wherever the pieces of a stream are cut, and none may be longer than allowed."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.upstream.http.sse import EventSplitter, EventTooLong


def split(*pieces: bytes) -> list[bytes]:
    """The data of all events of a stream that arrives in *pieces*."""
    splitter = EventSplitter()
    events = [data for piece in pieces for data in splitter.feed(piece)]
    return events + splitter.end()


@pytest.mark.parametrize(
    ("stream", "events"),
    [
        (b"data: a\n\ndata: b\n\n", [b"a", b"b"]),
        (b"data:a\r\n\r\ndata: b\r\n\r\n", [b"a", b"b"]),
        (b"data: a\r\rdata: b\r\r", [b"a", b"b"]),
        (b"\xef\xbb\xbfdata: a\n\n", [b"a"]),
        (b": ping\n\ndata: a\n: within\ndata: b\n\n", [b"a\nb"]),
        (b"event: message\nid: 7\nretry: 10\ndata: a\n\n", [b"a"]),
        (b"data: a\n\ndata: [DONE]", [b"a", b"[DONE]"]),
        (b"data: a\n\n\n\n\ndata: b\n\n", [b"a", b"b"]),
        (b"data:  two spaces\n\n", [b" two spaces"]),
        (b"data\n\n", [b""]),
        (b"\n\n\n", []),
        (b"", []),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_a_stream_is_split_by_the_rules_of_server_sent_events(stream: bytes, events: list[bytes]) -> None:
    assert split(stream) == events
    assert split(*(stream[at : at + 1] for at in range(len(stream)))) == events


_LINES = st.lists(
    st.sampled_from(
        [b"data: x", b"data:y ", b": comment", b"event: e", b"", b"data: \xef\xbb\xbf", b"other"]
    ),
    max_size=30,
)


@given(lines=_LINES, end=st.sampled_from([b"\n", b"\r\n", b"\r"]), cuts=st.lists(st.integers(0, 400)))
def test_the_same_events_are_found_however_a_stream_is_cut(
    lines: list[bytes], end: bytes, cuts: list[int]
) -> None:
    stream = b"".join(line + end for line in lines)
    places = sorted({0, len(stream), *(cut for cut in cuts if cut < len(stream))})
    pieces = [stream[start:stop] for start, stop in pairwise(places)]

    assert split(*pieces) == split(stream)
    assert split(stream) == split(stream.replace(end, b"\n"))


@pytest.mark.parametrize("end", [b"", b"\n", b"\n\n"])
def test_an_event_that_is_too_long_is_an_error_and_not_memory(end: bytes) -> None:
    splitter = EventSplitter(most=100)
    assert splitter.feed(b"data: " + b"a" * 90 + b"\n\n") == [b"a" * 90]

    with pytest.raises(EventTooLong, match="100 bytes"):
        for _ in range(101):
            splitter.feed(b"a" + end[:1] if end != b"\n\n" else b"data: aaaa\n")


def test_comments_between_events_do_not_add_up() -> None:
    splitter = EventSplitter(most=100)

    assert [splitter.feed(b": keep-alive\n\n") for _ in range(1000)] == [[]] * 1000
