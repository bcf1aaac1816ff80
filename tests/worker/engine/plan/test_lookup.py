"""Prompt lookup finds an earlier occurrence of the last tokens, and continues it."""

from __future__ import annotations

from itertools import takewhile

from hypothesis import given
from hypothesis import strategies as st

from headrace.worker.engine.plan.lookup import KEPT_ANSWERS, MOST_MATCH, Answers, Lookup, draft

IDS = st.lists(st.integers(0, 2), min_size=1, max_size=60)


def agreeing(text: list[int], place: int, ids: list[int]) -> int:
    """Return how many tokens before a place are the last ones of *ids*."""
    pairs = zip(reversed(text[:place]), reversed(ids), strict=False)
    return min(sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs)), MOST_MATCH)


@given(text=IDS, ids=st.none() | IDS, cuts=st.lists(st.integers(1, 60), max_size=5))
def test_the_longest_of_the_latest_matches_is_found_however_the_text_arrives(
    text: list[int], ids: list[int] | None, cuts: list[int]
) -> None:
    ids = text if ids is None else ids
    lookup = Lookup()
    for count in sorted(cut for cut in cuts if cut < len(text)):
        lookup.add(text[:count])
    lookup.add(text)
    match = lookup.find(text, ids)

    lengths = {place: agreeing(text, place, ids) for place in range(1, len(text))}
    latest = [place for place in lengths if lengths[place] > 1][-4:]
    latest = latest or [place for place in lengths if lengths[place]][-1:]
    if not latest:
        assert match is None
        return
    longest = max(lengths[place] for place in latest)
    assert match == (text, max(place for place in latest if lengths[place] == longest), longest)


@given(ids=IDS, tokens=st.integers(0, 40), data=st.data())
def test_a_draft_continues_as_the_ids_did_and_repeats_them_at_their_end(
    ids: list[int], tokens: int, data: st.DataObject
) -> None:
    place = data.draw(st.integers(0, len(ids) - 1))

    expected = list(ids)
    for i in range(tokens):
        expected.append(expected[place + i])
    assert draft(ids, place, tokens) == expected[len(ids) :]


@given(
    answers=st.lists(
        st.tuples(st.sampled_from([b"", b"a"]), st.lists(st.integers(0, 3), max_size=20)), max_size=8
    ),
    scope=st.sampled_from([b"", b"a"]),
    ids=IDS,
)
def test_a_match_among_answers_continues_one_answer_of_the_scope(
    answers: list[tuple[bytes, list[int]]], scope: bytes, ids: list[int]
) -> None:
    kept = Answers()
    for whose, answer in answers:
        kept.add(whose, answer)
    match = kept.find(scope, ids)

    if match is None:
        assert all(ids[-1] not in answer[:-1] for whose, answer in answers if whose == scope)
        return
    text = [*ids[len(ids) - match.length :], *draft(match.text, match.place, 16)]
    assert any(
        text == answer[start : start + len(text)]
        for whose, answer in answers
        if whose == scope
        for start in range(len(answer))
    )


def test_only_the_latest_answers_are_kept() -> None:
    kept = Answers()
    length = KEPT_ANSWERS // 8
    for number in range(100):
        kept.add(b"", range(number * length, (number + 1) * length))
    found = [kept.find(b"", [number * length]) is not None for number in range(100)]

    assert all(found[-8:])
    assert 8 <= sum(found) <= 16


def test_one_answer_takes_no_more_memory_than_all() -> None:
    kept = Answers()
    kept.add(b"", range(10 * KEPT_ANSWERS))

    assert kept.find(b"", [KEPT_ANSWERS // 2]) is not None
    assert kept.find(b"", [2 * KEPT_ANSWERS]) is None
